"""Documents that share a row of tokens, none of which is seen from another.

A row says by its column ``start`` which token begins each of its documents; rows without that column are read as one
text. In a row positions begin at 0 with each document (a row that begins within one begins at 0, too), and that is all
a model needs to keep them apart: without an attention mask and a cache, transformers makes of it a mask that is block
by block (``masking_utils``), and ``varlen.py`` the documents' lengths; a test holds every family to it. Whatever stands
in ``tokens`` decides, so that rows a model wrote are read like those of the data.

Shapes: B rows, P tokens that are read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from overproof.data.manifest import START
from overproof.models.encoder import PADDING


def starts_of_documents(tokens_BP: Tensor, start_B: Tensor) -> Tensor:
    """Where a document begins: (B, P), bool."""
    return tokens_BP == start_B[:, None]


def positions_in_documents(tokens_BP: Tensor, start_B: Tensor) -> Tensor:
    """The place of each token in its document: (B, P)."""
    places_P = torch.arange(tokens_BP.shape[1], device=tokens_BP.device)
    begun_BP = torch.where(starts_of_documents(tokens_BP, start_B), places_P, 0).cummax(1).values
    return places_P - begun_BP


def last_document(tokens_BP: Tensor, start_B: Tensor) -> Tensor:
    """Which tokens are of the document that a row ends in, and so are seen from what is written next: (B, P), bool."""
    places_P = torch.arange(tokens_BP.shape[1], device=tokens_BP.device)
    begun_BP = torch.where(starts_of_documents(tokens_BP, start_B), places_P, 0)
    return places_P >= begun_BP.amax(1, keepdim=True)


def counted_places(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Which places of a row a text is at, (B, P), bool; None of rows that are no tokens."""
    if "tokens" not in batch:
        return None
    if "length" not in batch:  # of encoders, whose rows say it by themselves
        return batch["tokens"] != PADDING
    places_P = torch.arange(batch["tokens"].shape[1] - 1, device=batch["tokens"].device)
    return places_P < batch["length"][:, None]


def at_counted(values: Tensor, counted: Tensor | None) -> Tensor:
    """What stands at the places that count, (N, D) in fp32; at all of them where values have other places."""
    known = counted is not None and values.shape[:-1] == counted.shape
    return (values[counted] if known else values.reshape(-1, values.shape[-1])).float()


def document_positions(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a causal model of transformers is given beside the tokens it reads, all of a row's but the last."""
    if START not in batch:
        return {}
    return {"position_ids": positions_in_documents(batch["tokens"][:, :-1], batch[START])}
