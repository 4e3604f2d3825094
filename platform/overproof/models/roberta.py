"""RoBERTa (arXiv 1907.11692): BERT's layers; positions are counted from behind the padding's id."""

from __future__ import annotations

from typing import Literal

from overproof.models.base import BaseNames, LayerNames
from overproof.models.encoder import Dimensions, Encoder, EncoderFamily

PADDING_ID = 1  # of every RoBERTa tokenizer; the table of positions begins with as many entries, and one for padding


class Roberta(Encoder):
    """RoBERTa with a classifier, from its configuration."""

    kind: Literal["roberta"] = "roberta"


def _tensors(d: Dimensions) -> tuple[int, ...]:
    h, f = d.hidden, d.intermediate
    embeddings = (d.vocabulary * h, d.positions * h, d.segments * h, h, h)
    layer = (h * h, h) * 4 + (f * h, f, h * f, h) + (h, h) * 2  # q k v o, two of the feed-forward, two norms
    return (*embeddings, *layer * d.layers, h * h, h, d.classes * h, d.classes)


FAMILY = EncoderFamily(
    kind="roberta",
    section=Roberta,
    prefix="Roberta",
    bases=("Model", "ForMaskedLM"),
    names=LayerNames(
        layers="roberta.encoder.layer",
        embeddings="roberta.embeddings.word_embeddings",
        output="classifier.out_proj",
        feed_forward=("intermediate.dense", "output.dense"),
        queries="attention.self.query",
        keys="attention.self.key",
        values="attention.self.value",
    ),
    base=BaseNames(
        optional=("classifier.", "lm_head.", "roberta.pooler."),
        positions="roberta.embeddings.position_embeddings",
    ),
    tensors=_tensors,
    settings={
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "type_vocab_size": 1,
        "pad_token_id": PADDING_ID,
    },
    segments=1,
    reserved_positions=PADDING_ID + 1,
)
