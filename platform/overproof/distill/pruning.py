"""What of a teacher matters least on train rows, and a smaller model without it.

Channels of feed-forward layers and groups of heads matter by the size of what they give over a calibration set
(Minitron, arXiv 2407.14679); layers by how far they turn what they are given, one minus the cosine of input and output
(block influence, ShortGPT, arXiv 2403.03853). One pass of the teacher says all three. Layers may go by the loss of the
model without each instead (Minitron, too), which takes as many passes. What comes out is a model of the same class with
a smaller configuration, which every runtime of that class loads.

Channels between layers matter by the size of what norms give of them, in all layers. Of convolutional models see
``channel_pruning``.

Shapes: L layers, I channels of a feed-forward layer, K key heads, each with Q query heads of D numbers; H channels
between layers.
"""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import fs
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from overproof.artifacts import Artifact
from overproof.config.student_models import Pruned
from overproof.distill.channel_pruning import measure_channels, prune_channels
from overproof.errors import InputError
from overproof.export.calibration import CalibrationRows
from overproof.files import atomic_write, filesystem, read_bytes
from overproof.models.base import ConvolutionalFamily, LayerNames
from overproof.models.documents import at_counted, counted_places
from overproof.models.hf_directory import layer_names, load_model, model_family
from overproof.models.student_config import cannot_lose

HEAD_NORMS = {"self_attn.q_norm", "self_attn.k_norm"}  # of a head's numbers, from a layer


@dataclass(frozen=True)
class Importance:
    """Of each part of a model; what it has not is empty."""

    layers_L: NDArray[np.float64]
    channels_LI: NDArray[np.float64]
    heads_LK: NDArray[np.float64]
    width_H: NDArray[np.float64]
    stages_G: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # see ``channel_pruning``

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """How many there are of each."""
        return len(self.layers_L), self.channels_LI.shape[1], self.heads_LK.shape[1], len(self.width_H)


def known_importance(section: Pruned, teacher: Path, prepared: Artifact, workspace: str, seed: int) -> Importance:
    """Of the teacher in a directory, on the first train rows in training order: measured by the first who asks, and
    kept in the workspace of what is made from that teacher and data, so that all its trials start alike.
    """
    files, folder = filesystem(workspace)
    path = f"{folder}/{section.measurement.name}.npz"
    if files.get_file_info(path).type is not fs.FileType.File:
        read, content = CalibrationRows(prepared, seed, section.rows), io.BytesIO()
        found = measure_importance(load_model(teacher), read.batches(), read.predict, section.layers_by == "loss")
        np.savez(content, **vars(found))
        files.create_dir(folder, recursive=True)
        atomic_write(files, path, content.getvalue())
    return Importance(**np.load(io.BytesIO(read_bytes(files, path))))


@torch.inference_mode()
def measure_importance(
    model: PreTrainedModel, batches: Sequence[Any], predict: Callable[[Any, Any], Any], layers_by_loss: bool = False
) -> Importance:
    """One pass over the batches, or with ``layers_by_loss`` one more for each layer. Of parts that are not where the
    family has them, nothing is said.
    """
    family, nothing = model_family(model), np.zeros((0, 0))
    if isinstance(family, ConvolutionalFamily):
        found_G = measure_channels(model, family, batches, predict)
        return Importance(nothing.ravel(), nothing, nothing, nothing.ravel(), found_G)
    names, was_training = family.names, model.training
    layers = list(model.get_submodule(names.layers).children())
    turned, channels, heads, widths = ([_Mean() for _ in layers] for _ in range(4))
    kv_heads, counted = _kv_heads(model, names), list[Tensor | None]([None])
    with _listening() as listen:
        for layer, turn, channel, head, width in zip(layers, turned, channels, heads, widths, strict=True):
            listen(layer.register_forward_hook(lambda _, i, o, mean=turn: mean.add(_turn(i[0], o), counted[0])))
            down = _part(layer, names.feed_forward[-1])
            if down is not None:
                listen(down.register_forward_pre_hook(lambda _, i, mean=channel: mean.add(i[0].abs(), counted[0])))
            for name in (names.queries, names.feed_forward[0]) if names.width_goes else ():
                part = layer.get_submodule(name or "")
                listen(part.register_forward_pre_hook(lambda _, i, mean=width: mean.add(i[0].abs(), counted[0])))
            out = _part(layer, names.attention_output) if kv_heads else None
            if out is not None:
                listen(out.register_forward_pre_hook(partial(_add_norms, head, kv_heads, counted)))
        model.eval()
        for batch in batches:
            counted[0] = counted_places(batch)
            predict(model, batch)
    matter_L = [mean.value.item() for mean in turned]
    if layers_by_loss:
        matter_L = [_loss_without(layer, model, batches, predict) for layer in layers]
    model.train(was_training)
    return Importance(np.array(matter_L), _stacked(channels), _stacked(heads), _stacked(widths).sum(0))


