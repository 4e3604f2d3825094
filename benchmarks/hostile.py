"""Malformed and hostile requests to a server that runs: each is refused, and nothing breaks, leaks or restarts.

    .venv/bin/pip install schemathesis
    .venv/bin/python benchmarks/hostile.py PACKAGE [--requests 10000] [--seed 0]

PACKAGE is a language model's, such as `make demo` leaves in the store. Prints one Markdown table, and the first
requests that were not answered as they should be to stderr; exits with 1 where there are any. About 30 minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.client import HTTPException, HTTPResponse
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import psutil
import ray
from attacks import COMPLETIONS, GOOD, Ask, drawn, encoded, request
from measuring import machine, say, table

from overproof.config import Serve
from overproof.serve import server

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


def serving(port: int) -> dict[tuple[int, float], int]:
    """Resident bytes of what serves: Ray's actors, and who listens."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            name = " ".join(process.cmdline())
            ports = [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            if port in ports or (name.startswith("ray::") and "IDLE" not in name):
                found[process.pid, process.create_time()] = process.memory_info().rss
    return found


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


def schemathesis(base: str, seed: int, examples: int) -> tuple[int, int]:
    """Cases and failures of requests made from the server's own OpenAPI page."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    with tempfile.TemporaryDirectory() as folder:
        command = [_st(), "run", f"{base}/openapi.json", "--checks", checks, "--max-examples", examples, "--seed", seed,
                   "--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--generation-database", "none",
                   "--request-timeout", WAIT_S, "--no-shrink", "--no-color", "--warnings", "off"]  # fmt: skip
        done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
    cases = re.search(r"(\d+) generated", done.stdout)
    failures = re.search(r"(\d+) found", done.stdout)
    if done.returncode:
        say(done.stdout[-6000:] + done.stderr[-2000:])
    return int(cases[1]) if cases else 0, int(failures[1]) if failures else int(done.returncode != 0)


def _st() -> str:
    found = shutil.which("st", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise SystemExit("schemathesis is missing; pip install schemathesis")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="folder or URI")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=100, help="of schemathesis, for each operation")
    given = parser.parse_args()
    _st()
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    settings = Serve(port=0, min_replicas=1, max_replicas=1, slots=SLOTS, max_tokens=256)
    base = server.start_serving(given.package, settings)
    address = (urlsplit(base).hostname or "", urlsplit(base).port or 0)
    free_slots(address)  # so that memory is counted of a server at work
    before, began_s = serving(address[1]), time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        results, stuck = [], 0
        for result in pool.map(partial(once, address, given.seed), range(given.requests)):
            results.append(result)
            stuck += "TimeoutError" in result[2]
            if stuck > MOST_STUCK:
                say(f"{stuck} requests had no answer in {WAIT_S} s; the trial ends here")
                pool.shutdown(cancel_futures=True)
                break
            if len(results) % 500 == 0:
                say(f"{len(results)} of {given.requests} after {time.perf_counter() - began_s:.0f} s")
    seconds = time.perf_counter() - began_s
    cases, failures = schemathesis(base, given.seed, given.examples)
    free, after = free_slots(address), serving(address[1])
    server.stop_serving()
    faults = [wrong for _, _, wrong, _ in results if wrong]
    for wrong in faults[:SHOWN]:
        say(wrong)
    restarts = len(before.keys() ^ after.keys())
    growth_mib = (sum(after.values()) - sum(before.values())) / 2**20
    rows: list[tuple[object, ...]] = []
    for kind in sorted({kind for kind, *_ in results}):
        own = [result for result in results if result[0] == kind]
        count = Counter({2: "2xx", 4: "4xx", 0: "closed"}.get(status // 100, "other") for _, status, _, _ in own)
        slowest = max(seconds for *_, seconds in own)
        wrong_ones = sum(bool(wrong) for _, _, wrong, _ in own)
        counts = [count[came] for came in ("4xx", "2xx", "closed", "other")]
        rows.append((kind, len(own), *counts, wrong_ones, f"{slowest:.1f}"))
    rows.append(("schemathesis", cases, "", "", "", "", failures, ""))
    rows += [(name, "", "", "", "", "", found, "") for name, found in (
        ("processes that ended or began", restarts), (f"slots of {SLOTS} that are lost", SLOTS - free),
        ("MiB of memory more", f"{growth_mib:.0f} ({sum(before.values()) / 2**20:.0f} before)"))]  # fmt: skip
    what = f"{len(results):,} requests by {CLIENTS} clients in {seconds:.0f} s, seed {given.seed}"
    print(f"{machine(settings.threads)}; {what}\n")
    table(("requests", "sent", "4xx", "2xx", "closed", "other", "not as expected", "slowest, s"), rows)
    if faults or failures or not cases or restarts or free < SLOTS or growth_mib > MOST_GROWTH_MIB:
        sys.exit(1)


if __name__ == "__main__":
    main()
