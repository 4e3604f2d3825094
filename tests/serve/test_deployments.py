"""What is deployed and how it changes: as plain values, and on real replicas under load."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from scipy.stats import binomtest

from overproof.cli.main import main
from overproof.config import Canary, Serve
from overproof.errors import InputError
from overproof.serve import controller, server
from overproof.serve import deployments as books
from overproof.serve.canary import VersionStats, rollback_reason, wilson_interval
from overproof.serve.controller import POLL_S, Controller, describe_version
from overproof.serve.deployments import CONTROLLER_NAME, Deployments, ModelDeployment, Version
from overproof.serve.gateway import pick_version
from packing import break_model, copy, edit, make_package

SETTINGS = Serve(port=0, max_replicas=1, cpus_per_replica=0.2, slots=2)
BODY = {"model": "stdlib-lm", "prompt": [0, 70], "max_tokens": 8, "temperature": 0.0}
WAIT_S = 60


@pytest.fixture(scope="session")
def second_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another version of the text package: other weights, and so another id."""
    return make_package("text", tmp_path_factory.mktemp("second"), "seed=1")


def version(package: Path, **settings: Any) -> Version:
    return describe_version(str(package), SETTINGS.model_copy(update=settings))


def test_every_change_is_an_event_and_bad_ones_are_refused(text_package: Path, second_package: Path) -> None:
    one, two = version(text_package), version(second_package)
    assert one.package != two.package
    empty = Deployments()
    with pytest.raises(InputError, match="no stable version is deployed to try a canary beside"):
        empty.deployed(one, "canary", "ada")
    first = empty.deployed(one, "stable", "ada")
    for attempt in (lambda: first.promoted("stdlib-lm", "ada"), lambda: first.rolled_back("stdlib-lm", "ada")):
        with pytest.raises(InputError, match=r"no version is being tried|nothing to roll back to"):
            attempt()
    with pytest.raises(InputError, match="is the stable version; expected another version as canary"):
        first.deployed(one, "canary", "ada")
    with pytest.raises(InputError, match="other: not deployed; found stdlib-lm"):
        first.undeployed("other", "ada")
    tried = first.deployed(two, "canary", "bo")
    with pytest.raises(InputError, match=r"is being tried; first `overproof promote stdlib-lm`"):
        tried.deployed(two, "stable", "ada")
    promoted = tried.promoted("stdlib-lm", "cy")
    assert promoted.models["stdlib-lm"] == ModelDeployment(stable=two, previous=one)
    back = promoted.rolled_back("stdlib-lm", "cy", "slow")
    assert back.models["stdlib-lm"] == ModelDeployment(stable=one, previous=two)
    assert [(e.user, e.change, e.package) for e in back.events] == [
        ("ada", "deploy", one.package),
        ("bo", "canary", two.package),
        ("cy", "promote", two.package),
        ("cy", "rollback", two.package),
    ]
    assert back.events[-1].reason == "slow"
    assert back.undeployed("stdlib-lm", "ada").models == {}
    assert first.models["stdlib-lm"].canary is None  # values do not change


