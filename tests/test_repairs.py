"""What NumPy, SciPy and Python have changed: the toolkits' code that relies on it runs, and gives what it gave."""

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from test_bridge import python

from normplug.openmmlab import repairs

TOOLKITS = ("mmengine", "mmcv", "mmdet", "mmaction", "mmseg", "mmpretrain")
pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in TOOLKITS), reason="needs the four toolkits"
    ),
    pytest.mark.filterwarnings("ignore::ImportWarning", "ignore::SyntaxWarning"),  # their own
]


def toolkit(name: str):
    return importlib.import_module(name)


# ---- every name of numpy, in every module


def names_in(text: str) -> set[str]:
    """The names of numpy that code uses, docstrings aside."""
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "np"}


def test_every_name_of_numpy_that_is_gone_is_given_back():
    missing = set()
    for name in TOOLKITS:
        package = Path(importlib.util.find_spec(name).origin).parent
        for file in package.rglob("*.py"):
            text = file.read_text()
            gone = {used for used in re.findall(r"\bnp\.([A-Za-z_]\w*)", text) if not hasattr(np, used)}
            if gone and ".mim" not in file.parts:  # those are scripts of theirs
                module = ".".join(file.relative_to(package.parent).with_suffix("").parts)
                missing |= {(module, used) for used in gone & names_in(text)}
    missing -= {
        ("mmcv.ops.pixel_group", "float"),  # of a branch for parrots, which is no torch
        ("mmdet.evaluation.metrics.flickr30k_metric", "boxes"),  # no numpy ever had it: theirs is meant, np_boxes
    }
    assert len(missing) >= 5
    for module, used in missing:
        assert repairs._REPAIRS[module] is repairs._old_numpy, module
        assert hasattr(toolkit(module).np, used), (module, used)


def test_numpy_and_scipy_stay_as_they_are():
    import scipy.interpolate

    toolkit("mmaction.datasets.transforms.pose_transforms")
    toolkit("mmpretrain.models.utils.embed")
    assert not hasattr(np, "Inf")
    assert not hasattr(np, "float")
    with pytest.raises(NotImplementedError):
        scipy.interpolate.interp2d([0], [0], [0])


# ---- mmaction2


def test_poses_are_made_compact():
    transforms = toolkit("mmaction.datasets.transforms")
    keypoints = np.zeros((1, 3, 4, 2), np.float32)
    keypoints[0, :, 1:] = [[20, 30], [60, 40], [50, 90]]
    done = transforms.PoseCompact(padding=0.25, threshold=10)(dict(img_shape=(120, 100), keypoint=keypoints.copy()))
    # x from 20 to 60, y from 30 to 90, a quarter more around the middle; whole numbers are cut
    left, right, top, bottom = (40 - 25), (40 + 25), int(60 - 37.5), int(60 + 37.5)
    assert done["img_shape"] == (bottom - top, right - left)
    np.testing.assert_array_equal(done["keypoint"][0, 0], [[0, 0], [5, 8], [45, 18], [35, 68]])
    box = transforms.MMCompact(padding=0.25, hw_ratio=None)._get_box(keypoints, (120, 100))
    assert box == (left, top, right, bottom)


def test_area_under_recall():
    functional = toolkit("mmaction.evaluation.functional")
    truth = {"v": np.array([[0.0, 10.0], [20.0, 30.0]])}
    proposals = {"v": np.array([[0.0, 10.0, 0.9], [20.0, 28.0, 0.8], [50.0, 60.0, 0.7], [70.0, 80.0, 0.6]])}
    _, recall, per_video, area = functional.average_recall_at_avg_proposals(truth, proposals, 4)
    wanted = ((recall[1:] + recall[:-1]) / 2 * np.diff(per_video)).sum()
    assert area == pytest.approx(100 * wanted / per_video[-1])
    assert 0 < area < 100


def test_average_precision_of_nothing_is_nan():
    metrics = toolkit("mmaction.evaluation.functional.ava_evaluation.metrics")
    assert np.isnan(metrics.compute_average_precision(None, None))


