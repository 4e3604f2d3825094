"""What a rank of another group has of a training at stage 3, out of the files of the ranks that saved it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from overproof.models.zero_parts import part_range
from overproof.train.rank_files import files_of, ranks_of
from overproof.train.sharded_state import FP32, ShardedState, needed_ranks

KEYS = (FP32, "exp_avg", "exp_avg_sq")


def cut(flat: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """A rank's part, filled up to the size that all parts have."""
    start, stop = part_range(len(flat), rank, world)
    return torch.cat([flat[start:stop], torch.zeros(-(-len(flat) // world) - (stop - start))])


def save(folder: Path, rank: int, world: int, groups: list[list[dict[str, torch.Tensor]]]) -> None:
    """As DeepSpeed does, of what is read."""
    flats = [{key: torch.cat([cut(weight[key], rank, world) for weight in group]) for key in KEYS} for group in groups]
    states = {i: {"step": torch.tensor(7.0), **{key: flat[key] for key in KEYS[1:]}} for i, flat in enumerate(flats)}
    shapes = [{f"{i}.{j}": weight[FP32].shape for j, weight in enumerate(group)} for i, group in enumerate(groups)]
    state = {"fp32_flat_groups": [flat[FP32] for flat in flats], "optimizer_state_dict": {"state": states}}
    torch.save({"param_shapes": shapes}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


@given(
    numels=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=3),
    saved_world=st.integers(1, 7),
    world=st.integers(1, 7),
    rank=st.integers(0, 6),
)
@tries(max_examples=60, deadline=None)
def test_a_part_is_cut_from_the_pieces_of_the_ranks_that_have_some(
    numels: list[list[int]], saved_world: int, world: int, rank: int
) -> None:
    rank %= world
    groups = [[{key: torch.randn(numel) for key in KEYS} for numel in group] for group in numels]
    every = {f"{i}.{j}": numel for i, group in enumerate(numels) for j, numel in enumerate(group)}
    with tempfile.TemporaryDirectory() as folder:
        for saved in needed_ranks(every, rank, world, saved_world):  # no other file is there
            save(Path(folder), saved, saved_world, groups)
        state = ShardedState(Path(folder), saved_world)
        mixed = list(every)[::-1]  # the groups of another size of world may be others
        found = state.part({name: every[name] for name in mixed}, rank, world)
        for key in KEYS:
            weights = [groups[int(name.split(".")[0])][int(name.split(".")[1])][key] for name in mixed]
            assert torch.equal(found[key], torch.cat([cut(weight, rank, world) for weight in weights]))
        assert found["step"] == 7


@pytest.mark.parametrize(("world", "saved_world"), [(1, 5), (2, 5), (5, 2), (3, 3), (7, 1)])
def test_every_file_of_a_checkpoint_is_looked_after_by_one_rank(world: int, saved_world: int) -> None:
    names = ["curve.jsonl", *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(saved_world))]
    each = [files_of(names, ranks_of(rank, world, saved_world), common=rank == 0) for rank in range(world)]
    assert sorted(name for found in each for name in found) == sorted(names)
    if world == saved_world:
        assert all(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in found for rank, found in enumerate(each))
