"""Several models' directories as one, whose members count alike, or as much as they help on validation rows.

Shapes: M members, N predictions that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from overproof.artifacts import Artifact
from overproof.data.manifest import TOKENIZER, Manifest
from overproof.data.parquet_reader import Shards
from overproof.errors import InputError
from overproof.models.base import ComposedFamily
from overproof.models.compute import CPU
from overproof.models.ensemble_module import Combine, OverproofEnsembleConfig
from overproof.models.hf_directory import (
    load_model,
    load_start,
    read_config,
    require_outputs,
    save_model,
    to_tensors,
)
from overproof.models.sizes import family_of
from overproof.registry import FAMILIES, TASKS
from overproof.tasks.text_evaluation import BATCH_LOGITS

FEWEST = 2
BATCH_ROWS = 256
ROUNDS, STILL = 500, 1e-7  # of the fit at most, and by how much weights then change


def write_ensemble(members: Sequence[Path], to: Path, combine: Combine, weights: Sequence[float]) -> None:
    """A Hugging Face directory of all members; it appears when it is complete.

    Raises:
        InputError: ``to`` is there, there are fewer than two members, or they do not answer the same question.
    """
    require_new(to)
    family = require_alike(members)
    if combine not in family.combines:
        raise InputError(f"--combine: found {combine}; of {family.members} expected {' or '.join(family.combines)}")
    config = OverproofEnsembleConfig(
        members=[read_config(member) for member in members], weights=list(map(float, weights)), combine=combine,
        **family.settings([_configuration(member) for member in members]),
    )  # fmt: skip
    model: Any = family.model_class()(config)
    for held, member in zip(model.members, members, strict=True):
        held.load_state_dict(load_model(member).state_dict())
    tokenizer = members[0] / TOKENIZER
    part = to.with_name(f"{to.name}.part")
    save_model(model, config, part, tokenizer if tokenizer.is_file() else None)
    part.replace(to)


def require_new(to: Path) -> None:
    """Look whether a folder may be made.

    Raises:
        InputError: something is there.
    """
    if to.exists():
        raise InputError(f"{to}: is there already; expected a folder that is to be made")


def _configuration(member: Path) -> Any:
    _, family = family_of(read_config(member), member)
    model_class: Any = family.model_class()
    return model_class.config_class.from_pretrained(member, local_files_only=True)


def require_alike(members: Sequence[Path]) -> Any:
    """The family of what they are together, a ``ComposedFamily``; and look whether they answer the same question.

    Raises:
        InputError: they are too few, of kinds that do not go together, of other classes in another order, or read other
            rows.
    """
    if len(members) < FEWEST:
        raise InputError(f"MEMBER: found {len(members)}; expected {FEWEST} or more directories of models")
    known = [(member, *family_of(read_config(member), member)) for member in members]
    composed: list[Any] = [family for family in FAMILIES.values() if isinstance(family, ComposedFamily)]
    (first, kind, _), *_ = known
    found = next((each for each in composed if each.accepts(known[0][2])), None)
    if found is None:
        able = " or ".join(each.members for each in composed)
        raise InputError(f"{first}: a {kind} goes into no ensemble; expected {able}")
    told = list[dict[str, Any]]()
    for member, kind, family in known:
        if not found.accepts(family):
            raise InputError(f"{member}: a {kind} does not go with {first}; expected {found.members}")
        tokenizer = member / TOKENIZER
        own = tokenizer.read_bytes() if tokenizer.is_file() else None
        told.append(found.alike(_configuration(member), family) | {TOKENIZER: own})
    for member, each in zip(members[1:], told[1:], strict=True):
        other = next((name for name in each if each[name] != told[0][name]), None)
        if other is not None:
            raise InputError(f"{member}: {other} is not that of {first}; expected {found.members}")
    return found


@torch.inference_mode()
def fit_weights(members: Sequence[Path], prepared: Artifact, tell: Callable[[str], None]) -> NDArray[np.float64]:
    """The weights (M) with which the members' averaged probabilities are best on the validation rows.

    Raises:
        InputError: as ``require_alike``, or their classes are not the data's.
    """
    require_alike(members)
    manifest, shards = Manifest.read(prepared), Shards(prepared, "validation")
    task = TASKS[manifest.task]
    for member in members:
        require_outputs(member, manifest)
    found = list[NDArray[np.float64]]()
    rows = max(1, min(BATCH_ROWS, BATCH_LOGITS[CPU.type] // (manifest.positions * manifest.outputs)))
    for number, member in enumerate(members, start=1):
        model, parts = load_start(member, manifest, 0), list[NDArray[np.float64]]()
        for first in range(0, shards.rows, rows):
            tell(f"member {number} of {len(members)}, row {first} of {shards.rows}")
            ids = np.arange(first, min(first + rows, shards.rows))
            given = task.predict(model, to_tensors(shards.take(ids)))
            nats_BP = given.logits_BPV.log_softmax(-1).gather(-1, given.targets_BP[..., None].long())[..., 0]
            parts.append(nats_BP[given.mask_BP > 0].double().numpy())
        found.append(np.concatenate(parts))
    return likeliest_mixture(np.stack(found))


def likeliest_mixture(logprobs_MN: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights (M) of a mixture under which what was observed is likeliest: its likelihood is concave in them, and
    expectation-maximisation climbs it (Dempster, Laird and Rubin, 1977).
    """
    relative_MN = np.exp(logprobs_MN - logprobs_MN.max(0))
    weights_M: NDArray[np.float64] = np.full(len(logprobs_MN), 1 / len(logprobs_MN))
    for _ in range(ROUNDS):
        shares_MN = weights_M[:, None] * relative_MN
        renewed_M: NDArray[np.float64] = (shares_MN / shares_MN.sum(0)).mean(1)
        if np.abs(renewed_M - weights_M).max() < STILL:
            return renewed_M
        weights_M = renewed_M
    return weights_M
