"""A chat template writes one text in training, in every engine and in transformers; a broken one is told before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from chats import CHATML, write_chat_model
from finished import RECIPES
from made_tokenizers import byte_level
from overproof.cluster import preflight
from overproof.config import Recipe, load_recipe
from overproof.engines.chat_template import GgufChatTemplate
from overproof.engines.gguf_tokens import GgufHeader
from overproof.errors import InputError
from overproof.tasks.chat_template import ChatTemplate

MESSAGES = [
    {"role": "user", "content": "<a> & 'b'?"},
    {"role": "assistant", "content": "c", "reasoning": "so", "extra": {"z": [1, None, True], "a": "\u00e9<>"}},
    {"role": "user", "content": "d\n"},
]
LOOP = "{% for m in messages %}"
TEMPLATES = {
    "tojson": LOOP + "{{ m | tojson }} {{ m | tojson(indent=2) }} {{ m | tojson(true) }}{% endfor %}",
    "its settings": LOOP + "{{ m | tojson(false, none, (',', ':'), true) }}{% endfor %}",
    "break": LOOP + "{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m.content }}{% if loop.index > 2 %}"
    "{% break %}{% endif %}{% endfor %}",
    "generation": "{% set said = 'no' %}" + LOOP + "{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{% set said = 'yes' %}{{ m.content }}\n{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ said }}"
    "{% endfor %}",
    "in a macro": "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    + LOOP + "{{ say(m) if m.role == 'assistant' else m.content }}{% endfor %}",
    "strftime_now": "{{ strftime_now('%Y') }}{{ strftime_now('%d %b %Y') | length }}",
    "thoughts": LOOP + "{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}{% endfor %}",
    "documents": "{% if documents is not none %}{{ documents }}{% endif %}{{ tools is none }}",
    "white space": "{% for m in messages %}\n  {% if true %}\n x \n  {% endif %}\n{% endfor %}\n",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ enable_thinking is defined }}",
}  # fmt: skip


@pytest.mark.parametrize("text", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_training_and_engines_write_what_transformers_writes(text: str) -> None:
    marks = "{% generation %}" in text
    (expected,), spans = render_jinja_template(
        [MESSAGES], chat_template=text, return_assistant_tokens_mask=marks, add_generation_prompt=True,
        bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    trained = ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"}, ())
    found, marked = trained.render(MESSAGES, None, True, "")
    assert (found, marked) == (expected, spans[0] if marks else [])
    header = GgufHeader(64, (), {}, (), "<s>", False, "</s>", text, 8, "")
    engine = GgufChatTemplate(header)
    assert engine.render(MESSAGES) == expected
    engine.close()


def chat(folder: Path) -> Recipe:
    changes = (f"data.tokenizer.path={folder}", f"store={folder}/store")
    return load_recipe(RECIPES / "chat.yaml", changes)


def config(folder: Path, template: Any) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    content = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


BROKEN: dict[str, tuple[Any, str]] = {
    "a syntax error": ("{% for m in messages %}{{ m.content }", "does not take a conversation of one user's message: "),
    "an unknown filter": ("{{ messages | nothing }}", "No filter named 'nothing'"),
    "a tag that is none": ("{% generate %}", "Encountered unknown tag 'generate'"),
    "no end": (
        "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "takes more than 0.5 s",
    ),
    "another token": ("{{ pad_token }}{{ messages[0].content }}", "reads pad_token, which no engine tells it"),
    "none by default": (
        [{"name": "rag", "template": CHATML}, {"name": "tool_use", "template": CHATML}],
        "its chat templates are named rag, tool_use; expected one named 'default'",
    ),
    "a list of nothing": ([{"template": CHATML}, 3], "no chat template there"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_refused_before_anything_starts(name: str, tmp_path: Path) -> None:
    folder, (template, words) = write_chat_model(tmp_path / "model"), BROKEN[name]
    assert preflight.require_exportable(chat(folder)) == []
    config(folder, template)
    with pytest.raises(InputError) as refused:
        preflight.require_exportable(chat(folder))
    assert words in str(refused.value)
    assert str(folder) in str(refused.value)


def test_of_several_templates_the_default_one_is_checked(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model")
    config(folder, [{"name": "rag", "template": "{% if"}, {"name": "default", "template": CHATML}])
    assert preflight.require_exportable(chat(folder)) == []


def test_the_recipes_own_template_is_checked(tmp_path: Path) -> None:
    broken = json.dumps("{{ messages | nothing }}")
    recipe = load_recipe(RECIPES / "stdlib-lm.yaml", (f"store={tmp_path}", f"compress.chat_template={broken}"))
    with pytest.raises(InputError, match=r"compress\.chat_template: .* No filter named 'nothing'"):
        preflight.require_exportable(recipe)


def changed(change: Callable[[dict[str, Any]], None]) -> str:
    spec = json.loads(byte_level(nfc=True))
    change(spec)
    return json.dumps(spec)


def test_a_tokenizer_that_files_cannot_hold_is_told_before_anything_starts(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model")
    recipe = load_recipe(
        RECIPES / "stdlib-lm.yaml", (f"store={tmp_path}", f"data.tokenizer={{kind: file, path: {folder}}}")
    )

    def split(spec: dict[str, Any]) -> None:
        digits = {"type": "Split", "pattern": {"Regex": "[0-9]{7}"}, "behavior": "Isolated", "invert": False}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}

    def normalise(spec: dict[str, Any]) -> None:
        spec["normalizer"] = {"type": "Replace", "pattern": {"String": "\u2019"}, "content": "'"}

    for change, words in ((split, r"splits texts by '\[0-9\]\{7\}'"), (normalise, r"normalises texts by .*Replace")):
        (folder / "tokenizer.json").write_text(changed(change))
        for each in (recipe, chat(folder)):
            with pytest.raises(InputError, match=words):
                preflight.require_exportable(each)
    (folder / "tokenizer.json").write_text(byte_level(nfc=True))
    (finding,) = preflight.require_exportable(recipe)
    assert (finding.about, finding.state) == ("tokenizer", "warning")
    assert "llama.cpp does not compose characters (the normaliser NFC)" in finding.text
