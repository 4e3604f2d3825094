"""The train stage of a teacher that is served: nothing is trained, and what it is known by is written down."""

from __future__ import annotations

from typing import Any

from overproof.config import Served, TopK
from overproof.engines.endpoint import Endpoint
from overproof.engines.served_teacher import ask_teacher
from overproof.stage_context import Notice, StageContext, TaskProgress


def record_teacher(context: StageContext, served: Served) -> dict[str, Any]:
    """Ask the endpoint who it is, and whether it tells what the recipe reads of it; writes teacher.json.

    Raises:
        InputError: it cannot be asked, does not tell as many tokens, or has another tokenizer than the data.
    """
    recipe, prepared = context.recipe, context.parents["prepare"].local_except("train/")
    context.progress(TaskProgress("train", 0, 1, f"asking {served.url}"))
    top = recipe.cache.scheme.k if recipe.reads_cache and isinstance(recipe.cache.scheme, TopK) else 1
    endpoint = Endpoint(served, lambda text: context.progress(Notice(text)))
    found = ask_teacher(endpoint, prepared, top)
    endpoint.close()
    with context.draft.directory() as folder:
        (folder / found.FILE).write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (folder / "curve.jsonl").touch()  # it takes no steps
    return {"url": served.url, "weights": found.weights, "steps": 0, "energy_estimate_j": 0.0}
