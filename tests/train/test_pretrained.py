"""Where a training starts from: a Hugging Face directory, here or behind a URI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from tiny_data import VIT

from overproof.artifacts import Store
from overproof.config import Pretrained
from overproof.data.manifest import Manifest
from overproof.errors import InputError
from overproof.files import filesystem
from overproof.models import pretrained
from overproof.models.hf_directory import build_model, chat_template, load_model, save_model
from overproof.train.ray_trainer import keep_chat_template


@pytest.fixture
def saved(digits_root: Path, tmp_path: Path) -> Path:
    model = build_model(VIT, Manifest.read(digits_root), 9)
    save_model(model, model.config, tmp_path / "model")
    return tmp_path / "model"


def test_a_local_one_is_used_where_it_lies(saved: Path) -> None:
    assert pretrained.fetch_pretrained(str(saved)) == saved


def test_one_behind_a_uri_is_fetched_once_and_again_when_it_changes(saved: Path, s3_uri: str) -> None:
    uri = s3_uri.replace("/store?", "/model?")
    files, root = filesystem(uri)
    fs.copy_files(str(saved), root, destination_filesystem=files)
    fetched = pretrained.fetch_pretrained(uri)
    assert pretrained.fetch_pretrained(uri) == fetched
    here, there = load_model(saved).state_dict(), load_model(fetched).state_dict()
    assert all(torch.equal(there[name], value) for name, value in here.items())
    assert [name for name, *_ in pretrained.list_directory(uri)] == sorted(path.name for path in saved.iterdir())
    with files.open_output_stream(f"{root}/notes.txt") as stream:
        stream.write(b"new")
    assert pretrained.fetch_pretrained(uri) != fetched


def test_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        pretrained.list_directory(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("layout", ["chat_template.jinja", "tokenizer_config.json"])
def test_its_chat_template_stays_with_what_is_trained_from_it(saved: Path, tmp_path: Path, layout: str) -> None:
    """Hugging Face directories have it in a file of its own or, older ones, in the tokenizer's."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert chat_template(saved) is None
    (saved / layout).write_text(template if layout.endswith("jinja") else json.dumps({"chat_template": template}))
    draft = Store(str(tmp_path / "store")).new_writer("x", "train", "0" * 64, {}, {})
    keep_chat_template(tmp_path, Pretrained(path=str(saved)), draft)
    assert chat_template(Path(draft.uri) / "model") == template


def test_of_several_chat_templates_the_default_one_is_taken(saved: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (saved / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert chat_template(saved) == "plain"
    (saved / "tokenizer_config.json").write_text(json.dumps({"chat_template": several[:1]}))
    assert chat_template(saved) is None
