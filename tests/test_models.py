"""Models from recipes and directories, and how they are called."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from overproof.config import BpeTokenizer, Pretrained, TokenizerFile
from overproof.data.manifest import Manifest
from overproof.data.text_tokenizer import read_tokenizer
from overproof.data.tokenization import END, encode, train_bpe
from overproof.data.tokenizer_match import require_possible_tokenizer, require_tokenizer
from overproof.errors import InputError
from overproof.files import FileEntry, file_sha256
from overproof.models.base import shape_of
from overproof.models.hf_directory import (
    build_model,
    count_parameters,
    load_model,
    load_start,
    save_model,
    to_tensors,
)
from overproof.models.llama import Llama
from overproof.models.pretrained import weights_sha256
from overproof.models.sizes import model_size
from overproof.models.vit import Vit
from overproof.registry import TASKS

LLAMA = Llama(hidden_size=64, intermediate_size=96, layers=2, heads=4, kv_heads=2)
VIT = Vit(hidden_size=24, intermediate_size=48, layers=2, heads=2)


def manifest(kind: str = "text", vocab_size: int = 320, tokenizer_sha256: str | None = None) -> Manifest:
    text = kind == "text"
    return Manifest(
        task="language_modeling" if text else "image_classification",
        columns=(),
        splits={},
        rows_per_group=4,
        positions=16 if text else 1,
        outputs=vocab_size if text else 10,
        tokenizer_sha256=tokenizer_sha256,
        **(dict.fromkeys(("start_id", "end_id", "bos_id"), 0) if text else {}),
        details={} if text else {"channels": 1, "height": 8, "width": 8},
    )


def test_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build_model(LLAMA, manifest(), seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    for (name, a), b, c in zip(
        one.state_dict().items(), same.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
        assert "norm" in name or not torch.equal(a, c)


def test_a_llama_is_what_the_recipe_says() -> None:
    model = build_model(LLAMA, manifest(), 0)
    embedding, attention, mlp = 320 * 64, 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 96
    assert count_parameters(model) == embedding + 2 * (attention + mlp + 2 * 64) + 64  # tied: embeddings count once
    assert model.config.max_position_embeddings == 2048
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 0)
    std = model.model.embed_tokens.weight.std().item()
    assert std == pytest.approx(LLAMA.initializer_range, rel=0.05)
    wide = build_model(LLAMA.model_copy(update={"initializer_range": 0.06}), manifest(), 0)
    assert wide.model.embed_tokens.weight.std().item() == pytest.approx(0.06, rel=0.05)


def test_text_predictions() -> None:
    model = build_model(LLAMA, manifest(), 0).eval()
    tokens_BS = np.random.default_rng(0).integers(1, 320, (3, 17)).astype(np.int32)
    batch = to_tensors({"tokens": tokens_BS, "length": np.array([16, 5, 1], np.int32)})
    predict = TASKS["language_modeling"].predict
    found = predict(model, batch)
    assert found.logits_BPV.shape == (3, 16, 320)
    assert torch.equal(found.targets_BP, batch["tokens"][:, 1:])
    assert found.mask_BP.sum(1).tolist() == [16, 5, 1]
    assert found.mask_BP[1, :5].all()
    changed = batch | {"tokens": batch["tokens"].clone()}
    changed["tokens"][:, 9:] = 0  # later tokens change nothing before them
    assert torch.allclose(predict(model, changed).logits_BPV[:, :9], found.logits_BPV[:, :9], atol=1e-6)


def test_image_predictions() -> None:
    model = build_model(VIT, manifest("digits"), 0).eval()
    batch = to_tensors(
        {"pixels": np.random.default_rng(0).random((5, 1, 8, 8), np.float32), "label": np.arange(5, dtype=np.int32)}
    )
    found = TASKS["image_classification"].predict(model, batch)
    assert found.logits_BPV.shape == (5, 1, 10)
    assert found.targets_BP.tolist() == [[0], [1], [2], [3], [4]]
    assert found.mask_BP.all()
    assert found.mask_BP.dtype == torch.bool


def test_tensors_own_their_memory() -> None:
    columns = {"length": np.array([1, 2], np.int32), "pixels": np.ones((1, 64), np.float32)}
    tensors = to_tensors(columns)
    columns["pixels"][:] = 0
    assert tensors["length"].dtype == torch.int64
    assert tensors["pixels"].min() == 1


def test_a_model_that_does_not_fit_the_data_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"model\.kind 'llama': the data is for image_classification; expected .*language_modeling"
    ):
        build_model(LLAMA, manifest("digits"), 0)
    with pytest.raises(
        InputError, match=r"model\.kind 'vit': the data is for language_modeling; expected .*image_classification"
    ):
        build_model(VIT, manifest(), 0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A language model with its tokenizer, as a plain Hugging Face directory."""
    tokenizer = train_bpe(["def f(x):\n    return x + 1\n"] * 3, 320)
    tokenizer.save(str(tmp_path / "source.json"))
    model = build_model(LLAMA, manifest(vocab_size=tokenizer.get_vocab_size()), 0)
    save_model(model, model.config, tmp_path / "model", tmp_path / "source.json")
    return tmp_path / "model"


