"""Triton kernels: what the ops run on CUDA. Imported by them on first use; nothing here knows of autograd."""
