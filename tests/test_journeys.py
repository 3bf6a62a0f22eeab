"""Whole ways through the project on files in COCO's and Kinetics' own layout: what a user does, command by command.

`tests/test_documentation.py` types what the pages say; here is what they leave to the reader: a config of every family
through tools/train.py, and work in a folder that is not the repository.
"""

import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from journeys import in_shell, make_checkout, smaller, train
from test_configs import CONFIGS, EXPERIMENTS, _load
from tiny_data import overlapping

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree in which timm's weights were converted, as the headers of the configs that want them say."""
    checkout = make_checkout(tmp_path_factory.mktemp("journeys"), port=29511)
    for name, norm, tag in (("resnet50_gn", "gn", "a1h"), ("resnetv2_50d_evos", "evonorm-s0", "ah")):
        torch.save(overlapping(timm.create_model(name).state_dict()), checkout.root / f"{name}.pth")
        (config,) = (checkout.root / "configs" / "mask_rcnn").glob(f"*-timm_fpn_{norm}-all_2x_coco.py")
        target = f"checkpoints/timm_{name}.{tag}_in1k.pth"
        done = checkout.run(f"python tools/convert_checkpoint.py {name}.pth {target} --config {config}")
        assert done.code == 0, done
        assert f"Written: {target}" in done.output
    return checkout


# Families


def features(file: Path) -> set[str]:
    """What can go wrong with a config as a whole: each of these is to be trained with at least once.

    Read off the tree, so that a new kind of config is a new feature: its folder and the words of its name, the types
    of model, data, loop, optimizer and hooks, the norms by place, and where its weights come from.
    """
    cfg = _load(file)
    found = {f"folder {file.parent.name}", *(f"name {word}" for word in re.split(r"[_-]", file.stem))}
    for key, value in _settings(cfg.to_dict()):
        kind = value["type"] if isinstance(value, dict) and "type" in value else None
        place = re.sub(r"\.\d+", "", key)  # of a list the kinds, not their order
        if kind and place.startswith(("model", "train", "optim", "param", "custom_hooks", "val")):
            found.add(f"{place} {kind}")
        if place.endswith(("checkpoint", "pretrained")) and isinstance(value, str):
            found.add("weights " + re.sub(r"(res(net|next))\d+", r"\1", value))
        if place.endswith(("act", "eps", "correction", "style", "paramwise_cfg", "clip_grad", "norm_eval")):
            found.add(f"{place} {value}")
    return {feature for feature in found if not re.fullmatch(r"name (\d.*|.*xb\d)", feature)}


def _settings(value, path: str = "") -> Iterator[tuple[str, object]]:
    if path:
        yield path, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _settings(inner, f"{path}.{key}".strip("."))


def families() -> list[Path]:
    """Return few configs that have every feature between them, small models first."""
    has = {file: features(file) for file in EXPERIMENTS}
    order = sorted(has, key=lambda file: (bool(re.search("[rx]101", file.stem)), str(file)))
    left, chosen = set().union(*has.values()), []
    while left:
        chosen.append(max(order, key=lambda file: len(has[file] & left)))
        left -= has[chosen[-1]]
    return chosen