def _loss_without(
    layer: nn.Module, model: PreTrainedModel, batches: Sequence[Any], predict: Callable[[Any, Any], Any]
) -> float:
    """Nats of a prediction that counts where a layer gives what it is given."""
    total, count = 0.0, 0
    with _listening() as listen:
        listen(layer.register_forward_hook(lambda _, i, o: i[0] if isinstance(o, Tensor) else (i[0], *o[1:])))
        for batch in batches:
            found = predict(model, batch)
            counts_BP = found.mask_BP > 0
            logits_NV, targets_N = found.logits_BPV[counts_BP], found.targets_BP[counts_BP].long()
            total += nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum").item()
            count += len(targets_N)
    return total / max(1, count)


def _part(layer: nn.Module, name: str | None) -> nn.Module | None:
    try:
        return layer.get_submodule(name) if name else None
    except AttributeError:
        return None


def _stacked(means: Sequence[_Mean]) -> NDArray[np.float64]:
    """One row a layer; nothing where a layer has none, or another width."""
    widths = {mean.value.shape for mean in means}
    if len(widths) > 1 or not all(mean.count for mean in means):
        return np.zeros((len(means), 0))
    return np.stack([mean.value.double().numpy() for mean in means])


class _Mean:
    """Over all places, of each number of the last dimension."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(()), 0

    def add(self, values: Tensor, counted: Tensor | None) -> None:
        """Of places that count, where that is known."""
        flat = at_counted(values, counted)
        self.total, self.count = self.total + flat.sum(0).cpu(), self.count + len(flat)

    @property
    def value(self) -> Tensor:
        mean: Tensor = self.total / max(1, self.count)
        return mean


def _turn(given: Tensor, found: Any) -> Tensor:
    result = found if isinstance(found, Tensor) else found[0]
    turned: Tensor = 1 - torch.cosine_similarity(given.double(), result.double(), dim=-1)  # of nearly 1
    return turned[..., None]


def _add_norms(
    mean: _Mean, kv_heads: int, counted: Sequence[Tensor | None], _: nn.Module, given: tuple[Tensor, ...]
) -> None:
    by_head = given[0].reshape(*given[0].shape[:-1], kv_heads, -1)
    mean.add(torch.linalg.vector_norm(by_head, dim=-1), counted[0])


@contextmanager
def _listening() -> Iterator[Callable[[Any], None]]:
    hooks = list[Any]()
    try:
        yield hooks.append
    finally:
        for hook in hooks:
            hook.remove()


def _kv_heads(model: PreTrainedModel, names: LayerNames) -> int:
    """Of a model whose heads can be taken away; 0 of another."""
    return int(getattr(model.config, "num_key_value_heads", 0)) if names.attention_output and names.queries else 0


# --- a smaller model ------------------------------------------------------------------------------


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A copy that has these layers alone; all that lies outside the layers stays as it is.

    What a layer is by its place, such as one with a sliding window, it is by its new place where engines go by that.

    Raises:
        InputError: it is not known where the model keeps its layers, or another one cannot be the first.
    """
    names = layer_names(model)
    if not any(name.startswith(f"{names.layers}.") for name, _ in model.named_parameters()):
        raise InputError(
            f"layers: a {type(model).__name__} keeps none at {names.layers}; expected a student of another kind, such "
            "as {kind: pretrained, path: ...}"
        )
    if names.first_stays and layers[0] != 0:
        raise InputError(
            f"layers {list(layers)}: the first layer of a {type(model).__name__} lacks a norm that the others have; "
            "expected layer 0 among them"
        )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    settings = config.to_dict()
    for setting in names.own_settings:
        values = getattr(model.config, setting)
        setattr(config, setting, [values[layer] for layer in layers])
    for setting in names.per_layer:
        if settings.get(setting) is not None:
            setattr(config, setting, settings[setting][: len(layers)])
    new_index = {old: new for new, old in enumerate(layers)}
    state, prefix = {}, names.layers
    for name, value in model.state_dict().items():
        found = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
        if found is None:
            state[name] = value
        elif int(found[1]) in new_index:
            state[f"{prefix}.{new_index[int(found[1])]}.{found[2]}"] = value
    smaller = type(model)(config)
    smaller.load_state_dict(state)
    return smaller


