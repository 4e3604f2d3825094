"""A trial's events, as TensorBoard itself reads them."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata

from overproof.distill.tensorboard import TrialEvents

SETTINGS = {"learning_rate": 1e-3, "layers": 2, "divergence": "jsd", "tied": True, "widths": [1, 2], "beta2": None}
ROWS = [
    {"step": 1, "loss": 3.5, "grad_norm": 1.0},
    {"step": 2, "loss": 2.25},
    {"step": 2, "validation_loss": 2.5},
]


def reload(folder: Path) -> EventAccumulator:
    read = EventAccumulator(str(folder))
    read.Reload()
    return read


def plugin_data(read: EventAccumulator, tag: str) -> bytes:
    content: bytes = read.SummaryMetadata(tag).plugin_data.content
    return content


def test_losses_come_by_step_and_settings_with_the_status(tmp_path: Path) -> None:
    with TrialEvents(tmp_path / "wide", SETTINGS) as events:
        events.add(ROWS)
        events.succeed()
    read = reload(tmp_path / "wide")
    found = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert found == {"loss": [(1, 3.5), (2, 2.25)], "validation_loss": [(2, 2.5)]}
    start = metadata.parse_session_start_info_plugin_data(plugin_data(read, metadata.SESSION_START_INFO_TAG))
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert shown == {"learning_rate": 1e-3, "layers": 2, "divergence": "jsd", "tied": True}
    end = metadata.parse_session_end_info_plugin_data(plugin_data(read, metadata.SESSION_END_INFO_TAG))
    assert end.status == api_pb2.STATUS_SUCCESS
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]  # one run, not one for its settings beside it


def test_losses_are_seen_while_the_trial_runs_and_its_status_is_open(tmp_path: Path) -> None:
    with TrialEvents(tmp_path / "wide", SETTINGS) as events:
        events.add(ROWS[:1])
        read = reload(tmp_path / "wide")
        assert [event.value for event in read.Scalars("loss")] == [3.5]
        assert metadata.SESSION_END_INFO_TAG not in read.summary_metadata
        events.add(ROWS[1:])
        read.Reload()
        assert [event.value for event in read.Scalars("loss")] == [3.5, 2.25]
