"""Bad input: one clear error, exit code 2, nothing half-written. Each case is the one a user meets."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from finished import RECIPES, Run
from overproof.artifacts import Store
from overproof.cli.main import main
from overproof.data.tokenization import train_bpe
from overproof.models.hf_directory import save_model

DIGITS = str(RECIPES / "digits.yaml")


def _text_recipe(tmp_path: Path, source: dict[str, str], **train: object) -> str:
    """A small text recipe over a source of the test's own."""
    recipe = yaml.safe_load((RECIPES / "stdlib-lm.yaml").read_text())
    recipe["store"] = str(tmp_path / "store")
    recipe["data"] |= {"source": source, "sequence_length": 16, "shards": 1, "rows_per_group": 4}
    recipe["data"]["tokenizer"] = {"kind": "bpe", "vocab_size": 288}
    recipe["train"] |= {"steps": 2, **train}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def _refused(capsys: pytest.CaptureFixture[str], store: Path, *argv: str, words: tuple[str, ...]) -> None:
    before = {a.id for a in Store(str(store)).artifacts()}
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("overproof: ")
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert {a.id for a in Store(str(store)).artifacts()} == before
    if store.is_dir():
        half = [p for p in store.glob("*/*-*") if not (p / "artifact.json").exists()]
        assert half == []


def test_vllm_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERPROOF_VLLM", str(tmp_path / "python"))
    run = ("run", str(RECIPES / "stdlib-lm.yaml"), "--set", f"store={tmp_path}", "--set", "evaluate.engine=vllm")
    _refused(capsys, tmp_path, *run, words=("OVERPROOF_VLLM", "expected the Python of an environment that has vLLM"))
    images = ("run", DIGITS, "--set", f"store={tmp_path}", "--set", "evaluate.engine=vllm")
    _refused(capsys, tmp_path, *images, words=("evaluate.engine", "compress.kind 'onnx' is served by 'onnxruntime'"))


def test_unknown_field_and_value_out_of_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override, word in (("train.stepz=1", "unknown field"), ("train.zero_stage=7", "0, 1, 2 or 3")):
        _refused(capsys, tmp_path, "run", DIGITS, "--set", override, "--set", f"store={tmp_path}", words=(word,))
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_is_the_processes_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "overproof.cli.main", "run", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No such file" in done.stderr


def test_a_missing_or_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"kind": "folder", "path": str(tmp_path / "corpus"), "pattern": "*.md"}
    recipe = _text_recipe(tmp_path, source)
    _refused(capsys, tmp_path / "store", "run", recipe, words=(str(tmp_path / "corpus"),))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/note.txt").write_text("not Markdown")
    _refused(capsys, tmp_path / "store", "run", recipe, words=(str(tmp_path / "corpus"), "*.md"))


def test_a_corpus_that_leaves_no_test_split(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/only.txt").write_text("one document cannot be split into three")
    recipe = _text_recipe(tmp_path, {"kind": "folder", "path": str(tmp_path / "corpus")})
    _refused(capsys, tmp_path / "store", "prepare", recipe, words=("split", "1 document"))


def test_a_parquet_file_with_object_columns(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.data.extensions import ArrowPythonObjectArray

    table = pa.table({"text": ["a", "b"], "meta": ArrowPythonObjectArray.from_objects([{1, 2}, object])})
    (tmp_path / "corpus").mkdir()
    pq.write_table(table, tmp_path / "corpus/rows.parquet")
    recipe = _text_recipe(tmp_path, {"kind": "parquet", "path": str(tmp_path / "corpus"), "field": "meta"})
    _refused(capsys, tmp_path / "store", "prepare", recipe, words=("rows.parquet", "'meta' holds objects"))


def test_a_shard_whose_hash_differs_from_the_manifest(
    digits: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(digits.recipe.store, store)
    shutil.rmtree(next((store / "digits").glob("train-*")))
    shard = next((store / "digits").glob("prepare-*/train/*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    _refused(capsys, store, "train", DIGITS, "--set", f"store={store}", words=(str(shard), "sha256"))


def _teacher(digits: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits.artifacts["train"].local() / "model", tmp_path / "teacher"))


def test_a_model_directory_that_holds_a_pickle(digits: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = _teacher(digits, tmp_path)
    (teacher / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    overrides = [f"store={tmp_path / 'store'}", f"train.model={{kind: pretrained, path: {teacher}}}", "train.steps=0"]
    argv = [word for o in overrides for word in ("--set", o)]
    _refused(capsys, tmp_path / "store", "train", DIGITS, *argv, words=("pytorch_model.bin", "safetensors"))


def test_a_teacher_with_another_tokenizer(ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus").mkdir()
    for i in range(60):
        (tmp_path / f"corpus/{i}.txt").write_text(f"document number {i} of this corpus " * 8)
    tokenizer = train_bpe(["another text altogether"], 288)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)
    teacher = tmp_path / "teacher"
    save_model(LlamaForCausalLM(config), config, teacher, tmp_path / "tokenizer.json")
    model = {"kind": "pretrained", "path": str(teacher)}
    recipe = _text_recipe(tmp_path, {"kind": "folder", "path": str(tmp_path / "corpus")}, model=model)
    assert main(["prepare", recipe]) == 0
    capsys.readouterr()
    _refused(capsys, tmp_path / "store", "train", recipe, words=("tokenizer", str(teacher)))


def test_a_store_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    store = tmp_path / "file/store"
    _refused(capsys, store, "run", DIGITS, "--set", f"store={store}", words=("cannot be written", "--set store="))


def test_a_second_run_on_the_same_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(str(tmp_path)).lock():
        _refused(capsys, tmp_path, "run", DIGITS, "--set", f"store={tmp_path}", words=("in use by process",))


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_more_workers_than_the_cluster_can_ever_give(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("--set", f"store={tmp_path}", "--set", "train.workers=64")
    _refused(capsys, tmp_path, verb, DIGITS, *overrides, words=("64 x 1 + 1 = 65 CPUs", "could never start"))
    assert list(tmp_path.glob("*/*")) == []