def prune(model: PreTrainedModel, section: Pruned, importance: Importance) -> PreTrainedModel:
    """A copy without what matters least; each layer loses channels and heads of its own.

    Raises:
        InputError: the model has fewer of something, or its family cannot lose it.
    """
    family = model_family(model)
    if isinstance(family, ConvolutionalFamily):
        return prune_channels(model, family, section, importance.stages_G)
    names, kv_heads = family.names, _kv_heads(model, family.names)
    if section.hidden_sizes is not None:
        raise cannot_lose("hidden_sizes", type(model).__name__, "resnet")
    _, channels, heads, hidden = importance.sizes
    has = {"intermediate_size": channels, "kv_heads": heads, "hidden_size": hidden}
    for name, there in has.items():
        if getattr(section, name) is not None and not there:
            raise cannot_lose(name, type(model).__name__)
    section.require_possible(len(importance.layers_L), channels, kv_heads, hidden)
    layers = _kept(importance.layers_L, section.layers, names.first_stays)
    smaller = keep_layers(model, layers.tolist())
    config, state = copy.deepcopy(smaller.config), smaller.state_dict()
    if section.intermediate_size is not None:
        setattr(config, names.intermediate, section.intermediate_size)
    if section.kv_heads is not None:
        config.head_dim = _head_width(config)
        config.num_attention_heads = config.num_attention_heads // kv_heads * section.kv_heads
        config.num_key_value_heads = section.kv_heads
    for place, layer in enumerate(layers.tolist()):
        prefix, module = f"{names.layers}.{place}.", smaller.get_submodule(f"{names.layers}.{place}")
        if section.intermediate_size is not None:
            _narrow_feed_forward(
                state, prefix, module, names, _kept(importance.channels_LI[layer], section.intermediate_size)
            )
        if section.kv_heads is not None:
            groups = _kept(importance.heads_LK[layer], section.kv_heads)
            _take_heads(state, prefix, names, groups, _head_width(smaller.config), kv_heads)
    if section.hidden_size is not None:
        config.head_dim, config.hidden_size = _head_width(smaller.config), section.hidden_size
        _narrow(state, names, _kept(importance.width_H, section.hidden_size), hidden)
    made = type(model)(config)
    try:
        made.load_state_dict(state)
    except RuntimeError:
        raise InputError(
            f"model.kind pruned: the layers of a {type(model).__name__} hang together otherwise than is known here; "
            "expected layers alone, or {kind: pretrained, path: ...}"
        ) from None
    return made


