"""Conversations as packed rows, through the losses, the teacher's cache and the scores of a file."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chats import (
    END,
    QWEN3,
    chat_recipe,
    encoder_of,
    messages,
    prepared_chats,
    some_chats,
    write_chat_model,
    write_records,
)
from finished import RECIPES
from overproof.artifacts import Artifact, Store
from overproof.config import Dense, Recipe, Scheme, TopK, load_recipe
from overproof.data.manifest import DOCUMENTS, MANIFEST, SPLITS, TEST_TEXTS, TOKENIZER, Manifest
from overproof.data.parquet_reader import Shards
from overproof.distill.losses import Divergence
from overproof.distill.objectives import DistillObjective
from overproof.distill.optuna_study import STUDENT
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep import make_trial_job
from overproof.distill.sweep_state import SweepState
from overproof.distill.target_cache import TargetCache, TargetIndex, target_key
from overproof.distill.teacher_pool import finished_files, write_index
from overproof.distill.teacher_worker import CaptureJob, TargetWorker
from overproof.errors import InputError
from overproof.export.gguf_file import export_gguf
from overproof.models.base import DataShape
from overproof.models.ensemble_module import OverproofEnsembleConfig
from overproof.models.hf_directory import Batch, build_model, load_model, save_model, to_tensors
from overproof.registry import FAMILIES, FORMATS, TASKS
from overproof.stage_context import Notice, ProgressEvent, StageContext, no_progress
from overproof.tasks.base import agreements
from overproof.tasks.chat_rows import best_fit, packed_rows
from overproof.tasks.chat_template import EncodedConversation
from overproof.tasks.conversations import conversation
from overproof.train.loop import validation_loss
from overproof.train.objective import CrossEntropy

TASK = TASKS["chat"]
VOCABULARY, ROW = 320, 40
FAMILIES_OF_CHAT = [
    kind for kind, family in FAMILIES.items() if TASK.section.model_fields["kind"].default in family.tasks
]


def made(*lengths: int) -> list[EncodedConversation]:
    """Random conversations whose second halves are answers."""
    rng = np.random.default_rng(0)
    return [
        EncodedConversation(rng.integers(VOCABULARY, size=n, dtype=np.int32), np.arange(n) >= n // 2, (n,), (n,))
        for n in lengths
    ]


def batch_of(*rows: list[EncodedConversation], scale: float = 0.0, places: int = ROW) -> Batch:
    columns = packed_rows(rows, places)
    return to_tensors(columns | {"scale": np.full(len(rows), scale, np.float32)})


def tiny(kind: str = "llama") -> torch.nn.Module:
    family = FAMILIES[kind]
    if family.section is None:
        parts = [tiny("llama"), tiny("gemma3")]
        members = [part.config.to_dict() | {"architectures": [type(part).__name__]} for part in parts]
        config = OverproofEnsembleConfig(members=members, weights=(0.5, 0.5))
        return family.renewed(family.model_class()(config), parts).eval()  # type: ignore[attr-defined,no-any-return]
    numbers = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "initializer_range": 0.3,
    }
    section = family.section(**{name: value for name, value in numbers.items() if name in family.section.model_fields})
    config = family.configuration(section, DataShape("chat", VOCABULARY, ROW, bos_id=0, end_id=0))
    if config.to_dict().get("sliding_window"):
        config.sliding_window = 8
    torch.manual_seed(0)
    return family.model_class()(config).eval()


@pytest.mark.parametrize("kind", FAMILIES_OF_CHAT)
@torch.no_grad()
def test_what_shares_a_row_is_as_alone(kind: str) -> None:
    """In every family that takes chats, wherever in the row and beside whatever; without positions it is not."""
    model, (one, two, three) = tiny(kind), made(17, 6, 14)
    batch = batch_of([one, two, three], [three, one])
    logits_BPV = TASK.predict(model, batch).logits_BPV
    wrong = model(input_ids=batch["tokens"][:, :-1], use_cache=False).logits
    for row, at, found in ((0, 17, two), (0, 23, three), (1, 0, three), (1, 14, one)):
        alone = model(input_ids=torch.from_numpy(found.tokens_T[None].astype(np.int64)), use_cache=False).logits[0]
        count = min(len(alone), ROW - at)
        assert torch.allclose(logits_BPV[row, at : at + count], alone[:count], atol=1e-4)
        assert at == 0 or not torch.allclose(wrong[row, at : at + count], alone[:count], atol=0.1)


def test_decoders_that_nobody_has_looked_at_take_no_chats() -> None:
    assert "causal_lm" not in FAMILIES_OF_CHAT
    assert len(FAMILIES_OF_CHAT) >= 12


@given(st.lists(st.integers(1, ROW), max_size=60))
def test_rows_hold_every_conversation_once_and_few_rows_are_needed(sizes: list[int]) -> None:
    rows = best_fit(sizes, ROW)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    used = [sum(sizes[number] for number in row) for row in rows]
    assert all(0 < total <= ROW for total in used)
    assert len(rows) <= -(-11 * -(-sum(sizes) // ROW) // 9) + len([size for size in sizes if 2 * size > ROW]) + 1
    assert sum(total * 2 <= ROW for total in used) <= 1


def test_a_packed_row_says_where_each_begins_and_what_counts() -> None:
    one, two = made(4, 3)
    columns = packed_rows([[one, two]], 9)
    assert columns["tokens"][0, :7].tolist() == [*one.tokens_T, *two.tokens_T]
    assert columns["position"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert columns["answer"][0].tolist() == [0, 1, 1, 0, 1, 1, 0, 0, 0]
    assert columns["length"].tolist() == [6]


def answers_nats(model: torch.nn.Module, conversations: list[EncodedConversation]) -> torch.Tensor:
    """Of the answers' tokens, each conversation read alone."""
    found = []
    for each in conversations:
        tokens = torch.from_numpy(each.tokens_T.astype(np.int64))
        logprobs = model(input_ids=tokens[None, :-1], use_cache=False).logits[0].log_softmax(-1)
        nats = -logprobs.gather(-1, tokens[1:, None])[:, 0]
        found.append(nats[torch.from_numpy(each.answers_T[1:])])
    return torch.cat(found)


