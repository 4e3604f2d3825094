"""What records expect of an answer: how it is written, which questions are asked, and how files answer them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from chats import chat_recipe, messages, prepared_chats, some_chats, write_chat_model, write_records
from finished import RECIPES
from overproof.artifacts import Artifact, Store
from overproof.config import Recipe, load_recipe
from overproof.data.manifest import DOCUMENTS, TOKENIZER, Manifest
from overproof.engines.base import Sampling
from overproof.engines.llamacpp import LlamaCpp
from overproof.engines.probe import FEWEST_CHATS, probe_answers
from overproof.engines.probe_messages import AnswersRequest
from overproof.errors import InputError
from overproof.evaluate.answers import ANSWERS, check_answers
from overproof.evaluate.metrics import wilson_interval
from overproof.export.gguf_file import export_gguf
from overproof.export.stage import EXPORT_LIST, EXPORTS, Export
from overproof.models.hf_directory import build_model, save_model
from overproof.stage_context import Notice, ProgressEvent, StageContext
from overproof.tasks.chat import ParquetConversations
from overproof.tasks.conversations import conversation, read_conversations
from overproof.tasks.expected_answers import EXPECTED, Expected, read_checks, read_expected

RULE = "gate.rules=[{kind: expected, at_least: 0.5}]"


@pytest.mark.parametrize(
    ("value", "answer", "holds"),
    [
        (" Paris\n", "\nParis ", True),
        ("Paris", "paris", False),
        ("Paris", "Paris.", False),
        ({"exact": "a b"}, "a b", True),
        ({"exact": None, "regex": r"\b42\b"}, "It is 42, I think.", True),
        ({"regex": r"\b42\b"}, "It is 421.", False),
        ({"regex": r"(?i)^(yes|no)$"}, " No\n", True),
        ({"regex": r"5\s*$"}, "<think>\nfour?\n</think>\n\n5\n", True),
        ({"regex": "(?s)^.{0,20}$"}, "x" * 21, False),
        ({"regex": f"{'(a*)*' * 8}b$"}, "a" * 5000, False),  # would take for ever where an engine goes back
    ],
)
def test_an_answer_is_held_against_what_is_expected(value: Any, answer: str, holds: bool) -> None:
    expected = read_expected("x", value)
    assert expected is not None
    assert expected.holds(answer) is holds


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (42, 'expected holds 42; expected a text that the answer must be, or {"exact": "..."}, or {"regex": "..."}'),
        (["a", "b"], "expected holds ['a', 'b']; expected a text"),
        ({"regexp": "a"}, "expected holds {'regexp': 'a'}; expected a text"),
        ({"exact": "a", "regex": "a"}, "expected holds {'exact': 'a', 'regex': 'a'}; expected a text"),
        ({"regex": 3}, "expected holds {'regex': 3}; expected a text"),
        ({}, "expected holds {}; expected a text"),
        ("  ", "expected holds '  '; expected a text"),
        ({"regex": "(a"}, "expected.regex holds '(a': Invalid regular expression: missing ): (a; expected a regular"),
        ({"regex": "(?=a)"}, "invalid perl operator: (?=; expected a regular expression of RE2, which has neither"),
        ({"regex": "a*"}, "expected.regex holds 'a*', which is found in every text; expected one that a wrong answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_expected_is_one_error_that_says_where(value: Any, words: str, tmp_path: Path) -> None:
    records = [{"messages": messages("a?", "b")}, {"messages": messages("c?", "d"), "expected": value}]
    source = write_records(tmp_path / "x.jsonl", records)
    asked = chat_recipe(tmp_path, source, write_chat_model(tmp_path / "model"))
    with pytest.raises(InputError) as refused:
        prepared_chats(asked)
    assert str(refused.value).startswith(f"{source}, line 2: ")
    assert words in str(refused.value)


def test_columns_of_parquet_may_hold_either(tmp_path: Path) -> None:
    rows = [{"instruction": "2+3?", "output": "5", "expected": {"exact": "5", "regex": None}},
            {"instruction": "a?", "output": "b", "expected": {"exact": None, "regex": "^b"}},
            {"instruction": "c?", "output": "d", "expected": None}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    found = [each.expected for each in read_conversations(ParquetConversations(path=f"{tmp_path}/x.parquet"))]
    assert found == [Expected("exact", "5"), Expected("regex", "^b"), None]


# --- prepared data --------------------------------------------------------------------------------


def expecting(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two in three say what their last answer must be: that, or something else where it says "file"."""
    found = []
    for number, record in enumerate(records):
        said = record["messages"][-1]["content"].replace("file", "folder")
        found.append(record | ({"expected": said} if number % 3 else {}))
    return found


