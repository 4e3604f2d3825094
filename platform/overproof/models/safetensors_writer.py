"""Weights as safetensors files of bounded size, written tensor by tensor.

Formats: https://huggingface.co/docs/safetensors (a header in JSON, then the numbers), and Hugging Face's index beside
several files, ``model.safetensors.index.json``, which says what tensor is in which.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, Any

import torch
from torch import Tensor

from overproof.models.pretrained import SHARDS, WEIGHTS

FILE_BYTES = 2_000_000_000  # of a file's tensors; one that is larger has a file of its own
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
         torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
         torch.float8_e4m3fn: "F8_E4M3"}  # fmt: skip
ALIGNMENT = 8


@dataclass(frozen=True)
class TensorShape:
    """What a file says of a tensor beside its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorShape:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class WeightFile:
    """One of the files of a directory, and the names of its tensors in the order in which they are written."""

    name: str
    tensors: tuple[str, ...]


def plan_files(shapes: Mapping[str, TensorShape], file_bytes: int = FILE_BYTES) -> tuple[WeightFile, ...]:
    """The files for tensors, filled in their order: ``model.safetensors``, or shards named as Hugging Face does."""
    groups: list[list[str]] = [[]]
    room = file_bytes
    for name, tensor in shapes.items():
        if groups[-1] and tensor.size_bytes > room:
            groups.append([])
            room = file_bytes
        groups[-1].append(name)
        room -= tensor.size_bytes
    stem, suffix = WEIGHTS.split(".")
    files = []
    for number, names in enumerate(groups, 1):
        file = WEIGHTS if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}"
        # As the safetensors library orders them, so that no number lies across its own size.
        files.append(WeightFile(file, tuple(sorted(names, key=lambda n: (-shapes[n].dtype.itemsize, n)))))
    return tuple(files)


def index_of(files: Sequence[WeightFile], shapes: Mapping[str, TensorShape]) -> dict[str, bytes]:
    """The index, by its file's name; none where there is one file."""
    if len(files) == 1:
        return {}
    total = sum(tensor.size_bytes for tensor in shapes.values())
    weight_map = {tensor: file.name for file in files for tensor in file.tensors}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {SHARDS: (json.dumps(content, indent=2) + "\n").encode()}


def write_file(
    stream: IO[bytes], file: WeightFile, shapes: Mapping[str, TensorShape], values: Iterable[Tensor],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:  # fmt: skip
    """One file; ``values`` are its tensors in their order, whole, of any layout, and are asked for one by one.
    ``metadata`` is what else its header says.
    """
    write_header(stream, file, shapes, metadata)
    for value in values:
        write_tensor(stream, value)


def write_header(
    stream: IO[bytes], file: WeightFile, shapes: Mapping[str, TensorShape],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in file.tensors:
        tensor = shapes[name]
        start, end = end, end + tensor.size_bytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    stream.write(struct.pack("<Q", len(text)) + text)


def write_tensor(stream: IO[bytes], value: Tensor) -> None:
    stream.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
