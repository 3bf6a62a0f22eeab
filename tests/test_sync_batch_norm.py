"""SyncBN: one process is plain BN; several equal a float64 BN over the joined batch, whoever has how much of it."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import DEVICE
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from normplug.layers import BatchNormAct, SyncBatchNorm

C = 6


def shaken(layer):
    if layer.affine:
        nn.init.normal_(layer.weight, 1.0)
        nn.init.normal_(layer.bias)
    return layer


def buffers(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


# --- one process

each = pytest.mark.parametrize("norm", [BatchNormAct, SyncBatchNorm])


@each
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_one_process_is_plain_bn_to_the_last_bit(norm, momentum, layout):
    stock = shaken(nn.BatchNorm2d(C, eps=1e-3, momentum=momentum)).to(DEVICE)
    ours = norm(C, eps=1e-3, momentum=momentum).to(DEVICE)
    ours.load_state_dict(stock.state_dict(), strict=True)
    for _ in range(3):
        x = (3 + torch.randn(4, C, 5, 7)).to(DEVICE).to(memory_format=layout).requires_grad_()
        dy = torch.randn_like(x)
        y, want = ours(x), stock(x)
        got = (y, *torch.autograd.grad(y, [x, *ours.parameters()], dy))
        want = (want, *torch.autograd.grad(want, [x, *stock.parameters()], dy))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(buffers(ours), buffers(stock), rtol=0, atol=0)
    x = torch.randn(4, C, 5, 7, device=DEVICE)
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x), rtol=0, atol=0)


@each
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_activation_and_residual(norm, act, momentum):
    stock = shaken(nn.BatchNorm2d(C, momentum=momentum)).double()
    ours = norm(C, momentum=momentum, act=act).double()
    ours.load_state_dict(stock.state_dict(), strict=True)
    for training in (True, True, False):
        ours.train(training)
        stock.train(training)
        x, residual = (torch.randn(4, C, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
        dy = torch.randn_like(x)
        y, want = ours(x, residual), getattr(F, act)(stock(x) + residual)
        got = (y, *torch.autograd.grad(y, [x, residual, *ours.parameters()], dy))
        want = (want, *torch.autograd.grad(want, [x, residual, *stock.parameters()], dy))
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(buffers(ours), buffers(stock))


@each
def test_without_affine_bias_or_running_statistics(norm):
    x = torch.randn(4, C, 5)
    want = F.batch_norm(x, None, None, training=True)
    layer = norm(C, affine=False, track_running_stats=False)
    assert not layer.state_dict()
    torch.testing.assert_close(layer(x), want, rtol=0, atol=0)
    torch.testing.assert_close(layer.eval()(x), want, rtol=0, atol=0)  # batch statistics in evaluation too
    layer = norm(C, bias=False)
    assert set(layer.state_dict()) == {"weight", "running_mean", "running_var", "num_batches_tracked"}
    torch.testing.assert_close(layer(x), want, rtol=0, atol=0)
    assert "affine=True" in repr(layer)


@each
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", [None, "relu"])
def test_empty_batch_changes_nothing(norm, training, act):
    layer = norm(C, act=act).train(training)
    before = buffers(layer)
    x = torch.zeros(0, C, 7, 7, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.abs().max() == layer.bias.grad.abs().max() == 0
    torch.testing.assert_close(buffers(layer), before, rtol=0, atol=0)


@each
def test_errors(norm):
    with pytest.raises(ValueError, match=r"single value.*\(1, 6, 1, 1\)"):
        norm(C)(torch.zeros(1, C, 1, 1))
    norm(C).eval()(torch.zeros(1, C, 1, 1))
    with pytest.raises(ValueError, match=r"'rleu'.*'relu'"):
        norm(C, act="rleu")


# --- conversions


def model(norm, act=None):
    torch.manual_seed(3)
    act = {} if act is None else {"act": act}
    return nn.Sequential(nn.Conv2d(3, C, 3), norm(C, **act), nn.Conv2d(C, C, 3), nn.Sequential(shaken(norm(C, **act))))


def test_bn_becomes_sync_bn_with_the_same_tensors():
    stock = model(nn.BatchNorm2d).eval()
    x = torch.randn(2, 3, 8, 8)
    want, tensors = stock(x), {id(t) for t in (*stock.parameters(), *stock.buffers())}
    ours = SyncBatchNorm.convert_sync_batchnorm(stock)
    assert [type(m) for m in ours.modules()].count(SyncBatchNorm) == 2
    assert not ours[1].training
    torch.testing.assert_close(ours(x), want, rtol=0, atol=0)
    assert {id(t) for t in (*ours.parameters(), *ours.buffers())} == tensors


def test_an_activation_is_converted_with_its_batch_norm():
    norm = BatchNormAct(C, momentum=None, act="silu")
    ours = SyncBatchNorm.convert_sync_batchnorm(norm)
    assert (type(ours), ours.act, ours.momentum) == (SyncBatchNorm, "silu", None)
    assert ours.weight is norm.weight


def test_convert_leaves_layers_with_a_forward_of_their_own():
    class Other(nn.BatchNorm2d):
        def forward(self, x):
            return -super().forward(x)

    net = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(Other(C), nn.BatchNorm1d(C)))
    assert [type(m) for m in net] == [Other, SyncBatchNorm]


@pytest.mark.parametrize("act", [None, "relu"])
def test_mmengine_leaves_it_alone_in_a_single_process(act):
    net = model(SyncBatchNorm, act)
    reverted = revert_sync_batchnorm(copy.deepcopy(net))
    assert [type(m) for m in reverted.modules()] == [type(m) for m in net.modules()]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(reverted(x), net(x), rtol=0, atol=0)


@each
@pytest.mark.parametrize("convert", [convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_converting_to_torchs_layer_drops_no_activation(convert, norm):
    with pytest.raises(ValueError, match=r"activation 'relu'"):
        convert(model(norm, act="relu"))
    net = model(norm)
    x, want = torch.randn(2, 3, 8, 8), copy.deepcopy(net).state_dict()
    converted = convert(net)
    assert [type(m) for m in converted.modules()].count(nn.SyncBatchNorm) == 2
    torch.testing.assert_close(converted.state_dict(), want)
    assert converted(x).shape == (2, C, 4, 4)


def test_a_quantization_config_can_be_set():
    layer = SyncBatchNorm(C, act="relu")
    layer.qconfig = "anything"
    assert layer.qconfig == "anything"
    assert not hasattr(SyncBatchNorm(C), "qconfig")


# --- several processes

WORLD = 3


@dataclass(frozen=True)
class Scenario:
    """What each rank feeds to a layer. All ranks and the oracle draw the same numbers from a seed."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    act: str | None = None
    residual: bool = False
    channels_last: bool = False
    kwargs: dict = field(default_factory=dict)
    steps: int = 1
    group: tuple[int, ...] = (0, 1, 2)  # who joins; the others are on their own
    tolerance: float = 1e-12
    without_gradient: tuple[int, ...] = ()  # ranks whose input needs none

    def draw(self, rank, step):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x, dy, residual = (torch.randn(self.shapes[rank], generator=generator, dtype=torch.float64) for _ in range(3))
        drawn = [(x * 2 + self.mean).to(self.dtype), dy.to(self.dtype), residual.to(self.dtype)]
        if self.channels_last:
            drawn = [t.to(memory_format=torch.channels_last) for t in drawn]
        return drawn

    def layer(self, group=None):
        layer = SyncBatchNorm(C, process_group=group, act=self.act, **self.kwargs)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(1 + torch.randn(C, generator=generator))
        return layer.double() if self.dtype == torch.float64 else layer


