"""A run that goes on equals one that never stopped, to the bit: every schedule, wrapper, average and hook with state.

The registries say what there is, so a class that a later release brings is tried too. Checkpoints are those that the
Runner's own CheckpointHook writes, ours and stock mmengine's, and ours are read by torch's safe unpickler.
"""

import copy
import importlib
import inspect
import io
import os
import pickle
import re
import subprocess
import sys
from collections import defaultdict, deque
from pathlib import Path

import mmengine.runner.runner
import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.model.averaged_model import BaseAveragedModel
from mmengine.optim import OptimWrapper, OptimWrapperDict, _ParamScheduler
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.registry import MODELS, OPTIMIZERS, PARAM_SCHEDULERS
from mmengine.runner import Runner
from torch import nn

import normplug  # noqa: F401
from normplug.openmmlab import checkpoints
from normplug.openmmlab.adapt import registries
from normplug.openmmlab.checkpoints import load
from normplug.openmmlab.plain import as_plain

for toolkit in ("mmdet", "mmaction", "mmseg", "mmpretrain"):
    for part in ("engine", "models"):
        pytest.importorskip(f"{toolkit}.{part}")

EPOCHS, STEPS = 4, 2  # steps of an epoch
counter = iter(range(10**6))


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, mode):
        y = self.bn(self.conv(torch.stack(x)))
        return {"loss": (y - 0.3).square().mean()} if mode == "loss" else list(y)


class Norm(BaseMetric):
    """The size of the output: a number of numpy that goes up and down."""

    def process(self, data_batch, data_samples):
        self.results += [float(y.square().mean()) for y in data_samples]

    def compute_metrics(self, results):
        return {"size": np.float32(np.sin(7 * np.mean(results)))}


class Record(Hook):
    """What the optimizer was told at each step."""

    priority = "VERY_LOW"

    def __init__(self):
        self.told = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        optimizer = runner.optim_wrapper
        wrappers = optimizer.values() if isinstance(optimizer, OptimWrapperDict) else [optimizer]
        groups = [group for one in wrappers for group in one.param_groups]
        self.told.append([{key: value for key, value in group.items() if key != "params"} for group in groups])


def runner(work_dir, max_epochs, by_epoch=True, schedulers=(), hooks=(), model=None, checkpoint=(), **kwargs):
    images = [{"x": image} for image in torch.randn(2 * STEPS, 1, 6, 6, generator=torch.Generator().manual_seed(1))]
    loader = dict(dataset=images, batch_size=2, sampler=dict(type="DefaultSampler", shuffle=False), num_workers=0)
    torch.manual_seed(3)
    kwargs.setdefault("optim_wrapper", dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=1e-2)))
    length = dict(by_epoch=True, max_epochs=max_epochs) if by_epoch else dict(by_epoch=False, max_iters=max_epochs)
    return Runner(
        model or Toy(),
        str(work_dir),
        experiment_name=f"going-on-{next(counter)}",
        log_level="ERROR",
        train_dataloader=loader,
        val_dataloader=loader,
        val_evaluator=[Norm()],
        val_cfg={},
        train_cfg=dict(length, val_interval=1),
        param_scheduler=list(schedulers) if not isinstance(schedulers, dict) else schedulers,
        custom_hooks=list(hooks),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=by_epoch, **dict(checkpoint))),
        **kwargs,
    )


