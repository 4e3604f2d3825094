"""Small corpora and recipes for the tests of the data stages."""

from __future__ import annotations

from pathlib import Path

from overproof.artifacts import ArtifactWriter, Store
from overproof.config import Recipe, load_recipe
from overproof.stage_context import Progress, StageContext, no_progress

RECIPES = Path(__file__).parents[2] / "jobs/recipes"
TEXT = (
    "vocab_size: 320}, sequence_length: 32, shards: 2, rows_per_group: 4, validation_fraction: 0.2, test_fraction: 0.2"
)


def write_corpus(folder: Path, documents: int = 40, prefix: str = "") -> None:
    """Text files that differ; with a prefix, the same content under other names."""
    folder.mkdir(exist_ok=True)
    for i in range(documents):
        lines = [f"def f{i}_{j}(x):\n    return {i} * x + {j}\n" for j in range(5 + i % 7)]
        (folder / f"{prefix}{i:03d}.txt").write_text("\n".join(lines))


def text_recipe(store: str | Path, source: str, *changes: str) -> Recipe:
    """The language-model recipe on a small scale, over a source given as YAML."""
    data = f"data={{kind: language_modeling, source: {source}, tokenizer: {{kind: bpe, {TEXT}}}"
    return load_recipe(RECIPES / "stdlib-lm.yaml", (f"store={store}", data, *changes))


def context(recipe: Recipe, name: str = "a", progress: Progress = no_progress) -> StageContext:
    """What prepare is given; ``name`` tells drafts of one store apart."""
    draft: ArtifactWriter = Store(recipe.store).new_writer(
        recipe.name, "prepare", name.encode().hex().ljust(8, "0"), {}, {}
    )
    return StageContext(recipe, {}, draft, progress)
