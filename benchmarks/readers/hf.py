"""Hugging Face `datasets`, map-style and streaming, over the same rows as lists in Parquet files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from timing import Batches, Epoch, Open, main
from torch.utils.data import DataLoader

SEED = 1
BUFFER_ROWS = 1000
SHARDS = 64

datasets.disable_progress_bars()


def load(root: Path, streaming: bool = False) -> Any:
    """The train rows; map-style they lie in an Arrow file that is mapped into memory."""
    files = [str(file) for file in sorted((root / "lists").glob("*.parquet"))]
    found = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=streaming, cache_dir=str(root / "hf")
    )
    return found.select_columns(["tokens", "length"])


def tensors(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, length = (torch.as_tensor(batch[name]) for name in ("tokens", "length"))
    return tokens.long(), length.long()


def arrays(table: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What somebody writes by hand who wants speed from the arrow format."""
    tokens = table.column("tokens").combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    length = table.column("length").to_numpy()
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(length.astype(np.int64))


def mapped(kind: str, convert: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]) -> Open:
    def open_rows(root: Path, batch_size: int) -> Epoch:
        rows = load(root)

        def epoch(index: int) -> Batches:
            shuffled = rows.shuffle(seed=SEED + index, keep_in_memory=True).with_format(kind)
            return map(convert, shuffled.iter(batch_size, drop_last_batch=True))

        return epoch

    return open_rows


def loader(root: Path, batch_size: int) -> Epoch:
    rows = load(root)

    def epoch(index: int) -> Batches:
        shuffled = rows.shuffle(seed=SEED + index, keep_in_memory=True).with_format("torch")
        return map(tensors, DataLoader(shuffled, batch_size=batch_size, drop_last=True))

    return epoch


def buffered(root: Path, batch_size: int) -> Epoch:
    """Contiguous parts in random order, and a buffer of rows."""
    rows = load(root).to_iterable_dataset(num_shards=SHARDS)

    def epoch(index: int) -> Batches:
        shuffled = rows.shuffle(seed=SEED + index, buffer_size=BUFFER_ROWS).with_format("numpy")
        return map(tensors, shuffled.iter(batch_size, drop_last_batch=True))

    return epoch


def streamed(root: Path, batch_size: int) -> Epoch:
    rows = load(root, streaming=True)

    def epoch(index: int) -> Batches:
        shuffled = rows.shuffle(seed=SEED + index, buffer_size=BUFFER_ROWS).with_format("numpy")
        return map(tensors, shuffled.iter(batch_size, drop_last_batch=True))

    return epoch


if __name__ == "__main__":
    main({
        "hf_arrow": mapped("arrow", arrays),
        "hf_numpy": mapped("numpy", tensors),
        "hf_torch": mapped("torch", tensors),
        "hf_loader": loader,
        "hf_buffered": buffered,
        "hf_streamed": streamed,
    }, load)  # fmt: skip
