"""The table of layers in docs/compatibility.md: that it is fresh, and that a trial that fails is seen to fail."""

import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

from normplug import layers
from normplug.layers import BatchNormAct, GroupNorm
from normplug.registry import MODELS, config_names

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import compatibility
from compatibility import COLUMNS, ROWS, attempt, cell

# What the tool does not show: torch.jit and others say that they are on their way out
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::torch.jit.TracerWarning")
GN, BN = ROWS[0], ROWS[2]


@pytest.mark.slow
@pytest.mark.skipif(f"torch {compatibility.TORCH} by" not in compatibility.PAGE.read_text(), reason="of another torch")
def test_the_table_is_fresh():
    assert compatibility.main(["--check"]) == 0


def test_every_layer_has_a_row():
    tried = {row.cfg["type"] for row in ROWS}
    for name in layers.__all__:
        assert tried & set(config_names(getattr(layers, name))), f"{name} has no row in tools/compatibility.py"
    for row in ROWS:
        assert row.name.split(",")[0] == row.cfg["type"]
        assert isinstance(row.make(stock=False, training=True)[1], MODELS.get(row.cfg["type"]))


def test_every_cell_of_the_page_is_explained():
    text = compatibility.PAGE.read_text().split(compatibility.BEGIN)[1].split(compatibility.END)[0]
    assert "Not explained" not in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip(" `") for line in table[1:]] == [row.name for row in ROWS]


# --- broken on purpose


def broken(monkeypatch, cls, breaks):
    """Have a layer compute something else where that is wanted."""
    forward = cls._forward

    def wrong(self, x, residual, act):
        return breaks(self, forward(self, x, residual, act))

    monkeypatch.setattr(cls, "_forward", wrong)


@pytest.mark.parametrize("name", ["eager", "AMP", "double backward", "forward mode", "vmap"])
def test_a_layer_that_computes_something_else(name, monkeypatch):
    assert attempt(GN, COLUMNS[name], "train") == "yes"
    broken(monkeypatch, GroupNorm, lambda layer, y: 1.1 * y)
    said = attempt(GN, COLUMNS[name], "train")
    assert said.startswith("WrongNumbersError: ")
    assert cell({"eval": ["yes"], "train": [said, "yes"]}, {}) == "wrong numbers (1)"


@pytest.mark.parametrize("name", ["jit.trace", "fx", "checkpointing", "export", "FSDP"])
def test_a_layer_that_is_not_what_was_made_of_it(name, monkeypatch):
    """What it does depends on how it is called, as where a tool takes another path through it."""
    calls = count(1)
    broken(monkeypatch, GroupNorm, lambda layer, y: y * next(calls))
    assert "off by" in attempt(GN, COLUMNS[name], "eval")


@pytest.mark.parametrize("name", ["eager", "AMP", "vmap", "jit.trace", "fx", "checkpointing"])
def test_running_statistics_are_looked_at(name, monkeypatch):
    calls = count(1)

    def spoil(layer, y):
        layer.num_batches_tracked.add_(next(calls))
        return y

    broken(monkeypatch, BatchNormAct, spoil)
    assert "1.num_batches_tracked is off by" in attempt(BN, COLUMNS[name], "train")


def test_nan_is_near_nothing(monkeypatch):
    broken(monkeypatch, GroupNorm, lambda layer, y: y * torch.nan)
    assert "off by nan" in attempt(GN, COLUMNS["eager"], "eval")


def test_a_mistake_of_the_table_itself_is_no_result():
    row = compatibility.Row("GN", dict(type="GN", no_such=1), lambda: [nn.GroupNorm(2, compatibility.C)])
    with pytest.raises(TypeError, match="no_such"):
        attempt(row, COLUMNS["eager"], "eval")


def test_what_the_table_says():
    numbers = {}
    known = compatibility.REASONS[0]
    said = f"AssertionError: {known.pattern} for this"
    assert cell({"eval": ["yes"], "train": ["yes"]}, numbers) == "yes"
    assert cell({"eval": [said, "yes"], "train": [said, "yes"]}, numbers) == f"{known.word} (1)"
    assert cell({"eval": [said, said], "train": [said, said]}, numbers) == "as stock (1)"
    assert cell({"eval": ["yes"], "train": [said, "yes"]}, numbers) == "eval only (1)"
    assert cell({"eval": ["yes"], "train": ["KeyError: 'a'", "KeyError: 'a'"]}, numbers) == "fails (2)"
    assert [*numbers] == [known.sentence, "Not explained: KeyError: 'a'"]


def test_a_stale_table_is_told(tmp_path, monkeypatch, capsys):
    results = {name: {row.name: {mode: ["yes"] for mode in c.modes} for row in ROWS} for name, c in COLUMNS.items()}
    monkeypatch.setattr(compatibility, "ROOT", tmp_path)
    monkeypatch.setattr(compatibility, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(compatibility, "try_all", lambda: results)
    page = f"# Title\n\n{compatibility.BEGIN}\nold\n{compatibility.END}\n\n## Models\n\nmodels\n"
    compatibility.PAGE.write_text(page)
    assert compatibility.main(["--check"]) == 1
    assert compatibility.PAGE.read_text() == page
    assert "run python tools/compatibility.py" in capsys.readouterr().err
    assert compatibility.main([]) == 0
    assert compatibility.PAGE.read_text().endswith(f"{compatibility.END}\n\n## Models\n\nmodels\n")
    assert compatibility.main(["--check"]) == 0
    results["fx"]["FRN"]["train"] = ["TypeError: x", "yes"]
    assert compatibility.main(["--check"]) == 1
