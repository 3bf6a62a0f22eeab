"""The toolkits' gaps: there without normplug, closed with it, and left alone where there are none."""

import importlib
import importlib.util
import logging
import os
import pkgutil
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from mmengine.dist import utils as dist_utils
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import DefaultScope

import normplug  # noqa: F401
from normplug.openmmlab import _stand_ins, close_gaps, mmcv_ops

HAS_MMCV = importlib.util.find_spec("mmcv") is not None
HAS_MMACTION = importlib.util.find_spec("mmaction") is not None
needs_lite = pytest.mark.skipif(
    not HAS_MMCV or type(importlib.util.find_spec("mmcv._ext").loader) is not _stand_ins._StandInLoader,
    reason="needs mmcv-lite: no mmcv here, or the full one, whose compiled ops are used",
)


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the gaps


@needs_lite
@pytest.mark.slow
def test_without_normplug_the_toolkits_do_not_import():
    printed = python(
        "import importlib\n"
        "for name in ('mmcv.ops', 'mmaction.models.localizers'):\n"
        "    try: importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error: print(error)\n"
    )
    assert "No module named 'mmcv._ext'" in printed
    if HAS_MMACTION:
        assert "No module named 'mmaction.models.localizers.drn'" in printed


@pytest.mark.slow
def test_normplug_needs_no_toolkit_and_closes_gaps_once():
    # None in sys.modules: as if it were not installed
    printed = python(
        "import sys\n"
        "for name in ('mmcv', 'mmdet', 'mmaction', 'torchvision'): sys.modules[name] = None\n"
        "import logging; logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(message)s')\n"
        "import normplug\n"
        "from normplug.openmmlab import close_gaps\n"
        "finders, stock = list(sys.meta_path), __import__('mmengine').logging.MessageHub.state_dict\n"
        "close_gaps()\n"
        "assert sys.meta_path == finders and type(finders[-1]).__module__ == 'normplug.openmmlab._stand_ins'\n"
        "assert __import__('mmengine').logging.MessageHub.state_dict is stock\n"
    )
    assert printed.count("normplug:") == 1  # of the checkpoints; the others speak when they have something to do
    assert "safe unpickler" in printed


# ---- the stand-ins


@needs_lite
def test_mmcv_ops_import_on_mmcv_lite():
    ext = importlib.import_module("mmcv._ext")
    assert importlib.util.find_spec("mmcv._ext").origin == "normplug.openmmlab"
    assert pkgutil.find_loader("mmcv._ext") is not None  # mmengine's and mmcv's way to ask for it
    assert ext.__spec__.name == "mmcv._ext"
    from mmcv.ops import get_compiler_version
    from mmcv.utils.ext_loader import check_ops_exist, load_ext

    assert check_ops_exist()
    assert load_ext("_ext", ["nms", "knn_forward"]).nms is mmcv_ops.OPS["nms"]
    assert "normplug" in get_compiler_version()
    with pytest.raises(NotImplementedError, match="knn_forward"):
        ext.knn_forward()


