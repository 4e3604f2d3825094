"""What a server in front of a classifier costs: overproof's, Ray Serve's, LitServe, BentoML, and plain FastAPI.

    .venv/bin/python benchmarks/serving_digits.py [--repeats 5] [--threads 1] [--clients 32] [--requests 1500]
                                                  [--alone 200] [--model deep] [--only NAME...]
                                                  [--peers /tmp/overproof-peers]

Prints one Markdown table. All run one ONNX file with overproof's engine, a vision transformer with fresh weights for
images of 8x8 pixels. --model deep has 3.2 million parameters and 17 tokens an image, 2 to 4 ms of one core, about what
a served classifier takes; one image keeps a core as busy as a batch does. --model wide has 57 million and 5 tokens: a
call waits for its 227 MB of weights, whether it is for one image or for many, which is what batches are for. The
recipe's own is done in 0.1 ms, which would leave only the servers to be compared, as the rows of `GET /v1/models` do.

Every request has one image; LitServe and BentoML put those that wait into batches of at most --clients. Each server is
started for its turn alone and warmed, has one worker, and --threads for each call of the engine; clients are one
process for all servers (`clients.py`). FastAPI makes as many calls at once as it has requests (40 at most), and so
takes more than one core, or one at a time; those that batch make one. Ray Serve's rows are its three ways in, each in
front of overproof's API in the replica, and of one endpoint without it, with overproof's batches. CPU is the server's,
with every process of Ray's. About twenty minutes; needs the environments that `benchmarks/peers.py` makes, or makes
them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import median as middle
from typing import Any

import peers
from forge import DEEP, WIDE, forge_digits
from measuring import interleaved, machine, median, spread, table
from serving import SERVERS, Server, ours, theirs

PIXELS, SLOTS, WAIT_S = 64, 8, 0.005
THREADS_OF_FASTAPI = 40  # its own default
OVERPROOF, LITSERVE, BENTOML = "overproof", "LitServe", "BentoML"
FASTAPI, SERIAL = "FastAPI, uvicorn: one image a call", "the same, one call at a time"
RAY_WAYS = {"HAProxy": "haproxy", "direct ingress": "direct", "its proxy": "proxy"}
RAY_APPS = {"routes": "overproof's API in the replica", "plain": "a FastAPI endpoint"}
CLASSIFY, MODELS = "POST classify", "GET models"


def classify(count: int, clients: int) -> dict[str, Any]:
    """Different images, the same ones each time."""
    draw = random.Random(count)
    bodies = [{"images": [[round(draw.random(), 4) for _ in range(PIXELS)]]} for _ in range(count)]
    return {"method": "POST", "path": "/v1/classify", "bodies": bodies, "clients": clients, "stream": False}


def models(count: int, clients: int) -> dict[str, Any]:
    return {"method": "GET", "path": "/v1/models", "bodies": [None] * count, "clients": clients, "stream": False}


def once(
    start: Callable[[], AbstractContextManager[Server]],
    plans: dict[str, Callable[[int, int], dict[str, Any]]],
    given: argparse.Namespace,
) -> dict[str, Any]:
    found = {}
    with start() as server:
        for asked, plan in plans.items():
            server.ask(plan(8 * given.clients, given.clients))
            alone = server.ask(plan(given.alone, 1))
            many = server.ask(plan(given.requests, given.clients))
            found[asked] = {
                "per_s": given.requests / many["wall_s"],
                "alone_ms": 1e3 * middle(alone["whole_s"]),
                "server_cpu_ms": 1e3 * many["server_cpu_s"] / given.requests,
                "client_cpu_ms": 1e3 * many["cpu_s"] / given.requests,
            }
    return found


def measured(folder: Path, given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    package = forge_digits(folder, WIDE if given.model == "wide" else DEEP)
    threads, own = given.threads, given.peers.absolute()
    onnx, log = package / "model.onnx", folder / "log"

    def wanted(*names: str) -> bool:
        return not given.only or any(part in name for name in names for part in given.only)

    lit = peers.litserve(own) if wanted(FASTAPI, SERIAL, LITSERVE) else None
    bento = peers.bentoml(own) if wanted(BENTOML) else None
    fast, serial = (  # where uvloop and httptools are, as for LitServe
        [lit, SERVERS / "fast_digits.py", onnx, threads, calls, "{port}"] for calls in (THREADS_OF_FASTAPI, 1)
    )
    batched = [lit, SERVERS / "lit_digits.py", onnx, threads, "{port}", given.clients, WAIT_S]
    adaptive = [bento, "-m", "bentoml", "serve", "bento_digits:Digits", "--working-dir", SERVERS]
    adaptive += ["--host", "127.0.0.1", "--port", "{port}"]
    settings = {"ONNX": str(onnx), "THREADS": str(threads), "MOST_IMAGES": str(given.clients)}
    settings |= {"BENTOML_DO_NOT_TRACK": "true", "BENTOML_HOME": str(folder / "bentoml")}
    started = partial(theirs, threads=threads, log=log)
    both: dict[str, Callable[[int, int], dict[str, Any]]] = {CLASSIFY: classify, MODELS: models}
    one: dict[str, Callable[[int, int], dict[str, Any]]] = {CLASSIFY: classify}
    starts: dict[str, tuple[Callable[[], AbstractContextManager[Server]], Any]] = {
        OVERPROOF: (partial(ours, "over_http.py", package, threads, SLOTS, 1, threads=threads), both),
        FASTAPI: (partial(started, fast, "/v1/models"), both),
        SERIAL: (partial(started, serial, "/v1/models"), one),
        LITSERVE: (partial(started, batched, "/health"), one),
        BENTOML: (partial(started, adaptive, "/readyz", **settings), one),
    }
    for name, way in RAY_WAYS.items():
        for app in ("routes", "plain"):
            start = partial(ours, "ray_digits.py", package, threads, way, app, threads=threads)
            starts[f"Ray Serve, {name}: {RAY_APPS[app]}"] = start, both
    starts = {name: found for name, found in starts.items() if wanted(name)}
    return interleaved(
        given.repeats, {name: partial(once, start, plans, given) for name, (start, plans) in starts.items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--alone", type=int, default=200)
    parser.add_argument("--model", choices=("deep", "wide"), default="deep")
    parser.add_argument("--only", nargs="*", help="parts of the names of rows; the first row is what others divide by")
    parser.add_argument("--peers", type=Path, default=Path("/tmp/overproof-peers"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measured(Path(scratch), given)
    print(f"{machine(given.threads)}; {given.model}; {given.requests} requests; medians of {given.repeats}\n")
    lines = []
    for asked in (CLASSIFY, MODELS):
        base = [row[asked] for row in next(iter(found.values()))]
        for name, both in found.items():
            if asked not in both[0]:
                continue
            rows = [row[asked] for row in both]
            ratios = [{"ratio": row["per_s"] / first["per_s"]} for row, first in zip(rows, base, strict=True)]
            lines.append(
                [
                    asked,
                    name,
                    f"{median(rows, 'per_s'):,.0f}",
                    spread(ratios, "ratio", 2),
                    spread(rows, "alone_ms", 2),
                    f"{median(rows, 'server_cpu_ms'):.2f}",
                    f"{median(rows, 'client_cpu_ms'):.2f}",
                ]
            )
    many = f"requests/s, {given.clients} clients"
    table(
        ("asked", "server", many, f"÷ {next(iter(found))}", "one client, ms", "CPU ms each", "clients' CPU ms"), lines
    )


if __name__ == "__main__":
    main()
