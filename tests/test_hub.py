"""Models on the Hugging Face Hub, behind a server on this machine that ``huggingface_hub`` itself talks to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from finished import RECIPES
from hub_server import Hub, running_hub
from made_tokenizers import byte_level
from overproof import hub
from overproof.config import Pretrained, load_recipe
from overproof.data.sources import TokenizerFile, tokenizer_files
from overproof.errors import InputError
from overproof.files import absolute_uri
from overproof.models import pretrained
from overproof.models.base import DataShape
from overproof.models.hf_directory import load_model
from overproof.models.sizes import model_size
from overproof.pipeline import STAGES
from overproof.registry import FAMILIES
from overproof.shrink.given_model import inspect_model
from overproof.stage_context import ProgressEvent, TaskProgress

NAME = "org/Tiny-1.0"
URI = f"hf://{NAME}"
TEMPLATE = "{}/{{repo_id}}/resolve/{{revision}}/{{filename}}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small Llama as a repository has it: with the same weights as a pickle beside it, and with code."""
    family = FAMILIES["llama"]
    assert family.section is not None
    section = family.section(hidden_size=32, intermediate_size=32, layers=8, heads=2, kv_heads=2)  # type: ignore[call-arg]
    tokenizer = byte_level()
    size = max(json.loads(tokenizer)["model"]["vocab"].values()) + 2
    torch.manual_seed(0)
    model = family.model_class()(
        family.configuration(section, DataShape("language_modeling", size, 8, bos_id=0, end_id=0))
    )
    folder = tmp_path_factory.mktemp("made")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**made, "chat_template.jinja": b"{{ messages }}", "pytorch_model.bin": b"pickle", "modeling.py": b"code",
            "onnx/model.onnx": b"onnx", "README.md": b"words"}  # fmt: skip


