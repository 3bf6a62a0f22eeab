"""A run can always go on: checkpoints are whole, the newest whole one is found, one run at a time has a work dir."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from test_checkpoints import runner

import normplug  # noqa: F401
from normplug.openmmlab import atomic, saving
from normplug.openmmlab.atomic import atomic_write
from normplug.openmmlab.mistakes import answered
from normplug.openmmlab.resuming import newest_whole_checkpoint
from normplug.openmmlab.saving import CheckpointHook, CheckpointNotSavedError, WorkDirInUseError

counter = iter(range(1000))


def prepare(work_dir, epochs, resume=False, **hook):
    return runner(work_dir, epochs, f"nothing-lost-{next(counter)}", checkpoint=hook, resume=resume)


def run(work_dir, epochs, resume=False, **hook):
    made = prepare(work_dir, epochs, resume, **hook)
    made.train()
    return made


def names(folder):
    return sorted(
        path.name
        for path in Path(folder).iterdir()
        if path.is_file() and path.name != saving.LOCK and path.suffix != ".py"
    )


class Killed(BaseException):
    """What a kill leaves: no handler of the code runs, so nothing here catches it."""


# ---- files that are whole or not there


def test_a_file_has_its_old_content_until_the_new_is_whole(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"old")
    file.chmod(0o640)
    with atomic_write(file) as stream:
        stream.write(b"new")
        assert file.read_bytes() == b"old"
    assert (file.read_bytes(), file.stat().st_mode & 0o777, names(tmp_path)) == (b"new", 0o640, ["a"])


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError), atomic_write(tmp_path / "a") as stream:
        stream.writelines([b"half", "not bytes"])
    assert names(tmp_path) == []


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "there" / "b")
    with atomic_write(tmp_path / "a") as stream:
        stream.write(b"new")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "there" / "b").read_bytes() == b"new"


def test_a_new_file_has_the_rights_that_open_would_give(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with atomic_write(tmp_path / "b"):
        pass
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "a").stat().st_mode


# ---- saving


def test_every_runner_saves_this_way(tmp_path):
    hooks = [hook for hook in runner(tmp_path, 1, "saves").hooks if isinstance(hook, CheckpointHook)]
    assert len(hooks) == 1


STEPS = ("write", "replace", "note", "delete")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_while_saving_loses_nothing(tmp_path, monkeypatch, step, keep):
    undisturbed = run(tmp_path / "a", 3, max_keep_ckpts=keep).model.state_dict()
    made = prepare(tmp_path / "b", 3, max_keep_ckpts=keep)
    with monkeypatch.context() as patch:
        made.register_hook(InThirdEpoch(lambda: kill(patch, step)))
        with pytest.raises(Killed):
            made.train()
    assert newest_whole_checkpoint(tmp_path / "b")[0].name == ("epoch_2.pth" if step in STEPS[:2] else "epoch_3.pth")

    resumed = run(tmp_path / "b", 3, resume=True, max_keep_ckpts=keep).model.state_dict()
    for key, value in undisturbed.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)


class InThirdEpoch(Hook):
    def __init__(self, act):
        self.act = act

    def before_train_epoch(self, runner):
        if runner.epoch == 2:
            self.act()


def kill(patch, step):
    """End the process, as far as a test can, at one step of saving a checkpoint."""

    def killed(*args, **kwargs):
        raise Killed

    if step == "delete":
        patch.setattr(LocalBackend, "remove", killed)
    elif step == "note":
        write = saving.atomic_write
        patch.setattr(
            saving, "atomic_write", lambda path: (killed if Path(path).name == "last_checkpoint" else write)(path)
        )
    else:
        patch.setattr(atomic.os, {"write": "fsync", "replace": "replace"}[step], killed)


def test_what_a_kill_left_goes(tmp_path):
    (tmp_path / ".epoch_3.pth.abcdefgh.partial").write_text("half")
    run(tmp_path, 1)
    assert names(tmp_path) == ["epoch_1.pth", "last_checkpoint"]


def test_outdated_checkpoints_go(tmp_path):
    run(tmp_path, 4, max_keep_ckpts=2)
    assert names(tmp_path) == ["epoch_3.pth", "epoch_4.pth", "last_checkpoint"]
    run(tmp_path, 6, resume=True, max_keep_ckpts=1)
    assert names(tmp_path) == ["epoch_6.pth", "last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_6.pth")


def full_disk(patch, after=0):
    """Let the disk have room for so many more checkpoints."""
    room = [after]
    fsync = os.fsync

    def no_space(number):
        if Path(f"/proc/self/fd/{number}").resolve().name.startswith(".epoch"):
            if not room[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            room[0] -= 1
        fsync(number)

    patch.setattr(atomic.os, "fsync", no_space)


def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path, monkeypatch):
    full_disk(monkeypatch, after=2)
    with pytest.raises(
        CheckpointNotSavedError, match=r"epoch_3.pth could not be written \(No space left .*epoch_2.pth"
    ):
        run(tmp_path, 4, max_keep_ckpts=1)
    assert names(tmp_path) == ["epoch_2.pth", "last_checkpoint"]
    monkeypatch.undo()
    assert run(tmp_path, 4, resume=True, max_keep_ckpts=1).epoch == 4
    assert names(tmp_path) == ["epoch_4.pth", "last_checkpoint"]


def test_a_run_may_go_on_without_a_checkpoint(tmp_path, monkeypatch):
    full_disk(monkeypatch, after=2)
    assert run(tmp_path, 4, max_keep_ckpts=1, skip_failed_saves=True).epoch == 4
    assert names(tmp_path) == ["epoch_2.pth", "last_checkpoint"]
    monkeypatch.undo()
    run(tmp_path, 4, resume=True, max_keep_ckpts=1)
    assert names(tmp_path) == ["epoch_4.pth", "last_checkpoint"]


class Scores(Hook):
    """Stands for a validation after each epoch, whose score is the number of epochs."""

    priority = "LOWEST"

    def __init__(self, saver):
        self.saver = saver

    def after_train_epoch(self, runner):
        runner.train_loop._epoch += 1  # as when the loop evaluates
        self.saver.after_val_epoch(runner, {"score": float(runner.epoch)})
        runner.train_loop._epoch -= 1


def run_with_best(work_dir, epochs, resume=False, **hook):
    made = prepare(work_dir, epochs, resume, save_best="score", rule="greater", max_keep_ckpts=1, **hook)
    made.register_hook(Scores(next(hook for hook in made.hooks if isinstance(hook, CheckpointHook))))
    made.train()


def test_the_best_checkpoint_stays_until_the_next_is_whole(tmp_path, monkeypatch):
    run_with_best(tmp_path, 2)
    assert names(tmp_path) == ["best_score_epoch_2.pth", "epoch_2.pth", "last_checkpoint"]
    write = saving.atomic_write

    def no_best(path):
        if "best" in Path(path).name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path)

    monkeypatch.setattr(saving, "atomic_write", no_best)
    run_with_best(tmp_path, 3, resume=True, skip_failed_saves=True)
    assert names(tmp_path) == ["best_score_epoch_2.pth", "epoch_3.pth", "last_checkpoint"]
    monkeypatch.undo()
    run_with_best(tmp_path, 4, resume=True)
    assert names(tmp_path) == ["best_score_epoch_4.pth", "epoch_4.pth", "last_checkpoint"]


@pytest.mark.parametrize("where", ["best_ckpt", "keep_ckpt_ids"])
def test_a_checkpoint_names_no_file_to_delete(tmp_path, where):
    precious = tmp_path / "precious.pth"
    precious.write_text("mine")
    run_with_best(tmp_path / "run", 1)
    file = tmp_path / "run" / "epoch_1.pth"
    checkpoint = torch.load(file)
    step = "x/../../precious"  # with the template: run/epoch_x/../../precious.pth
    (tmp_path / "run" / "epoch_x").mkdir()
    checkpoint["message_hub"]["runtime_info"][where] = str(precious) if where == "best_ckpt" else [step, step]
    torch.save(checkpoint, file)
    run_with_best(tmp_path / "run", 3, resume=True)
    assert precious.read_text() == "mine"


# ---- resuming


@pytest.fixture
def work_dir(tmp_path):
    """Three whole checkpoints of a run."""
    run(tmp_path / "run", 3)
    return tmp_path / "run"


def cut(file, keep=0.6):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def flip(file):
    """Damage a byte of a tensor: the archive's directory stays whole."""
    data = bytearray(file.read_bytes())
    at = data.index(b"data/0") + 200
    data[at : at + 64] = bytes(64)
    data[at] ^= 255
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [cut, lambda file: cut(file, 0), flip, lambda file: file.write_text("<html>"), lambda file: file.unlink()],
    ids=["cut", "empty", "flipped", "html", "deleted"],
)
def test_the_newest_whole_checkpoint_is_taken(work_dir, damage):
    newest = work_dir / "epoch_3.pth"
    damage(newest)
    path, passed_over = newest_whole_checkpoint(work_dir)
    assert path == work_dir / "epoch_2.pth"
    assert len(passed_over) == newest.exists()
    assert all(sentence.startswith(f"{newest} is not whole") for sentence in passed_over)
    assert run(work_dir, 4, resume=True).epoch == 4