UNEQUAL = ((2, C, 3, 5), (1, C, 5, 7), (0, C, 4, 4))  # 30, 35 and no values per channel
SCENARIOS = {
    "unequal": Scenario(UNEQUAL, torch.float64),
    "unequal-float": Scenario(UNEQUAL, mean=10, tolerance=2e-5),
    "large-mean": Scenario(((2, C, 30, 30), (1, C, 50, 70), (0, C, 4, 4)), mean=1000, tolerance=4e-4),
    "relu-residual-nhwc": Scenario(UNEQUAL, torch.float64, act="relu", residual=True, channels_last=True),
    "residual": Scenario(UNEQUAL, torch.float64, residual=True),
    "bfloat16": Scenario(UNEQUAL, torch.bfloat16, act="silu", residual=True, tolerance=2**-8),
    "float16": Scenario(UNEQUAL, torch.float16, mean=10, tolerance=2**-11),
    "one-value-per-rank": Scenario(((1, C),) * 3, torch.float64),
    "video": Scenario(((1, C, 2, 3, 3), (2, C, 3, 2, 4), (1, C, 1, 1, 1)), torch.float64, act="gelu"),
    "1d": Scenario(((3, C, 7), (2, C, 1), (1, C, 4)), torch.float64),
    "cumulative": Scenario(UNEQUAL, torch.float64, kwargs={"momentum": None}, steps=3),
    "three-steps": Scenario(UNEQUAL, torch.float64, kwargs={"momentum": 0.3}, steps=3),
    "not-affine": Scenario(UNEQUAL, torch.float64, kwargs={"affine": False}),
    "no-statistics": Scenario(UNEQUAL, torch.float64, kwargs={"track_running_stats": False}),
    "all-empty": Scenario(((0, C, 3, 3),) * 3, torch.float64),
    "group-of-two": Scenario(((2, C, 3), (1, C, 4), (3, C, 2)), torch.float64, group=(0, 1)),
    "empty-needs-nothing": Scenario(UNEQUAL, torch.float64, without_gradient=(2,)),
}


