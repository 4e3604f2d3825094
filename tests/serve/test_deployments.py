"""What is deployed and how it changes, as plain values; and when a candidate must be rolled back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from scipy.stats import binomtest

from overproof.config import Canary, Serve
from overproof.errors import InputError
from overproof.evaluate.metrics import wilson_interval
from overproof.files import join_uri
from overproof.serve import controller, version_loader
from overproof.serve.canary import VersionStats, describe_evidence, rollback_reason, too_little
from overproof.serve.controller import Controller, describe_version
from overproof.serve.deployments import (
    Deployments,
    ModelDeployment,
    Version,
    read_deployments,
    write_deployments,
)
from overproof.serve.gateway import pick_version
from overproof.serve.model_registry import TimedAnswer
from shared_server import SETTINGS, WAIT_S


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
    assert back.models["stdlib-lm"] == ModelDeployment(stable=one)
    with pytest.raises(InputError, match="has no version before it"):  # typed twice, it does not restore the bad one
        back.rolled_back("stdlib-lm", "cy")
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
    uri = join_uri(s3_uri, "deployments.json")
    assert read_deployments(uri) == Deployments()
    written = Deployments().deployed(version(text_package), "stable", "ada")
    write_deployments(uri, written)
    assert read_deployments(uri) == written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 3, "models": {"a": {}}}', r"models\.a\.stable"),
        (
            '{"format": 1, "lines": {"a": {}}, "events": [{}]}',
            "deployments of format 1, and this version reads 3; move",
        ),
        ('{"lines": {"a": {}}}', "deployments of format 1, and this version reads 3; move"),
        ('{"format": 4, "models": {}}', "deployments of format 4, and this version reads 3; move"),
        ("", "expected what `overproof deploy` writes"),
    ],
)
def test_a_broken_file_and_one_of_another_format_are_refused_with_one_line(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "deployments.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as refused:
        read_deployments(str(path))
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


def test_a_candidate_is_rolled_back_for_what_is_known_and_not_for_chance() -> None:
    limits = Canary(min_requests=50, max_failed=0.01, max_slowdown=1.5, min_agreement=0.5)

    def judged(requests: int, failed: int = 0, compared: int = 0, agreed: int = 0) -> str | None:
        return rollback_reason(limits, VersionStats(requests, failed, compared, agreed))

    assert judged(49, 49) is None  # too early to say
    assert judged(100, 1) is None  # may be chance
    assert "50 of 100 requests failed; at most 1.0 % may" in str(judged(100, 50))
    assert judged(60, 0, 60, 28) is None
    assert "agrees in 10 of 60 comparisons" in str(judged(60, 0, 60, 10))
    for count, of in ((0, 50), (10, 60), (60, 60)):
        known = binomtest(count, of).proportion_ci(method="wilson")
        assert wilson_interval(count, of, 0.95) == pytest.approx((known.low, known.high), abs=1e-4)


def test_what_is_known_of_a_candidate_is_told_before_it_is_promoted() -> None:
    limits, stats = Canary(min_requests=50, max_failed=0.01, max_slowdown=1.5, min_agreement=0.5), VersionStats()
    ends = (
        "Taken back once it is certain, from 50 of each on: above 1 % failed, below 50 % agreement, more than 1.5 "
        "times as "
        "slow in half of the pairs"
    )
    assert describe_evidence(limits, stats) == f"0 of 0 requests failed; not compared yet; no pair of times yet. {ends}"
    assert too_little(limits, stats, True) == ("0 requests", "0 comparisons")
    assert too_little(limits, stats, False) == ("0 requests",)
    stats = VersionStats(requests=60, failed=3)
    assert too_little(limits, stats, True) == ("0 comparisons",)
    assert too_little(limits, stats, False) == ()
    for agree in [True] * 40 + [False] * 10:
        stats.compare(TimedAnswer("", 0.16, 16), TimedAnswer("", 0.32, 16), agree)
    assert describe_evidence(limits, stats) == (
        "3 of 60 (1.7 to 13.7 %) requests failed; agrees in 40 of 50 (67.0 to 88.8 %) comparisons; "
        f"20.0 ms a token or row, the other 10.0 ms (50 pairs). {ends}"
    )
    assert too_little(limits, stats, True) == ()


def test_speed_is_judged_a_token_in_pairs_that_were_asked_the_same() -> None:
    limits, draw = Canary(min_requests=50, max_slowdown=1.5, min_agreement=0), random.Random(0)

    def judged(slowdown: float, pairs: int = 200, tokens: Callable[[], int] = lambda: 16) -> str | None:
        stats = VersionStats(10_000)
        for _ in range(pairs):
            busy, count = draw.uniform(0.5, 5), tokens()  # what else the machine does slows both
            stable, own = (busy * draw.lognormvariate(0, 0.2) * count * 0.01 for _ in range(2))
            stats.compare(TimedAnswer("", stable, count), TimedAnswer("", slowdown * own, count), True)
        return rollback_reason(limits, stats)

    assert judged(1.0) is None
    assert judged(1.3) is None
    assert "pairs more than 1.5 times as long" in str(judged(2.0))
    assert judged(9.0, pairs=49) is None  # too early to say
    for tokens in (lambda: 1, lambda: draw.choice((1, 16)), lambda: 16):  # long and short, as clients ask
        assert judged(1.0, tokens=tokens) is None
        assert judged(2.0, tokens=tokens) is not None
    stats = VersionStats()
    for _ in range(200):  # one that says more takes longer, and is no slower for it
        stats.compare(TimedAnswer("", 0.1, 1), TimedAnswer("", 1.6, 16), True)
        stats.compare(TimedAnswer("", 0.1, 0), TimedAnswer("", 9.0, 0), True)
    assert (list(stats.pairs), stats.compared) == ([], 400)
    assert rollback_reason(limits, stats) is None


def test_nobody_outside_can_tell_which_sessions_a_canary_gets(text_package: Path, second_package: Path) -> None:
    canary = version(second_package, canary=Canary(share=0.5))
    one, other = (ModelDeployment(stable=version(text_package), canary=canary) for _ in range(2))
    same = sum(pick_version(one, f"s{i}") == pick_version(other, f"s{i}") for i in range(2000))
    assert 900 < same < 1100
    restored = ModelDeployment.model_validate_json(one.model_dump_json())  # after a restart
    assert all(pick_version(one, f"s{i}") == pick_version(restored, f"s{i}") for i in range(200))
    stable = Deployments().deployed(one.stable, "stable", "ada")
    salts = {stable.deployed(canary, "canary", "ada").models["stdlib-lm"].salt for _ in range(2)}
    assert (len(salts), "" in salts) == (2, False)


def test_a_controller_stays_while_a_model_loads_and_ends_when_no_gateway_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    def end() -> None:  # there is no actor
        raise EOFError

    async def watch() -> None:
        alone = Controller(Serve())
        async with alone._change_lock:  # as every change holds it
            exiting = asyncio.ensure_future(alone._exit_when_unused())
            await asyncio.sleep(5 * controller.POLL_S)
            assert not exiting.done()
        with pytest.raises(EOFError):
            await asyncio.wait_for(exiting, WAIT_S)

    monkeypatch.setattr(controller, "POLL_S", 0.05)
    monkeypatch.setattr(controller, "GATEWAY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(ray.actor, "exit_actor", end)
    asyncio.run(watch())


@pytest.mark.parametrize("broken", [False, True])
def test_a_file_that_cannot_be_written_keeps_nothing_shut_after_a_restart(
    text_package: Path, second_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """What it names starts; a model that does not is told of, and only a change is refused."""
    deployed = version(text_package)
    write_deployments(str(tmp_path / "file"), Deployments().deployed(deployed, "stable", "ada"))
    file = (tmp_path / "file").rename(tmp_path / ("d" * 250))  # what is written beside it first has a longer name
    started = list[str]()

    def run_replicas(found: Version, _count: int, _patience_s: float | None = None) -> None:
        started.append(found.package)
        if broken:
            raise RuntimeError("no such file")

    monkeypatch.setattr(version_loader, "_run_replicas", run_replicas)
    monkeypatch.setattr(controller.ray_serve, "replica_counts", lambda _: {})
    monkeypatch.setattr(controller.ray_serve, "delete_application", lambda *_, **__: None)
    monkeypatch.setattr(controller.ray_serve, "abandon_application", lambda _: None)
    monkeypatch.setattr(controller, "ACK_TIMEOUT_S", 0.01)
    settings = SETTINGS.model_copy(update={"deployments": str(file)})

    async def restart() -> None:
        alone = Controller(settings)
        await alone.start(settings, {str(text_package): SETTINGS})
        assert started == [deployed.package]
        events = (await alone.deployments()).events
        assert [event.change for event in events] == (["deploy", "failed"] if broken else ["deploy"])
        if not broken:
            with pytest.raises(InputError, match="cannot be written"):
                await alone.deploy(str(second_package), SETTINGS, "stable", "ada")
            assert [found.package for found in (await alone.deployments()).versions] == [deployed.package]

    asyncio.run(restart())
    assert len(read_deployments(str(file)).events) == 1
