"""Seconds until replicas follow the load: from none to the first token, from one replica to two, and back to none.

    .venv/bin/python benchmarks/scaling.py PACKAGE [--repeats 5]

PACKAGE is a language model's, such as `make demo` leaves in the store. Prints one Markdown table. The load is six
clients that ask all the time; a replica has one slot. About three minutes.
"""

from __future__ import annotations

import argparse
import logging
import time

import httpx
import ray
from asking import WAIT_S, load, until
from measuring import machine, say, spread, table

from overproof.config import Serve
from overproof.serve import controller, server

SETTINGS = Serve(
    port=0, min_replicas=0, max_replicas=2, cpus_per_replica=0.5, slots=1, upscale_delay_s=0.5, downscale_delay_s=2.0
)
CLIENTS = 6
BODY = {"prompt": "import os\n", "max_tokens": 200, "temperature": 1.0}


def replicas() -> int:
    """Those that answer."""
    (deployment,) = server.call_controller("deployments").models.values()
    return controller.count_replicas(deployment.stable.package)


def first_token_s(url: str) -> float:
    began_s = time.perf_counter()
    with httpx.stream("POST", url, json=BODY | {"stream": True}, timeout=WAIT_S, trust_env=False) as reply:
        reply.raise_for_status()
        next(reply.iter_lines())
        return time.perf_counter() - began_s


def once(url: str) -> dict[str, float]:
    until(lambda: replicas() == 0, "no replica")
    found = {"first token, from none": first_token_s(url), "first token, replica there": first_token_s(url)}
    with load(url, CLIENTS, BODY) as seen:
        found["second replica"] = until(lambda: replicas() == 2, "two replicas")
    found["none again"] = until(lambda: replicas() == 0, "no replica")
    found["replies other than 200"] = sum(each.status != 200 for each in seen)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="folder or URI")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    base = server.start_serving(given.package, SETTINGS)
    rows = []
    for repeat in range(given.repeats):
        say(f"repeat {repeat + 1} of {given.repeats}")
        rows.append(once(f"{base}/v1/completions"))
    server.stop_serving()
    print(f"{machine(SETTINGS.threads)}; {given.repeats} times, seconds, medians (least to most)\n")
    table(("what", "s"), [(name, spread(rows, name, 2)) for name in rows[0]])


if __name__ == "__main__":
    main()
