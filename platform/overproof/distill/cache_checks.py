"""Checks that cached rows agree with the data and with themselves, which no hash can tell.

Shapes: B rows, P predictions in a row, V outputs, K slots for each prediction.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from overproof.config import Dense
from overproof.data.parquet_reader import Columns, Shards
from overproof.data.row_files import Source
from overproof.distill.target_cache import TargetCache
from overproof.distill.target_codec import TargetLayout
from overproof.distill.teacher_text import TeacherText
from overproof.errors import InputError

ROWS_CHECKED = 64


def check_text(text: TeacherText, prepared: Source, sample_ids: NDArray[np.int64]) -> None:
    """Refuse a text whose rows do not begin as the data's rows do, which the teacher went on from.

    Raises:
        InputError: the first row that does not.
    """
    prompt_tokens = text.index.identity.prompt_tokens
    expected_BS = Shards(prepared, "train", ("tokens",)).take(sample_ids)["tokens"]
    other_B = (text.take(sample_ids)["tokens"][:, :prompt_tokens] != expected_BS[:, :prompt_tokens]).any(1)
    if other_B.any():
        raise InputError(
            f"{text.where}: row {sample_ids[other_B][0]} does not begin with the {prompt_tokens} tokens of the "
            "prepared data; run `generate` again for this data"
        )


def check_rows(
    cached: Source, prepared: Source, sample_ids: NDArray[np.int64], teacher_text: Source | None = None
) -> None:
    """Refuse a cache whose rows are of other tokens, or whose entries are of other outputs than they say.

    The tokens are the prepared data's or, where there is text of the teacher, those.

    Raises:
        InputError: the first row that does not agree.
    """
    shards = Shards(prepared, "train")
    targets = TargetCache(cached)
    input_column = targets.layout.label_column
    targets = TargetCache(cached, (input_column, "mask", "label_logprob", *targets.layout.loss_columns))
    found, expected = targets.take(sample_ids), shards.take(sample_ids)
    expected |= TeacherText(teacher_text).take(sample_ids) if teacher_text else {}
    rows, holder = len(sample_ids), "the teacher's text" if teacher_text else "the prepared data"
    other_B = (found[input_column].reshape(rows, -1) != expected[input_column].reshape(rows, -1)).any(1)
    if other_B.any():
        raise InputError(
            f"{targets.where}: row {sample_ids[other_B][0]} was captured from other {input_column} than {holder} "
            "holds; run `cache` again for this data"
        )
    labels_BP = found[input_column].reshape(rows, -1)[:, -targets.layout.positions :].astype(np.int64)
    wrong_B = (~labels_consistent(targets.layout, found, labels_BP) & found["mask"]).any(1)
    if wrong_B.any():
        raise InputError(
            f"{targets.where}: row {sample_ids[wrong_B][0]}: the teacher's log-probability of the label is not the one "
            "it has among the targets: their outputs are numbered otherwise (a permuted vocabulary) or they were "
            "changed; run `cache` again"
        )


def labels_consistent(layout: TargetLayout, targets: Columns, labels_BP: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the label's own log-probability is the one among the targets, (B, P); to the bit, as both are cached.

    Where it is not among the top k, it must not be larger than the least of them.
    """
    label_logprob_BP, logprobs_BPK = targets["label_logprob"], targets["logprobs"]
    if isinstance(layout.scheme, Dense):
        same: NDArray[np.bool_] = np.take_along_axis(logprobs_BPK, labels_BP[..., None], -1)[..., 0] == label_logprob_BP
        return same
    here_BPK = targets["indices"] == labels_BP[..., None]
    same_BP = ((logprobs_BPK == label_logprob_BP[..., None]) & here_BPK).any(-1)
    agrees_BP: NDArray[np.bool_] = np.where(here_BPK.any(-1), same_BP, label_logprob_BP <= logprobs_BPK.min(-1))
    return agrees_BP
