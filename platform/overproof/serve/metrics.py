"""Metrics of the gateway, and those of every node, gathered from Ray's agents, in Prometheus' text format."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import httpx
import ray
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


def gather_metrics() -> str:
    """The metrics of every node, as one text; called in a thread, for it waits for the nodes in a loop of its own."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    return merge_metrics(asyncio.run(_read_pages(urls)))


async def _read_pages(urls: Sequence[str]) -> list[str]:
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        replies = await asyncio.gather(*map(client.get, urls), return_exceptions=True)
    return [reply.text for reply in replies if isinstance(reply, httpx.Response)]  # a node may be stopping


def merge_metrics(texts: Iterable[str]) -> str:
    """Ray Serve's metrics and ours out of several texts, each family once: its comments, then its samples of all texts.

    Lines are passed on as they are: to read their labels and numbers takes a hundred times as long, of a lock that the
    event loop needs as well.
    """
    comments: dict[str, list[str]] = {}
    samples: defaultdict[str, list[str]] = defaultdict(list)
    for text in texts:
        family = ""
        own: dict[str, list[str]] = {}
        for line in text.split("\n"):
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                own.setdefault(family, []).append(line)
            elif line and family.startswith(METRIC_PREFIXES):
                samples[family].append(line)
        comments = own | comments
    lines = [line for family, found in samples.items() for line in (*comments[family], *found)]
    return "\n".join(lines) + "\n" if lines else ""
