"""The state of a running sweep on the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from overproof.artifacts import ArtifactWriter, Store
from overproof.distill import sweep_state
from overproof.distill.sweep_state import JOURNAL, SWEEP_STATE_FILE, StartedTrial, SweepState
from overproof.errors import InputError

TRIALS: list[StartedTrial] = [
    ("wide", {"student": "wide", "learning_rate": 0.01}), ("narrow", {"student": "narrow", "learning_rate": 0.02}),
]  # fmt: skip
MANY: list[StartedTrial] = [(f"wide-{number:03d}", {"learning_rate": 1 / (1 + number)}) for number in range(7)]


@pytest.fixture
def draft(tmp_path: Path) -> ArtifactWriter:
    return Store(str(tmp_path)).new_writer("test", "sweep", "a" * 64, {}, {})


@pytest.fixture
def journal(draft: ArtifactWriter, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of many trials, three in a file."""
    monkeypatch.setattr(sweep_state, "PART_TRIALS", 3)
    for count in range(1, len(MANY) + 1):
        SweepState(draft).record_trials(MANY[:count])
    return Path(draft.workspace) / JOURNAL


@pytest.mark.parametrize("count", [1, 2])
def test_what_was_recorded_is_loaded_in_its_order(draft: ArtifactWriter, count: int) -> None:
    for number in range(1, count + 1):
        SweepState(draft).record_trials(TRIALS[:number])
    assert list(SweepState(draft).load_trials().items()) == TRIALS[:count]


def test_a_trial_writes_one_file_again_and_a_search_that_goes_on_the_last(draft: ArtifactWriter, journal: Path) -> None:
    assert [file.name for file in sorted(journal.iterdir())] == ["00000.json", "00001.json", "00002.json"]
    before = [file.read_bytes() for file in sorted(journal.iterdir())]
    (journal / "00002.json.ab12cd34.part").write_text("cut off")  # as a process that is killed leaves it
    assert list(SweepState(draft).load_trials().items()) == MANY
    SweepState(draft).record_trials([*MANY, ("wide-007", {"learning_rate": 0.5})])
    assert [(journal / f"0000{number}.json").read_bytes() for number in range(2)] == before[:2]
    assert list(SweepState(draft).load_trials())[-2:] == ["wide-006", "wide-007"]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_journal_that_lacks_a_trial_is_refused(draft: ArtifactWriter, journal: Path, lost: int) -> None:
    """Its checkpoints would be taken for those of another trial of the same name."""
    for name, _ in MANY:
        (Path(draft.workspace) / "trials" / name).mkdir(parents=True)
    (Path(draft.workspace) / "trials" / "control").mkdir()
    assert len(SweepState(draft).load_trials()) == len(MANY)
    (journal / f"0000{lost}.json").unlink()
    with pytest.raises(InputError, match=r"restore it, or delete the folder to start anew"):
        SweepState(draft).load_trials()


def test_a_workspace_without_a_state_is_cleared(draft: ArtifactWriter) -> None:
    stray = Path(draft.workspace) / "trials" / "wide"
    stray.mkdir(parents=True)
    assert SweepState(draft).load_trials() == {}
    assert not stray.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"[]", b"{}", b'{"sha256": "0", "fingerprint": ""}'])
def test_a_damaged_state_is_refused_and_nothing_is_cleared(draft: ArtifactWriter, content: bytes) -> None:
    SweepState(draft).record_trials(TRIALS[:1])
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
