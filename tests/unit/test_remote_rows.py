"""How a remote teacher's scores become the rows of micro-batches, padded, packed or split."""

import itertools

import numpy as np
import pytest
import torch

from megaopd import platform
from megaopd.data.types import Prompt, Sample, Span
from megaopd.parallel import Grid, ParallelConfig
from megaopd.rollout.score_tables import TokenScores
from megaopd.trainer.batch import make_micro_batches, plan_step, shares_of
from megaopd.trainer.scores import RemoteScores, pack


def grid(tp=1, dp_rank=0, dp_size=1, sequence=False, cp=1, cp_rank=0):
    config = ParallelConfig(tp, sequence=sequence, context=cp)
    return Grid(config, None, 0, 0, dp_rank, dp_size, cp_rank, 0, 0, 1)


def sample(i, prompt, response, **more):
    p = Prompt(f"p{i}", tuple(range(1, prompt + 1)), "", None, "", {})
    ids = tuple(10 * i + j for j in range(response))
    return Sample(p, ids, (-1.0,) * response, "stop", 0, spans=(Span(0, 0, response),), **more)


def scores(samples, k, support, share=None):
    """log q = -(10 i + t) - entry / 100; list ids 100 i + 10 t + entry."""
    packed, valid = {}, []
    for i, s in enumerate(samples):
        count = len(s.response_ids)
        at = np.arange(count)
        log_q = -(10.0 * i + at).astype(np.float32)
        entry = np.arange(k)
        ids = (100 * i + 10 * at[:, None] + entry).astype(np.int32)
        lists = (log_q[:, None] - entry / 100).astype(np.float32)
        found = TokenScores(log_q, ids, lists) if k else TokenScores(log_q)
        if i == 1 and count:
            found.log_q[0] = np.nan
        if k and i == 2:
            found.ids[-1] = -1
        valid.append(found.valid)
        if share is None or i in share:
            packed[i] = pack(found, k)
    return RemoteScores("topk" if k else "sampled", support, k, valid, packed)


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("budget", [0, 16])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_rows_are_aligned_and_unscored_tokens_weigh_nothing(k, dp_size, sequence, budget, cp):
    samples = [sample(0, 3, 4), sample(1, 1, 3), sample(2, 5, 2), sample(3, 2, 0), sample(4, 2, 3)]
    tp = 2 if sequence else 1
    cut = {"micro_batch_size": 1 if budget else 2, "micro_batch_tokens": budget}
    if budget:
        platform.install()  # megatron-core describes packed rows
    seen, total = 0, 0.0
    for dp_rank, cp_rank in itertools.product(range(dp_size), range(cp)):
        place = grid(tp, dp_rank, dp_size, sequence, cp, cp_rank)
        share = shares_of(plan_step(samples, grid=place, **cut), len(samples))[dp_rank]
        remote = scores(samples, k, "teacher_topk" if k else None, share)
        for micro in make_micro_batches(
            samples, grid=place, **cut, pad_id=0, loss_agg="token-mean", remote=remote
        ):
            assert micro.payload == remote.payload and micro.remote is not None
            rows = len(micro.labels_T)
            assert all(len(x) == rows for x in micro.remote.rows().values())
            total += float(micro.weights_T.sum())
            for row in micro.mask_T.nonzero()[:, 0].tolist():
                label = int(micro.labels_T[row])
                i, t = divmod(label, 10)
                seen += 1
                assert micro.rollout_log_probs_T[row] == -1.0
                assert micro.remote.label_log_q[row] == -(10 * i + t)
                if k:
                    assert micro.remote.ids[row].tolist() == [
                        100 * i + 10 * t + e for e in range(k)
                    ]
            assert (micro.weights_T[~micro.mask_T] == 0).all()
            assert micro.remote.label_log_q.isfinite().all()
    # 12 response tokens; not scored: the second sample's first and, of lists, the third's last.
    assert seen == (10 if k else 11) and total == pytest.approx(1.0)


def test_other_stages_get_no_rows_and_count_alike():
    samples = [sample(0, 3, 4), sample(1, 1, 3)]
    full = scores(samples, 2, "student_topk")
    bare = RemoteScores("topk", "student_topk", 2, full.valid, None)
    options = {
        "grid": grid(),
        "micro_batch_size": 1,
        "pad_id": 0,
        "loss_agg": "seq-mean-token-mean",
    }
    with_rows = make_micro_batches(samples, **options, remote=full)
    without = make_micro_batches(samples, **options, remote=bare)
    for a, b in zip(with_rows, without, strict=True):
        assert b.remote is None and b.payload == "topk" and a.remote.support == "student_topk"
        assert torch.equal(a.weights_T, b.weights_T)
