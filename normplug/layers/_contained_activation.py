"""What layers that contain their activation share."""

import torch
from torch import nn

__all__ = ["ContainedActivation"]


class ContainedActivation(nn.Module):
    """The activation's parameter, the form of the layer without it, and other packages' checkpoints.

    A layer lists nn.GroupNorm among its own bases and not through this class: mmengine's initializers look at the
    names of the direct bases only.
    """

    _act_parameter = "v"  # what only the activation needs, and its initial value
    _act_initial = 1.0
    # names of the authors' and other packages' checkpoints, whose tensors are (1, C, 1, 1) or (1, 1, 1, C)
    _aliases: tuple[tuple[str, str], ...] = (("gamma", "weight"), ("beta", "bias"))
    _ignored: tuple[str, ...] = ()  # what a checkpoint may hold and this layer has no use for

    @property
    def num_features(self) -> int:
        """Another name of ``num_channels``: the toolkits ask every norm for it."""
        return self.num_channels

    def _set_up(self, apply_act: bool, device, dtype) -> None:
        value = torch.full((self.num_channels,), self._act_initial, device=device, dtype=dtype)
        setattr(self, self._act_parameter, nn.Parameter(value))
        self.apply_act = True
        if not apply_act:
            self.drop_activation()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if getattr(self, self._act_parameter, None) is not None:
            nn.init.constant_(getattr(self, self._act_parameter), self._act_initial)

    def drop_activation(self) -> None:
        """Turn the layer, in place, into what stands before a residual sum or has no activation.

        This is the form of ``apply_act=False``. Weight and bias stay.
        """
        self.apply_act = self.contains_activation = False
        setattr(self, self._act_parameter, None)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        for alias, name in self._aliases:
            if prefix + alias in state_dict and prefix + name not in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + alias)
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            value = state_dict.get(prefix + name)
            if own is not None and value is not None and value.ndim > 1 and value.numel() == own.numel():
                state_dict[prefix + name] = value.reshape(own.shape)
        for name in self._ignored:
            if name not in self._buffers:
                state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + self._act_parameter in missing_keys:  # the checkpoint of a plain norm: it stays as it is
            missing_keys.remove(prefix + self._act_parameter)