def test_other_programs_read_the_directory(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert AutoConfig.from_pretrained(saved).architectures == ["LlamaForCausalLM"]
    theirs, ours = AutoModelForCausalLM.from_pretrained(saved).eval(), load_model(saved)
    tokens_BS = torch.arange(20)[None]
    assert torch.equal(theirs(tokens_BS).logits, ours(tokens_BS).logits)
    auto, own = AutoTokenizer.from_pretrained(saved), Tokenizer.from_file(str(saved / "tokenizer.json"))
    text = "def g(\u00e9):\n\n    return  'a b'"
    assert auto(text)["input_ids"] == [0, *encode(own, [text])[0].tolist()]
    assert auto.decode(auto(text)["input_ids"], skip_special_tokens=True) == text
    assert (auto.bos_token_id, auto.eos_token_id) == (0, 0)


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    for config, made in ((LLAMA, manifest()), (VIT, manifest("digits"))):
        model = build_model(config, made, 3)
        path, again = tmp_path / config.kind, tmp_path / f"{config.kind}-state"
        save_model(model, model.config, path)
        save_model(dict(model.state_dict()), model.config, again)
        assert file_sha256(path / "model.safetensors") == file_sha256(again / "model.safetensors")
        found = load_model(path)
        assert not found.training
        assert count_parameters(found) == count_parameters(model)
        for name, value in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], value)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "vit").config.num_labels == 10


def test_weights_beyond_a_files_size_lie_in_several_that_an_index_names(saved: Path, tmp_path: Path) -> None:
    model, several, limit = load_model(saved), tmp_path / "several", 30_000
    save_model(model, model.config, several, saved / "tokenizer.json", file_bytes=limit)
    files = sorted(several.glob("*.safetensors"))
    assert len(files) > 2
    assert {file.name.rpartition("-of-")[2] for file in files} == {f"{len(files):05d}.safetensors"}
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= limit
        assert file.read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})
    for found in (load_model(several), AutoModelForCausalLM.from_pretrained(several)):
        for name, value in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], value)
    entries = {f"model/{file.name}": FileEntry(sha256=file_sha256(file), size_bytes=0) for file in several.iterdir()}
    whole = file_sha256(saved / "model.safetensors")
    assert weights_sha256({"model/model.safetensors": FileEntry(sha256=whole, size_bytes=0)}, "model") == whole
    before = weights_sha256(entries, "model")
    entries["model/config.json"] = FileEntry(sha256="0" * 64, size_bytes=0)
    assert weights_sha256(entries, "model") == before
    entries[f"model/{files[1].name}"] = FileEntry(sha256="0" * 64, size_bytes=0)
    assert weights_sha256(entries, "model") != before


