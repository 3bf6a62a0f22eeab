"""Checkpoints: what mmengine writes loads safely, what is dangerous does not, another norm is refused."""

import builtins
import dataclasses
import enum
import functools
import io
import math
import os
import pickle
import re
import shutil
from collections import OrderedDict
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

import normplug  # noqa: F401
from normplug.openmmlab import checkpoints, plain
from normplug.openmmlab.checkpoints import CheckpointNormHook, UnsafeCheckpointError, check_norms, load
from normplug.openmmlab.file_kinds import CheckpointError
from normplug.openmmlab.plain import as_plain


def saved(content, **kwargs) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    file.seek(0)
    return file


# ---- train, save, resume


class Toy(BaseModel):
    def __init__(self, norm=nn.BatchNorm2d, name="bn"):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.add_module(name, norm(4))
        self.name = name

    def forward(self, x, mode):
        return {"loss": getattr(self, self.name)(self.conv(torch.stack(x))).square().mean() + self.conv.weight.sum()}


def runner(work_dir, epochs, name, model=None, checkpoint=None, **kwargs):
    images = [{"x": image} for image in torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))]
    torch.manual_seed(3)
    return Runner(
        model or Toy(),
        str(work_dir),
        experiment_name=name,
        log_level="WARNING",
        train_dataloader=dict(
            dataset=images, batch_size=2, sampler=dict(type="DefaultSampler", shuffle=False), num_workers=0
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=3),
            dict(type="MultiStepLR", milestones=[2, 3]),
        ],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1, **(checkpoint or {}))),
        **kwargs,
    )


def history(hub):
    return {name: buffer.data for name, buffer in hub.log_scalars.items() if "time" not in name}


