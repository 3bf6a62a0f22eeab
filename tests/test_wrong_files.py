"""Files that are no weights, or weights that are no good: each door says in a sentence what is wrong."""

import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_checkpoint
from safetensors.torch import save_file
from test_checkpoints import Toy, runner
from torch import nn

import normplug  # noqa: F401
from normplug.openmmlab.file_kinds import CheckpointError, check_kind

HOOKS = [dict(type="CheckpointNormHook"), dict(type="RandomStateHook")]
names = iter(range(10**6))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of two epochs, as the tools write it."""
    folder = tmp_path_factory.mktemp("good")
    runner(folder, 2, f"wrong-files-{next(names)}", custom_hooks=HOOKS).train()
    return folder / "epoch_2.pth"


class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return {"count": len(results)}


class Evaluated(Toy):
    def forward(self, x, mode):
        self.bn(self.conv(torch.stack(x)))
        return [None]


def evaluate(file, folder):
    """tools/test.py CONFIG FILE"""
    Runner(
        Evaluated(),
        str(folder / "test"),
        experiment_name=f"wrong-files-{next(names)}",
        log_level="ERROR",
        test_dataloader=dict(
            dataset=[{"x": torch.zeros(1, 6, 6)}], batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False)
        ),
        test_cfg={},
        test_evaluator=Count(),
        load_from=str(file),
        custom_hooks=HOOKS,
    ).test()


def resume(file, folder):
    """tools/train.py CONFIG --resume FILE"""
    made = runner(
        folder / "rest", 3, f"wrong-files-{next(names)}", resume=True, load_from=str(file), custom_hooks=HOOKS
    )
    made.train()
    assert made.epoch == 3


def load_from(file, folder):
    """load_from=FILE"""
    runner(folder / "new", 1, f"wrong-files-{next(names)}", load_from=str(file), custom_hooks=HOOKS).train()


def pretrained(file, folder):
    """init_cfg=dict(type='Pretrained', checkpoint=FILE)"""
    model = Toy()
    model.init_cfg = dict(type="Pretrained", checkpoint=str(file))
    model.init_weights()


def by_hand(file, folder):
    """mmengine's load_checkpoint"""
    load_checkpoint(Toy(), str(file))


DOORS = (evaluate, resume, load_from, pretrained, by_hand)
every_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)


@every_door
def test_a_good_file_is_taken(good, tmp_path, door):
    door(good, tmp_path)


@pytest.mark.parametrize("door", [evaluate, load_from, pretrained, by_hand], ids=lambda door: door.__name__)
def test_safetensors_are_taken(good, tmp_path, door):
    save_file(torch.load(good)["state_dict"], tmp_path / "a.safetensors")
    door(tmp_path / "a.safetensors", tmp_path)
    (tmp_path / "a.safetensors").rename(tmp_path / "renamed.pth")
    door(tmp_path / "renamed.pth", tmp_path)


# ---- kinds of file

HTML = b"<!DOCTYPE html>\n<html><head><title>404: not found</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 178194\n"


def packed(pack):
    return lambda file, data: file.write_bytes(pack(data))


def zipped(**content):
    def write(file, data):
        with zipfile.ZipFile(file, "w") as archive:
            for name, text in content.items():
                archive.writestr(name.replace("__", "/").replace("_dot_", "."), data if text is None else text)

    return write


def tarred(*members):
    def write(file, data):
        with tarfile.open(file, "w") as archive:
            for name in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    return write


def folder_with(*files):
    def write(file, data):
        file.mkdir()
        for name in files:
            (file / name).write_bytes(b"x")

    return write


def npz(file, data):
    with file.open("wb") as stream:
        np.savez(stream, w=np.ones(3))


