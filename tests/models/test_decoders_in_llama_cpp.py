"""Every family of decoders with a tokenizer of its own: trained, written as GGUF, and read by llama.cpp as by torch."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xllamacpp
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from decoder_cases import CASES, POSITIONS, QWEN, Case
from made_tokenizers import ODD_TEXTS
from overproof.config import Optimization
from overproof.engines import llamacpp
from overproof.engines.base import Sampling
from overproof.engines.llamacpp_logits import LlamaCppLogits
from overproof.engines.llamacpp_server import server_params
from overproof.export.gguf_file import export_gguf, read_gguf
from overproof.models import hf_directory
from overproof.models.base import GgufFamily
from overproof.registry import FAMILIES, TASKS
from overproof.tasks.chat_rows import packed_rows
from overproof.tasks.chat_template import EncodedConversation
from overproof.train.engine import TorchEngine
from overproof.train.objective import CrossEntropy

TEXTS = (12, 6, 9)  # tokens of each of those that share a row
STEPS = 4


@pytest.fixture
def fp32_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp without its rounding of keys and values to half precision."""

    def params(*given: Any, **named: Any) -> Any:
        found = server_params(*given, **named)
        found.cache_type_k = found.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        found.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return found

    monkeypatch.setattr(llamacpp, "server_params", params)


def some_tokens(model: PreTrainedModel, seed: int) -> torch.Tensor:
    """Two rows, of all entries that the model has, those of no token among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (2, POSITIONS - 4), generator=generator)


def logprobs(model: PreTrainedModel, tokens_BS: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=tokens_BS, use_cache=False).logits.log_softmax(-1)
        return found


def train(model: PreTrainedModel) -> None:
    rows = torch.cat([some_tokens(model, 1)] * 2)
    batch = {"tokens": rows, "length": torch.full((len(rows),), rows.shape[1] - 1)}
    steps = Optimization(steps=STEPS, batch_size=4, learning_rate=3e-3, schedule="constant")
    engine = TorchEngine(model, steps)
    losses = [engine.step(CrossEntropy(TASKS["language_modeling"].predict), batch)()["loss"] for _ in range(STEPS)]
    assert losses == sorted(losses, reverse=True)
    model.eval()


def packed_logprobs(model: PreTrainedModel, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of each text, in a row with the others."""
    made = [
        EncodedConversation(text.numpy().astype(np.int32), np.ones(len(text), bool), (len(text),), (len(text),))
        for text in texts
    ]
    columns = packed_rows([made], sum(TEXTS)) | {"scale": np.zeros(1, np.float32)}
    with torch.inference_mode():
        found_SV = TASKS["chat"].predict(model, hf_directory.to_tensors(columns)).logits_BPV[0].log_softmax(-1)
    return list(found_SV[: sum(TEXTS)].split(TEXTS))


def engine_logprobs(file: Path, tokens_S: torch.Tensor) -> torch.Tensor:
    """At every place of a row."""
    engine = LlamaCppLogits(file, len(tokens_S), kv_cache="f32")
    found = torch.from_numpy(engine.logits_at(tokens_S.numpy(), np.arange(len(tokens_S)))).log_softmax(-1)
    engine.close()
    return found


def served_logprobs(engine: llamacpp.LlamaCpp, prompt: list[int], tokenizer: Tokenizer, outputs: int) -> torch.Tensor:
    """Of every token after a prompt; llama.cpp's server reports them at whole characters alone."""
    sampling = Sampling(1, logprobs=outputs, logit_bias={tokenizer.token_to_id("("): 1e4})
    reported = engine.complete(prompt, sampling).token_logprobs
    assert reported is not None
    found = torch.full((outputs,), torch.nan)
    for token, _, logprob in reported[0].top:
        found[token] = logprob
    return found


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def test_every_family_has_a_case() -> None:
    families = {kind for kind, family in FAMILIES.items() if isinstance(family, GgufFamily)}
    assert {case.kind for case in CASES.values()} == families


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.usefixtures("fp32_engine")
def test_a_family_is_trained_written_and_answered(case: Case, tmp_path: Path) -> None:
    model = hf_directory.load_model(case.save(tmp_path / "source", case.model()))
    train(model)
    trained, file = case.save(tmp_path / "trained", model), tmp_path / "model.gguf"
    export_gguf(trained, trained / "tokenizer.json", file, "f32", "test")

    back = read_gguf(file)
    expected, found = model.state_dict(), back.state_dict()
    for name in set(expected) & set(found):
        # Gemma's norms are written with 1 added.
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7 if "gemma" in case.kind else 0)
    assert {name for name in expected if name not in found} == set()
    tokens_BS = some_tokens(model, 2)
    right_SV = logprobs(model, tokens_BS)[0]
    assert largest(logprobs(back, tokens_BS)[0], right_SV) < 1e-5

    answered_SV = engine_logprobs(file, tokens_BS[0])
    assert largest(answered_SV, right_SV) < case.nats
    texts = list(some_tokens(model, 3)[0][: sum(TEXTS)].split(TEXTS))
    for alone, packed_SV in zip(texts, packed_logprobs(model, texts), strict=True):
        assert largest(engine_logprobs(file, alone), packed_SV) < case.nats

    tokenizer, engine = Tokenizer.from_str(case.tokenizer()), llamacpp.LlamaCpp(file)
    served_V = served_logprobs(engine, tokens_BS[0].tolist(), tokenizer, model.config.vocab_size)
    normalised = [odd for odd in ODD_TEXTS if case.tokenizer is QWEN and unicodedata.normalize("NFC", odd) != odd]
    split = {odd: tokenizer.encode(odd, add_special_tokens=False).ids for odd in ODD_TEXTS}
    assert [odd for odd in ODD_TEXTS if engine.tokenize(odd) != split[odd]] == normalised  # which llama.cpp leaves out
    engine.close()
    assert largest(served_V, right_SV[-1]) < case.nats

    export_gguf(trained, trained / "tokenizer.json", file, "q8_0", "test")
    assert 0 < largest(engine_logprobs(file, tokens_BS[0]), answered_SV) < 0.5
