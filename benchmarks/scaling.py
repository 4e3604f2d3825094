"""Seconds until replicas follow the load: from none to the first token, from one replica to two, and back to none.

    .venv/bin/python benchmarks/scaling.py PACKAGE [--repeats 5]

PACKAGE is a language model's, such as `make demo` leaves in the store. Prints one Markdown table. The load is six
clients that ask all the time; a replica has one slot. About three minutes.
"""

from __future__ import annotations

import argparse
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import ray
from measuring import machine, say, spread, table
from ray import serve

from overproof.recipe import Serve
from overproof.serve import run

SETTINGS = Serve(
    port=0, min_replicas=0, max_replicas=2, cpus_per_replica=0.5, slots=1, upscale_delay_s=0.5, downscale_delay_s=2.0
)
CLIENTS, WAIT_S = 6, 120
BODY = {"prompt": "import os\n", "max_tokens": 200, "temperature": 1.0}


def replicas() -> int:
    """Those that answer."""
    (application,) = serve.status().applications.values()
    return int(application.deployments["model"].replica_states.get("RUNNING", 0))


def until(reached: Callable[[], bool]) -> float:
    """The seconds that it took."""
    began_s = time.perf_counter()
    while not reached():
        if time.perf_counter() - began_s > WAIT_S:
            raise SystemExit(f"{replicas()} replicas after {WAIT_S} s")
        time.sleep(0.05)
    return time.perf_counter() - began_s


def first_token_s(url: str) -> float:
    began_s = time.perf_counter()
    with httpx.stream("POST", url, json=BODY | {"stream": True}, timeout=WAIT_S, trust_env=False) as reply:
        reply.raise_for_status()
        next(reply.iter_lines())
        return time.perf_counter() - began_s


@contextmanager
def load(url: str) -> Iterator[list[int]]:
    """Clients that ask all the time; yields the status codes that they get."""
    over, codes = threading.Event(), list[int]()

    def ask() -> None:
        with httpx.Client(timeout=WAIT_S, trust_env=False) as client:
            while not over.is_set():
                codes.append(client.post(url, json=BODY).status_code)

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield codes
    finally:
        over.set()
        for thread in threads:
            thread.join()


def once(url: str) -> dict[str, float]:
    until(lambda: replicas() == 0)
    found = {"first token, from none": first_token_s(url), "first token, replica there": first_token_s(url)}
    with load(url) as codes:
        found["second replica"] = until(lambda: replicas() == 2)
    found["none again"] = until(lambda: replicas() == 0)
    found["replies other than 200"] = sum(code != 200 for code in codes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="folder or URI")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    base = run.start(given.package, SETTINGS)
    rows = []
    for repeat in range(given.repeats):
        say(f"repeat {repeat + 1} of {given.repeats}")
        rows.append(once(f"{base}/v1/completions"))
    run.stop()
    print(f"{machine(SETTINGS.threads)}; {given.repeats} times, seconds, medians (least to most)\n")
    table(("what", "s"), [(name, spread(rows, name, 2)) for name in rows[0]])


if __name__ == "__main__":
    main()
