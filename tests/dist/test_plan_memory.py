"""The planner against live tensors and counted collectives of real updates."""

import pytest

from megaopd.parallel import ParallelConfig
from megaopd.plan.communication import step_traffic
from tools.bench.measure import Collectives
from tools.bench.updates import Case, compare, measure_update, planned
from tools.check_plan import HELD_OUT

SMALL = (
    Case("tp2 sp", ParallelConfig(tensor=2, sequence=True), world=2, layers=2, vocab=4096),
    Case("pp2 full", ParallelConfig(pipeline=2), world=2, recompute="full", vocab=2048,
         sequence=384, response=256),
)  # fmt: skip


def check(ranks, case):
    for one in ranks.run(compare, case.world, case, timeout=300):
        assert abs(one["error"]) < 0.1, one
        resident = one["predicted"]["resident"] / one["measured"]["resident"]
        assert resident == pytest.approx(1, abs=0.02), one


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_predicted_peaks_are_within_ten_percent(ranks, case):
    check(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", HELD_OUT, ids=lambda case: case.name)
def test_predicted_peaks_of_every_layout(ranks, case):
    check(ranks, case)


def counted_update(case):
    """Bytes of hidden states that this rank gave to all-reduces in two updates."""
    with Collectives() as seen:
        measure_update(case)
    widths = (case.hidden, case.teacher_hidden)
    calls = [call for call in seen.calls if call.name == "all_reduce" and len(call.shape) > 1]
    return sum(call.nbytes for call in calls if call.shape[-1] in widths)


def test_tensor_parallel_traffic_is_what_the_ranks_send(ranks):
    case = Case("tp2", ParallelConfig(tensor=2), world=2, layers=2, vocab=2048)
    counted = ranks.run(counted_update, 2, case, timeout=300)[0]
    names = ("student tensor", "teacher tensor", "student embedding", "teacher embedding")
    sent = {one.name: one.sent for one in step_traffic(planned(case))}
    # In an all-reduce of n bytes over two ranks a ring sends n: 2 (R - 1) / R.
    predicted = sum(sent[name] for name in (*names, "loss hidden states"))
    assert counted == pytest.approx(2 * predicted, rel=0.01)
