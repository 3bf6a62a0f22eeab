"""Every command of README.md, CONTRIBUTING.md and docs/*.md, read out of the pages and typed.

Each runs in a shell, in a copy of the tree, on files in COCO's and Kinetics' own layout, without a network and without
a GPU (`journeys`), one after the other as they stand on the page. What is not as it stands:

* words in capitals and ellipses, which the reader replaces too, are replaced (`PLACEHOLDERS`);
* 8 and 4 GPUs are 2 processes, and the second node is this machine;
* `smaller` adds flags at the end of the line that make trainings short: one epoch, a few small pictures. Epochs in the
  names of checkpoints follow. ``tools/quickstart.py`` has no such flags and gets none: its data are few;
* a command on another page that would be the same line is not typed twice, and finds its files in the same folder.

What cannot run here is in `NOT_RUN` with the reason, and checked as far as it goes: tool, flags and configs exist.
A command that is in neither table fails, and so does an entry that no command needs any more.
"""

import argparse
import ast
import contextlib
import io
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest
import timm
import torch
import yaml
from journeys import ROOT, Checkout, Done, in_shell, make_checkout, smaller
from packaging.requirements import Requirement
from safetensors.torch import save_file
from test_convert_checkpoint import (
    AuthorsCBN,
    Detector,
    caffe2_blob,
    detectron2_detector_name,
    group_norm,
    numpy_of,
    write_pickle,
)
from tiny_data import overlapping, published_weights

from normplug import bench

