"""All weights of a model in one launch: the same bits as layer by layer, whatever is done to the model meanwhile."""

import copy
import gc
import importlib
import pickle
import threading
import weakref

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

from normplug.layers import WSConv2d
from normplug.layers.weight_standardization import fold_ws, standardize_together

# no input of a part that runs in checkpointing without gradients
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
ops = importlib.import_module("normplug.ops.weight_standardize")  # normplug.ops has a function of that name
SHAPE = (2, 3, 8, 8)


def together(model):
    return standardize_together(model, devices=("cpu", "cuda"))


def conv(*args, **kwargs):
    return WSConv2d(*args, 3, padding=1, bias=False, **kwargs)


class Net(nn.Module):
    """Stem, two blocks, head: each may run in activation checkpointing, or may be a model of its own."""

    def __init__(self, stem=None, block=None, head=None):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Sequential(conv(8, 8), nn.SiLU(), conv(8, 8)) for _ in range(2))
        self.head = WSConv2d(8, 4, 1)
        self.how = stem or run, block or run, head or run

    def forward(self, x):
        stem, block, head = self.how
        x = stem(self.stem, x)
        for part in self.blocks:
            x = x + block(part, x)
        return head(self.head, x)


def run(module, x):
    return module(x)


def reentrant(module, x):
    return checkpoint(module, x, use_reentrant=True)


def not_reentrant(module, x):
    return checkpoint(module, x, use_reentrant=False)


def one_in_the_other(module, x):
    return checkpoint(lambda x: not_reentrant(module, x) + 0, x, use_reentrant=True)


def the_other_in_one(module, x):
    return checkpoint(lambda x: reentrant(module, x) + 0, x, use_reentrant=False)


def picture():
    return torch.randn(SHAPE, device=DEVICE, requires_grad=True)


def step(model, x, loss=lambda y: y.float().square().mean()):
    """Return the outputs and all gradients of a training step."""
    model.zero_grad()
    x.grad = None
    y = model(x)
    loss(y).backward()
    return [y.detach(), x.grad, *[p.grad for p in model.parameters()]]


def same(got, want):
    assert len(got) == len(want)
    assert all(g is w is None or torch.equal(g, w) for g, w in zip(got, want, strict=True))


def agree(model, x=None, run=step):
    """See the same bits from a model and from a copy of it that standardizes together."""
    x = picture() if x is None else x
    alone = copy.deepcopy(model).to(DEVICE)
    both = together(copy.deepcopy(alone))
    same(run(both, x), run(alone, x))
    return both


@pytest.fixture
def launches(monkeypatch):
    """The number of weights in each forward launch."""
    counts, standardize = [], ops._standardize
    monkeypatch.setattr(ops, "_standardize", lambda w, *options: counts.append(len(w)) or standardize(w, *options))
    return counts


@pytest.fixture
def backward_launches(monkeypatch):
    counts = []
    for name in ("_standardize_backward", "_many_backward"):
        op = getattr(ops, name)
        count = (lambda grads: len(grads)) if "many" in name else lambda grad: 1
        monkeypatch.setattr(ops, name, lambda g, *args, op=op, count=count: counts.append(count(g)) or op(g, *args))
    return counts


# --- one launch


def test_one_launch_each_way(launches, backward_launches):
    model = together(Net().to(DEVICE))
    step(model, picture())
    assert launches == [6]
    assert backward_launches == [6]
    standardize_together(model, devices=())
    step(model, picture())
    assert launches == [6, *[1] * 6]
    assert backward_launches == [6, *[1] * 6]


def test_on_cuda_only_unless_told_otherwise(launches):
    standardize_together(Net())(torch.randn(SHAPE))
    assert launches == [1] * 6


def test_a_launch_for_each_form_and_dtype(launches):
    model = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4, eps=1e-3), conv(4, 4, eps=1e-3), conv(4, 4, correction=0))
    agree(model)
    assert launches == [2, 2, 1, *[1] * 5]
    half = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4).double(), conv(4, 4).double())
    half.insert(2, nn.Module())
    half[2].forward = lambda x: x.double()
    launches.clear()
    together(half.to(DEVICE))(picture())
    assert launches == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype):
    agree(Net().to(dtype), picture().detach().to(dtype).requires_grad_())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation(mode, launches):
    def evaluate(model, x):
        with mode():
            y = model.eval()(x)
        assert y.requires_grad == (mode is torch.enable_grad)
        return [y.detach()]

    agree(Net(), run=evaluate)
    assert launches == [6, *[1] * 6]