def run_scenario(rank, scenario, groups):
    group = groups.get(scenario.group)
    layer = scenario.layer(group)
    for step in range(scenario.steps):
        x, dy, residual = scenario.draw(rank, step)
        x.requires_grad_(rank not in scenario.without_gradient)
        residual = residual.requires_grad_() if scenario.residual else None
        layer.zero_grad()
        y = layer(x, residual)
        if y.requires_grad:
            y.backward(dy)
    assert y.stride() == x.stride()
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dresidual": None if residual is None else residual.grad,
        **{name: p.grad for name, p in layer.named_parameters()},
        **{name: b for name, b in layer.named_buffers()},
    }


def too_few_values(rank):
    """One value per channel over all ranks must raise on all of them, and leave the next call in order."""
    layer = SyncBatchNorm(C)
    try:
        layer(torch.zeros((1, C, 1, 1) if rank == 1 else (0, C, 1, 1)))
    except ValueError as error:
        message = str(error)
    before = buffers(layer)["num_batches_tracked"].item()
    layer(torch.zeros(1, C, 1, 1))
    return {"message": message, "before": before, "after": buffers(layer)["num_batches_tracked"].item()}


def unequal_ranks(rank):
    """Ranks that differ must all hear of it, at once, and none may compute anything."""
    messages = []
    for channels, dtype in (
        (C + (rank == 1), torch.float32),
        (C, torch.float64 if rank == 2 else torch.float32),
        (C, torch.float16 if rank == 0 else torch.float32),
    ):
        layer = SyncBatchNorm(channels)
        try:
            layer(torch.randn(2, channels, 3, dtype=dtype))
        except ValueError as error:
            messages.append(str(error))
    for wrong in (torch.ones(2, C, 3, dtype=torch.int64), torch.randn(2, C + 1, 3)):
        try:
            SyncBatchNorm(C)(wrong if rank == 1 else torch.randn(2, C, 3))
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    layer = SyncBatchNorm(C)
    layer(torch.randn(2, C, 3))
    try:  # only after the first step
        layer(torch.randn(2, C, 3, dtype=torch.float64 if rank == 2 else torch.bfloat16))
    except ValueError as error:
        messages.append(str(error))
    return messages


def evaluation_is_local(rank):
    """Ranks evaluate different numbers of batches: a message would wait forever, or meet another call's."""
    layer = SyncBatchNorm(C).eval()
    for _ in range(rank):
        y = layer(torch.ones(1, C))
    layer.train()
    with torch.no_grad():
        y = layer(torch.full((2, C), float(rank)))
    return {"y": y}


def distributed_data_parallel(rank):
    net = ddp_model()
    wrapped = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    x, dy = ddp_batch(rank)
    wrapped(x).backward(dy)
    return {name: p.grad for name, p in net.named_parameters()} | buffers(net)


