"""The numbers of compressed-tensors (https://github.com/vllm-project/compressed-tensors): codes and scales of a matrix.

``fp8`` and ``int8`` have a scale for each output, and their engine rounds activations to as many bits, with a scale for
each token that it finds as it runs; ``int4`` has one for each group of columns, and whole activations. Scales are of
the file's own type, and codes are chosen for them as they are there.

Shapes: R rows of a matrix (outputs), C columns (inputs), G groups of U columns, B places of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from overproof.export.ggml_blocks import Weights
from overproof.export.gptq import compensated_codes

GROUPS = (128, 64, 32)  # columns that share a scale: those that engines have kernels for
LEAST_GROUP = GROUPS[-1]
PACKED_BITS = 32
SHRUNK = np.linspace(0.7, 1.1, 21, dtype=np.float32)  # scales that are tried, of the largest number's
WEIGHT, SCALE, PACKED, SHAPE = "weight", "weight_scale", "weight_packed", "weight_shape"


@dataclass(frozen=True)
class Scheme:
    """How the matrices of a file are rounded."""

    format: str  # as the library names it
    bits: int
    type: str  # "int" or "float"
    codes: torch.dtype
    most: float  # the largest code
    grouped: bool = False

    @property
    def rounds_activations(self) -> bool:
        return not self.grouped

    def settings(self, output: str, group: int | None) -> dict[str, Any]:
        """What config.json says of it; ``output`` is the layer that stays whole."""
        numbers = {"num_bits": self.bits, "type": self.type, "symmetric": True}
        shared = {"strategy": "group", "group_size": group} if self.grouped else {"strategy": "channel"}
        activations = {**numbers, "dynamic": True, "strategy": "token"}
        scheme = {
            "targets": ["Linear"], "weights": {**numbers, **shared, "dynamic": False}, "output_activations": None,
            "input_activations": activations if self.rounds_activations else None,
        }  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": self.format, "quantization_status": "compressed",
            "config_groups": {"group_0": scheme}, "ignore": [output], "kv_cache_scheme": None,
        }  # fmt: skip

    def encode(self, weights_RC: Tensor, group: int | None) -> dict[str, Tensor]:
        """A matrix by the names of its tensors, each number rounded to the nearest."""
        if group is not None:
            blocks_NU = weights_RC.reshape(-1, group)
            scales_RG = torch.from_numpy(best_scales(blocks_NU.numpy(), np.ones(group, np.float32))).view(
                len(weights_RC), -1
            )
            codes_RC = self.codes_of(weights_RC, scales_RG)
            return self.pack(codes_RC, scales_RG)
        scales_R1 = (weights_RC.abs().amax(1, keepdim=True) / self.most).bfloat16().float()
        return self.pack(self.codes_of(weights_RC, scales_R1), scales_R1)

    def codes_of(self, weights_RC: Tensor, scales_RG: Tensor) -> Tensor:
        """The nearest codes; of a scale of 0 that is 0."""
        quotients_RC = (weights_RC / _columns(scales_RG, weights_RC.shape[1])).nan_to_num(0, 0, 0)
        clamped_RC = quotients_RC.clamp(-self.most - self.grouped, self.most)
        return clamped_RC if self.type == "float" else clamped_RC.round()

    def pack(self, codes_RC: Tensor, scales_RG: Tensor) -> dict[str, Tensor]:
        """Codes and scales as a file has them."""
        scales = {SCALE: scales_RG.bfloat16()}
        if not self.grouped:
            return {WEIGHT: codes_RC.to(self.codes), **scales}
        words = codes_RC.to(torch.int64).view(len(codes_RC), -1, PACKED_BITS // self.bits) + (1 << (self.bits - 1))
        shifts = torch.arange(0, PACKED_BITS, self.bits)
        packed = (words << shifts).sum(-1)
        signed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
        return {PACKED: signed, SHAPE: torch.tensor(codes_RC.shape), **scales}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The numbers (R, C) that they mean, fp32."""
        if self.grouped:
            shifts, mask = torch.arange(0, PACKED_BITS, self.bits, dtype=torch.int32), (1 << self.bits) - 1
            codes_RC = ((tensors[PACKED][..., None] >> shifts) & mask).view(*tensors[SHAPE].tolist())
            codes_RC = codes_RC - (1 << (self.bits - 1))
        else:
            codes_RC = tensors[WEIGHT]
        return codes_RC.float() * _columns(tensors[SCALE].float(), codes_RC.shape[1])

    def compensated(self, weights_RC: Tensor, hessian_CC: Tensor, group: int) -> dict[str, Tensor]:
        """A matrix whose columns make up for those before them (see ``gptq``)."""
        scales = list[Weights]()

        def grid(block_RU: Weights, importance_U: Weights) -> tuple[Weights, Weights]:
            scales.append(best_scales(block_RU, importance_U))
            scale_RU = np.repeat(scales[-1][:, None], group, 1)
            return scale_RU, -(1 << (self.bits - 1)) * scale_RU

        codes_RC = compensated_codes(weights_RC.numpy(), hessian_CC, group, (1 << self.bits) - 1, grid)
        middled_RC = torch.from_numpy(codes_RC).to(torch.int64) - (1 << (self.bits - 1))
        return self.pack(middled_RC, torch.from_numpy(np.stack(scales, 1)))


SCHEMES = {
    "fp8": Scheme("float-quantized", 8, "float", torch.float8_e4m3fn, 448),
    "int8": Scheme("int-quantized", 8, "int", torch.int8, 127),
    "int4": Scheme("pack-quantized", 4, "int", torch.int32, 7, grouped=True),
}


def group_size(columns: Iterable[int]) -> int | None:
    """The most columns that may share a scale in matrices of so many; None where none divides them all."""
    found = set(columns)
    return next((group for group in GROUPS if not any(each % group for each in found)), None)


def best_scales(blocks_NU: Weights, importance_U: Weights) -> Weights:
    """Of blocks of four bits: the scale (N) with the least squared error, by what a column's counts."""
    largest_N: Weights = np.abs(blocks_NU).max(1) / 7.5
    best_N, least_N = np.zeros_like(largest_N), np.full_like(largest_N, np.inf)
    for factor in SHRUNK:
        scale_N = torch.from_numpy(largest_N * factor).bfloat16().float().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            codes_NU = np.nan_to_num(np.clip(np.rint(blocks_NU / scale_N[:, None]), -8, 7))
        error_N = ((codes_NU * scale_N[:, None] - blocks_NU) ** 2 * importance_U).sum(1)
        better_N = error_N < least_N
        best_N[better_N], least_N[better_N] = scale_N[better_N], error_N[better_N]
    return best_N


def _columns(scales_RG: Tensor, columns: int) -> Tensor:
    return scales_RG.repeat_interleave(columns // scales_RG.shape[1], 1)


class RoundedInputs(nn.Linear):
    """A linear layer whose inputs are rounded as the engine of a scheme does: a scale for each token."""

    scheme: Scheme

    def forward(self, input: Tensor) -> Tensor:
        scale_B1 = input.abs().amax(-1, keepdim=True).float() / self.scheme.most
        codes = (input.float() / scale_B1).nan_to_num(0, 0, 0)
        codes = codes.to(self.scheme.codes).float() if self.scheme.type == "float" else codes.round()
        return linear((codes * scale_B1).to(input.dtype), self.weight, self.bias)


ROUNDED_INPUTS = {
    name: type(f"RoundedInputs_{name}", (RoundedInputs,), {"scheme": scheme})
    for name, scheme in SCHEMES.items()
    if scheme.rounds_activations
}
