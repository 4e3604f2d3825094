"""What picking the least busy replica costs, beside a search of all of them, by how many there are.

    .venv/bin/python benchmarks/picking.py [--picks 20000] [--repeats 5]

Prints one Markdown table: microseconds to pick a replica for a request and to take note of the end of another one, the
medians of --repeats. Three quarters of all slots are taken. No connection is made.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

from measuring import spread, table

from overproof.serve.router import ReplicaConnection, RoomyReplicas
from overproof.serve.rpc import Connection

SLOTS, LOAD = 4, 0.75


def measured(replicas: int, picks: int, search: bool) -> float:
    """Microseconds of one pick and one end."""
    draw, running = random.Random(0), list[ReplicaConnection]()
    roomy = RoomyReplicas(takes_slot=True)
    everyone = [ReplicaConnection(Connection(None, lambda *_: None, lambda _: None), SLOTS) for _ in range(replicas)]

    def searched() -> ReplicaConnection | None:
        free = [each for each in everyone if each.has_room(True)]
        return min(free, key=lambda each: each.in_flight[True] / each.capacity, default=None)

    pick: Callable[[], ReplicaConnection | None] = searched if search else lambda: roomy.least_busy
    update: Callable[[ReplicaConnection], object] = (lambda _: None) if search else roomy.update

    def begin() -> None:
        replica = pick()
        assert replica is not None
        replica.in_flight[True] += 1
        update(replica)
        running.append(replica)

    for replica in everyone:
        roomy.update(replica)
    for _ in range(int(LOAD * SLOTS * replicas)):
        begin()
    began_s = time.perf_counter()
    for _ in range(picks):
        begin()
        at = draw.randrange(len(running))
        running[at], running[-1] = running[-1], running[at]
        ended = running.pop()
        ended.in_flight[True] -= 1
        update(ended)
    return 1e6 * (time.perf_counter() - began_s) / picks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picks", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    lines = []
    for replicas in (1, 10, 200):
        rows = [
            {name: measured(replicas, given.picks, search) for name, search in (("search", True), ("own", False))}
            for _ in range(given.repeats)
        ]
        lines.append([replicas, spread(rows, "search", 1), spread(rows, "own", 1)])
    table(("replicas", "search of all, µs", "by count, µs"), lines)


if __name__ == "__main__":
    main()