def assert_same_history(one, other):
    assert one.keys() == other.keys() >= {"train/loss", "train/lr"}
    for name in one:
        for a, b in zip(one[name], other[name], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("writer", ["normplug", "stock mmengine"])
def test_a_resumed_run_goes_on_exactly(tmp_path, monkeypatch, writer):
    with monkeypatch.context() as patch:
        if writer == "stock mmengine":
            patch.setattr(checkpoints.mmengine_checkpoint.torch, "save", torch.save, raising=False)
        whole = runner(tmp_path, 4, f"whole, {writer}")
        whole.train()
    file = tmp_path / "epoch_2.pth"
    if writer == "normplug":  # nothing but plain values and tensors: any torch.load reads it
        stored = torch.load(file, weights_only=True)["message_hub"]["log_scalars"]["train/loss"]
        assert all(isinstance(stored[row], torch.Tensor) for row in ("log_history", "count_history"))
    else:  # the gap itself
        with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer was not an allowed"):
            torch.load(file)
    rest = runner(tmp_path / "rest", 4, f"resumed, {writer}", resume=True, load_from=str(file))
    rest.train()
    assert_same_history(history(rest.message_hub), history(whole.message_hub))
    assert len(rest.message_hub.get_scalar("train/loss").data[0]) == 8
    assert rest.message_hub.runtime_info.keys() == whole.message_hub.runtime_info.keys()
    for (name, a), b in zip(whole.model.state_dict().items(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_message_hub_round_trip():
    hub = MessageHub("there")
    for i in range(3):
        hub.update_scalar("loss", i)  # integers stay integers
        hub.update_scalar("acc", i / 7)
        hub.update_scalar("not kept", i, resumed=False)
    hub._log_scalars["none yet"], hub._resumed_keys["none yet"] = HistoryBuffer(max_length=5), True
    hub.update_info("best", np.float32(0.1))
    hub.update_info("meta", {"classes": ("a", "b"), "palette": np.arange(6).reshape(2, 3)})
    state = as_plain(hub.state_dict())
    torch.load(saved(state), weights_only=True)
    for stored in (load(saved(state)), load(saved(hub.state_dict()))):
        back = MessageHub("back")
        back.load_state_dict(stored)
        assert back.log_scalars.keys() == {"loss", "acc", "none yet"}
        for name, buffer in back.log_scalars.items():
            assert type(buffer) is HistoryBuffer
            want = hub.get_scalar(name)
            assert buffer.max_length == want.max_length
            for a, b in zip(buffer.data, want.data, strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
        assert back.get_scalar("loss").data[0].dtype == np.int64
        back.update_scalar("acc", 1.0)
        assert back.get_scalar("acc").statistics("mean", 2) == pytest.approx((2 / 7 + 1) / 2)
        assert back.get_info("best") == np.float32(0.1)
        assert type(back.get_info("best")) is np.float32
        np.testing.assert_array_equal(back.get_info("meta")["palette"], np.arange(6).reshape(2, 3))
        assert back.get_info("meta")["classes"] == ("a", "b")
    assert type(hub.get_scalar("loss")) is HistoryBuffer  # the hub itself is as it was


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"], ids=["numpy 1", "numpy 2"])
def test_checkpoints_of_either_numpy(module):
    hub = MessageHub("there")
    hub.update_scalar("loss", 0.5)
    hub.update_info("best", np.float64(0.25))
    written = saved(hub.state_dict(), _use_new_zipfile_serialization=False).read()
    names = rb"numpy\._?core\.multiarray"
    assert len(re.findall(names, written)) == 2
    state = load(io.BytesIO(re.sub(names, module, written)))
    assert state["log_scalars"]["loss"].current() == 0.5
    assert state["runtime_info"]["best"] == 0.25


def test_numpy_values_of_any_numeric_kind():
    values = {
        "scalars": (np.float64(1 / 3), np.float32(1 / 3), np.int8(-3), np.bool_(True), np.complex64(1j)),
        "orders": [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(3, dtype=">i4")],
        "shapes": {"none": np.zeros((0, 4)), "zero-d": np.array(2.5), "bool": np.array([True, False])},
        "dtype": np.dtype("float16"),
    }
    back = load(saved(values))
    for name in ("scalars", "orders"):
        assert type(back[name]) is type(values[name])
        for a, b in zip(back[name], values[name], strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype.newbyteorder("=")
    for name, a in back["shapes"].items():
        np.testing.assert_array_equal(a, values["shapes"][name])
        assert a.flags.writeable
    assert back["dtype"] == np.float16


def test_a_list_that_holds_itself():
    ring = [np.ones(2)]
    ring.append(ring)
    back = load(saved(ring))
    assert back[1] is back
    assert back[0].sum() == 2


# ---- what is refused


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touch(file):
    return f"touch {file}"


ATTACKS = {
    "os.system": (lambda file: Call(os.system, touch(file)), "system"),
    "eval": (lambda file: Call(eval, f"open({str(file)!r}, 'w')"), "contains eval[.] "),
    "open": (lambda file: Call(open, str(file), "w"), "open"),
    "functools.partial": (lambda file: Call(functools.partial, os.system, touch(file)), "functools.partial"),
    "shutil": (lambda file: Call(shutil.copy, __file__, str(file)), "shutil.copy"),
    "getattr of the buffer": (lambda file: Call(getattr, HistoryBuffer, "__init__"), "getattr.*__init__"),
    "getattr of a list": (lambda file: Call(getattr, [], "append"), "getattr.*append"),
    "getattr of a result": (
        lambda file: Call(getattr, Call(getattr, HistoryBuffer, "mean"), "__globals__"),
        "getattr.*__globals__",
    ),
    "getattr of a harmless name": (lambda file: Call(getattr, [], "max"), "getattr.*max"),
    "getattr of builtins": (lambda file: Call(getattr, builtins.__loader__, "load_module"), ""),
    "a class of one's own": (lambda file: Toy(), "Toy"),
}
FORMATS = {
    "zip": {},
    "before torch 1.6": dict(_use_new_zipfile_serialization=False),
    "protocol 4": dict(pickle_protocol=4),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize(("attack", "form"), [*product(ATTACKS, ("zip", "before torch 1.6")), ("eval", "protocol 4")])
def test_a_checkpoint_with_foreign_code_is_refused(tmp_path, attack, form):
    build, named = ATTACKS[attack]
    proof, file = tmp_path / "executed", tmp_path / "evil.pth"
    file.write_bytes(saved({"state_dict": {}, "meta": build(proof)}, **FORMATS[form]).read())
    with pytest.raises(UnsafeCheckpointError, match=f"(?s)evil.pth was refused.*{named}.*Expected: tensors"):
        CheckpointLoader.load_checkpoint(str(file))
    assert not proof.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_a_bare_pickle_is_refused(tmp_path):
    file = tmp_path / "evil.pkl"
    file.write_bytes(pickle.dumps({"state_dict": Call(os.system, touch(tmp_path / "executed"))}))
    with pytest.raises(UnsafeCheckpointError, match="system"):
        load(file)
    assert not (tmp_path / "executed").exists()


def test_the_refusal_names_all_that_is_foreign():
    with pytest.raises(UnsafeCheckpointError, match=r"functools\.partial, print, test_checkpoints\.Friend\."):
        load(saved([Call(functools.partial, print), Friend()]))


def array_with(state, dtype=None):
    """An array whose pickled state is ``state``; ``...`` in it stands for its dtype, float64 by default."""
    dtype = np.dtype("f8") if dtype is None else dtype

    class Crafted:
        def __reduce__(self):
            function, args, _ = np.zeros(1).__reduce__()
            return function, args, tuple(dtype if item is ... else item for item in state)

    return Crafted()


class CraftedDtype:
    """A float64 whose pickled flags say that its eight bytes are a pointer to an object."""

    def __reduce__(self):
        return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (np.array([None, {}], dtype=object), "numpy.dtype.'O8'"),
        (np.zeros(2, dtype=[("a", "f4")]), "numpy.dtype.'V4'"),
        (array_with((1, (9,), ..., False, b"12345678")), "9.*8 bytes"),
        (array_with((1, (-1, -1), ..., False, b"12345678")), "shape"),
        (array_with((1, (1,), ..., False, ["x"])), "anything but numbers"),
        (array_with((1, (1,), "f8", False, b"12345678")), "anything but numbers"),
        (Call(np.zeros(1).__reduce__()[0], HistoryBuffer, (0,), b"b"), "_reconstruct"),
        (Call(np.float64(1).__reduce__()[0], np.dtype("f8"), b"1"), "scalar"),
    ],
    ids=["objects", "fields", "too little data", "negative", "list", "no dtype", "other class", "scalar"],
)
def test_crafted_numpy_is_refused(content, why):
    with pytest.raises(UnsafeCheckpointError, match=why):
        load(saved([content]))


def test_a_crafted_dtype_is_a_dtype_of_numbers():
    array = load(saved([array_with((1, (1,), ..., False, b"12345678"), CraftedDtype())]))[0]
    assert array.dtype == np.float64
    assert not array.dtype.hasobject
    assert array.dtype.flags == np.dtype("f8").flags


class ArrayWithoutState:
    def __reduce__(self):
        return np.zeros(1).__reduce__()[:2]


@pytest.mark.parametrize(
    "state",
    [
        {"_log_history": ArrayWithoutState(), "_count_history": ArrayWithoutState(), "max_length": 9},
        {"_log_history": np.zeros(2), "_count_history": np.zeros(3), "max_length": 9},
        {"_log_history": np.zeros((2, 2)), "_count_history": np.zeros((2, 2)), "max_length": 9},
        {"_log_history": [1], "_count_history": [1], "max_length": 9},
        {"_log_history": np.zeros(2), "_count_history": np.zeros(2), "max_length": "9"},
        "no dict",
    ],
    ids=["no state", "lengths", "rank", "lists", "max_length", "no dict"],
)
def test_a_crafted_history_is_refused(monkeypatch, state):
    monkeypatch.setattr(HistoryBuffer, "__getstate__", lambda self: state)
    with pytest.raises(UnsafeCheckpointError, match="HistoryBuffer"):
        load(saved([HistoryBuffer()]))


def test_a_history_does_not_change_the_methods_of_the_class(monkeypatch):
    methods = dict(HistoryBuffer._statistics_methods)
    state = {"_log_history": np.ones(2), "_count_history": np.ones(2), "max_length": 9}
    monkeypatch.setattr(
        HistoryBuffer, "__getstate__", lambda self: {**state, "statistics_methods": {"mean": len}, "max": 1}
    )
    buffer = load(saved([HistoryBuffer()]))[0]
    assert buffer.max() == buffer.mean() == 1
    assert HistoryBuffer._statistics_methods == methods


class Friend:
    """A class that its user trusts."""

    class Inner:
        def __init__(self):
            self.kept = [1, 2]

    class Kind(enum.Enum):
        ONE = 1

    @dataclasses.dataclass
    class Record:
        number: int = 3

    def method():
        """One that a file may name."""


TRUSTED = [Friend(), [Friend.Inner(), {"a": Friend()}], Friend.Kind.ONE, Friend.Record(), Friend.method, math.cos]


@pytest.mark.parametrize("form", ["zip", "before torch 1.6"])
@pytest.mark.parametrize("content", TRUSTED, ids=["class", "classes", "enum", "dataclass", "function", "builtin"])
def test_what_the_refusal_says_to_type_works(tmp_path, content, form):
    file = tmp_path / "mine.pth"
    file.write_bytes(saved({"state_dict": {}, "meta": content}, **FORMATS[form]).read())
    with pytest.raises(UnsafeCheckpointError) as refused:
        load(file)
    typed = re.search(r"import [\w., ]+; torch\.serialization\.add_safe_globals\(.*\)", str(refused.value))[0]
    before = torch.serialization.get_safe_globals()
    try:
        exec(typed, {"torch": torch})
        loaded = load(file)["meta"]
        assert pickle.dumps(loaded) == pickle.dumps(content)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_what_runs_programs_is_never_advised():
    for call in (Call(os.system, "true"), Call(eval, "1"), Call(functools.partial, print), Call(getattr, [], "append")):
        with pytest.raises(UnsafeCheckpointError) as refused:
            load(saved([call]))
        assert "add_safe_globals" not in str(refused.value)


def test_functions_are_left_out_of_schedulers_only():
    state = {"anneal_func": Friend.method, "lambdas": [{"a": (len,)}], "factor": np.float32(0.1), "step": 3}
    wanted = {"factor": np.float32(0.1), "step": 3}
    for schedulers, want in (([state], [wanted]), ({"a": [state], "b": [state]}, {"a": [wanted], "b": [wanted]})):
        for file in (saved({"param_schedulers": schedulers}), saved(as_plain({"param_schedulers": schedulers}))):
            assert load(file) == {"param_schedulers": want}
    for content in ({"meta": state}, [state], {"param_schedulers": [{"f": Call(print, "called")}]}):
        with pytest.raises(UnsafeCheckpointError, match=r"len|print"):
            load(saved(content))
    for content in ({"meta": {len}}, {len: 1}, {"meta": frozenset([len])}):
        with pytest.raises(UnsafeCheckpointError, match="len"):
            load(saved(content))


def test_what_has_no_plain_form_is_named_when_it_is_saved(caplog, monkeypatch):
    monkeypatch.setattr(plain, "_told", set())
    told = []
    monkeypatch.setattr(plain, "print_log", lambda text, *args, **kwargs: told.append(text))
    for _ in range(2):
        content = as_plain({"meta": {"mine": [1, Friend()]}, "param_schedulers": [{"f": len}]})
    assert len(told) == 1
    assert "checkpoint['meta']['mine'][1] holds a test_checkpoints.Friend" in told[0]
    assert isinstance(content["meta"]["mine"][1], Friend)


def test_plain_checkpoints_share_what_needs_no_change():
    weights = nn.BatchNorm1d(2).state_dict()
    content = {"state_dict": weights, "optimizer": {"state": {0: {"step": 1}}, "betas": (0.9, 0.99)}}
    made = as_plain(content)
    assert made["state_dict"] is weights
    assert made["optimizer"] is content["optimizer"]
    mixed = OrderedDict(weights, extra=np.ones(2))
    mixed._metadata = weights._metadata
    assert as_plain(mixed)._metadata == weights._metadata


@pytest.mark.parametrize(
    "part",
    [
        {"normplug.kind": "code"},
        {"normplug.kind": "array", "data": "x"},
        {"normplug.kind": "deque", "data": 1},
        {"normplug.kind": []},
    ],
)
def test_parts_of_an_unknown_kind_are_refused(part):
    with pytest.raises(CheckpointError, match="unknown kind"):
        load(saved({"meta": part}))


def test_what_the_user_allowed_stays_allowed():
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.add_safe_globals([Friend, getattr])
        assert isinstance(load(saved([Friend()]))[0], Friend)
        with pytest.raises(UnsafeCheckpointError, match="getattr"):  # but not what is ours to guard
            load(saved([Call(getattr, [], "append")]))
        assert {Friend, getattr} <= set(torch.serialization.get_safe_globals())
        assert isinstance(torch.load(saved([Friend()]), weights_only=True)[0], Friend)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_the_check_cannot_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file, proof = tmp_path / "evil.pth", tmp_path / "executed"
    file.write_bytes(saved(Call(os.system, touch(proof))).read())
    for source in (str(file), f"open-mmlab://{file}"):
        monkeypatch.setattr(checkpoints.mmengine_checkpoint, "get_external_models", lambda: {str(file): str(file)})
        with pytest.raises(UnsafeCheckpointError):
            CheckpointLoader.load_checkpoint(source)
    with pytest.raises(UnsafeCheckpointError):
        load(file, weights_only=False)
    assert not proof.exists()


def test_a_download_is_checked_too(tmp_path, monkeypatch):
    proof = tmp_path / "executed"
    content = {"good": {"state_dict": OrderedDict(w=torch.ones(2))}, "evil": Call(os.system, touch(proof))}

    def download(url, file, *args, **kwargs):
        torch.save(content[os.path.basename(url).removesuffix(".pth")], file)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr("normplug.openmmlab.pretrained._knock", lambda address: None)  # a server that answers
    assert CheckpointLoader.load_checkpoint("https://example.org/good.pth")["state_dict"]["w"].sum() == 2
    with pytest.raises(UnsafeCheckpointError, match="system"):
        CheckpointLoader.load_checkpoint("https://example.org/evil.pth")
    assert not proof.exists()


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        CheckpointLoader.load_checkpoint(str(tmp_path / "nowhere.pth"))
    if not torch.cuda.is_available():
        torch.save({"w": torch.ones(9)}, tmp_path / "whole.pth")
        with pytest.raises(RuntimeError, match="CUDA"):
            load(tmp_path / "whole.pth", map_location="cuda")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"epoch: 3", 200, 2000])
def test_a_file_that_is_not_whole_is_named(tmp_path, content):
    file = tmp_path / "cut.pth"
    file.write_bytes(content if isinstance(content, bytes) else saved({"w": torch.ones(999)}).read()[:content])
    with pytest.raises(
        CheckpointError, match=r"cut\.pth is no checkpoint but (an empty file|an HTML|a text|cut short)"
    ):
        CheckpointLoader.load_checkpoint(str(file), map_location="cpu")


# ---- another norm


def net(norm, name="bn"):
    """A backbone that names its norms as mmdet does, with a downsampling branch that names nothing."""
    block = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 1), f"{name}1": norm(4)})
    block["downsample"] = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4))
    head = nn.ModuleDict({"conv": nn.Conv2d(4, 1, 1), "fc": nn.Linear(4, 4), name: norm(4)})
    return nn.ModuleDict({"backbone": block, "head": head})


