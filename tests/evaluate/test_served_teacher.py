"""A teacher behind an endpoint: its cache, its scores and its refusals, over real HTTP from overproof's own server."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from endpoints import KEY, OwnServer, own_server, vllm_server
from overproof.artifacts import Artifact, Store
from overproof.config import Evaluate, Recipe, Served, load_recipe
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Columns
from overproof.distill.endpoint_worker import EndpointJob, EndpointTargetWorker, EndpointTextWorker, texts_in
from overproof.distill.target_cache import TargetCache, TargetIndex, target_key
from overproof.distill.teacher_pool import finished_files, write_index
from overproof.distill.teacher_text import TextIndex, generate_settings, text_key
from overproof.distill.teacher_worker import CaptureJob, TargetWorker, TeacherWorker
from overproof.distill.text_worker import TextWorker
from overproof.engines.endpoint import Endpoint
from overproof.engines.served_teacher import ServedTeacher, ask_teacher, require_same
from overproof.errors import InputError
from overproof.evaluate.gate import Verdict, judge
from overproof.evaluate.metrics import Report
from overproof.evaluate.stage import evaluate_exports
from overproof.export.stage import export_models
from overproof.registry import FORMATS, TASKS
from overproof.report.content import EvaluatedFiles, file_rows
from overproof.report.figure import plot_report
from overproof.stage_context import Notice, ProgressEvent, StageContext, no_progress
from overproof.train.ray_trainer import train_teacher

RECIPE = Path(__file__).parents[2] / "jobs/recipes/stdlib-lm.yaml"
K, ROWS, PROMPT = 8, 48, 4
END_ID = 0  # of the tokenizer of these tests
VLLM_PYTHON, RUN_S = "OVERPROOF_VLLM", 600


def overrides(folder: Path, url: str) -> tuple[str, ...]:
    shape = "kind: llama, hidden_size: 64, intermediate_size: 96, layers: 1, heads: 2, kv_heads: 1"
    served = f"{{kind: served, url: '{url}', model: teacher, key_env: TEACHER_KEY}}"
    return (
        f"store={folder}/store", "data.tokenizer={kind: file, path: tokenizer.json}", "data.sequence_length=64",
        f"train={{model: {served}, steps: 0, batch_size: 2, learning_rate: 1}}",
        f"cache={{scheme: {{kind: topk, k: {K}}}, batch_size: 8}}",
        f"sweep.students=[{{name: student, model: {{{shape}}}}}]", "tune={}",
        "sweep.steps=2", "gate.rules=[{kind: keep, at_least: 0.5}]",
    )  # fmt: skip


def recipe_of(folder: Path, url: str, *changes: str) -> Recipe:
    return load_recipe(RECIPE, (*overrides(folder, url), *changes))


def captured(text: dict[str, Artifact], recipe: Recipe, worker: type[TeacherWorker], **further: Any) -> TeacherWorker:
    """A worker of the cache of some rows, in the recipe's store."""
    prepared, trained = text["prepare"], further.pop("trained", text["train"])
    index = TargetIndex.of(target_key(recipe, prepared, trained), Manifest.read(prepared.local()), ROWS)
    draft = Store(recipe.store).new_writer(recipe.name, "cache", worker.__name__.encode().hex(), {}, {})
    job = CaptureJob(recipe.cache, index, prepared, trained, draft)
    return worker(EndpointJob(**vars(job), **further) if further else job)


def run(worker: TeacherWorker) -> list[str]:
    """Write every file that is not there; gives what was refused."""
    finished = finished_files(worker.job)
    todo = [number for number, file in enumerate(worker.index.files) if file.path not in finished]
    return [str(fault) for report in worker({"file": np.array(todo)}) for fault in report["fault"] if fault]


def targets(worker: TeacherWorker) -> Columns:
    write_index(worker.job, {path: file.entry for path, file in finished_files(worker.job).items()})
    cache = TargetCache(Path(worker.job.draft.uri), ("tokens", "mask", "label_logprob", "indices", "logprobs", "tail"))
    groups = np.concatenate([file.groups for file in worker.index.files])
    each = worker.index.identity.rows_per_group
    return cache.take((groups[:, None] * each + np.arange(each)).ravel())


