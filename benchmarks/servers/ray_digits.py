"""A package of a classifier behind Ray Serve's own ways in, until the standard input ends.

    python ray_digits.py PACKAGE THREADS WAY APP

WAY is ``proxy`` (Ray Serve's HTTP proxy, which calls a replica through a handle), ``haproxy`` (HAProxy, which Ray
starts, passes requests on to the HTTP port of a replica) or ``direct`` (that port, with nothing in front). APP is
``plain`` (an endpoint of FastAPI and nothing else, the fastest way to write it) or ``routes`` (overproof's API, with
its checks, in the replica). One replica, the engine and its batches are overproof's. Prints ``{"url": ...}`` when it
answers; its processes run at the priority of the servers it stands beside.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from fast_digits import Images, Reply  # here, for FastAPI looks annotations up in the module

from overproof.serve.net import free_port

ARGUMENTS = "DIGITS_ARGUMENTS"  # in the environment of the replica
HOST, START_S, MOST_ONGOING = "127.0.0.1", 60, 1000
MODELS: dict[str, object] = {
    "object": "list",
    "data": [{"id": "forged", "object": "model", "created": 1, "owned_by": "x" * 400}],
}


def plain_app(engine: Any) -> Any:
    import numpy as np
    from fastapi import FastAPI

    app = FastAPI()

    async def classify(asked: Images) -> Reply:
        probabilities_BC = np.exp(await engine.logprobs(np.array(asked.images, np.float32)))
        rows = enumerate(probabilities_BC)
        return Reply(data=[{"index": i, "label": row.argmax(), "probabilities": row.tolist()} for i, row in rows])

    async def models() -> dict[str, object]:
        return MODELS

    app.post("/v1/classify")(classify)
    app.get("/v1/models")(models)
    return app


def routes_app(engine: Any, package: Any, open_copy: Any) -> Any:
    from overproof.config import Serve
    from overproof.serve.middleware import Access
    from overproof.serve.model_registry import SingleModel
    from overproof.serve.request_source import SourcePolicy
    from overproof.serve.response_builder import ServedModel, model_info
    from overproof.serve.routes import build_app

    served = ServedModel(model_info(package), engine, 1, open_copy)
    return build_app(SingleModel(served), Access(), source=SourcePolicy.of(Serve(proxies=(HOST,))))


def build() -> Any:
    """The ASGI application, made in the replica."""
    from functools import partial

    from overproof.config import Serve
    from overproof.engines.onnx_runtime import OnnxRuntime
    from overproof.package.package import load_package, open_served_copy
    from overproof.serve.async_engine import BatchingEngine
    from overproof.serve.package_trust import trust_policy

    location, threads, _, app = json.loads(os.environ[ARGUMENTS])
    policy = trust_policy(Serve())
    package = load_package(location, policy, say=lambda _: None)
    engine = BatchingEngine(OnnxRuntime(package.model, int(threads)))
    if app == "plain":
        return plain_app(engine)
    return routes_app(engine, package, partial(open_served_copy, location, policy, package.listing.sha256))


def main() -> None:
    paths = [Path(__file__).parent, os.environ.get("PYTHONPATH", "")]
    way, port, own_port = sys.argv[3], free_port(HOST, 0), free_port(HOST, 0)
    os.environ.update(RAY_worker_niceness="0")
    os.environ.update({ARGUMENTS: json.dumps(sys.argv[1:]), "PYTHONPATH": os.pathsep.join(map(str, paths))})
    os.environ.update(RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT=str(own_port))
    os.environ.update(RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT=str(own_port + 20))
    os.environ.update(RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="0")
    if way != "proxy":
        os.environ["RAY_SERVE_ENABLE_HA_PROXY" if way == "haproxy" else "RAY_SERVE_ENABLE_DIRECT_INGRESS"] = "1"
    import ray
    import ray_digits
    from ray import serve

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": HOST, "port": port})

    @serve.deployment(max_ongoing_requests=MOST_ONGOING, ray_actor_options={"num_cpus": 0.25})
    @serve.ingress(ray_digits.build)
    class Digits:
        pass

    serve.run(Digits.bind())  # type: ignore[attr-defined]
    url = f"http://{HOST}:{own_port if way == 'direct' else port}"
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
            break
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)
    print(json.dumps({"url": url}), flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