def assert_same(one, other, where=""):
    """Equal to the bit, types too."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, where
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple | deque):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}.{i}")
    elif isinstance(one, HistoryBuffer):
        assert_same(list(one.data), list(other.data), where)
    else:
        assert one == other, where


def state_of(run):
    schedulers = run.param_schedulers or []
    named = schedulers if isinstance(schedulers, dict) else {"": schedulers}
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optim_wrapper.state_dict(),
        "schedulers": {
            name: [as_plain({"param_schedulers": [one.state_dict()]}) for one in each] for name, each in named.items()
        },
        "hooks": [
            (type(hook).__name__, vars(hook)[key])
            for hook in run.hooks
            for key in ("ema_model", "wait_count", "best_score")
            if key in vars(hook) and not isinstance(vars(hook)[key], nn.Module)
        ],
        "averages": [hook.ema_model.state_dict() for hook in run.hooks if hasattr(hook, "ema_model")],
        "scalars": {k: v for k, v in run.message_hub.log_scalars.items() if "time" not in k and "val" not in k},
    }


@pytest.fixture
def goes_on(tmp_path, monkeypatch):
    """Train at one go and in two, from our checkpoint and from stock mmengine's, and compare."""
    monkeypatch.setattr(mmengine.runner.runner, "collect_env", dict)  # asks compilers

    def compare(make=dict, stop=EPOCHS // 2, by_epoch=True, max_epochs=EPOCHS, writers=("normplug", "stock")):
        stock = []

        def save_both(checkpoint, file):
            torch.save(as_plain(checkpoint), file)
            if "stock" in writers:
                stock.append(saved(checkpoint))

        def run(name, **kwargs):
            settings, record = make(), Record()
            settings["hooks"] = [*settings.get("hooks", ()), record]
            settings["checkpoint"] = {"interval": stop, **settings.get("checkpoint", {})}
            made = runner(tmp_path / name, max_epochs, by_epoch, **settings, **kwargs)
            made.train()
            assert record.told
            return made, record.told

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.mmengine_checkpoint.torch, "save", save_both, raising=False)
            whole, told = run("whole")
        file = tmp_path / "whole" / f"{'epoch' if by_epoch else 'iter'}_{stop}.pth"
        torch.load(file, weights_only=True)
        files = {"normplug": file, "stock": tmp_path / "stock.pth"}
        if stock:
            files["stock"].write_bytes(next(file for file in stock if load(io.BytesIO(file))["meta"]["epoch"] == stop))
        for writer in writers:
            rest, told_later = run(writer, resume=True, load_from=str(files[writer]))
            assert_same(told[-len(told_later) :], told_later, "told")
            assert_same(state_of(whole), state_of(rest))
        return told

    return compare


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# ---- schedules

# By the name of a setting: a class of a later release is likely to have the same, and else it is missed here loudly.
SETTINGS = dict(
    param_name="lr",
    step_size=2,
    gamma=0.7,
    milestones=[1, 2, 4],
    periods=[2, 3, 4],
    restart_weights=[1, 0.5, 0.25],
    eta_max=0.1,
    eta_min=0.001,
    total_steps=8,
    T_max=5,
    monitor="size",
    patience=0,
    threshold=0.3,
    factor=0.5,
)


def all_schedulers():
    for registry in registries(PARAM_SCHEDULERS):
        for name, cls in registry.module_dict.items():
            yield pytest.param(cls, id=f"{registry.scope}.{name}")


def settings_of(cls, **more):
    accepted = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            accepted |= dict(inspect.signature(base.__init__).parameters)
    needed = {name: value for name, value in SETTINGS.items() if name in accepted}
    if "param_name" in inspect.signature(cls.__init__).parameters or not re.search("LR|Momentum|Decay", cls.__name__):
        needed["param_name"] = "lr"
    else:
        needed.pop("param_name", None)  # the class names it
    if "T_max" in needed and "OneCycle" not in cls.__name__:
        needed.pop("eta_max", None)
    return needed | more


@pytest.mark.parametrize("cls", all_schedulers())
def test_every_schedule_goes_on(goes_on, cls):
    config = dict(type=cls, begin=0, end=EPOCHS, by_epoch=True, **settings_of(cls))
    if hasattr(cls, "build_iter_from_epoch"):  # in steps where the length is one of epochs
        config["convert_to_iter_based"] = True
    told = goes_on(lambda: dict(schedulers=[dict(config)]))
    assert len({str(groups) for groups in told}) > 1, "nothing was scheduled"


