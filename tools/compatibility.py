#!/usr/bin/env python
"""Try each of our layers with what torch does to a model, and write the table of docs/compatibility.md.

    python tools/compatibility.py                    # a minute; writes the page
    python tools/compatibility.py --check            # writes nothing
    python tools/compatibility.py --column ONNX      # prints what becomes of one column, as JSON

Every trial compares numbers: of what torch makes of a layer with those of the layer itself, or, where torch does
mathematics to it (derivatives, autocast), with those of its stock counterpart. What fails is tried with the
counterpart too. Each column runs in a process of its own: with torch 2.14 forward mode, of stock layers too, is out of
order after something was compiled.

Exit code: 0 the table is (now) fresh; 1 with --check: it is stale.
"""

import argparse
import copy
import difflib
import io
import json
import multiprocessing
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.func import functional_call

from normplug.registry import MODELS
from normplug.reporting import markdown_table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- layers: python tools/compatibility.py -->", "<!-- end of layers -->"
C = 8
MODES = ("eval", "train")
TORCH = ".".join(torch.__version__.split(".")[:2])
Numbers = dict[str, Tensor]
Outcomes = dict[str, dict[str, list[str]]]  # by layer and mode: what the attempts said


@dataclass(frozen=True)
class Row:
    """A layer and its counterpart.

    Args:
        name: As the table shows it: what the config has.
        cfg: Config of the layer.
        stock: Makes what does the same without us: a layer with the same keys in its state dict, and what follows it.
        axes: Number of spatial axes of its input.
        alike: How many training steps it and its counterpart take alike.
    """

    name: str
    cfg: dict[str, Any]
    stock: Callable[[], Sequence[nn.Module]]
    axes: int = 2
    alike: int = 2

    def make(self, stock: bool, training: bool) -> nn.Sequential:
        """Return a small network of a convolution and the layer, or its counterpart with the same values."""
        torch.manual_seed(0)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.axes - 1](C, C, 3, padding=1, bias=False)
        layer = MODELS.get(self.cfg["type"])
        settings = {key: value for key, value in self.cfg.items() if key != "type"}
        net = nn.Sequential(conv, layer(C, *[C, 3][: 2 * issubclass(layer, nn.modules.conv._ConvNd)], **settings))
        for key, t in net.state_dict().items():
            if t.is_floating_point() and key != "0.weight":  # left as they are, a forgotten one goes unnoticed
                nn.init.uniform_(t, 0.5, 2)
        if stock:
            values = net.state_dict()
            net = nn.Sequential(conv, *self.stock())
            net.load_state_dict({key: values[key] for key in net.state_dict()})
        return net.train(training)

    def inputs(self) -> list[Tensor]:
        """Return inputs of two sizes, the first for what wants an example."""
        generator = torch.Generator().manual_seed(1)
        sizes = ((2, C, *(7, 6, 5)[: self.axes]), (3, C, *(10, 5, 4)[: self.axes]))
        return [torch.randn(size, generator=generator) for size in sizes]


def plain_conv_ws(conv: type[nn.Module]) -> type[nn.Module]:
    """Return weight standardization as mmcv spells it out, for a convolution that it has none for."""

    class Plain(conv):
        def forward(self, x: Tensor) -> Tensor:
            filters = self.weight.flatten(1)
            mean, std = (t.view(-1, *[1] * (self.weight.ndim - 1)) for t in (filters.mean(1), filters.std(1)))
            return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)

    return Plain


def of_timm(name: str, **settings: Any) -> list[nn.Module]:
    import timm.layers

    return [getattr(timm.layers, name)(C, **settings)]


def of_mmcv() -> list[nn.Module]:
    from mmcv.cnn import ConvWS2d

    return [ConvWS2d(C, C, 3, padding=1)]


def frozen() -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(C)


