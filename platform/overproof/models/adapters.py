"""Low-rank adapters (LoRA, arXiv 2106.09685) in a model's linear layers, by the library peft: put in, and merged.

A model stays what it is: its class, its calls and the names of its other parts; each layer that has an adapter becomes
one of peft's with the layer in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from overproof.config import Lora
from overproof.errors import InputError
from overproof.models.base import BaseFamily
from overproof.models.sizes import family_of
from overproof.models.zero_parts import full_shape, is_apart, own_part

ADAPTER = "default"  # peft's name of the only one
MARK = "lora_"  # in the names of an adapter's weights


def add_adapters(model: PreTrainedModel, settings: Lora, seed: int) -> None:
    """Put adapters into a model's layers, and leave nothing else to train. They add nothing yet.

    Their weights are a function of the seed; the caller's generators stay untouched.

    Raises:
        InputError: no layer has such a name, or the family makes its output layer anew for each data set.
    """
    kind, family = family_of({"architectures": [type(model).__name__]}, model.config.name_or_path)
    if isinstance(family, BaseFamily):
        raise InputError(
            f"train.lora: the output layer of a {kind} may be made anew for the data, and adapters would leave it as "
            "it was drawn; expected no lora"
        )
    from peft import LoraConfig, inject_adapter_in_model  # seconds to import

    targets = settings.targets if settings.targets == "all-linear" else list(settings.targets)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets
    )  # fmt: skip
    training = model.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, ADAPTER)
        except ValueError as error:
            raise InputError(f"train.lora.targets: {settings.targets}: {error}") from None
    model.train(training)


def merge_adapters(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model with what its adapters add within its own weights, and no adapter left; it is changed in place.

    ``weights`` are the adapters', by name; without any they are as ``add_adapters`` left them.

    Raises:
        RuntimeError: they are not those of the model's adapters.
    """
    own = {name for name in model.state_dict() if MARK in name}
    if not own:
        return model
    if weights:
        given = {name for name in weights if MARK in name}
        if given != own:
            raise RuntimeError(f"weights of other adapters: {sorted(given ^ own)[:3]}")
        model.load_state_dict({name: weights[name] for name in own}, strict=False)
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in layers:
        weight = module.get_base_layer().weight
        if is_apart(weight):  # where it lies in parts, each rank adds its own
            start, part = own_part(weight, dist.get_rank())
            part += module.get_delta_weight(ADAPTER).detach().reshape(-1)[start : start + len(part)].to(part.device)
        else:
            module.merge(safe_merge=True)
        model.set_submodule(name, module.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def count_weights(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers in a model without its adapters, and those that are trained; tied weights counted once."""
    own = sum(full_shape(parameter).numel() for name, parameter in model.named_parameters() if MARK not in name)
    return own, sum(full_shape(parameter).numel() for parameter in model.parameters() if parameter.requires_grad)
