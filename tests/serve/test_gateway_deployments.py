"""Versions deployed, tried, promoted and rolled back on real replicas, under load."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from overproof.cli.main import main
from overproof.config import Canary
from overproof.errors import InputError
from overproof.package import private_copy
from overproof.package.package import open_package
from overproof.serve import controller, server
from overproof.serve.canary import VersionStats
from overproof.serve.controller import describe_version
from overproof.serve.deployments import CONTROLLER_NAME, Version, read_deployments
from packing import break_model, copy, edit
from shared_server import SETTINGS, WAIT_S, SharedServer, named_replicas, wait_until

BODY = {"model": "stdlib-lm", "prompt": [0, 70], "max_tokens": 8, "temperature": 0.0}
PAUSE_S = 0.05  # of a client


def version(package: Path) -> Version:
    return describe_version(str(package), SETTINGS)


@contextmanager
def load(base: str, clients: int = 2, **body: Any) -> Iterator[list[tuple[int, str]]]:
    """Clients that ask over connections they keep; yields status codes and the packages that answered.

    They pause after each answer: a version that starts meanwhile would else wait for the cores that they take.
    """
    over, seen = threading.Event(), list[tuple[int, str]]()

    def ask(number: int) -> None:
        with httpx.Client(base_url=base, timeout=WAIT_S, trust_env=False) as client:
            count = 0
            while not over.is_set():
                headers = {"X-Session-ID": f"{number}-{count}"}
                reply = client.post("/v1/completions", json=BODY | body, headers=headers)
                seen.append((reply.status_code, reply.json().get("package", "")))
                count += 1
                over.wait(PAUSE_S)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join()


def shows(url: str, pattern: str) -> bool:
    return re.search(pattern, httpx.get(url, timeout=WAIT_S, trust_env=False).text) is not None


def overproof(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(words)
    output = capsys.readouterr()
    return code, output.out + output.err


def test_a_canary_is_promoted_and_rolled_back_under_load(
    ray_cluster: str,
    shared_server: SharedServer,
    text_package: Path,
    second_package: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = shared_server.url
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    one, two = version(text_package).package, version(second_package).package
    spoiled = copy(second_package, tmp_path)
    edit(spoiled / "verdict.json", lambda verdict: verdict.update(passed=False, chosen=None))
    code, output = overproof(capsys, "deploy", str(spoiled))
    assert (code, "no passing verdict" in output) == (2, True), output

    with load(base) as seen:
        loose = ["--set", "canary.share=0.5", "--set", "canary.min_requests=100000"]
        sizes = ["--set", "cpus_per_replica=0.2", "--set", "max_replicas=1", "--set", "slots=1"]
        code, output = overproof(capsys, "deploy", str(second_package), "--canary", *loose, *sizes)
        assert code == 0, output
        count = len(seen)
        wait_until(lambda: len(seen) > count + 30)
        assert {package for _, package in seen[count:]} == {one, two}
        code, output = overproof(capsys, "promote", "stdlib-lm")
        assert (code, "too few to go by; wait, or promote it all the same: --yes" in output) == (2, True), output
        assert f"stdlib-lm: {two} has been tried for " in output
        code, output = overproof(capsys, "deployments")
        told = rf"{two} has been tried for \d+ s: 0 of \d+ .* requests failed; .*Taken back once it is certain"
        assert re.search(told, output), output
        for figure in ("judged_requests", "comparisons"):
            named = rf'ray_overproof_{figure}_total{{[^}}]*package="{two}"'
            wait_until(partial(shows, f"{base}/metrics", named))
        code, output = overproof(capsys, "promote", "stdlib-lm", "--yes")
        assert (code, two in output) == (0, True), output
        count = len(seen) + 2  # two are on their way
        wait_until(lambda: len(seen) > count + 20)
        assert {package for _, package in seen[count:]} == {two}
        wait_until(lambda: controller.count_replicas(one) == 0)
        code, output = overproof(capsys, "rollback", "stdlib-lm", "--reason", "too blue")
        assert (code, one in output) == (0, True), output
        count = len(seen) + 2
        wait_until(lambda: len(seen) > count + 20)
        assert {package for _, package in seen[count:]} == {one}
    assert {status for status, _ in seen} == {200}
    code, output = overproof(capsys, "deployments")
    assert code == 0
    for word in ("deploy", "canary", "promote", "rollback", "too blue"):
        assert word in output
    file = json.loads(shared_server.deployments_file.read_text())
    assert [event["change"] for event in file["events"]] == ["deploy", "canary", "promote", "rollback"]
    assert all(event["user"] for event in file["events"])


def test_a_canary_that_disagrees_is_rolled_back_and_the_event_says_why(
    shared_server: SharedServer, text_package: Path, second_package: Path
) -> None:
    base = shared_server.url
    picky = SETTINGS.model_copy(
        update={"canary": Canary(share=0.5, compare=1.0, min_requests=10, min_agreement=1.0, max_slowdown=1000)}
    )
    with load(base, prompt="import os\n", temperature=1.0) as seen:
        server.call_controller("deploy", str(second_package), picky, "canary", "ada")
        wait_until(lambda: server.call_controller("deployments").models["stdlib-lm"].canary is None)
        stable = version(text_package).package
        wait_until(lambda: {package for _, package in seen[-10:]} == {stable})  # the gateways were told
        count = len(seen)
        wait_until(lambda: len(seen) > count + 10)
        assert {package for _, package in seen[count:]} == {stable}
    assert {status for status, _ in seen} == {200}
    last = read_deployments(str(shared_server.deployments_file)).events[-1]
    assert (last.change, last.package) == ("automatic rollback", version(second_package).package)
    assert "comparisons" in last.reason


def test_a_new_version_has_as_many_replicas_as_the_old_one_when_it_answers(
    shared_server: SharedServer, text_package: Path, second_package: Path
) -> None:
    one, two = version(text_package).package, version(second_package).package
    small = SETTINGS.model_copy(update={"cpus_per_replica": 0.1, "max_replicas": 3})
    server.start_serving(text_package, small.model_copy(update={"min_replicas": 2}))
    with load(shared_server.url) as seen:
        tried = small.model_copy(update={"canary": Canary(share=0.1, min_requests=100_000)})
        server.call_controller("deploy", str(second_package), tried, "canary", "ada")
        assert controller.count_replicas(two) == 1
        server.call_controller("promote", "stdlib-lm", "ada")
        assert controller.count_replicas(two) == 2
        server.call_controller("deploy", str(text_package), small, "stable", "ada")
        assert controller.count_replicas(one) == 2
    assert {status for status, _ in seen} == {200}


def test_a_shadow_sees_the_traffic_and_answers_nobody(
    shared_server: SharedServer, text_package: Path, second_package: Path
) -> None:
    base = shared_server.url
    loose = SETTINGS.model_copy(update={"canary": Canary(min_requests=100_000)})
    with load(base) as seen:
        server.call_controller("deploy", str(second_package), loose, "shadow", "ada")
        two = version(second_package).package
        wait_until(lambda: server.call_controller("stats").get(two, VersionStats()).compared > 10)
        assert server.call_controller("stats")[two].requests > 10
        assert server.call_controller("stats")[two].pairs
    assert {package for _, package in seen} == {version(text_package).package}
    with httpx.Client(base_url=base, timeout=WAIT_S, trust_env=False) as client:
        named = client.post("/v1/completions", json=BODY | {"model": two}).json()
        assert named["package"] == two  # who asks for it by its id gets it
    server.call_controller("roll_back", "stdlib-lm", "ada")


def test_a_controller_that_is_killed_restores_its_deployments(
    shared_server: SharedServer, text_package: Path, second_package: Path
) -> None:
    base, before = shared_server.url, server.call_controller("deployments")
    with load(base) as seen:
        ray.kill(ray.get_actor(CONTROLLER_NAME, namespace=CONTROLLER_NAME), no_restart=False)

        def back() -> bool:
            try:
                return bool(server.call_controller("deployments") == before)
            except InputError:  # it is on its way
                return False

        wait_until(back)
        server.call_controller("deploy", str(second_package), SETTINGS, "stable", "ada")
        count = len(seen) + 2
        wait_until(lambda: len(seen) > count + 10)
        assert {package for _, package in seen[count:]} == {version(second_package).package}
        server.call_controller("roll_back", "stdlib-lm", "ada")
    assert {status for status, _ in seen} == {200}


def test_a_version_that_does_not_start_changes_nothing(
    shared_server: SharedServer, text_package: Path, second_package: Path, tmp_path: Path
) -> None:
    base, broken = shared_server.url, break_model(second_package, tmp_path)
    with (
        load(base) as seen,
        pytest.raises(InputError, match=r"does not start, and nothing has changed: .*cannot be read"),
    ):
        server.call_controller("deploy", str(broken), SETTINGS, "stable", "ada")
    assert set(seen) == {(200, version(text_package).package)}
    last = read_deployments(str(shared_server.deployments_file)).events[-1]
    assert (last.change, last.user, "cannot be read" in last.reason) == ("failed", "ada", True)
    assert version(broken).application not in serve.status().applications


@pytest.mark.trial
def test_after_a_restart_one_model_that_cannot_be_loaded_shuts_no_other(
    no_server: None, digits_package: Path, text_package: Path, tmp_path: Path
) -> None:
    file, spoiled = tmp_path / "deployments.json", copy(text_package, tmp_path)
    settings = SETTINGS.model_copy(update={"deployments": str(file)})
    content = open_package(spoiled).listing.sha256
    server.start_gateway({str(digits_package): SETTINGS, str(spoiled): SETTINGS}, settings)
    server.stop_serving()
    (spoiled / "model.gguf").write_bytes(b"GGUF")
    # As on a machine that has not served it yet.
    wait_until(lambda: private_copy.delete_unused(0) or private_copy.find_copy(content) is None)
    settings = settings.model_copy(update={"deployments": str(file.rename(tmp_path / ("d" * 250)))})  # now unwritable
    base = server.start_gateway({str(digits_package): SETTINGS}, settings)
    with httpx.Client(base_url=base, timeout=WAIT_S, trust_env=False) as client:
        assert client.post("/v1/classify", json={"model": "digits", "images": [[0.0] * 64]}).status_code == 200
        refused = client.post("/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert "does not start" in refused.json()["error"]["message"]
        assert client.post("/v1/classify", json={"model": "digits", "images": [[0.0] * 64]}).status_code == 200
        events = server.call_controller("deployments").events
    assert {(event.change, event.model) for event in events if event.change == "failed"} == {("failed", "stdlib-lm")}


@pytest.mark.trial
def test_a_deployment_that_no_node_takes_is_given_up(
    shared_server: SharedServer, text_package: Path, second_package: Path
) -> None:
    """By a rollback, and when serving stops, which does not wait for it."""
    one, two = version(text_package), version(second_package)
    nowhere = SETTINGS.model_copy(update={"cpus_per_replica": 1000.0})

    def deploy() -> str:
        try:
            server.call_controller("deploy", str(second_package), nowhere, "stable", "ada")
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(1) as pool:
        with load(shared_server.url, clients=1) as seen:
            deploying = pool.submit(deploy)
            wait_until(lambda: two.application in serve.status().applications)
            assert server.call_controller("roll_back", "stdlib-lm", "ada") == two.package
            assert "does not start, and nothing has changed" in deploying.result(WAIT_S)
            wait_until(lambda: two.application not in serve.status().applications)
        assert set(seen) == {(200, one.package)}
        deploying = pool.submit(deploy)
        wait_until(lambda: two.application in serve.status().applications)
        server.stop_serving()
        assert deploying.result(WAIT_S)
    assert not server.is_serving()


def test_a_model_without_a_replica_is_not_healthy_and_its_requests_wait_for_the_next(
    shared_server: SharedServer, text_package: Path
) -> None:
    with httpx.Client(base_url=shared_server.url, timeout=WAIT_S, trust_env=False) as client:
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        (name,) = [name for name in named_replicas() if version(text_package).application in name]
        ray.kill(ray.get_actor(name, namespace="serve"))
        wait_until(lambda: client.get("/healthz").status_code == 503)
        assert "has no replica that answers" in client.get("/healthz").json()["error"]["message"]
        assert "no model has a replica" in client.get("/readyz").json()["error"]["message"]
        assert client.post("/v1/completions", json=BODY).status_code == 200
        assert client.get("/healthz").status_code == 200
