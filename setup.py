"""What pyproject.toml cannot say: extras that leave an installed full mmcv alone, and the configs in the wheel.

mmcv and mmcv-lite are two packages that write into one folder, `mmcv/`, and pip does not know it: installing the
one over the other breaks both. So the extra `openmmlab` brings mmcv-lite only where there is no full mmcv.
"""

import shutil
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TOOLKITS = [
    "mmdet==3.3.0",
    "mmaction2==1.2.0",
    "decord",
    "importlib_metadata",  # mmaction2 imports it and does not say so
    "matplotlib",
    "scikit-learn",
    "tensorboard",
]
MMSEG = ["mmsegmentation==1.2.2", "ftfy", "regex"]  # it imports the last two and does not say so
MMPRETRAIN = ["mmpretrain==1.2.0"]
TEST = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis"]
TEST += ["timm"]  # a second oracle of its layers and checkpoints
TEST += ["onnx", "onnxruntime", "onnxscript", "fvcore"]  # what runs or counts what is exported
TEST += ["expecttest"]  # for torch's own samples of its modules
TEST += [*MMSEG, *MMPRETRAIN]
# Tools for a training and its result; the others are for this repository.
TOOLS = [
    "train.py",
    "test.py",
    "_dist.sh",
    "_launch.py",
    "dist_train.sh",
    "dist_test.sh",
    "slurm_train.sh",
    "quickstart.py",
]
TOOLS += ["make_digits.py", "small_batch_study.py", "compare_checkpoints.py", "convert_checkpoint.py"]
# With build isolation sys.path does not show the environment that is installed into; its folder is known all the same.
site = sysconfig.get_path("purelib")
has_full_mmcv = any((d.metadata["Name"] or "").lower() == "mmcv" for d in distributions(path=[site]))


class WithConfigs(build_py):
    """Puts configs, tools and their index into a wheel where OpenMIM looks for them: normplug/.mim."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        root, target = Path(__file__).resolve().parent, Path(self.build_lib, "normplug", ".mim")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        configs = (f.relative_to(root) for ending in ("py", "yml") for f in root.glob(f"configs/**/*.{ending}"))
        for file in [*configs, *(Path("tools", name) for name in TOOLS), Path("model-index.yml")]:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, target / file)


setup(
    cmdclass={"build_py": WithConfigs},
    extras_require={
        "openmmlab": TOOLKITS if has_full_mmcv else ["mmcv-lite==2.1.0", *TOOLKITS],
        "toolkits": TOOLKITS,  # for installers that build elsewhere (uv): never brings an mmcv
        "mmseg": MMSEG,
        "mmpretrain": MMPRETRAIN,
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy", "pre-commit"],
    },
)