def test_the_questions_of_the_test_split_are_kept_as_a_server_is_asked_them(tmp_path: Path) -> None:
    records = expecting(some_chats())
    records += [records[4] | {"expected": None}, records[1]]  # duplicates
    told: list[ProgressEvent] = []
    model = write_chat_model(tmp_path / "model")
    asked = chat_recipe(tmp_path, write_records(tmp_path / "x.jsonl", records[:60]), model, RULE)
    root = prepared_chats(asked, told.append)
    by_sha = {conversation("", record).sha256: record for record in records[:60]}
    documents = {row["document"]: row for row in pq.read_table(root / DOCUMENTS).to_pylist()}
    tested = {number for number, row in documents.items() if row["split"] == "test"}
    checks = read_checks(root)
    expected = {number for number in tested if "expected" in by_sha[documents[number]["sha256"]]}
    assert {check.document for check in checks} == expected
    assert 0 < len(checks) < len(tested)
    for check in checks:
        record = by_sha[documents[check.document]["sha256"]]
        assert check.messages == record["messages"][:-1]
        assert check.expected == Expected("exact", record["expected"])
        assert (check.name, check.tools) == (documents[check.document]["name"], [])
    wrong = sum("folder" in check.expected.text for check in checks)
    notices = [event.text for event in told if isinstance(event, Notice)]
    assert any(f"(expected); files are asked the {len(checks)} of the test split" in text for text in notices)
    assert wrong
    assert any(f"the own answer of {wrong} test conversations is not what they expect" in text for text in notices)
    assert Manifest.read(root).details["expected"] == len(checks)


def test_an_answer_that_rows_have_no_room_for_is_not_asked_for(tmp_path: Path) -> None:
    long = [
        record | {"expected": "x", "messages": [*record["messages"], *messages("and?", f"x {'value ' * 200}")]}
        for record in some_chats()
    ]
    asked = chat_recipe(tmp_path, write_records(tmp_path / "x.jsonl", long), write_chat_model(tmp_path / "model"))
    root = prepared_chats(asked)
    assert Manifest.read(root).splits["test"].documents > 0
    assert not (root / EXPECTED).exists()
    assert read_checks(root) == []


def test_what_contradicts_itself_or_the_gate_is_refused(tmp_path: Path) -> None:
    model, records = write_chat_model(tmp_path / "model"), some_chats()
    twice = [*records, records[5] | {"expected": "a"}, records[5] | {"expected": "b"}]
    source = write_records(tmp_path / "x.jsonl", twice)
    with pytest.raises(InputError, match=r"line 62: expected is .*'b'.*, and of the same conversation at .*line 61 it"):
        prepared_chats(chat_recipe(tmp_path, source, model))
    with pytest.raises(InputError, match=r"gate\.rules: one is of kind 'expected', and of \d+ test conversations none"):
        prepared_chats(chat_recipe(tmp_path, write_records(tmp_path / "y.jsonl", records), model, RULE))
    with pytest.raises(InputError, match=r"gate\.rules\.0\.kind is 'expected'; .*, those of 'chat' may"):
        load_recipe(RECIPES / "digits.yaml", (RULE,))


