"""Jobs through a teacher's own pipeline: sequences in, the wanted hidden rows out.

Shapes: B sequences of a job, S their padded length, R rows for one receiver.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from megaopd import platform
from megaopd.data.packing import round_up, split_source
from megaopd.parallel import Grid
from megaopd.trainer.batch import MicroBatch
from megaopd.trainer.step import forward_micro_batch, run_schedule
from megaopd.trainer.teachers.wants import Job

# deliver(job, [(student rank, [R, Ht])]): the receivers that this tensor rank sends to.
Deliver = Callable[[Job, list[tuple[int, Any]]], None]


def sender_of(receiver: int, tp_size: int) -> int:
    """The tensor rank that sends to the student's rank `receiver`: they share the work, also where
    each job has one receiver, and on the same ranks most rows stay where they are."""
    return receiver % tp_size


def run_jobs(
    model: Any,
    grid: Grid,
    jobs: Sequence[Job],
    sequences: Sequence[Sequence[int]],
    deliver: Deliver,
) -> None:
    """Score this replica's jobs; a collective over its ranks.

    On the last stage `deliver` is called job by job, in order, as soon as each is scored; it may
    wait, and the stages before wait with it.
    """
    import torch

    if not jobs:
        return
    longest = {job: max(len(sequences[i]) for i in job.samples) for job in jobs}
    count, length = max(len(job.samples) for job in jobs), max(longest.values())
    multiple = (grid.tp_size if grid.config.sequence else 1) * grid.config.pad_multiple
    inputs = []
    for job in jobs:
        # Between stages only tensors of one shape travel.
        shape = (count, length) if grid.pp_size > 1 else (len(job.samples), longest[job])
        inputs.append((padded(job, sequences, *shape, multiple), job))

    def forward_step(iterator: Iterator[Any], stage: Any) -> tuple[Any, Any]:
        micro, job = next(iterator)
        return forward_micro_batch(stage, micro), partial(collect, job, micro.tokens.shape[0])

    def collect(job: Job, count: int, hidden: Any, non_loss_data: bool = True) -> None:
        hidden = whole_sequence(hidden, grid).reshape(-1, hidden.shape[-1])
        mine = [
            (rank, pick(hidden, rows, job, count))
            for rank, rows in job.receivers
            if sender_of(rank, grid.tp_size) == grid.tp_rank
        ]
        deliver(job, mine)

    with torch.no_grad():
        run_schedule(model, grid, inputs, forward_step, forward_only=True, collect=True)


def padded(
    job: Job, sequences: Sequence[Sequence[int]], count: int, length: int, multiple: int
) -> MicroBatch:
    """The job's sequences as one micro-batch, padded on the right (causal: no mask needed)."""
    import torch

    length = round_up(length, multiple)
    tokens = torch.zeros(count, length, dtype=torch.int64)
    for row, index in enumerate(job.samples):
        tokens[row, : len(sequences[index])] = torch.tensor(sequences[index])
    device = platform.device()
    return MicroBatch(
        tokens=tokens.to(device),
        position_ids=torch.arange(length, device=device).expand(count, length).contiguous(),
        rows=None,
        labels_T=None,
        weights_T=None,
        mask_T=None,
        rollout_log_probs_T=None,
        has_rollout_log_probs=False,
    )


def whole_sequence(hidden: Any, grid: Grid) -> Any:
    """[S/TP, B, H] of a sequence-parallel teacher -> [S, B, H]."""
    import torch.distributed as dist

    if not grid.config.sequence or grid.tp_size == 1:
        return hidden
    whole = hidden.new_empty(hidden.shape[0] * grid.tp_size, *hidden.shape[1:])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=grid.groups.tp)
    return whole


def pick(hidden: Any, rows: Any, job: Job, count: int) -> Any:
    """[S*B, H] -> [R, H]: the rows that one receiver wants, zeros where it wants nothing."""
    import torch

    place = {sample: column for column, sample in enumerate(job.samples)}
    wanted = rows >= 0
    samples, positions = split_source(rows)
    column = torch.tensor([place.get(i, 0) for i in samples.tolist()], dtype=torch.int64)
    flat = torch.where(wanted, positions * count + column, 0)
    found = hidden.index_select(0, flat.to(hidden.device))
    if not bool(wanted.all()):
        found[~wanted.to(hidden.device)] = 0
    return found


@contextmanager
def inference(chunks: Sequence[Any]) -> Iterator[None]:
    """A model that is trained elsewhere (its chunks) is a teacher, and comes out as it went in.

    Modes come back, and so do buffers and Transformer Engine's FP8 state: a forward pass on live
    weights must not enter the amax history that the student's own scaling reads.
    """
    import torch

    modules = [module for chunk in chunks for module in chunk.modules()]
    training = [module for module in modules if module.training]
    kept = [(tensor, tensor.clone()) for tensor in _state_tensors(modules)]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


def _state_tensors(modules: Sequence[Any]) -> list[Any]:
    """Buffers, and the tensors of every module's fp8_meta."""
    import torch

    found = []
    for module in modules:  # not model.buffers(): megatron-core's DDP means its own by it
        found += [tensor for tensor in module._buffers.values() if tensor is not None]
        meta = getattr(module, "fp8_meta", None)
        for recipe in (meta or {}).values() if isinstance(meta, dict) else ():
            for name in ("scale", "scale_inv", "amax_history"):
                tensor = getattr(recipe, name, None)
                if isinstance(tensor, torch.Tensor):
                    found.append(tensor)
    return found
