"""Several models behind one address that share too little memory for all of them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from overproof.config import Serve
from overproof.errors import InputError
from overproof.serve import server
from overproof.serve.controller import count_replicas, describe_version
from shared_server import WAIT_S, wait_until

SETTINGS = Serve(port=0, max_replicas=1, cpus_per_replica=0.2, slots=1)
TEXT = {"model": "stdlib-lm", "prompt": [0, 70], "max_tokens": 8}
IMAGE = {"model": "digits", "images": [[0.0] * 64]}


def test_several_models_share_the_memory_and_are_loaded_when_asked(
    no_server: None, text_package: Path, digits_package: Path
) -> None:
    text, digits = (describe_version(str(package), SETTINGS) for package in (text_package, digits_package))
    either = max(text.resident_mb, digits.resident_mb) + min(text.resident_mb, digits.resident_mb) / 2  # not for both
    url = server.start_gateway({str(text_package): SETTINGS}, SETTINGS.model_copy(update={"memory_mb": either}))
    server.start_serving(digits_package, Serve(max_replicas=1, cpus_per_replica=0.2))
    with httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client:
        assert {model["id"] for model in client.get("/v1/models").json()["data"]} == {"stdlib-lm", "digits"}
        wait_until(lambda: count_replicas(text.package) == 0)
        assert client.post("/v1/classify", json=IMAGE).status_code == 200
        assert client.post("/v1/completions", json=TEXT).status_code == 200  # loaded again
        wait_until(lambda: count_replicas(digits.package) == 0)
        assert client.post("/v1/classify", json=IMAGE).status_code == 200  # loaded again
        wait_until(lambda: count_replicas(text.package) == 0)
        unnamed = client.post("/v1/completions", json={"prompt": "x"})
        assert unnamed.status_code == 404
        assert "name one" in unnamed.json()["error"]["message"]
    server.stop_serving()
    with pytest.raises(InputError, match=r"serve\.memory_mb: .* takes"):
        server.start_gateway({str(text_package): SETTINGS}, SETTINGS.model_copy(update={"memory_mb": 0.001}))
