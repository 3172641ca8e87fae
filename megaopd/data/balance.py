"""Which samples share a micro-batch, on which data-parallel rank. No torch here.

A plan is [data-parallel rank][micro-batch] -> indices of samples. Every rank has the same number of
micro-batches, and every process makes the same plan out of the same lengths.
"""

from collections.abc import Sequence

from megaopd.errors import UserError

Plan = list[list[list[int]]]


def padded_plan(count: int, *, ranks: int, micro_batch_size: int, micro_batches_of: int) -> Plan:
    """Samples in order, `micro_batch_size` together; indices from `count` on are fill-up copies.

    Args:
        micro_batches_of: the number of micro-batches of a rank is a multiple of this.
    """
    step = micro_batch_size * micro_batches_of
    share = -(-count // (ranks * step)) * step
    return [
        [
            list(range(i, i + micro_batch_size))
            for i in range(r * share, (r + 1) * share)[::micro_batch_size]
        ]
        for r in range(ranks)
    ]


def packed_plan(lengths: Sequence[int], *, ranks: int, budget: int, micro_batches_of: int) -> Plan:
    """As few micro-batches of at most `budget` tokens as the heuristics find, of even load.

    Longest first into the least loaded bin (longest-processing-time), which balances; where that
    does not fit, longest first into the fullest bin that has room (best-fit decreasing), which
    packs more tightly. Bins then go to the ranks in a snake by load. A bin may be empty.

    Raises:
        UserError: a sample that is longer than the budget.
    """
    if lengths and max(lengths) > budget:
        raise UserError(
            f"a sample of {max(lengths)} tokens with micro-batches of {budget}",
            expected="a budget that holds the longest sample",
            fix="raise trainer.micro_batch_tokens, or lower data.max_prompt_tokens or "
            "rollout.max_new_tokens",
        )
    step = ranks * micro_batches_of
    count = max(step, -(-sum(lengths) // (budget * step)) * step)
    while True:
        bins = _fill(lengths, count, budget, even=True) or _fill(lengths, count, budget, even=False)
        if bins is not None:
            return _deal(bins, lengths, ranks)
        count += step


def _fill(lengths: Sequence[int], count: int, budget: int, *, even: bool) -> list[list[int]] | None:
    """Samples into `count` bins, longest first; None where one found no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [b for b in range(count) if load[b] + lengths[i] <= budget]
        if not room:
            return None
        best = min(room, key=lambda b: (load[b] if even else -load[b], b))
        bins[best].append(i)
        load[best] += lengths[i]
    return [sorted(one) for one in bins]


def _deal(bins: list[list[int]], lengths: Sequence[int], ranks: int) -> Plan:
    """Bins to ranks, the fullest first, there and back again; empty ones come last on a rank."""
    order = sorted(bins, key=lambda one: (-sum(lengths[i] for i in one), one))
    plan: Plan = [[] for _ in range(ranks)]
    for start in range(0, len(order), ranks):
        turn = order[start : start + ranks]
        for rank, one in enumerate(turn if (start // ranks) % 2 == 0 else turn[::-1]):
            plan[rank].append(one)
    return plan
