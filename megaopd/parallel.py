"""Process groups: one grid of tensor, pipeline and data parallel ranks, and who am I in it.

megatron-core takes a ProcessGroupCollection in its models, schedules, DDP and optimizer; a few of
its functions still read the global parallel_state, so the grid is made there and handed on as a
collection.
"""

import gc
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from megaopd import platform
from megaopd.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is laid out over ranks; data parallel is what remains of the world size."""

    section: ClassVar[str] = "parallel"  # of the configuration, for messages

    tensor: int = 1  # tensor parallel size: attention heads, MLP and vocabulary are split
    pipeline: int = 1  # pipeline parallel size: layers are split
    virtual: int = 1  # interleaved pipeline: model chunks of every stage
    context: int = 1  # context parallel size: every sequence is split
    expert: int = 1  # expert parallel size: experts are split over the ranks of a pipeline stage
    sequence: bool = False  # sequence parallel: norms and residuals are split over the tensor ranks
    # Each rank's part of a sequence is padded to a multiple of this: FP8 on a GPU needs 16,
    # blockwise 128, mxfp8 32.
    pad_multiple: int = 1
    timeout_minutes: int = 30  # a collective that waits longer than this ends the run

    def __post_init__(self) -> None:
        at = self.section
        sizes = ("tensor", "pipeline", "virtual", "context", "expert")
        for name in (*sizes, "pad_multiple", "timeout_minutes"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{at}.{name} = {getattr(self, name)}", expected="an integer of at least 1"
                )
        if self.sequence and self.tensor == 1:
            raise UserError(
                f"{at}.sequence = true with {at}.tensor = 1",
                expected="sequence parallel splits over tensor ranks, of which there is one",
                fix=f"set {at}.tensor=2 or more, or {at}.sequence=false",
            )
        if self.virtual > 1 and self.pipeline == 1:
            raise UserError(
                f"{at}.virtual = {self.virtual} with {at}.pipeline = 1",
                expected="an interleaved schedule needs several pipeline stages",
                fix=f"set {at}.pipeline=2 or more, or {at}.virtual=1",
            )

    @property
    def model_parallel(self) -> int:
        """Ranks that work on one sequence: one copy of the model, times context parallel."""
        return self.tensor * self.pipeline * self.context

    @property
    def sequence_multiple(self) -> int:
        """What the length of a row is a multiple of, so that every rank gets as much of it."""
        halves = 2 * self.context if self.context > 1 else 1
        part = self.tensor if self.sequence else 1  # that a rank's layers compute on
        padded = self.context * part * self.pad_multiple
        return math.lcm(halves, self.context * self.tensor, padded)

    @property
    def least_ranks(self) -> int:
        """The fewest ranks of this layout, and what their number is a multiple of: experts are
        split over all ranks of a pipeline stage."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert)


@dataclass(frozen=True)
class Grid:
    """This rank's place in the grid, and the groups to hand to megatron-core."""

    config: ParallelConfig
    groups: Any  # megatron.core.process_groups_config.ProcessGroupCollection
    tp_rank: int
    pp_rank: int
    dp_rank: int  # without context parallel: which samples are this rank's
    dp_size: int
    cp_rank: int
    ep_rank: int
    rank: int
    world_size: int

    @property
    def tp_size(self) -> int:
        return self.config.tensor

    @property
    def pp_size(self) -> int:
        return self.config.pipeline

    @property
    def cp_size(self) -> int:
        return self.config.context

    @property
    def ep_size(self) -> int:
        return self.config.expert

    @property
    def vp_size(self) -> int:
        return self.config.virtual

    @property
    def sequence_multiple(self) -> int:
        """What the length of a row is a multiple of, so that every rank gets as much of it."""
        return self.config.sequence_multiple

    @property
    def segment_multiple(self) -> int:
        """What the length of each packed sequence is a multiple of: see `zigzag`."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def micro_batches_of(self) -> int:
        """What the number of micro-batches is a multiple of: an interleaved schedule's groups."""
        return self.pp_size if self.vp_size > 1 else 1

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def stage_ranks(self) -> list[int]:
        """Global ranks of this pipeline group, first stage first."""
        import torch.distributed as dist

        return dist.get_process_group_ranks(self.groups.pp)

    def barrier(self) -> None:
        """Wait for every rank of the job."""
        import torch.distributed as dist

        dist.barrier()