@pytest.mark.parametrize(
    "module", ["mmaction.evaluation.metrics.multimodal_metric", "mmpretrain.evaluation.metrics.retrieval"]
)
def test_recall_of_retrieval(module):
    scores = torch.tensor([[0.1, 0.7, 0.2, 0.0], [0.6, 0.1, 0.3, 0.0], [0.4, 0.3, 0.2, 0.1]])
    first, two = toolkit(module).RetrievalRecall.calculate(scores, [[1], [2, 3], [3]], (1, 2), target_indices=True)
    assert (first.item(), two.item()) == (pytest.approx(100 / 3), pytest.approx(200 / 3))


def test_average_precision_of_retrieval():
    retrieval = toolkit("mmpretrain.evaluation.metrics.retrieval")
    scores = torch.tensor([[0.1, 0.7, 0.2, 0.0]])  # ranks 1, 2, 0, 3; right are the first and the third
    found = retrieval.RetrievalAveragePrecision.calculate(scores, [[1, 0]], 4, target_indices=True)
    assert found.item() == pytest.approx(100 * (1 + 2 / 3) / 2)


def tube(*frames: int) -> np.ndarray:
    return np.array([[frame, 10, 10, 20, 20] for frame in frames], dtype=np.float32)


def test_tubes_of_multisports():
    utils = toolkit("mmaction.evaluation.functional.multisports_utils")
    assert utils.iou3dt_voc(tube(1, 2, 3, 4), tube(2, 3, 4, 5, 6)) == pytest.approx((4 - 2) / (6 - 1))
    assert utils.nms_tubelets(np.array([[0, 0, 9, 9, 0.5], [0, 0, 9, 9, 0.9]])).shape == (2, 5)


def test_multisports_metric(tmp_path):
    annotations = dict(
        labels=["jump"], test_videos=[["v"]], nframes={"v": 20}, resolution={"v": (100, 100)}, gttubes={"v": {0: []}}
    )
    annotations["gttubes"]["v"][0] = [tube(*range(1, 21))]
    import pickle

    (tmp_path / "truth.pkl").write_bytes(pickle.dumps(annotations))
    metric = toolkit("mmaction.evaluation.metrics").MultiSportsMetric(str(tmp_path / "truth.pkl"), verbose=False)
    for frame in range(1, 21):
        found = dict(bboxes=torch.tensor([[0.1, 0.1, 0.2, 0.2]]), scores=torch.tensor([[0.9]]))
        metric.process(None, [dict(video_id="v.mp4", timestamp=frame, pred_instances=found)])
    values = metric.compute_metrics(metric.results)
    assert set(values.values()) == {100.0}


def test_frames_of_a_video_by_their_short_side(tmp_path):
    frame_extract = toolkit("mmaction.utils").frame_extract
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for _ in range(2):
        writer.write(np.full((48, 64, 3), 128, np.uint8))
    writer.release()
    _, frames = frame_extract(str(tmp_path / "v.avi"), short_side=24, out_dir=str(tmp_path))
    assert [frame.shape for frame in frames] == [(24, 32, 3)] * 2


# ---- colours


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("factor", [-0.5, -0.1, -0.003, 0.0, 0.1, 0.5])
def test_hue_of_mmcv(factor):
    import mmcv

    hsv = cv2.cvtColor(picture(), cv2.COLOR_BGR2HSV_FULL)
    hsv[..., 0] = (hsv[..., 0].astype(int) + int(factor * 255)) % 256
    wanted = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR_FULL)
    np.testing.assert_array_equal(mmcv.adjust_hue(picture(), factor), wanted)
    assert mmcv.adjust_hue(picture().astype(np.float32), factor).dtype == np.float32


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
def test_hue_of_mmcv_by_pillow():
    import mmcv

    turned = mmcv.adjust_hue(picture(), -0.25, backend="pillow").astype(int)
    back = mmcv.adjust_hue(turned.astype(np.uint8), 0.25, backend="pillow").astype(int)
    assert np.abs(turned - picture()).mean() > 20
    assert np.abs(back - picture()).mean() < 3  # rounded twice


@pytest.mark.parametrize("factor", [-0.5, -0.1, 0.1, 0.5])
def test_hue_of_mmaction(factor):
    jitter = toolkit("mmaction.datasets.transforms").ColorJitter
    image, offset = picture(), int(factor * 255)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    # numpy 1: int16 for a negative number; for others uint8, which goes round at 256
    total = hsv[..., 0].astype(int) + offset
    hsv[..., 0] = (total if offset < 0 else total % 256) % 180
    wanted = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    np.testing.assert_array_equal(jitter.adjust_hue(image, factor), wanted.astype(np.float32))
    np.random.seed(0)
    done = jitter(hue=0.5)(dict(imgs=[image] * 2))
    assert done["imgs"][0].dtype == np.uint8


