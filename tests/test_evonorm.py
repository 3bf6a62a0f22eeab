"""EvoNorms: running statistics, invariants, other implementations' checkpoints and numbers, toolkit rules, ops."""

import copy

import pytest
import torch
from cases import DEVICE, evonorm_b0, evonorm_s0
from torch import nn

import normplug.ops._blocks
from normplug import ops
from normplug.layers import EvoNormB0, EvoNormS0

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
BOTH = pytest.mark.parametrize("cls", [EvoNormB0, EvoNormS0])


def shaken(layer):
    for p in layer.parameters():
        nn.init.normal_(p, mean=1.0)
    return layer.to(DEVICE)


def parameters64(layer):
    return {name: p.detach().double() for name, p in layer.named_parameters()}


# --- groups, arguments, errors


@pytest.mark.parametrize(
    ("channels", "groups"), [(64, 32), (40, 20), (48, 24), (100, 25), (144, 24), (24, 24), (17, 17)]
)
def test_32_groups_are_lowered_until_they_divide(channels, groups):
    assert EvoNormS0(channels).num_groups == groups
    assert EvoNormS0(channels, num_groups=32).num_groups == groups


def test_sizes_of_groups():
    assert EvoNormS0(64, num_groups=8).num_groups == 8
    assert EvoNormS0(64, channels_per_group=16).num_groups == 4
    assert EvoNormB0(24).num_groups == 24
    with pytest.raises(ValueError, match=r"one of num_groups and channels_per_group.*=32.*=2"):
        EvoNormS0(64, num_groups=32, channels_per_group=2)
    with pytest.raises(ValueError, match=r"16 channels.*channels_per_group=5.*\[1, 2, 4, 8, 16\]"):
        EvoNormS0(16, channels_per_group=5)
    with pytest.raises(ValueError, match="num_groups=0"):
        EvoNormS0(16, num_groups=0)
    with pytest.raises(ValueError, match="divides 6"):
        ops.evonorm_s0(torch.zeros(2, 6), 4, None, None, torch.ones(6))


def test_a_group_of_a_single_value_is_refused():
    layer = EvoNormS0(8, channels_per_group=1)
    with pytest.raises(ValueError, match=r"num_groups=8.*\(2, 8, 1, 1\).*single value.*channels_per_group"):
        layer(torch.randn(2, 8, 1, 1))
    assert layer(torch.randn(2, 8, 1, 2)).isfinite().all()
    assert layer(torch.randn(0, 8, 1, 1)).shape == (0, 8, 1, 1)
    assert EvoNormS0(8, channels_per_group=2)(torch.randn(2, 8)).isfinite().all()
    layer.drop_activation()
    assert layer(torch.randn(2, 8, 1, 1)).shape == (2, 8, 1, 1)


def test_b0_refuses_to_train_on_a_single_value_per_channel():
    layer = EvoNormB0(8)
    with pytest.raises(ValueError, match=r"EvoNormB0.*single value.*\(1, 8, 1, 1\).*\.eval\(\)"):
        layer(torch.randn(1, 8, 1, 1))
    assert (layer.running_var == 1).all()
    assert layer.eval()(torch.randn(1, 8, 1, 1)).isfinite().all()
    with pytest.raises(ValueError, match=r"momentum=None.*momentum=0\.1"):
        EvoNormB0(8, momentum=None)


# --- statistics


@pytest.mark.parametrize("unbiased", [False, True], ids=["population", "unbiased"])
def test_two_training_steps_then_eval(unbiased):
    layer = shaken(EvoNormB0(6, momentum=0.3, running_unbiased=unbiased))
    running = torch.ones(6, dtype=torch.float64, device=DEVICE)
    for _ in range(2):
        x = 10 + 3 * torch.randn(3, 6, 5, 4, device=DEVICE)
        layer(x)
        running = 0.7 * running + 0.3 * x.double().var((0, 2, 3), correction=int(unbiased))
    torch.testing.assert_close(layer.running_var.double(), running, rtol=1e-6, atol=0)
    kept = layer.running_var.clone()
    x = torch.randn(3, 6, 5, 4, device=DEVICE)
    got = layer.eval()(x)
    want = evonorm_b0(batch_var=running)(x.double(), **parameters64(layer))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.running_var, kept)


