"""What is left of a directory's model in a student, told from its config.json and from the numbers in its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from overproof.config.student_models import Kept, OfTeacher
from overproof.errors import InputError
from overproof.models.base import ConvolutionalFamily

if TYPE_CHECKING:
    from overproof.models.base import LayerNames, ModelFamily

UNTOLD = 1 << 40  # where a configuration does not say how many there are
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what families call the number of layers


def left_config(config: Mapping[str, Any], model: OfTeacher, family: ModelFamily) -> dict[str, Any]:
    """The content of a config.json for what is left of its model.

    Raises:
        InputError: it has not as much, or has no such part by itself, or its layers are not such as are asked for.
    """
    if isinstance(family, ConvolutionalFamily):
        return family.narrowed(config, model.stages(f"a {_architecture(config)}"))
    return student_config(config, model, family.names)


def student_config(config: Mapping[str, Any], model: OfTeacher, names: LayerNames) -> dict[str, Any]:
    """``left_config`` of a model whose layers are equal.

    Raises:
        InputError: as there.
    """
    architecture, kept = _architecture(config), model.kept
    model.require_linear(names.linear, f"layers of a {architecture}")
    if kept.kv_heads is not None and names.attention_output is None:
        raise cannot_lose("kv_heads", architecture)
    if kept.hidden_sizes is not None:
        raise cannot_lose("hidden_sizes", architecture, "resnet")
    if kept.hidden_size is not None and not names.width_goes:
        raise cannot_lose("hidden_size", architecture)
    layers, channels = (
        next((int(config[name]) for name in known if config.get(name)), UNTOLD)
        for known in (LAYERS, (names.intermediate, "intermediate_size"))
    )
    model.require_possible(layers, channels, kv_heads_of(config), int(config.get("hidden_size") or UNTOLD))
    found = dict(config) if kept.layers is None else with_layers(config, kept.layers, names)
    if kept.intermediate_size is not None:
        called = {name for name in (names.intermediate, "intermediate_size") if name in config} or {names.intermediate}
        found |= dict.fromkeys(called, kept.intermediate_size)
    if kept.kv_heads is not None or kept.hidden_size is not None:
        heads, kv_heads = int(config["num_attention_heads"]), kv_heads_of(config)
        found |= {"head_dim": int(config.get("head_dim") or int(config["hidden_size"]) // heads)}
        left = kept.kv_heads or kv_heads
        found |= {"num_attention_heads": heads // kv_heads * left, "num_key_value_heads": left}
    if kept.hidden_size is not None:
        found |= {"hidden_size": kept.hidden_size}
    return found


def _architecture(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or ["?"])[0])


def kv_heads_of(config: Mapping[str, Any]) -> int:
    """Key heads of each layer."""
    return int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 1)


def cannot_lose(field: str, architecture: str, able: str = "llama") -> InputError:
    """Of a pruned student whose teacher has no such part by itself."""
    return InputError(
        f"{field}: a {architecture} cannot lose any by themselves; expected null and fewer layers or other parts, "
        f"or a teacher of a family such as {able}"
    )


def with_layers(config: Mapping[str, Any], layers: int, names: LayerNames) -> dict[str, Any]:
    """The content of a config.json for fewer layers: what a layer is by its place, it is by its new place."""
    lists = {name: config[name][:layers] for name in names.per_layer if isinstance(config.get(name), list)}
    called = [name for name in LAYERS if name in config] or LAYERS[:1]
    return {**config, **lists, **dict.fromkeys(called, layers)}


def left_tensors(
    tensors: Mapping[str, int], config: Mapping[str, Any], kept: Kept, names: LayerNames, channels: int
) -> dict[str, int]:
    """Numbers in each tensor of what is left of a model of equal layers, which has a config.json and so many channels
    of each feed-forward layer.
    """
    found = _pruned_tensors(tensors, names, kept, channels, kv_heads_of(config))
    if kept.hidden_size is not None:
        found = _narrowed_tensors(found, names, kept.hidden_size, int(config.get("hidden_size") or 0))
    if kept.layers is None:
        return found
    return {name: size for name, size in found.items() if layer_number(name, names) < kept.layers}


def _pruned_tensors(
    tensors: Mapping[str, int], names: LayerNames, kept: Kept, channels: int, kv_heads: int
) -> dict[str, int]:
    """Numbers in each tensor once channels and heads are gone."""
    assert kept.kv_heads is None or names.attention_output is not None
    *into, out = names.feed_forward
    narrowed = {f".{name}.{end}" for name in into for end in ("weight", "bias")} | {f".{out}.weight"}
    projections = (names.queries, names.keys, names.values)
    heads = {f".{name}.{end}" for name in projections for end in ("weight", "bias")}
    heads.add(f".{names.attention_output}.weight")
    found = dict(tensors)
    for name, numbers in tensors.items():
        if kept.intermediate_size is not None and name.endswith(tuple(narrowed)):
            found[name] = numbers // channels * kept.intermediate_size
        elif kept.kv_heads is not None and name.endswith(tuple(heads)):
            found[name] = numbers // kv_heads * kept.kv_heads
    return found


def _narrowed_tensors(tensors: Mapping[str, int], names: LayerNames, hidden: int, before: int) -> dict[str, int]:
    """Numbers in each tensor once channels between layers are gone."""
    inner = (names.queries, names.keys, names.values, *names.feed_forward[:-1])
    other = (*(f".{name}.bias" for name in inner), ".q_norm.weight", ".k_norm.weight")
    return {name: numbers if name.endswith(other) else numbers // before * hidden for name, numbers in tensors.items()}


def layer_number(tensor: str, names: LayerNames) -> int:
    """The layer a tensor belongs to; -1 where it belongs to none."""
    layers = names.layers.rsplit(".", 1)[-1]
    found = re.search(rf"(?:^|\.)(?:{re.escape(layers)}|layer)\.(\d+)\.", tensor)
    return int(found[1]) if found else -1
