"""Completions that begin with their prompt, whose tokens have their log-probabilities, too."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_http import ask

from overproof.engines import llamacpp_memory
from overproof.engines.base import Sampling
from overproof.engines.gguf_tokens import GgufHeader, read_gguf_header
from overproof.engines.llamacpp import LlamaCpp
from overproof.engines.llamacpp_logits import LlamaCppLogits
from overproof.export.gguf_file import read_gguf
from overproof.serve.async_engine import ThreadedEngine
from overproof.serve.middleware import Access
from overproof.serve.routes import build_app
from single_model import one

TEXT = "def café():\n    return '日本 🎉'<|endoftext|>x"
START = 0  # the token that is put before a text


@pytest.fixture(scope="module")
def engine(text_package: Path) -> Iterator[LlamaCpp]:
    made = LlamaCpp(text_package / "model.gguf", slots=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def app(text_package: Path, engine: LlamaCpp) -> Any:
    return build_app(one(text_package, engine), Access(None))


@pytest.fixture(scope="module")
def header(text_package: Path) -> GgufHeader:
    return read_gguf_header(text_package / "model.gguf")


def complete(app: Any, **body: Any) -> Any:
    reply = ask(app, "POST", "/v1/completions", json={"temperature": 0, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def events(app: Any, **body: Any) -> list[Any]:
    text = ask(app, "POST", "/v1/completions", json={"temperature": 0, "stream": True, **body}).text
    *found, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(event)["choices"][0] for event in found]


def test_a_prompts_log_probabilities_are_the_models_own(app: Any, engine: LlamaCpp, text_package: Path) -> None:
    ids = [START, *engine.tokenize(TEXT)]
    with torch.inference_mode():
        logits_SV = read_gguf(text_package / "model.gguf")(input_ids=torch.tensor([ids])).logits[0]
    expected_SV = logits_SV.log_softmax(-1).numpy()
    reply = complete(app, prompt=TEXT, echo=True, logprobs=3, max_tokens=0)
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert reply["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}
    told = choice["logprobs"]
    assert [len(each) for each in told.values()] == [len(ids)] * 4
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    found = np.array(told["token_logprobs"][1:])
    assert np.abs(found - expected_SV[np.arange(len(ids) - 1), ids[1:]]).max() < 0.25  # activations are of 8 bits
    for top, expected_V in zip(told["top_logprobs"][1:], expected_SV, strict=False):
        values = list(top.values())
        assert len(values) == 3
        assert np.abs(np.sort(values)[::-1] - np.sort(expected_V)[:-4:-1]).max() < 0.25


def test_offsets_are_characters_of_the_text(app: Any, engine: LlamaCpp, header: GgufHeader) -> None:
    """With characters of several tokens, and a token that adds no text by itself but is spelled in the prompt."""
    told = complete(app, prompt=TEXT, echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"]
    ids = [START, *engine.tokenize(TEXT)]
    assert sum(header.pieces[id_] == b"" for id_ in ids) == 2
    tokens, offsets = told["tokens"], told["text_offset"]
    assert (tokens[0], offsets[:2]) == ("", [0, 0])
    assert tokens[ids.index(START, 1)] == "<|endoftext|>"
    assert sum(token.startswith("bytes:") for token in tokens) > 5
    assert offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        assert token.startswith("bytes:") or TEXT[offset:].startswith(token)
    ends = [*offsets[1:], len(TEXT)]
    whole = [(token, TEXT[start:end]) for token, start, end in zip(tokens, offsets, ends, strict=True)]
    assert all(token == text for token, text in whole if not token.startswith("bytes:"))
    inside = [START, *engine.tokenize("日本"), 70][:-3]  # ends inside a character
    choice = complete(app, prompt=inside, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert choice["text"] == header.text(inside)
    assert choice["logprobs"]["text_offset"][-1] < len(choice["text"])


def test_every_form_of_prompt_is_told(app: Any, engine: LlamaCpp) -> None:
    ids = [START, *engine.tokenize("import os")]
    of_text = complete(app, prompt="import os", echo=True, logprobs=2, max_tokens=0)["choices"]
    assert complete(app, prompt=ids, echo=True, logprobs=2, max_tokens=0)["choices"] == of_text
    for prompts in (["import os", "class A"], [ids, [START, *engine.tokenize("class A")]]):
        first, second, third, fourth = complete(app, prompt=prompts, echo=True, logprobs=2, max_tokens=0, n=2)[
            "choices"
        ]
        assert [first] == of_text
        assert second == first | {"index": 1}
        assert (third["text"], fourth) == ("class A", third | {"index": 3})
    plain = complete(app, prompt="import os", echo=True, max_tokens=0)["choices"][0]
    assert (plain["text"], plain["logprobs"]) == ("import os", None)
    single = complete(app, prompt=[START], echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    assert single == {"tokens": [""], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}


def test_what_is_generated_follows_its_prompt(app: Any) -> None:
    generated = complete(app, prompt="import os\n", logprobs=1, max_tokens=6)["choices"][0]
    prompt = complete(app, prompt="import os\n", echo=True, logprobs=1, max_tokens=0)["choices"][0]
    both = complete(app, prompt="import os\n", echo=True, logprobs=1, max_tokens=6)["choices"][0]
    assert both["text"] == "import os\n" + generated["text"]
    count = len(prompt["logprobs"]["tokens"])
    assert len(both["logprobs"]["tokens"]) == count + 6
    for name, values in both["logprobs"].items():
        assert values[:count] == prompt["logprobs"][name]
        moved = 10 if name == "text_offset" else 0
        expected = [value + moved if moved else value for value in generated["logprobs"][name]]
        assert values[count:] == expected
    plain = complete(app, prompt="import os\n", echo=True, max_tokens=6)["choices"][0]
    assert plain == both | {"logprobs": None}


def test_the_end_of_text_that_was_generated_has_its_entry(app: Any, header: GgufHeader) -> None:
    """As clients count on who look at the last but so many entries: each token that was generated is there."""
    end = next(id_ for id_, name in header.silent_names.items() if name == header.eos_token)
    arguments: Any = {"prompt": "x", "logprobs": 1, "max_tokens": 1, "logit_bias": {str(end): 100}}
    choice = complete(app, **arguments, echo=True)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("x", "stop")
    assert choice["logprobs"]["tokens"] == ["", "x", ""]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]
    assert complete(app, **arguments)["choices"][0]["logprobs"]["tokens"] == []
    assert [event["finish_reason"] for event in events(app, **arguments)] == ["stop"]


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_stream_begins_with_the_prompt(app: Any, logprobs: int | None, max_tokens: int) -> None:
    arguments: Any = {"prompt": TEXT, "echo": True, "max_tokens": max_tokens, "logprobs": logprobs}
    whole = complete(app, **arguments)["choices"][0]
    found = events(app, **arguments)
    assert found[0]["text"] == TEXT
    assert "".join(event["text"] for event in found) == whole["text"]
    assert [e["finish_reason"] for e in found] == [None] * (len(found) - 1) + [whole["finish_reason"]]
    if logprobs is not None:
        for name, values in whole["logprobs"].items():
            parts = [event["logprobs"][name] for event in found if event["logprobs"]]
            assert list(itertools.chain.from_iterable(parts)) == values


def test_stop_strings_and_grammars_are_of_what_is_generated(app: Any) -> None:
    choice = complete(app, prompt="import os", echo=True, max_tokens=8, stop=["os"], grammar='root ::= "yes"')[
        "choices"
    ]
    assert [(each["text"], each["finish_reason"]) for each in choice] == [("import osyes", "stop")]


def test_pieces_join_to_a_text_that_sentencepiece_reads_otherwise(header: GgufHeader) -> None:
    """With a space that is read before it, and an unknown character, whose token has no text."""
    pieces = (b"", b" ab", b"c", b"", b" d")
    found = GgufHeader(
        **{**vars(header), "pieces": pieces, "silent_names": {0: "<s>", 3: "<unk>"}, "space_prefix": True}
    )
    assert found.text_pieces("abc€c d", [0, 1, 2, 3, 2, 4]) == [b"", b"ab", b"c", "€".encode(), b"c", b" d"]
    assert found.text_pieces("ab€", [0, 1, 3]) == [b"", b"ab", "€".encode()]
    assert found.text_pieces("<s>ab", [0, 0, 1]) == [b"<s>", b"", b"ab"]
    reading = found.reading([0, 1, 2, 1], [0, 1, 2, 1], None)
    assert (reading.text, reading.pieces) == ("abc ab", [b"", b"ab", b"c", b" ab"])


def test_a_request_that_is_cancelled_ends_its_reading(text_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, started, go, decode = list[int](), threading.Event(), threading.Event(), LlamaCppLogits._decode

    def slow(self: LlamaCppLogits, tokens_P: Any, *place: Any) -> Any:
        batches.append(len(tokens_P))
        started.set()
        assert go.wait(60)
        return decode(self, tokens_P, *place)

    monkeypatch.setattr(llamacpp_memory, "MOST_TOKENS", 32)
    monkeypatch.setattr(LlamaCppLogits, "_decode", slow)
    engine = ThreadedEngine(LlamaCpp(text_package / "model.gguf"), 2)

    async def run() -> None:
        sampling = Sampling(0, logprobs=1, echo=True)
        reading = asyncio.ensure_future(engine.complete([70] * 1000, sampling))
        await asyncio.to_thread(started.wait)
        queued = asyncio.ensure_future(engine.complete([70] * 1000, sampling))
        await asyncio.sleep(0.05)
        for cancelled in (reading, queued):
            cancelled.cancel()
        await asyncio.sleep(0.05)
        assert not reading.done()  # its slot is free when its work has ended
        go.set()
        await asyncio.wait((reading, queued))
        after = await engine.complete([70] * 9, sampling)
        assert after.prompt is not None
        assert after.prompt.scores is not None
        assert (batches, len(after.prompt.scores)) == ([32, 8], 8)
        await engine.close()

    asyncio.run(run())


def test_tokens_inside_characters_cost_one_reading_and_a_cancelled_one_ends(
    text_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp reports none of them: a bias on a lead byte makes that every token."""
    readings, decode = list[int](), LlamaCppLogits._decode

    def counted(self: LlamaCppLogits, tokens_P: Any, *place: Any) -> Any:
        readings.append(len(tokens_P))
        return decode(self, tokens_P, *place)

    monkeypatch.setattr(LlamaCppLogits, "_decode", counted)
    engine = LlamaCpp(text_package / "model.gguf")
    lead = engine.tokenize("日")[0]
    sampling = Sampling(60, logit_bias={lead: 100.0}, logprobs=1)
    done = engine.complete([70] * 20, sampling)
    assert done.tokens == [lead] * 60
    assert sum(readings) == 79  # every token but the last, once
    assert done.token_logprobs is not None
    assert {token.id for token in done.token_logprobs} == {lead}
    cancelled = threading.Event()
    again = engine.complete([70] * 20, sampling, cancelled)
    assert (again.text, again.token_logprobs) == (done.text, done.token_logprobs)
    assert sum(readings) == 2 * 79
    cancelled.set()
    with pytest.raises(RuntimeError, match="cancelled"):
        engine.complete([70] * 20, sampling, cancelled)
    assert sum(readings) == 2 * 79
    engine.close()


def test_a_cancelled_request_is_stopped_while_it_generates(text_package: Path) -> None:
    """Also between tokens that end no character. The length is some hundred times what is generated meanwhile."""
    engine = LlamaCpp(text_package / "model.gguf")
    cancelled = threading.Event()
    cancelled.set()
    for token in ("日", "a"):
        always = Sampling(2_000, logit_bias={engine.tokenize(token)[0]: 100.0}, logprobs=1)
        with pytest.raises(RuntimeError, match="cancelled"):
            engine.complete([70] * 20, always, cancelled)
    assert engine.complete([70], Sampling(1)).tokens  # its slot is free
    engine.close()
