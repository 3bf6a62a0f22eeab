"""One group of parameters for all that are treated alike: the steps are those of a group for each."""

import copy

import pytest
import torch
from mmengine.optim import CosineAnnealingLR, ReduceOnPlateauLR, build_optim_wrapper
from torch import nn

import normplug  # noqa: F401  registers the constructor

RULES = dict(norm_decay_mult=0.0, bias_lr_mult=2.0, bias_decay_mult=0.0, custom_keys={"3": dict(lr_mult=0.5)})


def model():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)) for _ in range(3)]
    return nn.Sequential(*blocks, nn.Conv2d(4, 2, 1))


def built(net, constructor, kind="SGD", **rules):
    settings = dict(type=kind, lr=0.01, weight_decay=0.01) | (dict(momentum=0.9) if kind == "SGD" else {})
    cfg = dict(constructor=constructor, type="OptimWrapper", optimizer=settings, paramwise_cfg=rules or RULES)
    return build_optim_wrapper(net, cfg)


def train(net, wrapper, steps):
    torch.manual_seed(steps)
    for _ in range(steps):
        wrapper.update_params(net(torch.randn(2, 4, 3, 3)).square().mean())


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_steps_are_the_same_with_fewer_groups(kind):
    nets = model(), model()
    default, merged = (
        built(net, name, kind)
        for net, name in zip(nets, ("DefaultOptimWrapperConstructor", "MergedOptimWrapperConstructor"), strict=True)
    )
    for net, wrapper in zip(nets, (default, merged), strict=True):
        train(net, wrapper, 5)
    assert len(default.optimizer.param_groups) == 14
    # weights, biases of convolutions, norms, and the last layer's
    assert [len(group["params"]) for group in merged.optimizer.param_groups] == [3, 3, 6, 2]
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)


def annealed(wrapper):
    return CosineAnnealingLR(wrapper.optimizer, T_max=9, eta_min_ratio=0.1), ()


def reduced(wrapper):
    """Halved in every epoch but the first, down to a bound that the second half of the run reaches."""
    return ReduceOnPlateauLR(wrapper.optimizer, patience=0, factor=0.5, min_value=1e-3), ({"loss": 1.0},)


@pytest.mark.parametrize("constructor", ["DefaultOptimWrapperConstructor", "MergedOptimWrapperConstructor"])
@pytest.mark.parametrize("scheduled", [annealed, reduced])
def test_a_run_goes_on(scheduled, constructor, tmp_path):
    """Also one that began with a group per parameter, whose schedule has a value for each."""
    first = model()
    before = built(first, constructor)
    schedule, metrics = scheduled(before)
    for _ in range(3):
        train(first, before, 1)
        schedule.step(*metrics)
    torch.save([before.state_dict(), schedule.state_dict()], tmp_path / "run.pth")
    second = copy.deepcopy(first)
    after = built(second, "MergedOptimWrapperConstructor")
    again, _ = scheduled(after)
    for part, state in zip((after, again), torch.load(tmp_path / "run.pth"), strict=True):
        part.load_state_dict(state)
    for net, wrapper, scheduler in ((first, before, schedule), (second, after, again)):
        for _ in range(3):
            train(net, wrapper, 1)
            scheduler.step(*metrics)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    rates = [
        {id(p): group["lr"] for group in w.optimizer.param_groups for p in group["params"]} for w in (before, after)
    ]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert rates[0][id(a)] == rates[1][id(b)]


def test_groups_that_are_not_treated_alike_are_not_mixed():
    first = model()
    before = built(first, "DefaultOptimWrapperConstructor")
    train(first, before, 1)
    before.optimizer.param_groups[0]["lr"] = 7.0
    after = built(copy.deepcopy(first), "MergedOptimWrapperConstructor")
    with pytest.raises(ValueError, match="different number of parameter groups"):
        after.load_state_dict(before.state_dict())


def test_without_rules_it_is_the_default():
    net = model()
    wrapper = build_optim_wrapper(
        net, dict(constructor="MergedOptimWrapperConstructor", type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1))
    )
    assert len(wrapper.optimizer.param_groups) == 1
