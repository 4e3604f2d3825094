"""The state of a running sweep on the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from overproof.artifacts import ArtifactWriter, Store
from overproof.distill.sweep_state import SWEEP_STATE_FILE, SweepState
from overproof.errors import InputError

TRIALS = {"wide": {"student": "wide", "learning_rate": 0.01}, "narrow": {"student": "narrow", "learning_rate": 0.02}}


@pytest.fixture
def draft(tmp_path: Path) -> ArtifactWriter:
    return Store(str(tmp_path)).new_writer("test", "sweep", "a" * 64, {}, {})


def test_what_was_recorded_is_loaded_in_its_order(draft: ArtifactWriter) -> None:
    SweepState(draft).record_trials({"wide": TRIALS["wide"]})
    SweepState(draft).record_trials(TRIALS)
    found = SweepState(draft).load_trials()
    assert list(found.items()) == list(TRIALS.items())


def test_a_workspace_without_a_state_is_cleared(draft: ArtifactWriter) -> None:
    stray = Path(draft.workspace) / "trials" / "wide"
    stray.mkdir(parents=True)
    assert SweepState(draft).load_trials() == {}
    assert not stray.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"[]", b"{}", b'{"sha256": "0", "trials": {}}'])
def test_a_damaged_state_is_refused_and_nothing_is_cleared(draft: ArtifactWriter, content: bytes) -> None:
    SweepState(draft).record_trials(TRIALS)
    file = Path(draft.workspace) / SWEEP_STATE_FILE
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"sweep\.json .*; restore it, or delete the folder to start anew"):
        SweepState(draft).load_trials()
    assert file.read_bytes() == content


def test_a_folder_in_place_of_the_state_is_damage_and_not_absence(draft: ArtifactWriter) -> None:
    """Without the file the workspace is cleared: that takes more than a message that says so."""
    (Path(draft.workspace) / SWEEP_STATE_FILE).mkdir(parents=True)
    (Path(draft.workspace) / "trials").mkdir()
    with pytest.raises(InputError, match=r"restore it, or delete the folder to start anew"):
        SweepState(draft).load_trials()
    assert (Path(draft.workspace) / "trials").exists()