def test_what_must_not_be_loaded_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_model(tmp_path / "none")
    for name in ("pytorch_model.bin", "sub/optimizer.pt", "a.pth", "a.pkl", "a.ckpt"):
        pickle = saved / name
        pickle.parent.mkdir(exist_ok=True)
        pickle.write_bytes(b"")
        with pytest.raises(InputError, match=f"found {pickle.name}, a pickle, which runs code when read"):
            load_model(saved)
        pickle.unlink()
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text(config.replace("LlamaForCausalLM", "CLIPModel"))
    with pytest.raises(InputError, match=r"architecture CLIPModel.*; expected LlamaForCausalLM or"):
        load_model(saved)
    quantised = json.loads(config) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (saved / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(InputError, match=r"quantization_config: its weights are quantised; expected them in 16 or 32"):
        load_model(saved)
    (saved / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no architecture"):
        load_model(saved)
    (saved / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(InputError, match=r"weights do not fit config\.json: missing keys: model\.layers\.2"):
        load_model(saved)
    (saved / "config.json").write_text(config.replace('"intermediate_size": 96', '"intermediate_size": 64'))
    with pytest.raises(InputError, match=r"weights do not fit config\.json"):
        load_model(saved)
    (saved / "config.json").write_text(config)
    (saved / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(InputError, match="not safetensors"):
        load_model(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors file"):
        load_model(saved)


def test_a_directory_ends_texts_as_the_data_does_once_it_is_trained_on(saved: Path, tmp_path: Path) -> None:
    other = manifest().model_copy(update={"start_id": 5, "end_id": 7, "bos_id": 5})
    model = load_start(saved, other, 0)
    save_model(model, model.config, tmp_path / "again", saved / "tokenizer.json")
    auto = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (auto.bos_token_id, auto.eos_token_id, AutoConfig.from_pretrained(tmp_path / "again").eos_token_id) == (
        5, 7, 7,
    )  # fmt: skip
    listed = saved / "config.json"
    listed.write_text(json.dumps(json.loads(listed.read_text()) | {"eos_token_id": [9, 7]}))
    several = load_model(saved)
    save_model(several, several.config, tmp_path / "several", saved / "tokenizer.json")
    assert AutoTokenizer.from_pretrained(tmp_path / "several").eos_token_id == 9


def test_another_tokenizer_is_refused_by_what_differs(saved: Path, tmp_path: Path) -> None:
    prepared, path = tmp_path / "prepared", saved / "tokenizer.json"
    prepared.mkdir()
    (prepared / "manifest.json").write_text(manifest("digits").model_dump_json())
    require_tokenizer(saved, prepared)
    shutil.copy(path, prepared / "tokenizer.json")
    (prepared / "manifest.json").write_text(manifest(tokenizer_sha256=file_sha256(path)).model_dump_json())
    require_tokenizer(saved, prepared)
    spec = json.loads(path.read_text())
    path.write_text(json.dumps(spec))  # laid out otherwise, and the same tokenizer
    require_tokenizer(saved, prepared)
    vocabulary, merges = spec["model"]["vocab"], spec["model"]["merges"]
    swapped = vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}
    for other, message in (
        (spec | {"model": spec["model"] | {"vocab": swapped}}, f"vocabulary entry {vocabulary['a']}: 'a' there, 'b'"),
        (spec | {"model": spec["model"] | {"merges": [merges[1], merges[0], *merges[2:]]}}, "merge 0: "),
        (spec | {"normalizer": {"type": "NFC"}}, r"normaliser: null there, .*NFC"),
        (spec | {"pre_tokenizer": spec["pre_tokenizer"] | {"add_prefix_space": True}}, "split: .*add_prefix_space"),
    ):
        path.write_text(json.dumps(other))
        with pytest.raises(InputError, match=rf"is not the tokenizer of the data .*: {message}"):
            require_tokenizer(saved, prepared)
    path.write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        require_tokenizer(saved, prepared)
    path.unlink()
    with pytest.raises(InputError, match=r"no such file in it as tokenizer\.json"):
        require_tokenizer(saved, prepared)
    (saved / "vocab.json").write_text(json.dumps(vocabulary))  # older files, which the data may have come from, too
    lines = (" ".join(merge) for merge in merges)
    (saved / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]), encoding="utf-8")
    (saved / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    converted = read_tokenizer(TokenizerFile(path=str(saved), end_token=END)).json
    (prepared / "tokenizer.json").write_text(converted)
    digest = hashlib.sha256(converted.encode()).hexdigest()
    (prepared / "manifest.json").write_text(manifest(tokenizer_sha256=digest).model_dump_json())
    require_tokenizer(saved, prepared)
    lines = (" ".join(merge) for merge in (merges[1], merges[0], *merges[2:]))
    (saved / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]), encoding="utf-8")
    with pytest.raises(InputError, match=r"is not the tokenizer of the data .*: merge 0: "):
        require_tokenizer(saved, prepared)


def test_models_of_one_tokenizer_may_be_padded_to_other_sizes(tmp_path: Path) -> None:
    """As Qwen 2.5 is: its large models have more embeddings than its small ones."""
    tokenizer = train_bpe(["one text and another"], 288)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    entries = tokenizer.get_vocab_size()
    for name, rows in (("teacher", entries + 12), ("student", entries + 4)):
        model = build_model(LLAMA, manifest(vocab_size=rows), 0)
        save_model(model, model.config, tmp_path / name, tmp_path / "tokenizer.json")
    found = read_tokenizer(TokenizerFile(path=str(tmp_path / "teacher")))
    data = manifest(vocab_size=found.outputs, tokenizer_sha256=hashlib.sha256(found.json.encode()).hexdigest())
    tokens_BS = torch.arange(8)[None]
    for name in ("teacher", "student"):
        folder = tmp_path / name
        assert model_size(Pretrained(path=str(folder)), shape_of(data)).outputs == data.outputs == entries
        whole, cut = load_model(folder), load_start(folder, data, 0)
        logits = whole(input_ids=tokens_BS, use_cache=False).logits[..., :entries]
        torch.testing.assert_close(cut(input_ids=tokens_BS, use_cache=False).logits, logits, rtol=0, atol=1e-6)


def test_what_cannot_be_the_data_s_tokenizer_is_refused_before_the_data_are_prepared(
    saved: Path, tmp_path: Path
) -> None:
    path = saved / "tokenizer.json"
    spec = json.loads(path.read_text())
    entries = len(spec["model"]["vocab"])
    require_possible_tokenizer(TokenizerFile(path=str(saved)), str(saved))
    require_possible_tokenizer(BpeTokenizer(vocab_size=65536), str(saved))  # the same data made that, perhaps
    shutil.copytree(saved, tmp_path / "same")
    require_possible_tokenizer(TokenizerFile(path=str(tmp_path / "same" / "tokenizer.json")), str(saved))
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": {"type": "NFC"}}))
    with pytest.raises(InputError, match=rf"is not the tokenizer of the data \({tmp_path}/same\): normaliser"):
        require_possible_tokenizer(TokenizerFile(path=str(tmp_path / "same")), str(saved))
    longer = spec["model"]["vocab"] | {f"token {number}": entries + number for number in range(2048)}
    path.write_text(json.dumps(spec | {"model": spec["model"] | {"vocab": longer}}))
    message = rf"makes 2,048 entries of the data; {saved} has .* \(BPE, [0-9,]+ entries\); .*path: {saved}}}"
    with pytest.raises(InputError, match=message):
        require_possible_tokenizer(BpeTokenizer(), str(saved))
    (saved / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no such file in it as tokenizer\.json"):
        require_possible_tokenizer(BpeTokenizer(), str(saved))
