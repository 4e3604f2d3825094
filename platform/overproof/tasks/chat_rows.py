"""Conversations packed into rows of one length, several in a row, of which none is seen from another.

In a row positions begin at 0 with each conversation, and that is all a model needs to keep them apart: without an
attention mask and a cache, transformers makes of it a mask that is block by block (``masking_utils``); a test holds
every family to it. Train and validation rows are packed, best fit first; a test conversation has a row of its own.

Shapes: N conversations, R rows, P predictions in a row, S = P + 1 tokens, T tokens of a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overproof.data.columns import UINT16_VOCABULARY, token_dtype
from overproof.data.manifest import Column
from overproof.tasks.chat_template import EncodedConversation

ANSWER = "answer"  # column of the predictions that count


def chat_columns(sequence_length: int, vocab_size: int) -> tuple[Column, ...]:
    """Of a shard: a row's P + 1 tokens, of which ``length`` + 1 are there, and of each of the P predictions the place
    in its conversation that it is made from, and whether it is of an answer's token.

    ``scale`` is 1 over the answers' tokens in a train row, in the mean; 0 in other rows. ``document`` is -1 in rows
    that hold several.
    """
    places = "<u2" if sequence_length < UINT16_VOCABULARY else "<u4"
    return (
        Column(name="document", dtype="<i4", batch=False),
        Column(name="tokens", dtype=token_dtype(vocab_size), shape=(sequence_length + 1,)),
        Column(name="length", dtype="<i4"),
        Column(name="position", dtype=places, shape=(sequence_length,)),
        Column(name=ANSWER, dtype="|u1", shape=(sequence_length,)),
        Column(name="scale", dtype="<f4"),
    )


def best_fit(sizes_N: Sequence[int], room: int) -> list[list[int]]:
    """Which conversations share a row of so much room, none larger than it: the longest first, each where it leaves
    the least (best-fit decreasing, at most 11/9 of the fewest rows and a few). A function of the sizes in their order.
    """
    rows: list[list[int]] = []
    open_by_free: dict[int, list[int]] = {}
    free_bits = 0  # bit f is set where a row has f free
    for number in sorted(range(len(sizes_N)), key=lambda n: -sizes_N[n]):
        size = sizes_N[number]
        fitting = free_bits >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = open_by_free[free].pop()
            if not open_by_free[free]:
                free_bits &= ~(1 << free)
        else:
            free, row = room, len(rows)
            rows.append([])
        rows[row].append(number)
        open_by_free.setdefault(free - size, []).append(row)
        free_bits |= 1 << (free - size)
    return rows


def packed_rows(rows: Sequence[Sequence[EncodedConversation]], sequence_length: int) -> dict[str, NDArray[Any]]:
    """The columns of rows of conversations, but for ``document`` and ``scale``.

    What is left of a row is a piece of its own: nothing sees it, and it predicts nothing that counts.
    """
    count, places = len(rows), sequence_length + 1
    tokens_RS = np.zeros((count, places), np.int32)
    position_RS = np.zeros((count, places), np.int32)
    answer_RS = np.zeros((count, places), np.uint8)
    length_R = np.zeros(count, np.int32)
    for row, conversations in enumerate(rows):
        at = 0
        for found in conversations:
            here = slice(at, at + len(found.tokens_T))
            tokens_RS[row, here], answer_RS[row, here] = found.tokens_T, found.answers_T
            position_RS[row, here] = np.arange(len(found.tokens_T))
            at = here.stop
        position_RS[row, at:] = np.arange(places - at)
        length_R[row] = at - 1
    return {"tokens": tokens_RS, "length": length_R, "position": position_RS[:, :-1], ANSWER: answer_RS[:, 1:]}
