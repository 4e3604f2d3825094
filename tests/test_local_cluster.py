"""`overproof up` and `overproof down`: a cluster of this user on this machine, beside any other, and its end."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from overproof.cluster import local_cluster
from overproof.errors import InputError

ATTACH = """
from overproof.cluster import ray_cluster
print(ray_cluster.connect().where)
import ray
class Actor:
    def __init__(self, _): pass
    def ask(self): return "answered"
actor = ray.remote(max_restarts=-1)(Actor).remote(ray.put(bytes(1 << 20)))  # of which Ray's core warns
print(ray.get(actor.ask.remote()))
"""


def command(*argv: str, state: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a user types, in a shell that knows no cluster but that of the environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    inherited |= {"XDG_STATE_HOME": str(state), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    return subprocess.run(
        [sys.executable, *argv], env=inherited, capture_output=True, text=True, check=False, timeout=120
    )


def overproof(*argv: str, state: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return command("-m", "overproof.cli.main", *argv, state=state, **environment)


def exported(printed: str) -> dict[str, str]:
    """What a shell that evaluates it has in its environment."""
    lines = [shlex.split(line) for line in printed.splitlines()]
    assert {words[0] for words in lines} == {"export"}
    return dict(word.split("=", 1) for words in lines for word in words[1:])


def of_session(pid: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    local_cluster.stop(tmp_path / "overproof")


def test_a_cluster_comes_up_beside_another_is_used_killed_started_again_and_ended(state: Path) -> None:
    done = overproof("up", "--cpus", "3", state=state, OVERPROOF_API_KEY="secret-of-a-shell")
    assert done.returncode == 0, done.stderr
    environment = exported(done.stdout)
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert re.search(r"a cluster is up at 127\.0\.0\.1:\d+; dashboard http://127\.0\.0\.1:\d+", done.stderr)
    found = local_cluster.running(state / "overproof")
    assert found is not None
    processes = of_session(found.pid)
    assert len(processes) > 4
    ports = [each for process in processes for each in process.net_connections("tcp") if each.status == "LISTEN"]
    assert {each.laddr.ip.removeprefix("::ffff:") for each in ports} == {"127.0.0.1"}
    assert not any("OVERPROOF_API_KEY" in process.environ() for process in processes)

    used = command("-c", ATTACH, state=state, **environment)
    beside = command("-c", ATTACH, state=state)  # a local one, as `overproof run` starts
    for done, cpus in ((used, "3 CPUs"), (beside, "4 CPUs")):
        assert cpus in done.stdout, done.stderr
        assert "answered" in done.stdout
        assert ".cc:" not in done.stderr

    again = overproof("up", state=state, RAY_AUTH_TOKEN="of another cluster")
    assert again.stdout.splitlines()[0] == "unset RAY_AUTH_TOKEN"
    assert exported(again.stdout.split("\n", 1)[1]) == environment
    assert "was up already, with 3 CPUs" in again.stderr

    os.kill(found.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 20
    while local_cluster.running(state / "overproof") and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert local_cluster.running(state / "overproof") is None
    second, started = local_cluster.start(state / "overproof", 1)
    assert started
    assert second.address != found.address
    assert not of_session(found.pid)  # what the killed one left behind

    down = overproof("down", state=state)
    assert set(down.stdout.split()) == {"unset", *environment}
    assert not of_session(second.pid)
    assert local_cluster.running(state / "overproof") is None
    assert "no cluster of `overproof up` runs here" in overproof("down", state=state).stderr


def test_another_process_with_its_number_is_not_ended(state: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as other:
        folder = state / "overproof"
        folder.mkdir()
        (folder / local_cluster.STATE).write_text(
            f'{{"pid": {other.pid}, "started_s": 1.0, "address": "", "dashboard": "", "cpus": 1, "folder": ""}}'
        )
        assert local_cluster.running(folder) is None
        assert local_cluster.stop(folder) is None
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
        other.kill()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": "x"}', '{"pid": 1}'])
def test_a_broken_state_is_no_cluster(content: str, state: Path) -> None:
    (state / local_cluster.STATE).write_text(content)
    assert local_cluster.running(state) is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/overproof: .*set XDG_STATE_HOME"):
        local_cluster.start(tmp_path / "file/overproof", 1)
