"""An optimizer with one group of parameters for all that are treated alike: a few kernels a step, not hundreds.

mmengine makes a group of every parameter as soon as ``paramwise_cfg`` says that norms have no decay, and torch starts
an optimizer's kernels for every group: some hundred in every step of a detector.
"""

import functools
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

__all__ = ["MergedOptimWrapperConstructor"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with parameters of the same options in one group: the same steps, to the last bit.

    ``optim_wrapper=dict(constructor="MergedOptimWrapperConstructor", paramwise_cfg=...)``. A run that began with a
    group per parameter can be resumed: what its checkpoint says of the optimizer is sorted into the groups.
    """

    _depth = 0

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module=None) -> None:
        self._depth += 1
        try:
            super().add_params(params, module, prefix, is_dcn_module)
        finally:
            self._depth -= 1
        if self._depth == 0:
            self._order = [parameter for group in params for parameter in group["params"]]
            params[:] = _merged(params)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        wrapper = super().__call__(model)
        if self.paramwise_cfg:
            places = {id(parameter): i for i, parameter in enumerate(self._order)}
            optimizer = wrapper.optimizer
            members = [[places[id(p)] for p in group["params"]] for group in optimizer.param_groups]
            optimizer.register_load_state_dict_pre_hook(lambda _, state: _sorted_into(members, state))
        return wrapper


def _merged(groups: list[dict]) -> list[dict]:
    """Return the groups with those of the same options in one, each where the first of them stood."""
    merged: list[tuple[dict, dict]] = []  # options, group
    for group in groups:
        options = {key: value for key, value in group.items() if key != "params"}
        alike = next((into for known, into in merged if known == options), None)
        if alike is None:
            merged.append((options, options | {"params": list(group["params"])}))
        else:
            alike["params"] += group["params"]
    return [group for _, group in merged]


def _sorted_into(members: list[list[int]], state: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state dict of an optimizer with a group per parameter as one of these groups has it, or None.

    Args:
        members: Of each group, the places of its parameters among those of the model.
        state: A state dict; None is returned, and torch takes it as it is, unless every group has one parameter.
    """
    groups = state["param_groups"]
    number = sum(map(len, members))
    if len(groups) != number or len(members) == number or any(len(group["params"]) != 1 for group in groups):
        return None
    sorted_groups, states, place = [], {}, 0
    for places in members:
        of_group = [groups[i] for i in places]
        first = {key: value for key, value in of_group[0].items() if key != "params"}
        if any({key: value for key, value in group.items() if key != "params"} != first for group in of_group[1:]):
            return None  # they are not treated alike in that run: torch says that the groups differ
        for group in of_group:
            if group["params"][0] in state["state"]:
                states[place] = state["state"][group["params"][0]]
            place += 1
        sorted_groups.append(first | {"params": list(range(place - len(places), place))})
    return {"state": states, "param_groups": sorted_groups}


def _by_groups(load: Any) -> Any:
    @functools.wraps(load)
    def load_state_dict(self: _ParamScheduler, state_dict: dict) -> None:
        lowest = getattr(self, "min_values", None)
        load(self, state_dict)
        groups = self.optimizer.param_groups
        # What a run with a group per parameter has of each; the optimizer's are sorted into these groups by now.
        if hasattr(self, "base_values") and len(self.base_values) != len(groups):
            self.base_values = [group[f"initial_{self.param_name}"] for group in groups]
        if lowest is not None and len(self.min_values) != len(groups):
            self.min_values = lowest

    return load_state_dict


if not hasattr(_ParamScheduler.load_state_dict, "__wrapped__"):
    _ParamScheduler.load_state_dict = _by_groups(_ParamScheduler.load_state_dict)