def test_the_loss_is_that_of_the_answers_however_the_batch_is_shared() -> None:
    model, (a, b, c, d, e) = tiny(), made(17, 6, 14, 30, 9)
    rows = [[a, b, c], [d], [e], [c, b]]
    nats = answers_nats(model, [each for row in rows for each in row])
    objective, scale = CrossEntropy(TASK.predict), len(rows) / len(nats)
    whole, _ = objective.loss(model, batch_of(*rows, scale=scale))
    parts = [objective.loss(model, batch_of(row, scale=scale))[0] for row in rows]
    assert whole.item() == pytest.approx(nats.mean().item(), rel=1e-5)
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-5)
    held_out = [batch_of(*rows[:1]), batch_of(*rows[1:])]
    with torch.inference_mode():
        assert validation_loss(model, TASK.predict, held_out) == pytest.approx(nats.mean().item(), rel=1e-5)
    assert torch.equal(TASK.segments(batch_of(*rows), torch.zeros(4, ROW, 2)), batch_of(*rows)["answer"] > 0)


def test_answers_alone_are_learnt() -> None:
    """Neither what stands between conversations nor what a user says has a part in the gradient of the outputs."""
    model, conversations = tiny(), made(17, 6, 14)
    batch = batch_of(conversations, scale=0.05)
    prediction = TASK.predict(model, batch)
    prediction.logits_BPV.retain_grad()
    loss, _ = CrossEntropy(lambda *_: prediction).loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert prediction.logits_BPV.grad is not None
    learnt = prediction.logits_BPV.grad.abs().sum(-1) > 0
    assert torch.equal(learnt, batch["answer"] > 0)
    assert learnt.sum() == sum(int(each.answers_T.sum()) for each in conversations)


# --- prepared data --------------------------------------------------------------------------------


def rows_of(root: Path, split: str) -> dict[str, Any]:
    shards = Shards(root, split, Manifest.read(root).schema.names)
    return shards.take(np.arange(shards.rows))