def test_deployments_are_read_back_from_a_uri(text_package: Path, s3_uri: str) -> None:
    from overproof.files import join_uri

    uri = join_uri(s3_uri, "deployments.json")
    assert books.read_deployments(uri) == Deployments()
    deployments_file = Deployments().deployed(version(text_package), "stable", "ada")
    books.write_deployments(uri, deployments_file)
    assert books.read_deployments(uri) == deployments_file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2, "models": {"a": {}}}', r"models\.a\.stable"),
        (
            '{"format": 1, "lines": {"a": {}}, "events": [{}]}',
            "deployments of format 1, and this version reads 2; move",
        ),
        ('{"lines": {"a": {}}}', "deployments of format 1, and this version reads 2; move"),
        ('{"format": 3, "models": {}}', "deployments of format 3, and this version reads 2; move"),
        ("", "expected what `overproof deploy` writes"),
    ],
)
def test_a_broken_file_and_one_of_another_format_are_refused_with_one_line(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "deployments.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as refused:
        books.read_deployments(str(path))
    assert str(refused.value).startswith(str(path))
    assert len(str(refused.value).splitlines()) == 1


def test_a_canary_gets_its_share_and_keeps_its_sessions(text_package: Path, second_package: Path) -> None:
    canary = version(second_package, canary=Canary(share=0.2))
    deployment = ModelDeployment(stable=version(text_package), canary=canary)
    picked = {f"s{i}": pick_version(deployment, f"s{i}") for i in range(2000)}
    share = sum(v == canary for v in picked.values()) / 2000
    assert 0.17 < share < 0.23  # 3 standard deviations
    assert all(pick_version(deployment, session) == v for session, v in picked.items())
    more = deployment.model_copy(update={"canary": version(second_package, canary=Canary(share=0.4))})
    assert all(
        pick_version(more, s).package == canary.package for s, v in picked.items() if v == canary
    )  # none moves back
    assert {pick_version(deployment, None).package for _ in range(200)} == {v.package for v in deployment.versions}


def test_limits_are_judged_with_what_is_known() -> None:
    limits = Canary(min_requests=50, max_failed=0.01, max_slowdown=1.5, min_agreement=0.5)

    def measured(requests: int, failed: int = 0, compared: int = 0, agreed: int = 0, s: float = 0.1) -> VersionStats:
        made = VersionStats(requests, failed, compared, agreed)
        made.seconds.extend([s] * (requests - failed))
        return made

    old = measured(500)
    assert rollback_reason(limits, old, measured(49, 49)) is None  # too early to say
    assert rollback_reason(limits, old, measured(100, 1)) is None  # may be chance
    assert "50 of 100 requests failed; at most 1.0% may" in str(rollback_reason(limits, old, measured(100, 50)))
    assert rollback_reason(limits, old, measured(100, s=0.14)) is None
    assert "160.0 ms against 100.0 ms" in str(rollback_reason(limits, old, measured(100, s=0.16)))
    assert rollback_reason(limits, old, measured(60, 0, 60, 28)) is None
    assert "agrees in 10 of 60 comparisons" in str(rollback_reason(limits, old, measured(60, 0, 60, 10)))
    assert rollback_reason(limits, measured(3), measured(100, s=9.0)) is None  # nothing to compare with
    for count, of in ((0, 50), (10, 60), (60, 60)):
        known = binomtest(count, of).proportion_ci(method="wilson")
        assert wilson_interval(count, of) == pytest.approx((known.low, known.high), abs=1e-4)


def test_a_desk_stays_while_a_model_loads_and_goes_when_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def end() -> None:  # there is no actor
        raise EOFError

    async def watch() -> None:
        own = Controller(Serve())
        async with own._change_lock:  # as every change holds it
            leaving = asyncio.ensure_future(own._exit_when_unused())
            await asyncio.sleep(5 * POLL_S)
            assert not leaving.done()
        with pytest.raises(EOFError):
            await asyncio.wait_for(leaving, WAIT_S)

    monkeypatch.setattr(controller, "ALONE_S", 2 * POLL_S)
    monkeypatch.setattr(ray.actor, "exit_actor", end)
    asyncio.run(watch())


@contextmanager
def load(base: str, clients: int = 2, **body: Any) -> Iterator[list[tuple[int, str]]]:
    """Clients that ask over connections they keep; yields status codes and the packages that answered."""
    over, seen = threading.Event(), list[tuple[int, str]]()

    def ask(number: int) -> None:
        with httpx.Client(base_url=base, timeout=WAIT_S, trust_env=False) as client:
            count = 0
            while not over.is_set():
                headers = {"X-Session-ID": f"{number}-{count}"}
                reply = client.post("/v1/completions", json=BODY | body, headers=headers)
                seen.append((reply.status_code, reply.json().get("package", "")))
                count += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join()


def until(reached: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def book(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory, text_package: Path) -> Iterator[Path]:
    """An open house with the first version, to which every test returns; yields its book."""
    path = tmp_path_factory.mktemp("house") / "deployments.json"
    server.start_gateway({str(text_package): SETTINGS}, SETTINGS.model_copy(update={"deployments": str(path)}))
    yield path
    server.stop_serving()


def overproof(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(words)
    output = capsys.readouterr()
    return code, output.out + output.err


def test_a_canary_is_promoted_and_rolled_back_under_load(
    ray_cluster: str,
    deployments_file: Path,
    text_package: Path,
    second_package: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = server.running_url()
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    one, two = version(text_package).package, version(second_package).package
    spoiled = copy(second_package, tmp_path)
    edit(spoiled / "verdict.json", lambda verdict: verdict.update(passed=False, chosen=None))
    code, output = overproof(capsys, "deploy", str(spoiled))
    assert (code, "no passing verdict" in output) == (2, True), output

    with load(base) as seen:
        loose = ["--set", "canary.share=0.5", "--set", "canary.max_slowdown=100", "--set", "canary.min_agreement=0"]
        sizes = ["--set", "cpus_per_replica=0.2", "--set", "max_replicas=1"]
        code, output = overproof(capsys, "deploy", str(second_package), "--canary", *loose, *sizes)
        assert code == 0, output
        count = len(seen)
        until(lambda: len(seen) > count + 60)
        assert {package for _, package in seen[count:]} == {one, two}
        code, output = overproof(capsys, "promote", "stdlib-lm")
        assert (code, two in output) == (0, True), output
        count = len(seen) + 2  # two are on their way
        until(lambda: len(seen) > count + 20)
        assert {package for _, package in seen[count:]} == {two}
        until(lambda: controller.count_replicas(one) == 0)
        code, output = overproof(capsys, "rollback", "stdlib-lm", "--reason", "too blue")
        assert (code, one in output) == (0, True), output
        count = len(seen) + 2
        until(lambda: len(seen) > count + 20)
        assert {package for _, package in seen[count:]} == {one}
    assert {status for status, _ in seen} == {200}
    code, output = overproof(capsys, "deployments")
    assert code == 0
    for word in ("deploy", "canary", "promote", "rollback", "too blue"):
        assert word in output
    kept = json.loads(deployments_file.read_text())
    assert [event["what"] for event in kept["events"]] == ["deploy", "canary", "promote", "rollback"]
    assert all(event["who"] for event in kept["events"])


def test_a_canary_that_disagrees_is_taken_back_and_the_record_says_why(
    deployments_file: Path, text_package: Path, second_package: Path
) -> None:
    base = server.running_url()
    picky = SETTINGS.model_copy(
        update={"canary": Canary(share=0.5, compare=1.0, min_requests=10, min_agreement=1.0, max_slowdown=1000)}
    )
    with load(base, prompt="import os\n", temperature=1.0) as seen:
        server.call_controller("deploy", str(second_package), picky, "canary", "ada")
        until(lambda: server.call_controller("deployments").models["stdlib-lm"].canary is None)
        count = len(seen) + 2
        until(lambda: len(seen) > count + 10)
        assert {package for _, package in seen[count:]} == {version(text_package).package}
    assert {status for status, _ in seen} == {200}
    last = books.read_deployments(str(deployments_file)).events[-1]
    assert (last.change, last.package) == ("automatic rollback", version(second_package).package)
    assert "comparisons" in last.reason


def test_a_shadow_sees_the_traffic_and_answers_nobody(
    deployments_file: Path, text_package: Path, second_package: Path
) -> None:
    base = server.running_url()
    loose = SETTINGS.model_copy(update={"canary": Canary(min_requests=100_000)})
    with load(base) as seen:
        server.call_controller("deploy", str(second_package), loose, "shadow", "ada")
        two = version(second_package).package
        until(lambda: server.call_controller("stats").get(two, VersionStats()).compared > 10)
        assert server.call_controller("stats")[two].requests > 10
    assert {package for _, package in seen} == {version(text_package).package}
    with httpx.Client(base_url=base, timeout=WAIT_S, trust_env=False) as client:
        named = client.post("/v1/completions", json=BODY | {"model": two}).json()
        assert named["package"] == two  # who asks for it by its id gets it
    server.call_controller("roll_back", "stdlib-lm", "ada")


def test_a_desk_that_is_killed_comes_back_from_its_book(
    deployments_file: Path, text_package: Path, second_package: Path
) -> None:
    base, before = server.running_url(), server.call_controller("deployments")
    with load(base) as seen:
        ray.kill(ray.get_actor(CONTROLLER_NAME, namespace=CONTROLLER_NAME), no_restart=False)

        def back() -> bool:
            try:
                return bool(server.call_controller("deployments") == before)
            except InputError:  # it is on its way
                return False

        until(back)
        server.call_controller("deploy", str(second_package), SETTINGS, "stable", "ada")
        count = len(seen) + 2
        until(lambda: len(seen) > count + 10)
        assert {package for _, package in seen[count:]} == {version(second_package).package}
        server.call_controller("roll_back", "stdlib-lm", "ada")
    assert {status for status, _ in seen} == {200}


def test_a_version_that_does_not_start_changes_nothing(
    deployments_file: Path, text_package: Path, second_package: Path, tmp_path: Path
) -> None:
    base, broken = server.running_url(), break_model(second_package, tmp_path)
    with (
        load(base) as seen,
        pytest.raises(InputError, match=r"does not start, and nothing has changed: .*cannot be read"),
    ):
        server.call_controller("deploy", str(broken), SETTINGS, "stable", "ada")
    assert set(seen) == {(200, version(text_package).package)}
    last = books.read_deployments(str(deployments_file)).events[-1]
    assert (last.change, last.user, "cannot be read" in last.reason) == ("failed", "ada", True)
    assert version(broken).application not in serve.status().applications


def test_a_model_without_a_replica_is_not_healthy_and_its_requests_wait_for_the_next(deployments_file: Path) -> None:
    with httpx.Client(base_url=server.running_url(), timeout=WAIT_S, trust_env=False) as client:
        assert client.get("/healthz").status_code == 200
        (name,) = [name for name in named_replicas() if "stdlib-lm" in name]
        ray.kill(ray.get_actor(name, namespace="serve"))
        until(lambda: client.get("/healthz").status_code == 503)
        assert "has no replica that answers" in client.get("/healthz").json()["error"]["message"]
        assert client.post("/v1/completions", json=BODY).status_code == 200
        assert client.get("/healthz").status_code == 200


def named_replicas() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["name"].startswith("SERVE_REPLICA::overproof-")]


def test_several_models_share_the_memory_and_come_when_asked(
    ray_cluster: str, text_package: Path, digits_package: Path, tmp_path: Path
) -> None:
    sizes = [version(text_package).resident_mb, version(digits_package).resident_mb]
    room = max(sizes) + min(sizes) / 2  # for either, not for both
    server.stop_serving()
    base = server.start_gateway({str(text_package): SETTINGS}, SETTINGS.model_copy(update={"memory_mb": room}))
    try:
        server.start_serving(digits_package, Serve(max_replicas=1, cpus_per_replica=0.2))
        image = {"model": "digits", "images": [[0.0] * 64]}
        with httpx.Client(base_url=base, timeout=WAIT_S, trust_env=False) as client:
            assert {m["id"] for m in client.get("/v1/models").json()["data"]} == {"stdlib-lm", "digits"}
            for _ in range(2):
                assert client.post("/v1/classify", json=image).status_code == 200
                until(lambda: controller.count_replicas(version(text_package).package) == 0)
                assert client.post("/v1/completions", json=BODY).status_code == 200  # loaded again
                until(lambda: controller.count_replicas(version(digits_package).package) == 0)
            unnamed = client.post("/v1/completions", json={"prompt": "x"})
            assert unnamed.status_code == 404
            assert "name one" in unnamed.json()["error"]["message"]
        server.stop_serving()
        with pytest.raises(InputError, match=r"serve\.memory_mb: .* takes"):
            server.start_gateway({str(text_package): SETTINGS}, SETTINGS.model_copy(update={"memory_mb": 0.001}))
    finally:
        server.stop_serving()
