"""Nothing that came in a checkpoint is run: every way from a file of weights to code, tried with a file that tells."""

import re
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.infer import BaseInferencer
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint
from test_checkpoints import Toy, runner

import normplug  # noqa: F401
from normplug.openmmlab.checkpoints import load
from normplug.openmmlab.inert import TextFromCheckpointError


def programs(folder):
    """Texts that leave a file behind when a config of that text is read, by what they use for it."""
    mark = str(folder / "ran")
    touch = f"__import__('pathlib').Path({mark!r}).touch()"
    (folder / "base.py").write_text(f"x = {touch}\n")
    (folder / "module_of_the_attacker.py").write_text(touch)
    return {
        "expression": f"x = {touch}",
        "statement": f"for _ in range(1):\n    {touch}",
        "base": f"_base_ = [{str(folder / 'base.py')!r}]",
        "variable": f"{touch}\nx = '{{{{fileDirname}}}}'",
        "custom imports": "custom_imports = dict(imports=['module_of_the_attacker'])",
        "lazy": f"from mmengine.hooks import EMAHook\nx = {touch}",
        "type": f"model = dict(type='os.mkdir', path={mark!r})",
    }


PROGRAMS = ("expression", "statement", "base", "variable", "custom imports", "lazy", "type")


@pytest.fixture
def attack(tmp_path, monkeypatch):
    """A checkpoint of a run in every text of which stands a program, and a look at whether it ran."""
    monkeypatch.syspath_prepend(tmp_path)
    made = runner(tmp_path / "run", 1, f"attacked {tmp_path}")
    made.train()
    file = tmp_path / "run" / "epoch_1.pth"

    def write(kind):
        text = programs(tmp_path)[kind]
        checkpoint = torch.load(file)
        checkpoint["meta"] |= dict(config=text, cfg=text, env_info=text, dataset_meta=dict(classes=text))
        checkpoint["message_hub"]["runtime_info"] |= dict(cfg=text, experiment_name=text)
        checkpoint["message_hub"]["resumed_keys"] |= dict(cfg=True, experiment_name=True)
        torch.save(checkpoint, tmp_path / "attack.pth")
        return tmp_path / "attack.pth"

    yield write
    sys.modules.pop("module_of_the_attacker", None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_programs_do_run_as_configs(tmp_path, monkeypatch, kind):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = Config.fromstring(programs(tmp_path)[kind], ".py")
    if kind == "type":
        MODELS.build(config.model)
    sys.modules.pop("module_of_the_attacker", None)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", PROGRAMS)
def test_resume(tmp_path, attack, kind):
    rest = runner(tmp_path / "rest", 2, f"resumed {tmp_path}", resume=True, load_from=str(attack(kind)))
    rest.train()
    assert rest.epoch == 2
    hub = torch.load(tmp_path / "rest" / "epoch_2.pth")["message_hub"]["runtime_info"]
    assert "ran" not in hub["cfg"]  # this run's own text, which a tool may well evaluate


@pytest.mark.parametrize("kind", PROGRAMS)
def test_load_from_and_pretrained(tmp_path, attack, kind):
    file = str(attack(kind))
    runner(tmp_path / "rest", 1, f"loaded {tmp_path}", load_from=file).train()
    model = Toy()
    model.init_cfg = dict(type="Pretrained", checkpoint=file)
    model.init_weights()
    load_checkpoint(Toy(), file)


class Inferencer(BaseInferencer):
    """What every toolkit's inferencer is: built from weights alone, it takes the config that they hold."""

    def preprocess(self, inputs): ...
    def visualize(self, inputs, preds): ...
    def postprocess(self, preds, visualization): ...
    def _init_pipeline(self, cfg): ...


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("where", ["meta", "message_hub"])
def test_inferencers(attack, kind, where):
    file = attack(kind)
    checkpoint = torch.load(file)
    if where == "meta":
        del checkpoint["message_hub"]
        torch.save(checkpoint, file)
    with pytest.raises(TextFromCheckpointError, match="nothing in it was executed"):
        Inferencer(weights=str(file), scope="mmengine")


@pytest.mark.parametrize("file_format", [".py", ".json", ".yaml"])
def test_whoever_reads_it(attack, file_format):
    checkpoint = load(attack("expression"))
    assert "config" not in checkpoint["meta"]
    for text in (checkpoint["meta"]["cfg"], checkpoint["message_hub"]["runtime_info"]["cfg"]):
        with pytest.raises(TextFromCheckpointError):
            Config.fromstring(text, file_format)


def test_text_of_the_user_is_read_as_ever():
    assert Config.fromstring("x = 1\n", ".py").x == 1


def test_only_text_is_refused_that_a_file_brought(tmp_path):
    torch.save({"meta": {"cfg": "y = 2\n"}}, tmp_path / "a.pth")
    assert Config.fromstring("y = 2\n", ".py").y == 2
    CheckpointLoader.load_checkpoint(str(tmp_path / "a.pth"))
    with pytest.raises(TextFromCheckpointError, match=re.escape("model='CONFIG.py'")):
        Config.fromstring("y = 2\n", ".py")


def test_older_files_keep_their_text(tmp_path):
    torch.save({"meta": {"config": "z = 3\n"}}, tmp_path / "a.pth")
    assert load(tmp_path / "a.pth")["meta"] == {"cfg": "z = 3\n"}