def texts_in(root: Path, split: str) -> set[str]:
    """The conversations of a split, as their tokens."""
    columns, found = rows_of(root, split), set()
    for tokens, position, length in zip(columns["tokens"], columns["position"], columns["length"], strict=True):
        starts = [*np.flatnonzero(position[: length + 1] == 0).tolist(), int(length) + 1]
        found |= {str(tokens[a:b].tolist()) for a, b in pairwise(starts) if b - a > 1}
    return found


def test_conversations_are_split_by_what_they_ask_and_packed(tmp_path: Path) -> None:
    model, records = write_chat_model(tmp_path / "model"), some_chats()
    again = [{"messages": messages(record["messages"][-2]["content"].upper(), "other")} for record in records[::9]]
    source = write_records(tmp_path / "x.jsonl", [*records, records[3], *again])
    told: list[ProgressEvent] = []
    root = prepared_chats(chat_recipe(tmp_path, source, model), told.append)
    manifest, encoder = Manifest.read(root), encoder_of(model)
    assert manifest.dropped == {"duplicate": 1, "with a special token's name": 0, "longer than a row": 0}
    documents = pq.read_table(root / DOCUMENTS).to_pylist()
    split_of = {row["sha256"]: row["split"] for row in documents}
    by_question: dict[str, set[str]] = {}
    for record in [*records, *again]:
        found = conversation("", record)
        by_question.setdefault(found.prompt_sha256, set()).add(split_of[found.sha256])
    assert all(len(splits) == 1 for splits in by_question.values())
    contents = {split: texts_in(root, split) for split in SPLITS}
    whole = {str(encoder.encode(conversation("", record))[1][0].tokens_T.tolist()) for record in [*records, *again]}
    assert contents["validation"] | contents["test"] <= whole
    assert contents["train"] <= whole
    assert sum(map(len, contents.values())) == len(set().union(*contents.values()))
    train = rows_of(root, "train")
    assert manifest.splits["train"].rows < len(contents["train"])
    assert manifest.splits["train"].predictions == train["answer"].sum()
    assert train["scale"] == pytest.approx(len(train["scale"]) / train["answer"].sum())
    assert (rows_of(root, "validation")["scale"] == 0).all()
    tested = [row for row in documents if row["split"] == "test"]
    assert manifest.splits["test"].rows == len(tested) == len(contents["test"])
    sizes = {conversation("", r).sha256: sum(len(m["content"]) for m in r["messages"] if m["role"] == "assistant")
             for r in [*records, *again]}  # fmt: skip
    assert all(row["size_bytes"] == sizes[row["sha256"]] for row in documents)
    assert manifest.end_id == encoder.last_special(encoder.encode(conversation("", records[0]))[1][0])
    assert (root / "chat_template.jinja").read_text() == (model / "chat_template.jinja").read_text()
    sampled = pq.read_table(root / TEST_TEXTS)["text"].to_pylist()
    assert len(sampled) == len(tested)
    assert all(text.endswith(f"{END}\n") for text in sampled)
    assert any(isinstance(event, Notice) and "left out: 1 conversation, duplicate" in event.text for event in told)


def test_the_order_of_the_records_makes_no_difference(tmp_path: Path) -> None:
    model, records = write_chat_model(tmp_path / "model"), some_chats()
    shards = []
    for number, ordered in enumerate((records, records[::-1])):
        source = write_records(tmp_path / f"{number}.jsonl", ordered)
        root = prepared_chats(chat_recipe(tmp_path, source, model))
        shards.append([shard.sha256 for split in Manifest.read(root).splits.values() for shard in split.shards])
    assert shards[0] == shards[1]


def test_what_is_too_long_or_spells_a_special_token_is_counted_and_told(tmp_path: Path) -> None:
    model, records = write_chat_model(tmp_path / "model"), some_chats(40)
    records[0]["messages"][-1]["content"] = "value " * 200  # the only answer
    records[2]["messages"][-1]["content"] = "value " * 200  # the last of three
    records[3]["messages"][-1]["content"] = f"x {END} y"
    told: list[ProgressEvent] = []
    asked = chat_recipe(tmp_path, write_records(tmp_path / "x.jsonl", records), model)
    manifest = Manifest.read(prepared_chats(asked, told.append))
    assert manifest.dropped == {"duplicate": 0, "with a special token's name": 1, "longer than a row": 1}
    assert manifest.details["cut"] == 1
    notices = [event.text for event in told if isinstance(event, Notice)]
    assert any("1 of 38 conversations are longer than a row of 160 + 1 tokens" in text for text in notices)
    assert any("left out: 1 conversation, longer than a row" in text for text in notices)