def test_autocast():
    def half(model, x):
        with torch.autocast(DEVICE, torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        return [y.detach(), *torch.autograd.grad(y.float().square().mean(), [x, *model.parameters()])]

    agree(Net(), run=half)


def test_a_layer_that_runs_several_times(launches):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.last = conv(3, 3), conv(3, 3)

        def forward(self, x):
            return sum(self.last(self.head(x[..., :size, :size])).mean() for size in (8, 4, 2))

    model, x = Pyramid().to(DEVICE), picture()
    want = step(model, x)
    got = step(together(model), x)
    same(got[:2], want[:2])
    for g, w in zip(got, want, strict=True):  # the layer's gradients are added in another place
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)
    assert launches == [*[1] * 6, 2]


# --- which weights


def test_a_layer_without_part_in_the_loss_has_no_gradient():
    model = Net()
    model.spare = conv(3, 3)
    both = agree(model)
    assert both.spare.weight.grad is None
    model.stem.requires_grad_(False)
    both = agree(model)
    assert both.stem[0].weight.grad is None


def test_frozen_weights_stay_without_graph(launches):
    model = Net()
    model.stem.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    x = picture().detach()
    both = together(copy.deepcopy(model).to(DEVICE))
    kinds = []
    for layer in both.modules():
        if isinstance(layer, WSConv2d):
            layer.register_forward_pre_hook(lambda m, _: kinds.append(m.standardized_weight().requires_grad))
    y = both(x)
    assert kinds == [False] * 3 + [True] * 3
    assert sorted(launches) == [3, 3]
    y.sum().backward()
    assert [p.grad is None for p in both.parameters() if p.ndim == 4] == [True] * 3 + [False] * 3


def test_frozen_weights_inside_of_another_model_are_done_by_it(launches):
    inner = together(nn.Sequential(conv(3, 3), *[conv(3, 3).requires_grad_(False) for _ in range(2)]))
    model = nn.Sequential(conv(3, 3), inner, conv(3, 3)).to(DEVICE)
    agree(model)
    assert launches[:2] == [3, 2]
    launches.clear()
    with torch.no_grad():
        together(model)(picture())
    assert launches == [5]


def test_sharded_weights():
    """A parameter that becomes a filter only when its layer is called, as FSDP and DeepSpeed do it."""
    model = together(nn.Sequential(conv(3, 3), conv(3, 3), conv(3, 3)).to(DEVICE))
    x = picture()
    want = model(x)
    for layer, weight in [(layer, layer.weight) for layer in model]:
        layer._parameters["weight"] = nn.Parameter(weight.detach().flatten()[:5])
        layer.register_forward_pre_hook(lambda m, _, w=weight: m._parameters.update(weight=w))
    assert torch.equal(model(x), want)


def test_computed_weights_are_computed_by_their_layer():
    """Spectral norm counts how often it is asked; weight norm and pruning keep the weight elsewhere."""
    from torch.nn.utils import parametrizations, prune

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(*[conv(3, 3) for _ in range(5)]).to(DEVICE)
        parametrizations.spectral_norm(model[0])
        parametrizations.weight_norm(model[1])
        prune.random_unstructured(model[2], "weight", 0.3)
        return model

    alone, both, x = build(), together(build()), picture()
    same(step(both, x), step(alone, x))
    assert torch.equal(both[0].parametrizations.weight[0]._u, alone[0].parametrizations.weight[0]._u)


def test_other_weights_for_one_call(launches):
    model, x = Net().to(DEVICE), picture()
    doubled = {name: 2 * p.detach() + 1e-3 for name, p in model.named_parameters()}
    want = torch.func.functional_call(model, doubled, x)
    launches.clear()
    together(model)
    assert torch.equal(torch.func.functional_call(model, doubled, x), want)
    assert launches == [6]
    inside = nn.Sequential(conv(3, 3), nn.Module(), conv(3, 3)).to(DEVICE)
    inside[1].forward = lambda x: torch.func.functional_call(inside[0], {"weight": other}, x)
    other = torch.randn(3, 3, 3, 3, device=DEVICE)
    while other._version < inside[0].weight._version:
        other += 1  # another weight must be told from the layer's own by more than the number of its changes
    want = inside(x)
    assert torch.equal(together(inside)(x), want)


# --- when


