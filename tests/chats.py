"""Small chat sets, and directories of chat models without weights: a tokenizer and a template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from finished import RECIPES
from made_tokenizers import byte_level
from overproof.artifacts import Store
from overproof.config import Recipe, TokenizerFile, load_recipe
from overproof.data.prepare import prepare
from overproof.data.text_tokenizer import read_tokenizer
from overproof.stage_context import Progress, StageContext, no_progress
from overproof.tasks.chat_template import ConversationEncoder, read_chat_template

END = "<|im_end|>"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' }}"
CALLS = "{% for c in m['tool_calls'] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}"
ANSWER = f"{{{{ m['content'] }}}}{{% if m['tool_calls'] %}}{CALLS}{{% endif %}}{{{{ '<|im_end|>' }}}}"
TOOLS = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = f"{TOOLS}{{% for m in messages %}}{TURN}{ANSWER}{{{{ '\n' }}}}{{% endfor %}}{ASK}"
FORGET = (  # leaves out what an earlier answer thought, as templates of thinking models do
    "{% if not loop.last and '</think>' in m['content'] %}{{ m['content'].split('</think>')[-1] }}"
    f"{{{{ '<|im_end|>' }}}}{{% else %}}{ANSWER}{{% endif %}}"
)
FORGETFUL = CHATML.replace(ANSWER, FORGET)
MARKED, MARKED_FORGETFUL = (
    CHATML.replace(
        ANSWER,
        f"{{% if m['role'] == 'assistant' %}}{{% generation %}}{answer}{{% endgeneration %}}"
        f"{{% else %}}{ANSWER}{{% endif %}}",
    )
    for answer in (ANSWER, FORGET)
)
# As that of Qwen3, without tools: the last turn thinks, if only nothing, and the others do not.
QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == "user" %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set content, thought = m.content, "" %}
    {%- if "</think>" in content %}
        {%- set thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n") %}
        {%- set content = content.split("</think>")[-1].lstrip("\n") %}
    {%- endif %}
    {{- "<|im_start|>" + m.role + "\n" }}
    {%- if m.role == "assistant" and loop.index0 > ns.last and (loop.last or thought) %}
        {{- "<think>\n" + thought.strip("\n") + "\n</think>\n\n" }}
    {%- endif %}
    {{- content + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{%- endif %}
"""

WORDS = ["name", "file", "value", "result", "token", "print", "return", "names", "quoted", "None"]


def write_chat_model(folder: Path, template: str | None = CHATML) -> Path:
    """A directory with everything but weights."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_str(byte_level())
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def encoder_of(folder: Path) -> ConversationEncoder:
    settings = TokenizerFile(path=str(folder))
    tokenizer = read_tokenizer(settings)
    return ConversationEncoder(read_chat_template(settings, tokenizer), tokenizer)


def messages(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """A user's and the assistant's in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents))]


def some_chats(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Records of one to three answers, each of which follows from what is asked; every question is asked once."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        contents = []
        for turn in range(1 + number % 3):
            words = rng.choice(WORDS, 2)
            contents += [f"{words[0]} of {words[1]} {number}.{turn}?", f"{words[1]} is {words[0]}"]
        found.append({"messages": messages(*contents, system="be short" if number % 2 else None)})
    return found


def write_records(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chat_recipe(folder: Path, source: Path, model: Path, *changes: str) -> Recipe:
    """The example's, with small sizes."""
    small = "{kind: llama, hidden_size: 32, intermediate_size: 64, layers: 1, heads: 2, kv_heads: 1}"
    return load_recipe(RECIPES / "chat.yaml", (
        f"store={folder}/store", f"data.source.path={source}", f"data.tokenizer.path={model}",
        "data.sequence_length=160", "data.validation_fraction=0.15", "data.test_fraction=0.15", "data.shards=1",
        "data.rows_per_group=2", f"train.model={small}", *changes,
    ))  # fmt: skip


def prepared_chats(asked: Recipe, progress: Progress = no_progress) -> Path:
    name = hashlib.sha256(str(asked).encode()).hexdigest()
    draft = Store(asked.store).new_writer(asked.name, "prepare", name, {}, {})
    prepare(StageContext(asked, {}, draft, progress))
    return Path(draft.uri)