FILES = {
    "html": (packed(lambda _: HTML), "an HTML page"),
    "html after a blank line": (packed(lambda _: b"\n  " + HTML), "an HTML page"),
    "git-lfs": (packed(lambda _: POINTER), "a git-lfs pointer.*git lfs pull"),
    "gzip": (packed(gzip.compress), "a gzip archive.*gunzip"),
    "xz": (packed(lzma.compress), "an xz archive"),
    "zstd": (packed(lambda data: b"\x28\xb5\x2f\xfd" + data), "a zstd archive"),
    "7z": (packed(lambda data: b"7z\xbc\xaf\x27\x1c" + data), "a 7z archive"),
    "tar": (tarred("run/epoch_2.pth"), r"a tar archive \(run/epoch_2.pth\)"),
    "tar of old torch": (tarred("sys_info", "pickle", "storages", "tensors"), "a checkpoint of torch before 0.1.10"),
    "zip of a checkpoint": (zipped(run__epoch_2_dot_pth=None), "a zip archive that holds run/epoch_2.pth"),
    "zip of other things": (zipped(a_dot_txt="a", b_dot_txt="b"), r"a zip archive of other things \(a.txt, b.txt\)"),
    "npz": (npz, "an archive of numpy arrays.*convert_checkpoint"),
    "torchscript": (
        lambda file, data: torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2)), file),
        "a program in TorchScript.*state_dict",
    ),
    "export": (
        lambda file, data: torch.export.save(torch.export.export(nn.Linear(1, 1), (torch.ones(1, 1),)), file),
        "a program of torch.export",
    ),
    "json": (packed(lambda _: b'{"a": 1}'), "a JSON text"),
    "index": (
        packed(lambda _: json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()),
        "an index of weights in 2 files",
    ),
    "yaml": (packed(lambda _: b"epoch: 3\n"), "a text, which begins with 'epoch: 3'"),
    "config": (packed(lambda _: b"custom_imports = dict(imports=['x'])\n"), "a text, which begins with .custom"),
    "umlaut cut in two": (packed(lambda _: b"a" * 511 + "ü".encode()), "a text"),
    "png": (packed(lambda _: b"\x89PNG\r\n\x1a\n" + bytes(99)), "a PNG picture"),
    "hdf5": (packed(lambda _: b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "onnx": (packed(lambda _: b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(99)), "a model in ONNX"),
    "noise": (packed(lambda _: bytes(range(200, 256)) * 9), "a file of no known kind"),
    "empty": (packed(lambda _: b""), "an empty file"),
    "blank": (packed(lambda _: b" \n" * 300), "a text"),
    "zeros": (packed(lambda data: bytes(len(data))), "a file of zeros"),
    "cut": (packed(lambda data: data[: len(data) // 2]), "cut short.*Download it again"),
    "folder": (folder_with("epoch_2.pth"), "a folder, with epoch_2.pth in it"),
    "folder of dcp": (folder_with(".metadata"), "a folder of torch.distributed.checkpoint.*dcp_to_torch"),
    "folder of tensorflow": (folder_with("saved_model.pb"), "a model of TensorFlow"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*pytree", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_named(good, tmp_path, kind):
    write, expected = FILES[kind]
    file = tmp_path / "file.pth"
    write(file, good.read_bytes())
    with pytest.raises(CheckpointError, match=f"file.pth is (no checkpoint but )?{expected}") as told:
        check_kind(file)
    assert "\n" not in str(told.value)
    if file.is_file():
        for door in (by_hand, resume):
            with pytest.raises(CheckpointError, match=expected):
                door(file, tmp_path)


# ---- contents


def without(*path):
    def change(checkpoint):
        *parents, last = path
        for name in parents:
            checkpoint = checkpoint[name]
        del checkpoint[last]

    return change


def having(value, *path):
    def change(checkpoint):
        *parents, last = path
        for name in parents:
            checkpoint = checkpoint[name]
        checkpoint[last] = value(checkpoint.get(last)) if callable(value) else value

    return change


def nan(value):
    return torch.full_like(value, torch.nan)


def quantized(value):
    return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


def renamed(prefix):
    def change(checkpoint):
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {prefix + key: value for key, value in weights.items()}

    return change


WEIGHT = ("state_dict", "conv.weight")
CONTENTS = {  # what is changed, and what every door says
    "NaN": (having(nan, *WEIGHT), "NaN or infinite values in 1 of its 7 weights, the first 'conv.weight'"),
    "infinite": (having(lambda w: w * torch.inf, *WEIGHT), "NaN or infinite"),
    "int32": (having(lambda w: w.int(), *WEIGHT), "'conv.weight' as torch.int32"),
    "bool": (having(lambda w: w > 0, *WEIGHT), "'conv.weight' as torch.bool"),
    "complex": (having(lambda w: w + 0j, *WEIGHT), "'conv.weight' as torch.complex64"),
    "meta": (having(lambda w: w.to("meta"), *WEIGHT), "1 tensors without data"),
    "sparse": (having(lambda w: w.to_sparse(), *WEIGHT), "1 sparse tensors, the first 'conv.weight'"),
    "quantized": (having(quantized, *WEIGHT), "1 quantized tensors"),
    "text for a weight": (having("abc", *WEIGHT), "1 entries among its weights that are no tensors.*a str, 'abc'"),
    "None for a weight": (having(None, *WEIGHT), "no tensors, the first 'conv.weight': a NoneType"),
    "nested": (
        having(lambda s: {"model": s}, "state_dict"),
        "no tensors, the first 'model': a OrderedDict of 7.*convert_ch",
    ),
    "empty": (having({}, "state_dict"), "holds no weights: its state_dict is empty"),
    "list": (having([1, 2], "state_dict"), "holds a list of 2 in place of weights"),
    "text": (having("weights", "state_dict"), "holds a str, 'weights' in place of weights"),
    "none": (having(None, "state_dict"), "holds a NoneType.* in place of weights"),
    "numbers for names": (having({1: torch.ones(2)}, "state_dict"), "weights under 1, which is no name"),
    "another model": (
        having({"encoder.w": torch.ones(2)}, "state_dict"),
        "None of the 1 weights.*of another architecture",
    ),
    "a prefix": (renamed("backbone."), "agree behind the file's 'backbone.'.*prefix='backbone.'"),
    "compiled": (renamed("_orig_mod."), "agree behind the file's '_orig_mod.'"),
}


def changed(good, file, change):
    checkpoint = torch.load(good)
    change(checkpoint)
    torch.save(checkpoint, file)
    return file


@every_door
@pytest.mark.filterwarnings("ignore:.*sparse", "ignore:.*quantiz", "ignore:.*TypedStorage")
@pytest.mark.parametrize("kind", CONTENTS)
def test_weights_that_are_no_good(good, tmp_path, door, kind):
    change, expected = CONTENTS[kind]
    file = changed(good, tmp_path / "file.pth", change)
    with pytest.raises(CheckpointError, match=expected) as told:
        door(file, tmp_path)
    assert "file.pth" in str(told.value)
    assert "\n" not in str(told.value)


TOPS = {
    "tensor": (torch.ones(3), r"holds a tensor of shape \(3,\) in place of weights"),
    "list": ([torch.ones(3)], "holds a list of 1 in place of weights"),
    "number": (3, "holds a int, '3' in place of weights"),
}


@every_door
@pytest.mark.parametrize("kind", TOPS)
def test_no_dict_at_all(tmp_path, door, kind):
    content, expected = TOPS[kind]
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=expected):
        door(tmp_path / "file.pth", tmp_path)


PARTS = {
    "a weight is missing": (without(*WEIGHT), r"it lacks 1 of the model's 4 weights \('conv.weight'\)"),
    "another shape": (
        having(lambda w: w[:2], *WEIGHT),
        r"'conv.weight' is \(4, 1, 3, 3\) in the model and \(2, 1, 3, 3\) in the file",
    ),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_of_a_model_is_no_model(good, tmp_path, kind, monkeypatch):
    """To evaluate and to go on it takes all weights; to begin with, some will do, and the others are named."""
    change, expected = PARTS[kind]
    file = changed(good, tmp_path / "file.pth", change)
    for door in (evaluate, resume):
        with pytest.raises(CheckpointError, match=f"file.pth is not of this model: {expected}"):
            door(file, tmp_path)
    told = []
    monkeypatch.setattr(
        "normplug.openmmlab.weight_checks.print_log", lambda text, logger, level: told.append((text, level))
    )
    for door in (load_from, pretrained, by_hand):
        door(file, tmp_path)
    by_us = 3 if kind == "another shape" else 0  # what is missing mmengine says itself
    assert [bool(re.search(expected + ".*keep their initial values", text)) for text, _ in told] == [True] * by_us


def test_running_statistics_may_be_repaired(good, tmp_path, monkeypatch):
    file = changed(good, tmp_path / "file.pth", having(nan, "state_dict", "bn.running_mean"))
    told = []
    monkeypatch.setattr("normplug.openmmlab.weight_checks.print_log", lambda text, *_: told.append(text))
    load_from(file, tmp_path)
    assert "NaN in 1 buffers, the first 'bn.running_mean'" in told[0]


def test_half_precision_and_counters_are_no_mistake(good, tmp_path):
    def half(checkpoint):
        for key, value in checkpoint["state_dict"].items():
            checkpoint["state_dict"][key] = value.bfloat16() if value.is_floating_point() else value

    file = changed(good, tmp_path / "file.pth", half)
    for door in (evaluate, load_from, pretrained, by_hand):
        door(file, tmp_path)


def first_state(checkpoint):
    return checkpoint["optimizer"]["state"][0]


def set_momentum(value):
    def change(checkpoint):
        first_state(checkpoint)["momentum_buffer"] = value(first_state(checkpoint)["momentum_buffer"])

    return change


STATES = {
    "no meta": (without("meta"), r"it has no meta\['epoch'\], it has no meta\['iter'\]"),
    "meta is text": (having("epoch 2", "meta"), r"no meta\['epoch'\]"),
    "no epoch": (without("meta", "epoch"), r"no meta\['epoch'\]"),
    "epoch is text": (having("2", "meta", "epoch"), r"meta\['epoch'\] is '2'"),
    "negative": (having(-1, "meta", "iter"), r"meta\['iter'\] is -1"),
    "seed is text": (having("one", "meta", "seed"), r"meta\['seed'\] is 'one'"),
    "no message hub": (without("message_hub"), "no message_hub"),
    "hub is None": (having(None, "message_hub"), "no message_hub"),
    "hub of other things": (having([1], "message_hub", "log_scalars"), "no message_hub"),
    "no optimizer": (without("optimizer"), "no state of the optimizer.*load_from"),
    "optimizer is empty": (having({}, "optimizer"), "no state of the optimizer"),
    "optimizer of another model": (
        lambda checkpoint: checkpoint["optimizer"]["param_groups"][0]["params"].pop(),
        "nothing to go on from .*size of optimizer's group",
    ),
    "momentum of another shape": (set_momentum(lambda m: m[:1]), "optimizer's momentum_buffer.*has shape"),
    "momentum is NaN": (set_momentum(nan), "optimizer's momentum_buffer is not finite"),
    "no schedule": (without("param_schedulers"), "no param_schedulers"),
    "schedule is text": (having("cosine", "param_schedulers"), "no param_schedulers"),
    "random state is text": (having("state", "random_states"), "no states of random generators"),
    "random states are text": (having(["state"], "random_states"), "no states of random generators"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_is_none_to_go_on_from(good, tmp_path, kind):
    change, expected = STATES[kind]
    file = changed(good, tmp_path / "file.pth", change)
    with pytest.raises(CheckpointError, match=rf"file\.pth.*{expected}") as told:
        resume(file, tmp_path)
    assert "\n" not in str(told.value)
    load_from(file, tmp_path)  # its weights are good


def test_a_whole_model_is_refused_by_its_names(tmp_path):
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"refused, and nothing in it was executed.*torch.nn.modules.conv.Conv2d"):
        by_hand(tmp_path / "file.pth", tmp_path)


class Resized:
    def __reduce__(self):
        storage = torch.zeros(4).untyped_storage()
        return torch._utils._rebuild_tensor_v2, (
            torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),
            0,
            (10**6,),
            (1,),
            False,
            {},
        )


@pytest.mark.filterwarnings("ignore:.*TypedStorage")
def test_a_tensor_beyond_its_storage(tmp_path):
    torch.save({"state_dict": {"conv.weight": Resized()}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"file.pth is not a whole checkpoint"):
        by_hand(tmp_path / "file.pth", tmp_path)


def test_depth_is_no_way_out(tmp_path):
    (tmp_path / "deeper.pth").write_bytes(b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b".")
    with pytest.raises(CheckpointError):
        by_hand(tmp_path / "deeper.pth", tmp_path)


def test_a_download_that_went_wrong_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "a.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(HTML)
    with pytest.raises(CheckpointError, match=r"a.pth is no checkpoint but an HTML page.*https://.*delete the file"):
        load_checkpoint(Toy(), "https://example.org/a.pth")


def test_paths_of_another_machine_are_no_weights():
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        check_kind(Path("nowhere.pth"))