@pytest.mark.parametrize(
    "change",
    [
        lambda m: torch.optim.SGD(m.parameters(), 0.1).step(),
        lambda m: m.load_state_dict({k: v + torch.randn_like(v) for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()}, assign=True),
        lambda m: [p.data.copy_(torch.randn_like(p)) for p in m.parameters()],
        lambda m: [setattr(p, "data", torch.randn_like(p)) for p in m.parameters()],
    ],
    ids=["optimizer", "load", "load-assign", "ema", "data"],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_weights_changed_between_calls_are_seen(change, mode):
    def twice(model, x):
        first = step(model, x)
        torch.manual_seed(1)
        change(model)
        with mode():
            second = model(x).detach()
        assert not torch.equal(first[0], second)
        return [*first, second, *step(model, x)]

    agree(Net(), run=twice)


def test_accumulated_gradients():
    def two_batches(model, x):
        model.zero_grad()
        for batch in (x, x.flip(0)):
            model(batch).square().mean().backward()
        first = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        losses = [model(batch).square().mean() for batch in (x, x.flip(0))]
        sum(losses).backward()
        return first + [p.grad for p in model.parameters()]

    agree(Net(), run=two_batches)


def test_several_backward_passes_through_one_graph():
    def passes(model, x):
        model.zero_grad()
        y = model(x)
        y.square().mean().backward(retain_graph=True)
        y.sum().backward()
        return [p.grad for p in model.parameters()]

    agree(Net(), run=passes)
    agree(Net(stem=not_reentrant, block=not_reentrant), run=passes)
    agree(Net(stem=reentrant, block=reentrant), run=passes)


def test_a_weight_changed_before_backward_is_an_error():
    model = together(Net().to(DEVICE))
    loss = model(picture()).square().mean()
    with torch.no_grad():
        model.stem[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_outside_of_the_models_forward_layers_standardize_for_themselves(stop, launches):
    model, x = together(Net().to(DEVICE)), picture()
    model(x)
    launches.clear()
    model.stem(x)
    model.forward(x)
    assert launches == [1] * 7

    class Stop(nn.Module):
        def forward(self, x):
            raise stop

    def interrupted_and_changed():
        head, model.head = model.head, Stop()
        with pytest.raises(stop):
            model(x)
        model.head = head
        for p in model.parameters():
            p.data = 2 * p.data + 0.1
        return standardize_together(copy.deepcopy(model), devices=())

    alone = interrupted_and_changed()
    same(step(model, x), step(alone, x))
    launches.clear()
    model.stem(x)
    assert launches == [1]
    alone = interrupted_and_changed()
    if stop is KeyboardInterrupt:  # torch runs no hooks then; a change behind autograd's back is not seen
        with torch.no_grad():
            for p in [*model.parameters(), *alone.parameters()]:
                p.mul_(3).add_(0.1)
    same([model.stem(x)], [alone.stem(x)])


def test_an_interrupted_model_inside(launches):
    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = together(nn.Sequential(conv(3, 3), conv(3, 3), nn.Module())).requires_grad_(False)
            self.first, self.last = conv(3, 3), conv(3, 3)

        def forward(self, x):
            with pytest.raises(KeyboardInterrupt):
                self.inner(x)
            return self.last(self.first(x))

    def interrupt(x):
        raise KeyboardInterrupt

    model, x = together(Catches().to(DEVICE)), picture()
    model.inner[2].forward = interrupt
    model(x)
    assert launches == [2, 2]
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data + 1
    assert torch.equal(model.inner[0](x), standardize_together(copy.deepcopy(model.inner), devices=())[0](x))


def test_a_weight_changed_in_forward():
    """By an operation on it; and in a momentum encoder behind autograd's back, as mmengine's averages do."""

    class Clips(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = conv(3, 3), conv(3, 3)

        def forward(self, x):
            x = self.first(x)
            with torch.no_grad():
                self.last.weight.mul_(1.5).clamp_(-0.1, 0.1)
            return self.last(x)

    agree(Clips())

    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = together(nn.Sequential(conv(3, 3), conv(3, 3)))
            self.key = together(nn.Sequential(conv(3, 3), conv(3, 3))).requires_grad_(False)

        def forward(self, x):
            for p, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
                p.data.lerp_(q.data, 0.5)
            with torch.no_grad():
                target = self.key(x)
            return self.query(x) - target

    model = Momentum()
    alone, x = standardize_together(copy.deepcopy(model), devices=()).to(DEVICE), picture()
    same(step(together(model).to(DEVICE), x), step(alone, x))


def test_backward_inside_of_forward():
    """A forward that trains: the second pass must not go through the graph that the first has used up."""

    class Trains(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(conv(3, 3), conv(3, 3))

        def forward(self, x):
            for _ in range(2):
                self.net(x).square().sum().backward()
                with torch.no_grad():
                    for p in self.net.parameters():
                        p -= 0.1 * p.grad
            y = reentrant(self.net, reentrant(self.net, x))
            y.square().sum().backward()
            return reentrant(self.net, x) + not_reentrant(self.net, x)

    agree(Trains())


def test_gradients_inside_of_a_call_without(launches):
    class Adapts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = together(nn.Sequential(conv(3, 3), conv(3, 3)))
            self.last = conv(3, 3)

        def forward(self, x):
            with torch.enable_grad():
                loss = self.net(x).square().mean() + self.last(x).square().mean()
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*self.parameters()])])

    model, x = Adapts(), picture().detach()
    alone = standardize_together(copy.deepcopy(model), devices=()).to(DEVICE)
    both = together(model).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(both(x), alone(x))
    launches.clear()
    with torch.no_grad():
        both(x)
    assert launches == [3, 2, 1]

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = conv(3, 3), conv(3, 3)
            self.requires_grad_(False)

        def forward(self, x):
            with torch.inference_mode(False), torch.enable_grad():
                z = x.clone().requires_grad_()
                return torch.autograd.grad(self.last(self.first(z)).square().sum(), z)[0]

    model = Looks().to(DEVICE)
    want = model(x)
    with torch.inference_mode():
        assert torch.equal(together(model)(x), want)


