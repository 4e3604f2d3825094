"""Makes what jobs/recipes/chat.yaml reads, from the documentation in Python's own standard library.

    python jobs/stdlib_chat.py stdlib-chat

writes stdlib-chat/chats.jsonl, conversations that ask what a function or class does and how it is called, and
stdlib-chat/model, a tokenizer trained on them and a chat template: a directory without weights.
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from overproof.data.sources import StdlibSource, list_files
from overproof.data.tokenization import train_bpe

VOCABULARY = 2048
SYSTEM = "You know Python's standard library."
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def documented(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Function | ast.ClassDef, str]]:
    """Name, node and first paragraph of the documentation of every public function and class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if paragraph:
                yield name, node, paragraph
            if isinstance(node, ast.ClassDef):
                yield from documented(node, name)


def conversations() -> Iterator[dict[str, Any]]:
    """What it does and, of functions, how it is called, which must be exact."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in list_files(StdlibSource()).files:
        module = file.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        try:
            tree = ast.parse((root / file.name).read_bytes())
        except (SyntaxError, ValueError):
            continue
        for name, node, paragraph in documented(tree, module):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"What does the {kind} {name} do?"},
                {"role": "assistant", "content": paragraph},
            ]
            if isinstance(node, Function):
                messages += [
                    {"role": "user", "content": "How is it called?"},
                    {"role": "assistant", "content": f"{node.name}({ast.unparse(node.args)})"},
                ]
            last = {"expected": messages[-1]["content"]} if isinstance(node, Function) else {}
            yield {"messages": messages} | last


def write_tokenizer(folder: Path, texts: Iterator[str]) -> None:
    """A tokenizer of the conversations' words, and the template that says how messages are written."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = train_bpe(texts, VOCABULARY - 2)
    trained.add_special_tokens([START, END])
    described = json.loads(trained.to_str()) | {"post_processor": None}  # the template says how a text begins
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def main(folder: Path) -> None:
    """Write both into a folder."""
    found = list(conversations())
    write_tokenizer(folder / "model", (message["content"] for record in found for message in record["messages"]))
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as out:
        for record in found:
            out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
