"""SIGKILL of everything that serves, under load, and five times more load than there is room for.

    .venv/bin/python benchmarks/faults.py PACKAGE [--kills 5] [--seconds 60]

PACKAGE is a language model's, such as `make demo` leaves in the store. First a replica, the gateway, our controller
and Ray Serve's are killed in turn, ``--kills`` times each, while clients of OpenAI's Python package ask, half of
them for streams; they try again as docs/serving.md says. Then requests come at five times the rate that the server
keeps up with. Prints two Markdown tables, and exits with 1 where a client sees a failure, or a reply is neither 2xx
nor 429.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import httpx
import openai
import ray
from asking import BODY, WAIT_S, at_once, load, processes, resident_mb, until
from measuring import machine, say, spread, table

from overproof.config import Serve
from overproof.serve import server

SETTINGS = Serve(port=0, min_replicas=2, max_replicas=2, cpus_per_replica=0.5, slots=2, downscale_delay_s=600)
CLIENTS, RETRIES, TIMES = 4, 10, 5
PAUSE_S = 3.0
LONG = BODY | {"max_tokens": 250}  # so that five times as many are not too many for the clients
VICTIMS = {"replica": "model", "gateway": "gateway", "controller": "controller", "Serve controller": "serve controller"}


@contextmanager
def patient(base: str) -> Iterator[dict[str, list[Any]]]:
    """Clients that ask all the time and try again; yields what went well, what was tried again, and what failed."""
    seen = {"done": list[Any](), "again": list[Any](), "failed": list[Any]()}

    def once(client: openai.OpenAI, stream: bool) -> None:
        asked: Any = {"model": client.models.list().data[0].id, **BODY}
        if stream:
            events = list(client.completions.create(**asked, stream=True))
            assert events[-1].choices[0].finish_reason
        else:
            assert client.completions.create(**asked).choices[0].finish_reason

    def ask(number: int, over: threading.Event) -> None:
        with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=RETRIES, timeout=WAIT_S) as client:
            while not over.is_set():
                for attempt in range(RETRIES):
                    try:
                        once(client, stream=number % 2 == 0)
                        seen["done"].append(number)
                        break
                    except (openai.APIError, httpx.TransportError) as error:  # a stream that breaks off
                        seen["again"].append(repr(error))
                        time.sleep(min(8.0, 0.5 * 2**attempt))
                else:
                    seen["failed"].append(seen["again"][-1])

    with at_once(CLIENTS, ask):
        yield seen


def answers(base: str) -> bool:
    try:
        return httpx.post(f"{base}/v1/completions", json=BODY | {"max_tokens": 1}, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def killed(base: str, name: str, count: int) -> float:
    """Kill one process; the seconds until there are as many as before, and a request is answered."""
    before = processes()[name]
    os.kill(before[0], signal.SIGKILL)

    def back() -> bool:
        try:
            now = processes()[name]
        except Exception:  # the controller is away
            return False
        return len(now) == count and before[0] not in now and answers(base)

    return until(back, f"a new {name}")


def kills(base: str, times: int) -> tuple[list[tuple[object, ...]], bool]:
    rows, failed = [], False
    for victim, name in VICTIMS.items():
        found, count = [], len(processes()[name])
        with patient(base) as seen:
            for number in range(times):
                say(f"{victim}: kill {number + 1} of {times}")
                time.sleep(PAUSE_S)
                found.append({"s": killed(base, name, count)})
        failed = failed or bool(seen["failed"])
        rows.append((victim, times, spread(found, "s", 1), len(seen["done"]), len(seen["again"]), len(seen["failed"])))
    return rows, failed


async def flood(url: str, rate: float, seconds: float) -> list[tuple[int, float]]:
    """Requests at a rate that does not wait for replies; status codes and durations."""
    found: list[tuple[int, float]] = []

    async def ask(client: aiohttp.ClientSession) -> None:
        began_s = time.perf_counter()
        try:
            async with client.post(url, json=LONG) as reply:
                await reply.read()
                status = reply.status
        except (aiohttp.ClientError, TimeoutError):
            status = 0
        found.append((status, time.perf_counter() - began_s))

    # httpx looks through all of its connections for each request, and so many are open here.
    limits = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(WAIT_S)}
    async with aiohttp.ClientSession(**limits) as client:
        tasks, began_s = [], time.perf_counter()
        while (now_s := time.perf_counter() - began_s) < seconds:
            while len(tasks) < rate * now_s:
                tasks.append(asyncio.create_task(ask(client)))
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
    return found


def overload(base: str, seconds: float) -> tuple[list[tuple[object, ...]], bool]:
    url = f"{base}/v1/completions"
    with load(url, SETTINGS.slots * SETTINGS.max_replicas, LONG) as seen:
        time.sleep(10)
    rate, usual_s = len(seen) / 10, statistics.median(each.seconds for each in seen)
    before_mb, peaks, over = resident_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            peaks.append(resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    say(f"{TIMES} times {rate:.1f} requests a second for {seconds:.0f} s")
    found = asyncio.run(flood(url, TIMES * rate, seconds))
    over.set()
    watcher.join()
    codes = Counter(status for status, _ in found)
    accepted = sorted(s for status, s in found if status == 200)
    refused = sorted(s for status, s in found if status == 429) or [0.0]
    rows: list[tuple[object, ...]] = [
        ("requests a second that it keeps up with", f"{rate:.1f}"),
        ("requests sent", len(found)),
        ("replies 2xx / 429 / other", f"{codes[200]} / {codes[429]} / {len(found) - codes[200] - codes[429]}"),
        ("accepted a second", f"{codes[200] / seconds:.1f}"),
        ("seconds of an accepted one without overload, median", f"{usual_s:.2f}"),
        ("with it, median / 95 %", f"{accepted[len(accepted) // 2]:.2f} / {accepted[int(len(accepted) * 0.95)]:.2f}"),
        ("seconds of a refusal, median", f"{refused[len(refused) // 2]:.3f}"),
        ("resident MB of all that serves: before, most", f"{before_mb:.0f}, {max(peaks):.0f}"),
    ]
    return rows, set(codes) - {200, 429} != set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="folder or URI")
    parser.add_argument("--kills", type=int, default=5, help="of each; 0 leaves them out")
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    base = server.start_serving(given.package, SETTINGS)
    failed = False
    print(f"{machine(SETTINGS.threads)}; {CLIENTS} clients, {SETTINGS.max_replicas} replicas\n")
    if given.kills:
        rows, failed = kills(base, given.kills)
        table(("killed", "times", "s until all is back", "requests done", "tried again", "failed"), rows)
        print(flush=True)
    more, other = overload(base, given.seconds)
    server.stop_serving()
    table(("overload", ""), more)
    sys.exit(failed or other)


if __name__ == "__main__":
    main()
