"""A Ray cluster on this machine that outlives the command that starts it: `overproof up` and `overproof down`.

It is a process of its own, which starts Ray's daemons at 127.0.0.1, behind a token of this user, and ends them when it
is told to. `ray start` would take ports that other clusters of the machine use, and `ray stop` end theirs as well.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
from pyarrow import fs

from overproof.cluster.ray_cluster import OBJECT_STORE_BYTES
from overproof.errors import InputError
from overproof.files import atomic_write

STATE, TOKEN, LOG, LOCK = "cluster.json", "token", "cluster.log", "lock"
TOKEN_BYTES = 32
START_TIMEOUT_S, STOP_TIMEOUT_S = 120.0, 30.0
POLL_S = 0.1
LOGGED = 5  # lines of a failed start that are shown
# Not for every process of a cluster to inherit; and what would count for more than the token of this one.
LEFT_OUT = ("OVERPROOF_API_KEY", "RAY_ADDRESS", "RAY_AUTH_TOKEN")


@dataclass(frozen=True)
class LocalCluster:
    """A cluster that runs on this machine."""

    pid: int
    started_s: float  # of the process, since the epoch: another one may get its number later
    address: str
    dashboard: str  # HOST:PORT
    cpus: int
    folder: str

    @property
    def environment(self) -> dict[str, str]:
        """What processes have in their environment to use it."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{self.folder}/{TOKEN}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray looks for 127.0.0.1 at another address of the machine
        }


def state_folder() -> Path:
    """Where this user's cluster has its token, its log and its address."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "overproof"


def recorded(folder: Path) -> LocalCluster | None:
    """The cluster whose state lies there, whether it runs or not."""
    try:
        return LocalCluster(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def running(folder: Path) -> LocalCluster | None:
    """The cluster whose state lies there; None where none runs."""
    found = recorded(folder)
    return found if found is not None and _status(found) == "running" else None


def _status(cluster: LocalCluster) -> Literal["running", "ended", "another process"]:
    """Of the process with the number of a cluster's head."""
    try:
        process = psutil.Process(cluster.pid)
        if abs(process.create_time() - cluster.started_s) > 1:
            return "another process"
        return "ended" if process.status() == psutil.STATUS_ZOMBIE else "running"
    except psutil.NoSuchProcess:
        return "ended"


def start(folder: Path, cpus: int) -> tuple[LocalCluster, bool]:
    """The cluster whose state lies in a folder, and whether it was started just now.

    Raises:
        InputError: it does not come up; the end of its log is in the message. The folder cannot be written.
    """
    with _locked(folder):
        if there := running(folder):
            return there, False
        _forget(folder)
        atomic_write(fs.LocalFileSystem(), str(folder / TOKEN), secrets.token_hex(TOKEN_BYTES).encode(), private=True)
        settings = LocalCluster(0, 0.0, "", "", cpus, str(folder)).environment
        settings = os.environ | settings | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        settings = {name: value for name, value in settings.items() if name not in LEFT_OUT}
        began_s = time.time()
        with (folder / LOG).open("wb") as log:
            head = subprocess.Popen(
                [sys.executable, "-m", __name__, str(folder), str(cpus)],
                env=settings, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while (found := running(folder)) is None:
                if head.poll() is not None or time.monotonic() > deadline_s:
                    said = (folder / LOG).read_text(errors="replace").splitlines()[-LOGGED:]
                    raise InputError("no cluster came up on this machine:\n" + "\n".join(said))
                time.sleep(POLL_S)
        except BaseException:
            _end(head.pid, began_s)
            raise
        return found, True


def stop(folder: Path) -> LocalCluster | None:
    """End the cluster whose state lies there, and all that runs on it; None where none runs."""
    if not (folder / STATE).exists():
        return None
    with _locked(folder):
        found = running(folder)
        if found is not None:
            _end(found.pid, found.started_s)
        _forget(folder)
        return found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise InputError(
            f"{folder}: {error.strerror}; expected a folder you may write to: set XDG_STATE_HOME"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _end(pid: int, started_s: float) -> None:
    """End a head in order, and what it leaves behind."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess, psutil.TimeoutExpired):
        process = psutil.Process(pid)
        os.kill(pid, signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)
    _kill_session(pid, started_s)


def _forget(folder: Path) -> None:
    """Delete the state, and end what a head that was killed left behind."""
    gone = recorded(folder)
    if gone is not None and _status(gone) == "ended":  # a number that is taken again has left no session
        _kill_session(gone.pid, gone.started_s)
    (folder / STATE).unlink(missing_ok=True)


def _kill_session(pid: int, started_s: float) -> None:
    """Kill the processes of a head's session: Ray's daemons, and the workers they started."""
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess, psutil.AccessDenied):
            if os.getsid(process.pid) == pid and process.create_time() > started_s - 1:
                process.kill()


def _run_head(folder: Path, cpus: int) -> None:
    """Be the head until SIGTERM, or Ctrl-C."""
    from overproof.cluster import ray_private

    ended = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: ended.set())
    with ray_private.local_head(cpus, OBJECT_STORE_BYTES) as (address, dashboard):
        this = psutil.Process()
        found = LocalCluster(this.pid, this.create_time(), address, dashboard, cpus, str(folder))
        atomic_write(fs.LocalFileSystem(), str(folder / STATE), json.dumps(asdict(found)).encode(), private=True)
        ended.wait()


if __name__ == "__main__":
    _run_head(Path(sys.argv[1]), int(sys.argv[2]))
