"""The engine that DeepSpeed ZeRO shards over several processes, and what its files hold.

DeepSpeed is imported inside functions alone: a driver without a compiler or GPU never loads it.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from overproof.config import Training
from overproof.models.hf_directory import Batch
from overproof.models.varlen import attend_by_lengths
from overproof.models.zero_parts import full_shape, is_apart
from overproof.train.engine import (
    Metrics,
    PendingMetrics,
    StateWriter,
    leave_out_nonfinite,
    seed_rng,
    set_learning_rate,
    to_device,
)
from overproof.train.extension_lock import require_no_stale_lock
from overproof.train.objective import Objective
from overproof.train.optim import (
    deepspeed_clips,
    deepspeed_config,
    learning_rate,
    parameter_groups,
    trained_elements,
)
from overproof.train.plain_loading import plain_loading
from overproof.train.running_statistics import RunningStatistics
from overproof.train.sharded_state import FP32, ShardedState
from overproof.train.train_job import Sharding

CPU_ADAM = "cpu_adam"  # what DeepSpeed compiles for offload, unless it was installed with it
DISABLE_DYNAMO = "TORCHDYNAMO_DISABLE"  # torch reads it whenever torch.compile is called


class DeepSpeedEngine:
    """One rank of a DeepSpeed ZeRO group (arXiv 1910.02054), stages 0 to 3, over gloo on CPUs or nccl on GPUs.

    The process group must be up. Weights start from rank 0's. Gradients and losses are means over the ranks, so
    ranks bring equally many predictions that count. Dropout and the like draw from a seed that is a function of
    ``seed`` and of the rows' place in the order: the same after a restart.
    """

    def __init__(self, model: PreTrainedModel, train: Training, seed: int = 0, universal: bool = False) -> None:
        """``universal``: ``load`` will be given a universal checkpoint. With no steps there is no optimizer, and below
        stage 3 the model stays as it is.

        Raises:
            InputError: a lock that nobody holds stands before what must be compiled, or the model cannot attend as the
                recipe asks.
        """
        self.train, self.seed, self.universal = train, seed, universal
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.accumulation = train.accumulation(self.world)
        deepspeed = import_deepspeed("cuda" if dist.get_backend() == "nccl" else "cpu")
        if train.offload != "none" and not deepspeed.git_version_info.installed_ops[CPU_ADAM]:
            require_no_stale_lock(CPU_ADAM)
        if train.activation_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if train.attention == "varlen":
            attend_by_lengths(model)
        config = deepspeed_config(train, self.world, universal, trained_elements(model))
        if any(map(is_apart, model.parameters())):
            _take_precision(model, config, torch.device(deepspeed.accelerator.get_accelerator().current_device_name()))
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model.train(),
            model_parameters=parameter_groups(model, train.weight_decay) if train.steps else None,
            config=config,
            dist_init_required=False,
        )
        if train.compile:
            self.engine.compile()
        self.device = torch.device(self.engine.device)
        self.statistics = RunningStatistics(self.engine.module)
        self.steps_done = 0

    def step(self, objective: Objective, batch: Batch) -> PendingMetrics:
        rate = learning_rate(self.train, self.steps_done)
        set_learning_rate(self.optimizer, rate)
        names, sums, norm = list[str](), torch.zeros((), device=self.device), None
        self.statistics.before_step()
        for index, micro_batch in enumerate(_micro_batches(batch, self.accumulation)):
            self._seed_rows(index)
            loss, scalars = objective.loss(self.engine, to_device(micro_batch, self.device))
            names, sums = ["loss", *scalars], sums + torch.stack([loss.detach(), *scalars.values()]).double()
            last = index == self.accumulation - 1
            if last:
                reduced = self.all_reduce_async(sums)
            self.engine.backward(loss)
            if last:
                norm = self._clip_gradients()
                if self.train.offload != "none":
                    _reset_bias_correction(self.optimizer.optimizer)
            self.engine.step()
        found_norm = self.engine.get_global_grad_norm() if norm is None else norm
        self.statistics.after_step(found_norm, lambda values: self.all_reduce(values) / self.world)
        self.steps_done += 1

        def read() -> Metrics:
            grad_norm, means = float(found_norm), reduced() / (self.world * self.accumulation)
            values = dict(zip(names, means.tolist(), strict=True))
            overflow = {"overflow": 1.0} if self.train.precision == "fp16" and not math.isfinite(grad_norm) else {}
            return {"loss": values.pop("loss"), "learning_rate": rate, "grad_norm": grad_norm, **overflow, **values}

        return read

    @contextmanager
    def eval_mode(self) -> Iterator[nn.Module]:
        self.engine.eval()
        try:
            with torch.no_grad():
                yield self.engine
        finally:
            self.engine.train()

    def all_reduce(self, values: Tensor) -> Tensor:
        return self.all_reduce_async(values)()

    def all_reduce_async(self, values: Tensor) -> Callable[[], Tensor]:
        """Begin to sum over the ranks; what is returned waits for the sum, so that no rank waits meanwhile."""
        values = values.clone()
        work = dist.all_reduce(values, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return values

        return wait

    def save(self, write: StateWriter) -> None:
        """Hand this rank's part of the state to ``write``; all ranks call it at the same step."""
        kept = None if self.train.lora is None else _trained_names(self.engine.module)
        self.engine.checkpoint_engine = _StateFiles(write, kept)
        with tempfile.TemporaryDirectory() as scratch:  # DeepSpeed insists on a folder for its recovery script
            self.engine.save_checkpoint(
                scratch, tag="state", save_latest=False, exclude_frozen_parameters=self.train.lora is not None
            )

    def load(self, folder: Path, step: int) -> None:
        """Go on from the files that ``save`` gave after ``step`` steps, or from ``to_universal`` of them.

        Raises:
            InputError: they hold more than tensors, plain values and DeepSpeed's own records.
        """
        self.engine.checkpoint_engine = _StateFiles()
        with plain_zero_loading(folder):
            self._load(folder)
            if self.universal:
                self._load_buffers(folder)
        self.steps_done = step

    def load_resharded(self, folder: Path, step: int, saved: ShardedState) -> None:
        """The same at stage 3, of what another number of ranks has saved: DeepSpeed is handed this rank's part of it as
        if it had saved that.
        """
        with plain_zero_loading(folder), tempfile.TemporaryDirectory() as scratch:
            model = saved.model_state | {"dp_world_size": self.world}
            own = self.optimizer.state_dict()
            groups, adam = list(own["fp32_flat_groups"]), own["optimizer_state_dict"]
            state = {**own, "fp32_flat_groups": groups, "loss_scaler": saved.common["loss_scaler"]}
            names = {weight: name for name, weight in self.engine.module.named_parameters()}
            for index, group in enumerate(self.optimizer.fp16_groups):
                numels = {names[weight]: weight.ds_numel for weight in group}
                part = saved.part(numels, self.rank, self.world)
                groups[index] = part.pop(FP32)
                adam["state"][index] = part
            name = f"zero_pp_rank_{self.rank}_mp_rank_00_"
            given = {f"{name}model_states.pt": model, f"{name}optim_states.pt": {"optimizer_state_dict": state}}
            for file in given:  # DeepSpeed looks whether they are there
                Path(scratch, file).touch()
            self.engine.checkpoint_engine = _StateFiles(given=given)
            self._load(Path(scratch))
        self.steps_done = step

    @property
    def trained(self) -> dict[str, int]:
        """Numbers in each weight that is trained, whole, by name."""
        weights = self.engine.module.named_parameters()
        return {name: full_shape(weight).numel() for name, weight in weights if weight.requires_grad}

    def _load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=self.train.lora is None
        )
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found nothing to load")

    def _load_buffers(self, folder: Path) -> None:
        """Of a universal checkpoint, of which DeepSpeed loads parameters alone."""
        saved = torch.load(min(folder.glob("*model_states.pt")), map_location="cpu", weights_only=True, mmap=True)
        own = dict(self.engine.module.named_buffers())
        for name, value in saved["module"].items():
            if name in saved["buffer_names"]:
                own[name].copy_(value)

    def _seed_rows(self, index: int) -> None:
        """Seed a forward pass by where its rows stand in the order, whatever the number of workers."""
        share = self.train.batch_size // self.world
        position = self.steps_done * self.train.batch_size + self.rank * share + index * share // self.accumulation
        seed_rng(self.seed, position, self.device)

    def _clip_gradients(self) -> Tensor | None:
        """Without ZeRO: clip the gradients, which every rank has whole, and return their norm from before.

        DeepSpeed would clip, but neither return the norm nor leave a step out whose gradients are not finite.
        """
        if deepspeed_clips(self.train):
            return None
        norm = nn.utils.clip_grad_norm_(self.engine.module.parameters(), self.train.clip_norm)
        leave_out_nonfinite(self.optimizer, norm)
        return norm