def recorded(text: dict[str, Artifact], recipe: Recipe) -> Artifact:
    """What the train stage leaves."""
    draft = Store(recipe.store).new_writer(recipe.name, "train", "ab" * 32, {}, {})
    context = StageContext(recipe, {"prepare": text["prepare"]}, draft, no_progress)
    return draft.commit(train_teacher(context), 0.0)


@pytest.fixture(scope="module")
def shared(text: dict[str, Artifact]) -> Iterator[OwnServer]:
    with own_server(text["compress"].local() / "teacher.gguf", max_tokens=64) as made:
        yield made


@pytest.fixture
def server(shared: OwnServer, monkeypatch: pytest.MonkeyPatch) -> OwnServer:
    """With its key in the environment."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    shared.completions, shared.busy, shared.down_after, shared.change = 0, 0, None, None
    return shared


def served_by(made: OwnServer, **changes: Any) -> Served:
    return Served(url=made.url, model="teacher", key_env="TEACHER_KEY", **changes)


def test_its_cache_is_that_of_its_weights(text: dict[str, Artifact], server: OwnServer, tmp_path: Path) -> None:
    """An endpoint that goes away is told of by the name of its fault, and leaves no file; one that is busy is waited
    for, and of what was finished nothing is asked again.
    """
    recipe = recipe_of(tmp_path, server.url)
    trained = recorded(text, recipe)
    assert KEY not in "".join(path.read_text() for path in trained.local().iterdir())
    here = captured(text, recipe, TargetWorker)
    assert run(here) == []
    expected, events = targets(here), list[ProgressEvent]()
    impatient, patient = (served_by(server, retry_s=seconds, rows_per_request=3) for seconds in (0.0, 60.0))
    server.completions, server.down_after = 0, 2
    worker = captured(text, recipe, EndpointTargetWorker, trained=trained, served=impatient, progress=events.append)
    (fault,) = run(worker)
    assert "answers 503, since 0 s" in fault
    assert finished_files(worker.job) == {}
    server.down_after, server.busy = None, 2
    worker.job = dataclasses.replace(worker.job, served=patient)  # type: ignore[type-var]
    del worker.endpoint  # type: ignore[attr-defined]
    assert run(worker) == []
    assert isinstance(events[0], Notice)
    assert len(finished_files(worker.job)) == len(worker.index.files)
    server.completions = 0
    assert run(worker) == []
    assert server.completions == 0
    found = targets(worker)
    for name in ("tokens", "mask"):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in ("label_logprob", "logprobs", "tail"):
        np.testing.assert_allclose(found[name], expected[name], atol=0.03)  # llama.cpp rounds
    assert (found["indices"] == expected["indices"]).mean() > 0.97  # near ties
    with pytest.raises(InputError, match="another teacher"):
        worker.index.check(here.index.identity)


def writing(
    text: dict[str, Artifact], recipe: Recipe, worker: type[TeacherWorker], trained: Artifact, **further: Any
) -> TeacherWorker:
    """A worker of some rows of the teacher's text, in the recipe's store."""
    prepared, settings = text["prepare"], generate_settings(recipe)
    index = TextIndex.of(text_key(recipe, prepared, trained), Manifest.read(prepared), ROWS)
    draft = Store(recipe.store).new_writer(recipe.name, "generate", worker.__name__.encode().hex(), {}, {})
    job = CaptureJob(settings, index, prepared, trained, draft)
    return worker(EndpointJob(**vars(job), progress=no_progress, **further) if further else job)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_its_text_is_what_its_weights_write(
    text: dict[str, Artifact], server: OwnServer, tmp_path: Path, temperature: float
) -> None:
    """The likeliest tokens are those of the weights here; sampled ones are other texts, and the same ones again."""
    written = f"generate={{prompt_tokens: {PROMPT}, temperature: {temperature}, batch_size: 16}}"
    recipe = recipe_of(tmp_path, server.url, written, "sweep.students.0.text=teacher")
    trained, ids = recorded(text, recipe), np.arange(16)
    worker = writing(text, recipe, EndpointTextWorker, trained, served=served_by(server))
    found = worker.compute(ids)["tokens"]
    rows = worker.rows.take(ids)["tokens"]
    assert (found.dtype, found.shape) == (rows.dtype, rows.shape)
    np.testing.assert_array_equal(found[:, :PROMPT], rows[:, :PROMPT])
    order = np.random.default_rng(0).permutation(16)
    same = (worker.compute(ids[order])["tokens"] == found[order]).mean()  # requests side by side round otherwise
    here = writing(text, recipe, TextWorker, text["train"]).compute(ids)["tokens"]
    likeliest = (here == found)[:, PROMPT:].mean()
    print(f"temperature {temperature:g}: {same:.3f} are the same again, {likeliest:.3f} as here")
    assert same > 0.9
    assert (likeliest > 0.9) == (temperature == 0)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_where_its_text_ends_the_next_document_begins(
    text: dict[str, Artifact], server: OwnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool,
    told: bool,
) -> None:  # fmt: skip
    """Whether or not the end is among the tokens that are told; apart, the next document sees nothing before it."""
    recipe = recipe_of(tmp_path, server.url, f"generate={{prompt_tokens: {PROMPT}}}", "sweep.students.0.text=teacher")
    worker = writing(text, recipe, EndpointTextWorker, recorded(text, recipe), served=served_by(server))
    asked = list[tuple[list[int], int]]()

    def write(_: Endpoint, prompt: list[int], tokens: int, *__: Any) -> tuple[list[int], bool]:
        asked.append((prompt, tokens))
        ids = [7] * 20
        return ([*ids, END_ID] if told else ids, True) if tokens > 21 else ([7] * tokens, False)

    monkeypatch.setattr(Endpoint, "write", write)
    monkeypatch.setattr(worker, "rows", _Rows(apart))
    (found,) = worker.compute(np.arange(1))["tokens"].tolist()
    prompt = [3, END_ID, 4, 5]
    assert found == [*prompt, *[7] * 20, END_ID, *[7] * 20, END_ID, *[7] * 19]
    seen = prompt[1:] if apart else prompt
    second = [END_ID] if apart else found[:25]
    third = [END_ID] if apart else found[:46]
    assert asked == [(seen, 61), (second, 40), (third, 19)]


class _Rows:
    def __init__(self, apart: bool) -> None:
        self.apart = apart

    def take(self, ids: np.ndarray) -> Columns:
        rows = {"tokens": np.array([[3, END_ID, 4, 5, *[9] * 61]], np.uint16)}
        return rows | ({"start": np.full(len(ids), END_ID)} if self.apart else {})


@pytest.mark.usefixtures("ray_cluster")
def test_the_gates_figures_of_it_come_from_the_endpoint(text: dict[str, Artifact], tmp_path: Path) -> None:
    """And are those of the file behind it, in the engine that serves it."""
    few = "evaluate={max_documents: 4, bootstrap_samples: 100, threads: 1, decode_tokens: 4, timed_requests: 4}"
    file = text["compress"].local() / "teacher.gguf"
    with own_server(file, key=None) as server:  # Ray's workers have no variables of this test
        recipe = recipe_of(
            tmp_path, server.url, few, "train.model.key_env=null", "compress={kind: gguf, formats: [q8_0]}"
        )
        parents = {"prepare": text["prepare"], "train": recorded(text, recipe), "sweep": text["sweep"]}
        draft = Store(recipe.store).new_writer(recipe.name, "compress", "cd" * 32, {}, {})
        metrics = export_models(StageContext(recipe, parents, draft, no_progress))
        assert sorted(metrics["size_bytes"]) == ["control", "student", "student-q8_0"]
        parents["compress"] = draft.commit(metrics, 0.0)
        draft = Store(recipe.store).new_writer(recipe.name, "evaluate", "ef" * 32, {}, {})
        evaluate_exports(StageContext(recipe, parents, draft, no_progress))
    root, task = text["prepare"].local(), TASKS["language_modeling"]
    here, student = (
        task.score(path, root, task.units(root, 4), Evaluate(), "llama.cpp", FORMATS["gguf"], lambda _: None)
        for path in (file, file.with_name("student.gguf"))
    )
    expected = task.quality.value(here.total.sum(), here.size.sum())
    report = Report.model_validate_json((Path(draft.uri) / "report.json").read_bytes())
    assert report.unwritten_teacher is not None
    assert [m.name for m in report.measured] == ["control", "student", "student-q8_0"]
    assert (report.unwritten_teacher.model, len(report.unwritten_teacher.weights)) == ("teacher", 64)
    quality = {m.name: m.metrics["bits_per_byte"].value for m in report.measured}
    assert report.unwritten_teacher.metrics["bits_per_byte"].value == pytest.approx(expected, rel=1e-4)
    compared = report.compare("student", "teacher")
    assert compared is not None
    assert compared.value == pytest.approx(quality["student"] / expected - 1, abs=1e-3)
    agreed = report.measured[1].metrics["agreement"].value
    assert agreed == pytest.approx((student.choices_N == here.choices_N).mean(), abs=0.01)
    verdict = judge(recipe.gate, report)
    trial = {"name": "student", "cpu_seconds": 1.0}
    page = file_rows(
        EvaluatedFiles(report, verdict), {"trials": [trial], "control": {"name": "control", "cpu_seconds": 1.0}}
    )
    assert page["teacher"]["without_file"].startswith("teacher, which runs elsewhere")
    assert len(plot_report([], report, verdict).axes[1].lines) > 2


def test_other_weights_behind_the_same_name_are_refused(text: dict[str, Artifact], server: OwnServer) -> None:
    root, endpoint = text["prepare"].local(), Endpoint(served_by(server))
    before = ask_teacher(endpoint, root, 1)
    require_same(before, ask_teacher(endpoint, root, 1))
    with own_server(text["compress"].local() / "control.gguf") as other:
        found = ask_teacher(Endpoint(served_by(other)), root, 1)
    with pytest.raises(InputError, match=r"has '\w{64}' now; name the weights .* as train\.model\.revision"):
        require_same(before, found)
    unnamed = found.model_copy(update={"weights": before.weights})  # as of an endpoint that does not name them
    with pytest.raises(InputError, match=r"nats a token from what it said .*: other weights"):
        require_same(before, unnamed)
    revised = ServedTeacher.model_validate(before.model_dump() | {"revision": "2"})
    assert revised.sha256 != before.sha256
    assert ServedTeacher.model_validate(before.model_dump() | {"probe_nats": (1.0,)}).sha256 == before.sha256


@pytest.mark.parametrize(
    ("changes", "top", "words"),
    [
        ({"key_env": None}, 1, r"asks for another API key \(401\); none was sent: name the variable .* key_env"),
        ({"key_env": "WRONG_KEY"}, 1, r"asks for another API key \(401\); WRONG_KEY holds no key of it"),
        ({"key_env": "NO_KEY"}, 1, r"key_env: NO_KEY is not set"),
        ({"model": "other"}, 1, r"serves teacher; expected 'other'"),
        ({}, 21, r"answers 400: logprobs: .*less than or equal to 20.*; .*\(cache\.scheme\.k\)"),
        ({"url": "http://127.0.0.1:9/v1"}, 1, r"/v1/models: does not answer"),
    ],
)
def test_what_is_wrong_with_an_endpoint_is_one_error(
    text: dict[str, Artifact], server: OwnServer, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], top: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("WRONG_KEY", "another")
    served = served_by(server, retry_s=0.0).model_copy(update=changes)
    with pytest.raises(InputError, match=words):
        ask_teacher(Endpoint(served), text["prepare"].local(), top)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda choice: choice.update(logprobs=None), "tells no log-probabilities"),
        (lambda choice: choice["logprobs"]["tokens"].__setitem__(1, "x"), "a token is named 'x'"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(1, None), "tells no log-probabilities"),
        (lambda choice: choice["logprobs"]["token_logprobs"].pop(), "not one finite number"),
        (lambda choice: choice["logprobs"]["top_logprobs"].__setitem__(1, {}), "tells 1 of the 2 likeliest tokens"),
        (
            lambda choice: choice["logprobs"].update(
                tokens=[f"token_id:{number}" for number in range(len(choice["logprobs"]["tokens"]))]
            ),
            "expected the tokenizer of the served model",
        ),
    ],
)
def test_answers_that_are_of_another_kind_are_refused(
    text: dict[str, Artifact], server: OwnServer, change: Callable[[Any], Any], words: str
) -> None:
    server.change = lambda content: [change(choice) for choice in content.get("choices", ())]
    with pytest.raises(InputError, match=words):
        ask_teacher(Endpoint(served_by(server)), text["prepare"].local(), 2)


def test_an_address_without_the_version_is_refused(server: OwnServer) -> None:
    served = served_by(server).model_copy(update={"url": server.url.removesuffix("/v1")})
    with pytest.raises(InputError, match=r"answers 404: .*train\.model\.url up to /v1"):
        Endpoint(served).read([[1, 2]], 1)


def test_what_vllm_answers_is_understood(server: OwnServer) -> None:
    """Recorded from vLLM 0.32: beside the likeliest tokens it names the one that is there, first."""
    recorded = json.loads((Path(__file__).parents[1] / "golden/vllm-completion.json").read_bytes())
    server.change = lambda content: content.update(recorded)
    ids = [1, 504, 2, 30]
    (told,) = Endpoint(served_by(server)).read([ids], 2)
    assert told.ids == ids
    assert [len(top) for top in told.top_P] == [3, 3, 3]
    indices_PK, logprobs_PK = told.likeliest(2, 49152)
    assert indices_PK.shape == (3, 2)
    assert (np.diff(logprobs_PK) < 0).all()
    assert (told.logprobs_P < logprobs_PK.min(1)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.steps=3", "train: model.kind is 'served', whose weights are not here; expected steps 0"),
        ("train.model.url=ftp://x/v1", "train.model.url: expected http://HOST:PORT/v1"),
        ("train.model.url=http://x:99999/v1", "train.model.url: Port out of range"),
        ("train.model.url=http://me:secret@x/v1", "train.model.url: expected http://HOST:PORT/v1"),
        ("data.tokenizer={kind: bpe}", "data.tokenizer.kind 'bpe': train.model.kind is 'served'"),
        ("cache.scheme={kind: dense}", "cache.scheme.kind 'dense'"),
        ("cache.temperatures=[1, 2]", "temperature 2: "),
        ("sweep.students.0.temperature=2", "temperature 2: "),
        ("sweep.students.0.teacher=live", "sweep.students.0.teacher 'live'"),
        ("sweep.students.0.states={weight: 1}", "sweep.students.0.states: "),
        ("sweep.students.0.model={kind: teacher_layers, layers: 1}", "sweep.students.0.model.kind 'teacher_layers'"),
        ("sweep.students.0.model={kind: pruned, layers: 1}", "sweep.students.0.model.kind 'pruned'"),
        ("speculate={}", "speculate: train.model.kind is 'served'"),
        ("gate.rules.0={kind: smaller, at_least: 2}", "gate.rules.0.against 'teacher', whose size is not known here"),
    ],
)
def test_what_an_endpoint_cannot_do_is_refused_by_name(tmp_path: Path, change: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        recipe_of(tmp_path, "http://127.0.0.1:9/v1", change)
    assert words in str(refused.value)


def test_where_it_is_asked_and_how_is_no_part_of_the_result(tmp_path: Path) -> None:
    one, other = (recipe_of(tmp_path, f"http://127.0.0.1:9/v1{change}").train for change in ("", "/x"))
    assert one.model != other.model
    assert one.without_resources() == other.without_resources()
    assert one.without_resources()["model"] == {"kind": "served", "model": "teacher", "revision": None}


def test_what_shares_a_row_is_asked_about_one_by_one() -> None:
    """What is left of a row of conversations is a piece of its own, and none is asked about. Of documents every token
    is, the one that begins the next as the last of the one before.
    """
    position = np.array([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]])
    rows = {"length": np.array([4, 7]), "position": position}
    assert texts_in(rows) == [(0, slice(0, 3)), (0, slice(3, 5)), (1, slice(0, 8))]
    assert texts_in({"length": np.array([4, 7])}) == [(0, slice(0, 5)), (1, slice(0, 8))]
    tokens = np.array([[9, 3, 0, 5, 0, 0, 4, 8], [0, 1, 2, 3, 4, 5, 6, 0]])
    found = texts_in({"length": np.array([7, 7]), "tokens": tokens, "start": np.zeros(2)})
    assert found == [(0, slice(0, 3)), (0, slice(2, 5)), (0, slice(4, 6)), (0, slice(5, 8)), (1, slice(0, 8))]
    places = sorted((row, place) for row, text in found for place in range(text.start, text.stop - 1))
    assert places == [(row, place) for row in range(2) for place in range(7)]


@pytest.mark.trial
@pytest.mark.skipif(VLLM_PYTHON not in os.environ, reason=f"{VLLM_PYTHON} names no Python of an environment with vLLM")
def test_vllm_teaches_up_to_a_verdict(
    text: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is that of the weights behind it, its text what they write; a whole run judges its student by it."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    directory = text["train"].local() / "model"
    few = (
        f"data.tokenizer={{kind: file, path: {directory}}}", "sweep.batch_size=2", "sweep.validate_every=2",
        "sweep.validation_rows=8", "cache.rows=16", "evaluate={max_documents: 4, threads: 1, timed_requests: 4}",
    )  # fmt: skip
    with vllm_server(os.environ[VLLM_PYTHON], directory, tmp_path / "vllm.log") as url:
        recipe = recipe_of(tmp_path, url)
        trained, served = recorded(text, recipe), recipe.train.model
        assert isinstance(served, Served)
        worker = captured(text, recipe, EndpointTargetWorker, trained=trained, served=served, progress=no_progress)
        assert run(worker) == []
        asked = f"generate={{prompt_tokens: {PROMPT}, temperature: 0, batch_size: 16}}"
        writes, ids = recipe_of(tmp_path, url, asked, "sweep.students.0.text=teacher"), np.arange(16)
        written = writing(text, writes, EndpointTextWorker, trained, served=served).compute(ids)["tokens"]
        sets = [word for override in (*overrides(tmp_path / "whole", url), *few) for word in ("--set", override)]
        command = [sys.executable, "-m", "overproof.cli.main", "run", str(RECIPE), "--until", "gate", *sets]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ServedTeacher.read(trained.local()).weights == str(directory)
    likeliest = writing(text, writes, TextWorker, text["train"]).compute(ids)["tokens"]
    assert (written == likeliest).mean() > 0.9  # near ties, after which all is another text
    here = captured(text, recipe, TargetWorker)
    assert run(here) == []
    found, expected = targets(worker), targets(here)
    for name in ("label_logprob", "logprobs", "tail"):
        np.testing.assert_allclose(found[name], expected[name], atol=1 / 128)  # half precision's, at 8 nats
    assert (found["indices"] == expected["indices"]).mean() > 0.99  # near ties
    by_stage = {a.record.stage: a.local() for a in Store(f"{tmp_path}/whole/store").artifacts()}
    report = Report.model_validate_json((by_stage["evaluate"] / "report.json").read_bytes())
    verdict = Verdict.model_validate_json((by_stage["gate"] / "verdict.json").read_bytes())
    assert report.unwritten_teacher is not None
    assert report.unwritten_teacher.weights == str(directory)
    assert [candidate.name for candidate in verdict.candidates] == ["student-q8_0", "student-q4_0"]
