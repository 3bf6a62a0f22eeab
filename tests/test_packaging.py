"""What is in the packages that people install."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config

ROOT = Path(__file__).resolve().parent.parent
IN_WHEEL = "normplug/.mim"


def files(root, pattern="*"):
    return {str(f.relative_to(root)) for f in root.rglob(pattern) if f.is_file() and "__pycache__" not in f.parts}


@pytest.mark.slow
def test_wheel_has_the_code_the_configs_and_the_tools(packages):
    source, installed = packages
    assert files(installed / "normplug", "*.py") >= files(ROOT / "normplug", "*.py")
    configs = files(ROOT / "configs", "*.py") | files(ROOT / "configs", "*.yml")
    assert files(source / "configs") == files(installed / IN_WHEEL / "configs") == configs
    assert files(source / "tools") == files(ROOT / "tools", "*.py") | files(ROOT / "tools", "*.sh")
    tools = files(installed / IN_WHEEL / "tools")
    assert {"train.py", "test.py", "dist_train.sh", "_dist.sh"} <= tools <= files(source / "tools")
    assert {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")} == {"normplug"}


@pytest.mark.slow
def test_mim_finds_every_config_through_the_index(packages):
    root = packages[1] / IN_WHEEL
    for metafile in yaml.safe_load((root / "model-index.yml").read_text())["Import"]:
        for model in yaml.safe_load((root / metafile).read_text())["Models"]:
            assert (root / model["Config"]).is_file()
    for tool in ("quickstart.py", "convert_checkpoint.py", "compare_checkpoints.py"):
        done = subprocess.run([sys.executable, root / "tools" / tool, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    cfg = Config.fromfile(root / "configs/digits/mask-rcnn_r18_fpn_gn_digits.py")
    assert cfg.model.backbone.norm_cfg.type == "GN"
