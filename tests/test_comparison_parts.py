"""Parts of a comparison's report that need no model: what is faster, what the configs differ in, how it was trained."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from mmengine.config import Config

from normplug.openmmlab.comparison.config_difference import config_difference
from normplug.openmmlab.comparison.cost import Latency, speed
from normplug.openmmlab.comparison.training import draw_trainings, find_training


def latency(calls):
    return Latency(1, *np.quantile(calls, [0.5, 0.25, 0.75]), len(calls), 0, list(calls))


def test_a_difference_that_the_spread_drowns_has_no_verdict():
    """On the truth being 1, the interval misses it in about 5 of 100 experiments, whatever the distribution."""
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(1000):
        busy = np.exp(rng.standard_cauchy(24).clip(-3, 3) * 0.2)  # a machine that does other things now and then
        a, b = (100 * busy * rng.lognormal(0, 0.05, 24) for _ in range(2))
        called += "faster" in speed(latency(a), latency(b)).verdict
    assert called / 1000 < 0.06

    a = rng.lognormal(0, 0.05, 30) * 100
    faster = speed(latency(a), latency(0.8 * a * rng.lognormal(0, 0.05, 30)))
    assert faster.verdict == "B is faster"
    assert faster.low < 0.8 < faster.high
    assert faster.ratio == pytest.approx(0.8, abs=0.03)
    assert speed(latency(a), latency(1.2 * a)).verdict == "A is faster"
    assert speed(latency(a), latency(a)).verdict == "inside the noise"


def test_configs_differ_setting_by_setting():
    a = Config(
        dict(
            model=dict(type="M", norm=dict(type="BN"), heads=[dict(n=1), dict(n=2)], act="relu"),
            optim_wrapper=dict(optimizer=dict(lr=0.02, _scope_="mmdet")),
            param_scheduler=[dict(end=500)],
            train_dataloader=dict(batch_size=2),
            work_dir="a",
            norm_cfg=dict(type="BN"),
        )
    )
    b = Config(
        dict(
            model=dict(type="M", norm=dict(type="GN", num_groups=32), heads=[dict(n=1), dict(n=3)], act="relu"),
            optim_wrapper=dict(optimizer=dict(lr=0.02)),
            param_scheduler=[dict(end=500), dict(by_epoch=True)],
            train_dataloader=dict(batch_size=2),
            work_dir="b",
        )
    )
    assert config_difference(a, b) == [
        ("model.norm.type", "`'BN'`", "`'GN'`"),
        ("model.norm.num_groups", "–", "`32`"),
        ("model.heads.1.n", "`2`", "`3`"),
        ("param_scheduler", "`[{'end': 500}]`", "`[{'end': 500}, {'by_epoch': True}]`"),
    ]
    assert config_difference(a, a) == []


def test_trainings_are_found_beside_their_checkpoints(tmp_path):
    logs = tmp_path / "20260101_000000" / "vis_data"
    logs.mkdir(parents=True)
    lines = [dict(loss=4.0 - 0.01 * i, step=i, time=0.1) for i in range(120)]
    lines += [{"coco/bbox_mAP": 0.1 * i, "coco/segm_mAP": 0.2, "step": i} for i in (1, 2)]
    (logs / "scalars.json").write_text("\n".join(map(json.dumps, lines)))
    found = find_training(tmp_path / "epoch_2.pth", "detection")
    assert found.evaluations[1][1]["coco/bbox_mAP"] == pytest.approx(0.2)
    assert find_training(tmp_path / "elsewhere" / "epoch_2.pth", "detection") is None

    figure = draw_trainings({"A": found, "B": found}, "detection", dict(A="C0", B="C1"), dict(A="o", B="s"))
    assert isinstance(figure, Figure)
    loss, box, _ = figure.axes
    smoothed = [line for line in loss.lines if line.get_label() in "AB"]
    assert [len(line.get_xdata()) for line in smoothed] == [60, 60]
    assert smoothed[0].get_linestyle() != smoothed[1].get_linestyle()
    assert smoothed[0].get_zorder() > smoothed[1].get_zorder()  # neither hides the other
    assert list(box.lines[0].get_ydata()) == pytest.approx([10, 20])