def _narrow(state: dict[str, Tensor], names: LayerNames, kept_H: NDArray[np.int64], hidden: int) -> None:
    """Take channels between layers away. A norm divides by the root of the mean square: of fewer channels, whose sum of
    squares is nearly the same, its weights make up for the larger mean.
    """
    kept, into = torch.from_numpy(kept_H), {names.queries, names.keys, names.values, *names.feed_forward[:-1]}
    out = {names.attention_output, names.feed_forward[-1]}
    for name in [*state]:
        module, value = name.rpartition(".")[0], state[name]
        of_layer = re.fullmatch(rf"{re.escape(names.layers)}\.\d+\.(.+)", module)
        part = of_layer[1] if of_layer else None
        if module in (names.embeddings, names.output):
            state[name] = value.index_select(1, kept).contiguous()
        elif part in into and name.endswith(".weight"):
            _take(state, module, kept, outputs=False)
        elif part in out and name.endswith(".weight"):
            _take(state, module, kept, outputs=True)
        elif value.ndim == 1 and len(value) == hidden and part not in into | out | HEAD_NORMS:
            state[name] = value.index_select(0, kept) * math.sqrt(hidden / len(kept))


def _kept(importance_N: NDArray[np.float64], count: int | None, first_stays: bool = False) -> NDArray[np.int64]:
    """Which stay, ascending; of two that matter alike the first."""
    if count is None:
        return np.arange(len(importance_N))
    weighed = importance_N.copy()
    if first_stays:
        weighed[0] = np.inf
    return np.sort(np.argsort(-weighed, kind="stable")[:count])


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _narrow_feed_forward(
    state: dict[str, Tensor], prefix: str, layer: nn.Module, names: LayerNames, kept_I: NDArray[np.int64]
) -> None:
    *into, out = names.feed_forward
    for name in into:
        module, kept = layer.get_submodule(name), torch.from_numpy(kept_I)
        width = state[f"{prefix}{name}.weight"].shape[1 if isinstance(module, Conv1D) else 0]
        channels = _channels(state, prefix, out, layer)
        if width == 2 * channels:  # two matrices in one
            kept = torch.cat([kept, kept + channels])
        _take(state, f"{prefix}{name}", kept, outputs=True, transposed=isinstance(module, Conv1D))
    _take(
        state, f"{prefix}{out}", torch.from_numpy(kept_I), outputs=False,
        transposed=isinstance(layer.get_submodule(out), Conv1D),
    )  # fmt: skip


def _channels(state: dict[str, Tensor], prefix: str, out: str, layer: nn.Module) -> int:
    return int(state[f"{prefix}{out}.weight"].shape[0 if isinstance(layer.get_submodule(out), Conv1D) else 1])


def _take_heads(
    state: dict[str, Tensor], prefix: str, names: LayerNames, groups: NDArray[np.int64], width: int, kv_heads: int
) -> None:
    assert names.attention_output is not None
    into = (names.queries, names.keys, names.values)
    for name, outputs in (*((name, True) for name in into), (names.attention_output, False)):
        weight = state[f"{prefix}{name}.weight"]
        numbers = weight.shape[0 if outputs else 1] // kv_heads  # of a group
        assert numbers % width == 0
        kept = torch.from_numpy((groups[:, None] * numbers + np.arange(numbers)).ravel())
        _take(state, f"{prefix}{name}", kept, outputs=outputs)


def _take(state: dict[str, Tensor], module: str, kept: Tensor, outputs: bool, transposed: bool = False) -> None:
    """Some of a linear layer's outputs, or of its inputs."""
    weight = state[f"{module}.weight"]
    state[f"{module}.weight"] = weight.index_select(0 if outputs != transposed else 1, kept).contiguous()
    if outputs and f"{module}.bias" in state:
        state[f"{module}.bias"] = state[f"{module}.bias"].index_select(0, kept).contiguous()
