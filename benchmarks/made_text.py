"""Text that nobody wrote, as much as is wanted: documents of a few kB whose words come as often as Zipf's law says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WORDS = 200_000
CONSONANTS = ["b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "th", "ch"]
VOWELS, ENDS = ["a", "e", "i", "o", "u", "ai", "ea", "ou"], ["", "n", "r", "s", "t", "l"]


def documents(size_bytes: int, seed: int) -> Iterator[str]:
    """At least so many bytes; each seed gives other documents of the same words."""
    words, share = _vocabulary()
    generator, done = np.random.default_rng(seed), 0
    while done < size_bytes:
        count = int(np.clip(generator.lognormal(6.1, 0.7), 20, 20_000))
        chosen = words[np.minimum(np.searchsorted(share, generator.random(count)), WORDS - 1)]
        sentences, start = [], 0
        while start < count:
            stop = start + int(generator.integers(6, 22))
            sentences.append(" ".join(chosen[start:stop]).capitalize() + ".")
            start = stop
        text = " ".join(sentences)
        done += len(text)
        yield text


def write_lines(folder: Path, size_bytes: int, files: int) -> None:
    """JSON Lines, as many bytes of text in each file."""
    folder.mkdir(parents=True)
    for number in range(files):
        with (folder / f"{number:03d}.jsonl").open("w") as lines:
            for text in documents(size_bytes // files, number):
                lines.write(json.dumps({"text": text}) + "\n")


def _vocabulary() -> tuple[np.ndarray, np.ndarray]:
    """Words, and the share of a text that each and those before it make up."""
    generator = np.random.default_rng(0)
    syllables = [c + v + e for c in CONSONANTS for v in VOWELS for e in ENDS]
    lengths = np.clip(generator.geometric(0.45, WORDS), 1, 5)
    words = ["".join(syllables[i] for i in generator.integers(0, len(syllables), length)) for length in lengths]
    shares = 1 / (np.arange(WORDS) + 2.7) ** 1.05
    return np.array(words, dtype=object), np.cumsum(shares / shares.sum())
