"""Weights: where each name points to, one sentence where there is no network, and the page of them."""

import re
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

import normplug  # noqa: F401  its loader replaces mmengine's
from normplug.openmmlab import pretrained
from normplug.openmmlab.pretrained import MissingWeightsError, checkpoints_in, fetch_weights, find_weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import train as train_tool  # noqa: E402
import weights_table  # noqa: E402

GN = "resnet50_gn-9186a21c.pth"
SCHEMES = {
    "torchvision://resnet50": "resnet50-0676ba61.pth",
    "modelzoo://resnet50": "resnet50-0676ba61.pth",
    "open-mmlab://detectron/resnet50_gn": GN,
    "openmmlab://detectron/resnet50_gn": GN,
    "open-mmlab://resnet50_caffe": "resnet50_caffe-788b5fa3.pth",  # renamed since, in mmengine's list of such
    "detectron-as-rgb://open-mmlab://detectron/resnet50_gn": GN,
    "mmcls://resnet50_v1d": "resnetv1d50_b32x8_imagenet_20210531-db14775a.pth",
    "https://example.com/a/b.pth?download=1": "b.pth",
}


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty cache, and a server of names that knows none."""

    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_says_which_file_to_put_where(name, hub):
    found = find_weights(name)
    assert found.file == hub / SCHEMES[name]
    told = f"The weights {re.escape(found.address)} are not on this machine and cannot be downloaded " + re.escape(
        f"(Name or service not known). Get the file where there is a network, and put it here: {found.file}"
    )
    with pytest.raises(MissingWeightsError, match=f"^{told}$"):
        fetch_weights(Config(dict(model=dict(backbone=dict(init_cfg=dict(type="Pretrained", checkpoint=name))))))
    with pytest.raises(MissingWeightsError, match=f"^{told}$"):  # in other tools
        CheckpointLoader.load_checkpoint(name)


def test_a_file_that_was_put_there_is_taken(hub):
    hub.mkdir(parents=True)
    torch.save(dict(state_dict={"a": torch.ones(1)}), hub / GN)
    fetch_weights(Config(dict(load_from="open-mmlab://detectron/resnet50_gn", model={})))
    loaded = CheckpointLoader.load_checkpoint("open-mmlab://detectron/resnet50_gn")
    assert loaded["state_dict"]["a"] == 1


def test_a_server_of_names_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(pretrained, "FIRST_ANSWER", 0.1)

    def late(*args, **kwargs):
        time.sleep(2)
        raise socket.gaierror(-3, "Temporary failure in name resolution")  # nobody listens any more

    monkeypatch.setattr(socket, "getaddrinfo", late)
    start = time.monotonic()
    with pytest.raises(MissingWeightsError, match=r"cannot be downloaded \(no answer within"):
        CheckpointLoader.load_checkpoint("torchvision://resnet50")
    assert time.monotonic() - start < 1.5


def test_names_that_nobody_knows_and_files_that_are_not_there_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"torchvision://resnet5 names no known weights. Near: .*resnet50"):
        find_weights("torchvision://resnet5")
    assert find_weights("s3://bucket/a.pth") is None
    with pytest.raises(MissingWeightsError, match=r"checkpoints/mine.pth are not there"):
        fetch_weights(Config(dict(model=dict(backbone=dict(pretrained="checkpoints/mine.pth")))))


def test_all_places_of_a_model_are_seen():
    model = dict(
        backbone=dict(init_cfg=[dict(type="Kaiming"), dict(type="Pretrained", checkpoint="a")]),
        head=[dict(pretrained="b")],
        neck=dict(pretrained=True, checkpoint="no"),
        teacher_ckpt="c",
    )
    assert list(checkpoints_in(model)) == ["a", "b", "c"]


def test_train_ends_with_that_sentence_before_the_model_is_built(tmp_path, capsys, monkeypatch):
    config = tmp_path / "c.py"
    config.write_text(
        f"_base_ = {str(ROOT / 'configs' / 'digits' / 'i3d_r18_gn_digits.py')!r}\n"
        "model = dict(_delete_=True, type='Never', init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'))\n"
    )
    assert train_tool.main([str(config), "--work-dir", str(tmp_path)]) == 2
    assert "resnet50-0676ba61.pth" in capsys.readouterr().err


def test_a_weight_of_unknown_origin_is_not_put_on_the_page(monkeypatch):
    assert weights_table.origin("open-mmlab://jhu/resnet50_gn_ws").endswith("GN+WS")
    with pytest.raises(ValueError, match=r"add it to ORIGINS"):
        weights_table.origin("https://example.com/a.pth")