NOTES = {
    "empty": "",
    "zeros": "\0" * 40,
    "a zero": "epoch\0_3.pth",
    "long": "x" * 5000,
    "moved": "/gone/epoch_3.pth",
    "missing": None,
}


@pytest.mark.parametrize("note", NOTES.values(), ids=NOTES)
def test_the_note_of_the_last_checkpoint_may_be_wrong(work_dir, note):
    file = work_dir / "last_checkpoint"
    file.unlink() if note is None else file.write_text(note)
    assert newest_whole_checkpoint(work_dir) == (work_dir / "epoch_3.pth", [])


def test_a_work_dir_may_move(work_dir, tmp_path):
    shutil.copytree(work_dir, tmp_path / "copy", copy_function=shutil.copy)  # times are lost
    shutil.rmtree(work_dir)
    assert newest_whole_checkpoint(tmp_path / "copy") == (tmp_path / "copy" / "epoch_3.pth", [])


def test_an_older_run_in_the_folder_is_not_newer_for_being_longer(work_dir):
    later = torch.load(work_dir / "epoch_1.pth")
    later["meta"]["time"] = "29991231_235959"
    torch.save(later, work_dir / "epoch_1.pth")
    assert newest_whole_checkpoint(work_dir)[0].name == "epoch_1.pth"