def one_rank_is_not_finite(rank):
    """Buffers after a batch, after one with a NaN on rank 1 only, and after the first again."""
    layer = SyncBatchNorm(C, skip_nonfinite=True)
    good = torch.randn(2, C, 3, generator=torch.Generator().manual_seed(rank))
    seen = []
    for x in (good, good / 0 if rank == 1 else good, good):
        layer(x)
        seen.append(buffers(layer))
    return seen


def checkpointed(rank):
    """Buffers and gradients of a step under DDP, without and with activation checkpointing."""
    seen = []
    for run in (lambda net, x: net(x), lambda net, x: checkpoint(net, x, use_reentrant=False)):
        net = ddp_model()
        wrapped = nn.parallel.DistributedDataParallel(Run(net, run), broadcast_buffers=False)
        x, dy = ddp_batch(rank)
        wrapped(x).backward(dy)
        seen.append({name: p.grad for name, p in net.named_parameters()} | buffers(net))
    return seen


class Run(nn.Module):
    def __init__(self, net, run):
        super().__init__()
        self.net, self.run = net, run

    def forward(self, x):
        return self.run(self.net, x)


def ddp_model():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, C, 3, bias=False), shaken(SyncBatchNorm(C, act="relu")), nn.Conv2d(C, 2, 1)
    ).double()


def ddp_batch(rank):
    generator = torch.Generator().manual_seed(rank)
    n = rank + 1
    return tuple(torch.randn(n, c, s, s, generator=generator, dtype=torch.float64) for c, s in ((3, 8), (2, 6)))


def work(rank, path):
    """The whole life of one process: every scenario in turn, results to a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=WORLD)
    alone = [dist.new_group([r]) for r in range(WORLD)]
    two = dist.new_group([0, 1])
    groups = {(0, 1): two if rank < 2 else alone[rank]}
    results = {name: run_scenario(rank, scenario, groups) for name, scenario in SCENARIOS.items()}
    more_work = too_few_values, unequal_ranks, evaluation_is_local, one_rank_is_not_finite, checkpointed
    for more in (*more_work, distributed_data_parallel):
        results[more.__name__] = more(rank)
    torch.save(results, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each rank: processes start once for all tests."""
    path = tmp_path_factory.mktemp("ranks")
    return run_ranks(work, path, WORLD)


def flat(x):
    return x.double().transpose(0, 1).flatten(1)  # (C, values)


def joined_batch_norm(scenario, members):
    """The oracle: a float64 batch norm over all values of the members, by the textbook, and autograd through it."""
    reference = scenario.layer()
    params = {name: p.detach().double().requires_grad_() for name, p in reference.named_parameters()}
    running_mean, running_var, count = torch.zeros(C).double(), torch.ones(C).double(), 0
    for step in range(scenario.steps):
        drawn = [scenario.draw(rank, step) for rank in members]
        xs, dys, residuals = ([flat(t) for t in ts] for ts in zip(*drawn, strict=True))
        xs = [x.requires_grad_() for x in xs]
        residuals = [r.requires_grad_() for r in residuals]
        x = torch.cat(xs, 1)
        if x.shape[1] == 0:
            break
        mean = x.mean(1, keepdim=True)
        var = (x - mean).square().mean(1, keepdim=True)
        z = (x - mean) / (var + 1e-5).sqrt()
        if params:
            z = z * params["weight"].view(-1, 1) + params["bias"].view(-1, 1)
        if scenario.residual:
            z = z + torch.cat(residuals, 1)
        y = z if scenario.act is None else getattr(F, scenario.act)(z)
        count += 1
        share = scenario.kwargs.get("momentum", 0.1) or 1 / count
        running_mean += share * (mean.flatten().detach() - running_mean)
        running_var += share * (var.flatten().detach() * x.shape[1] / (x.shape[1] - 1) - running_var)
    if count == 0:
        zeros = {name: torch.zeros(C).double() for name in params}
        return [x[:, :0] for x in xs], [x[:, :0] for x in xs], None, zeros, running_mean, running_var, 0
    wanted = [*xs, *params.values(), *(residuals if scenario.residual else [])]
    grads = list(torch.autograd.grad(y, wanted, torch.cat(dys, 1)))
    dxs, grads = grads[: len(xs)], grads[len(xs) :]
    dparams = dict(zip(params, grads, strict=False))
    sizes = [x.shape[1] for x in xs]
    ys = y.detach().split(sizes, 1)
    return ys, dxs, grads[len(params) :] or None, dparams, running_mean, running_var, count


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_equals_batch_norm_over_the_joined_batch(ranks, name):
    scenario = SCENARIOS[name]
    alone = [(rank,) for rank in range(WORLD) if rank not in scenario.group]
    for members in (scenario.group, *alone):
        ys, dxs, dresiduals, dparams, running_mean, running_var, count = joined_batch_norm(scenario, members)
        got = [ranks[rank][name] for rank in members]

        def close(got, want):
            size = want.abs().max().item() if want.numel() else 0.0
            torch.testing.assert_close(got, want, rtol=0, atol=scenario.tolerance * max(size, 1))

        for i, rank in enumerate(members):
            close(flat(got[i]["y"]), ys[i])
            assert got[i]["y"].dtype == scenario.dtype
            if rank in scenario.without_gradient:
                assert got[i]["dx"] is None
            else:
                close(flat(got[i]["dx"]), dxs[i])
            if dresiduals:
                close(flat(got[i]["dresidual"]), dresiduals[i])
            if scenario.kwargs.get("track_running_stats", True):
                close(got[i]["running_mean"].double(), running_mean)
                close(got[i]["running_var"].double(), running_var)
                assert got[i]["num_batches_tracked"] == count
                for buffer in ("running_mean", "running_var"):  # bit for bit: rank 0's go into the checkpoint
                    assert torch.equal(got[i][buffer], got[0][buffer])
        for parameter, want in dparams.items():
            close(sum(g[parameter].double() for g in got), want)


