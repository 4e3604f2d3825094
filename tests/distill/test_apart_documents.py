"""Documents of a row that are kept apart: alike for the teacher's cache, live teachers, and whoever writes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from distill_world import LENGTH, SEED, World, capture, make, writer
from test_on_policy import ASKED, RecordingScorer, begun, scorer
from torch import Tensor
from transformers import PreTrainedModel

from overproof.artifacts import Store
from overproof.data.parquet_reader import Shards
from overproof.distill.losses import Divergence
from overproof.distill.objectives import TEACHER_LOGITS, DistillObjective
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.target_cache import TargetCache
from overproof.models.hf_directory import Batch, build_model, load_model, to_tensors


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Rows of two or three documents, each begun by token 0, and a teacher trained on them."""
    return make("text", Store(str(tmp_path_factory.mktemp("apart"))), apart=True)


def teacher_of(world: World) -> PreTrainedModel:
    return load_model(world.artifacts["train"].local() / "model")


def rows_of(world: World, count: int) -> Batch:
    return to_tensors(Shards(world.root, "train").take(np.arange(count)))


def alone(model: PreTrainedModel, tokens_BS: Tensor) -> Tensor:
    """Log-probabilities at each place of its document, read by itself: (B, P, V)."""
    found = []
    for tokens_P in tokens_BS[:, :-1]:
        begun = sorted({0, *(tokens_P == 0).nonzero().flatten().tolist()})
        parts = [tokens_P[None, a:b] for a, b in pairwise([*begun, len(tokens_P)])]
        found.append(torch.cat([model(input_ids=part, use_cache=False).logits[0] for part in parts]))
    return torch.stack(found).log_softmax(-1)


@torch.no_grad()
def test_the_cache_is_of_each_document_alone_and_distils_as_a_live_teacher(apart: World) -> None:
    batch, model = rows_of(apart, 24), teacher_of(apart)
    assert (batch["tokens"][:, :-1] == 0).sum() >= 24 + 12
    cached = capture(apart, None, scheme={"kind": "dense"}, temperatures=[2.0])
    targets = TargetCache(cached.local(), ("logprobs", "logsumexp")).take(np.arange(24))
    torch.testing.assert_close(torch.from_numpy(targets["logprobs"]), alone(model, batch["tokens"]), rtol=0, atol=0.01)
    student = build_model(
        apart.context("sweep").recipe.sweep.students[0].model, Shards(apart.root, "train").manifest, 1
    )  # type: ignore[arg-type]
    objective = DistillObjective(apart.predict, 2.0, 0.7, (1.0, 2.0), Divergence())
    live = {TEACHER_LOGITS: apart.predict(model, batch).logits_BPV}
    one, other = (
        objective.loss(student.eval(), batch | beside)[0].item()
        for beside in (live, {f"teacher_{name}": torch.from_numpy(values) for name, values in targets.items()})
    )
    assert other == pytest.approx(one, rel=2e-3)  # half precision in the cache


def test_a_student_that_writes_is_scored_document_by_document(apart: World) -> None:
    everything = RecordingScorer(scorer(apart, k=320, apart_id=0))
    cached = capture(apart, None)
    run = StudentTrainer(begun(apart, cached, "one", on_policy=1.0), everything)
    start = build_model(run.job.student.model, run.manifest, SEED).eval()  # type: ignore[arg-type]
    row = run.run_to_validation().curve[0]
    tokens = torch.from_numpy(everything.requests[0])
    written = ASKED["prompt_tokens"] - 1
    assert (tokens[:, 4] == 0).all()
    with torch.no_grad():
        log_p, log_q = (
            (alone(model, tokens)[:, written:].double() / 2).log_softmax(-1)
            for model in (start, everything.scorer.model)
        )
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean() * 4  # T squared
    assert row["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_no_score_depends_on_whether_rows_beside_hold_several_documents(apart: World) -> None:
    one, rng = scorer(apart, apart_id=0), np.random.default_rng(0)
    rows, others = (rng.integers(1, 320, (count, LENGTH - 1)) for count in (16, 30))
    mixed = others.copy()
    mixed[:, 3] = 0
    found = one.score(rows)
    for beside in (others, mixed):
        together = one.score(np.concatenate([beside[:7], rows, beside]))
        for name, values in found.items():
            assert np.array_equal(together[name][7 : 7 + 16], values)  # to the last bit
    of_documents = one.score(mixed[:16])
    with torch.no_grad():
        logprobs = alone(one.model, torch.from_numpy(mixed[:16]))[:, -ASKED["new_tokens"] :]
    expected = logprobs.gather(-1, torch.from_numpy(of_documents["indices"]))
    np.testing.assert_allclose(of_documents["logprobs"], expected.numpy(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_teachers_text_goes_on_from_the_last_document_of_its_prompt(apart: World) -> None:
    one, ids = writer(apart, None, temperature=0.0, prompt_tokens=6), np.arange(24)
    whole = one.compute(ids)["tokens"]
    order = np.random.default_rng(0).permutation(24)
    np.testing.assert_array_equal(one.compute(order)["tokens"], whole[order])
    batch = rows_of(apart, 24) | {"tokens": torch.from_numpy(whole.astype(np.int64))}
    logits = apart.predict(one.model, batch).logits_BPV
    assert torch.equal(logits.argmax(-1)[:, 5:], batch["tokens"][:, 6:])
    across = writer(apart, None, temperature=0.0, prompt_tokens=6)
    across.rows.columns = ("tokens", "length")
    assert (across.compute(ids)["tokens"] != whole).any()