@BOTH
def test_an_empty_batch_goes_both_ways_and_leaves_no_trace(cls):
    layer = cls(8)
    for shape in [(0, 8, 4, 4), (0, 8), (2, 8, 0, 4)]:
        x = torch.randn(shape, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == shape
    assert all(p.grad.eq(0).all() for p in layer.parameters())
    assert all(b.eq(1).all() for b in layer.buffers())


def test_running_variance_stays_float32_in_a_half_model():
    layer = EvoNormB0(4)
    layer.running_var.fill_(1 + 1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(layer).to(dtype)
        assert half.weight.dtype == dtype
        assert half.running_var.dtype == torch.float32
        assert torch.equal(half.running_var, layer.running_var)
        half.eval()(torch.randn(2, 4, 3, 3, dtype=dtype))
    assert layer.double().running_var.dtype == torch.float64
    with torch.device("meta"):
        layer = EvoNormB0(4).half()
    assert layer.to_empty(device="cpu").running_var.dtype == torch.float32


# --- invariants of the formulas


def test_limits_of_s0():
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    std = (x.unflatten(1, (2, 4)).var((2, 3, 4), correction=0) + 1e-5).sqrt().repeat_interleave(4, 1)[..., None, None]
    for v, want in [(0.0, x / (2 * std)), (1e6, x.relu() / std), (1.0, nn.functional.silu(x) / std)]:
        got = ops.evonorm_s0(x, 2, None, None, torch.full((8,), v, dtype=torch.float64))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [EvoNormS0, EvoNormB0], ids=["S0", "B0-eval"])
def test_samples_do_not_see_each_other(cls):
    layer = shaken(cls(8)).eval()
    x = torch.randn(5, 8, 6, 6, device=DEVICE)
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))


def test_b0_does_not_depend_on_the_scale():
    x, v = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    y, scaled = (ops.evonorm_b0(s * x, None, None, v, eps=0.0)[0] for s in (1, 7))
    torch.testing.assert_close(y, scaled)


def test_b0_evaluates_with_the_variance_of_the_batch_as_it_trains():
    x, v = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    trained, var = ops.evonorm_b0(x, None, None, v)
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0))
    torch.testing.assert_close(ops.evonorm_b0(x, None, None, v, var)[0], trained)
    assert not var.requires_grad


@BOTH
@pytest.mark.parametrize("mean", [0, 1000])
@LAYOUTS
def test_large_mean(cls, mean, layout):
    """Mean 1000, variance 1: what E[x²] - E[x]² in float32 gets wrong."""
    layer = shaken(cls(8, **({"num_groups": 2} if cls is EvoNormS0 else {})))
    x = (mean + torch.randn(2, 8, 16, 16, device=DEVICE)).to(memory_format=layout)
    want = (evonorm_s0(2) if cls is EvoNormS0 else evonorm_b0())(x.double(), **parameters64(layer))
    torch.testing.assert_close(layer(x).double(), want, rtol=2e-5, atol=1e-5)


# --- scale and shift only


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("converted", [False, True], ids=["built", "converted"])
def test_without_activation_it_is_weight_and_bias_alone(cls, dtype, converted):
    layer = cls(8) if converted else cls(8, apply_act=False)
    shaken(layer)
    if converted:
        layer.drop_activation()
        layer.drop_activation()  # once more changes nothing
    assert dict(layer.named_parameters()).keys() == {"weight", "bias"}
    assert not list(layer.buffers())
    assert not layer.contains_activation
    assert not layer.batch_statistics
    assert cls.contains_activation
    assert "apply_act=False" in repr(layer)
    layer.reset_parameters()
    shaken(layer)
    x = torch.randn(1, 8, 1, 1, device=DEVICE).to(dtype).requires_grad_()
    y = layer(x)
    want = x.double() * layer.weight.double().view(8, 1, 1) + layer.bias.double().view(8, 1, 1)
    assert y.dtype == dtype
    torch.testing.assert_close(y, want.to(dtype))
    y.sum().backward()
    assert x.grad.dtype == dtype
    for shape in [(0, 8, 4, 4), (0, 8)]:
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == shape


@BOTH
def test_without_affine(cls):
    layer = cls(8, affine=False)
    assert dict(layer.named_parameters()).keys() == {"v"}
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert layer.v.grad.abs().min() > 0
    torch.testing.assert_close(y, cls(8)(x))
    layer.drop_activation()
    assert torch.equal(layer(x), x)


# --- checkpoints