def init_distributed(timeout_minutes: int = 30) -> None:
    """Join the torchrun rendezvous, or make a world of one. Safe to call again."""
    import torch.distributed as dist

    c10d: Any = dist  # HashStore is not in its public stubs
    platform.install()
    if dist.is_initialized():
        return
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    store = None
    if "MASTER_ADDR" not in os.environ:
        store = c10d.HashStore()
    dist.init_process_group(
        platform.backend(),
        store=store,
        rank=int(os.environ["RANK"]) if store else -1,
        world_size=int(os.environ["WORLD_SIZE"]) if store else -1,
        timeout=timedelta(minutes=timeout_minutes),
    )


def leave_distributed() -> None:
    """End a world of one and its groups, whose threads would stay; the next grid makes a new one.

    For processes that do many runs. Ranks of a launcher keep their world: nothing happens there.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or "MASTER_ADDR" in os.environ:
        return
    from megatron.core import parallel_state as mpu

    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()  # models and optimizers hold groups in reference cycles


def make_grid(config: ParallelConfig, *, seed: int = 1234) -> Grid:
    """Lay the world out as `config` says (replacing an earlier layout) and seed the RNG tracker.

    Raises:
        UserError: the world size is not a multiple of what the layout needs.
    """
    import torch.distributed as dist

    init_distributed(config.timeout_minutes)
    from megatron.core import parallel_state as mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    world = dist.get_world_size()
    if world % config.model_parallel:
        raise UserError(
            f"world size {world} with tensor={config.tensor} x pipeline={config.pipeline} x "
            f"context={config.context}",
            expected=f"a multiple of {config.model_parallel} ranks",
            fix=f"start {config.model_parallel} (or a multiple) ranks, or change [parallel]",
        )
    if (world // config.pipeline) % config.expert:
        raise UserError(
            f"world size {world} with expert={config.expert}",
            expected="experts are split over the ranks of one pipeline stage",
            fix=f"use an expert size that divides {world // config.pipeline}",
        )
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        config.tensor,
        config.pipeline,
        config.virtual if config.virtual > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        # No tensor rank splits an expert: each of them holds whole ones.
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=platform.has_gpu(),
        distributed_timeout_minutes=config.timeout_minutes,
    )
    model_parallel_cuda_manual_seed(seed)
    return Grid(
        config=config,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        ep_rank=mpu.get_expert_model_parallel_rank(),
        rank=dist.get_rank(),
        world_size=world,
    )


def as_chunks(model: Any) -> list[Any]:
    """A pipeline stage that is one model, as the list of it; a list of chunks as it is."""
    return list(model) if isinstance(model, list | tuple) else [model]


def zigzag(bounds: Sequence[int], rank: int, size: int) -> "torch.Tensor":
    """Which positions of a row a context-parallel rank holds: [S / size], in its own order.

    Each sequence [bounds[i], bounds[i+1]) is cut into 2 x size chunks, of which rank r holds chunk
    r and chunk 2 size - 1 - r, so that all have as much causal attention to do. This is also the
    order of Transformer Engine.
    """
    import torch

    parts = []
    for start, stop in pairwise(bounds):
        chunk, rest = divmod(stop - start, 2 * size)
        assert rest == 0, f"a sequence of {stop - start} tokens over {size} context-parallel ranks"
        for index in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
    return torch.cat(parts)


def sum_from_last_stage(values: "torch.Tensor", grid: Grid) -> "torch.Tensor":
    """All-reduce `values` over the world, counting each data-parallel rank's last stage once.

    Losses exist on the last pipeline stage, equal on all its tensor ranks; every rank gets the sum.
    Context-parallel ranks hold different tokens: each of them counts.
    """
    import torch
    import torch.distributed as dist

    counts = grid.is_last_stage and grid.tp_rank == 0
    total = values.detach().clone() if counts else torch.zeros_like(values)
    dist.all_reduce(total)
    return total


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's `obj`, by rank. For small host objects such as samples."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: Any) -> Any:
    """Rank 0's `obj` on every rank. For small host objects such as samples."""
    import torch.distributed as dist

    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]