@pytest.mark.parametrize(
    "config",
    [
        dict(type="OneCycleLR", eta_max=0.1, anneal_strategy="linear", three_phase=True, total_steps=8, by_epoch=False),
        dict(type="CosineRestartLR", periods=[3, 2], restart_weights=[1, 0.5], eta_min_ratio=0.1, by_epoch=False),
        dict(type="PolyParamScheduler", param_name="weight_decay", power=0.9, eta_min=1e-4, end=7, by_epoch=False),
        dict(type="mmseg.PolyLRRatio", eta_min_ratio=0.1, end=7, by_epoch=False),
        dict(type="StepLR", step_size=np.int64(2), gamma=np.float32(0.7)),
        dict(type="ReduceOnPlateauLR", monitor="size", patience=1, cooldown=1, threshold_rule="abs", min_value=[0.001]),
    ],
    ids=lambda config: config["type"],
)
def test_schedules_with_other_settings_go_on(goes_on, config):
    goes_on(lambda: dict(schedulers=[dict(config)], checkpoint=dict(interval=1)), stop=1)


class Own(LRSchedulerMixin, _ParamScheduler):
    """Keeps what people keep: functions of every kind, a callable object, containers of numpy."""

    class Rule:
        def __call__(self, step):
            return 0.9**step

    @staticmethod
    def half(step):
        return 0.5**step

    def __init__(self, optimizer, *args, **kwargs):
        self.functions, self.rule, self.kind = [self.half, np.sqrt], self.Rule(), Own
        self.window, self.seen = deque([1.0], maxlen=3), defaultdict(int)
        super().__init__(optimizer, *args, **kwargs)

    def _get_value(self):
        self.window.append(np.float32(self.last_step))
        self.seen[self.last_step] += 1
        factor = self.functions[0](len(self.window)) * self.rule(len(self.seen))
        return [value * factor for value in self.base_values]


def test_functions_of_ones_own_scheduler_stay_its_own(goes_on):
    """Of stock mmengine's checkpoint too: there they are names, and nothing is imported or run."""
    goes_on(lambda: dict(schedulers=[dict(type=Own)]), writers=["normplug"])
    goes_on(lambda: dict(schedulers=[dict(type=OwnNames)]))


class OwnNames(Own):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.rule

    def rule(self, step):
        return 1


def test_lambdas_too(goes_on):
    class Lambda(LRSchedulerMixin, _ParamScheduler):
        def __init__(self, *args, **kwargs):
            self.lr_lambdas = {"all": (lambda step: 0.9**step,)}
            super().__init__(*args, **kwargs)

        def _get_value(self):
            return [value * self.lr_lambdas["all"][0](self.last_step) for value in self.base_values]

    goes_on(lambda: dict(schedulers=[dict(type=Lambda)]), writers=["normplug"])


# ---- optimizers and their wrappers

OPTIMIZER_SETTINGS = dict(lr=1e-3)
NOT_HERE = {
    "LBFGS": "wants a closure, which no wrapper of mmengine gives it",
    "SparseAdam": "is for sparse gradients",
    "Optimizer": "is the base class",
    "ZeroRedundancyOptimizer": "wants a process group",
    "Muon": "takes matrices only",
}


def all_optimizers():
    for registry in registries(OPTIMIZERS):
        for name, cls in registry.module_dict.items():
            if name not in NOT_HERE:
                yield pytest.param(cls, id=f"{registry.scope}.{name}")


@pytest.mark.parametrize("cls", all_optimizers())
def test_every_optimizer_goes_on(goes_on, cls):
    optimizer = dict(type=cls, lr=0.001)
    goes_on(
        lambda: dict(optim_wrapper=dict(optimizer=dict(optimizer), clip_grad=dict(max_norm=1.0))), writers=["stock"]
    )


