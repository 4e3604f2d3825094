"""Which of a checkpoint's files a rank looks after: each fetches and hashes those alone, and all agree on one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

import torch.distributed as dist

from overproof.stage_context import TrainingResumed, no_progress
from overproof.train.checkpoint import Checkpoint, Checkpoints, Damage

RANK = re.compile(r"zero_pp_rank_(\d+)_")  # as DeepSpeed names what a rank wrote of its part


def ranks_of(rank: int, world: int, saved_world: int) -> range:
    """The ranks whose files one of ``world`` ranks looks after, of those that wrote a checkpoint; itself, if it can."""
    return range(rank * saved_world // world, (rank + 1) * saved_world // world)


def files_of(names: Iterable[str], ranks: Collection[int], common: bool) -> list[str]:
    """Of a checkpoint's files, those that these ranks wrote of their parts; if ``common``, those of no rank's, too."""
    owners = {name: RANK.search(name) for name in names}
    return [name for name, owner in owners.items() if (common if owner is None else int(owner[1]) in ranks)]


def own_files(checkpoint: Checkpoint) -> list[str]:
    """Those that this rank of the process group looks after."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return files_of(checkpoint.files, ranks_of(rank, world, checkpoint.world), common=rank == 0)


def find_damage_together(checkpoint: Checkpoint) -> Damage | None:
    """What is wrong with a checkpoint, or None: every rank of the process group hashes its files, and hears of all."""
    found: list[Damage | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, checkpoint.find_damage(own_files(checkpoint)))
    return next((damage for damage in found if damage), None)


def newest_sound_together(checkpoints: Checkpoints, report: Callable[[TrainingResumed], None]) -> Checkpoint | None:
    """``Checkpoints.newest_sound``, found by all ranks of the process group; rank 0 reports.

    Raises:
        InputError: as ``Checkpoints.newest_sound``, on every rank.
    """
    first = dist.get_rank() == 0
    found = [list(checkpoints.newest_first()) if first else []]  # before anyone writes the next
    dist.broadcast_object_list(found)
    return checkpoints.newest_sound(report if first else no_progress, found[0], find_damage_together)
