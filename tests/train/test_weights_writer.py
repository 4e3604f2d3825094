"""Weights that a group of one rank writes; `test_engine.py` has groups of two, on a disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from overproof.files import filesystem, join_uri
from overproof.models.safetensors_writer import TensorShape
from overproof.train.weights_writer import write_weights

SHAPES = {name: TensorShape(torch.float32, shape) for name, shape in {"b": (3, 5), "a": (4,), "c": (2, 2)}.items()}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_files_and_index_lie_in_an_object_store_under_their_names(s3_uri: str) -> None:
    parts = {name: torch.randn(shape.numel) for name, shape in SHAPES.items()}
    uri, told = join_uri(s3_uri, "made/train-0/model"), list[tuple[int, int]]()
    write_weights(parts, SHAPES, uri, torch.device("cpu"), lambda begun, of: told.append((begun, of)), 64)
    files, root = filesystem(uri)

    def read(name: str) -> bytes:
        with files.open_input_stream(f"{root}/{name}") as stream:
            return bytes(stream.read())

    index = json.loads(read("model.safetensors.index.json"))
    assert index["metadata"] == {"total_size": 4 * (15 + 4 + 4)}
    assert index["weight_map"] == {"b": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors",
                                   "c": "model-00002-of-00002.safetensors"}  # fmt: skip
    for file in set(index["weight_map"].values()):
        for name, value in safetensors.torch.load(read(file)).items():
            assert torch.equal(value, parts[name].view(SHAPES[name].shape))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.usefixtures("alone")
def test_a_tensor_that_is_not_all_there_is_not_written_as_if_it_were(tmp_path: Path) -> None:
    parts = {"a": torch.zeros(4), "b": torch.zeros(14), "c": torch.zeros(4)}
    with pytest.raises(RuntimeError, match="b: 14 numbers came of 15"):
        write_weights(parts, SHAPES, str(tmp_path / "model"), torch.device("cpu"), lambda *_: None)