def test_each_answer_of_a_rewritten_conversation_has_a_row_and_counts_once(tmp_path: Path) -> None:
    """As those of Qwen3 are, whose template leaves out what earlier turns thought."""
    model, records = write_chat_model(tmp_path / "model", QWEN3), some_chats()
    for record in records[::2]:
        for message in record["messages"]:
            if message["role"] == "assistant":
                message["content"] = f"<think>\nso\n</think>\n\n{message['content']}"
    told: list[ProgressEvent] = []
    asked = chat_recipe(tmp_path, write_records(tmp_path / "x.jsonl", records), model)
    root = prepared_chats(asked, told.append)
    manifest, encoder = Manifest.read(root), encoder_of(model)
    assert manifest.details["divided"] == 40  # all of several answers: the last of them thinks, if only nothing
    (told_rows,) = [event.text for event in told if isinstance(event, Notice) and "one for each answer" in event.text]
    assert "40 of 60 conversations are 100, one for each answer" in told_rows
    whole = {conversation("", record).sha256: encoder.encode(conversation("", record))[1] for record in records}
    found = {split: texts_in(root, split) for split in SPLITS}
    assert found["test"] | found["validation"] <= {str(p.tokens_T.tolist()) for parts in whole.values() for p in parts}
    documents = {row["document"]: row for row in pq.read_table(root / DOCUMENTS).to_pylist()}
    columns = rows_of(root, "test")
    assert manifest.splits["test"].documents < manifest.splits["test"].rows
    for document in set(columns["document"].tolist()):
        mine = columns["document"] == document
        parts = whole[documents[document]["sha256"]]
        assert columns["answer"][mine].sum() == sum(int(part.answers_T.sum()) for part in parts)
        assert documents[document]["size_bytes"] == sum(part.sizes_bytes[-1] for part in parts)
        rows = zip(columns["tokens"][mine], columns["length"][mine], strict=True)
        assert sorted(str(tokens[: length + 1].tolist()) for tokens, length in rows) == sorted(
            str(part.tokens_T.tolist()) for part in parts
        )
    assert TASK.units(root, None).tolist() == sorted(set(columns["document"].tolist()))


