"""DeepSpeed ZeRO under Lightning, on CUDA and on the CPU (gloo) with the same code.

1. The engine runs in float32 mode: it casts nothing. The frozen base keeps the dtypes it was opened in, trainables and
   optimiser are float32, and bf16-mixed is torch's autocast, as under the other strategies; the engine's config names
   it.
2. At stage 3 the base is sharded block by block while it is read (models/weights.py). LoRA and links are built as
   ordinary tensors, with their values, and then sharded by the engine. Nothing is ever initialised inside `zero.Init`:
   there a later `zeros_` would act on an empty tensor, and training would start from noise.
3. Only this module reads and writes whole tensors of sharded parameters and moments; checkpoints hold no shards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeGuard

import torch
from lightning import LightningModule
from lightning.pytorch.accelerators.cuda import CUDAAccelerator
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from one4d_pl.config import TrainConfig
from one4d_pl.types import Batch

if TYPE_CHECKING:
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    class ShardedParameter(nn.Parameter):
        """A parameter at stage 3, with the attributes that the engine adds to torch's own."""

        ds_tensor: Tensor  # [n], this process's share
        ds_numel: int  # of the whole parameter
        ds_shape: torch.Size
        ds_persist: bool  # kept whole in every process
        ds_status: object  # a ZeroParamStatus
        ds_active_sub_modules: set[int]

        def partition(self, parameters: list[ShardedParameter], has_been_updated: bool) -> None: ...


# LoRA matrices (327 thousand parameters at the 14B) stay whole: gathering each would cost more than the memory is worth
PERSISTENT_PARAMETERS = 1_000_000
BUCKET = 200_000_000  # elements of a reduce or prefetch bucket
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, besides its step


def skip_compilation() -> None:
    """Keep the engine, before it starts on a CPU, from compiling an operation that only inference uses."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ZeroPrecision(DeepSpeedPrecision):
    """The engine's own precision, float32; bf16-mixed is an autocast around the steps."""

    def __init__(self, bfloat16: bool) -> None:
        super().__init__("32-true")
        self.bfloat16 = bfloat16

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module  # unchanged: the base may be bfloat16

    def convert_input(self, batch: Batch) -> Batch:
        return batch  # float32 by construction

    def forward_context(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=self.bfloat16)

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: LightningModule, optimizer: object, *args: object, **kwargs: object
    ) -> None:
        # Lightning has already divided the loss by the accumulation. The engine would divide it
        # again, which Adam would not notice but gradient clipping would.
        model.trainer.model.backward(tensor, scale_wrt_gas=False)  # type: ignore[union-attr,operator]


class ZeroStrategy(DeepSpeedStrategy):
    """A real DeepSpeedEngine at `train.zero_stage` (gloo where there is no CUDA); `timeout` is every collective's."""

    def __init__(self, config: TrainConfig, bfloat16: bool, timeout: timedelta) -> None:
        super().__init__(config=engine_config(config, bfloat16), precision_plugin=ZeroPrecision(bfloat16))
        self._timeout = timeout

    def setup_environment(self) -> None:
        """Set up the processes, also on a CPU, which Lightning's own method refuses."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        skip_compilation()
        # LOCAL_SIZE is the number of processes on this machine. Without it the engine counts NUMA
        # nodes with numactl at every step, and fails where a folder on PATH cannot be read.
        os.environ["LOCAL_SIZE"] = str(len(self.parallel_devices or []))
        # the engine identifies devices by their index
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices or []))]
        DDPStrategy.setup_environment(self)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Enter no `zero.Init` around the module; the module's docstring says why."""
        self._init_config_if_needed()
        yield

    def partitioner(self) -> StagePartitioner | None:
        """Return the partitioner that shards the base while it is read; None below stage 3."""
        assert isinstance(self.config, dict)
        return StagePartitioner(self.config, self.global_rank == 0) if self.zero_stage_3 else None

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        super()._initialize_deepspeed_train(model)
        if self.zero_stage_3:
            coordinator = self.deepspeed_engine.optimizer.parameter_offload.get_param_coordinator()
            BlockKeeper(coordinator).watch(model.transformer.base.blocks)  # type: ignore[union-attr,arg-type]

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        # the engine does not move a model that is sharded already: buffers and metrics would stay
        # on the CPU, and the module would report that as its device
        return model.to(self.root_device)


class StagePartitioner:
    """Shards modules over all processes (ZeRO-3); the values are rank 0's."""

    def __init__(self, config: dict[str, object], reads: bool) -> None:
        self.config, self.reads = config, reads

    def partition(self, module: nn.Module) -> None:
        """Shard a module, a collective. Its parameters become placeholders, gathered when needed."""
        import deepspeed

        deepspeed.zero.Init(module=module, config_dict_or_path=self.config)


