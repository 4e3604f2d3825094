"""A small model that drafts for a large one: the text stays the large one's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from overproof.data.tokenization import train_bpe
from overproof.engines.base import Sampling
from overproof.engines.llamacpp import LlamaCpp
from overproof.errors import InputError
from overproof.export.gguf_file import export_gguf
from packing import VOCABULARY

PROMPTS = [[0, 70 + i] for i in range(32)]


@pytest.fixture(scope="module")
def draft(text_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same data and other first weights, which is right about as often as not."""
    return _export(text_package, text_package / "tokenizer.json", tmp_path_factory.mktemp("draft"))


@pytest.fixture(scope="module")
def alone(text_package: Path) -> Iterator[LlamaCpp]:
    made = LlamaCpp(text_package / "model.gguf", slots=4)
    yield made
    made.close()


@pytest.fixture(scope="module")
def drafted(text_package: Path, draft: Path) -> Iterator[LlamaCpp]:
    made = LlamaCpp(text_package / "model.gguf", slots=4, draft=draft)
    yield made
    made.close()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "seed": 3},
        {"temperature": 1.5, "seed": 4, "top_p": 0.9},
        {"frequency_penalty": 0.5},
        {"stop": ("e",)},
        {"grammar": 'root ::= "x" [a-z ]* "y"'},
        {"logit_bias": {75: 4.0}},
    ],
)
def test_a_draft_changes_no_text(alone: LlamaCpp, drafted: LlamaCpp, settings: dict[str, Any]) -> None:
    before = drafted.drafted
    for prompt in PROMPTS:
        expected, found = (engine.complete(prompt, Sampling(24, **settings)) for engine in (alone, drafted))
        assert (found.tokens, found.text) == (expected.tokens, expected.text)
        assert found.finish_reason == expected.finish_reason
    assert drafted.drafted > before
    assert 0 < drafted.accepted < drafted.drafted
    assert (alone.drafted, alone.accepted) == (0, 0)


def test_nor_do_others_that_share_its_steps(alone: LlamaCpp, drafted: LlamaCpp) -> None:
    expected = [alone.complete(prompt, Sampling(24)).tokens for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: drafted.complete(prompt, Sampling(24)).tokens, PROMPTS)) == expected


def test_streams_are_drafted_too(alone: LlamaCpp, drafted: LlamaCpp) -> None:
    for prompt in PROMPTS[:12]:
        whole = alone.complete(prompt, Sampling(24, stop=("\n\n",)))
        *pieces, last = drafted.stream(prompt, Sampling(24, stop=("\n\n",)))
        assert "".join(piece.text for piece in (*pieces, last)) == whole.text
        assert (last.finish_reason, last.completion_tokens) == (whole.finish_reason, len(whole.tokens))


def test_log_probabilities_are_the_models(alone: LlamaCpp, drafted: LlamaCpp) -> None:
    """llama.cpp reports none of what a draft had guessed."""
    for seed, prompt in enumerate(PROMPTS[:6]):
        arguments = Sampling(12, temperature=seed % 3, seed=seed, logprobs=2)
        assert drafted.complete(prompt, arguments).token_logprobs == alone.complete(prompt, arguments).token_logprobs


def test_an_answer_that_fills_the_context_is_the_same(text_package: Path, draft: Path) -> None:
    short, alone = (LlamaCpp(text_package / "model.gguf", context_length=48, draft=d) for d in (draft, None))
    expected = alone.complete(PROMPTS[0], Sampling(100))
    assert len(expected.tokens) == 46
    assert short.complete(PROMPTS[0], Sampling(100)).tokens == expected.tokens
    short.close()
    alone.close()


def test_what_cannot_draft_is_refused(text_package: Path, draft: Path, tmp_path: Path) -> None:
    model, cut = text_package / "model.gguf", tmp_path / "cut.gguf"
    cut.write_bytes(draft.read_bytes()[:-5000])
    train_bpe(["other words " * 50, "and bytes" * 9], VOCABULARY).save(str(tmp_path / "tokenizer.json"))
    for file, message in (
        (_export(text_package, tmp_path / "tokenizer.json", tmp_path), "another vocabulary than the model"),
        (cut, "cut.gguf"),
        (tmp_path / "none.gguf", "none.gguf: missing"),
    ):
        with pytest.raises(InputError, match=message):
            LlamaCpp(model, draft=file)
    with pytest.raises(InputError, match="draft_tokens: found 0"):
        LlamaCpp(model, draft=draft, draft_tokens=0)


def _export(text_package: Path, tokenizer: Path, folder: Path) -> Path:
    """The teacher from beside the package."""
    (model,) = text_package.parent.glob("train-*/model")
    export_gguf(model, tokenizer, folder / "draft.gguf", "q8_0", "draft")
    return folder / "draft.gguf"
