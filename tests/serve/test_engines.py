"""The engines that measure and serve, on small files really exported."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from overproof.config import Serve
from overproof.engines.base import EngineSettings, Sampling, TextEngine
from overproof.engines.detokenizer import StopFilter
from overproof.engines.gguf_tokens import align_logprobs, incomplete_utf8_tail, read_gguf_header
from overproof.engines.llamacpp import LlamaCpp
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.engines.vllm_server import PYTHON_VARIABLE, unpacked_directory, vllm_python
from overproof.errors import InputError
from overproof.export.gguf_file import read_gguf
from overproof.export.onnx_file import Reference
from overproof.package.package import open_package
from overproof.registry import ENGINES
from overproof.serve.replica import load_engine
from packing import copy, edit

PROMPT = [0, 70, 71, 72]


# vLLM where an environment has it: see docs/serving.md.
INSTALLED = ["llama.cpp", *(["vllm"] if PYTHON_VARIABLE in os.environ else [])]


@pytest.fixture(scope="module", params=INSTALLED)
def engine(request: pytest.FixtureRequest, text_package: Path) -> Iterator[TextEngine]:
    made = ENGINES[request.param].load(text_package / "model.gguf", EngineSettings(threads=1, slots=4))
    assert isinstance(made, TextEngine)
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(text_package: Path) -> Tokenizer:
    return Tokenizer.from_file(str(text_package / "tokenizer.json"))


def test_logprobs_are_the_models_own_for_every_token(engine: TextEngine, text_package: Path) -> None:
    """Sampled hot, so that many tokens end inside a character: those llama.cpp itself does not report."""
    reference, header = read_gguf(text_package / "model.gguf"), read_gguf_header(text_package / "model.gguf")
    inside = 0
    for seed in range(4):
        done = engine.complete(PROMPT, Sampling(24, temperature=2.0, seed=seed, logprobs=3))
        assert done.token_logprobs is not None
        assert [token.id for token in done.token_logprobs] == done.tokens
        with torch.inference_mode():
            logits_SV = reference(input_ids=torch.tensor([[*PROMPT, *done.tokens]])).logits[0]
        places = range(len(PROMPT) - 1, len(PROMPT) + len(done.tokens) - 1)
        expected_SV = logits_SV[list(places)].log_softmax(-1).numpy()
        for token, expected_V in zip(done.token_logprobs, expected_SV, strict=True):
            assert token.piece == header.pieces[token.id]
            assert abs(token.logprob - expected_V[token.id]) < 0.25  # llama.cpp rounds activations to 8 bits
            likeliest = [value for _, _, value in token.top]
            assert len(likeliest) == 3
            assert np.abs(np.array(likeliest) - np.sort(expected_V)[:-4:-1]).max() < 0.25
        text = b""
        for token in done.tokens:
            text += header.pieces[token]
            inside += bool(incomplete_utf8_tail(text))
    assert inside


@pytest.mark.parametrize("stop", [(), ("e",), ("\n", "in", "self."), ("\n    never",)])
def test_pieces_join_to_the_whole(engine: TextEngine, stop: tuple[str, ...]) -> None:
    for seed in range(12):
        arguments = Sampling(5 + 3 * seed, temperature=seed % 3, seed=seed, stop=stop)
        whole = engine.complete([0, 70 + seed], arguments)
        *pieces, last = engine.stream([0, 70 + seed], arguments)
        assert "".join(p.text for p in (*pieces, last)) == whole.text
        assert all(p.finish_reason is None for p in pieces)
        assert last.finish_reason == whole.finish_reason
        assert (last.prompt_tokens, last.completion_tokens) == (whole.prompt_tokens, len(whole.tokens))
        assert not any(s in whole.text for s in stop)
        whole.text.encode()


def test_a_text_is_the_start_token_and_its_ids(engine: TextEngine, tokenizer: Tokenizer) -> None:
    text = "def café():\n    return '日本 🎉'<|endoftext|>x"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert engine.tokenize(text) == ids
    by_text, by_ids = (
        engine.complete(text, Sampling(8)),
        engine.complete([0, *ids], Sampling(8)),
    )  # a text starts a document
    assert (by_text.tokens, by_text.prompt_tokens) == (by_ids.tokens, 1 + len(ids))
    assert by_text.first_token_s > 0
    assert by_text.decode_s > 0


def test_greedy_repeats_and_seeds_repeat(engine: TextEngine) -> None:
    assert engine.complete(PROMPT, Sampling(20)).tokens == engine.complete(PROMPT, Sampling(20, seed=5)).tokens
    first, again, other = (engine.complete(PROMPT, Sampling(20, temperature=1.0, seed=s)).tokens for s in (1, 1, 2))
    assert first == again != other


def test_more_callers_than_slots_all_get_their_own_answer(engine: TextEngine) -> None:
    alone = [engine.complete([0, 70 + i], Sampling(24)) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: engine.complete([0, 70 + i], Sampling(24)), range(8)))
    assert [len(t.tokens) for t in together] == [len(a.tokens) for a in alone]
    assert sum(t.tokens == a.tokens for t, a in zip(together, alone, strict=True)) >= 6  # ties may fall otherwise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt: empty"),
        ({"prompt": []}, "prompt: empty"),
        ({"prompt": [512]}, "token id 512; expected 0 to 511"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": [1] * 2048}, "2048 tokens long; expected at most 2047"),
        ({"prompt": "x" * 5000}, "tokens long"),
        ({"prompt": "\ud800"}, "surrogates not allowed at character 0"),
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": 2**32 - 1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": "abc"}, "stop"),
        ({"logit_bias": {512: 1.0}}, "logit_bias: found token id 512"),
    ],
)
def test_bad_requests_are_refused_before_the_first_piece(engine: TextEngine, arguments: Any, message: str) -> None:
    settings = {"max_tokens": 4} | arguments
    prompt = settings.pop("prompt", "x")
    for ask in (engine.complete, engine.stream):
        with pytest.raises(InputError, match=message):
            ask(prompt, Sampling(**settings))


def test_a_long_answer_ends_where_the_context_does(engine: TextEngine) -> None:
    done = engine.complete([1] * 2040, Sampling(100))
    assert (len(done.tokens), done.finish_reason) == (8, "length")


def test_closing_a_stream_ends_the_generation(engine: TextEngine) -> None:
    pieces = engine.stream(PROMPT, Sampling(2000))
    next(pieces)
    pieces.close()
    began = time.monotonic()
    assert len(list(pieces)) < 1000
    assert engine.complete(PROMPT, Sampling(1)).tokens
    assert time.monotonic() - began < 5


def test_close_waits_for_calls_and_ends_the_engine(text_package: Path) -> None:
    engine = LlamaCpp(text_package / "model.gguf", slots=2)
    done: list[Any] = []
    caller = threading.Thread(target=lambda: done.append(engine.complete(PROMPT, Sampling(400))))
    caller.start()
    time.sleep(0.05)
    engine.close()
    assert done
    with pytest.raises(RuntimeError, match="closed"):
        engine.complete(PROMPT, Sampling(1))


def test_the_port_inside_answers_nobody_else(text_package: Path) -> None:
    engine = LlamaCpp(text_package / "model.gguf")
    address = f"http://{engine._http._address}"
    for path in ("/tokenize", "/completion", "/v1/completions"):
        assert httpx.post(f"{address}{path}", json={"content": "x", "prompt": "x"}).status_code == 401
    engine.close()


def test_many_texts_at_once_are_all_read(text_package: Path, tokenizer: Tokenizer) -> None:
    """llama.cpp has few HTTP threads: connections that stayed open would starve the others."""
    engine, texts = LlamaCpp(text_package / "model.gguf"), [f"def f{i}(self):\n" for i in range(400)]
    with ThreadPoolExecutor(32) as pool:
        expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        assert list(pool.map(engine.tokenize, texts)) == expected
        assert all(pool.map(lambda text: engine.complete(text, Sampling(1)).tokens, texts[:64]))
    engine.check()
    engine.close()


def test_files_that_are_no_models_are_refused(tmp_path: Path, text_package: Path, digits_package: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((text_package / "model.gguf").read_bytes()[:-5000])
    for path in (tmp_path / "none.gguf", digits_package / "model.onnx", cut):
        with pytest.raises(InputError, match=path.name):
            LlamaCpp(path)
    with pytest.raises(InputError, match="context length 4096; expected 2 to the model's 2048"):
        LlamaCpp(text_package / "model.gguf", context_length=4096)
    for path in (tmp_path / "none.onnx", text_package / "model.gguf"):
        with pytest.raises(InputError, match=path.name):
            OnnxRuntime(path)


def test_an_engine_that_was_never_asked_closes(text_package: Path) -> None:
    """In a process that a hung close cannot keep: llama.cpp waits for ever for a loop that it ends before its start."""
    code = (
        "import sys; from pathlib import Path; from overproof.engines.llamacpp import LlamaCpp\n"
        "for _ in range(10): LlamaCpp(Path(sys.argv[1]), slots=4).close()"
    )
    subprocess.run([sys.executable, "-c", code, text_package / "model.gguf"], check=True, timeout=120)


def test_a_grammar_is_kept_to(engine: TextEngine) -> None:
    done = engine.complete(PROMPT, Sampling(16, grammar='%llguidance {}\nstart: "yes" | "no"'))
    assert done.text in ("yes", "no")
    assert done.finish_reason == "stop"


def test_a_chat_is_written_by_the_models_template(engine: TextEngine) -> None:
    assert engine.chats
    output = [{"role": "assistant", "content": "a\n"}, {"role": "user", "content": "b"}]
    assert engine.chat_prompt(output) == "# assistant\na\n\n# user\nb\n# assistant\n"


def test_a_package_is_served_by_the_engine_that_measured_it(
    text_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    other = copy(text_package, tmp_path)
    edit(other / "report.json", lambda report: report.update(engine="vllm"))
    engine = load_engine(open_package(text_package), Serve())
    assert isinstance(engine, LlamaCpp)
    engine.close()
    with pytest.raises(InputError, match=PYTHON_VARIABLE):
        load_engine(open_package(other), Serve())


def test_vllm_is_asked_for_where_it_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for named in (None, str(tmp_path / "python")):
        monkeypatch.delenv(PYTHON_VARIABLE, raising=False) if named is None else monkeypatch.setenv(
            PYTHON_VARIABLE, named
        )
        with pytest.raises(InputError, match=r"OVERPROOF_VLLM: found .*; expected the Python of an environment"):
            vllm_python()


def test_an_environment_without_vllm_is_told_by_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_package: Path
) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(InputError, match=r"vLLM cannot load it: .*No module named 'vllm'"):
        ENGINES["vllm"].load(text_package / "model.gguf", EngineSettings())
    assert not list(tmp_path.glob("vllm-*"))


def test_what_vllm_reads_is_what_the_file_means(text_package: Path) -> None:
    file, tokens_BS = text_package / "model.gguf", torch.tensor([[0, *range(70, 100)]])
    found = AutoModelForCausalLM.from_pretrained(unpacked_directory(file), dtype=torch.float32)
    with torch.inference_mode():
        one, two = (model(input_ids=tokens_BS).logits.log_softmax(-1) for model in (read_gguf(file), found))
    assert (one - two).abs().max() < 0.01  # nats, of weights rounded to half precision
    assert unpacked_directory(file) == unpacked_directory(file)


def test_a_classifier_gives_what_its_file_means(digits_package: Path) -> None:
    file = digits_package / "model.onnx"
    engine, inputs_BD = OnnxRuntime(file), np.random.default_rng(0).random((3, 64), dtype=np.float32)
    assert np.abs(engine.logprobs(inputs_BD) - Reference(file)(inputs_BD)).max() < 1e-3
    assert np.allclose(np.exp(engine.logprobs(inputs_BD)).sum(axis=1), 1, atol=1e-5)
    for shape in ((3, 63), (64,), (0, 64)):
        with pytest.raises(InputError, match="expected \\(rows, 64\\)"):
            engine.logprobs(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("data", "held"),
    [(b"", 0), (b"a", 0), ("é".encode(), 0), (b"\xc3", 1), (b"a\xe6\x97", 2), (b"\xf0\x9f\x8e", 3), (b"\x80", 0)],
)
def test_the_start_of_a_character_is_held_back(data: bytes, held: int) -> None:
    assert incomplete_utf8_tail(data) == held


def test_what_was_not_reported_stays_open() -> None:
    pieces = [b"", b"a", b"\xc3", b"\xa9", b"\n"]
    one, three, four = ({"id": token} for token in (1, 3, 4))
    assert align_logprobs([1, 2, 3, 4], [one, three], pieces) == [one, None, three, None]
    assert align_logprobs([3, 2, 3], [three, three], pieces) == [three, None, three]
    with pytest.raises(RuntimeError, match="reported"):
        align_logprobs([1], [four], pieces)


def test_a_stop_string_may_come_in_parts() -> None:
    stops = StopFilter(["END", "Enough"])
    assert stops.push("some E") == ("some ", False)
    assert stops.push("N") == ("", False)
    assert stops.push("D more") == ("", True)
    held = StopFilter(["END"])
    assert held.push("xEN") == ("x", False)
    assert held.flush() == "EN"
