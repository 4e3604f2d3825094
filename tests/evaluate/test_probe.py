"""The probe's bound in time, and its word of how far it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from overproof import pipeline
from overproof.artifacts import Artifact
from overproof.config import Evaluate, Recipe
from overproof.engines import probe
from overproof.engines.probe import FEWEST, probe_arrays, probe_text
from overproof.engines.probe_messages import ArrayRequest, TextRequest
from overproof.evaluate.outcome import CONTENDED_CORES
from overproof.evaluate.stage import probe_settings
from overproof.registry import FORMATS, TASKS

MANY = 10_000_000


def array_request(digits: dict[str, Artifact], **changes: float) -> ArrayRequest:
    rows = np.random.default_rng(0).random((2, 64)).tolist()
    file = str(digits["compress"].local() / "student.onnx")
    told = {
        "engine": "onnxruntime",
        "file": file,
        "threads": 1,
        "rows": rows,
        "timed_rows": rows,
        "timed_requests": MANY,
        "probe_s": 60.0,
    }
    return ArrayRequest.model_validate(told | changes)


def text_request(text: dict[str, Artifact], **changes: float) -> TextRequest:
    told = {
        "engine": "llama.cpp", "file": str(text["compress"].local() / "student.gguf"), "threads": 1,
        "prompts": [[0, 40, 41]], "probe_tokens": 4, "texts": ["import os"], "timed_prompts": [[0, 40], [0, 41]],
        "timed_requests": 60, "probe_s": 60.0, "decode_tokens": 4,
    }  # fmt: skip
    return TextRequest.model_validate(told | changes)


def test_no_request_is_begun_when_the_time_is_over(digits: dict[str, Artifact], text: dict[str, Artifact]) -> None:
    """Yet the fewest that give a latency are made, and no more than were asked for."""
    arrays = probe_arrays(array_request(digits, probe_s=1e-6), lambda _: None)
    assert len(arrays.latency_s) == FEWEST
    assert len(arrays.logprobs) == 2
    assert len(probe_arrays(array_request(digits, timed_requests=FEWEST - 1), lambda _: None).latency_s) == FEWEST - 1
    texts = probe_text(text_request(text, probe_s=1e-6), lambda _: None)
    assert len(texts.latency_s) == len(texts.first_token_s) == FEWEST
    assert len(texts.answers) == 1
    assert len(texts.answers[0].tokens) == 4  # parity is asked for all the same


def test_a_narrow_interval_ends_it_after_the_fewest_requests_alone(digits: dict[str, Artifact]) -> None:
    for fewest in (20, 60):
        request = array_request(digits, narrow=1e9, fewest_requests=fewest)  # whatever the machine does meanwhile
        assert len(probe_arrays(request, lambda _: None).latency_s) == fewest


def test_a_latency_rule_is_given_the_requests_that_it_needs(make_recipe: Callable[..., Recipe]) -> None:
    latency = {"kind": "latency", "at_most_ms": 5}
    for rules, asked, narrowed in (([], 20, 20), ([latency], 59, 59), ([{**latency, "percentile": 50}], 20, 20)):
        recipe = make_recipe("digits", [{"kind": "parity", "at_most": 0.2}, *rules])
        settings = probe_settings(recipe)
        assert (settings.timed_requests, settings.fewest_requests) == (asked, narrowed)
        assert pipeline._evaluate_inputs(recipe) == ({"timed_requests": 59} if asked == 59 else {})
        many = recipe.evaluate.model_copy(update={"timed_requests": 100})
        assert pipeline._evaluate_inputs(recipe.model_copy(update={"evaluate": many})) == {}


def test_how_far_it_is_arrives_while_it_runs(digits: dict[str, Artifact]) -> None:
    notes: list[str] = []
    answer = probe_arrays(array_request(digits, probe_s=3.0), notes.append)
    assert FEWEST < len(answer.latency_s) < MANY
    found = [re.fullmatch(r"(loading|request (\d+) of 10000000), (\d+) s", note) for note in notes]
    assert all(found), notes
    numbers = [int(match[2]) for match in found if match and match[2]]
    seconds = [int(match[3]) for match in found if match]
    assert numbers
    assert numbers == sorted(numbers)  # the last one may be read again while the process ends
    assert numbers[-1] <= len(answer.latency_s)
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("kind", "engine", "format"), [("text", "llama.cpp", "gguf"), ("digits", "onnxruntime", "onnx")]
)
def test_the_report_says_how_many_requests_were_made(
    kind: str, engine: str, format: str, request: pytest.FixtureRequest
) -> None:
    done: dict[str, Artifact] = request.getfixturevalue(kind)
    task = {"text": "language_modeling", "digits": "image_classification"}[kind]
    settings = Evaluate(threads=1, decode_tokens=4, timed_requests=1000, probe_s=1e-6, probe_prompts=1, probe_tokens=2)
    file = done["compress"].local() / f"student{FORMATS[format].suffix}"
    notes: list[str] = []
    found = TASKS[task].probe(file, done["prepare"].local(), settings, engine, FORMATS[format], notes.append)
    assert found["latency_p50_s"].n == found["latency_p95_s"].n == FEWEST
    assert found["latency_p50_s"].high is found["latency_p95_s"].high is None  # three bound neither


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not count who stands in line")
def test_cores_that_others_keep_busy_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what this process waited for, whatever the machine's own counters say."""
    monkeypatch.setattr(probe, "_busy_s", lambda: 0.0)
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        contention = probe._Contention(1)
        sum(range(20_000_000))
        assert contention.cores() > CONTENDED_CORES
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