# --- activation checkpointing


CHECKPOINTS = [reentrant, not_reentrant, one_in_the_other, the_other_in_one]


@pytest.mark.parametrize("inner", [False, True], ids=["layers", "models"])
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointing(how, inner):
    for parts in (dict(block=how), dict(stem=how, block=how, head=how), dict(stem=how, head=reentrant)):
        model = Net(**parts)
        if inner:
            for part in (model.stem, *model.blocks):
                together(part)
        alone, x = standardize_together(copy.deepcopy(model), devices=()).to(DEVICE), picture()
        want = step(alone, x)
        same(step(model.to(DEVICE), x), want)
        same(step(together(model), x), want)
        same(step(model, x), want)  # and nothing is left from the first time


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointing_of_whole_models(how, launches):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = together(Net(block=how))

        def forward(self, x):
            return how(self.net, x)

    model = Outer()
    alone, x = standardize_together(copy.deepcopy(model), devices=()).to(DEVICE), picture()
    want = step(alone, x)
    launches.clear()
    same(step(model.to(DEVICE), x), want)
    assert launches[0] == 6
    same(step(together(model), x), want)


@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpointing_with_and_without_early_stop(early_stop):
    from torch.utils.checkpoint import set_checkpoint_early_stop

    with set_checkpoint_early_stop(early_stop):
        agree(Net(stem=not_reentrant, block=not_reentrant, head=not_reentrant))


def test_two_calls_before_backward_with_checkpointing():
    """The second call runs without gradients: what backward runs again belongs to the first."""

    def calls(model, x):
        model.zero_grad()
        loss = model(x).square().mean()
        with torch.no_grad():
            model(x)
        other = model(x.flip(0)).square().mean()
        loss.backward()
        other.backward()
        return [p.grad for p in model.parameters()]

    for how in CHECKPOINTS:
        agree(Net(stem=how, block=how), run=calls)


def test_a_layer_inside_and_outside_of_checkpoints():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = nn.Sequential(conv(3, 3), nn.ReLU(), conv(3, 3)), conv(3, 3)

        def forward(self, x):
            with torch.no_grad():
                target = self.net(x)
            y = reentrant(self.net, x) + not_reentrant(self.net, x) + self.net(x)
            return self.last(y) - target

    model, x = Mixed().to(DEVICE), picture()
    want = step(model, x)
    for g, w in zip(step(together(model), x), want, strict=True):  # added in another order
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("module", [reentrant, not_reentrant])
def test_saved_tensors_moved_elsewhere(module):
    def offloaded(model, x):
        model.zero_grad()
        with torch.autograd.graph.save_on_cpu():
            y = model(x)
        y.square().mean().backward()
        return [p.grad for p in model.parameters()]

    agree(Net(block=module), run=offloaded)


# --- models in models, threads, copies


def test_the_outermost_model_does_the_work(launches):
    model = Net()
    for part in (model.stem, *model.blocks):
        together(part)
    inner, x = model.blocks[0], picture()
    together(model).to(DEVICE)
    model(x)
    assert launches == [6]
    launches.clear()
    inner(torch.randn(2, 8, 4, 4, device=DEVICE))
    assert launches == [2]


