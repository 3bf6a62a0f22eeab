"""tools/benchmark_train.py: which variants there are, what is in them, its tables, and a run. No number is tested."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cases import unpadded

import normplug  # noqa: F401  lets the toolkits import

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")
from test_bench import made_up_result

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import benchmark_train as train


def test_variants_are_those_that_exist():
    variants = train.plan(train.parse_args([]))
    assert len(set(variants)) == len(variants)
    stock = {(v.model, v.norm) for v in variants if v.implementation == "stock"}
    assert stock == {(m, n) for m in train.NORMS for n in ("frozen BN", "BN", "SyncBN", "GN")} | {
        ("mask_rcnn", "GN+WS")
    }
    ours = {(v.model, v.norm) for v in variants if v.implementation == "normplug"}
    again = {(v.model, v.norm) for v in variants if v.implementation == "recompute"}
    assert again == {(m, n) for m in train.NORMS for n in ("GN", "GN+WS", "EvoNormS0")}
    assert ours | stock == {(m, n) for m, norms in train.NORMS.items() for n in norms}
    assert {(v.precision, v.layout) for v in variants} == {
        (p, layout) for p in train.PRECISIONS for layout in train.LAYOUTS
    }
    few = train.parse_args(["--models", "i3d", "--norms", "GN", "--precisions", "fp32", "--layouts", "contiguous"])
    assert [str(v) for v in train.plan(few)] == [
        "i3d GN (normplug), fp32, contiguous",
        "i3d GN (stock), fp32, contiguous",
        "i3d GN (recompute), fp32, contiguous",
    ]


def test_variants_hold_the_norms_that_they_name():
    def types(cfg):
        for key, value in cfg.items():
            if key == "norm_cfg" and value:
                yield value["type"]
            elif isinstance(value, dict):
                yield from types(value)

    for model, norms in train.NORMS.items():
        for norm in norms:
            cfg = train.make_config(train.Variant(model, norm, "normplug", "fp32", "contiguous"), tiny=True)
            found = set(types(cfg.model))
            name = norm.removesuffix(" heads").removeprefix("frozen ").removesuffix("+WS")
            assert found - {"BN"} == ({name} - {"BN"}), (model, norm)
            everywhere = model == train.RCNN and name != "BN" and "heads" not in norm
            assert "BN" not in found or not everywhere, (model, norm)
            ws = {"mask_rcnn": "ConvWS", "i3d": "ConvWS3d"}[model]
            assert (ws in json.dumps(cfg.model.to_dict(), default=str)) == ("+WS" in norm)


@pytest.mark.slow
def test_a_run_has_a_process_per_variant(tmp_path, capsys):
    out = tmp_path / "train.json"
    argv = ["--device", "cpu", "--size", "tiny", "--warmup", "1", "--iterations", "1", "--models", "mask_rcnn"]
    argv += ["--norms", "GN", "--implementations", "stock", "--precisions", "bf16", "--layouts", "channels_last"]
    assert train.main([*argv, "--out", str(out)]) == 0
    text, (row,) = unpadded(capsys.readouterr().out), json.loads(out.read_text())["rows"]
    assert row["status"] == "ok", row["message"]
    assert row["seconds"] > 0
    assert row["peak_bytes"] > 2**27
    assert row["box_rois"] == 32
    assert 8 <= row["mask_rois"] <= 16  # the eight true boxes of each image, as far as a quarter of the RoIs goes
    assert "| mask_rcnn | GN | stock | bf16 | channels_last |" in text
    assert "Goals" not in text
    assert train.main(["--table", str(out)]) == 0
    assert unpadded(capsys.readouterr().out) == text
    assert train.main([*argv, "--seconds", "0"]) == 0
    assert "the time was up" in unpadded(capsys.readouterr().out)


# Not bf16 for I3D: on a CPU, torch 2.15's gradient of a 3-D convolution's weight is noise in bfloat16.
@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        train.Variant("i3d", "GN+WS", "normplug", "fp32", "channels_last"),
        train.Variant("i3d", "CBN", "normplug", "fp32", "contiguous"),
        train.Variant("mask_rcnn", "EvoNormS0", "recompute", "bf16", "channels_last"),
        train.Variant("mask_rcnn", "frozen BN", "stock", "fp32", "contiguous"),
    ],
    ids=str,
)
def test_variants_train(variant, monkeypatch):
    monkeypatch.setattr(train, "use_stock_layers", lambda: None)  # it is for a process that ends
    result = train.train(variant, torch.device("cpu"), tiny=True, warmup=1, iterations=2)
    assert result.status == "ok", result.message
    assert result.iterations == 2
    assert result.seconds_low <= result.seconds <= result.seconds_high
    assert (result.mask_rois is None) == (variant.model == "i3d")
    assert result.parameters > 20_000_000


def test_frozen_statistics_are_those_of_the_data():
    norm = torch.nn.BatchNorm2d(3, momentum=0.03).eval()
    model = torch.nn.Module()
    model.backbone = torch.nn.Sequential(norm)
    x = 5 + 2 * torch.randn(4, 3, 9, 9)
    train.settle_frozen_statistics(model, x)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    assert not norm.training
    assert norm.momentum == 0.03


def test_a_failed_variant_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.sys, "executable", "/bin/false")
    argv = ["--device", "cpu", "--size", "tiny", "--models", "i3d", "--norms", "GN", "--precisions", "fp32"]
    assert train.main([*argv, "--implementations", "normplug", "--layouts", "contiguous"]) == 1
    assert "| i3d | GN | normplug | fp32 | contiguous | failed | exit code 1 |" in unpadded(capsys.readouterr().out)


def test_training_goals_compare_with_the_same_format():
    def row(norm, implementation, precision, seconds, peak, status="ok"):
        found = train.Result("mask_rcnn", norm, implementation, precision, "contiguous", status)
        found.seconds = found.seconds_low = found.seconds_high = seconds
        found.peak_bytes, found.box_rois, found.mask_rois = peak * 2**30, 1024.0, 100.0
        return asdict(found)

    rows = [
        row("frozen BN", "stock", "bf16", 0.1, 10),
        row("GN", "normplug", "bf16", 0.104, 12),
        row("GN", "stock", "bf16", 0.2, 20),
        row("GN", "normplug", "fp32", 0.3, 12),  # its baseline was not run
        row("CBN", "normplug", "bf16", 0.15, 12, status="failed"),
    ]
    text = unpadded(train.markdown({"facts": made_up_result([])["facts"], "size": "full", "rows": rows}))
    assert "| GN | bf16 | contiguous | time | at most 1.05 | 1.040 | reached |" in text
    assert "| GN | bf16 | contiguous | memory | at most 1.1 | 1.200 | not reached |" in text
    assert text.count("reached |") == 2
    assert (
        "| mask_rcnn | GN | stock | bf16 | contiguous | 0.2000 (0.2000 to 0.2000) | 0 | 20.00 | 2.000 | 2.000 |" in text
    )
    assert "## Not measured" in text
