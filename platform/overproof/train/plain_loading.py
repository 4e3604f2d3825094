"""Reading what torch saved without running what it says: tensors, plain values, and instances of a few named classes.

A checkpoint lies on a store with its hashes beside it. Who can write there can write both, so hashes tell damage and
not intent; a pickle would run code. ``torch.load`` with ``weights_only`` calls nothing but what is on a list.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from overproof.errors import InputError


@contextmanager
def plain_loading(folder: Path, allowed: list[Callable[..., Any]] | None = None) -> Iterator[None]:
    """Within it, ``torch.load`` reads plain data and ``allowed`` alone, whoever calls it and whatever they ask for, as
    DeepSpeed, which asks for pickles.

    Raises:
        InputError: a file of ``folder`` holds anything else, or is no file of torch's. Nothing of it was run.
    """
    load = torch.load

    def load_plain(file: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(file, str | os.PathLike) and not zipfile.is_zipfile(file):
            raise pickle.UnpicklingError("not as torch.save writes today")
        return load(file, *arguments, **{**options, "weights_only": True})

    torch.load = load_plain  # type: ignore[assignment]
    try:
        with torch.serialization.safe_globals(list(allowed or ())):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"names {named[1]}, which would run code when it is read" if named else "is not as torch saves tensors"
        raise InputError(
            f"{folder}: a file of this checkpoint {found}; nothing of it was run. Expected what training writes, "
            "tensors and plain values: someone else has written there. Restore it, or delete it: training goes on "
            "from the checkpoint before"
        ) from error
    finally:
        torch.load = load
