"""BERT (arXiv 1810.04805), and what has its architecture under other names, such as MiniLM (arXiv 2012.15828)."""

from __future__ import annotations

from typing import Literal

from overproof.models.base import BaseNames, LayerNames
from overproof.models.encoder import Dimensions, Encoder, EncoderFamily


class Bert(Encoder):
    """BERT with a classifier, from its configuration."""

    kind: Literal["bert"] = "bert"


def _tensors(d: Dimensions) -> tuple[int, ...]:
    h, f = d.hidden, d.intermediate
    embeddings = (d.vocabulary * h, d.positions * h, d.segments * h, h, h)
    layer = (h * h, h) * 4 + (f * h, f, h * f, h) + (h, h) * 2  # q k v o, two of the feed-forward, two norms
    return (*embeddings, *layer * d.layers, h * h, h, d.classes * h, d.classes)  # pooler and classifier


FAMILY = EncoderFamily(
    kind="bert",
    section=Bert,
    prefix="Bert",
    bases=("Model", "ForMaskedLM", "ForPreTraining"),
    names=LayerNames(
        layers="bert.encoder.layer",
        embeddings="bert.embeddings.word_embeddings",
        output="classifier",
        feed_forward=("intermediate.dense", "output.dense"),
        queries="attention.self.query",
        keys="attention.self.key",
        values="attention.self.value",
    ),
    base=BaseNames(
        optional=("classifier.", "bert.pooler.", "cls."),
        positions="bert.embeddings.position_embeddings",
    ),
    tensors=_tensors,
    settings={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
)
