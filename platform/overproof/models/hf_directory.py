"""Models: built from a recipe, and read from and written to plain Hugging Face directories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from overproof.config.models import ModelSection
from overproof.data.manifest import TOKENIZER, Manifest
from overproof.data.tokenization import END
from overproof.errors import InputError
from overproof.files import file_sha256
from overproof.models.base import LayerNames, shape_of
from overproof.models.pretrained import refuse_pickles
from overproof.models.sizes import family_of
from overproof.registry import FAMILIES

Batch = dict[str, Tensor]

WEIGHTS = "model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"


def build_model(section: ModelSection, manifest: Manifest, seed: int) -> PreTrainedModel:
    """A model with fresh weights, a function of its arguments alone; the caller's generators stay untouched.

    Raises:
        InputError: the model does not fit the data.
    """
    family, shape = FAMILIES[section.kind], shape_of(manifest)
    if shape.task not in family.tasks:
        raise InputError(
            f"model.kind {section.kind!r}: the data is for {shape.task}; expected data for {' or '.join(family.tasks)}"
        )
    config = family.configuration(section, shape)
    config.architectures = [family.architectures[0]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = family.model_class()(config)
    return model.train()


def layer_names(model: PreTrainedModel) -> LayerNames:
    """Where a model keeps its parts."""
    _, family = family_of({"architectures": model.config.architectures}, model.config.name_or_path)
    return family.names


def load_model(path: Path) -> PreTrainedModel:
    """Read a Hugging Face directory, fp32, in evaluation mode.

    Raises:
        InputError: a pickle lies there, no safetensors do, the architecture is unknown, or weights do not fit.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; expected a Hugging Face model directory")
    refuse_pickles(path, (file.name for file in path.rglob("*")))
    if not any(path.glob("*.safetensors")):
        raise InputError(f"{path}: no *.safetensors file; expected a Hugging Face model directory")
    _, family = family_of(_config(path), path)
    model_class: Any = family.model_class()
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told in info, and refused below
            )
    except SafetensorError as error:
        raise InputError(f"{path}: not safetensors: {error}") from None
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        kind, keys = next(iter(wrong.items()))
        raise InputError(f"{path}: weights do not fit config.json: {kind.replace('_', ' ')}: {keys[0]}")
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar and no table from transformers: what goes wrong is told once, by the error."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()


def _config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    return config


def save_model(
    weights: PreTrainedModel | Mapping[str, Tensor], config: Any, path: Path, tokenizer: Path | None = None
) -> None:
    """Write a plain Hugging Face directory: config.json, model.safetensors and, for text, the tokenizer.

    ``config`` is the model's own (``model.config``); ``weights`` may be a gathered state instead of a model.
    """
    path.mkdir(parents=True, exist_ok=True)
    state, architectures = weights, config.architectures
    if isinstance(weights, nn.Module):
        state, architectures = weights.state_dict(), [type(weights).__name__]
    _, family = family_of({"architectures": architectures}, path)
    written = family.untied(config, list(state))
    tensors = {name: state[name].detach().cpu().clone().contiguous() for name in written}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(path)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, path / TOKENIZER)
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        (path / "tokenizer_config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def chat_template(path: Path) -> str | None:
    """The Jinja text by which a Hugging Face directory writes chat messages as a prompt, None where it has none."""
    if (path / CHAT_TEMPLATE).is_file():
        return (path / CHAT_TEMPLATE).read_text(encoding="utf-8")
    file = path / "tokenizer_config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None
    return found if isinstance(found, str) else None


def check_tokenizer(path: Path, manifest: Manifest) -> None:
    """Refuse a text model that speaks another tokenizer than the data.

    Raises:
        InputError: tokenizer.json is missing or is not the one the data was tokenised with.
    """
    if manifest.tokenizer_sha256 is None:
        return
    file = Path(path) / TOKENIZER
    if not file.is_file():
        raise InputError(f"{file}: missing; expected the tokenizer.json the data was tokenised with")
    found = file_sha256(file)
    if found != manifest.tokenizer_sha256:
        raise InputError(
            f"{file}: sha256 is {found[:12]}…, the data was tokenised with {manifest.tokenizer_sha256[:12]}…; "
            "expected one tokenizer for both: set data.tokenizer to {kind: file, path: the model's tokenizer.json}"
        )


def count_parameters(model: nn.Module) -> int:
    """Numbers in a model, tied weights counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def to_tensors(columns: Mapping[str, NDArray[Any]]) -> Batch:
    """Columns as tensors that share no memory with them; integers become int64."""
    return {
        name: torch.from_numpy(values.astype(np.int64 if values.dtype.kind in "iu" else values.dtype))
        for name, values in columns.items()
    }
