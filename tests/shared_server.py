"""The settings of the server that tests/serve/test_gateway_*.py share, and how they wait for something there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from overproof.config import Serve

# One slot: sequences that share a step may differ in the last digits, and then in a sampled token.
SETTINGS = Serve(port=0, max_replicas=1, cpus_per_replica=0.5, slots=1, max_tokens=256, node_labels={"group": "serve"})
WAIT_S = 90


@dataclass(frozen=True)
class SharedServer:
    """A server of the text package with ``SETTINGS``."""

    url: str
    deployments_file: Path


def wait_until(reached: Callable[[], Any]) -> Any:
    """Poll until something holds, and give it."""
    deadline_s = time.monotonic() + WAIT_S
    while not (found := reached()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return found


def named_replicas() -> list[str]:
    """Names of the actors that are replicas of packages."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["name"].startswith("SERVE_REPLICA::overproof-")]