def test_b0_takes_a_bn_checkpoint_and_keeps_v():
    stock, layer = nn.BatchNorm2d(8), EvoNormB0(8)
    nn.init.normal_(stock.weight)
    nn.init.uniform_(stock.running_var)
    nn.init.constant_(layer.v, 3)
    result = layer.load_state_dict(stock.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(layer.running_var, stock.running_var)
    assert torch.equal(layer.weight, stock.weight)
    assert (layer.v == 3).all()
    EvoNormB0(8, apply_act=False).load_state_dict(stock.state_dict(), strict=True)


def test_s0_takes_a_gn_checkpoint_and_keeps_v():
    stock, layer = nn.GroupNorm(4, 8), EvoNormS0(8)
    nn.init.normal_(stock.bias)
    layer.load_state_dict(stock.state_dict(), strict=True)
    assert torch.equal(layer.bias, stock.bias)
    assert (layer.v == 1).all()
    EvoNormS0(8, apply_act=False).load_state_dict(stock.state_dict(), strict=True)


def test_checkpoints_of_other_norms_are_refused():
    with pytest.raises(RuntimeError, match="running_mean"):
        EvoNormS0(8).load_state_dict(nn.BatchNorm2d(8).state_dict())
    with pytest.raises(RuntimeError, match="running_var"):
        EvoNormB0(8).load_state_dict(nn.GroupNorm(4, 8).state_dict())
    for cls in (EvoNormS0, EvoNormB0):
        with pytest.raises(RuntimeError, match=r"Unexpected.*v"):
            cls(8, apply_act=False).load_state_dict(cls(8).state_dict())
        with pytest.raises(RuntimeError, match="size mismatch"):
            cls(8).load_state_dict(cls(16).state_dict())


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 1, 1, 8)], ids=str)
@BOTH
def test_names_and_shapes_of_other_packages(cls, shape):
    values = {"gamma": torch.randn(shape), "beta": torch.randn(shape), "v": torch.randn(shape)}
    if cls is EvoNormB0:
        values["moving_variance" if shape[1] == 1 else "running_var"] = torch.rand(shape)
    given = {f"norm.{k}": t for k, t in values.items()}
    model = nn.ModuleDict({"norm": cls(8)})
    model.load_state_dict(given, strict=True)
    assert set(given) == {f"norm.{k}" for k in values}  # the caller's dict is as it was
    for name, want in zip(("weight", "bias", "v", "running_var"), values.values(), strict=False):
        assert torch.equal(getattr(model["norm"], name), want.flatten())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["S0", "B0"])
