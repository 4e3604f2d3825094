"""Malformed and hostile requests to a server that runs: each is refused, and nothing breaks, leaks or restarts."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.client import HTTPException, HTTPResponse
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from hostile_requests import COMPLETIONS, GOOD, Ask, drawn, encoded, request
from live_server import HOST, live_server, memory_mib, serving_processes

from packing import make_package

pytestmark = pytest.mark.trial

REQUESTS, SEED, EXAMPLES = 10_000, 0, 30  # examples of schemathesis are of each operation
SLOTS, CLIENTS, WAIT_S, PROMPT_S, ROUNDS = 4, 16, 60, 15, 10
MOST_GROWTH_MIB, MOST_STUCK, SHOWN = 256, 3 * CLIENTS, 20


def sent(address: tuple[str, int], ask: Ask, seed: int) -> bytes:
    """What is answered until the server closes; nothing where the client left."""
    answer = bytearray()
    with socket.create_connection(address, timeout=WAIT_S) as connection, suppress(ConnectionError):
        with suppress(ConnectionError):  # a server that has seen enough answers and closes; the answer may be there
            connection.sendall(ask.raw)
            if ask.gone == "half":
                time.sleep(random.Random(seed).random())
                return b""
            if ask.kind == "broken HTTP":  # else a server waits for the rest, as it may
                connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(1 << 16):
            answer += data
            if ask.gone == "event" and b"data: " in answer:
                break
    return bytes(answer)


def answered(raw: bytes, method: str) -> tuple[int, bytes]:
    """Status and body; status 0 where nothing came."""
    if not raw:
        return 0, b""
    response = HTTPResponse(SimpleNamespace(makefile=lambda *_: BytesIO(raw)), method=method)  # type: ignore[arg-type]
    response.begin()
    return response.status, response.read()


def fault(ask: Ask, raw: bytes) -> tuple[int, str]:
    """The status, and what is wrong with the answer."""
    method = ask.raw.partition(b" ")[0].decode("latin-1")
    try:
        status, body = answered(raw, method)
    except HTTPException as error:
        if ask.gone != "event":
            return 0, f"the answer is no HTTP: {error!r}"
        status, body = int(raw.split(b" ", 2)[1]), b""
    allowed = {"200": [2], "4xx": [4], "200 or 4xx": [2, 4], "4xx or closed": [0, 4], "left": [0]}[ask.expected]
    if status // 100 not in allowed:
        return status, f"expected {ask.expected}"
    if ask.expected == "4xx or closed":
        return status, "a second request was answered" if b"HTTP/1.1 2" in raw else ""
    return status, "the body is no error" if status >= 400 and method != "HEAD" and not _explains(body) else ""


def _explains(body: bytes) -> bool:
    try:
        return bool(json.loads(body)["error"]["message"].strip())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def once(address: tuple[str, int], seed: int, number: int) -> tuple[str, int, str, float]:
    """Kind, status, fault and seconds of one request."""
    ask, began_s = drawn(seed, number), time.perf_counter()
    try:
        raw = sent(address, ask, number)
        status, wrong = fault(ask, raw)
    except OSError as error:
        raw, status, wrong = b"", 0, repr(error)
    seconds = time.perf_counter() - began_s
    if wrong:
        found = f"found {raw[:300]!r} after {seconds:.1f} s for {ask.raw[:600]!r}"
        wrong = f"request {number}, {ask.kind}: {wrong}, {found}"
    return ask.kind, status, wrong, seconds


def at_once(address: tuple[str, int]) -> tuple[int, int]:
    """Of as many streams as there are slots: how many end well and in time, and how many were written at one time."""
    raw = request(COMPLETIONS, encoded(GOOD[COMPLETIONS] | {"max_tokens": 256, "temperature": 1.0, "stream": True}))

    def stream(_: int) -> tuple[float, float]:
        with socket.create_connection(address, timeout=PROMPT_S) as connection:
            connection.sendall(raw)
            data, began_s = b"", 0.0
            while part := connection.recv(1 << 16):
                data += part
                began_s = began_s or (time.perf_counter() if b"data: " in data else 0.0)
        return (began_s, time.perf_counter()) if b"data: [DONE]" in data else (0.0, 0.0)

    with ThreadPoolExecutor(SLOTS) as pool:
        spans = [span for span in pool.map(stream, range(SLOTS)) if span[0]]
    return len(spans), max((sum(a <= start <= b for a, b in spans) for start, _ in spans), default=0)


def free_slots(address: tuple[str, int]) -> int:
    """Streams written at one time, the most of some rounds: a small model may be done before all have begun."""
    most = 0
    for _ in range(ROUNDS):
        with suppress(OSError):
            ended, together = at_once(address)
            most = max(most, together if ended == SLOTS else 0)
        if most == SLOTS:
            break
    return most


def rows_of(results: list[tuple[str, int, str, float]]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for kind in sorted({kind for kind, *_ in results}):
        own = [result for result in results if result[0] == kind]
        count = Counter({2: "2xx", 4: "4xx", 0: "closed"}.get(status // 100, "other") for _, status, _, _ in own)
        slowest = max(seconds for *_, seconds in own)
        counts = [count[came] for came in ("4xx", "2xx", "closed", "other")]
        rows.append((kind, len(own), *counts, sum(bool(wrong) for _, _, wrong, _ in own), f"{slowest:.1f}"))
    return rows


@pytest.fixture(scope="module")
def address(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    folder = tmp_path_factory.mktemp("hostile")
    with live_server(make_package("text", folder / "store"), ray_cluster, folder / "log") as port:
        yield HOST, port


def test_hostile_requests_are_refused_and_nothing_breaks(
    address: tuple[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each as it should be; the same processes, with all slots, and little more memory, in the end."""
    free_slots(address)  # so that memory is counted of a server at work
    processes = serving_processes()
    before_mib = memory_mib(processes)
    with ThreadPoolExecutor(CLIENTS) as pool:
        results, stuck = list[tuple[str, int, str, float]](), 0
        for result in pool.map(partial(once, address, SEED), range(REQUESTS)):
            results.append(result)
            stuck += "TimeoutError" in result[2]
            if stuck > MOST_STUCK:
                pool.shutdown(cancel_futures=True)
                break
    free, growth_mib = free_slots(address), memory_mib(processes) - before_mib
    with capsys.disabled():
        print("\n| requests | sent | 4xx | 2xx | closed | other | not as expected | slowest, s |\n|" + "---|" * 8)
        for row in rows_of(results):
            print("| " + " | ".join(map(str, row)) + " |")
        print(f"\n{free} of {SLOTS} slots; {growth_mib:.0f} MiB more, of {before_mib:.0f}")
    assert [wrong for _, _, wrong, _ in results if wrong][:SHOWN] == []
    assert len(results) == REQUESTS
    assert serving_processes() == processes
    assert free == SLOTS
    assert growth_mib < MOST_GROWTH_MIB


def test_requests_made_from_the_servers_own_page_are_answered_as_it_says(
    address: tuple[str, int], tmp_path: Path
) -> None:
    """By schemathesis, which is no dependency of the repository: `pip install schemathesis` puts it on the PATH."""
    command = shutil.which("schemathesis") or shutil.which("st")
    if command is None:
        pytest.skip("schemathesis is not on the PATH")
    processes = serving_processes()
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    words = ["run", f"http://{HOST}:{address[1]}/openapi.json", "--checks", checks, "--max-examples", EXAMPLES,
             "--seed", SEED, "--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-shrink",
             "--generation-database", "none", "--request-timeout", WAIT_S, "--no-color",
             "--warnings", "off"]  # fmt: skip
    done = subprocess.run([command, *map(str, words)], cwd=tmp_path, capture_output=True, text=True)
    cases = re.search(r"(\d+) generated", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert cases
    assert int(cases[1]) >= EXAMPLES
    assert serving_processes() == processes
