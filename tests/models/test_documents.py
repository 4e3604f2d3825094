"""Documents that share a row: read by every family as if each stood alone, and across only where a recipe asks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

from decoder_cases import CASES, POSITIONS, VOCABULARY, built
from overproof.data.manifest import START
from overproof.distill.feature_losses import LayerOutputs, relation_loss
from overproof.distill.on_policy import sample_continuations
from overproof.distill.text_worker import generate
from overproof.errors import InputError
from overproof.models.documents import positions_in_documents
from overproof.models.hf_directory import Batch
from overproof.models.varlen import attend_by_lengths, text_lengths
from overproof.registry import FAMILIES, TASKS
from overproof.tasks.base import Task
from overproof.train.objective import CrossEntropy

TASK: Task = TASKS["language_modeling"]
BEGIN = 7  # the token that begins a document
AT_ONCE = POSITIONS - 2
# Of a row: the tokens of each document that it holds, beginning tokens and, of the first, a rest of one among them.
packed = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@cache
def model_of(name: str) -> PreTrainedModel:
    return built(CASES[name].kind, CASES[name].settings)


def rows_of(*rows: list[int], begins: bool, seed: int = 1) -> Batch:
    """Rows of documents of these lengths; the first document begins in its row, or before it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(BEGIN + 1, VOCABULARY, (len(rows), AT_ONCE + 1), generator=generator)
    for row, lengths in zip(tokens, rows, strict=True):
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        row[[at for at in starts if at <= AT_ONCE and (at or begins)]] = BEGIN
    return {
        "tokens": tokens,
        "length": torch.full((len(rows),), AT_ONCE),
        START: torch.full((len(rows),), BEGIN),
    }


def documents(tokens_S: torch.Tensor) -> list[tuple[int, int]]:
    """Where each document of a row begins, and the next, of the places that predict."""
    begun = {0, *(tokens_S[:-1] == BEGIN).nonzero().flatten().tolist()}
    return list(pairwise([*sorted(begun), len(tokens_S) - 1]))


def across(batch: Batch) -> Batch:
    return {name: values for name, values in batch.items() if name != START}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=6)
@given(rows=st.tuples(packed, packed), begins=st.booleans())
@torch.no_grad()
def test_a_document_of_a_row_is_read_as_if_alone(name: str, rows: Any, begins: bool) -> None:
    """By every family; across its documents, and to the last bit as ever, where rows do not say how they begin."""
    model, batch = model_of(name), rows_of(*rows, begins=begins)
    found = TASK.predict(model, batch).logits_BPV
    for tokens_S, logits_PV in zip(batch["tokens"], found, strict=True):
        for start, stop in documents(tokens_S):
            alone = model(input_ids=tokens_S[None, start:stop], use_cache=False).logits[0]
            torch.testing.assert_close(logits_PV[start:stop], alone, rtol=0, atol=1e-4)
    plain = model(input_ids=batch["tokens"][:, :-1], use_cache=False).logits
    assert torch.equal(TASK.predict(model, across(batch)).logits_BPV, plain)


def by_lengths(name: str) -> PreTrainedModel:
    model = built(CASES[name].kind, CASES[name].settings)
    attend_by_lengths(model)
    return model


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if FAMILIES[case.kind].varlen])
@torch.no_grad()
def test_attention_by_lengths_is_attention_by_a_mask(name: str) -> None:
    """By every family that has it, of rows that say how their documents begin, and of rows that do not."""
    model, batch = by_lengths(name), rows_of([5, 11, 3], [14, 2], begins=False)
    for asked in (batch, across(batch)):
        found, expected = (TASK.predict(each, asked).logits_BPV for each in (model, model_of(name)))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@given(rows=st.lists(packed, min_size=1, max_size=4), begins=st.booleans())
def test_lengths_are_those_of_the_mask_that_transformers_makes(rows: list[list[int]], begins: bool) -> None:
    batch = rows_of(*rows, begins=begins)
    position_BP = positions_in_documents(batch["tokens"][:, :-1], batch[START])
    told = text_lengths(position_BP)
    bounds = told["cu_seq_lens_q"]
    assert (bounds.dtype, bounds[0].item(), bounds[-1].item()) == (torch.int32, 0, len(rows) * AT_ONCE)
    assert (
        told["max_length_q"] == bounds.diff().max() == max(b - a for row in batch["tokens"] for a, b in documents(row))
    )
    text_N = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    in_row_BP = find_packed_sequence_indices(position_BP)
    row_N, in_row_N = torch.arange(len(rows)).repeat_interleave(AT_ONCE), in_row_BP.flatten()
    together_NN = (row_N[:, None] == row_N) & (in_row_N[:, None] == in_row_N)
    assert torch.equal(text_N[:, None] == text_N, together_NN)


def test_a_family_or_a_model_that_cannot_attend_by_lengths_is_refused() -> None:
    for kind in ("gemma2", "falcon"):
        with pytest.raises(InputError, match=f"models of the family {kind} cannot attend by lengths; expected sdpa"):
            attend_by_lengths(built(kind))
    dropping = built("gpt2", {"attn_pdrop": 0.1}).train()
    attend_by_lengths(dropping)
    with pytest.raises(InputError, match=r"drop 0\.1 of the scores out"):
        TASK.predict(dropping, rows_of([5, 9], begins=True))


