"""Learning rate, parameter groups and DeepSpeed's configuration: pure functions of a recipe's training section."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from overproof.config import Optimization, Training
from overproof.models.zero_parts import full_shape

ADAM_EPSILON = 1e-8
FIRST_LOSS_SCALE_POWER = 16


def learning_rate(optimization: Optimization, step: int) -> float:
    """The rate of a step, counted from 0: linear warm-up to the peak at ``warmup_steps``, then the schedule.

    The last step, ``steps - 1``, has ``final_fraction`` of the peak (unless the schedule is constant).
    """
    peak, warmup = optimization.learning_rate, optimization.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, optimization.steps - 1 - warmup))
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[optimization.schedule]
    return peak * (optimization.final_fraction + (1 - optimization.final_fraction) * left)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, norms, class tokens) do not. What takes no gradient is in neither group."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = sum(size > 1 for size in full_shape(parameter)) > 1
        (matrices if is_matrix else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def trained_elements(model: nn.Module) -> int:
    """How many numbers of a model take a gradient."""
    return sum(full_shape(parameter).numel() for parameter in model.parameters() if parameter.requires_grad)


def deepspeed_config(
    train: Training, world: int, universal: bool = False, trained: int | None = None
) -> dict[str, Any]:
    """DeepSpeed's configuration for ``world`` workers. The rate is set from outside at every step: no scheduler here.
    Without steps there is no optimizer, and nothing to shard but the weights of stage 3.

    ``universal`` makes it load a universal checkpoint, which any number of workers can. DeepSpeed reserves whole
    buckets; of ``trained`` numbers, where that is told, none is larger.
    """
    accumulation = train.accumulation(world)
    if train.steps == 0 and train.zero_stage < 3:
        train = train.model_copy(update={"zero_stage": 0, "offload": "none"})
    optimizer = {
        "type": "AdamW",
        "params": {
            "lr": train.learning_rate,
            "betas": [train.beta1, train.beta2],
            "eps": ADAM_EPSILON,
            "weight_decay": train.weight_decay,
            # DeepSpeed's own would be compiled first; beside offload it is what makes a step bearable.
            **({"torch_adam": True, "fused": True} if train.offload == "none" else {"torch_adam": False}),
        },
    }
    bucket = train.bucket_elements if trained is None else min(train.bucket_elements, max(trained, 1))
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip_norm if deepspeed_clips(train) else 0.0,
        **({"optimizer": optimizer} if train.steps else {}),
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,  # DeepSpeed wants it even
            "overlap_comm": train.overlaps,
            **({"zero_hpz_partition_size": train.hpz_partition_size} if train.hpz_partition_size > 1 else {}),
            **({"offload_optimizer": {"device": "cpu"}} if train.offload != "none" else {}),
            **({"offload_param": {"device": "cpu"}} if train.offload == "parameters" else {}),
        },
        **_precision(train),
        **({"checkpoint": {"load_universal": True}} if universal else {}),
    }


def deepspeed_clips(train: Training) -> bool:
    """Whether DeepSpeed clips gradients, returns their norm and leaves a step out that is not finite."""
    return train.zero_stage > 0 or train.precision == "fp16"


def _precision(train: Training) -> dict[str, Any]:
    """ZeRO keeps fp32 masters of 16-bit weights.

    Without ZeRO, DeepSpeed 0.19's bf16 optimizer takes an empty Adam step before the first, which bends the start of
    training, so stage 0 casts activations alone.
    """
    if train.precision == "bf16":
        if train.zero_stage == 0:
            return {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
        accumulated = "fp32" if train.accumulates_fp32 else "bf16"
        return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": accumulated}}
    if train.precision == "fp16":
        return {"fp16": {"enabled": True, "initial_scale_power": FIRST_LOSS_SCALE_POWER}}
    return {}
