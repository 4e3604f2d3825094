"""Stores that fail: what they say is said once, what was finished stays, and the same run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from faulty_bucket import BROKEN, FULL, SLOW_DOWN, UNKNOWN_KEY, Answer, Faults, faulty_bucket
from finished import RECIPES
from overproof import pipeline
from overproof.artifacts import Store, StoreUnavailable
from overproof.config import load_recipe
from overproof.errors import InputError
from overproof.files import storage_fault

WRITES = ("PUT", "POST")


@pytest.fixture
def bucket(ray_cluster: str, s3_uri: str) -> Iterator[tuple[str, Faults]]:
    with faulty_bucket(s3_uri) as found:
        yield found


def prepare(store: str) -> None:
    pipeline.run(load_recipe(RECIPES / "digits.yaml", (f"store={store}",)), "prepare")


@pytest.mark.parametrize("answer", [BROKEN, SLOW_DOWN], ids=lambda answer: answer.code)
def test_a_request_that_fails_is_made_again(answer: Answer, bucket: tuple[str, Faults]) -> None:
    store, faults = bucket
    faults.answer, faults.each, faults.wait_s = answer, 7, 0.02
    prepare(store)
    assert faults.count > 0
    faults.answer = None
    (artifact,) = Store(store).artifacts()
    artifact.verify()


def test_an_artifact_that_cannot_be_looked_up_is_not_made_anew(
    bucket: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overproof.files.RETRY_WAITS_S", (0.0,))  # Arrow's own tries take seconds each time
    store, faults = bucket
    prepare(store)
    (made,) = Store(store).artifacts()
    faults.answer, faults.methods = SLOW_DOWN, ("GET",)
    with pytest.raises(StoreUnavailable, match=r"cannot be read: .*; run again when it can$"):
        Store(store).lookup(made.record.recipe, made.record.stage, made.record.fingerprint)
    faults.answer = None
    made.verify()


@pytest.mark.parametrize(
    ("answer", "methods", "reason"),
    [(FULL, WRITES, "minimum free space"), (UNKNOWN_KEY, ("PUT", "POST", "GET", "HEAD"), "ACCESS_DENIED")],
    ids=["full", "no access"],
)
def test_a_store_that_fails_in_a_stage_is_one_error_and_the_run_goes_on(
    answer: Answer, methods: tuple[str, ...], reason: str, bucket: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins to fail when the stage's files are written."""
    store, faults = bucket
    written = pipeline.StageContext

    def fail(*arguments: object) -> pipeline.StageContext:
        faults.answer, faults.methods = answer, methods
        return written(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "StageContext", fail)
        with pytest.raises(InputError, match=rf"^prepare: s3://.*{reason}.*run again to go on$"):
            prepare(store)
    faults.answer = None
    assert Store(store).artifacts() == []
    prepare(store)
    (artifact,) = Store(store).artifacts()
    artifact.verify()


@pytest.mark.parametrize(
    ("function", "said", "told"),
    [
        (lambda: Path("/dev/full").write_bytes(b"x" * 100_000), "No space left", True),
        (lambda: Path("/dev/none").read_bytes(), "No such file", False),
    ],
    ids=["full", "missing"],
)
def test_a_full_disk_is_told_from_other_faults_on_whatever_node(
    function: Callable[[], None], said: str, told: bool, ray_cluster: str
) -> None:
    with pytest.raises(OSError, match=said) as here:
        function()
    with pytest.raises(OSError, match=said) as there:
        ray.get(ray.remote(num_cpus=0)(function).remote())
    for found in (here, there):
        fault = storage_fault(found.value)
        assert fault is None if not told else (fault and said in fault and "\n" not in fault and len(fault) < 100)
    assert storage_fault(ValueError("AWS Error")) is None