class Keeps(torch.optim.SGD):
    """State beyond tensors, as optimizers of other packages have it."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["seen"] = np.int32(group.get("seen", 0)) + np.int32(1)
            for parameter in group["params"]:
                state = self.state[parameter]
                state["scale"] = np.float32(state.get("scale", 1)) * np.float32(0.9)
                state["last"] = deque([*state.get("last", ()), float(parameter.detach().sum())], maxlen=2)
                parameter.data.mul_(float(state["scale"]) + state["last"][0] * 0.01)
        super().step(closure)


def test_numpy_in_the_state_of_an_optimizer(goes_on):
    goes_on(lambda: dict(optim_wrapper=dict(optimizer=dict(type=Keeps, lr=0.01))), writers=["normplug"])


@pytest.mark.parametrize("stop", [1, 2])
def test_an_accumulation_that_has_begun_goes_on(goes_on, stop):
    wrapper = dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9), accumulative_counts=3)
    goes_on(lambda: dict(optim_wrapper=dict(wrapper)), stop, writers=["normplug"])


def test_wrappers_with_groups_of_parameters(goes_on):
    wrapper = dict(
        optimizer=dict(type="AdamW", lr=0.01, weight_decay=0.05),
        paramwise_cfg=dict(norm_decay_mult=0.0, bias_lr_mult=2.0, custom_keys={"bn": dict(lr_mult=2)}),
    )
    goes_on(lambda: dict(optim_wrapper=copy.deepcopy(wrapper), schedulers=[dict(type="LinearLR", end=3)]))


def test_mixed_precision(goes_on, monkeypatch):
    """Where there is no GPU: the wrapper's own code, with a scaler that works on the CPU."""
    module = importlib.import_module("mmengine.optim.optimizer.amp_optimizer_wrapper")
    monkeypatch.setattr(module, "is_cuda_available", lambda: True)
    monkeypatch.setattr(module, "GradScaler", lambda **kwargs: torch.amp.GradScaler("cpu", growth_interval=2, **kwargs))
    wrapper = dict(type="AmpOptimWrapper", optimizer=dict(type="SGD", lr=0.05), dtype="bfloat16", loss_scale="dynamic")
    goes_on(lambda: dict(optim_wrapper=dict(wrapper)))


class TwoParts(Toy):
    def train_step(self, data, optim_wrapper):
        for wrapper in optim_wrapper.values():
            with wrapper.optim_context(self):
                loss = self(**self.data_preprocessor(data, True), mode="loss")["loss"]
            wrapper.update_params(loss)
        return {"loss": loss.detach()}


def test_several_optimizers(goes_on):
    class TwoWrappers:
        def __init__(self, optim_wrapper_cfg, paramwise_cfg):
            pass

        def __call__(self, model):
            conv = torch.optim.SGD(model.conv.parameters(), lr=0.05, momentum=0.9)
            return OptimWrapperDict(
                conv=OptimWrapper(conv), bn=OptimWrapper(torch.optim.Adam(model.bn.parameters(), lr=0.01))
            )

    def make():
        schedulers = dict(
            conv=[dict(type="OneCycleLR", eta_max=0.1, total_steps=8)],
            bn=[dict(type="LinearLR", end=3), dict(type="ReduceOnPlateauLR", monitor="size")],
        )
        return dict(model=TwoParts(), optim_wrapper=dict(constructor=TwoWrappers), schedulers=schedulers)

    goes_on(make)


# ---- averages, and hooks that remember


def all_averages():
    for registry in registries(MODELS):
        for name, cls in registry.module_dict.items():
            if isinstance(cls, type) and issubclass(cls, BaseAveragedModel):
                yield pytest.param(cls, id=f"{registry.scope}.{name}")


@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("cls", all_averages())
def test_every_average_goes_on(goes_on, cls, update_buffers):
    hook = dict(type="EMAHook", ema_type=cls, update_buffers=update_buffers, interval=2)
    goes_on(lambda: dict(hooks=[dict(hook)]))