def gn(channels):
    return nn.GroupNorm(2, channels)


class WithHistory(nn.BatchNorm2d):
    """As cross-iteration BN: more state than BN."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("history_mean", torch.zeros(3, channels))


class VarianceOnly(nn.Module):
    """As EvoNormB0: a running variance, no running mean."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "v"):
            self.register_parameter(name, nn.Parameter(torch.ones(channels)))
        self.register_buffer("running_var", torch.ones(channels))


class WithSlope(VarianceOnly):
    """As EvoNormS0: weight, bias and v."""

    def __init__(self, channels):
        super().__init__(channels)
        del self.running_var


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (nn.BatchNorm2d, nn.BatchNorm2d),
        (nn.BatchNorm2d, nn.SyncBatchNorm),
        (nn.SyncBatchNorm, WithHistory),
        (WithHistory, nn.BatchNorm2d),
        (gn, gn),
        (gn, WithSlope),
        (WithSlope, gn),
    ],
)
def test_same_kinds_of_norm_pass(ours, theirs):
    model, weights = net(ours), net(theirs).state_dict()
    check_norms(model, weights)
    check_norms(model, {k: v for k, v in weights.items() if "num_batches_tracked" not in k})
    check_norms(model, {k: v for k, v in weights.items() if not k.startswith("head")})
    check_norms(model, {k: v for k, v in weights.items() if "conv" in k})
    check_norms(model, {})


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ((gn, "gn"), (nn.BatchNorm2d, "bn"), r"3 of the model's 3 .*GroupNorm 'backbone.gn1'.*'backbone.bn1' with run"),
        ((nn.BatchNorm2d, "bn"), (gn, "gn"), r"BatchNorm2d 'backbone.bn1'.*'backbone.gn1' with no running.*num_groups"),
        ((nn.BatchNorm2d, "bn"), (gn, "bn"), r"3 of .*'backbone.bn1' with running.*'backbone.bn1' with no running"),
        ((gn, "bn"), (nn.BatchNorm2d, "bn"), r"3 of .*norm_cfg to the checkpoint's .*type='BN'"),
        ((VarianceOnly, "bn"), (nn.BatchNorm2d, "bn"), r"VarianceOnly .*without mean"),
        ((gn, "gn"), (gn, "ln"), r"2 of .*'backbone.gn1'.*'backbone.ln1'"),
        ((WithSlope, "bn"), (VarianceOnly, "bn"), r"type='EvoNormB0'"),
    ],
)  # fmt: skip
def test_another_kind_of_norm_is_refused(ours, theirs, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        check_norms(net(*ours), net(*theirs).state_dict())


def test_a_norm_elsewhere_or_of_another_width_is_not_this_norm():
    weights = net(nn.BatchNorm2d).state_dict()
    weights["head.other.bn1.weight"] = weights["head.other.bn1.bias"] = torch.ones(4)
    check_norms(net(nn.BatchNorm2d), weights)
    renamed = {k.replace(".bn1", ".scale1"): v for k, v in weights.items()}  # no name of a norm: some other layer
    check_norms(net(gn, "gn"), {k: v for k, v in renamed.items() if "head" not in k and "downsample" not in k})
    check_norms(net(gn, "gn"), {"backbone.bn1.weight": torch.ones(4)})
    narrow = {k: v[:2] if "bn" in k and v.ndim else v for k, v in weights.items()}
    del narrow["backbone.downsample.1.running_mean"], narrow["backbone.downsample.1.weight"]
    check_norms(nn.ModuleDict({"backbone": net(gn, "gn")["backbone"]["downsample"]}), narrow)


def test_the_hook_speaks_before_anything_is_loaded(tmp_path):
    hook = [dict(type="CheckpointNormHook")]
    model = Toy(functools.partial(nn.GroupNorm, 2), "gn")
    bn = {f"module.{key}": value for key, value in Toy().state_dict().items()}  # as DDP saves
    torch.save({"state_dict": bn, "meta": {}}, tmp_path / "bn.pth")
    run = runner(tmp_path, 1, "hook", model, custom_hooks=hook)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for call in (run.load_checkpoint, run.resume):
        with pytest.raises(ValueError, match=r"GroupNorm 'gn'.*'bn'"):
            call(str(tmp_path / "bn.pth"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    wrapped = SimpleNamespace(model=nn.DataParallel(model), _resume=False)
    with pytest.raises(ValueError, match=r"GroupNorm 'gn'.*'bn'"):
        CheckpointNormHook().after_load_checkpoint(wrapped, {"state_dict": bn})
    torch.save(before, tmp_path / "gn.pth")  # bare weights
    run.load_checkpoint(str(tmp_path / "gn.pth"))
    assert HOOKS.get("CheckpointNormHook") is CheckpointNormHook
