"""Out of memory, told by type where there is one, and by torch's words where there is nothing else."""

from __future__ import annotations

import pytest
import torch

from overproof.errors import InputError
from overproof.train.engine import explain_memory, is_out_of_memory

TOO_MUCH = 1 << 60  # bytes; more than any machine has


def test_torch_still_says_it_in_these_words() -> None:
    """Its CPU allocator raises a bare RuntimeError: should the words change, this fails first."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (NotImplementedError("can't allocate memory"), False),  # a subclass of RuntimeError, and another fault
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_it_becomes_bad_input_that_names_the_phase_and_what_to_change() -> None:
    message = r"out of memory in a training step: .*smaller micro_batch_size"
    with pytest.raises(InputError, match=message), explain_memory("a training step"):
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another fault") as raised, explain_memory("a training step"):
        raise RuntimeError("another fault")
    assert type(raised.value) is RuntimeError