# ---- mmdet


def test_youtube_vis_metric(tmp_path):
    from pycocotools import mask

    with DefaultScope.overwrite_default_scope("mmdet"):
        metric = toolkit("mmdet.evaluation").YouTubeVISMetric(outfile_prefix=str(tmp_path / "result"))
    metric.dataset_meta = dict(classes=["cat"])
    pixels = np.zeros((20, 20), np.uint8, order="F")
    pixels[4:12, 4:12] = 1
    encoded = mask.encode(pixels)
    encoded["counts"] = encoded["counts"].decode()
    truth = dict(bbox_label=0, bbox=[4, 4, 12, 12], ignore_flag=0, instance_id=1, mask=encoded)
    found = dict(bboxes=torch.tensor([[4, 4, 12, 12]]), scores=torch.tensor([0.9]), labels=torch.tensor([0]))
    found |= dict(instances_id=torch.tensor([1]), masks=torch.from_numpy(pixels[None].copy()))
    about = dict(img_id=1, video_id=1, ori_video_length=1, ori_shape=(20, 20), instances=[truth])
    frame = toolkit("mmdet.structures").DetDataSample(metainfo=about, pred_track_instances=InstanceData(**found))
    metric.process({}, [dict(video_data_samples=[frame])])
    values = metric.evaluate(size=1)
    assert values["youtube_vis/segm_mAP"] == 1.0


# ---- position biases


def cubic(at_x: np.ndarray, at_y: np.ndarray) -> np.ndarray:
    """A polynomial, (len(at_y), len(at_x)), which a cubic spline that goes through it everywhere is, too."""
    x, y = at_x[None, :], at_y[:, None]
    return 0.1 * x**3 - 0.2 * x * y**2 + 0.5 * x - y


def places(source: int, target: int) -> np.ndarray:
    """Where BEiT has the values of a smaller table: distances that grow by a ratio, and end where the larger ends."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio**i for i in range(source // 2)) > target // 2 else (ratio, high)
    away = np.cumsum([ratio**i for i in range(source // 2)])
    return np.concatenate([-away[::-1], [0], away])


def test_tables_of_position_biases_are_interpolated():
    at = places(7, 9)
    table = torch.tensor(cubic(at, at), dtype=torch.float32).reshape(-1, 1)
    wanted = cubic(np.arange(-4.0, 4.1), np.arange(-4.0, 4.1)).reshape(-1, 1)
    utils = toolkit("mmpretrain.models.utils")
    got = utils.resize_relative_position_bias_table(7, 9, table, 1)
    np.testing.assert_allclose(got, wanted, atol=1e-3)
    beit = toolkit("mmseg.models.backbones.beit").BEiT
    got = beit._geometric_sequence_interpolation(None, 7, 9, table, 1)
    np.testing.assert_allclose(got, wanted, atol=1e-3)


# ---- configs in pure Python


def test_pure_python_configs_may_use_frozen_modules(tmp_path):
    (tmp_path / "config.py").write_text(
        "import os\nimport os.path as osp\nfrom os.path import basename\nfrom torch.nn import Conv2d\n"
        "path = osp.join('a', basename('b/c'))\nhome = os.sep\nlayer = dict(type=Conv2d)\n"
    )
    config = Config.fromfile(tmp_path / "config.py")
    assert (config.path, config.home) == (os.path.join("a", "c"), os.sep)
    assert config.layer.type is torch.nn.Conv2d  # what is of no standard library is imported when it is asked for


# ---- what Python and setuptools have dropped


@pytest.fixture
def without(monkeypatch):
    """Make a module that cannot be imported."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


def test_the_environment_is_told_without_distutils(without):
    collect_env = toolkit("mmengine.utils.dl_utils").collect_env
    without("distutils")
    without("distutils.errors")
    told = collect_env()
    assert told["Python"] == sys.version.replace("\n", "")
    assert "PyTorch" in told
    assert sys.modules["distutils"] is None


