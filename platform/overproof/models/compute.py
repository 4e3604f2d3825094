"""Where, and in which number format, the models of a process compute: decided here alone.

``fp32`` is IEEE's. ``tf32`` lets GPUs round what they multiply to 11 bits (NVIDIA's A100 white paper, 2020); CPUs
compute as in fp32. In ``bf16`` matrices are multiplied in bfloat16 (arXiv 1905.12322) and all else is in fp32, the
layer that gives the logits, too (in tf32 on GPUs): in bf16 a logit between 16 and 32 would be rounded to an eighth.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from overproof.config.base import Precision
from overproof.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Compute:
    """A device, and how models compute there; see ``start_compute``."""

    device: torch.device
    precision: Precision

    def place(self, model: PreTrainedModel, trained: bool = False) -> PreTrainedModel:
        """The same model, on the device, from here on called in this precision.

        In bf16 its weights stay in fp32 where it is ``trained``; else those that are multiplied are kept in half the
        bytes, which changes no result.
        """
        if self.precision == "bf16":
            from overproof.models.hf_directory import model_parts

            for part in model_parts(model):
                _multiply_in_bf16(part, self.device, trained)
        return model.to(self.device)


PLAIN = Compute(CPU, "fp32")


def start_compute(gpus: float, precision: Precision) -> Compute:
    """What the models of this process compute with from here on: a GPU where some of one was reserved for it, else the
    CPU, whatever else can be seen: Ray hides no GPU from those who asked for none.

    Raises:
        InputError: there is no GPU where one was reserved.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if not gpus:
        return Compute(CPU, precision)
    if not torch.cuda.is_available():
        raise InputError(
            f"{platform.node()}: {gpus:g} GPUs are reserved here, and torch {torch.__version__} finds none; expected a "
            "build of torch for GPUs on every node that offers them, or a recipe that asks for none"
        )
    return Compute(torch.device("cuda", torch.cuda.current_device()), precision)


def _multiply_in_bf16(model: PreTrainedModel, device: torch.device, trained: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    from overproof.models.hf_directory import output_layer

    output = output_layer(model)
    if not trained:
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not output:
                module.to(torch.bfloat16)  # as autocast would at each call
    in_fp32 = torch.autocast(device.type, enabled=False)(output.forward)
    output.forward = lambda hidden: in_fp32(hidden.float())
    model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
