"""Programs that count themselves in, as ``_gathered`` has it, in every order in which they may run."""

from collections import deque

import pytest
import torch

from normplug.ops._registration import has_triton

if not has_triton():
    pytest.skip("Triton comes with torch on Linux only", allow_module_level=True)

from normplug.kernels import _launch, _passes


def joins(members, steps=("store", "count", "join")):
    """Run all interleavings of a launch that finds the gate open; return how it may leave it."""
    first = 0, 0, ((0, None),) * members
    seen, todo, ends = {first}, deque([first]), set()
    while todo:
        gate, stored, programs = todo.popleft()
        if all(at == len(steps) for at, _ in programs):
            assert sum(before == members - 1 for _, before in programs) == 1
            ends.add(gate)
        for rank, (at, before) in enumerate(programs):
            if at == len(steps):
                continue
            new_gate, new_stored, new_before = gate, stored, before
            if steps[at] == "store":
                new_stored |= 1 << rank
            elif steps[at] == "count":
                new_gate, new_before = gate + 1, gate
            elif before == members - 1:
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
