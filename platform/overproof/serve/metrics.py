"""Metrics of the gateway, and those of every node, gathered from Ray's agents, in Prometheus' text format."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import httpx
import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray.util.metrics import Counter, Gauge, Histogram

from overproof.serve.async_engine import Work
from overproof.serve.router import ReplicaLoad

METRIC_PREFIXES = ("ray_serve_", "ray_overproof_")
TIMEOUT_S = 5
FIRST_EVENT_BUCKETS_S = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]


class ServeMetrics:
    """What the gateway adds to Ray Serve's own metrics."""

    def __init__(self) -> None:
        self._tokens = Counter("overproof_tokens", "Tokens read and generated.", ("package", "kind"))
        self._first_event = Histogram(
            "overproof_first_event_seconds", "From a request to its first event.", FIRST_EVENT_BUCKETS_S, ("package",)
        )
        self._replicas = Gauge("overproof_replicas", "Replicas that take requests.", ("package",))
        self._requests = Gauge("overproof_requests", "Requests that run, or wait for a replica.", ("package", "state"))
        self._judged = Counter(
            "overproof_judged_requests", "Requests by which a version is judged.", ("package", "failed")
        )
        self._compared = Counter(
            "overproof_comparisons", "What a candidate was asked beside the stable version.", ("package", "agreed")
        )

    def on_work(self, package: str, work: Work) -> None:
        """Count the tokens of a request."""
        for kind, count in (("prompt", work.prompt_tokens), ("completion", work.completion_tokens)):
            if count:
                self._tokens.inc(count, {"package": package, "kind": kind})

    def on_loads(self, loads: Mapping[str, ReplicaLoad]) -> None:
        """Set the load of each package."""
        for package, load in loads.items():
            self._replicas.set(load.replicas, {"package": package})
            self._requests.set(load.running, {"package": package, "state": "running"})
            self._requests.set(load.waiting, {"package": package, "state": "waiting"})

    def on_judged(self, package: str, failed: bool) -> None:
        """Count a request by which a version is judged."""
        self._judged.inc(1, {"package": package, "failed": str(failed).lower()})

    def on_comparison(self, package: str, agreed: bool) -> None:
        """Count what a candidate and the stable version were asked at the same time."""
        self._compared.inc(1, {"package": package, "agreed": str(agreed).lower()})

    def on_first_event(self, package: str, seconds: float) -> None:
        """Observe the seconds to the first event of a stream."""
        self._first_event.observe(seconds, {"package": package})


async def gather_metrics() -> str:
    """The metrics of every node, as one text."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        requests = (client.get(f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics") for n in nodes)
        replies = await asyncio.gather(*requests, return_exceptions=True)
    pages = [reply.text for reply in replies if isinstance(reply, httpx.Response)]  # a node may be stopping
    return await asyncio.to_thread(merge_metrics, pages)


def merge_metrics(texts: Iterable[str]) -> str:
    """Ray Serve's metrics and ours out of several texts, each family once."""
    families: dict[str, Metric] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            if family.name.startswith(METRIC_PREFIXES):
                found = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                found.samples += family.samples
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_FamilyCollector(families))
    return generate_latest(registry).decode()


class _FamilyCollector:
    def __init__(self, families: dict[str, Any]) -> None:
        self._families = families

    def collect(self) -> Iterator[Any]:
        yield from self._families.values()
