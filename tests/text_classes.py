"""Small sets of labelled texts, and a tiny random BERT directory with a tokenizer trained on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

WORDS = {
    "animal": ["cat", "dog", "horse", "mouse", "whale", "bird", "tail", "fur", "paw", "wing", "feeds", "breeds"],
    "food": [
        "bread",
        "cheese",
        "soup",
        "salad",
        "apple",
        "pepper",
        "sweet",
        "baked",
        "fried",
        "eaten",
        "dish",
        "sauce",
    ],
    "plant": ["tree", "leaf", "root", "flower", "shrub", "grass", "stem", "petal", "grows", "bark", "seed", "fern"],
}


def labelled_texts(count: int = 120, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of three classes, as many of each, each of words of its class among others; none twice."""
    rng, found = np.random.default_rng(seed), dict[str, str]()
    names = list(WORDS)
    while len(found) < count:
        name = names[len(found) % len(names)]
        own, other = rng.choice(WORDS[name], 4), rng.choice(WORDS[names[rng.integers(3)]], 1)
        found[f"a {' '.join(own)} with {other[0]} no. {rng.integers(1000)}"] = name
    return list(found.items())


def texts_of_several(count: int = 120, seed: int = 0) -> list[tuple[str, list[str]]]:
    """Texts with any of the three classes, none of them included, each of words of its classes; none twice."""
    rng, found = np.random.default_rng(seed), dict[str, list[str]]()
    while len(found) < count:
        names = [name for name in WORDS if rng.random() < 0.5]
        own = [word for name in names for word in rng.choice(WORDS[name], 3)] or ["nothing", "in", "it"]
        found[f"{' '.join(own)} no. {rng.integers(1000)}"] = names
    return list(found.items())


def write_jsonl(path: Path, texts: Sequence[tuple[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts))
    return path


def wordpiece() -> Tokenizer:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator([text for text, _ in labelled_texts()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def write_base(folder: Path, layers: int = 2, positions: int = 40) -> Path:
    """A BERT without a classifier, with a WordPiece tokenizer."""
    from transformers import BertConfig, BertModel

    folder.mkdir()
    tokenizer = wordpiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=positions, initializer_range=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder
