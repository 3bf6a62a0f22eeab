"""recompute_norms: the same bits from one stored tensor per convolution, norm and activation."""

import copy
import pickle
import weakref

import pytest
import torch
from test_adapt import BACKBONES, GN, flat, inputs, run, shake
from torch import nn

from normplug.layers import EvoNormS0, GroupNorm
from normplug.openmmlab.adapt import fuse_activations
from normplug.openmmlab.recompute import recompute_norms
from normplug.registry import MODELS

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")


def build(name, norm=GN):
    cfg, shape = BACKBONES[name]
    return fuse_activations(shake(MODELS.build(cfg | dict(norm_cfg=norm))), ("cpu", "cuda")), shape


def outputs_alive(model, x):
    """Run forward and return how many outputs of norms the graph keeps, and of how many."""
    refs = []
    hooks = [
        m.register_forward_hook(lambda m, args, y: refs.append(weakref.ref(y)))
        for m in model.modules()
        if isinstance(m, (GroupNorm, EvoNormS0))
    ]
    y = flat(model(x))
    alive = sum(r() is not None and not any(r() is t for t in y) for r in refs)
    for hook in hooks:
        hook.remove()
    return alive, len(refs)


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("norm", [GN, dict(type="EvoNormS0", num_groups=4), dict(type="FRN")], ids=lambda n: n["type"])
@pytest.mark.parametrize("name", ["r18", "r50", "r50v1d", "r50-plugins", "r18-checkpointed", "3d-r50", "mask-head"])
def test_same_bits(name, norm):
    stored, shape = build(name, norm)
    again = recompute_norms(copy.deepcopy(stored))
    x = inputs(shape)
    for g, w in zip(run(again, x), run(stored, x), strict=True):
        assert torch.equal(g, w)


def test_only_ends_of_residual_blocks_are_kept():
    # (on a CPU the op of GN keeps its output for the gradient of ReLU, so this looks at another norm)
    stored, shape = build("r50", dict(type="EvoNormS0", num_groups=4))
    again = recompute_norms(copy.deepcopy(stored))
    kept, norms = outputs_alive(stored, inputs(shape))
    left, _ = outputs_alive(again, inputs(shape))
    # 2 stages of 3 and 4 blocks: all outputs but that of the network are kept, afterwards the blocks' ends
    blocks = sum(len(getattr(stored, f"layer{i}")) for i in (1, 2))
    assert kept > 2 * blocks
    assert left <= blocks < norms


def test_layers_by_themselves():
    """A norm behind a norm, one output used twice, and one that is changed in place."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), GroupNorm(8, 2, act="relu"), EvoNormS0(8, num_groups=2), nn.ReLU(True))
    end = nn.Conv2d(8, 4, 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.end = net, end

        def forward(self, x):
            y = self.net(x)
            return self.end(y) * self.end(y)

    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    stored = Net()
    again = recompute_norms(copy.deepcopy(stored))
    for g, w in zip(run(again, x), run(stored, x), strict=True):
        assert torch.equal(g, w)


def test_an_error_in_forward_leaves_no_hooks():
    model, shape = build("r18")
    again = recompute_norms(model)
    with pytest.raises(RuntimeError):
        again(torch.randn(1, 5, 32, 32, 1, 1))
    assert not any(m._forward_hooks for m in again.modules() if isinstance(m, GroupNorm))
    x = torch.randn(3, requires_grad=True)
    y = x.exp()
    assert y.grad_fn._saved_result is not None
    run(again, inputs(shape))


def test_copies_and_pickles():
    model, shape = build("r18")
    recompute_norms(model)
    x = inputs(shape)
    want = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for g, w in zip(run(twin, x), want, strict=True):
            assert torch.equal(g, w)


def test_a_model_without_such_norms_is_refused():
    with pytest.raises(ValueError, match="GN, EvoNormS0 and FRN"):
        recompute_norms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