def test_every_family_that_keeps_documents_apart_is_looked_at() -> None:
    sections = {kind for kind, family in FAMILIES.items() if "language_modeling" in family.tasks and family.section}
    assert {case.kind for case in CASES.values()} == sections


@torch.no_grad()
def test_what_is_before_a_document_changes_it_where_documents_are_not_apart() -> None:
    batch = rows_of([9, 9], begins=True)
    other = rows_of([9, 9], begins=True, seed=2)
    other["tokens"][:, 9:] = batch["tokens"][:, 9:]
    one, two = (TASK.predict(model_of("llama-2"), each).logits_BPV[:, 9:] for each in (batch, other))
    assert torch.equal(one, two)
    one, two = (TASK.predict(model_of("llama-2"), across(each)).logits_BPV[:, 9:] for each in (batch, other))
    assert float((one - two).abs().max()) > 0.1


@pytest.mark.parametrize("make", [model_of, by_lengths], ids=["mask", "lengths"])
def test_the_gradient_is_that_of_the_documents_one_by_one(make: Callable[[str], PreTrainedModel]) -> None:
    model, batch = make("mistral"), rows_of([5, 11, 3], [14, 2], begins=False)
    model.zero_grad()
    loss, _ = CrossEntropy(TASK.predict).loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: weight.grad for name, weight in model.named_parameters()}
    again, count = built("mistral", CASES["mistral"].settings), 2 * AT_ONCE
    nats = torch.zeros(())
    for tokens_S in batch["tokens"]:
        for start, stop in documents(tokens_S):
            logprobs = again(input_ids=tokens_S[None, start:stop], use_cache=False).logits[0].log_softmax(-1)
            nats = nats - logprobs.gather(-1, tokens_S[start + 1 : stop + 1, None]).sum()
    (nats / count).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, nats / count, rtol=1e-5, atol=0)
    for name, weight in again.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-3, atol=1e-5)


def test_relations_are_of_the_places_of_one_document() -> None:
    batch = rows_of([5, 11, 3], [14, 2], begins=False)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        LayerOutputs(*(torch.randn(2, AT_ONCE, 8, generator=generator, dtype=torch.float64) for _ in range(4)))
        for _ in range(2)
    )
    found = relation_loss(student, teacher, 2, TASK.segments(batch, student.states))
    expected = torch.zeros((), dtype=torch.float64)
    for row, tokens_S in enumerate(batch["tokens"]):
        for start, stop in documents(tokens_S):
            own, target = (
                LayerOutputs(*(part[row : row + 1, start:stop] for part in each)) for each in (student, teacher)
            )
            alone = relation_loss(own, target, 2, torch.ones(1, stop - start, dtype=torch.bool))
            expected = expected + alone * (stop - start) / (2 * AT_ONCE)
    torch.testing.assert_close(found, expected)
    held = TASK.segments(across(batch), student.states)
    assert held.dtype == torch.bool
    assert held.all()


@pytest.mark.parametrize("name", ["llama-2", "gpt2", "falcon", "gemma2", "gemma3", "smollm3", "mistral"])
@torch.no_grad()
def test_what_is_written_goes_on_from_the_last_document_alone(name: str) -> None:
    """At each place the likeliest token after its document, whatever stands before it and however the rows beside are;
    a document is begun by the model itself, too, where what it writes first is what documents begin with.
    """
    model, count = model_of(name), 9
    prompts_BQ, begin = next(
        (prompts_BQ, begin)
        for seed in range(9)
        for prompts_BQ in [rows_of([5, 4, 9], [3, 12], [30], begins=False, seed=seed)["tokens"][:, :12]]
        for begin in generate(model, prompts_BQ[2:], torch.zeros(1, 1), temperature=0)[0, -1:].tolist()
        if begin not in prompts_BQ[2]
    )
    for token in (BEGIN, begin):
        start_B = torch.full((3,), token)
        written = generate(model, prompts_BQ, torch.zeros(3, count), 0, start_B)
        for row in written:
            for place in range(len(row) - count, len(row)):
                start = max([0, *(row[:place] == token).nonzero().flatten().tolist()])
                logits = model(input_ids=row[None, start:place], use_cache=False).logits[0, -1]
                assert float(logits.max() - logits[row[place]]) < 1e-3  # ties may fall otherwise
        alone = [generate(model, prompts_BQ[row : row + 1], torch.zeros(1, count), 0, start_B[:1]) for row in range(3)]
        assert torch.equal(torch.cat(alone), written)
    assert written[2, -count] == begin


@torch.no_grad()
def test_a_student_goes_on_from_the_last_document_of_its_prompt() -> None:
    model = built("llama")
    prompts = rows_of([5, 4, 9], [3, 12], begins=False)["tokens"][:, :12]
    other = rows_of([5, 4, 9], [3, 12], begins=False, seed=2)["tokens"][:, :12]
    for row, start in enumerate((9, 3)):
        other[row, start:] = prompts[row, start:]
    start_B = torch.full((2,), BEGIN)
    one, two = (sample_continuations(model, each, 9, 1, 5, start_B)[:, 12:] for each in (prompts, other))
    assert torch.equal(one, two)
    assert not torch.equal(*(sample_continuations(model, each, 9, 1, 5)[:, 12:] for each in (prompts, other)))
