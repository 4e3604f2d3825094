"""The weights of a model that lies in parts on the ranks of a group, written as safetensors without being gathered.

Every rank writes files of its own, a tensor at a time, whose parts all ranks send it: no rank holds more than its part
of the model and one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from overproof.files import FileEntry, filesystem, hashed_file, write_file
from overproof.models.safetensors_writer import (
    FILE_BYTES,
    TensorShape,
    index_of,
    plan_files,
    write_header,
    write_tensor,
)


def write_weights(
    parts: Mapping[str, Tensor],
    shapes: Mapping[str, TensorShape],
    uri: str,
    device: torch.device,
    report: Callable[[int, int], None],
    file_bytes: int = FILE_BYTES,
) -> dict[str, FileEntry]:
    """Write tensors of these shapes into the folder at ``uri``; every rank of the process group calls it, and is given
    the files of all, by name.

    ``parts`` are this rank's, flat, by name; those of all ranks, in the order of their ranks, make up each tensor.
    They travel by way of ``device``. ``report`` is told how many files are begun, of how many.

    Raises:
        RuntimeError: the parts of a tensor are not all there.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers: list[dict[str, int]] = [{}] * world
    dist.all_gather_object(numbers, {name: part.numel() for name, part in parts.items()})
    files, (store, root) = plan_files(shapes, file_bytes), filesystem(uri)
    store.create_dir(root, recursive=True)
    written: dict[str, FileEntry] = {}

    def whole(names: Sequence[str]) -> Tensor | None:
        """The tensor that this rank writes next, of those that the ranks write at once."""
        nothing, own = torch.empty(0, device=device), names[rank]
        sent = [parts[name].to(device, torch.float32) if name in parts else nothing for name in names]
        sizes = [each.get(own, 0) for each in numbers]
        received = nothing.new_empty(sum(sizes))
        dist.all_to_all_single(received, torch.cat(sent), sizes, [part.numel() for part in sent])
        if not own:
            return None
        if len(received) != shapes[own].numel:
            raise RuntimeError(f"{own}: {len(received):,} numbers came of {shapes[own].numel:,}")
        return received.to(shapes[own].dtype)

    for first in range(0, len(files), world):
        wave = files[first : first + world]
        report(first + len(wave), len(files))
        own = wave[rank] if rank < len(wave) else None
        opened: Any = hashed_file(store, f"{root}/{own.name}") if own else nullcontext()
        with opened as stream:
            if own:
                write_header(stream, own, shapes)
            for names in zip_longest(*(file.tensors for file in wave), *[()] * (world - len(wave)), fillvalue=""):
                tensor = whole(names)
                if tensor is not None:
                    write_tensor(stream, tensor)
        if own:
            written[own.name] = stream.entry()
    for name, content in index_of(files, shapes).items() if rank == 0 else ():
        written[name] = write_file(uri, name, content)
    of_ranks: list[dict[str, FileEntry]] = [{}] * world
    dist.all_gather_object(of_ranks, written)
    return {name: entry for found in of_ranks for name, entry in found.items()}
