"""Several seeds of each model: Welch's interval, how often it errs, and the tool with further checkpoints."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from normplug import layers  # noqa: F401  lets the toolkits import

pytest.importorskip("mmaction.models")
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from normplug.openmmlab import digits
from normplug.openmmlab.comparison.bootstrap import Metric
from normplug.openmmlab.comparison.run import _check_seeds
from normplug.openmmlab.comparison.seeds import OverSeeds, over_seeds
from normplug.openmmlab.comparison.sides import Side

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import compare_checkpoints as tool  # noqa: E402  found through the line above

TOP1 = Metric("top-1")


def test_the_interval_is_welchs():
    by_hand = OverSeeds(TOP1, [1, 2, 3], [5, 6, 7])  # variances of 1: four degrees of freedom, whose t is in tables
    half = 2.776445 * np.sqrt(1 / 3 + 1 / 3)
    assert by_hand.interval == pytest.approx((4 - half, 4 + half), abs=1e-5)
    assert (by_hand.means, by_hand.deviations, by_hand.difference) == ((2, 6), (1, 1), 4)
    random = np.random.default_rng(0)
    for sizes in [(2, 2), (2, 5), (3, 7), (10, 4)]:
        a, b = (random.normal(i, 1 + 4 * i, n) for i, n in enumerate(sizes))
        of_a, of_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
        reach = stats.t.ppf(0.975, freedom) * np.sqrt(of_a + of_b)
        found, change = OverSeeds(TOP1, a.tolist(), b.tolist()), b.mean() - a.mean()
        assert found.interval == pytest.approx((change - reach, change + reach), rel=1e-12)
        assert found.interval == pytest.approx(stats.ttest_ind(b, a, equal_var=False).confidence_interval(), rel=1e-9)


@pytest.mark.parametrize(
    ("seeds", "scale", "called"),
    [((2, 2), 1, 0.023), ((3, 3), 3, 0.053), ((5, 5), 1, 0.05), ((5, 5), 3, 0.05), ((5, 2), 3, 0.106)],
)
def test_equal_models_are_called_different_about_as_often_as_said(seeds, scale, called):
    """5% but for very few seeds; of two seeds against five, where the two scatter more, it is twice that."""
    random, experiments = np.random.default_rng(0), 2000
    wrong = found = 0
    for _ in range(experiments):
        a, b = random.normal(40, 1, seeds[0]), random.normal(40, scale, seeds[1])
        wrong += "better" in OverSeeds(TOP1, a.tolist(), b.tolist()).verdict
        found += OverSeeds(TOP1, a.tolist(), (b + 100).tolist()).verdict == "B is better"
    assert wrong / experiments == pytest.approx(called, abs=3 * np.sqrt(called * (1 - called) / experiments))
    assert found / experiments > 0.95


def test_verdicts():
    def verdict(a, b):
        return OverSeeds(TOP1, a, b).verdict

    assert verdict([1, 2, 3], [5, 6, 7]) == "B is better"
    assert verdict([5, 6, 7], [1, 2, 3]) == "A is better"
    assert verdict([1, 2, 3], [2, 3, 4]) == "inside the noise"
    assert verdict([1.0], [2, 3, 4]) == verdict([1, 2, 3], [9.0]) == "too few seeds"
    assert verdict([0.5, 0.5], [0.75, 0.75]) == "no spread"  # of four clips: chance enough
    assert verdict([0.5, 0.5], [0.75, 1.0]) == "inside the noise"
    assert verdict([np.nan] * 2, [np.nan] * 3) == "not defined"
    other = Metric("top-5")
    found = over_seeds([{TOP1: 1, other: 2}, {TOP1: 3, other: 4}], [{other: 5, TOP1: 6}])
    assert found == [OverSeeds(TOP1, [1, 3], [6]), OverSeeds(other, [2, 4], [5])]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """The first four arguments, two more checkpoints of B, and the other arguments."""
    folder = tmp_path_factory.mktemp("seeds")
    digits.make("video", folder, num_train=2, num_val=16)
    arguments = []
    for norm, seeds in (("bn", 1), ("gn", 3)):
        config = ROOT / f"configs/digits/i3d_r18_{norm}_digits.py"
        cfg = Config.fromfile(config)
        arguments.append(str(config))
        for seed in range(seeds):
            torch.manual_seed(seed)
            with DefaultScope.overwrite_default_scope(cfg.default_scope):
                model = MODELS.build(cfg.model)
            model.init_weights()
            model.cls_head.fc_cls.reset_parameters()  # else all begin near zero
            arguments.append(str(folder / f"{norm}{seed}.pth"))
            torch.save(dict(state_dict=model.state_dict()), arguments[-1])
    data = dict(data_root=folder, num_train=2, num_val=16)
    others = ["--device", "cpu", "--resamples", "5", "--batch-sizes", "--cache", str(folder / "cache")]
    others += ["--cfg-options", *(f"test_dataloader.dataset.{key}={value}" for key, value in data.items())]
    return arguments[:4], arguments[4:], others


@pytest.mark.slow
def test_the_tool_over_seeds(video, tmp_path, capsys, monkeypatch):
    pair, more, others = video

    def run(first, *flags):
        assert tool.main([*first, "--out", str(tmp_path), *flags, *others]) == 0
        numbers = json.loads((tmp_path / "report.json").read_text())
        overall = {m["name"]: m for m in numbers["metrics"] if not m["category"]}
        return numbers, overall, (tmp_path / "report.md").read_text(), capsys.readouterr().out

    plain, overall, text, printed = run(pair)
    assert plain["seeds"] == []
    assert "Over seeds" not in text + printed
    with_seeds, _, text, printed = run(pair, "--more-b", *more)
    assert with_seeds["metrics"] == plain["metrics"]
    assert with_seeds["more_checkpoints"] == {"A": [], "B": more}
    assert "Over seeds (1 of A and 3 of B):" in printed
    assert "too few seeds" in printed
    assert "## Over seeds" in text
    assert f"- **B3**: `{more[1]}`" in text

    # each seed has the numbers that it has as the one checkpoint of a pair
    monkeypatch.setattr("normplug.openmmlab.comparison.run.predict", pytest.fail)  # the cache has all
    alone = [overall, *(run([*pair[:3], checkpoint])[1] for checkpoint in more)]
    assert len({seed["top-5"]["b"] for seed in alone}) > 1
    assert {s["name"]: s["b"] for s in with_seeds["seeds"]} == {
        name: [seed[name]["b"] for seed in alone] for name in overall
    }
    assert [s["a"] for s in with_seeds["seeds"]] == [[m["a"]] for m in overall.values()]
    again, *_ = run(pair, "--more-b", *more)
    assert again["seeds"] == with_seeds["seeds"]


@pytest.mark.slow
def test_further_checkpoints_that_are_refused(video, tmp_path, capsys, monkeypatch):
    pair, more, others = video
    monkeypatch.setattr("normplug.openmmlab.comparison.run.predict", pytest.fail)  # it is said before that
    saved = torch.load(more[0])
    again, small, nothing = (str(tmp_path / f"{name}.pth") for name in ("again", "small", "nothing"))
    torch.save(saved | {"meta": {"epoch": 3}}, again)
    torch.save({"state_dict": saved["state_dict"] | {"cls_head.fc_cls.weight": torch.zeros(3, 64)}}, small)
    torch.save([1, 2], nothing)
    for flags, message in [
        (["--more-b", more[0], more[0]], f"{more[0]} of B holds the same weights as {more[0]} of B"),
        (["--more-b", more[0], again], f"{again} of B holds the same weights as {more[0]} of B"),
        (["--more-b", pair[3]], f"{pair[3]} of B holds the same weights"),
        (["--more-b", more[0], "--more-a", pair[1]], f"{pair[1]} of A holds the same weights"),
        (["--more-a", more[0]], f"{more[0]} does not fit {pair[0]}. The checkpoint's norms are not the model's"),
        (["--more-b", more[0], small], f"{small} does not fit {pair[2]}. "),
        (["--more-b", nothing], f"{nothing} holds a list of 2 in place of weights"),
        (["--more-b", "none.pth"], "There is no checkpoint none.pth"),
    ]:
        assert tool.main([*pair, *flags, *others]) == 2
        *_, last = capsys.readouterr().err.strip().splitlines()
        assert last.startswith(f"compare_checkpoints.py: {message}")


def test_one_file_on_both_sides_is_refused_and_equal_weights_are_not(video, tmp_path):
    _, _, config, checkpoint = video[0]
    a, b = (Side(letter, Path(config), Path(checkpoint), {}) for letter in "AB")
    resaved = tmp_path / "resaved.pth"
    torch.save(torch.load(checkpoint) | {"meta": {}}, resaved)
    with DefaultScope.overwrite_default_scope("mmaction"):
        models = [a.build(), b.build()]
        with pytest.raises(ValueError, match=r"of B holds the same weights as .* of A"):
            _check_seeds([a, b], models, [{"checkpoint": "same"}] * 2)
        _check_seeds([a, Side("B", b.config, resaved, {})], models, [{"checkpoint": "one"}, {"checkpoint": "other"}])
