"""Trials as TensorBoard reads them: scalars by step, and each trial's settings for its HParams tab.

The records are written with TensorBoard's own writer, which needs neither torch nor TensorFlow.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from pyarrow import fs
from ray import tune
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from overproof.artifacts import ArtifactWriter
from overproof.files import filesystem

EVENTS = "events"  # folder of the sweep artifact, and of the workspace while the sweep runs
SCALARS = ("loss", "validation_loss")
STATUS = {"finished": api_pb2.STATUS_SUCCESS, "stopped": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
_files = count()  # of this process: several of one trial are read in the order of their names


def append_events(
    folder: Path, rows: Iterable[Mapping[str, float]], settings: Mapping[str, Any], status: str | None
) -> None:
    """Add a file of events to one trial's folder: its settings, the losses of these rows, and how it ended."""
    settings = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{int(time.time()):010d}.{next(_files):06d}.overproof"
    with path.open("wb") as stream:
        writer = RecordWriter(stream)
        for event in _events(rows, settings, status):
            writer.write(event.SerializeToString())
        writer.flush()


def _events(rows: Iterable[Mapping[str, float]], settings: Mapping[str, Any], status: str | None) -> Iterable[Event]:
    now = time.time()
    yield Event(wall_time=now, file_version="brain.Event:2")
    yield _hparams(now, metadata.EXPERIMENT_TAG, experiment=_experiment(settings, now))
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=now)
    for name, value in settings.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    yield _hparams(now, metadata.SESSION_START_INFO_TAG, session_start_info=start)
    for row in rows:
        values = [Summary.Value(tag=tag, simple_value=row[tag]) for tag in SCALARS if tag in row]
        if values:
            yield Event(wall_time=now, step=int(row["step"]), summary=Summary(value=values))
    if status is not None:
        end = plugin_data_pb2.SessionEndInfo(status=STATUS[status], end_time_secs=now)
        yield _hparams(now, metadata.SESSION_END_INFO_TAG, session_end_info=end)


def _experiment(settings: Mapping[str, Any], now: float) -> api_pb2.Experiment:
    kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    hparams = [
        api_pb2.HParamInfo(name=name, type=kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64))
        for name, value in settings.items()
    ]
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag="validation_loss"))]
    return api_pb2.Experiment(name="sweep", time_created_secs=now, hparam_infos=hparams, metric_infos=metrics)


def _hparams(now: float, tag: str, **content: Any) -> Event:
    data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
    return Event(wall_time=now, summary=Summary(value=[value]))


class TensorBoardCallback(tune.Callback):
    """Writes the trials' events into the workspace while they run, where that lies on a disk."""

    def __init__(self, draft: ArtifactWriter) -> None:
        store, root = filesystem(draft.workspace)
        self.folder = Path(root) / EVENTS if isinstance(store, fs.LocalFileSystem) else None
        if self.folder is not None and self.folder.exists():  # of an attempt that was killed
            shutil.rmtree(self.folder)

    def on_trial_result(self, *, result: Mapping[str, Any], **_: Any) -> None:  # type: ignore[override]
        if self.folder is not None:
            append_events(self.folder / result["name"], result["curve"], result["values"], None)
