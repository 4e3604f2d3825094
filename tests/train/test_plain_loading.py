"""Checkpoints that someone else has written: what they hold is read as data, or refused."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from overproof.config import Optimization
from overproof.errors import InputError
from overproof.train.deepspeed_engine import import_deepspeed, to_universal
from overproof.train.engine import STATE_FILE, TorchEngine
from overproof.train.plain_loading import plain_loading
from overproof.train.zero_files import weight_parts


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.file}'",)


class Indirect:
    """Calls what only a second look at names finds."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return getattr, (Path(self.file), "touch")


def forged(file: Path, value: Any, zipped: bool = True) -> None:
    torch.save(value, file, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("payload", [Payload, Indirect])
def test_one_process_refuses_what_runs_code(payload: type, zipped: bool, tmp_path: Path) -> None:
    engine = TorchEngine(torch.nn.Linear(2, 2), Optimization(steps=2, batch_size=2, learning_rate=0.1))  # type: ignore[arg-type]
    state: dict[str, Any] = {}
    engine.save(lambda name, value: state.__setitem__(name, value))
    forged(tmp_path / STATE_FILE, {**state[STATE_FILE], "more": payload(tmp_path / "ran")}, zipped)
    found = "which would run code when it is read" if zipped else "is not as torch saves tensors"
    with pytest.raises(InputError, match=f"{found}; nothing of it was run"):
        engine.load(tmp_path, 1)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_file_of_torch_is_refused(tmp_path: Path) -> None:
    engine = TorchEngine(torch.nn.Linear(2, 2), Optimization(steps=2, batch_size=2, learning_rate=0.1))  # type: ignore[arg-type]
    (tmp_path / STATE_FILE).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(InputError, match="is not as torch saves tensors"):
        engine.load(tmp_path, 1)
    assert not (tmp_path / "ran").exists()


def test_weights_are_taken_out_of_data_alone(tmp_path: Path) -> None:
    forged(tmp_path / "mp_rank_00_model_states.pt", {"module": {}, "more": Payload(tmp_path / "ran")})
    with pytest.raises(InputError, match=r"names posix\.system"):
        weight_parts(tmp_path, range(1), 1)
    forged(tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"optimizer_state_dict": Payload(tmp_path / "ran")})
    import_deepspeed("cpu")
    with pytest.raises(InputError, match=r"names posix\.system"):
        weight_parts(tmp_path, range(1), 1)
    with pytest.raises(InputError, match=r"names posix\.system"):
        to_universal(tmp_path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_the_records_of_deepspeed_are_read(tmp_path: Path) -> None:
    """Those of fp16, too, which trains on GPUs alone."""
    import_deepspeed("cpu")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        init_scale=2.0**12, scale_window=5, min_scale=1.0, delayed_shift=1,
        consecutive_hysteresis=False, raise_error_at_min_scale=False, dtype=torch.float16,
    )  # fmt: skip
    forged(tmp_path / "mp_rank_00_model_states.pt", {"module": {"a": torch.ones(2)}, "loss_scaler": scaler})
    assert weight_parts(tmp_path, range(1), 1)["a"].tolist() == [1, 1]


def test_whoever_reads_within_it_reads_data_and_afterwards_as_before(tmp_path: Path) -> None:
    load, buffer = torch.load, io.BytesIO()
    torch.save({"a": torch.arange(3), "b": [1.5, "x", None], "c": torch.Size([2])}, buffer)
    forged(tmp_path / "x.pt", Payload(tmp_path / "ran"))
    with plain_loading(tmp_path):
        buffer.seek(0)
        found = torch.load(buffer, weights_only=False)
        assert found["a"].tolist() == [0, 1, 2]
        assert found["b"] == [1.5, "x", None]
    with pytest.raises(InputError), plain_loading(tmp_path):
        torch.load(tmp_path / "x.pt", weights_only=False)
    forged(tmp_path / "y.pt", {"array": np.arange(3)})
    with pytest.raises(InputError, match="numpy"), plain_loading(tmp_path):
        torch.load(tmp_path / "y.pt", weights_only=False)
    assert torch.load is load
    assert not (tmp_path / "ran").exists()