def _trained_names(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


class _StateFiles:
    """A checkpoint engine for DeepSpeed that hands every file to a function instead of writing it."""

    def __init__(
        self,
        write: StateWriter | None = None,
        kept: frozenset[str] | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """``kept`` are the names of the weights that are written; None is all. What is ``given`` by a file's name is
        not read."""
        self.write, self.kept, self.given = write, kept, given or {}

    def save(self, state_dict: Any, path: str) -> None:
        assert self.write
        if self.kept is not None and "module" in state_dict:  # DeepSpeed leaves the second name of tied weights there
            own = {name: value for name, value in state_dict["module"].items() if name in self.kept}
            state_dict = {**state_dict, "module": own}
        self.write(Path(path).name, state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        if self.given:
            return self.given[Path(path).name]
        return torch.load(path, map_location=map_location, weights_only=True, mmap=True)

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> bool:  # noqa: ARG002
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def is_decoupled(self) -> bool:
        return False


def _reset_bias_correction(adam: Any) -> None:
    """Have DeepSpeed's CPU Adam take its bias correction from the step alone.

    It multiplies the correction up from step to step, and after a restart begins with a power, which differs in the
    last bits. A step 0 on a tensor of its own breaks the row, so that it is a power every time.
    """
    group, dummy = adam.param_groups[0], torch.zeros(1)
    adam.ds_opt_adam.adam_update(
        adam.opt_id, 0, 0.0, *group["betas"], group["eps"], 0.0, True, dummy, dummy, dummy, dummy
    )


@contextmanager
def sharded_construction(train: Training, world: int, sharding: Sharding | None) -> Iterator[None]:
    """Within it, a model whose weights are drawn, or that ``from_pretrained`` reads, is given to this rank in its part
    of each weight as ZeRO-3 shards it, and of a whole model no rank ever holds more than a layer; every rank builds or
    reads the same in step. Drawn weights are those that one process would draw. At other stages it does nothing.
    """
    if train.zero_stage < 3 or sharding is None:
        yield
        return
    backend = dist.get_backend()
    deepspeed = import_deepspeed("cuda" if backend == "nccl" else "cpu")
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)  # it takes the group that is up
    config = deepspeed_config(train, world)
    if sharding == "drawn":
        # Numbers are drawn in fp32 on the CPU, as in one process, and not as what they are trained as.
        with deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=()), _gathered_drawing(deepspeed):
            yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    told = HfDeepSpeedConfig(config)  # transformers asks as long as it is there
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del told


@contextmanager
def _gathered_drawing(deepspeed: Any) -> Iterator[None]:
    """Within it, transformers draws the weights of one module after another, once all are built, as ever, but each
    module's are gathered for that moment alone. What counts is what rank 0 draws.
    """
    draw = PreTrainedModel._initialize_weights

    def draw_gathered(model: PreTrainedModel, module: nn.Module, *further: Any) -> None:
        own = [module, *(child for child in module.children() if not isinstance(child, PreTrainedModel))]
        drawn = [weight for each in own for weight in each.parameters(recurse=False)]  # some draw their children's
        with deepspeed.zero.GatheredParameters(drawn, modifier_rank=0):
            places = [weight.data for weight in drawn]
            for weight in drawn:
                weight.data = weight.data.cpu()
            draw(model, module, *further)
            for weight, place in zip(drawn, places, strict=True):
                weight.data = place.copy_(weight.data)

    PreTrainedModel._initialize_weights = draw_gathered
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = draw


def _take_precision(model: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Have parts of drawn weights lie as they are trained, as DeepSpeed does with whole ones; buffers go with them."""
    dtype = torch.bfloat16 if "bf16" in config else torch.float16 if "fp16" in config else torch.float32
    for weight in model.parameters():
        if is_apart(weight):
            weight.data, weight.ds_tensor.data = weight.data.to(dtype), weight.ds_tensor.data.to(dtype)  # type: ignore[attr-defined]
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def import_deepspeed(accelerator: str) -> Any:
    """DeepSpeed for ``cpu`` or ``cuda``, without what it would compile, load or ask for in vain."""
    os.environ["DS_ACCELERATOR"] = accelerator
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__ = {}  # else a kernel for tensor-parallel inference is compiled, for minutes
    _import_muon_without_dynamo()
    _describe_cpu_once()
    return deepspeed


def _describe_cpu_once() -> None:
    """Have py-cpuinfo run its programs once: DeepSpeed's CPU Adam asks three times, a second each."""
    import cpuinfo

    if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
        cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


def _import_muon_without_dynamo() -> None:
    """Load DeepSpeed's Muon, which its ZeRO always does, without TorchDynamo.

    Nothing here uses that optimizer, but it is decorated with ``torch.compile``, which loads the whole compiler: over
    2 s of CPU time in each worker.
    """
    before = os.environ.get(DISABLE_DYNAMO)
    os.environ[DISABLE_DYNAMO] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        del os.environ[DISABLE_DYNAMO]
        if before is not None:
            os.environ[DISABLE_DYNAMO] = before


def plain_zero_loading(folder: Path) -> AbstractContextManager[None]:
    """Within it, what DeepSpeed reads of a checkpoint is data: tensors, plain values, and the records that it keeps of
    where they belong and of the loss scale.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return plain_loading(folder, [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])


def to_universal(folder: Path, out: Path) -> None:
    """Rewrite a checkpoint of ZeRO stages 1 and 2 as one that any number of workers can load (arXiv 2406.18820).

    Raises:
        InputError: as ``DeepSpeedEngine.load``.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    with Path(os.devnull).open("w") as devnull, redirect_stdout(devnull), plain_zero_loading(folder):
        main(SimpleNamespace(input_folder=str(folder), output_folder=str(out), strict=True,
                             inject_missing_state=True, **options))  # fmt: skip


def _micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    """A batch in equal parts, row by row."""
    size = len(next(iter(batch.values()))) // count
    for start in range(0, size * count, size):
        yield {name: values[start : start + size] for name, values in batch.items()}
