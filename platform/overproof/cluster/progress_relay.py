"""Progress of other processes, through the store of keys that every Ray cluster keeps: no process for it is started."""

from __future__ import annotations

import pickle
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from overproof.stage_context import Notice, Progress, ProgressEvent

POLL_S = 0.2  # between two looks, and between two events of one kind from a process


class _RemoteProgress:
    """A `Progress` of another process than the one that shows it.

    Notices are stored at once, each by itself. Of each task a thread stores the newest event of each type, now and
    then: telling costs a training step nothing, and a step is not hidden by what follows it.
    """

    def __init__(self, relay: str) -> None:
        self._relay = relay
        self._lock = threading.Lock()
        self._newest: dict[tuple[type, str], ProgressEvent] = {}
        self._sending = False

    def __call__(self, event: ProgressEvent) -> None:
        if isinstance(event, Notice):
            self._store(event)
            return
        with self._lock:
            self._newest[type(event), event.task] = event
            if self._sending:
                return
            self._sending = True
        threading.Thread(target=self._send, daemon=True, name="progress").start()

    def __reduce__(self) -> tuple[type[_RemoteProgress], tuple[str]]:
        return _RemoteProgress, (self._relay,)

    def _send(self) -> None:
        """Until there was nothing new for a while."""
        while True:
            with self._lock:
                events, self._newest = self._newest, {}
                if not events:
                    self._sending = False
                    return
            for event in events.values():
                self._store(event)
            time.sleep(POLL_S)

    def _store(self, event: ProgressEvent) -> None:
        from overproof.cluster import ray_private

        ray_private.store_value(f"{self._relay}/{uuid.uuid4().hex}", pickle.dumps((time.time(), event)))


class _RelayedProgress:
    """Shows events of this process at once; pickled, it is a `_RemoteProgress`, whose events a thread fetches."""

    def __init__(self, show: Progress) -> None:
        self._show = show
        self._relay = f"overproof-progress/{uuid.uuid4().hex}"
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, event: ProgressEvent) -> None:
        self._show(event)

    def __reduce__(self) -> tuple[type[_RemoteProgress], tuple[str]]:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._fetch, daemon=True, name="progress")
                self._thread.start()
        return _RemoteProgress, (self._relay,)

    def _fetch(self) -> None:
        while True:
            last = self._done.wait(POLL_S)
            for event in self._new_events():
                self._show(event)
            if last:
                return

    def _new_events(self) -> list[ProgressEvent]:
        """Take what was told since: every notice, then of each task the newest event of each type, oldest first."""
        from overproof.cluster import ray_private

        found = ray_private.stored_values(f"{self._relay}/")
        for key in found:
            ray_private.delete_values(key)
        told = sorted((pickle.loads(value) for value in found.values()), key=lambda pair: float(pair[0]))
        notices, newest = list[ProgressEvent](), dict[tuple[type, str], ProgressEvent]()
        for _, event in told:
            if isinstance(event, Notice):
                notices.append(event)
            else:
                newest.pop((type(event), event.task), None)  # so that the newest comes last
                newest[type(event), event.task] = event
        return [*notices, *newest.values()]

    def close(self) -> None:
        """Show what is left, and leave nothing behind."""
        from overproof.cluster import ray_private

        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            ray_private.delete_values(f"{self._relay}/")


@contextmanager
def relay_progress(show: Progress) -> Iterator[Progress]:
    """A picklable `Progress` whose events reach ``show`` in this process."""
    progress = _RelayedProgress(show)
    try:
        yield progress
    finally:
        progress.close()
