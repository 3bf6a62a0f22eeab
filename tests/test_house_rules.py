"""The package's own rules: who may import whom, and tables and docs that follow the code."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "normplug"
TOOLKITS = {"mmcv", "mmdet", "mmaction"}
# folder -> what it may import of the package, and which of the toolkits
MAY_IMPORT = {
    "kernels": ({"kernels"}, set()),
    "ops": ({"ops", "kernels"}, set()),
    "layers": ({"layers", "ops"}, set()),
    "openmmlab": ({"_version", "warming", "openmmlab", "layers", "ops", "bench", "reporting"}, {"mmengine", *TOOLKITS}),
    "bench": ({"", "bench", "kernels", "layers", "ops", "reporting"}, {"mmcv"}),
    "reporting.py": (set(), set()),
    "warming.py": ({"kernels", "layers", "ops"}, set()),
    "registry.py": ({"layers", "openmmlab"}, {"mmengine", "mmcv"}),
    "__init__.py": ({"layers", "openmmlab", "ops", "registry", "_version"}, set()),
    "__main__.py": ({"", "bench", "layers", "openmmlab", "registry", "reporting"}, set()),
    "_version.py": (set(), set()),
}


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    own, outside = MAY_IMPORT[file.relative_to(PACKAGE).parts[0]]
    for name in imports(file):
        top, *rest = name.split(".")
        if top == "normplug":
            assert (rest[0] if rest else "") in own, f"{file.name} imports {name}"
        elif top in TOOLKITS | {"mmengine"}:
            assert top in outside, f"{file.name} imports {name}"
        assert top != "triton" or "kernels" in file.parts, f"{file.name} imports triton"


def test_layers_do_not_import_each_other():
    for file in (PACKAGE / "layers").glob("*.py"):
        if file.name == "__init__.py":
            continue
        for name in imports(file):
            if name.startswith("normplug.layers."):
                assert name.split(".")[2].startswith("_"), f"{file.name} imports {name}"


@pytest.mark.slow
def test_import_needs_no_toolkit():
    """`import normplug` works with torch and mmengine alone, and does not load mmdet or mmaction2 when present."""
    code = """
import importlib.util, sys
absent = {'mmcv', 'mmdet', 'mmaction', 'triton', 'decord', 'sklearn', 'pycocotools'}
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split('.')[0] in absent else find(name, *a)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in absent:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
import torch, normplug
from normplug.registry import MODELS
assert MODELS.build(dict(type='GN', num_channels=64))(torch.zeros(1, 64, 2, 2)).shape == (1, 64, 2, 2)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_registered_names_are_the_contract():
    from mmcv.cnn import build_norm_layer
    from mmengine.registry import MODELS

    import normplug

    contract = {
        "GN": "GroupNorm",
        "BNAct": "BatchNormAct",
        "SyncBN": "SyncBatchNorm",
        "CBN": "CrossIterationBatchNorm",
        "EvoNormB0": "EvoNormB0",
        "EvoNormS0": "EvoNormS0",
        "FRN": "FilterResponseNorm",
        "FrozenBatchNorm": "FrozenBatchNorm",
        "ConvWS": "WSConv2d",
        "ConvWS1d": "WSConv1d",
        "ConvWS2d": "WSConv2d",
        "ConvWS3d": "WSConv3d",
    }
    for name, cls in contract.items():
        assert MODELS.get(name) is getattr(normplug.layers, cls)
    names = {name: build_norm_layer(dict(type=name), 64)[0] for name in contract if not name.startswith("ConvWS")}
    abbreviations = {"GN": "gn", "SyncBN": "bn", "CBN": "bn", "EvoNormB0": "bn", "EvoNormS0": "gn", "FRN": "frn"}
    assert names == abbreviations | {"BNAct": "bn", "FrozenBatchNorm": "bn"}
    assert MODELS.get("BN") is __import__("torch").nn.BatchNorm2d  # mmcv's own stay


@pytest.mark.filterwarnings("ignore::ImportWarning", "ignore::SyntaxWarning")  # mmcv's and mmaction2's own
@pytest.mark.parametrize("toolkit", ["mmdet", "mmaction"])
def test_no_toolkit_has_a_layer_of_our_name(toolkit):
    """In its own scope a toolkit's layer would be built instead of ours, without a word."""
    import normplug
    from normplug.registry import config_names

    pytest.importorskip(f"{toolkit}.models")
    own = importlib.import_module(f"{toolkit}.registry").MODELS.module_dict
    ours = {name for layer in normplug.layers.__all__ for name in config_names(getattr(normplug.layers, layer))}
    assert not ours & own.keys()


def test_register_all_twice_and_without_override():
    import normplug

    normplug.register_all()
    normplug.register_all(override=False)


def test_another_owner_of_a_name_is_heard():
    from mmengine.registry import MODELS
    from torch import nn

    import normplug

    ours = MODELS.module_dict["CBN"]
    MODELS.module_dict["CBN"] = nn.Identity
    try:
        with pytest.raises(KeyError, match=r"CBN.*Identity"):
            normplug.register_all()
    finally:
        MODELS.module_dict["CBN"] = ours


def test_readme_table_is_fresh():
    sys.path.insert(0, str(ROOT / "tools"))
    from layer_table import main

    assert main(["--check"]) == 0


def test_list_and_env(capsys):
    from normplug.__main__ import main

    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "GroupNorm" in text
    assert "1803.08494" in text
    assert main(["env"]) == 0
    assert "torch: " in capsys.readouterr().out
