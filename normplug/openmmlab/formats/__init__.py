"""Weights of other projects: what their files and keys mean, and how they become an OpenMMLab checkpoint."""