class BlockKeeper:
    """Keeps a recomputed block's frozen weights for its backward pass: one gather, not two.

    With activation checkpointing a block runs again in the backward pass. After that the engine
    would free each weight, only to gather it again a moment later for the gradient: a third of all
    traffic. At most one block is kept at a time.
    """

    TOKEN = -1  # marks a kept parameter among the ids of modules that use it, which are never negative

    def __init__(self, coordinator: PartitionedParameterCoordinator) -> None:
        self._release = coordinator._PartitionedParameterCoordinator__release_param
        self._kept: list[ShardedParameter] = []

    def watch(self, blocks: nn.ModuleList) -> None:
        """Begin to keep the weights of these blocks."""
        for block in blocks:
            block.register_forward_pre_hook(self._on_forward)

    def _on_forward(self, block: nn.Module, inputs: tuple[object, ...]) -> None:
        if torch._C._current_graph_task_id() == -1:  # an ordinary forward, not a recomputation
            return
        if not self._kept:  # the last block is released when the backward pass ends
            torch.autograd.Variable._execution_engine.queue_callback(self._release_kept)
        self._release_kept()  # blocks are recomputed one after the other, so the one before is done
        self._kept = [p for p in block.parameters() if _is_stage3(p) and not p.requires_grad and not p.ds_persist]
        for parameter in self._kept:
            parameter.ds_active_sub_modules.add(self.TOKEN)

    def _release_kept(self) -> None:
        kept, self._kept = self._kept, []
        for parameter in kept:
            parameter.ds_active_sub_modules.discard(self.TOKEN)
            self._release(parameter)  # does nothing while a module uses it


def engine_config(config: TrainConfig, bfloat16: bool) -> dict[str, object]:
    """Make DeepSpeed's config; Lightning adds batch size, accumulation and clipping."""
    zero: dict[str, object] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET,
        "overlap_comm": False,  # only the adapter has gradients, so there is little traffic to hide
        "contiguous_gradients": True,
    }
    if config.zero_stage == 3:
        zero |= {"stage3_param_persistence_threshold": PERSISTENT_PARAMETERS, "stage3_prefetch_bucket_size": BUCKET}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if config.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    engine: dict[str, object] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, as under every strategy; DeepSpeed's needs a compiler
        "zero_force_ds_cpu_optimizer": False,
    }
    if bfloat16:
        # On CUDA, and only there, the engine notices our autocast around it and, unless its config names one, switches
        # it off inside. The empty list makes it reduce gradients in float32, as under the other strategies.
        engine["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return engine


def whole_parameter(parameter: nn.Parameter) -> Tensor:
    """Return a trainable's whole value under any strategy; a collective if sharded."""
    if _is_stage3(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.detach()  # below stage 3 every process holds it


def link_moments(optimizer: torch.optim.Optimizer) -> None:
    """Let `whole_moment` find every group's moments; to be called once the optimiser has state.

    Below stage 3 the engine links parameters to moments only once: after its first step of the
    first group, when the later groups have no moments yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False  # type: ignore[attr-defined]
        optimizer._lazy_init_hp_params_optimizer_state()


def whole_moment(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, moment: str) -> Tensor:
    """Return a trainable's whole optimiser moment under any strategy; a collective if sharded."""
    if _is_sharded(parameter):
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment)
    return optimizer.state[parameter][moment]


def fill_optimizer(
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    moments: Callable[[int, str], Tensor],  # (index into parameters, one of MOMENTS) -> whole tensor
) -> None:
    """Give a fresh AdamW the moments of a run after `step` steps; every process keeps its share."""
    if not _is_sharded(parameters[0]):
        for i, parameter in enumerate(parameters):
            state = {m: moments(i, m).to(parameter.device, copy=True) for m in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}
        return
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    inner = optimizer.optimizer  # type: ignore[attr-defined]  # torch's AdamW over flat shards
    stage3 = _is_stage3(parameters[0])
    flats = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups  # type: ignore[attr-defined]
    for flat in flats:
        zeros = {m: torch.zeros_like(flat) for m in MOMENTS}
        inner.state[flat] = {"step": torch.tensor(float(step)), **zeros}
    link_moments(optimizer)
    for i, parameter in enumerate(parameters):
        for moment in MOMENTS:
            whole = moments(i, moment).to(flats[0].device)
            if not stage3:
                safe_set_full_optimizer_state(parameter, whole, moment)
                continue
            safe_set_local_optimizer_state(parameter, cut_share(parameter, whole), moment)


def local_share(parameter: nn.Parameter) -> Tensor:
    """Return this process's part of a trainable, to read and write: all of it, or at stage 3 a flat share [n]."""
    return parameter.ds_tensor if _is_stage3(parameter) else parameter.detach()


def cut_share(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Cut from a whole tensor, shaped as the trainable, the part that `local_share` is of it."""
    if not _is_stage3(parameter):
        return whole
    # the share of the last process may end in padding
    share = whole.new_zeros(parameter.ds_tensor.numel())
    start = len(share) * torch.distributed.get_rank()
    mine = whole.flatten()[start : start + len(share)]
    share[: len(mine)] = mine
    return share


def gather_share(parameter: nn.Parameter, share: Tensor) -> Tensor:
    """Undo `cut_share`; a collective if the parameter is sharded."""
    if not _is_stage3(parameter):
        return share
    share = share.to(parameter.device)  # an offloaded share lies in host memory
    parts = [torch.empty_like(share) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, share)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


def show_shares(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Make all processes compute with shares just written; a collective at stage 3, where some are held whole."""
    sharded = [p for p in parameters if _is_stage3(p)]
    if not sharded:
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    stale = [p for p in sharded if p.ds_status == ZeroParamStatus.AVAILABLE]
    if stale:
        stale[0].partition(stale, has_been_updated=False)
    persistent = optimizer.persistent_parameters  # type: ignore[attr-defined]
    if persistent:
        persistent[0].all_gather(persistent)


def _is_stage3(parameter: nn.Parameter) -> TypeGuard[ShardedParameter]:
    """Tell whether ZeRO-3 shards the parameter."""
    return hasattr(parameter, "ds_id")


def _is_sharded(parameter: nn.Parameter) -> bool:
    """Tell whether the parameter's moments are sharded, as they are from stage 1 on."""
    return _is_stage3(parameter) or hasattr(parameter, "_hp_mapping")