ROWS = [
    Row("GN", dict(type="GN", num_groups=2), lambda: [nn.GroupNorm(2, C)]),
    Row(
        "GN, act='silu'",
        dict(type="GN", num_groups=2, act="silu"),
        lambda: [nn.GroupNorm(2, C), nn.SiLU()],
    ),
    Row("BNAct", dict(type="BNAct"), lambda: [nn.BatchNorm2d(C)]),
    Row(
        "BNAct, act='relu'",
        dict(type="BNAct", act="relu"),
        lambda: [nn.BatchNorm2d(C), nn.ReLU()],
    ),
    Row("SyncBN", dict(type="SyncBN"), lambda: [nn.BatchNorm2d(C)]),
    Row("CBN", dict(type="CBN"), lambda: [nn.BatchNorm2d(C)], alike=1),  # a second step has a history
    Row("FrozenBatchNorm", dict(type="FrozenBatchNorm"), lambda: [frozen()]),
    Row(
        "FrozenBatchNorm, act='relu'",
        dict(type="FrozenBatchNorm", act="relu"),
        lambda: [frozen(), nn.ReLU()],
    ),
    Row("EvoNormS0", dict(type="EvoNormS0", num_groups=2), lambda: of_timm("EvoNorm2dS0", groups=2)),
    # with timm's running variance, in the place of the authors'
    Row("EvoNormB0", dict(type="EvoNormB0", running_unbiased=True), lambda: of_timm("EvoNorm2dB0", eps=1e-5)),
    Row("FRN", dict(type="FRN"), lambda: of_timm("FilterResponseNormTlu2d", eps=1e-6)),
    Row("ConvWS1d", dict(type="ConvWS1d", padding=1), lambda: [plain_conv_ws(nn.Conv1d)(C, C, 3, padding=1)], axes=1),
    Row("ConvWS", dict(type="ConvWS", padding=1), of_mmcv),
    Row("ConvWS3d", dict(type="ConvWS3d", padding=1), lambda: [plain_conv_ws(nn.Conv3d)(C, C, 3, padding=1)], axes=3),
]


class WrongNumbersError(Exception):
    """Something ran and gave other numbers."""


def compare(got: Numbers, want: Numbers, tolerance: float = 1e-4) -> None:
    """Compare whatever is wanted, by the norm of the difference.

    Raises:
        WrongNumbersError: If something is missing, of another size, or farther away than the tolerance allows.
    """
    for name, w in want.items():
        g = got.get(name)
        if g is None or g.shape != w.shape:
            raise WrongNumbersError(f"{name} is {'missing' if g is None else tuple(g.shape)}, not {tuple(w.shape)}")
        error = ((g.double() - w.double()).norm() / w.double().norm().clamp(min=1e-6)).item()
        if not error <= tolerance:
            raise WrongNumbersError(f"{name} is off by {error:.1e} of its norm")


def random_like(t: Tensor, seed: int) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).to(t.dtype)


