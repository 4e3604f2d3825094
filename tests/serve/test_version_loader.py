"""Versions load beside each other: one that does not come up holds up no other, and memory is shared out as it is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from overproof.errors import InputError
from overproof.serve import version_loader
from overproof.serve.controller import describe_version
from overproof.serve.deployments import Version
from overproof.serve.version_loader import VersionLoader
from shared_server import SETTINGS, WAIT_S


class Replicas:
    """In place of Ray Serve: a package's start waits until it is let go on, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running, self.held, self.broken = list[str](), dict[str, threading.Event](), set[str]()
        self.counts = dict[str, int]()
        monkeypatch.setattr(version_loader, "_run_replicas", self.run)
        monkeypatch.setattr(version_loader.ray_serve, "set_replicas", self.counts.__setitem__)
        monkeypatch.setattr(version_loader.ray_serve, "wait_until_running", self.wait)
        monkeypatch.setattr(version_loader.ray_serve, "abandon_application", self.delete)
        monkeypatch.setattr(version_loader.ray_serve, "delete_application", self.delete)
        monkeypatch.setattr(version_loader, "GRACE_S", 0.0)

    def run(self, version: Version, count: int, _patience_s: float | None = None) -> None:
        if version.package in self.held:
            assert self.held[version.package].wait(WAIT_S)
        if version.package in self.broken:
            raise RuntimeError("no such file")
        self.running.append(version.application)
        self.counts[version.application] = count

    def wait(self, name: str, count: int, patience_s: float | None) -> None:
        if name in self.broken and patience_s is None:
            raise RuntimeError(f"1 of {count} replicas in 900 s")

    def delete(self, name: str, wait: bool = True) -> None:
        if name in self.running:
            self.running.remove(name)


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Replicas:
    return Replicas(monkeypatch)


@pytest.fixture
def version(text_package: Path) -> Callable[..., Version]:
    found = describe_version(str(text_package), SETTINGS)

    def made(package: str, **changes: Any) -> Version:
        proof = found.model.overproof.model_copy(update={"package": package})
        model = found.model.model_copy(update={"overproof": proof})
        return found.model_copy(update={"model": model, "resident_mb": 60.0, **changes})

    return made


def run(work: Callable[[VersionLoader], Coroutine[Any, Any, None]]) -> None:
    async def on_stop() -> None:
        pass

    async def main() -> None:
        await work(VersionLoader(on_stop))

    asyncio.run(main())


def test_one_that_hangs_holds_up_no_other(replicas: Replicas, version: Callable[..., Version]) -> None:
    replicas.held["slow"], replicas.broken = threading.Event(), {"broken"}

    async def work(loader: VersionLoader) -> None:
        slow = asyncio.ensure_future(loader.start(version("slow")))
        assert await loader.start(version("quick"))
        assert not await loader.start(version("quick"))  # it runs
        with pytest.raises(InputError, match="broken does not start, and nothing has changed: no such file"):
            await loader.start(version("broken"))
        assert loader.loaded == {"quick"}
        assert loader.busy
        await loader.stop({"quick", "slow"})
        assert (loader.loaded, replicas.running) == (frozenset(), [])
        replicas.held["slow"].set()
        assert await slow
        assert (loader.loaded, loader.busy) == ({"slow"}, False)

    run(work)


def test_memory_is_reserved_before_a_version_starts(replicas: Replicas, version: Callable[..., Version]) -> None:
    replicas.held["slow"] = threading.Event()

    async def work(loader: VersionLoader) -> None:
        loader.memory_mb = 100.0
        with pytest.raises(InputError, match=r"serve\.memory_mb: large takes 101 MB; expected 100 at most"):
            await loader.start(version("large", resident_mb=101.0))
        await loader.start(version("old"))
        slow = asyncio.ensure_future(loader.start(version("slow")))  # which stops the old one
        while not loader.busy:
            await asyncio.sleep(0.01)
        assert (loader.loaded, replicas.running) == (frozenset(), [])
        waiting = asyncio.ensure_future(loader.start(version("next")))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        replicas.held["slow"].set()
        await asyncio.wait_for(asyncio.gather(slow, waiting), WAIT_S)
        assert loader.loaded == {"next"}  # for which what was used longest ago was stopped
        assert replicas.running == [version("next").application]

    run(work)


def test_as_many_replicas_as_are_asked_for_start_or_nothing_changes(
    replicas: Replicas, version: Callable[..., Version]
) -> None:
    sizes = SETTINGS.model_copy(update={"min_replicas": 1, "max_replicas": 4})
    one, two = version("one", settings=sizes), version("two", settings=sizes)

    async def work(loader: VersionLoader) -> None:
        assert await loader.start(one, 3)
        assert not await loader.start(one, 2)  # it has more
        await loader.start(two, 9)
        assert replicas.counts == {one.application: 3, two.application: 4}  # its own limit
        assert not await loader.start(one, 4)  # a candidate that is promoted
        assert (replicas.counts[one.application], loader.autoscaler.target("one")) == (4, 4)
        tried = version("tried", settings=sizes)
        await loader.start(tried)
        replicas.broken = {tried.application}
        with pytest.raises(InputError, match="tried does not start, and nothing has changed: 1 of 4 replicas"):
            await loader.start(tried, 4)
        assert (replicas.counts[tried.application], loader.autoscaler.target("tried")) == (1, 1)
        assert not await loader.start(tried, 4, patience_s=0.0)  # a rollback goes by what there is
        assert loader.autoscaler.target("tried") == 4

    run(work)


def test_settings_that_fail_leave_what_ran(replicas: Replicas, version: Callable[..., Version]) -> None:
    async def work(loader: VersionLoader) -> None:
        await loader.start(version("a"))
        before = version("a")
        replicas.broken = {"a"}
        tried: list[Version] = []

        def once(found: Version, count: int, _patience_s: float | None = None) -> None:
            tried.append(found)
            if len(tried) == 1:
                raise RuntimeError("no node for it")

        replicas.run, version_loader._run_replicas = once, once  # type: ignore[method-assign]
        with pytest.raises(InputError, match="no node for it"):
            await loader.start(version("a", settings=SETTINGS.model_copy(update={"threads": 3})))
        assert tried[-1] == before
        assert not await loader.start(before)

    run(work)


def test_a_start_that_is_given_up_ends_and_one_of_new_settings_is_not(
    replicas: Replicas, version: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    def abandon(name: str) -> None:
        replicas.broken.add("slow")
        replicas.held["slow"].set()

    monkeypatch.setattr(version_loader.ray_serve, "abandon_application", abandon)

    async def work(loader: VersionLoader) -> None:
        replicas.held["slow"] = threading.Event()
        slow = asyncio.ensure_future(loader.start(version("slow")))
        while not loader.busy:
            await asyncio.sleep(0.01)
        assert await loader.give_up("another model") is None
        assert await loader.give_up(version("slow").model.id) == "slow"
        with pytest.raises(InputError, match="slow does not start"):
            await slow
        await loader.start(version("runs"))
        replicas.held["runs"] = threading.Event()
        changed = SETTINGS.model_copy(update={"threads": 3})
        update = asyncio.ensure_future(loader.start(version("runs", settings=changed)))
        while not loader.busy:
            await asyncio.sleep(0.01)
        assert await loader.give_up(version("runs").model.id) is None  # its replicas answer meanwhile
        replicas.held["runs"].set()
        assert await update

    run(work)
