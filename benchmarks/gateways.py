"""Requests a second through one gateway and through several at one port.

    .venv/bin/python benchmarks/gateways.py [--gateways 1 2 4] [--repeats 3] [--clients 64] [--requests 2000]

Prints one Markdown table. Two replicas of a classifier so small that what is measured are the gateways: GET /v1/models,
which no replica sees, and POST /v1/classify. Clients keep their connections, which the kernel shares out among the
gateways. What bounds the rate is how many cores there are for gateways, replicas and clients; CPU is that of
all the server's processes for each request.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from forge import DEEP, forge_digits
from measuring import interleaved, machine, median, spread, table
from serving import ours
from serving_digits import CLASSIFY, MODELS, classify, models

REPLICAS, SLOTS = 2, 8
TINY = DEEP.model_copy(update={"hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2})


def once(package: Path, gateways: int, given: argparse.Namespace) -> dict[str, Any]:
    found = {}
    with ours("over_http.py", package, 1, SLOTS, REPLICAS, gateways, threads=1) as server:
        for asked, plan in ((CLASSIFY, classify), (MODELS, models)):
            server.ask(plan(8 * given.clients, given.clients))
            many = server.ask(plan(given.requests, given.clients))
            found[asked] = {
                "per_s": given.requests / many["wall_s"],
                "server_cpu_ms": 1e3 * many["server_cpu_s"] / given.requests,
                "client_cpu_ms": 1e3 * many["cpu_s"] / given.requests,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateways", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        package = forge_digits(Path(scratch), TINY)
        starts = {str(count): partial(once, package, count, given) for count in given.gateways}
        found = interleaved(given.repeats, starts)
    print(f"{machine(1)}; {given.requests} requests, {given.clients} clients; medians of {given.repeats}\n")
    lines = [
        [
            asked,
            count,
            spread([row[asked] for row in rows], "per_s", 0),
            f"{median([row[asked] for row in rows], 'server_cpu_ms'):.2f}",
            f"{median([row[asked] for row in rows], 'client_cpu_ms'):.2f}",
        ]
        for asked in (CLASSIFY, MODELS)
        for count, rows in found.items()
    ]
    table(("asked", "gateways", "requests/s", "CPU ms each", "clients' CPU ms"), lines)


if __name__ == "__main__":
    main()