def outputs(call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Numbers:
    with torch.no_grad():
        return {f"output {i}": call(x) for i, x in enumerate(inputs)}


def steps(net: nn.Module, inputs: list[Tensor], call: Callable[[Tensor], Tensor] | None = None) -> Numbers:
    """Return outputs and gradients of forward and backward, an input after the other, and the buffers then."""
    numbers = {}
    for i, x in enumerate(inputs):
        x = x.clone().requires_grad_()
        net.zero_grad()
        y = (call or net)(x)
        y.backward(random_like(y, i))
        numbers |= {f"output {i}": y.detach(), f"gradient of input {i}": x.grad}
        numbers |= {f"gradient {i} of {name}": p.grad for name, p in net.named_parameters()}
    return numbers | {name: b.clone() for name, b in net.named_buffers()}


def as_function(net: nn.Module) -> tuple[Callable[..., Tensor], Numbers]:
    """Return f(parameters, x) of a network, which writes to buffers of its own, and the parameters."""
    buffers = dict(net.named_buffers())

    def function(parameters: Numbers, x: Tensor) -> Tensor:
        return functional_call(net, parameters | {name: b.clone() for name, b in buffers.items()}, (x,))

    return function, {name: p.detach() for name, p in net.named_parameters()}


def eager(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    compare(steps(net, inputs), steps(other, inputs))


def amp(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        if y.dtype != torch.bfloat16:
            raise WrongNumbersError(f"output is {y.dtype}")
        return y

    compare(steps(net, inputs, call), steps(other, inputs), tolerance=0.03)


def compiled(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    torch._dynamo.reset()
    compare(steps(net, inputs, torch.compile(net, fullgraph=True, backend="aot_eager")), steps(other, inputs))


def double_backward(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    def numbers(model: nn.Module) -> Numbers:
        x = inputs[0].clone().requires_grad_()
        y = model(x)
        dy = random_like(y, 0).requires_grad_()
        named = dict(model.named_parameters())
        first = torch.autograd.grad(y, [x, *named.values()], dy, create_graph=True)
        penalty = (first[0] * random_like(x, 1)).sum() + sum(g.square().sum() for g in first[1:])
        wanted = {"input": x, "gradient": dy, **named}
        found = torch.autograd.grad(penalty, list(wanted.values()), allow_unused=True)
        return {f"second gradient of {name}": g for name, g in zip(wanted, found, strict=True) if g is not None}

    compare(numbers(net), numbers(other))


def forward_mode(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    def numbers(model: nn.Module) -> Numbers:
        function, parameters = as_function(model)
        moved = {name: random_like(p, 1) for name, p in parameters.items()}
        at, along = (parameters, inputs[0]), (moved, random_like(inputs[0], 0))
        return {"tangent": torch.func.jvp(function, at, along)[1]}

    compare(numbers(net), numbers(other))


def per_sample(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    xs = torch.stack([random_like(inputs[0], i) for i in range(3)])
    dy = random_like(inputs[0], 3)

    def gradients(model: nn.Module) -> Callable[[Numbers, Tensor], Numbers]:
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: Numbers, x: Tensor, buffers: Numbers) -> Tensor:
            return (functional_call(model, parameters | buffers, (x,)) * dy).sum()

        def found(x: Tensor, buffers: Numbers) -> Numbers:
            of_parameters, of_input = torch.func.grad(loss, argnums=(0, 1))(parameters, x, buffers)
            return of_parameters | {"input": of_input} | buffers

        return found

    def buffers(model: nn.Module) -> Numbers:
        return {name: b.expand(3, *b.shape).clone() for name, b in model.named_buffers()}

    got, want, own = torch.func.vmap(gradients(net))(xs, buffers(net)), gradients(other), buffers(other)
    for i, x in enumerate(xs):
        compare({name: g[i] for name, g in got.items()}, want(x, {name: b[i] for name, b in own.items()}))


def traced(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is trained in Python alone", torch.jit.TracerWarning)
        made = torch.jit.trace(copy.deepcopy(net), inputs[0], check_trace=False)
    for b, before in zip(made.buffers(), net.buffers(), strict=True):
        b.copy_(before)  # in training the example has moved the running statistics
    compare(steps(made, inputs), steps(other, inputs))


def scripted(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    compare(steps(torch.jit.script(net), inputs), steps(other, inputs))


def symbolic(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    compare(steps(torch.fx.symbolic_trace(net), inputs), steps(other, inputs))


def dynamic(x: Tensor) -> dict[int, Any]:
    """Return what may differ from call to call: the number of samples, and each spatial axis."""
    return {axis: torch.export.Dim(f"axis{axis}") for axis in (0, *range(2, x.ndim))}


def exported(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    program = torch.export.export(net, (inputs[0],), dynamic_shapes=(dynamic(inputs[0]),))
    if own := [str(node.target) for node in program.graph.nodes if "normplug" in str(node.target)]:
        raise WrongNumbersError(f"the program has {own[0]}, which nobody else knows")
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    made = torch.export.load(saved).module()
    compare(steps(made, inputs), steps(other, inputs))


def onnx(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    import onnxruntime

    x, axes = inputs[0], [*dynamic(inputs[0])]
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/net.onnx"
        for kwargs in (
            dict(dynamo=True, dynamic_shapes=(dynamic(x),), verbose=False),
            dict(dynamo=False, dynamic_axes=dict(x=axes, y=axes), input_names=["x"], output_names=["y"]),
        ):
            torch.onnx.export(net, (x,), file, **kwargs)
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            name = session.get_inputs()[0].name

            def run(x: Tensor, session: Any = session, name: str = name) -> Tensor:
                return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

            compare(outputs(run, inputs), outputs(other, inputs))


def fused(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    from torch.ao.quantization import fuse_modules, fuse_modules_qat

    made = (fuse_modules_qat if net.training else fuse_modules)(net, [["0", "1"]])
    if not isinstance(made[1], nn.Identity):
        raise WrongNumbersError(f"{type(made[1]).__name__} is still there")
    compare(outputs(made, inputs), outputs(other, inputs))


def sharded(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in net:
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)
        got = steps(fully_shard(net, mesh=mesh), inputs)
        got = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in got.items()}
    finally:
        dist.destroy_process_group()
    compare(got, steps(other, inputs))


def checkpointed(net: nn.Module, other: nn.Module, inputs: list[Tensor]) -> None:
    from torch.utils.checkpoint import checkpoint

    want = steps(copy.deepcopy(other), inputs)
    for reentrant in (False, True):
        model = copy.deepcopy(net)
        compare(steps(model, inputs, lambda x, m=model, r=reentrant: checkpoint(m, x, use_reentrant=r)), want)


@dataclass(frozen=True)
class Column:
    """A thing to try.

    Args:
        trial: Runs it, and raises where it does not work.
        stock: Compare with the counterpart; else with the layer itself.
        modes: Where it has a meaning.
    """

    trial: Callable[[nn.Module, nn.Module, list[Tensor]], None]
    stock: bool = False
    modes: Sequence[str] = MODES


COLUMNS = {
    "eager": Column(eager, stock=True),
    "AMP": Column(amp, stock=True),
    "compile": Column(compiled),
    "double backward": Column(double_backward, stock=True),
    "forward mode": Column(forward_mode, stock=True),
    "vmap": Column(per_sample, stock=True),
    "jit.trace": Column(traced),
    "jit.script": Column(scripted),
    "fx": Column(symbolic),
    "export": Column(exported),
    "ONNX": Column(onnx, modes=("eval",)),
    "quantization fuse": Column(fused),
    "FSDP": Column(sharded),
    "checkpointing": Column(checkpointed),
}


def attempt(row: Row, column: Column, mode: str, stock: bool = False) -> str:
    """Return "yes", or what a trial, of the layer or of its counterpart, says."""
    training = mode == "train"
    net, other = row.make(stock, training), row.make(stock or column.stock, training)
    inputs = row.inputs()[: row.alike if column.stock else None]
    try:
        column.trial(net, other, inputs)
    except Exception as error:  # whatever it is, it is the result
        return f"{type(error).__name__}: {error}"
    finally:
        net.eval(), other.eval()  # while a CBN trains, a hook follows every convolution, of later rows too
    return "yes"


def try_column(name: str) -> Outcomes:
    """Return what becomes of each layer and, where that is not "yes", of its counterpart."""
    column = COLUMNS[name]
    outcomes: Outcomes = {}
    for row in ROWS:
        outcomes[row.name] = {}
        for mode in column.modes:
            found = [attempt(row, column, mode)]
            if found != ["yes"]:
                found.append(attempt(row, column, mode, stock=True))
            outcomes[row.name][mode] = found
    return outcomes


@dataclass(frozen=True)
class Reason:
    """Why something does not work: found in what the attempt says; in a word or two; in full."""

    pattern: str
    word: str
    sentence: str


REASONS = [
    Reason(
        "did not find fuser method",
        "no batch norm",
        "torch fuses batch norms into convolutions, and nothing else. Graph-mode quantization leaves the layer in full "
        "precision.",
    ),
    Reason(
        "is no batch norm that torch can train in quantization",
        "stock BN only",
        "What torch trains in quantization has a BatchNorm of its own in it. Fuse in evaluation, or take "
        "`nn.BatchNorm2d`, whose state dict is the same.",
    ),
    Reason(
        "cannot be fused into the convolution before it, which would drop its activation",
        "has act",
        "The convolution that is left would drop the activation. Without `act`, and with a module behind the layer, "
        "it is fused.",
    ),
    Reason(
        "is trained in Python alone",
        "Python",
        "Its training needs what TorchScript does not have: our ops, processes, or a history.",
    ),
    Reason(
        "Skip calling `torch.compiler.disable",
        "Python",
        "In training it looks at the convolution before it and keeps a history, in Python: without `fullgraph=True` "
        "the graph breaks there, and the rest is compiled.",
    ),
    Reason(
        "unhashable type: non-nested SymInt|calling .item\\(\\) on a Tensor",
        "Python",
        "In training it looks at the convolution before it and keeps a history, in Python, which a program, or a "
        "batch of calls in one, has not.",
    ),
]


def reason(said: str) -> Reason:
    """Return why an attempt failed; what it says where nobody has explained that yet."""
    for known in REASONS:
        if re.search(known.pattern, said):
            return known
    wrong = said.startswith(WrongNumbersError.__name__)
    return Reason(said, "wrong numbers" if wrong else "fails", f"Not explained: {said.splitlines()[0][:200]}")


def cell(modes: dict[str, list[str]], numbers: dict[str, int]) -> str:
    """Return what the table says of a layer and a column.

    Args:
        modes: What the attempts in each mode said.
        numbers: Of the footnotes so far, by their text; grows.
    """
    failed = {mode: said for mode, said in modes.items() if said[0] != "yes"}
    if not failed:
        return "yes"
    reasons = [reason(said[0]) for said in failed.values()]
    notes = sorted({numbers.setdefault(r.sentence, len(numbers) + 1) for r in reasons})
    if unexplained := [r.word for r in reasons if r not in REASONS]:
        word = unexplained[0]
    elif len(failed) < len(modes):
        word = " and ".join(mode for mode in modes if mode not in failed) + " only"
    elif all(said[-1] != "yes" for said in failed.values()):
        word = "as stock"
    else:
        word = reasons[0].word
    return f"{word} ({', '.join(map(str, notes))})"


def section(results: dict[str, Outcomes]) -> str:
    """Return the part of the page that is made of the outcomes of every column."""
    numbers: dict[str, int] = {}
    rows = [["Layer", *COLUMNS]]
    for row in ROWS:
        rows.append([f"`{row.name}`", *(cell(results[name][row.name], numbers) for name in COLUMNS)])
    notes = "\n".join(f"{number}. {sentence}" for sentence, number in numbers.items())
    return f"{INTRODUCTION}\n{markdown_table(rows)}\n\n{notes}\n"


INTRODUCTION = f"""## Layers

What torch does to a model, tried with every layer that a config can name: in evaluation and in training, two steps on
inputs of two sizes, behind a convolution. "yes" says that the numbers are right: outputs, gradients and running
statistics are those of the layer itself, or, in the first two columns and those of derivatives, those of its stock
counterpart: torch's GroupNorm and BatchNorm, torchvision's FrozenBatchNorm2d, timm's EvoNorms and FRN, mmcv's ConvWS.
"as stock": the counterpart cannot do it either.

- CBN is compared with its counterpart in its first step: later ones have a history.
- AMP: `torch.autocast`, bfloat16, which the output keeps. compile: `fullgraph=True`, backend `aot_eager`.
- forward mode: `torch.func.jvp`, for input and parameters. vmap: gradients per sample. Buffers are handed over.
- export: number of samples and all sizes dynamic. ONNX: both exporters, dynamic; onnxruntime's output.
- quantization fuse: `fuse_modules`, in training `fuse_modules_qat`. FSDP: `fully_shard`, one process, gloo.
- checkpointing: `torch.utils.checkpoint`, reentrant or not.

Made on a CPU with torch {TORCH} by

    python tools/compatibility.py
"""


def fresh_page(results: dict[str, Outcomes]) -> str:
    """Return the page with a new section in the place of the old one."""
    head, rest = PAGE.read_text().split(BEGIN)
    return f"{head}{BEGIN}\n\n{section(results)}\n{END}{rest.split(END)[1]}"


def write_column(_rank: int, name: str, file: str) -> None:
    """The whole life of a process: one column, its outcomes to a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):  # some print
        Path(file).write_text(json.dumps(try_column(name), indent=1))


def in_own_process(name: str) -> Outcomes:
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/outcomes.json"
        mp.start_processes(write_column, (name, file), nprocs=1, start_method="forkserver")
        print(f"tried {name}", file=sys.stderr, flush=True)
        return json.loads(Path(file).read_text())


def try_all() -> dict[str, Outcomes]:
    multiprocessing.set_forkserver_preload(["normplug", "timm.layers", "torch._dynamo"])  # what takes long to import
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(COLUMNS, pool.map(in_own_process, COLUMNS), strict=True))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="change nothing, tell whether the table is fresh")
    p.add_argument("--column", choices=COLUMNS, help="print what becomes of one column, as JSON, and write no page")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.column:
        print(json.dumps(in_own_process(args.column), indent=1))
        return 0
    fresh = fresh_page(try_all())
    if args.check:
        page = PAGE.read_text()
        if fresh != page:
            changed = difflib.unified_diff(page.splitlines(), fresh.splitlines(), "page", "fresh", lineterm="", n=0)
            print(*changed, sep="\n", file=sys.stderr)
            print("docs/compatibility.md: the table is stale; run python tools/compatibility.py", file=sys.stderr)
        return int(fresh != page)
    PAGE.write_text(fresh)
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