@pytest.mark.parametrize("stop", [1, 2])
def test_an_average_that_begins_later(goes_on, stop):
    goes_on(lambda: dict(hooks=[dict(type="EMAHook", begin_epoch=3)]), stop)


def test_an_early_stop_comes_when_it_would_have_come(goes_on):
    def make():
        stop = dict(type="EarlyStoppingHook", monitor="size", patience=2, rule="greater")
        return dict(hooks=[stop], checkpoint=dict(interval=1, save_best="size", rule="greater"))

    for when in (1, 2, 3):
        goes_on(make, when, max_epochs=6, writers=["normplug"])


def test_the_best_checkpoint_is_that_of_the_whole_run(tmp_path, goes_on):
    goes_on(lambda: dict(checkpoint=dict(save_best="size", rule="greater")), max_epochs=6, writers=["normplug"])
    best = [sorted(file.name for file in (tmp_path / run).glob("best*")) for run in ("whole", "normplug")]
    assert best[0] == best[1] != []


class Remembers(Hook):
    """A hook of a user's, whose state is of every kind."""

    def __init__(self):
        self.state = dict(
            window=deque([1, 2], maxlen=3), seen=defaultdict(list, a=[1]), best=np.float16(0.1), when=(np.int8(3), None)
        )
        self.state |= dict(names=np.array(["a", "bc"]), map=np.arange(6.0).reshape(2, 3).T, size=torch.Size([1, 2]))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.state["window"].append(float(outputs["loss"].detach()))
        self.state["seen"]["b"].append(np.float32(self.state["window"][-1]))
        runner.message_hub.update_info("palette", np.arange(3, dtype=np.uint8) + runner.iter)
        runner.message_hub.update_info("window", self.state["window"])

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint["remembers"] = self.state

    def after_load_checkpoint(self, runner, checkpoint):
        self.state = checkpoint["remembers"]


def test_what_hooks_save_comes_back_as_it_was(goes_on):
    hooks = []

    def make():
        hooks.append(Remembers())
        return dict(hooks=[hooks[-1]])

    goes_on(make, stop=3)
    whole, rest, stock = (hook.state for hook in hooks)
    assert_same(whole, rest)
    assert_same(whole, stock)


# ---- in processes, the first without normplug

TRAIN = """
import sys
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner

@MODELS.register_module()
class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, mode):
        return {"loss": (self.layer(torch.stack(x)) - 1).square().mean()}

@DATASETS.register_module()
class Points(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return {"x": torch.tensor([i / 8, 1.0])}

cfg = Config(dict(
    model=dict(type="Model"),
    train_dataloader=dict(dataset=dict(type="Points"), sampler=dict(type="DefaultSampler", shuffle=True), batch_size=2),
    train_cfg=dict(by_epoch=True, max_epochs=4),
    optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.1)),
    param_scheduler=[dict(type="OneCycleLR", eta_max=0.3, total_steps=16, by_epoch=False)],
    custom_hooks=[dict(type="EMAHook")],
    randomness=dict(seed=1),
    work_dir=sys.argv[1],
))
if len(sys.argv) > 2:
    import normplug
    cfg.merge_from_dict(dict(resume=True, load_from=sys.argv[2]))
Runner.from_cfg(cfg).train()
"""


@pytest.mark.slow
def test_a_run_of_stock_mmengine_goes_on_with_normplug(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for arguments in (["whole"], ["rest", "whole/epoch_2.pth"]):
        command = [sys.executable, "train.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "whole" / "epoch_4.pth", weights_only=True)  # stock indeed
    torch.load(tmp_path / "rest" / "epoch_4.pth", weights_only=True)
    whole, rest = (load(tmp_path / name / "epoch_4.pth") for name in ("whole", "rest"))
    for part in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
        assert_same(whole[part], rest[part], part)