def test_too_few_conversations_are_refused(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "model")
    same = [{"messages": messages("name?", f"value {number}")} for number in range(9)]
    for records, words in (
        (same, "9 conversations are left (0 duplicate, 0 with a special token's name, 0 longer than a row), which ask "
         "1 different questions; expected at least 3"),
        (some_chats(4), "leave no train split"),
    ):  # fmt: skip
        asked = chat_recipe(tmp_path, write_records(tmp_path / "x.jsonl", records), model, "data.rows_per_group=16")
        with pytest.raises(InputError) as refused:
            prepared_chats(asked)
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "sweep.students.0.relations={heads: 2, weight: 1.0}",
            "relations: models of chat are not compared by their attention",
        ),
        ("sweep.on_policy={prompt_tokens: 4, new_tokens: 4}", "models of chat write no rows"),
        ("generate={prompt_tokens: 4}", "models of chat write no rows"),
        ("train.model={kind: vit, hidden_size: 32, intermediate_size: 32, layers: 1, heads: 2}", "needs 'llama' or"),
        ("data.tokenizer={kind: bpe}", "data.tokenizer.kind: found 'bpe'"),
        ("data.source={kind: csv, path: x}", "data.source"),
    ],
)
def test_what_packed_rows_cannot_be_used_for_is_refused(change: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        chat_recipe(tmp_path, tmp_path / "x.jsonl", tmp_path, change)
    assert words in str(refused.value)


# --- the cache, and what a file is judged by --------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Artifact, Artifact]:
    """Prepared data and a teacher with random weights, as artifacts."""
    folder = tmp_path_factory.mktemp("chat")
    model, source = write_chat_model(folder / "model"), write_records(folder / "x.jsonl", some_chats())
    recipe = chat_recipe(folder, source, model)
    root, store = prepared_chats(recipe), Store(recipe.store)
    draft = store.new_writer("prepared", "prepare", "ab" * 32, {}, {})
    with draft.directory() as copy:
        for file in root.rglob("*"):
            if file.is_file():
                (copy / file.relative_to(root)).parent.mkdir(exist_ok=True)
                (copy / file.relative_to(root)).write_bytes(file.read_bytes())
    prepared = draft.commit({}, 0)
    manifest = Manifest.read(prepared.local())
    draft = store.new_writer("trained", "train", "cd" * 32, {}, {})
    with draft.directory() as copy:
        teacher = build_model(recipe.train.model, manifest, 0)
        save_model(teacher, teacher.config, copy / "model", prepared.local() / TOKENIZER)
    return recipe, prepared, draft.commit({}, 0)


def captured(world: tuple[Recipe, Artifact, Artifact], scheme: Scheme) -> tuple[Recipe, Artifact]:
    """The teacher's cache of every row, and the recipe with this scheme."""
    recipe, prepared, trained = world
    cache = recipe.cache.model_copy(update={"scheme": scheme, "rows": None})
    recipe = recipe.model_copy(update={"cache": cache})
    index = TargetIndex.of(target_key(recipe, prepared, trained), Manifest.read(prepared.local()), None)
    draft = Store(recipe.store).new_writer(f"cached-{scheme.kind}", "cache", "ef" * 32, {}, {})
    job = CaptureJob(recipe.cache, index, prepared, trained, draft)
    reports = list(TargetWorker(job)({"file": np.arange(len(index.files))}))
    assert not any(report["fault"][0] for report in reports)
    write_index(job, {path: file.entry for path, file in finished_files(job).items()})
    return recipe, draft.commit({}, 0)


def test_the_cache_counts_the_answers_and_distils_as_a_live_teacher(world: tuple[Recipe, Artifact, Artifact]) -> None:
    _, prepared, trained = world
    manifest, root = Manifest.read(prepared.local()), prepared.local()
    recipe, cached = captured(world, Dense())
    index = TargetIndex.read(cached.local())
    shards = Shards(root, "train")
    ids = np.arange(shards.rows)
    rows = shards.take(ids)
    targets = TargetCache(cached.local(), ("mask", "tokens", "logprobs", "logsumexp")).take(ids)
    assert np.array_equal(targets["mask"], rows["answer"] > 0)
    assert np.array_equal(targets["tokens"], rows["tokens"])
    teacher = load_model(trained.local() / "model")
    student = build_model(recipe.train.model, manifest, 1).eval()
    objective = DistillObjective(TASK.predict, 2.0, 0.7, index.identity.temperatures, Divergence())
    batch = to_tensors(rows)
    with torch.no_grad():
        live = {"teacher_logits": TASK.predict(teacher, batch).logits_BPV}
    losses = []
    for beside in (live, {f"teacher_{n}": torch.from_numpy(targets[n]) for n in ("logprobs", "logsumexp")}):
        loss, _ = objective.loss(student, batch | beside)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)  # half precision in the cache
    elsewhere = (rows["answer"] == 0)[..., None]
    disturbed = {n: torch.from_numpy(np.where(elsewhere, -3.0, targets[n])).float() for n in ("logprobs", "logsumexp")}
    loss, _ = objective.loss(student, batch | {f"teacher_{n}": values for n, values in disturbed.items()})
    assert loss.item() == pytest.approx(losses[1], rel=1e-6)  # what the teacher says of questions does not count


