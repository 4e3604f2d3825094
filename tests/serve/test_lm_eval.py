"""EleutherAI's lm-evaluation-harness finds the same figures over HTTP as in the model's own torch weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from overproof.engines.llamacpp import LlamaCpp
from overproof.serve.middleware import Access
from overproof.serve.routes import build_app
from single_model import listening, one

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="an environment older than this dependency")

ROUNDING_NATS = 0.005  # of a continuation (measured: 0.002): llama.cpp rounds to half precision
CHOICES = [
    {"text": "import os\nimport", "choices": [" sys", " os", " café 日本"], "label": 0},
    {"text": "def __init__(self", "choices": [", name", "):\n", " return"], "label": 1},
    {"text": "class A:\n    def f(self):\n        ", "choices": ["return None", "raise", "pass # 🎉"], "label": 2},
    {"text": "", "choices": ["import", '"""', "x"], "label": 1},
]
WRITTEN = [
    {"text": text, "target": "x"} for text in ("import ", "def f(self, ", "class A(", "# The", "    return", "x = 1")
]
CHOOSING = """
task: choosing
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
task: writing
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n\\n", "self", "§", "¶", "¤"], max_gen_toks: 24, temperature: 0.0, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, text, rows in (("choosing", CHOOSING, CHOICES), ("writing", WRITING, WRITTEN)):
        data = folder / f"{name}.json"
        data.write_text("\n".join(map(json.dumps, rows)))
        source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        lines = f"dataset_path: json\ndataset_kwargs: {json.dumps(source)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(text + lines)
    return folder


@pytest.fixture(scope="module")
def student(text_package: Path) -> Path:
    """The Hugging Face directory from which the package's files were made."""
    (found,) = text_package.parent.glob("sweep-*/students/student")
    return found


@pytest.fixture(scope="module")
def url(text_package: Path) -> Iterator[str]:
    """A server of the student in half precision."""
    (file,) = text_package.parent.glob("compress-*/student.gguf")
    engine = LlamaCpp(file, slots=2)
    with listening(build_app(one(text_package, engine), Access(None))) as address:
        yield f"{address}/v1/completions"
    engine.close()


def evaluate(tasks: Path, kind: str, **settings: Any) -> dict[str, Any]:
    """Scores by task and metric, and what the model answered to each request."""
    import lm_eval  # takes seconds
    from lm_eval.tasks import TaskManager

    settings["add_bos_token"] = True  # the tokenizer's own start token, which this kind of model leaves out by itself
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        kind, settings, ["choosing", "writing"], task_manager=manager, bootstrap_iters=0, device="cpu", batch_size=2
    )
    assert found is not None
    answers = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return {"results": found["results"], "answers": answers}


@pytest.fixture(scope="module")
def expected(tasks: Path, student: Path) -> dict[str, Any]:
    return evaluate(tasks, "hf", pretrained=str(student), dtype="float32")


@pytest.mark.parametrize("concurrent", [1, 2])
def test_the_harness_finds_the_models_own_figures(
    expected: dict[str, Any], tasks: Path, student: Path, url: str, concurrent: int
) -> None:
    found = evaluate(
        tasks, "local-completions", model="stdlib-lm", base_url=url, tokenizer=str(student), num_concurrent=concurrent
    )
    assert found["answers"]["writing"] == expected["answers"]["writing"]
    pairs = list(zip(found["answers"]["choosing"], expected["answers"]["choosing"], strict=True))
    assert len(pairs) == len(CHOICES)
    for answers, own in pairs:
        assert len(answers) == len(own) == 3
        for ((value, is_greedy),), ((own_value, own_is_greedy),) in zip(answers, own, strict=True):
            assert abs(value - own_value) < ROUNDING_NATS
            assert is_greedy == own_is_greedy
    assert found["results"] == expected["results"]
    assert len({str(texts) for texts in found["answers"]["writing"]}) > 3
