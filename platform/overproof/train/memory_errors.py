"""Out of memory, said so that one knows what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from overproof.errors import InputError

ADVICE = (
    "ask for less: a smaller micro_batch_size, activation_checkpointing: true, a higher zero_stage, offload, or more "
    "workers (`overproof plan` says what each takes)"
)


@contextmanager
def explain_memory(stage: str, advice: str = ADVICE) -> Iterator[None]:
    """Turn what torch raises when memory runs out into bad input.

    Raises:
        InputError: naming the stage and what to change.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(f"out of memory in {stage}: {_first_line(error)}; {advice}") from error
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise InputError(f"out of memory in {stage}: {_first_line(error)}; {advice}") from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
