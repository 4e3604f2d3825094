"""A package behind overproof's own HTTP, until the standard input ends.

    python over_http.py PACKAGE THREADS SLOTS REPLICAS [GATEWAYS]

Prints ``{"url": ...}`` when it answers. Its processes run at the priority of the servers it stands beside; Ray's would
otherwise run at nice 15.
"""

from __future__ import annotations

import json
import logging
import os
import sys

import ray

from overproof.config import Serve
from overproof.serve import server

CPUS_PER_REPLICA = 0.25  # reserved, not used: replicas are placed whatever the machine has


def main() -> None:
    package, (threads, slots, replicas, gateways) = sys.argv[1], map(int, (*sys.argv[2:], 1)[:4])
    os.environ.update(RAY_worker_niceness="0")
    ray.init(
        address="local",
        num_cpus=replicas + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    settings = Serve(
        port=0,
        gateways=gateways,
        threads=threads,
        slots=slots,
        min_replicas=replicas,
        max_replicas=replicas,
        cpus_per_replica=CPUS_PER_REPLICA,
    )
    print(json.dumps({"url": server.start_serving(package, settings)}), flush=True)
    sys.stdin.read()
    server.stop_serving()
    ray.shutdown()


if __name__ == "__main__":
    main()
