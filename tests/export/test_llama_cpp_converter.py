"""Decoders that no family here writes as GGUF, through a converter of another's: here a test's own, which writes real
files (``converter_checkout``), in the place of llama.cpp's.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import StableLmConfig, StableLmForCausalLM

from finished import RECIPES
from overproof.cluster.preflight import require_exportable
from overproof.config import Pretrained, load_recipe
from overproof.data.tokenization import train_bpe
from overproof.errors import InputError
from overproof.export import llama_cpp_converter
from overproof.export.base import ExportContext
from overproof.export.check_models import refusals
from overproof.export.gguf import Gguf
from overproof.export.stage import require_same_model
from overproof.models.hf_directory import save_model
from overproof.registry import FORMATS

CHECKOUT = Path(__file__).parent / "converter_checkout"
VOCABULARY, UNNAMED = 320, 16  # rows of the model, and how many of them are no token's


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableLM, which overproof has no layout of."""
    folder = tmp_path_factory.mktemp("stablelm")
    train_bpe([Path(__file__).read_text()], VOCABULARY).save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = StableLmConfig(
        vocab_size=VOCABULARY + UNNAMED, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    model = StableLmForCausalLM(config).eval()
    save_model(model, model.config, folder / "model", folder / "tokenizer.json")
    return folder / "model"


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(llama_cpp_converter.CHECKOUT_VARIABLE, str(CHECKOUT))


def _context(source: Path, template: str | None = None) -> ExportContext:
    return ExportContext(Gguf(chat_template=template), "run", source, source / "tokenizer.json")


def _types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.usefixtures("checkout")
def test_what_it_writes_is_held_against_the_model_and_quantised_as_other_files_are(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format, whole, small = FORMATS["gguf"], tmp_path / "student.gguf", tmp_path / "student-q4_0.gguf"
    assert "causal_lm" in format.families
    format.write(source, whole, "f16", _context(source, "{{ messages }}"), whole)
    found = require_same_model(format, source, whole)
    assert found.positions == 64
    assert set(_types(whole).values()) == {"F32", "F16"}
    fields = gguf.GGUFReader(whole).fields
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == f"<|unused-{VOCABULARY + UNNAMED - 1}|>"
    assert fields["general.name"].contents() == "run student"
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    monkeypatch.setattr(llama_cpp_converter, "convert", lambda *_: pytest.fail("its unquantised file lies there"))
    format.write(source, small, "q4_0", _context(source), whole)
    kinds = _types(small)
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["output.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert gguf.GGUFReader(small).fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert format.difference(source, small).nats > 2 * found.nats  # four bits
    assert sorted(path.name for path in tmp_path.iterdir()) == [small.name, whole.name]


@pytest.mark.usefixtures("checkout")
def test_a_variant_alone_is_written_without_the_unquantised_file(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "teacher-q8_0.gguf"
    FORMATS["gguf"].write(source, file, "q8_0", _context(source), file)
    assert _types(file)["blk.0.attn_q.weight"] == "Q8_0"
    assert FORMATS["gguf"].difference(source, file).nats < 0.3  # eight bits


@pytest.mark.usefixtures("checkout")
def test_a_wrong_file_is_refused_as_one_of_overproofs_own_would_be(source: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "source"
    wrong.mkdir()
    for path in source.iterdir():
        (wrong / path.name).write_bytes(path.read_bytes())
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    file = tmp_path / "model.gguf"
    FORMATS["gguf"].write(wrong, file, "f16", _context(source), file)
    with pytest.raises(RuntimeError, match="the export is wrong"):
        require_same_model(FORMATS["gguf"], source, file)


@pytest.mark.usefixtures("checkout")
def test_an_architecture_that_the_converter_does_not_write_is_refused(source: Path, tmp_path: Path) -> None:
    known, unknown = {"architectures": ["StableLmForCausalLM"]}, {"architectures": ["BloomForCausalLM"]}
    assert refusals("gguf", 32, {"a": known}) == []
    [refused] = refusals("gguf", 32, {"train.model: x": unknown})
    assert refused.startswith("train.model: x/config.json: architecture BloomForCausalLM is not among those that")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": ["RefusedForCausalLM"]}))
    with pytest.raises(InputError, match=r"wrote no file \(exit code 1\): .*\| ERROR: Model RefusedForCausalLM is not"):
        llama_cpp_converter.convert(model, tmp_path / "x.gguf")


def test_without_a_checkout_or_with_a_wrong_one_the_variable_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(RECIPES / "stdlib-lm.yaml", (f"train.model={{kind: pretrained, path: {source}}}",))
    assert isinstance(recipe.train.model, Pretrained)
    monkeypatch.delenv(llama_cpp_converter.CHECKOUT_VARIABLE, raising=False)
    assert "causal_lm" not in FORMATS["gguf"].families
    across = recipe.data.model_copy(update={"cross_document_attention": True})
    warned = require_exportable(recipe.model_copy(update={"data": across}))[-1].text
    assert warned.startswith("architecture StableLmForCausalLM is not written as gguf: it teaches, and torch measures")
    assert "not known; or set OVERPROOF_LLAMA_CPP to" in warned
    shipped = recipe.model_copy(update={"compress": recipe.compress.model_copy(update={"teacher": True})})
    with pytest.raises(InputError, match=r"StableLmForCausalLM .* expected Llama.*; or set OVERPROOF_LLAMA_CPP to"):
        require_exportable(shipped)
    monkeypatch.setenv(llama_cpp_converter.CHECKOUT_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"OVERPROOF_LLAMA_CPP: .*nowhere: no such folder"):
        require_exportable(recipe)
    monkeypatch.setenv(llama_cpp_converter.CHECKOUT_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=r"no convert_hf_to_gguf\.py in it; expected a checkout of llama\.cpp"):
        require_exportable(recipe)
    monkeypatch.setenv(llama_cpp_converter.CHECKOUT_VARIABLE, str(CHECKOUT))
    with pytest.raises(
        InputError, match=r"StableLmForCausalLM keeps the documents of a row apart is not known; expected"
    ):
        require_exportable(recipe)
    assert require_exportable(recipe.model_copy(update={"data": across})) == []


def test_a_converter_that_cannot_run_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment of its checkout, where there is one."""
    (tmp_path / "convert_hf_to_gguf.py").write_text("import sys\nprint(sys.argv[0])\nimport absent_library\n")
    monkeypatch.setenv(llama_cpp_converter.CHECKOUT_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=r"cannot be run: .*No module named 'absent_library'; expected its requirem"):
        llama_cpp_converter.require_architecture("XForCausalLM", "x")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho XForCausalLM\n")
    python.chmod(0o755)
    llama_cpp_converter.require_architecture("XForCausalLM", "x")
