"""Running statistics of batch norm (arXiv 1502.03167) in training: buffers that a forward pass in training changes, and
that evaluation and the exported file compute with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """Those of a model, around one step of an engine.

    A step normalises each worker's rows by themselves, a micro-batch at a time, as torch's DistributedDataParallel
    does, so that with other numbers of workers training is another one. What DistributedDataParallel does with the
    statistics, which then differ between workers, is to keep rank 0's. Here they are the mean over the workers after
    each step: means of all rows of the global batch count, every rank evaluates and saves the same model, and a
    checkpoint is exact whatever rank's buffers it holds. A step that is left out, because its gradients are not
    finite, leaves them as they were, too: what is not finite would never go away again.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
        self._counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]

    def before_step(self) -> None:
        """Remember what they are."""
        if self._statistics:
            self._before = self._flat(), torch.stack(self._counts)

    def after_step(self, norm: Tensor | float, mean: Callable[[Tensor], Tensor] = lambda values: values) -> None:
        """Take the mean over the workers, or what was before if the gradients' ``norm`` is not finite; no device is
        waited for.
        """
        if not self._statistics:
            return
        before, counts = self._before
        finite = torch.as_tensor(norm, device=before.device).isfinite()
        flat = torch.where(finite, mean(self._flat()), before)
        with torch.no_grad():
            parts = torch.split(flat, [statistic.numel() for statistic in self._statistics])
            for own, found in zip(self._statistics, parts, strict=True):
                own.copy_(found)
            for count, found in zip(self._counts, counts.unbind(), strict=True):
                count.copy_(torch.where(finite, count, found))

    def _flat(self) -> Tensor:
        return torch.cat([statistic.detach() for statistic in self._statistics])