def test_timm_computes_the_same(name, training):
    timm = pytest.importorskip("timm.layers")
    theirs = getattr(timm, f"EvoNorm2d{name}")(64, eps=1e-5)
    ours = EvoNormS0(64) if name == "S0" else EvoNormB0(64, running_unbiased=True)
    shaken(theirs).double()
    if name == "B0":
        nn.init.uniform_(theirs.running_var, 0.5, 2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.to(DEVICE).double()
    if name == "B0" and training:
        # timm takes its statistics in float32 whatever the input: compare there
        theirs.float(), ours.float()
    dtype = torch.float32 if name == "B0" and training else torch.float64
    x = torch.randn(4, 64, 6, 6, device=DEVICE, dtype=dtype, requires_grad=True)
    dy, results = torch.randn_like(x), []
    for layer in (ours.train(training), theirs.train(training)):
        y = layer(x)
        results.append((y, *torch.autograd.grad(y, [x, layer.weight, layer.bias, layer.v], dy), *layer.buffers()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


# --- what the toolkits do to norms


@BOTH
def test_toolkits_take_it_for_a_norm_but_not_for_a_batch_norm(cls):
    cnn = pytest.importorskip("mmcv.cnn")
    from mmengine.model import constant_init, revert_sync_batchnorm
    from mmengine.model.weight_init import initialize
    from mmengine.optim import build_optim_wrapper

    name, layer = cnn.build_norm_layer(dict(type=cls.__name__, requires_grad=False), 8, postfix=3)
    assert name == {EvoNormB0: "bn3", EvoNormS0: "gn3"}[cls]
    assert type(layer) is cls
    assert not any(p.requires_grad for p in layer.parameters())
    assert cnn.is_norm(layer)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), shaken(cls(8)).cpu()).eval()
    wrapper = build_optim_wrapper(
        model, dict(optimizer=dict(type="SGD", lr=1, weight_decay=1), paramwise_cfg=dict(norm_decay_mult=0))
    )
    assert [g["weight_decay"] for g in wrapper.optimizer.param_groups] == [1, 1, 0, 0, 0]

    x = torch.randn(2, 4, 6, 6)
    want = model(x)
    for convert in (cnn.fuse_conv_bn, nn.SyncBatchNorm.convert_sync_batchnorm, revert_sync_batchnorm):
        other = convert(copy.deepcopy(model))
        assert type(other[1]) is cls
        assert torch.equal(other(x), want)

    initialize(model, dict(type="Constant", val=1, layer=["_BatchNorm", "GroupNorm"]))
    assert (model[1].weight == 1).all()
    assert (model[1].bias == 0).all()
    nn.init.constant_(model[1].v, 5)
    constant_init(model[1], 0)
    assert (model[1].weight == 0).all()
    assert (model[1].bias == 0).all()
    assert (model[1].v == 5).all()
    model[1].weight = nn.Parameter(torch.ones(8))
    holder = nn.ModuleDict({"norm3": model[1]})
    initialize(holder, dict(type="Constant", val=1, override=dict(type="Constant", name="norm3", val=0)))
    assert (model[1].weight == 0).all()
    assert (model[1].v == 5).all()


# --- the ops


def arguments(layout, dtype=torch.float64, shape=(2, 4, 2, 3)):
    x = (1 + torch.randn(shape, device=DEVICE)).to(dtype).to(memory_format=layout).requires_grad_()
    return x, *(torch.randn(shape[1], device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3))


@LAYOUTS
@pytest.mark.parametrize("block", [None, 1, 12], ids=lambda b: f"blocks-{b or 'default'}")
def test_gradients(layout, block, monkeypatch):
    if block:  # single groups or samples, and several at a time
        monkeypatch.setattr(normplug.ops._blocks, "BLOCK", block)
    x, weight, bias, v = arguments(layout)
    var = torch.rand(4, dtype=torch.float64, device=DEVICE)

    def s0(x, weight, bias, v):
        return ops.evonorm_s0(x, 2, weight, bias, v)

    def b0(x, weight, bias, v):
        return ops.evonorm_b0(x, weight, bias, v)[0]

    def b0_eval(x, weight, bias, v):
        return ops.evonorm_b0(x, weight, bias, v, var)[0]

    for op, formula in ((s0, evonorm_s0(2)), (b0, evonorm_b0()), (b0_eval, evonorm_b0(batch_var=var))):
        torch.testing.assert_close(op(x, weight, bias, v), formula(x, weight, bias, v))
        assert torch.autograd.gradcheck(op, (x, weight, bias, v))
        assert torch.autograd.gradcheck(lambda x, v, op=op: op(x, None, None, v), (x, v))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_are_well_formed(layout, dtype):
    x, weight, bias, v = arguments(layout, dtype, (3, 6, 5, 7))
    var = torch.rand(6, device=DEVICE)
    for op, args in [
        (torch.ops.normplug.evonorm_s0.default, (x, 3, weight, bias, v, 1e-5)),
        (torch.ops.normplug.evonorm_s0.default, (x, 3, None, None, v, 1e-5)),
        (torch.ops.normplug.evonorm_b0.default, (x, weight, bias, v, None, 1e-5)),
        (torch.ops.normplug.evonorm_b0.default, (x, None, None, v, var, 1e-5)),
    ]:
        torch.library.opcheck(op, args)
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        assert [t.stride() for t in op(*meta)] == [t.stride() for t in op(*args)]  # opcheck: only on CUDA


@BOTH
@LAYOUTS
def test_backward_keeps_the_input_and_statistics_only(cls, layout):
    layer, kept = cls(8).to(DEVICE), []
    x = torch.randn(2, 8, 16, 16, device=DEVICE).to(memory_format=layout).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in kept if t.numel() > 64]
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()


@LAYOUTS
def test_compiled_training_step_updates_the_statistics(layout):
    layer = shaken(EvoNormB0(8))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 8, 6, 6, device=DEVICE).to(memory_format=layout)
        want, got = layer(x), compiled(x)
        torch.testing.assert_close(got, want)
        for y, m in ((want, layer), (got, twin)):
            y.square().sum().backward()
            torch.testing.assert_close(m.v.grad, layer.v.grad)
    assert torch.equal(twin.running_var, layer.running_var)
    assert (layer.running_var != 1).all()