# --- what files answer ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Artifact], tuple[Export, ...]]:
    """Prepared data, and a random model as f32 and q4_0, as artifacts."""
    folder = tmp_path_factory.mktemp("answers")
    source = write_records(folder / "x.jsonl", expecting(some_chats()))
    recipe = chat_recipe(folder, source, write_chat_model(folder / "model"), "evaluate.answer_tokens=6")
    root, store = prepared_chats(recipe), Store(recipe.store)
    model = build_model(recipe.train.model, Manifest.read(root), 0)
    save_model(model, model.config, folder / "made", root / TOKENIZER)
    draft = store.new_writer("made", "compress", "ab" * 32, {}, {})
    exports = tuple(
        Export(name=name, student=None, format=name, file=f"{name}.gguf", size_bytes=1, candidate=False)
        for name in ("f32", "q4_0")
    )
    with draft.directory() as files:
        for export in exports:
            export_gguf(
                folder / "made", root / TOKENIZER, files / export.file, format=export.format, name="x",  # type: ignore[arg-type]
                chat_template=(root / "chat_template.jinja").read_text(),
            )  # fmt: skip
        (files / EXPORTS).write_bytes(EXPORT_LIST.dump_json(exports))
    compressed = draft.commit({}, 0)
    # What the f32 file really answers to every other question is what that question expects.
    engine = LlamaCpp(compressed.local() / "f32.gguf")
    table = pq.read_table(root / EXPECTED)
    rows = table.to_pylist()
    for row in rows[::2]:
        row["text"] = engine.complete(engine.chat_prompt(json.loads(row["messages"])), Sampling(6)).text.strip()
    engine.close()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), root / EXPECTED)
    draft = store.new_writer("prepared", "prepare", "cd" * 32, {}, {})
    with draft.directory() as copy:
        for name in (EXPECTED, "manifest.json"):
            (copy / name).write_bytes((root / name).read_bytes())
    return recipe, {"prepare": draft.commit({}, 0), "compress": compressed}, exports


@pytest.mark.usefixtures("ray_cluster")
def test_files_are_asked_in_the_engine_and_held_against_what_is_expected(
    world: tuple[Recipe, dict[str, Artifact], tuple[Export, ...]], tmp_path: Path
) -> None:
    recipe, parents, exports = world
    told: list[ProgressEvent] = []
    draft = Store(recipe.store).new_writer("evaluated", "evaluate", "ef" * 32, {}, {})
    found = check_answers(StageContext(recipe, parents, draft, told.append), exports)  # type: ignore[arg-type]
    checks = read_checks(parents["prepare"].local())
    assert found.checks == checks
    right = found.right("f32")
    assert right[::2] == [True] * len(right[::2])
    metric = found.metrics("f32")["expected_accuracy"]
    assert (metric.value, metric.n, metric.of) == (sum(right) / len(right), len(checks), len(checks))
    assert (metric.low, metric.high) == wilson_interval(sum(right), len(right), 0.95)
    assert metric.low is not None
    assert 0 < metric.low < metric.value
    assert found.summary.startswith(f"{len(checks)} of {len(checks)} questions of the test split that say what")
    found.write(tmp_path)
    rows = pq.read_table(tmp_path / ANSWERS).to_pylist()
    assert [row["right"] for row in rows if row["export"] == "f32"] == right
    assert all(row["answer"].strip() == row["expected"] for row in rows if row["right"])
    assert {row["export"] for row in rows} == {"f32", "q4_0"}
    fewer = recipe.evaluate.model_copy(update={"max_documents": 3, "score_s": 1e-6})
    context = StageContext(recipe.model_copy(update={"evaluate": fewer}), parents, draft, told.append)  # type: ignore[arg-type]
    short = check_answers(context, exports)
    assert short.checks == [checks[0], checks[round((len(checks) - 1) / 2)]]
    assert (short.metrics("q4_0")["expected_accuracy"].n, FEWEST_CHATS) == (2, 2)
    assert short.summary.endswith("; evaluate.score_s allows 1e-06 s")


def test_a_question_that_the_engine_refuses_has_no_answer(
    world: tuple[Recipe, dict[str, Artifact], tuple[Export, ...]],
) -> None:
    request = AnswersRequest(
        engine="llama.cpp", file=str(world[1]["compress"].local() / "q4_0.gguf"), threads=1,
        chats=[messages("value " * 5000), messages("names?")], tools=[[], []], answer_tokens=3,
    )  # fmt: skip
    refused, given = probe_answers(request, lambda _: None).answers
    assert refused.finish_reason is None
    assert "tokens long; expected at most" in refused.refusal
    assert given.finish_reason in ("stop", "length")


@pytest.mark.parametrize(("right", "asked"), [(0, 1), (5, 5), (7, 20), (300, 400)])
def test_the_interval_is_wilsons(right: int, asked: int) -> None:
    reference = binomtest(right, asked).proportion_ci(0.9, method="wilson")
    assert wilson_interval(right, asked, 0.9) == pytest.approx((reference.low, reference.high))
