"""Programs that meet, by a barrier or by counting in, in every order in which they may run; and what is planned."""

from collections import deque

import pytest
import torch

from normplug.ops._registration import has_triton

if not has_triton():
    pytest.skip("Triton comes with torch on Linux only", allow_module_level=True)

from normplug.bench import paper
from normplug.kernels import _launch, _passes, _teams
from normplug.kernels._recording import record

SIGN = 1 << 31
WHOLE = 1 << 32


@pytest.fixture
def one_pass():
    _launch.ONE_PASS = True
    _launch.forget_plans()
    yield
    _launch.ONE_PASS = False
    _launch.forget_plans()


# --- the barrier, as _meet has it


def share(rank, members):
    return SIGN - 1 - (members - 2) if rank == 0 else 1


def explore(members, waves, start, share=share):
    """Run all interleavings of a launch; return the counter at its end. A program stores, arrives, polls and reads.

    A state is the counter, how many waves each program has stored for, and of each program the wave, the next of its
    steps, and the counter as it found it on arrival. Where no program can go on, all must have ended.
    """
    first = start, (0,) * members, ((0, "store", 0),) * members
    seen, todo, ends = {first}, deque([first]), set()
    while todo:
        counter, stored, programs = todo.popleft()
        following = []
        for rank, (wave, at, before) in enumerate(programs):
            new_counter, new_stored, moved = counter, stored, None
            if wave == waves:
                continue
            if at == "store":
                new_stored = (*stored[:rank], wave + 1, *stored[rank + 1 :])
                moved = wave, "arrive", 0
            elif at == "arrive":
                new_counter = (counter + share(rank, members)) % WHOLE
                moved = wave, "poll", counter
            elif at == "poll" and (before ^ counter) & SIGN:
                moved = wave, "read", 0
            elif at == "read":
                assert min(stored) > wave, "a sum is read before it is stored"
                moved = wave + 1, "store", 0
            if moved is not None:
                following.append((new_counter, new_stored, (*programs[:rank], moved, *programs[rank + 1 :])))
        if not following:
            assert all(wave == waves for wave, _, _ in programs), "programs wait for ever"
            ends.add(counter)
        for state in following:
            if state not in seen:
                seen.add(state)
                todo.append(state)
    (end,) = ends  # the same in whatever order
    return end


@pytest.mark.parametrize("waves", [1, 2, 3])
@pytest.mark.parametrize("members", [2, 3])
def test_barrier_in_every_order(members, waves):
    """Also from where the last launch left the counter, and by a team of another size then."""
    end = explore(members, waves, 0)
    assert end == (SIGN if waves % 2 else 0)
    assert explore(5 - members, waves, end) in (0, SIGN)


def test_a_wrong_barrier_is_found():
    with pytest.raises(AssertionError, match="wait for ever"):
        explore(3, 2, 0, lambda rank, members: SIGN - members if rank == 0 else 1)
    with pytest.raises(AssertionError, match="before it is stored"):
        explore(3, 2, 0, lambda rank, members: SIGN if rank == 0 else 1)


# --- counting in, as _gathered has it


def joins(members, steps=("store", "count", "join")):
    """Run all interleavings of a launch, from where the last one left the gate, 0 or the sign bit."""
    ends = set()
    for start in 0, SIGN:
        first = start, 0, ((0, None),) * members
        seen, todo = {first}, deque([first])
        while todo:
            gate, stored, programs = todo.popleft()
            if all(at == len(steps) for at, _ in programs):
                assert sum(before is not None and before & (SIGN - 1) == members - 1 for _, before in programs) == 1
                ends.add(gate)
            for rank, (at, before) in enumerate(programs):
                if at == len(steps):
                    continue
                new_gate, new_stored, new_before = gate, stored, before
                if steps[at] == "store":
                    new_stored |= 1 << rank
                elif steps[at] == "count":
                    new_gate, new_before = gate + 1, gate
                elif before is not None and before & (SIGN - 1) == members - 1:
                    assert stored == (1 << members) - 1, "a part is read before it is stored"
                    new_gate = 0
                state = new_gate, new_stored, (*programs[:rank], (at + 1, new_before), *programs[rank + 1 :])
                if state not in seen:
                    seen.add(state)
                    todo.append(state)
    return ends


@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_the_last_to_count_itself_in_joins_and_leaves_the_gate_open(members):
    assert joins(members) == {0}


def test_counting_in_too_early_is_found():
    with pytest.raises(AssertionError, match="before it is stored"):
        joins(3, ("count", "store", "join"))


@pytest.mark.parametrize(("channels_last", "groups"), [(True, 32), (True, 5), (True, 1), (False, 32), (False, 160)])
def test_a_gate_is_that_of_whole_groups(channels_last, groups):
    """Also where groups of 32 channels lie across tiles of 64, and where one has more than a tile."""
    at = _launch.Layout.of(torch.Size((2, 160, 40, 56)), channels_last)
    tiles, size = _launch.tiling(at), 160 // groups
    gathering = _passes.Gathering.of(at, tiles, 2, size)
    width = tiles.block_inner if channels_last else tiles.block_outer
    covered = gathering.together * width
    assert covered % size == 0 or covered >= 160
    assert gathering.gates == 2 * -(-tiles.channel_tiles // gathering.together)


# --- what is planned


def started(shape, channels_last=False):
    """Return what a layer starts, in the interpreter without the launches of the other side of a barrier."""
    from normplug.bench.compilations import step
    from normplug.kernels import group_norm

    launches = record(lambda: step(group_norm, "group_norm", shape, "act", torch.bfloat16, channels_last))
    return [launch for launch in launches if dict(launch.constants).get("PHASE") != _teams.AFTER]


def test_off_unless_switched_on():
    assert not _launch.ONE_PASS
    assert not [launch for launch in started((2, 64, 400, 672)) if "_team" in launch.kernel]


def test_all_layers_of_both_models_are_one_pass():
    """But for channels-last groups of less than 16 bytes per position."""
    for row in paper.run()["rows"]:
        if row["layout"] == "contiguous":
            assert row["one_pass_kernels"] == 3 * row["layers"]
            assert row["one_pass_bytes"] == row["least"]
        else:
            assert row["least"] < row["one_pass_bytes"] < row["bytes"]


def test_a_group_that_the_device_cannot_hold_is_left_to_passes(one_pass, monkeypatch):
    monkeypatch.setattr(_launch, "multiprocessors", lambda _device: 16)
    names = [launch.kernel for launch in started((2, 64, 400, 672))]
    assert len(names) == 4
    assert not [name for name in names if "_team" in name]


def test_compiler_is_told_that_programs_wait_for_each_other():
    options = _launch.options_of(_launch.TEAM_WARPS, {"PHASE": _launch.COOPERATIVE})
    assert options["launch_cooperative_grid"]
    assert options["maxnreg"] * 32 * options["num_warps"] * _launch.resident(-1) <= 65536 * 132
    for phase in (_teams.BEFORE, _teams.AFTER, None):
        assert _launch.options_of(4, {"PHASE": phase}) == {"num_warps": 4}
