"""What the files of a checkpoint of DeepSpeed hold, rank by rank: ZeRO stages 0 to 3.

Under ZeRO each rank writes a file of optimizer state, in which the fp32 masters of its part of the weights are. Below
stage 3 there is one file of the model's, of rank 0; at stage 3 every rank writes one, without weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from overproof.train.deepspeed_engine import plain_zero_loading
from overproof.train.sharded_state import group_ranges, read_state

WHOLE_MODEL = "mp_rank_00_model_states.pt"  # below stage 3


def weight_parts(folder: Path, ranks: range, saved_world: int) -> dict[str, Tensor]:
    """What the files of these ranks hold of the weights that were trained, under ZeRO of their fp32 masters: flat, by
    name, those of several ranks one after the other. All ranks' together are whole. Numbers stay in the files.

    Raises:
        InputError: as ``DeepSpeedEngine.load``.
    """
    found: dict[str, list[Tensor]] = {}
    with plain_zero_loading(folder):
        for rank in ranks:
            for name, values in _parts_of(folder, rank, saved_world):
                found.setdefault(name, []).append(values)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}


def _parts_of(folder: Path, rank: int, saved_world: int) -> Iterator[tuple[str, Tensor]]:
    file = next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"), None)
    own = folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
    model = None
    if own.exists() or rank == 0:
        model = read_state(own if own.exists() else folder / WHOLE_MODEL)
        for name, value in model["module"].items() if rank == 0 else ():
            if file is None or name in model["buffer_names"]:
                yield name, value.float().reshape(-1)
    if file is None:
        return
    state = read_state(file)["optimizer_state_dict"]
    if model is not None and own.exists():
        for shapes, flat in zip(model["param_shapes"], state["fp32_flat_groups"], strict=True):
            yield from ((name, flat[start:stop]) for name, start, stop in group_ranges(shapes, rank, saved_world))
        return
    for places, flat in zip(state["param_slice_mappings"], state["single_partition_of_fp32_groups"], strict=True):
        yield from ((name, flat[place.start : place.start + place.numel]) for name, place in places.items())