@pytest.fixture
def served(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server, asked with an empty cache."""
    hub._repository.cache_clear()
    with running_hub() as running:
        running.push(NAME, files)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)  # HF_ENDPOINT, as it is read at import
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", TEMPLATE.format(running.url))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running
    hub._repository.cache_clear()


def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._repository.cache_clear()


def test_a_model_is_planned_from_headers_and_fetched_without_pickles_or_code(
    served: Hub, files: dict[str, bytes]
) -> None:
    size = model_size(Pretrained(path=URI), DataShape("language_modeling", 0, 8))
    given = inspect_model(URI)
    assert given.family == "llama"
    assert given.has_chat_template
    assert given.size_bytes == len(files["model.safetensors"])
    assert not (Path(constants.HF_HUB_CACHE) / "models--org--Tiny-1.0" / "blobs").exists()  # nothing was fetched
    events: list[ProgressEvent] = []
    folder = pretrained.fetch_pretrained(URI, events.append)
    fetched = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert fetched == {name: files[name] for name in wanted}
    assert sum(p.numel() for p in load_model(folder).parameters()) == size.parameters
    told = [event for event in events if isinstance(event, TaskProgress)]
    assert told[0].note == URI
    assert any(event.note.endswith("MB") for event in told)
    assert told[-1].done == told[-1].total
    sent = len(served.served)
    assert pretrained.fetch_pretrained(URI) == folder
    assert len(served.served) == sent
    # What another tool has fetched into the same cache is not looked at.
    (snapshot,) = Path(constants.HF_HUB_CACHE).glob("models--org--Tiny-1.0/snapshots/*")
    (snapshot / "pytorch_model.bin").write_bytes(b"pickle")
    load_model(pretrained.fetch_pretrained(URI))


def test_a_push_changes_what_follows_from_the_branch_and_nothing_that_follows_from_a_commit(
    served: Hub, files: dict[str, bytes]
) -> None:
    recipe = load_recipe(RECIPES / "digits.yaml", (f"train.model={{kind: pretrained, path: {URI}}}",))
    students = {"sweep": recipe.sweep.model_copy(update={"students": (
        recipe.sweep.students[0].model_copy(update={"model": Pretrained(path=URI)}),
    )})}  # fmt: skip
    parts = {stage.name: stage.part for stage in STAGES}

    def identities(path: str) -> list[object]:
        train = recipe.train.model_copy(update={"model": Pretrained(path=path)})
        return [
            parts["train"](recipe.model_copy(update={"train": train}))["model_files"],
            parts["sweep"](recipe.model_copy(update=students))["student_files"][recipe.sweep.students[0].name],
        ]

    pinned = absolute_uri(URI)
    commit = pinned.rpartition("@")[2]
    assert pinned == f"{URI}@{commit}"
    assert identities(pinned) == [{"repository": NAME, "commit": commit}] * 2
    later = served.push(NAME, {**files, "model.safetensors": files["model.safetensors"] + b" "})
    assert absolute_uri(URI) == pinned  # one commit for all that this process does
    hub._repository.cache_clear()
    assert identities(pinned) == [{"repository": NAME, "commit": commit}, {"repository": NAME, "commit": later}]
    assert identities(URI) == [{"repository": NAME, "commit": later}] * 2
    assert (pretrained.fetch_pretrained(pinned) / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_branch_and_a_file_are_named_in_the_uri(served: Hub, files: dict[str, bytes]) -> None:
    served.push(NAME, {**files, "tokenizer_config.json": b"{}"}, branch="refs/pr/1")
    plain = tokenizer_files(TokenizerFile(path=f"{URI}/tokenizer.json"))
    assert plain["tokenizer.json"] == files["tokenizer.json"]
    assert "tokenizer_config.json" not in plain
    assert "tokenizer_config.json" in tokenizer_files(TokenizerFile(path=f"{URI}@refs%2Fpr%2F1"))


def test_shards_alone_are_fetched_and_of_copies_under_other_names_none(served: Hub, files: dict[str, bytes]) -> None:
    weights = files["model.safetensors"]
    index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()
    served.push("org/sharded", {
        "config.json": files["config.json"], "model.safetensors.index.json": index,
        "model-00001-of-00001.safetensors": weights, "consolidated.safetensors": weights,
    })  # fmt: skip
    fetched = pretrained.fetch_pretrained("hf://org/sharded")
    assert sorted(path.name for path in fetched.iterdir()) == [
        "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip


def test_without_a_network_the_cache_is_taken_where_that_is_asked(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pretrained.fetch_pretrained(URI)
    pinned = absolute_uri(URI)
    _offline(monkeypatch)
    assert absolute_uri(URI) == pinned
    assert pretrained.fetch_pretrained(URI) == folder
    assert inspect_model(URI).family == "llama"
    (folder / "model.safetensors").readlink().unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors file"):
        pretrained.fetch_pretrained(URI)
    with pytest.raises(InputError, match=r"the cache does not have it.*hf download org/other.*HF_HUB_OFFLINE=1"):
        pretrained.fetch_pretrained("hf://org/other")


def test_without_a_network_an_error_says_how_to_do_without(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=r"127\.0\.0\.1:1\) cannot be reached.*HF_HUB_OFFLINE=1"):
        absolute_uri(URI)


def test_gated_private_and_unknown_models_say_what_is_needed(
    served: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    served.push("org/gated", files, gated=True, allowed=("let-in",))
    served.push("org/private", files, private=True, allowed=("let-in",))
    with pytest.raises(InputError, match=r"is gated, and no token is set \(HF_TOKEN\).*/org/gated"):
        pretrained.list_directory("hf://org/gated")
    with pytest.raises(InputError, match=r"no such model, or it is private and no token is set \(HF_TOKEN\)"):
        pretrained.list_directory("hf://org/unknown")
    with pytest.raises(InputError, match=r"no such revision"):
        pretrained.list_directory(f"{URI}@v9")
    with pytest.raises(InputError, match=r"expected hf://ORG/NAME"):
        pretrained.list_directory("hf://gpt2")
    monkeypatch.setenv("HF_TOKEN", "someone-else")
    with pytest.raises(InputError, match=r"is gated, and the token that is set"):
        pretrained.list_directory("hf://org/gated")
    monkeypatch.setenv("HF_TOKEN", "let-in")
    for name in ("gated", "private"):
        assert (pretrained.fetch_pretrained(f"hf://org/{name}") / "model.safetensors").is_file()


def test_a_model_whose_weights_are_pickles_alone_is_refused(served: Hub, files: dict[str, bytes]) -> None:
    served.push("org/old", {name: content for name, content in files.items() if name != "model.safetensors"})
    with pytest.raises(InputError, match=r"hf://org/old: found pytorch_model\.bin, a pickle"):
        pretrained.list_directory("hf://org/old")


def test_the_command_line_goes_by_the_variables_of_the_hub(served: Hub, tmp_path: Path) -> None:
    """``HF_ENDPOINT`` and ``HF_HOME``, as a user sets them; the recipe names the commit."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"text {number} of a few words that are said once more\n" * 40)
    environment = {**os.environ, "HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "overproof.cli.main", "init", URI, "--data", str(texts), "--out", "made.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{URI}@{served.models[NAME].refs['main']}" in (tmp_path / "made.yaml").read_text()
    assert huggingface_hub.__version__