@pytest.mark.slow
def test_one_value_over_all_ranks_raises_on_all(ranks):
    for rank, result in enumerate(ranks):
        got = result["too_few_values"]
        assert "single value" in got["message"]
        assert f"({int(rank == 1)}, 6, 1, 1)" in got["message"]
        assert (got["before"], got["after"]) == (0, 1)


@pytest.mark.slow
def test_ranks_that_differ_raise_on_all(ranks):
    differences = (
        "rank 1: 7 channels of torch.float32",
        "rank 2: 6 channels of torch.float64",
        "rank 0: 6 channels of torch.float16",
        "rank 1: an input that it refuses",
        "rank 1: an input that it refuses",
        "rank 1: 6 channels of torch.bfloat16, rank 2: 6 channels of torch.float64",
    )
    for result in ranks:
        for difference, message in zip(differences, result["unequal_ranks"], strict=True):
            assert difference in message


@pytest.mark.slow
def test_evaluation_sends_no_message(ranks):
    for rank, result in enumerate(ranks):
        want = (rank - 1) / (2 / 3 + 1e-5) ** 0.5
        torch.testing.assert_close(result["evaluation_is_local"]["y"], torch.full((2, C), want))


@pytest.mark.slow
def test_all_ranks_pass_over_a_batch_that_is_not_finite_on_one(ranks):
    for result in ranks:
        first, spoilt, last = result["one_rank_is_not_finite"]
        torch.testing.assert_close(spoilt, first, rtol=0, atol=0)
        assert last["num_batches_tracked"] == 2
        assert last["running_var"].isfinite().all()
        torch.testing.assert_close(last, ranks[0]["one_rank_is_not_finite"][2], rtol=0, atol=0)


@pytest.mark.slow
def test_checkpointing_over_ranks_moves_running_statistics_once(ranks):
    for result in ranks:
        plain, again = result["checkpointed"]
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.slow
def test_under_distributed_data_parallel(ranks):
    """The gradients that DDP leaves are those of the mean of the ranks' losses."""
    net = ddp_model()
    batches = [ddp_batch(rank) for rank in range(WORLD)]
    x, dy = (torch.cat(parts) for parts in zip(*batches, strict=True))
    net(x).backward(dy / WORLD)
    want = {name: p.grad for name, p in net.named_parameters()} | buffers(net)
    for result in ranks:
        torch.testing.assert_close(result["distributed_data_parallel"], want)
