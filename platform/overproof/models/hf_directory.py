"""Models: built from a recipe, read from and written to plain Hugging Face directories, and called alike.

Shapes: B rows, S = P + 1 tokens, P predictions in a row (1 for images), V outputs, D pixels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils import logging as transformers_logging

from overproof.config import Llama, Vit
from overproof.data.manifest import TOKENIZER, Manifest
from overproof.data.tokenization import END, END_ID
from overproof.errors import InputError
from overproof.files import file_sha256

Batch = dict[str, Tensor]

IMAGE_EDGE = 8
LEAST_POSITIONS = 2048
WEIGHTS = "model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
ARCHITECTURES: dict[str, Any] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "ViTForImageClassification": ViTForImageClassification,
}


@dataclass(frozen=True)
class Prediction:
    """A model's outputs for a batch, what they should be, and which of them count."""

    logits_BPV: Tensor
    targets_BP: Tensor
    mask_BP: Tensor  # bool


def build_model(config: Llama | Vit, manifest: Manifest, seed: int) -> PreTrainedModel:
    """A model with fresh weights, a function of its arguments alone; the caller's generators stay untouched.

    Raises:
        InputError: the model does not fit the data.
    """
    expected = "text" if isinstance(config, Llama) else "digits"
    if manifest.kind != expected:
        raise InputError(f"model.kind {config.kind!r}: the data is {manifest.kind}; expected {expected} data")
    made = _llama(config, manifest) if isinstance(config, Llama) else _vit(config, manifest)
    made.architectures = ["LlamaForCausalLM" if isinstance(config, Llama) else "ViTForImageClassification"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[made.architectures[0]](made)
    return model.train()


def _llama(config: Llama, manifest: Manifest) -> Any:
    # Rotary positions have no table, so a longer limit costs nothing and lets an engine serve past the
    # training length; how good the model is out there is for the user to measure.
    return LlamaConfig(
        vocab_size=manifest.outputs,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=max(LEAST_POSITIONS, manifest.positions),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=config.initializer_range,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        attn_implementation="sdpa",
    )


def _vit(config: Vit, manifest: Manifest) -> Any:
    return ViTConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=IMAGE_EDGE,
        patch_size=config.patch_size,
        num_channels=1,
        num_labels=manifest.outputs,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=config.initializer_range,
        attn_implementation="sdpa",
    )


def load_model(path: Path) -> PreTrainedModel:
    """Read a Hugging Face directory, fp32, in evaluation mode.

    Raises:
        InputError: a pickle lies there, no safetensors do, the architecture is unknown, or weights do not fit.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; expected a Hugging Face model directory")
    pickles = sorted(file.name for pattern in PICKLES for file in path.rglob(pattern))
    if pickles:
        raise InputError(
            f"{path}: found {pickles[0]}, a pickle, which runs code when read; expected safetensors alone: "
            "convert the weights and delete it"
        )
    if not any(path.glob("*.safetensors")):
        raise InputError(f"{path}: no *.safetensors file; expected a Hugging Face model directory")
    model_class = ARCHITECTURES[_architecture(path)]
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


def _architecture(path: Path) -> str:
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise InputError(f"{path}/config.json: no architecture; expected a Hugging Face model configuration") from None
    if found not in ARCHITECTURES:
        raise InputError(f"{path}/config.json: architecture {found}; expected {' or '.join(ARCHITECTURES)}")
    return str(found)


def save_model(
    weights: PreTrainedModel | Mapping[str, Tensor], config: Any, path: Path, tokenizer: Path | None = None
) -> None:
    """Write a plain Hugging Face directory: config.json, model.safetensors and, for text, the tokenizer.

    ``config`` is the model's own (``model.config``); ``weights`` may be a gathered state instead of a model.
    """
    path.mkdir(parents=True, exist_ok=True)
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    if config.model_type == "llama" and config.tie_word_embeddings:
        state = {name: value for name, value in state.items() if name != "lm_head.weight"}
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
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


def forward(model: nn.Module, batch: Batch) -> Prediction:
    """Call a model on a text batch (tokens_BS, length_B) or an image batch (pixels_BD, label_B)."""
    if "tokens" in batch:
        tokens_BS, length_B = batch["tokens"], batch["length"]
        logits_BPV = model(input_ids=tokens_BS[:, :-1], use_cache=False).logits
        places_P = torch.arange(tokens_BS.shape[1] - 1, device=tokens_BS.device)
        return Prediction(logits_BPV, tokens_BS[:, 1:], places_P < length_B[:, None])
    pixels_BCHW = batch["pixels"].view(-1, 1, IMAGE_EDGE, IMAGE_EDGE)
    targets_BP = batch["label"][:, None]
    logits_BPV = model(pixel_values=pixels_BCHW).logits[:, None, :]
    return Prediction(logits_BPV, targets_BP, torch.ones_like(targets_BP, dtype=torch.bool))


def count_parameters(model: nn.Module) -> int:
    """Numbers in a model, tied weights counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def to_tensors(columns: Mapping[str, NDArray[Any]]) -> Batch:
    """Columns as tensors that share no memory with them; integers become int64."""
    return {
        name: torch.from_numpy(values.astype(np.int64 if values.dtype.kind in "iu" else values.dtype))
        for name, values in columns.items()
    }