@pytest.mark.parametrize("changes", [{}, {"teacher": "live", "states": {"weight": 0.1}}], ids=["cached", "live"])
def test_a_student_of_a_sweep_learns_the_answers(
    changes: dict[str, Any], world: tuple[Recipe, Artifact, Artifact]
) -> None:
    recipe, cached = captured(world, TopK(k=32)) if not changes else (world[0], None)
    told = recipe.sweep.students[0].model_copy(update={"model": recipe.train.model})
    tree = recipe.model_dump()
    tree["sweep"] |= {"steps": 12, "validate_every": 6, "students": [told.model_dump() | changes]}
    recipe = Recipe.parse(tree)
    parents = {"prepare": world[1], "train": world[2]} | ({"cache": cached} if cached else {})
    draft = Store(recipe.store).new_writer(f"swept-{len(changes)}", "sweep", "aa" * 32, {}, {})
    context = StageContext(recipe, parents, draft, no_progress)
    trainer = StudentTrainer(make_trial_job(context, SweepState(draft), "one", {STUDENT: told.name}))
    curves = [trainer.run_to_validation().curve for _ in range(2)]
    rows = [row for curve in curves for row in curve]
    validated = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert 0 < validated[-1] < validated[0]
    assert rows[-1]["step"] == 12


def test_a_file_is_judged_by_its_answers(world: tuple[Recipe, Artifact, Artifact], tmp_path: Path) -> None:
    recipe, prepared, trained = world
    root, folder, file = prepared.local(), trained.local() / "model", tmp_path / "model.gguf"
    template = (root / "chat_template.jinja").read_text()
    export_gguf(folder, root / TOKENIZER, file, format="f32", name="x", chat_template=template)
    units = TASK.units(root, None)
    heard: list[int] = []
    scores = TASK.score(file, root, units, recipe.evaluate, "llama.cpp", FORMATS["gguf"], heard.append)
    encoder, model = encoder_of(Path(recipe.data.tokenizer.path)), load_model(folder)  # type: ignore[attr-defined]
    documents = {row["document"]: row for row in pq.read_table(root / DOCUMENTS).to_pylist()}
    records = {conversation("", record).sha256: record for record in some_chats()}
    assert len(units) == Manifest.read(root).splits["test"].documents == len(heard)
    for place, unit in enumerate(units.tolist()):
        _, (encoded,) = encoder.encode(conversation("", records[documents[unit]["sha256"]]))
        with torch.no_grad():
            nats = answers_nats(model, [encoded])
        assert scores.total[place] == pytest.approx(float(nats.sum()), rel=1e-3)
        assert scores.predictions[place] == len(nats)
        assert scores.size[place] == encoded.sizes_bytes[-1]
    assert len(scores.choices_N) == scores.predictions.sum()
    assert (agreements(scores, scores) == scores.predictions).all()
    assert TASK.quality.value(scores.total.sum(), scores.size.sum()) > 0


def test_the_manifest_is_of_rows_that_every_reader_takes(world: tuple[Recipe, Artifact, Artifact]) -> None:
    _, prepared, _ = world
    manifest = json.loads((prepared.local() / MANIFEST).read_text())
    assert manifest["task"] == "chat"
    assert [column["name"] for column in manifest["columns"] if column["batch"]] == [
        "tokens", "length", "position", "answer", "scale",
    ]  # fmt: skip


def test_the_example_makes_what_its_recipe_reads(tmp_path: Path) -> None:
    """Every fourth conversation of it, in rows of the recipe's own length.

    In a process of its own: in Python 3.11 `ast.parse` fails where a garbage collection in the midst of it lets
    another thread parse (as the formatting of a traceback does).
    """
    subprocess.run([sys.executable, RECIPES.parent / "stdlib_chat.py", tmp_path / "set"], check=True, timeout=300)
    made_lines = (tmp_path / "set/chats.jsonl").read_text().splitlines()
    assert len(made_lines) > 1000
    source = tmp_path / "some.jsonl"
    source.write_text("\n".join(made_lines[::4]))
    asked = load_recipe(RECIPES / "chat.yaml", (
        f"store={tmp_path}/store", f"data.source.path={source}", f"data.tokenizer.path={tmp_path}/set/model",
    ))  # fmt: skip
    manifest = Manifest.read(prepared_chats(asked))
    assert manifest.positions == 256
    splits = manifest.splits
    assert splits["train"].documents > 2 * splits["train"].rows > 0  # most rows are shared
    assert sum(split.documents for split in splits.values()) > 0.95 * len(made_lines[::4])
    encoder = encoder_of(tmp_path / "set/model")
    assert encoder.template.marks_answers
    _, (encoded,) = encoder.encode(conversation("", json.loads(made_lines[0])))
    assert encoder.last_special(encoded) == manifest.end_id
