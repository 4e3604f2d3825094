"""Traffic that is kept: what is in the files, what is not, and that `prepare` reads them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overproof.config import ParquetSource, Serve, Traffic
from overproof.data.sources import list_files
from overproof.engines.llamacpp import LlamaCpp
from overproof.errors import InputError
from overproof.files import filesystem, join_uri
from overproof.package.package import open_package
from overproof.serve.application import resolve_settings
from overproof.serve.middleware import Access, Telemetry
from overproof.serve.routes import build_app
from overproof.serve.traffic import REPLIES, Exchange, Rating, Recorder, Redactor, in_sample
from single_model import one as alone

NOW = datetime(2026, 1, 2, tzinfo=UTC)
EXCHANGE = Exchange("cmpl-1", NOW, "x/package-1", "x", 0, "a ", "b", "stop", 1, 1, 0.5, None)


def settings(folder: Path | str, **changes: Any) -> Traffic:
    return Traffic.model_validate({"folder": str(folder), "seconds_per_file": 60.0, **changes})


def rows(folder: Path | str, kind: str = REPLIES) -> list[dict[str, Any]]:
    """In the order of the files, as `prepare` lists them."""
    files, root = filesystem(join_uri(str(folder), kind))
    names = [file.name for file in list_files(ParquetSource(path=join_uri(str(folder), kind))).files]
    return [row for name in names for row in pq.read_table(f"{root}/{name}", filesystem=files).to_pylist()]


def until(reached: Any) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def written(folder: Path, kind: str = REPLIES) -> int:
    return len(list((folder / kind).glob("*.parquet")))


CODE = "x = [1, 2, 3]  # 10 of 12, v1.2.3, 2026-01-02 12:30:45"


def test_a_file_comes_with_enough_rows_and_the_rest_at_the_end(tmp_path: Path) -> None:
    recorder = Recorder(settings(tmp_path, rows_per_file=4))
    for number in range(4):
        recorder.record(replace(EXCHANGE, id=f"cmpl-{number}"))
    until(lambda: written(tmp_path))
    recorder.record(replace(EXCHANGE, id="cmpl-4"))
    recorder.close()
    assert [row["id"] for row in rows(tmp_path)] == [f"cmpl-{number}" for number in range(5)]
    assert {path.suffix for path in (tmp_path / REPLIES).iterdir()} == {".parquet"}
    assert rows(tmp_path)[0]["text"] == "a b"
    assert rows(tmp_path)[0]["created"] == NOW


def test_a_file_comes_after_a_while(tmp_path: Path) -> None:
    recorder = Recorder(settings(tmp_path, seconds_per_file=0.1))
    recorder.record(EXCHANGE)
    recorder.rate(Rating("cmpl-1", NOW, -1.0, "mail me: a@example.org"))
    until(lambda: written(tmp_path) and written(tmp_path, "ratings"))
    (row,) = rows(tmp_path, "ratings")
    assert row == {"id": "cmpl-1", "created": NOW, "rating": -1.0, "comment": "mail me: [address]"}
    recorder.close()


def test_the_folder_may_be_a_uri(s3_uri: str) -> None:
    recorder = Recorder(settings(s3_uri))
    recorder.record(EXCHANGE)
    recorder.close()
    assert [row["id"] for row in rows(s3_uri)] == ["cmpl-1"]


def test_rows_wait_for_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / REPLIES).write_text("in the way")
    recorder = Recorder(settings(tmp_path, rows_per_file=2, seconds_per_file=0.05))
    for number in range(30):
        recorder.record(replace(EXCHANGE, id=f"cmpl-{number}"))
        time.sleep(0.01)
    (tmp_path / REPLIES).unlink()
    until(lambda: written(tmp_path))
    recorder.close()
    kept = [int(row["id"].removeprefix("cmpl-")) for row in rows(tmp_path)]
    assert kept == sorted(set(kept))
    assert kept[-20:] == list(range(10, 30))  # as many as ten files hold, for memory is bounded: those that wait last


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jane.doe@mail.example.org now", "write to [address] now"),
        ("from 192.168.10.2 to", "from [ip] to"),
        ("card 4111 1111 1111 1111, thanks", "card [number], thanks"),
        ("account 1234567890123456", "account [number]"),
        ("call +49 (30) 1234-5678!", "call [number]!"),
        ("key op-abcdefghijklmnopqrst", "key [secret]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc", "[secret]"),
        ("PROJECT-APOLLO starts", "[redacted] starts"),
        ("4111111111111111,4111111111111111,4111111111111111.", "[number],[number],[number]."),
        ("+49 30 12345678 +49 30 12345679", "[number] [number]"),
        ("٤١١١" * 4, "[number]"),
        ("an jörg@müller.example geschickt", "an [address] geschickt"),
        ("half \ud83d of a pair", "half ? of a pair"),
        (CODE, CODE),
    ],
)  # fmt: skip
def test_what_is_private_is_taken_out(text: str, expected: str) -> None:
    assert Redactor(("PROJECT-[A-Z]+",))(text) == expected


@pytest.mark.parametrize(
    ("start", "part"),
    [("", "1"), ("", "1 "), ("", "+1("), ("", "a."), ("", "a@b."), ("", "1."), ("-----BEGIN ", "A"), ("", "eyJ"),
     ("", "-----BEGIN PRIVATE KEY-----"), ("", "a@")],
)  # fmt: skip
def test_no_text_takes_longer_than_its_length(start: str, part: str) -> None:
    """Of a pattern that tries again from each character the first of these alone would take hours."""
    text = start + part * (2_000_000 // len(part))
    redacted = Redactor((r"(a+)+$", r"(\d+\s?)+x"))(text)
    assert len(redacted) <= 4 * len(text), part  # and not the texts


def test_patterns_are_searched_without_the_interpreter() -> None:
    """Another thread, which holds it now and then, goes on while a long text is searched."""
    redactor, text, done, turns = Redactor(), "a." * 4_000_000, threading.Event(), 0
    worker = threading.Thread(target=lambda: (redactor(text), done.set()))
    worker.start()
    while not done.wait(0.001):
        turns += 1
    worker.join()
    assert turns > 5


def test_what_lies_across_prompt_and_reply_is_taken_out_of_their_text(tmp_path: Path) -> None:
    recorder = Recorder(settings(tmp_path))
    recorder.record(replace(EXCHANGE, prompt="4111 1111 ", reply="1111 1111"))
    recorder.close()
    assert rows(tmp_path)[0]["text"] == "[number]"


@given(st.floats(0.01, 1), st.integers(0, 50))
def test_a_larger_sample_has_all_of_a_smaller_one(share: float, number: int) -> None:
    assert in_sample(f"{number}", 1.0)
    assert in_sample(f"{number}", share) <= in_sample(f"{number}", min(1.0, share * 1.5))


def test_a_sample_is_of_its_size() -> None:
    assert 420 < sum(in_sample(f"cmpl-{number}", 0.25) for number in range(2000)) < 580


@pytest.fixture(scope="module")
def engine(text_package: Path) -> Iterator[LlamaCpp]:
    made = LlamaCpp(text_package / "model.gguf", slots=2)
    yield made
    made.close()


def test_replies_of_every_kind_are_kept_and_rated(text_package: Path, engine: LlamaCpp, tmp_path: Path) -> None:
    recorder = Recorder(settings(tmp_path))
    app = build_app(alone(text_package, engine), Access(), Telemetry(recorder=recorder))

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            arguments = {"max_tokens": 4, "seed": 1}
            prompts = {"prompt": ["import os\n", [0, 70]], "n": 2}
            one = (await http.post("/v1/completions", json=arguments | prompts)).json()
            chat = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
            streamed = (await http.post("/v1/chat/completions", json=arguments | chat)).text
            rated = await http.post("/v1/ratings", json={"id": one["id"], "rating": 1, "comment": "good"})
            refused = {"prompt": "x" * 9999, "stream": True}
            assert (await http.post("/v1/completions", json=refused)).status_code == 400  # and is not kept
            bad = await http.post("/v1/ratings", json={"id": one["id"], "rating": 2})
            events = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if "{" in line]
            return [one, events, rated.status_code, bad.status_code]

    one, events, rated, bad = asyncio.run(ask())
    recorder.close()
    assert (rated, bad) == (200, 400)
    kept = rows(tmp_path)
    assert [(row["id"], row["index"]) for row in kept] == [(one["id"], i) for i in range(4)] + [(events[0]["id"], 0)]
    assert [row["reply"] for row in kept[:4]] == [choice["text"] for choice in one["choices"]]
    assert [row["prompt"] for row in kept[:4]] == ["import os\n"] * 2 + [engine.detokenize([0, 70])] * 2
    assert kept[4]["prompt"] == "# user\nhi\n# assistant\n"
    assert kept[4]["reply"] == "".join(event["choices"][0]["delta"]["content"] or "" for event in events)
    assert kept[4]["first_event_s"] <= kept[4]["seconds"]
    assert all(row["text"] == row["prompt"] + row["reply"] and row["completion_tokens"] == 4 for row in kept)
    assert {row["package"] for row in kept} == {open_package(text_package).content.id}
    assert [row["id"] for row in rows(tmp_path, "ratings")] == [one["id"]]


def test_nothing_is_kept_unless_it_is_asked_for(text_package: Path, engine: LlamaCpp) -> None:
    app = build_app(alone(text_package, engine), Access())

    async def rate() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            return await http.post("/v1/ratings", json={"id": "x", "rating": 1})

    assert asyncio.run(rate()).status_code == 404
    assert Serve().traffic is None


def test_what_cannot_be_kept_is_refused(text_package: Path, digits_package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for package, traffic, message in (
        (digits_package, settings(tmp_path), "traffic is kept of models that write"),
        (text_package, settings(tmp_path / "file" / "folder"), "expected one you may write to"),
    ):
        with pytest.raises(InputError, match=message):
            resolve_settings({str(package): Serve()}, Serve(traffic=traffic))
    with pytest.raises(InputError, match=r"traffic\.redact"):
        Serve.parse({"traffic": {"folder": "x", "redact": ["(("]}}, "serve")
