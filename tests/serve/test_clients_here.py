"""The product's own clients of servers on this machine: the command line, and a teacher that is served."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from endpoints import KEY, OwnServer, own_server
from overproof import files
from overproof.cli import serve as command
from overproof.cluster import ray_cluster as cluster
from overproof.config import Serve, Served
from overproof.engines.endpoint import Endpoint
from overproof.errors import InputError

PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture(scope="module")
def served(text_package: Path) -> Iterator[OwnServer]:
    with own_server(text_package / "model.gguf") as server:
        yield server


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies that nobody answers at, one of a kind that httpx knows only with a further package."""
    for name in PROXIES:
        monkeypatch.setenv(name, "socks5://127.0.0.1:9" if "all" in name.lower() else "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)


def test_a_served_teacher_here_is_asked_without_proxies_by_a_key_that_ends_in_a_newline(
    served: OwnServer, proxied: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", f"{KEY}\n")
    for url in (served.url, served.url.replace("127.0.0.1", "localhost")):
        endpoint = Endpoint(Served(kind="served", url=url, model="teacher", key_env="TEACHER_KEY"))
        assert endpoint.model_entry()["id"] == "teacher"
        endpoint.close()
    for name in PROXIES[4:]:
        monkeypatch.delenv(name)
    elsewhere = Endpoint(Served(kind="served", url="http://192.0.2.7:8000/v1", model="teacher", retry_s=0))
    with pytest.raises(InputError, match="does not answer"):  # for the proxy does not
        elsewhere.model_entry()


def test_the_example_keeps_to_the_servers_limits_and_asks_no_proxy(
    served: OwnServer, proxied: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OVERPROOF_API_KEY", f"{KEY}\n")
    base = served.url.removesuffix("/v1")
    command.send_example(base, Serve(max_tokens=32))
    output = capsys.readouterr().out.replace("\n", "")
    assert '"max_tokens": 32' in output
    assert "--noproxy" in output
    with pytest.raises(InputError, match=r"refuses the example \(400\): .*at most 32"):
        command.send_example(base, Serve(max_tokens=64))
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/v1/models: "):
        command.send_example("http://127.0.0.1:9", Serve())


def test_of_a_server_whose_keys_are_elsewhere_a_request_is_shown(
    digits_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.print_example("http://127.0.0.1:8001", str(digits_package), Serve())
    output = capsys.readouterr().out.replace("\n", "")
    assert 'http://127.0.0.1:8001/v1/classify -H "Authorization: Bearer $KEY" ' in output
    assert '"model": "digits"' in output


def test_sockets_lie_where_their_paths_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    folder = files.socket_folder("socket", prefix="vllm-")
    assert folder.parent == files.SHORT_TEMP
    assert folder.stat().st_mode & 0o077 == 0
    folder.rmdir()
    for_ray = cluster._ray_temp_dir()
    assert for_ray is not None
    assert len(f"{for_ray}/{cluster.LONGEST_SOCKET}") <= files.MAX_SOCKET_BYTES
    Path(for_ray).rmdir()
    monkeypatch.setattr(files, "SHORT_TEMP", tmp_path / "none")
    with pytest.raises(InputError, match=r"TMPDIR: .*too long for sockets .*; set TMPDIR to a short folder"):
        files.socket_folder("socket", prefix="vllm-")
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert cluster._ray_temp_dir() is None
    folder = files.socket_folder("socket", prefix="vllm-")
    assert folder.parent == Path("/tmp")
    folder.rmdir()


@pytest.mark.trial
def test_a_server_of_this_machine_is_on_loopback_alone_and_no_process_of_it_has_its_key(
    text_package: Path, tmp_path: Path
) -> None:
    """Beside proxies, in a long temporary folder, with a small limit of tokens."""
    deep = tmp_path / ("long-" * 20)
    deep.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    environment |= {
        "OVERPROOF_API_KEY": "a-secret-of-the-trial\n",
        "TMPDIR": str(deep),
        "ALL_PROXY": "socks5://127.0.0.1:9",
    }
    environment |= {"HTTP_PROXY": "http://127.0.0.1:9"}
    words = ["serve", str(text_package), "--set", "port=0", "--set", "max_tokens=32"]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "overproof.cli.main", *words], env=environment, stdout=out, stderr=out
        )
    try:
        while "until Ctrl-C" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        ours = psutil.Process(process.pid)
        processes = [ours, *ours.children(recursive=True)]
        assert any("raylet" in each.name() for each in processes)
        ports = {
            (each.name(), found.laddr.ip)
            for each in processes
            for found in each.net_connections("inet")
            if found.status == psutil.CONN_LISTEN
        }
        assert {ip.removeprefix("::ffff:") for _, ip in ports} == {"127.0.0.1"}, ports
        with_key = [each.name() for each in processes[1:] if "a-secret-of-the-trial" in json.dumps(each.environ())]
        assert with_key == []
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=90)