@pytest.mark.skipif(not HAS_MMACTION, reason="needs mmaction2")
@pytest.mark.filterwarnings("ignore::ImportWarning", "ignore::SyntaxWarning")  # mmcv's and mmaction2's own
def test_mmaction_models_import_and_drn_says_what_is_missing():
    models = importlib.import_module("mmaction.models")
    registry = importlib.import_module("mmaction.registry").MODELS
    assert registry.get("Recognizer3D") is models.Recognizer3D
    if models.localizers.DRN.__module__ != "normplug.openmmlab.drn":
        pytest.skip("this mmaction2 has its drn")
    with DefaultScope.overwrite_default_scope("mmaction"):
        for build in (models.localizers.DRN, lambda: registry.build(dict(type="DRN", vocab_size=3))):
            with pytest.raises(NotImplementedError, match="pip install -e mmaction2"):
                build()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package ``toolkit``, for which the finder has a stand-in ``toolkit.part``."""
    (tmp_path / "toolkit").mkdir()
    (tmp_path / "toolkit" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(_stand_ins._FILL, "toolkit.part", lambda module: setattr(module, "who", "stand-in"))
    yield tmp_path / "toolkit"
    for name in ("toolkit", "toolkit.part"):
        sys.modules.pop(name, None)


def test_a_stand_in_fills_a_gap(package):
    assert importlib.import_module("toolkit.part").who == "stand-in"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("toolkit.other")


def test_the_real_module_wins(package):
    (package / "part.py").write_text("who = 'real'")
    assert importlib.import_module("toolkit.part").who == "real"


def test_a_real_package_without_init_wins(package):
    # as mmaction2's drn in a checkout: setuptools leaves it out of wheels for the same reason
    (package / "part").mkdir()
    assert not hasattr(importlib.import_module("toolkit.part"), "who")


def test_closing_again_changes_nothing():
    def state():
        patched = MessageHub.state_dict, dist_utils._init_dist_pytorch, MMDistributedDataParallel.__init__
        return list(sys.meta_path), patched, torch.serialization.get_safe_globals()

    before = state()
    close_gaps()
    assert state() == before


def test_lines_go_to_the_running_log(monkeypatch, caplog):
    monkeypatch.setattr(MMLogger, "_instance_dict", OrderedDict())
    with caplog.at_level(logging.INFO, "normplug"):
        _stand_ins.tell("early")
    assert caplog.messages == ["early"]
    assert not MMLogger._instance_dict  # speaking starts no log
    seen = []
    monkeypatch.setattr(MMLogger.get_instance("a run"), "info", seen.append)
    _stand_ins.tell("later")
    assert seen == ["later"]


# ---- the models that need the ops

DETECTORS = {
    "cascade-mask-rcnn": "_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "retinanet": "_base_/models/retinanet_r50_fpn.py",
    "fcos": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "mask-rcnn, DCNv2, RoIPool, soft-NMS": "_base_/models/mask-rcnn_r50_fpn.py",
}


def thin(config):
    """The config with 32 channels wherever it says 256 or 1024."""
    if isinstance(config, dict):
        return type(config)({key: thin(value) for key, value in config.items()})
    if isinstance(config, list):
        return [thin(value) for value in config]
    return 32 if type(config) is int and config in (256, 1024) else config


def small(name):
    """mmdet's model config, thin, with few proposals, and scores from 0 up, so that NMS has work."""
    from mmengine.config import Config

    mmdet = importlib.import_module("mmdet")
    folder = os.path.join(os.path.dirname(mmdet.__file__), ".mim/configs")
    model = thin(Config.fromfile(os.path.join(folder, DETECTORS[name])).model)
    model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    model.neck.update(in_channels=[8, 16, 32, 64])
    if "roi_head" in model:
        model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
        model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
        stages = model.train_cfg.rcnn if isinstance(model.train_cfg.rcnn, list) else [model.train_cfg.rcnn]
        for stage in stages:
            stage.sampler.num = 16
        model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=20)
    if "DCNv2" in name:  # mmdet takes it in bottleneck blocks only
        model.backbone.update(depth=50, base_channels=4)
        model.neck.update(in_channels=[16, 32, 64, 128])
        model.backbone.update(dcn=dict(type="DCNv2", deform_groups=2), stage_with_dcn=(False, False, True, True))
        model.roi_head.bbox_roi_extractor.roi_layer = dict(type="RoIPool", output_size=7)
        model.test_cfg.rcnn.nms = dict(type="soft_nms", iou_threshold=0.5)
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.meshgrid", "ignore::ImportWarning")  # mmdet's and mmcv's own
@pytest.mark.parametrize(
    "name",
    # the compiled mmcv has no RoIPool for the CPU
    [pytest.param(name, marks=needs_lite if "RoIPool" in name else ()) for name in DETECTORS],
)
def test_detectors_train_and_predict(name):
    pytest.importorskip("mmdet.models")
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs

    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(small(name))
    inputs = demo_mm_inputs(2, [[3, 64, 64]] * 2, with_mask=True)
    data = model.data_preprocessor(inputs, training=True)
    loss, log = model.parse_losses(model(**data, mode="loss"))
    loss.backward()
    assert all(value.isfinite() for value in log.values())
    assert all(p.grad.isfinite().all() for p in model.backbone.parameters() if p.grad is not None)
    assert next(p for p in reversed(list(model.backbone.parameters())) if p.requires_grad).grad.any()
    with torch.no_grad():
        found = model.eval()(**data, mode="predict")
    assert all(len(sample.pred_instances) > 0 for sample in found)
