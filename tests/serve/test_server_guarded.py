"""A server with TLS, keys and recorded traffic, that other machines may reach: started once, asked, and stopped."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from certificates import certificate
from overproof.cli.main import main
from overproof.config import ParquetSource, Serve, Traffic, Trust
from overproof.data.documents import FileSpan, iter_documents
from overproof.data.sources import list_files
from overproof.errors import InputError
from overproof.package.signature import make_key_pair, read_public_keys
from overproof.serve import api_keys, server
from overproof.serve.controller import count_replicas
from overproof.serve.traffic import REPLIES
from packing import copy
from shared_server import named_replicas, wait_until

IMAGE = {"model": "digits", "images": [[0.0] * 64]}


def signed(package: Path, folder: Path) -> Path:
    """A copy that the key beside the folder has signed."""
    key = folder.with_name("team.key")
    if not key.exists():
        make_key_pair(key)
    copied = copy(package, folder)
    assert main(["sign", str(copied), "--key", str(key)]) == 0
    return copied


@dataclass(frozen=True)
class GuardedServer:
    url: str
    certificate: str
    keys_file: str
    team_key: str  # of the file, with 12 requests a minute
    traffic: Path
    settings: Serve
    text: Path  # folders of the packages
    digits: Path

    def client(self, key: str | None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        verify = ssl.create_default_context(cafile=self.certificate)
        return httpx.Client(base_url=self.url, verify=verify, headers=headers, timeout=60, trust_env=False)


@pytest.fixture(scope="module")
def guarded(
    ray_cluster: str, text_package: Path, digits_package: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuardedServer]:
    folder = tmp_path_factory.mktemp("guarded")
    file, (chain, secret) = str(folder / "keys.json"), certificate(folder)
    key = api_keys.add_key(file, "team", 12, None)
    text, digits = signed(text_package, folder / "text"), signed(digits_package, folder / "digits")
    settings = Serve(
        host="0.0.0.0",
        trust=Trust(keys=f"{folder / 'team.key'}.pub"),
        port=0,
        max_replicas=1,
        cpus_per_replica=0.2,
        tls_certificate=chain,
        tls_key=secret,
        traffic=Traffic(folder=str(folder / "traffic"), seconds_per_file=60.0),
    )
    two = settings.model_copy(update={"min_replicas": 2, "max_replicas": 2})
    server.stop_serving()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OVERPROOF_KEYS", file)
        environment.setenv("OVERPROOF_API_KEY", "a-secret")
        url = server.start_gateway({str(text): settings, str(digits): two}, settings)
    yield GuardedServer(url, chain, file, key, folder / "traffic", settings, text, digits)
    server.stop_serving()


def test_the_key_of_the_environment_guards_the_replicas(guarded: GuardedServer) -> None:
    assert guarded.url.startswith("https://127.0.0.1:")
    with guarded.client(None) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/docs").status_code == 200
        assert client.post("/v1/classify", json=IMAGE).status_code == 401
    with guarded.client("a-secret") as client:
        assert client.post("/v1/classify", json=IMAGE).status_code == 200
    with guarded.client("a-Secret") as client, pytest.raises(httpx.HTTPStatusError, match="401"):
        client.get("/v1/models").raise_for_status()


def test_a_certificate_that_nobody_vouches_for_is_refused_by_clients(guarded: GuardedServer) -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{guarded.url}/healthz", trust_env=False)


def test_others_than_this_machine_get_signed_packages_alone(guarded: GuardedServer, text_package: Path) -> None:
    for package in (text_package, text_package.parent):
        with pytest.raises(InputError, match=r"is not signed, and serve\.trust\.keys asks for a signature"):
            server.call_controller("deploy", str(package), guarded.settings, "stable", "ada")
    with guarded.client("a-secret") as client:
        models = client.get("/v1/models").json()["data"]
    (key_id,) = read_public_keys(Path(str(guarded.settings.trust.keys)).read_text(), "")
    assert {model["overproof"]["signed_by"] for model in models} == {key_id}


def test_a_package_that_is_changed_where_it_lies_is_served_as_it_was(guarded: GuardedServer) -> None:
    """By replicas that run, and by those that take their place."""
    body = {"model": "stdlib-lm", "prompt": "x = 1\n", "max_tokens": 4, "temperature": 0.0}

    def answers() -> list[Any]:
        with guarded.client("a-secret") as client:
            text = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]
            return [text, client.post("/v1/classify", json=IMAGE).raise_for_status().json()["data"]]

    before, deployed = answers(), server.call_controller("deployments").versions
    kept = {file: file.read_bytes() for file in (guarded.text / "model.gguf", guarded.digits / "model.onnx")}
    for file in kept:
        os.truncate(file, 100)
    assert answers() == before
    for version in deployed:
        with pytest.raises(InputError, match=r"has 100 bytes, package\.json says"):
            server.call_controller("deploy", version.location, guarded.settings, "stable", "ada")
        (name, *_) = [name for name in named_replicas() if version.application in name]
        ray.kill(ray.get_actor(name, namespace="serve"))
        wait_until(lambda gone=name: gone not in named_replicas())
        wait_until(lambda of=version: count_replicas(of.package) == of.settings.min_replicas)
    assert answers() == before
    for file, content in kept.items():
        file.write_bytes(content)


def test_replicas_share_one_count_and_a_revoked_key_is_refused(guarded: GuardedServer) -> None:
    with guarded.client(guarded.team_key) as client:
        found = [client.post("/v1/classify", json=IMAGE).status_code for _ in range(15)]
        assert found[:12] == [200] * 12
        assert 429 in found[12:]
        api_keys.revoke_key(guarded.keys_file, "team")
        time.sleep(api_keys.REFRESH_S + 0.1)
        assert {client.get("/v1/models").status_code for _ in range(6)} == {401}


def test_a_gateway_that_is_stopped_has_written_its_traffic(guarded: GuardedServer) -> None:
    """And `prepare`'s reader takes it. The last test of this file: it stops the server."""
    texts = []
    with guarded.client("a-secret") as client:
        for seed in range(3):
            body = {"model": "stdlib-lm", "prompt": "import os\n", "max_tokens": 8, "seed": seed}
            reply = client.post("/v1/completions", json=body).raise_for_status().json()
            texts.append(f"{body['prompt']}{reply['choices'][0]['text']}")
    server.stop_serving()
    source = ParquetSource(path=str(guarded.traffic / REPLIES))
    spans = (FileSpan(file.name) for file in list_files(source).files)
    documents = (content for span in spans for _, content in iter_documents(source, span))
    found = [b"".join(content).decode() for content in documents]
    assert sorted(text for text in found if text.startswith("import os")) == sorted(texts)


def test_a_certificate_that_cannot_be_used_is_refused(no_server: None, digits_package: Path, tmp_path: Path) -> None:
    chain, secret = certificate(tmp_path)
    for files in ({"tls_certificate": chain, "tls_key": chain}, {"tls_certificate": "/none", "tls_key": secret}):
        with pytest.raises(InputError, match="expected a pair in PEM"):
            server.start_serving(digits_package, Serve(port=0, **files))
    with pytest.raises(InputError, match="belong together"):
        Serve.parse({"tls_key": secret}, "serve")