def test_the_best_and_the_published_are_no_state_to_go_on_from(work_dir):
    for name in ("best_score_epoch_3.pth", "epoch_3-0123abcd.pth"):
        shutil.copy(work_dir / "epoch_3.pth", work_dir / name)
    assert newest_whole_checkpoint(work_dir)[0].name == "epoch_3.pth"


def test_never_anew_where_checkpoints_are(work_dir):
    for file in work_dir.glob("*.pth"):
        cut(file)
    with pytest.raises(ValueError, match=r"no whole checkpoint.*epoch_1.pth is not whole"):
        run(work_dir, 4, resume=True)
    for file in work_dir.glob("*.pth"):
        file.unlink()
    with pytest.raises(ValueError, match=r"says that there was one.*epoch_3.pth"):
        run(work_dir, 4, resume=True)


def test_an_empty_folder_is_a_beginning(tmp_path):
    assert run(tmp_path, 1, resume=True).epoch == 1


def test_checkpoints_in_a_folder_of_their_own(tmp_path):
    run(tmp_path / "run", 2, out_dir=str(tmp_path / "store"))
    assert names(tmp_path / "store" / "run") == ["epoch_1.pth", "epoch_2.pth"]
    (tmp_path / "run" / "last_checkpoint").unlink()
    assert run(tmp_path / "run", 3, resume=True, out_dir=str(tmp_path / "store")).iter == 6


# ---- one run per folder


def test_a_second_run_in_a_work_dir_is_refused(tmp_path):
    other = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", other, str(tmp_path / saving.LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(WorkDirInUseError, match="Another run is training in"):
            run(tmp_path, 1)
        process.kill()
    assert run(tmp_path, 1).epoch == 1  # the lock went with its process


def test_runs_of_one_process_may_follow_each_other(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(CheckpointNotSavedError):
            run(tmp_path, 1)
    assert run(tmp_path, 1).epoch == 1


def test_an_earlier_run_is_told_of_before_it_is_overwritten(work_dir, monkeypatch):
    told = []
    monkeypatch.setattr("mmengine.logging.MMLogger.warning", lambda self, text, *args: told.append(text))
    run(work_dir, 4, resume=True)
    assert not [text for text in told if "earlier run" in text]
    run(work_dir, 1)
    assert [text for text in told if "epoch_1.pth, epoch_2.pth, epoch_3.pth" in text]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "The disk is full"),
        (CheckpointNotSavedError("epoch_3.pth could not be written"), "epoch_3.pth could not be written"),
    ],
)
def test_a_training_that_a_full_disk_ends_says_so(error, told, capsys):
    """In the middle of a run, where other errors keep their traceback; logs may be what could not be written."""
    with answered("train.py", debug=False) as answer:
        answer.first.is_done = True
        raise error
    assert answer.code == 1
    assert told in capsys.readouterr().err