@pytest.mark.long
def test_a_config_of_every_family_trains_and_validates(checkout):
    """Two iterations and a validation each, as `journeys.smaller` makes them; two at a time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["normplug", "mmdet.apis", "mmdet.models", "mmaction.apis", "mmaction.models"])
    failed, chosen = {}, families()
    assert {file.parent.name for file in chosen} == {file.parent.name for file in EXPERIMENTS}
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        logs = {}
        for file in chosen:
            config = checkout.root / "configs" / file.relative_to(CONFIGS)
            options = [
                *smaller(config, workers=False),
                "default_hooks.checkpoint.interval=-1",
                "default_hooks.checkpoint.save_last=False",
                "default_hooks.logger.interval=1",
            ]
            if _load(file).optim_wrapper.get("type") == "AmpOptimWrapper":
                options.append("optim_wrapper.type=OptimWrapper")  # the other needs a GPU
            logs[file] = pool.submit(train, config, checkout.root, checkout.env, options)
        for file, log in logs.items():
            text = log.result()
            done = re.search(r"(Epoch|Iter)\(train\).* loss: [\d.]+ ", text) and re.search(r"(Epoch|Iter)\(val\)", text)
            if not done or not text.endswith("exit code 0\n"):
                failed[str(file.relative_to(CONFIGS))] = text[-3000:]
    print(f"{len(chosen)} configs of {len(EXPERIMENTS)} stand for all")
    assert not failed, "\n\n".join(f"{name}:\n{end}" for name, end in failed.items())


# Elsewhere


@pytest.fixture(scope="module")
def installed(packages, checkout, tmp_path_factory):
    """Another folder, with data, in the environment of somebody who installed the wheel."""
    folder = tmp_path_factory.mktemp("anywhere")
    (folder / "data").symlink_to(checkout.root / "data")
    return replace(checkout, root=folder, env=checkout.env | {"PYTHONPATH": str(packages[1])})


def as_mim_does(packages, config: str, launcher: str, gpus: int) -> str:
    """The command of ``mim train normplug CONFIG --launcher LAUNCHER --gpus GPUS`` (openmim 0.3.9).

    It looks for the config's name in the whole package, and for the tool in its folder .mim.
    """
    package = packages[1] / "normplug"
    (file,) = package.rglob(config)
    torchrun = (
        f"-m torch.distributed.launch --nproc_per_node={gpus} --master_port=$PORT " if launcher == "pytorch" else ""
    )
    small = in_shell(smaller(file))
    return f"python {torchrun}{package}/.mim/tools/train.py {file} --launcher {launcher} {small}"


@pytest.mark.parametrize(
    ("config", "launcher"),
    [
        ("i3d_r50_gn_8xb4-32x2x1-100e_kinetics400-rgb.py", "none"),
        ("mask-rcnn_r50_fpn_gn-all_2x_coco.py", "pytorch"),
    ],
)
def test_the_wheel_trains_anywhere(config, launcher, packages, installed):
    done = installed.run(as_mim_does(packages, config, launcher, gpus=2))
    assert done.code == 0, done
    assert re.search(r"(Epoch|Iter)\(val\)", done.output), done
    work_dir = installed.root / "work_dirs" / Path(config).stem
    (checkpoint,) = [*work_dir.glob("epoch_1.pth"), *work_dir.glob("iter_2.pth")]
    tool = packages[1] / "normplug" / ".mim" / "tools" / "test.py"
    (file,) = (packages[1] / "normplug").rglob(config)
    done = installed.run(f"python {tool} {file} {checkpoint} --show-dir shown {in_shell(smaller(file))}")
    if launcher == "none":  # mmaction2's configs draw nothing
        assert done.code == 2, done
        assert "default_hooks.visualization" in done.output
    else:
        assert done.code == 0, done
        assert len(list((installed.root / "shown").glob("*.jpg"))) == 2


def test_slurm_starts_a_training(checkout, tmp_path):
    """With a stand-in that, as srun does for one task, sets its variables and starts what it is given."""
    (tmp_path / "srun").write_text(
        "#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do shift; done\n"
        'SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_NODELIST=localhost exec "$@"\n'
    )
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    config = "configs/digits/i3d_r18_gn_digits.py"
    line = f"tools/slurm_train.sh PARTITION JOB {config} work_dirs/slurm {in_shell(smaller(checkout.root / config))}"
    done = checkout.run(f"PATH={tmp_path}:$PATH MASTER_PORT=$PORT GPUS=1 {line}")
    assert done.code == 0, done
    assert (checkout.root / "work_dirs" / "slurm" / "epoch_1.pth").is_file()
