"""DistilBERT (arXiv 1910.01108): BERT's layers without embeddings of segments and without a pooler."""

from __future__ import annotations

from typing import Literal

from overproof.models.base import BaseNames, LayerNames
from overproof.models.encoder import Dimensions, Encoder, EncoderFamily


class DistilBert(Encoder):
    """DistilBERT with a classifier, from its configuration."""

    kind: Literal["distilbert"] = "distilbert"


def _tensors(d: Dimensions) -> tuple[int, ...]:
    h, f = d.hidden, d.intermediate
    layer = (h * h, h) * 4 + (f * h, f, h * f, h) + (h, h) * 2  # q k v o, two of the feed-forward, two norms
    head = (h * h, h, d.classes * h, d.classes)
    return (d.vocabulary * h, d.positions * h, h, h, *layer * d.layers, *head)


FAMILY = EncoderFamily(
    kind="distilbert",
    section=DistilBert,
    prefix="DistilBert",
    bases=("Model", "ForMaskedLM"),
    names=LayerNames(
        layers="distilbert.transformer.layer",
        embeddings="distilbert.embeddings.word_embeddings",
        output="classifier",
        feed_forward=("ffn.lin1", "ffn.lin2"),
        queries="attention.q_lin",
        keys="attention.k_lin",
        values="attention.v_lin",
        intermediate="hidden_dim",
    ),
    base=BaseNames(
        optional=("pre_classifier.", "classifier.", "vocab_"),
        positions="distilbert.embeddings.position_embeddings",
    ),
    tensors=_tensors,
    settings={"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    fields={
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
    },
)
