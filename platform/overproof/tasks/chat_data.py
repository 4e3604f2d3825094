"""Chat data as shards: read, rendered by the model's template, split by what was asked, packed and written.

What ends in a shard is a function of the records' content, the recipe and its seed. N conversations, R rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from overproof.config import ExpectedAnswers
from overproof.data.altered_texts import ALTERED, count_altered, tell_altered
from overproof.data.chat_template_files import CHAT_TEMPLATE, template_files
from overproof.data.cleaning import DUPLICATE, NUL_LINES, split_of
from overproof.data.documents import beginning_of
from overproof.data.heartbeat import Heartbeat
from overproof.data.manifest import CLUSTER, DOCUMENTS, SPLITS, TEST_TEXTS, TOKENIZER, TOKENIZER_CONFIG, Manifest, Split
from overproof.data.near_duplicates import Decision, find_near_duplicates
from overproof.data.order import permutation
from overproof.data.parquet_writer import parquet_bytes
from overproof.data.source_files import SourceReading, describe_skipped
from overproof.data.sources import sha256_of, tokenizer_files
from overproof.data.stratified import write_splits
from overproof.data.text_tokenizer import read_tokenizer
from overproof.errors import InputError
from overproof.registry import FORMATS
from overproof.stage_context import Notice, StageContext
from overproof.tasks.chat_rows import ANSWER, best_fit, chat_columns, packed_rows
from overproof.tasks.chat_template import (
    DATED,
    ConversationEncoder,
    EncodedConversation,
    read_chat_template,
)
from overproof.tasks.conversations import Conversation, conversation_files, read_conversations
from overproof.tasks.expected_answers import EXPECTED, AnswerCheck, checks_file
from overproof.units import format_count

if TYPE_CHECKING:
    from overproof.tasks.chat import ChatData

PHASES = 3  # of the progress: reading and rendering, near-copies, writing
SPELLED, TOO_LONG = "with a special token's name", "longer than a row"  # reasons to leave a conversation out
SAMPLED_CONVERSATIONS, SAMPLED_CHARACTERS = 128, 4096  # of the test split, for engines to split
EXAMPLE_CHARACTERS = 500  # of what a test conversation begins with, for whoever tries a model
CONVERSATIONS_PER_GROUP = 1 << 16
ROWS_STREAM = 1 << 33  # of the generator; no shard's number comes near


@dataclass(frozen=True)
class KeptConversation:
    """A conversation that is used."""

    where: str
    sha256: str
    prompt_sha256: str
    text: str
    asked: str  # first by the user
    said: str  # by user and assistant: what near-copies are told by, whatever they have from the system in common
    pieces: list[EncodedConversation]  # one, or one for each answer where the template rewrites earlier turns
    is_cut: bool  # whether some turns are left out
    is_divided: bool  # whether there were several of them
    has_last_answer: bool  # or that was longer than a row
    altered: int  # how its messages come back by their tokens, see ``how_it_comes_back``

    @property
    def size_bytes(self) -> int:
        """Of its answers, special tokens left out."""
        return sum(piece.sizes_bytes[-1] for piece in self.pieces)


@dataclass(frozen=True)
class KeptConversations:
    """Those of a source, by the hashes of their contents, none twice."""

    kept: list[KeptConversation]
    dropped: dict[str, int]
    expecting: dict[str, Conversation]  # those of the source that say what their last answer must be, by ``sha256``

    def take(self, chosen: NDArray[np.int64], dropped: dict[str, int]) -> KeptConversations:
        """These of them; the others are left out for further reasons."""
        kept = [self.kept[number] for number in chosen.tolist()]
        return replace(self, kept=kept, dropped=self.dropped | dropped)

    @property
    def cut(self) -> int:
        """How many have lost some turns."""
        return sum(each.is_cut for each in self.kept)

    @property
    def divided(self) -> list[KeptConversation]:
        return [each for each in self.kept if each.is_divided]


def chat_digest(data: ChatData) -> str:
    """Sha256, in hex, over the names, sizes and times of a source's files, and the content of tokenizer and template.

    Raises:
        InputError: there are none.
    """
    identity: list[object] = list(conversation_files(data.source, data.on_error).identity)
    for files in (
        tokenizer_files(data.tokenizer),
        {k: v.encode() for k, v in template_files(data.tokenizer.path).items()},
    ):
        identity.append([(name, hashlib.sha256(content).hexdigest()) for name, content in sorted(files.items())])
    return sha256_of(identity)


def prepare_chat(context: StageContext) -> Manifest:
    """Read, render, split, pack and write.

    Raises:
        InputError: a record is no conversation, the template does not take one or does not tell its answers, or they
            are too few for their splits and shards.
    """
    data: Any = context.recipe.data
    with Heartbeat(context.progress, "prepare", PHASES) as heartbeat:
        heartbeat.start_phase(0, "reading conversations")
        tokenizer = read_tokenizer(data.tokenizer)
        FORMATS[context.recipe.compress.kind].check_tokenizer(tokenizer.json, "data.tokenizer")
        template = read_chat_template(data.tokenizer, tokenizer)
        encoder = ConversationEncoder(template, tokenizer)
        reading = SourceReading(conversation_files(data.source, data.on_error), data.on_error)
        found = _read(data, reading, encoder, heartbeat)
        end_id = _end_of_answers(data, found.kept, encoder, tokenizer.end_id, context)
        splits_N = _splits(data, found)
        heartbeat.start_phase(1, f"near-copies, among {len(found.kept):,} conversations")
        decision: Decision | None = None
        if data.near_duplicates:
            said = [each.said for each in found.kept]
            decision = find_near_duplicates(said, splits_N, data.near_duplicates, heartbeat.update_note)
            found, splits_N = found.take(decision.kept, decision.dropped), splits_N[decision.kept]
        splits = {name: np.flatnonzero(splits_N == name) for name in SPLITS}
        checks = _checks(found, splits["test"], context)
        heartbeat.start_phase(2, f"packing and writing {len(found.kept):,} conversations")
        rows, members = _rows(found.kept, splits, data, context.recipe.seed)
        columns = chat_columns(data.sequence_length, tokenizer.outputs)
        counts_R = rows[ANSWER].astype(bool).sum(1)
        written = write_splits(rows, members, columns, data, context.draft.uri, "rows of conversations", counts_R)
        context.draft.write(TOKENIZER, tokenizer.json.encode())
        context.draft.write(TOKENIZER_CONFIG, tokenizer.config().encode())
        context.draft.write(CHAT_TEMPLATE, template.text.encode())
        context.draft.write(DOCUMENTS, _documents_file(found.kept, splits_N, decision))
        context.draft.write(TEST_TEXTS, _test_texts(found.kept, splits["test"]))
        if checks:
            context.draft.write(EXPECTED, checks_file(checks))
        heartbeat.start_phase(PHASES, "")
    for line in describe_skipped(reading.skipped):
        context.progress(Notice(line))
    _tell(context, data, found, template.text)
    return Manifest(
        task=data.kind,
        columns=columns,
        splits={name: _split(written.splits[name], splits[name]) for name in SPLITS},
        rows_per_group=data.rows_per_group,
        positions=data.sequence_length,
        outputs=tokenizer.outputs,
        tokenizer_sha256=hashlib.sha256(tokenizer.json.encode()).hexdigest(),
        start_id=tokenizer.start_id,
        end_id=end_id,
        bos_id=tokenizer.bos_id,
        dropped=found.dropped,
        skipped=reading.counts,
        altered=sum(each.altered == ALTERED for each in found.kept),
        near_duplicates=decision and decision.found,
        details={
            "example": beginning_of(found.kept[splits["test"][0]].asked, EXAMPLE_CHARACTERS),
            "cut": found.cut,
            "divided": len(found.divided),
            "expected": len(checks),
            "template_sha256": hashlib.sha256(template.text.encode()).hexdigest(),
        },
    )


def _split(split: Split, conversations: NDArray[np.int64]) -> Split:
    return split.model_copy(update={"documents": len(conversations)})


def _read(
    data: ChatData, reading: SourceReading, encoder: ConversationEncoder, heartbeat: Heartbeat
) -> KeptConversations:
    most = data.sequence_length + 1
    kept: dict[str, KeptConversation] = {}
    dropped = dict.fromkeys((DUPLICATE, SPELLED, TOO_LONG), 0)
    seen, expecting = set[str](), dict[str, Conversation]()
    for number, found in enumerate(read_conversations(data.source, reading), start=1):
        heartbeat.update_note(f"{number:,} conversations read")
        if found.expected is not None:
            _require_same(expecting.setdefault(found.sha256, found), found)
        if found.sha256 in seen:
            dropped[DUPLICATE] += 1
            continue
        seen.add(found.sha256)
        if encoder.spells_special(found):
            dropped[SPELLED] += 1
            continue
        text, whole = encoder.encode(found)
        pieces = [piece for each in whole if (piece := each.cut(most)) is not None]
        if not pieces:
            dropped[TOO_LONG] += 1
            continue
        kept[found.sha256] = KeptConversation(
            found.where,
            found.sha256,
            found.prompt_sha256,
            text,
            next((message["content"] for message in found.messages if message["role"] == "user"), found.said),
            found.said,
            pieces,
            _answers(pieces) < _answers(whole),
            len(whole) > 1,
            len(whole[-1].tokens_T) <= most,
            encoder.comes_back(found),
        )
    if reading.nul_lines:
        dropped[NUL_LINES] = reading.nul_lines
    return KeptConversations([kept[key] for key in sorted(kept)], dropped, expecting)


def _require_same(first: Conversation, again: Conversation) -> None:
    if first.expected != again.expected:
        raise InputError(
            f"{again.where}: expected is {again.expected}, and of the same conversation at {first.where} it is "
            f"{first.expected}; expected one of them"
        )


def _answers(pieces: Sequence[EncodedConversation]) -> int:
    return sum(len(piece.ends) for piece in pieces)


def _end_of_answers(
    data: ChatData, kept: Sequence[KeptConversation], encoder: ConversationEncoder, end_id: int, context: StageContext
) -> int:
    """The token by which models of these answers stop: the one that all end with, whatever ends a document."""
    found = Counter(encoder.last_special(piece) for each in kept for piece in each.pieces)
    if data.tokenizer.end_token is None and len(found) == 1:
        (only,) = found
        if only is not None:
            return only
    if end_id not in found:
        context.progress(
            Notice(
                "data.tokenizer: no answer ends with the token that ends a text, by which engines stop; a model of "
                "these answers may go on after them: expected a template that ends them so, or data.tokenizer.end_token"
            )
        )
    return end_id


def _splits(data: ChatData, found: KeptConversations) -> NDArray[np.str_]:
    """The split of each conversation; those that begin with the same question are in one."""
    prompts = np.array([each.prompt_sha256 for each in found.kept])
    distinct, of_conversation_N = np.unique(prompts, return_inverse=True)
    if len(distinct) < len(SPLITS):
        dropped = ", ".join(f"{count} {reason}" for reason, count in found.dropped.items())
        raise InputError(
            f"data.source ({data.source.path}): {len(found.kept)} conversations are left ({dropped}), which ask "
            f"{len(distinct)} different questions; expected at least {len(SPLITS)}, one for each of the splits "
            f"{', '.join(SPLITS)}: give more conversations, or a larger data.sequence_length"
        )
    return split_of(distinct.tolist(), data.validation_fraction, data.test_fraction)[of_conversation_N]


def _checks(found: KeptConversations, tested: NDArray[np.int64], context: StageContext) -> list[AnswerCheck]:
    """What test conversations expect of their last answers; tells how many, and which contradict themselves.

    Raises:
        InputError: a rule of the gate is about such answers, and there are none.
    """
    checks, contradicted = list[AnswerCheck](), list[str]()
    for number in tested.tolist():
        kept = found.kept[number]
        record = found.expecting.get(kept.sha256)
        if record is None or record.expected is None or not kept.has_last_answer:
            continue
        asked, answer = record.messages[: record.last_answer], record.messages[record.last_answer]
        checks.append(AnswerCheck(number, kept.where, list(asked), list(record.tools or ()), record.expected))
        if not answer.get("tool_calls") and not record.expected.holds(answer["content"]):
            contradicted.append(kept.where)
    if not checks and any(isinstance(rule, ExpectedAnswers) for rule in context.recipe.gate.rules):
        raise InputError(
            f"gate.rules: one is of kind 'expected', and of {len(tested):,} test conversations none says what is "
            f"expected ({len(found.expecting):,} of the source do); expected 'expected' in more records of "
            "data.source, or a gate without that rule"
        )
    if found.expecting:
        context.progress(
            Notice(
                f"{len(found.expecting):,} conversations say what their last answer must be (expected); files are "
                f"asked the {len(checks):,} of the test split"
            )
        )
    if contradicted:
        context.progress(
            Notice(
                f"the own answer of {len(contradicted):,} test conversations is not what they expect; first "
                f"{contradicted[0]}: a model that answers as they do is counted as wrong"
            )
        )
    return checks


def _rows(
    kept: Sequence[KeptConversation], splits: dict[str, NDArray[np.int64]], data: ChatData, seed: int
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[np.int64]]]:
    """The columns of all rows, and which rows are of each split: packed ones, and for the test one a piece."""
    packed, documents, members = list[list[EncodedConversation]](), list[int](), dict[str, NDArray[np.int64]]()
    for name, own in splits.items():
        pieces = [(number, piece) for number in own.tolist() for piece in kept[number].pieces]
        if name == "test":
            rows, owners = [[place] for place in range(len(pieces))], [number for number, _ in pieces]
        else:
            rows = best_fit([len(piece.tokens_T) for _, piece in pieces], data.sequence_length + 1)
            rows = [rows[row] for row in permutation(seed, SPLITS.index(name), ROWS_STREAM, len(rows))]
            owners = [-1] * len(rows)
        members[name] = np.arange(len(packed), len(packed) + len(rows))
        packed += [[pieces[place][1] for place in row] for row in rows]
        documents += owners
    columns = packed_rows(packed, data.sequence_length)
    trained = members["train"][: len(members["train"]) // data.rows_per_group * data.rows_per_group]
    scale_R = np.zeros(len(packed), np.float32)
    if len(trained):
        scale_R[members["train"]] = len(trained) / columns[ANSWER][trained].sum()
    return columns | {"document": np.array(documents, np.int32), "scale": scale_R}, members


def _documents_file(kept: Sequence[KeptConversation], splits_N: NDArray[np.str_], decision: Decision | None) -> bytes:
    """Every conversation; its size is that of its answers, which bits are divided by."""
    table = pa.table(
        {
            "document": pa.array(np.arange(len(kept)), pa.int32()),
            "split": pa.array(splits_N.tolist(), pa.string()),
            "name": pa.array([each.where for each in kept], pa.string()),
            "sha256": pa.array([each.sha256 for each in kept], pa.string()),
            "size_bytes": pa.array([each.size_bytes for each in kept], pa.int64()),
            **({CLUSTER: pa.array(decision.kept_clusters, pa.int32())} if decision else {}),
        }
    )
    return parquet_bytes(table, CONVERSATIONS_PER_GROUP)


def _test_texts(kept: Sequence[KeptConversation], tested: NDArray[np.int64]) -> bytes:
    """The beginnings of test conversations, evenly spread, that engines are asked to split."""
    chosen = tested[np.unique(np.linspace(0, len(tested) - 1, SAMPLED_CONVERSATIONS).astype(np.int64))]
    texts = [kept[number].text[:SAMPLED_CHARACTERS] for number in chosen]
    table = pa.table({"document": pa.array(chosen, pa.int32()), "text": pa.array(texts, pa.string())})
    return parquet_bytes(table, SAMPLED_CONVERSATIONS)


def _tell(context: StageContext, data: ChatData, found: KeptConversations, template: str) -> None:
    altered = count_altered((each.where, each.altered) for each in found.kept)
    for line in tell_altered(altered, len(found.kept), "conversations"):
        context.progress(Notice(line))
    if found.cut:
        context.progress(
            Notice(
                f"{found.cut:,} of {len(found.kept):,} conversations are longer than a row of {data.sequence_length} + "
                "1 tokens (data.sequence_length); some of their turns are left out"
            )
        )
    if found.divided:
        rows = sum(len(each.pieces) for each in found.divided)
        context.progress(
            Notice(
                f"{len(found.divided):,} of {len(found.kept):,} conversations are {rows:,}, one for each answer: the "
                "chat template writes earlier turns otherwise once a conversation goes on"
            )
        )
    for reason, count in found.dropped.items():
        if count:
            context.progress(Notice(f"left out: {format_count(count, 'conversation')}, {reason}"))
    if DATED in template:
        context.progress(Notice("the chat template writes the day's date: prepared on another day, data may differ"))