@pytest.mark.parametrize("module", ["mmcv.utils.ext_loader", "mmengine.utils.dl_utils.misc"])
def test_compiled_ops_are_found_without_find_loader(module, monkeypatch):
    monkeypatch.delattr("pkgutil.find_loader", raising=False)
    part = toolkit(module)
    for name in ("check_ops_exist", "mmcv_full_available"):
        if hasattr(part, name):
            assert getattr(part, name)()
    assert part.pkgutil.find_loader("no_such_module") is None
    assert part.pkgutil.iter_modules is not None


@pytest.mark.slow
def test_packages_are_found_without_pkg_resources():
    printed = python(
        "import sys\n"
        "sys.modules['pkg_resources'] = None\n"
        "import normplug, json, mmdet, os\n"
        "from mmengine.utils import get_installed_path, is_installed\n"
        "from mmengine.utils.package_utils import package2module\n"
        "from mmengine.config import Config\n"
        "found = [is_installed(name) for name in ('mmdet', 'mmsegmentation', 'json', 'no_such_package')]\n"
        "paths = [get_installed_path(name) == os.path.dirname(mmdet.__file__) for name in ('mmdet',)]\n"
        "paths.append(os.path.basename(get_installed_path('mmsegmentation')))\n"
        "paths.append(os.path.basename(get_installed_path('json')))\n"
        "try:\n"
        "    get_installed_path('no_such_package')\n"
        "except ModuleNotFoundError as error:\n"
        "    paths.append(error.name)\n"
        "print(json.dumps([found, paths, package2module('mmsegmentation')]))\n"
    )
    found, paths, module = json.loads(printed.splitlines()[-1])
    assert found == [True, True, True, False]
    assert paths == [True, "mmseg", "json", "no_such_package"]
    assert module == "mmseg"


# ---- when modules are imported


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package ``oldkit`` with a module that has a repair."""
    (tmp_path / "oldkit").mkdir()
    (tmp_path / "oldkit" / "__init__.py").touch()
    (tmp_path / "oldkit" / "part.py").write_text("import numpy as np\n\n\ndef top():\n    return np.Inf\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(repairs._REPAIRS, "oldkit.part", repairs._old_numpy)
    yield
    for name in ("oldkit", "oldkit.part"):
        sys.modules.pop(name, None)


def test_a_module_is_repaired_when_it_is_imported(package):
    part = importlib.import_module("oldkit.part")
    assert part.top() == float("inf")
    assert part.np.zeros(2).shape == (2,)
    assert "np.Inf" in inspect.getsource(part.top)  # its loader is its own
    assert importlib.reload(part).top() == float("inf")


def test_what_is_not_installed_is_not_found(monkeypatch):
    monkeypatch.setitem(repairs._REPAIRS, "oldkit.part", repairs._old_numpy)
    assert importlib.util.find_spec("oldkit") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("oldkit.part")


@pytest.fixture
def imgaug(tmp_path, monkeypatch):
    """As imgaug 0.4 begins, and goes on."""
    (tmp_path / "imgaug").mkdir()
    (tmp_path / "imgaug" / "__init__.py").write_text("from imgaug.imgaug import kinds\n")
    (tmp_path / "imgaug" / "imgaug.py").write_text("import numpy as np\n\nkinds = set(np.sctypes['float'])\n")
    (tmp_path / "imgaug" / "augmenters.py").write_text("class Augmenter:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "imgaug"}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "imgaug"]:
        del sys.modules[name]
    sys.modules.update(kept)


def test_imgaug_is_imported_and_numpy_keeps_its_bool(imgaug):
    kept, wrappers = np.bool, toolkit("mmaction.datasets.transforms.wrappers")
    augmenters = importlib.import_module("imgaug.augmenters")
    assert np.float32 in sys.modules["imgaug"].kinds
    assert not hasattr(np, "sctypes")
    augmenter = augmenters.Augmenter()
    assert wrappers.ImgAug(augmenter).aug is augmenter
    assert np.bool is kept is not bool


@pytest.mark.slow
def test_modules_that_were_imported_before_are_repaired():
    printed = python(
        "import mmcv, numpy as np, json\n"
        "early = mmcv.adjust_hue\n"
        "import normplug\n"
        "image = np.full((4, 4, 3), (10, 20, 200), np.uint8)\n"
        "print(json.dumps([early(image, -0.25)[0, 0].tolist(), mmcv.adjust_hue(image, -0.25)[0, 0].tolist()]))\n"
    )
    early, late = json.loads(printed.splitlines()[-1])
    assert early == late != [10, 20, 200]