sys.path.insert(0, str(ROOT / "tools"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]


# Reading

PROGRAMS = {"python", "pip", "pytest", "mim", "tensorboard", "pre-commit", "source", "git"}
# Blocks that are neither Python nor commands, by how they begin
NOT_COMMANDS = {
    "config ──> registry": "a figure",
    "LR is set based on batch size": "a line of a log",
    "normplug: ": "lines of a log",
}


@dataclass(frozen=True)
class Command:
    """A command of a page, lines that go on joined, without its comment."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pieces(page: str) -> Iterator[tuple[int, bool, str]]:
    """Yield of each piece the number of its first line, whether it is code (fenced, or indented by four), its text."""
    lines, kinds, fenced = (ROOT / page).read_text().splitlines(), [], False
    for i, line in enumerate(lines):
        if line.startswith("```"):
            fenced = not fenced
            kinds.append(False)
        else:
            after_text = i > 0 and not kinds[-1] and lines[i - 1] != ""  # then it is a list that goes on
            kinds.append(fenced or (line.startswith("    ") and not after_text))
    for is_code, group in groupby(range(len(lines)), key=kinds.__getitem__):
        numbers = list(group)
        text = "\n".join(lines[i].removeprefix("    ") if is_code and not fenced else lines[i] for i in numbers)
        yield numbers[0] + 1, is_code, text


def is_python(code: str) -> bool:
    """Whether a block is a piece of a config or of a program: assignments, imports, calls."""
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return False
    kinds = (ast.Assign, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.With, ast.For)
    return all(isinstance(x, kinds) or (isinstance(x, ast.Expr) and isinstance(x.value, ast.Call)) for x in body)


def split(text: str) -> tuple[dict[str, str], list[str]]:
    """Return the variables that a line of the shell sets and the words behind them; without words they stay set."""
    try:
        words = shlex.split(text.replace(";", " "))
    except ValueError:  # quotes: not a line of the shell
        return {}, [text]
    if words[:1] == ["export"]:
        del words[0]
    variables = {}
    while words and (found := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0])):
        variables[found[1]] = found[2]
        del words[0]
    return variables, words


def is_command(text: str) -> bool:
    """Whether a line calls a program that the pages use, or sets variables of the shell."""
    variables, words = split(text)
    if not words:
        return bool(variables)
    return words[0] in PROGRAMS or words[0].endswith(".sh") or words[0].startswith("$")


def commands(page: str) -> list[Command]:
    """Return the commands of a page: of its blocks, and those within the text that have arguments."""
    found = []
    for start, is_code, text in pieces(page):
        if is_code and not is_python(text) and not text.startswith(tuple(NOT_COMMANDS)):
            for line in re.finditer(r"(?m)^(?:.*\\\n)*.+$", text):
                joined = re.sub(r"(^|\s)\s*#.*$", "", re.sub(r"\s*\\\n\s*", " ", line[0]))
                if joined := re.sub(r"  +", " ", joined).strip():
                    found.append(Command(page, start + text.count("\n", 0, line.start()), joined))
        for inline in re.finditer(r"`([^`]+)`", "" if is_code else text):
            joined = " ".join(inline[1].split())
            if " " in joined and is_command(joined) and split(joined)[1]:
                found.append(Command(page, start + text.count("\n", 0, inline.start()), joined))
    return found


# What is not run


def configs_exist(text: str) -> None:
    for name in re.findall(r"configs/[\w./-]+\.py", text):
        assert (ROOT / name).is_file(), f"there is no {name}"


def parses(text: str) -> None:
    """Check that a tool takes the arguments."""
    words = split(text)[1]
    assert words[0] == "python"
    assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
    import_module(Path(words[1]).stem).parse_args(words[2:])


def parses_folder(text: str) -> None:
    """Check that a tool takes the arguments and has nothing against them but that the folder is not there."""
    words, said = split(text)[1], io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(said):
        import_module(Path(words[1]).stem).parse(words[2:])
    assert "has none of" in said.getvalue(), said.getvalue()


def tool_exists(text: str) -> None:
    name = split(text)[1][0]
    assert (ROOT / name).is_file(), f"there is no {name}"


def has_bench_flags(text: str) -> None:
    p = argparse.ArgumentParser(exit_on_error=False)
    bench.add_arguments(p)
    p.parse_args(text.split("normplug bench")[1].split())


def names_tests(text: str) -> None:
    """Check that pytest would find tests: the files, the words of -k in the names of their tests, the marker of -m."""
    words = shlex.split(text)
    files = [ROOT / word for word in words if word.startswith("tests/")]
    for file in files:
        assert file.is_file(), f"there is no {file}"
    if "-k" in words:
        tests = " ".join(re.findall(r"def (test_\w+)", "".join(file.read_text() for file in files)))
        for name in re.split(r" or | and | not ", words[words.index("-k") + 1]):
            assert name in tests, f"no test of {files} is called {name}"
    if "-m" in words:
        marker = words[words.index("-m") + 1].removeprefix("not ")
        assert f'"{marker}: ' in (ROOT / "pyproject.toml").read_text(), f"there is no marker {marker}"


def names_packages(text: str) -> None:
    """Check requirements, and that the extras of this project are there."""
    extras = set(re.findall(r'"(\w+)":', (ROOT / "setup.py").read_text().split("extras_require")[1]))
    for part in text.split("&&"):
        words = shlex.split(part)
        if words[0] != "pip":
            continue
        assert words[1] in ("install", "uninstall")
        for word in words[2:]:
            if here := re.fullmatch(r"\.\[([\w,]+)\]", word):
                assert set(here[1].split(",")) <= extras
            elif not word.startswith("-"):
                Requirement(word)


def mim_finds(text: str) -> None:
    """Check that OpenMIM has one config of that name: in its index for a search, among the files for a training."""
    words = shlex.split(text)
    if words[1] == "search":
        index = yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]
        models = [model for file in index for model in yaml.safe_load((ROOT / file).read_text())["Models"]]
        assert words[words.index("--config") + 1] in [model["Name"] for model in models]
    else:
        assert len(list((ROOT / "configs").rglob(words[3]))) == 1


@dataclass(frozen=True)
class NotRun:
    """Commands that are not run here.

    Args:
        pattern: Found in the command.
        reason: Why, and what runs it instead, if anything does.
        check: Fails if the command is wrong as far as one can see.
    """

    pattern: str
    reason: str
    check: Callable[[str], None]


NOT_RUN = [
    NotRun(r"^python -m venv", "makes an environment", lambda text: None),
    NotRun(r"^pip |&& pip ", "changes the environment; .ci/run does the same in its own", names_packages),
    NotRun(r"^pre-commit", "changes the repository", lambda text: configs_exist(".pre-commit-config.yaml")),
    NotRun(r"^pytest|`pytest", "runs these tests", names_tests),
    NotRun(r"tools/check\.py", "runs these tests", lambda text: None),
    NotRun(r"^tensorboard", "a server", lambda text: find_spec("tensorboard") or pytest.fail("not installed")),
    NotRun(r"^mim ", "needs a wheel; tests/test_journeys.py does what OpenMIM does", mim_finds),
    NotRun(r"slurm_train\.sh", "needs Slurm; tests/test_journeys.py has a stand-in for srun", configs_exist),
    NotRun(r"quickstart\.py --norms", "21 trainings; the README's first command trains two", parses),
    NotRun(r"--more-a", "needs trainings of several seeds; tests/test_compare_seeds.py has them", parses),
    NotRun(r"kernel_facts\.py", "an hour of compiling; tests/test_kernels.py does a part", configs_exist),
    NotRun(r"benchmark_train\.py", "needs a GPU; tests/test_benchmark_train.py has a tiny one", parses),
    NotRun(r"compatibility\.py$", "a minute; tests/test_compatibility.py runs it", parses),
    NotRun(r"compatible_models\.py$", "hours; tests/test_toolkit_families.py has a sample", parses),
    NotRun(r"peer_suites\.py", "needs checkouts; tests/test_peer_suites.py has a small one", parses_folder),
    NotRun(r"gpu_wheels\.sh", "fetches packages", tool_exists),
    NotRun(r"target_env\.sh", "makes an environment of 6 GB and runs these tests", tool_exists),
    NotRun(r"normplug bench", "needs a GPU, or minutes; tests/test_bench.py has a tiny one", has_bench_flags),
]


# What is typed

COCO_GN = "work_dirs/mask-rcnn_r50_fpn_gn-all_2x_coco"
PLACEHOLDERS = [  # in this order
    (r"^pip install .* && (?=python)", ""),  # the environment is there
    (r"A\.py A\.pth B\.py B\.pth", "configs/digits/mask-rcnn_r18_fpn_bn_digits.py work_dirs/quickstart/detection/bn_*/"
     "epoch_3.pth configs/digits/mask-rcnn_r18_fpn_gn_digits.py work_dirs/quickstart/detection/gn_*/epoch_3.pth"),
    (r"SOURCE OUT\.pth --config CONFIG", "resnet50-0676ba61.pth r50.pth --config "
     "configs/mask_rcnn/mask-rcnn_r50_fpn_frozen-bn_1x_coco.py"),
    (r"work_dirs/\.\.\./", f"{COCO_GN}/"),
    (r"\bCONFIG\b", "configs/digits/mask-rcnn_r18_fpn_syncbn_digits.py"),
    (r"\bCHECKPOINT\b", "work_dirs/mask-rcnn_r18_fpn_syncbn_digits/epoch_1.pth"),
    (r"MASTER_ADDR=10\.1\.1\.1 PORT=\d+", "MASTER_ADDR=127.0.0.1"),
    (r"(?<=NNODES=2 )(.*\.py) 8\b", r"\1 1"),
    (r"(dist_\w+\.sh \S+( \S+\.pth)?) [48]\b", r"\1 2"),
    (r"((work_dirs|\$work_dir)/(?!quickstart)\S*epoch_)\d+", r"\g<1>1"),
    (r"(work_dirs/\S*iter_)\d+", r"\g<1>2"),
]  # fmt: skip
STUDY = "--epochs 1 --seeds 1 --gpus 1 --device cpu"
ADDED = [  # pattern, and what makes it short; the first that is found
    (r"random_calls\.py", "--cases 20"),
    (r"fault_check\.py", "--trials 1 --faults save full two"),
    (r"small_batch_study\.py.*--preset coco", f"{STUDY} --norms gn-all --batch-sizes 1"),
    (r"small_batch_study\.py.*--preset kinetics", f"{STUDY} --norms GN --batch-sizes 1"),
    (r"small_batch_study\.py", f"{STUDY} --norms GN --batch-sizes 8"),
    (r"compare_checkpoints\.py", "--batch-sizes 1 --seconds 0.1 --resamples 20"),
]
# pattern -> exit codes and words of the output, where a machine without a GPU has another answer
REFUSED = {
    r"--amp\b": ({1, 2}, "--amp needs a GPU and none is visible"),  # torchrun ends with 1
    r"gpu_check\.sh": ({2}, "sees no GPU here"),
    r"tune_kernels\.py": ({2}, "sees no GPU"),
}


class Typist:
    """Types the commands of pages, each line once.

    Args:
        checkouts: The folder of each page.
    """

    def __init__(self, checkouts: dict[str, Checkout]) -> None:
        self.checkouts, self.typed, self.checked, self.used = checkouts, dict[str, Done](), 0, set[str]()
        self.failed: dict[str, list[str]] = {page: ["was not reached"] for page in checkouts}
        self._lock, self._readme_done = threading.Lock(), threading.Event()

    def pages(self, pages: list[str], alone: list[str]) -> None:
        """Type pages one after the other; all but those that stand alone go on with what the README left behind."""
        for page in pages:
            if page != "README.md" and page not in alone:
                self._readme_done.wait()
            self.failed[page] = []
            try:
                self.page(page)
            finally:
                if page == "README.md":
                    self._readme_done.set()

    def page(self, page: str) -> None:
        """Type the commands of a page; a variable that it sets holds for its later commands."""
        variables, first_node = {}, ""
        for command in commands(page):
            text = self._replaced(command.text)
            assigned, words = split(text)
            try:
                assert is_command(text), "is neither a program that is known here, nor in NOT_COMMANDS"
                if not words:
                    variables |= assigned
                elif entry := next((entry for entry in NOT_RUN if re.search(entry.pattern, text)), None):
                    self.used.add(entry.pattern)
                    self.checked += 1
                    entry.check(text)
                elif assigned.get("NODE_RANK") == "0":
                    first_node = self._small(text, variables)
                else:
                    line = self._small(text, variables)
                    if assigned.get("NODE_RANK") == "1":
                        line = f"{first_node} & {line} && wait $!"
                    self._type(page, "".join(f"export {k}={shlex.quote(v)}; " for k, v in variables.items()) + line)
            except Exception as error:  # the next command may be right
                self.failed[page].append(f"{command}\n{error}")

    def _replaced(self, text: str) -> str:
        for pattern, words in PLACEHOLDERS:
            text, count = re.subn(pattern, words, text)
            if count:
                self.used.add(pattern)
        return text

    def _small(self, text: str, variables: dict[str, str]) -> str:
        """Return the line with what makes it short at its end."""
        expanded = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), text)
        for pattern, words in ADDED:
            if re.search(pattern, expanded):
                self.used.add(pattern)
                return f"{text} {words}"
        if re.search(r"(dist_)?(train|test)\.(py|sh)", expanded):
            config = re.search(r"configs/\S+\.py", expanded)
            if config is None:  # that of a work dir, which is small already
                return text
            return f"{text} {in_shell(smaller(ROOT / config[0], epochs=2 if '--resume' in text else 1))}"
        return text

    def _type(self, page: str, line: str) -> None:
        with self._lock:
            if line in self.typed:
                return
            self.typed[line] = Done(line, 0, "", 0)
        done = self.typed[line] = self.checkouts[page].run(line)
        pattern = next((pattern for pattern in REFUSED if re.search(pattern, line)), None)
        self.used.add(pattern)
        codes, words = REFUSED.get(pattern, ({0}, ""))
        assert done.code in codes, done
        assert words in done.output, done
        assert done.code or "Traceback (most recent call last)" not in done.output, done


# Files that the pages start from


def published_files(folder: Path) -> None:
    """Write the checkpoints of docs/checkpoints.md, random, with the keys and in the format of the published ones."""
    norms = {
        key: value
        for key, value in published_weights("resnet50").items()
        if not key.endswith(("mean", "var", "tracked"))
    }
    group_normalized = timm.create_model("resnet50_gn").state_dict()
    detector = Detector(group_norm, full_size=True).state_dict()
    classes = {
        "roi_heads.box_predictor.bbox_pred": 4,
        "roi_heads.mask_head.predictor": 1,
    }  # of the background: not there
    detectron2 = {}
    for key, value in detector.items():
        name = detectron2_detector_name(key)
        detectron2[name] = value[classes.get(name.rpartition(".")[0], 0) :]
    write_pickle(folder / "R-50-GN.pkl", {"blobs": numpy_of({caffe2_blob(k): v for k, v in group_normalized.items()})})
    write_pickle(folder / "R-50.pkl", {"blobs": numpy_of({caffe2_blob(k, "bn"): v for k, v in norms.items()})})
    write_pickle(folder / "model_final.pkl", {"model": numpy_of(detectron2), "__author__": "Detectron2 Model Zoo"})
    torch.save(overlapping(published_weights("resnet50")), folder / "resnet50-0676ba61.pth")
    save_file(group_normalized, folder / "resnet50_gn.safetensors")
    save_file(timm.create_model("resnetv2_50d_evos").state_dict(), folder / "resnetv2_50d_evos.safetensors")
    jhu = {f"module.{key}": value for key, value in group_normalized.items()}
    torch.save({"epoch": 90, "arch": "resnet50", "state_dict": overlapping(jhu)}, folder / "R-50-GN-WS.pth.tar")
    cbn = Detector(AuthorsCBN, batch_norm_backbone=True, full_size=True).state_dict()
    torch.save({"meta": {"epoch": 12}, "state_dict": overlapping(cbn)}, folder / "cbn.pth")


# The tests


@pytest.fixture(scope="module")
def typist(tmp_path_factory, request):
    """The pages of the tests that were selected typed, two at a time; README.md always, for what it leaves behind."""
    selected = {"README.md"}
    for item in request.session.items:
        if item.path == request.path and hasattr(item, "callspec"):
            selected.add(item.callspec.params["page"])
        elif item.path == request.path:
            selected.update(PAGES)  # what looks at all entries
    checkout = make_checkout(tmp_path_factory.mktemp("documentation"), port=29600)
    published_files(checkout.root)
    # The presets of the study train on the whole of COCO at full size: here that is two panoramas
    few = make_checkout(tmp_path_factory.mktemp("study"), port=29700, few=True)
    typist = Typist({page: few if page == "docs/small-batch-study.md" else checkout for page in PAGES})
    # These train in the same work dirs, which one run at a time may have.
    first = ["README.md", "docs/scaling.md", "docs/saving-and-loading.md"]
    alone = ["docs/checkpoints.md", "docs/small-batch-study.md"]
    lanes = first, [*alone, *(page for page in PAGES if page not in first + alone)]
    with ThreadPoolExecutor(2) as pool:
        for lane in lanes:
            pool.submit(typist.pages, [page for page in lane if page in selected], alone)
    return typist


@pytest.mark.parametrize("page", ["README.md", *(pytest.param(page, marks=pytest.mark.long) for page in PAGES[1:])])
def test_commands(page, typist):
    assert not typist.failed[page], "\n\n".join(typist.failed[page])


@pytest.mark.long
def test_every_entry_is_needed(typist):
    texts = [command.text for page in PAGES for command in commands(page)]
    for table in (PLACEHOLDERS, ADDED, [(pattern, "") for pattern in REFUSED], [(e.pattern, "") for e in NOT_RUN]):
        for pattern, _ in table:
            assert pattern in typist.used, f"no command needs the entry {pattern!r} any more"
    for beginning in NOT_COMMANDS:
        assert any(text.startswith(beginning) for page in PAGES for _, is_code, text in pieces(page) if is_code)
    seconds = sum(done.seconds for done in typist.typed.values())
    print(f"{len(texts)} commands on {len(PAGES)} pages: {len(typist.typed)} lines typed in {seconds:.0f} s, "
          f"{typist.checked} commands checked only")  # fmt: skip