def test_a_model_that_calls_itself():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = conv(3, 3), conv(3, 3)

        def forward(self, x):
            half = self(x[..., ::2]) if x.shape[-1] > 2 else x[..., ::2]
            return self.last(self.first(x)) + half.mean()

    agree(Folds(), run=lambda model, x: [model(x).detach()])


def test_threads():
    model = Net(stem=not_reentrant, block=reentrant).to(DEVICE)
    inputs = [picture() for _ in range(4)]
    wants = [torch.autograd.grad(Net.forward(_plain(model), x).square().mean(), x)[0] for x in inputs]
    together(model)
    barrier, results = threading.Barrier(4), [None] * 4

    def work(i):
        barrier.wait()
        for _ in range(5):
            x = inputs[i].detach().requires_grad_()
            model(x).square().mean().backward()
            results[i] = x.grad

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    same(results, wants)


def _plain(model):
    twin = copy.deepcopy(model)
    twin.how = run, run, run
    return twin


def test_a_layer_called_in_another_thread(launches):
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 3), conv(3, 3)

        def forward(self, x):
            out = []
            thread = threading.Thread(target=lambda: out.append(self.a(x)))
            thread.start()
            thread.join()
            return out[0] + self.b(x)

    agree(Parallel())
    assert launches == [2, 1, 1, 1]


def test_copies(launches, tmp_path):
    model, x = together(Net().to(DEVICE)), picture()
    model.how = run, run, run
    torch.save(model, tmp_path / "model.pth")
    loaded = torch.load(tmp_path / "model.pth", weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(torch.randn_like(p))
        want = standardize_together(copy.deepcopy(twin), devices=())(x)
        launches.clear()
        assert torch.equal(twin(x), want)
        assert launches == [6]
    assert copy.copy(model).state_dict().keys() == Net().state_dict().keys()
    assert repr(model) == repr(Net())


def test_hooks_are_there_once(launches):
    model = Net().to(DEVICE)
    others = model.register_forward_pre_hook(lambda *_: None), model.register_forward_hook(lambda *_: None)
    for _ in range(3):
        together(model)
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (2, 2)
    standardize_together(model, devices=())
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)
    assert not model._forward_hooks_always_called
    for other in others:
        other.remove()
    model(picture())
    assert launches == [1] * 6


@pytest.mark.parametrize("train", [True, False])
def test_nothing_outlives_its_use(train, monkeypatch):
    results, many = [], ops._many_op
    model, x = together(Net(block=reentrant).to(DEVICE)), picture()

    def remember(*args):
        outs = many(*args)
        results.extend(weakref.ref(t.untyped_storage()) for t in (*outs[0], *outs[1:]))
        return outs

    monkeypatch.setattr(ops, "_many_op", remember)
    gc.disable()  # no cycles either
    try:
        if train:
            loss = model(x).square().mean()
            loss.backward()
            del loss
        else:
            with torch.no_grad():
                model(x)
        assert len(results) >= 8
        assert not any(storage() for storage in results)
    finally:
        gc.enable()


# --- with the rest of torch


@pytest.mark.parametrize("part", ["model", "forward", "block"])
def test_compiled(part, launches):
    model, x = together(Net().to(DEVICE)), picture()
    want = step(standardize_together(copy.deepcopy(model), devices=()), x)
    compiled = model
    if part == "model":
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    elif part == "forward":
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    else:
        model.blocks[0] = torch.compile(model.blocks[0], fullgraph=True, backend="aot_eager")
    launches.clear()
    got = step(compiled, x)
    assert launches == ([6, 1, 1] if part == "block" else [1] * 6)  # a compiled part has its own, for each layer
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced():
    model, x = together(nn.Sequential(conv(3, 3), nn.ReLU(), conv(3, 3)).to(DEVICE)), picture().detach()
    whole, part = torch.jit.trace(model, x), torch.fx.symbolic_trace(nn.Sequential(model, nn.ReLU()))
    for _ in range(2):
        want = model(x)
        torch.testing.assert_close(whole(x), want)
        assert torch.equal(part(x), want.relu())
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3).add_(0.1)


def test_folded():
    model, x = together(Net().to(DEVICE)), picture()
    want = model(x)
    fold_ws(model)
    assert torch.equal(model(x), want)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("unused", [False, True])
def test_distributed(unused, tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = Net(block=not_reentrant), picture()
        if unused:
            model.spare = conv(3, 3)
        want = step(copy.deepcopy(model).to(DEVICE), x)
        wrapped = nn.parallel.DistributedDataParallel(together(model).to(DEVICE), find_unused_parameters=unused)
        for _ in range(2):
            same(step(wrapped, x), want)
    finally:
        dist.destroy_process_group()
