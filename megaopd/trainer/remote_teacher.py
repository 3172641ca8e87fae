"""A teacher on SGLang servers: lists and log-probs of tokens in place of hidden states.

Each sample is scored once, by one rank: the leader of the data-parallel rank that trains on it
(tensor rank 0 of the last pipeline stage), or whoever had it earlier and called `submit` as soon as
it was finished. So scoring can run while other samples are still being sampled, and answers are
parsed on as many machines as there are data-parallel ranks. Between ranks scores travel as one
float32 tensor, 4 (1 + 2 K) bytes a token: from a submitter to the leader, and from the leader to
the other tensor ranks of the last stage. Other stages get nothing.

Every rank learns which tokens were scored: token weights are made of all samples of a step, and a
token without a score weighs nothing and is not counted.

Shapes: R response tokens of a sample, K entries of a list.
"""

import asyncio
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megaopd import platform
from megaopd.data.tokenizer import check_same_texts, spread_ids
from megaopd.data.types import Sample
from megaopd.errors import UserError
from megaopd.objectives.remote import check_remote, remote_payload
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.parallel import Grid, gather_objects
from megaopd.rollout.loop import LoopThread
from megaopd.rollout.score_tables import ABSENT, ScoreRequest, TokenScores
from megaopd.rollout.scoring import Scorer, ScoringLimits
from megaopd.trainer.config import RemoteTeacherConfig
from megaopd.trainer.scores import RemoteScores, pack

Key = tuple[str, int, tuple[int, ...]]
COMPARED_IDS = 512  # of the vocabulary, spread over it
_COUNTED = ("tokens", "missing", "entries", "missing_entries")


@dataclass
class _Report:
    """What one rank says of the samples that it scored."""

    error: UserError | None = None
    valid: dict[int, Any] = field(default_factory=dict)  # sample -> [R] bool
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0.0))
    seconds: float = 0.0

    def count(self, sample: Sample, request: ScoreRequest, found: TokenScores) -> None:
        """Sampled tokens and ids of the student, and those that the teacher did not score."""
        mask = sample.loss_mask or (1,) * len(sample.response_ids)
        self.sums["tokens"] += sum(mask)
        self.sums["missing"] += sum(m and not v for m, v in zip(mask, found.valid, strict=True))
        if request.top_ids is not None and found.ids is not None:
            asked = sum(map(len, request.top_ids))
            self.sums["entries"] += asked
            self.sums["missing_entries"] += asked - int((found.ids != ABSENT).sum())


class RemoteTeacher:
    """Scores samples; making it is a collective, as is `score`.

    Args:
        tokenizer: the student's, which the servers' is compared with.

    Raises:
        UserError: a server that does not answer or has another tokenizer, or an objective that it
            cannot serve.
    """

    def __init__(
        self,
        config: RemoteTeacherConfig,
        objective: ObjectiveConfig,
        grid: Grid,
        *,
        tokenizer: Any = None,
    ) -> None:
        check_remote(objective, log_probs=True)
        self.grid = grid
        self.payload = remote_payload(objective)
        self.k = objective.own_k if self.payload == "topk" else 0
        self.of_student = bool(self.k) and objective.lists_of_student
        leads = grid.is_last_stage and grid.tp_rank == 0 and grid.cp_rank == 0
        places = gather_objects(grid.dp_rank if leads else None)
        self.leaders = {dp_rank: rank for rank, dp_rank in enumerate(places) if dp_rank is not None}
        self._pending: dict[Key, Future[TokenScores]] = {}
        self._seen: dict[str, int] = {}
        self.unchecked = ""  # what could not be compared, on rank 0
        self._loop: LoopThread | None = None
        self._scorer: Scorer | None = None
        # Rank 0 too: it speaks to the servers that sample, and has samples as they finish.
        error = self._open(config) if leads or grid.rank == 0 else None
        if error is None and grid.rank == 0 and tokenizer is not None:
            error = self._compare(tokenizer)
        _raise_first(gather_objects(error))

    def _open(self, config: RemoteTeacherConfig) -> UserError | None:
        names = ("batch_tokens", "calls", "timeout_s", "retries", "max_union", "max_entries")
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        self._loop = LoopThread("teacher")
        self._scorer = Scorer(
            config.addresses,
            api_key=key,
            vocab_size=config.vocab_size,
            limits=ScoringLimits(**{name: getattr(config, name) for name in names}),
        )
        try:
            self._loop.run(self._scorer.open())
        except UserError as err:
            return err
        return None

    def _compare(self, tokenizer: Any) -> UserError | None:
        """Whether ids mean the same to the student and to the servers."""
        assert self._loop is not None and self._scorer is not None
        ids = spread_ids(tokenizer, COMPARED_IDS)
        texts = self._loop.run(self._scorer.texts([i for i in ids if i < self._scorer.vocab]))
        if texts is None:
            self.unchecked = (
                "the teacher's servers were started without a tokenizer (or cannot detokenize): "
                "that its ids mean what the student's mean was not checked"
            )
            return None
        try:
            check_same_texts(tokenizer, ids, texts)
        except UserError as err:
            return err
        return None

    def submit(self, samples: Sequence[Sample]) -> None:
        """Begin to score these on this rank, without waiting. Not a collective.

        For finished samples while others are under way; `score` takes up what was begun. Only on
        rank 0 and on leaders.
        """
        assert self._loop is not None and self._scorer is not None, "this rank does not score"
        for sample in samples:
            if _key(sample) not in self._pending:
                future: Future[TokenScores] = Future()
                self._pending[_key(sample)] = future
                self._loop.call(self._begin, sample, future)

    def forget(self, samples: Sequence[Sample]) -> None:
        """Drop what `submit` began for samples that will not be trained on."""
        for sample in samples:
            self._pending.pop(_key(sample), None)

    def _begin(self, sample: Sample, future: "Future[TokenScores]") -> None:
        """On the loop: one sample's task."""
        assert self._scorer is not None
        task = asyncio.ensure_future(self._scorer.score(self._request(sample)))
        task.add_done_callback(partial(_hand_over, future))

    def _request(self, sample: Sample) -> ScoreRequest:
        name = f"sample {sample.index} of prompt {sample.prompt.id!r}"
        top_ids = None
        if self.of_student:
            mask = sample.loss_mask or (1,) * len(sample.response_ids)
            pairs = zip(sample.top_ids or (), mask, strict=False)
            top_ids = tuple(ids[: self.k] if wanted else () for ids, wanted in pairs)
        k = 0 if self.of_student else self.k
        return ScoreRequest(name, sample.teacher_prompt, sample.response_ids, k, top_ids)

    def score(self, samples: Sequence[Sample], shares: Sequence[Sequence[int]]) -> RemoteScores:
        """Scores of a step's samples, the same list on every rank; a collective.

        Args:
            shares: which samples each data-parallel rank trains on (trainer.batch.shares_of).

        Raises:
            UserError: on every rank: samples without the student's ids where the loss is on them,
                a sequence that no server takes, or servers that do not answer.
        """
        self._check_top_ids(samples)
        owners = self._owners(samples, shares)
        mine = [i for i, owner in enumerate(owners) if owner == self.grid.rank]
        report, packed = self._score_mine(samples, mine)
        reports: list[_Report] = gather_objects(report)
        _raise_first(other.error for other in reports)
        valid: dict[int, Any] = {}
        for other in reports:
            valid |= other.valid
        packed = self._exchange(samples, shares, owners, packed)
        return RemoteScores(
            payload=self.payload,
            support=("student_topk" if self.of_student else "teacher_topk") if self.k else None,
            k=self.k,
            valid=[valid[i] for i in range(len(samples))],
            packed=packed,
            metrics=_metrics(reports),
        )

    def _check_top_ids(self, samples: Sequence[Sample]) -> None:
        if not self.of_student:
            return
        bare = next((s for s in samples if len(s.top_ids or ()) != len(s.response_ids)), None)
        if bare is not None:
            raise UserError(
                f"a sample of prompt {bare.prompt.id!r} without the student's most probable ids",
                expected=f"{self.k} ids at each position: the teacher is asked about those",
                fix=f"sample with SamplingParams.top_ids={self.k}, or set "
                "objective.support=teacher_topk",
            )

    def _owners(self, samples: Sequence[Sample], shares: Sequence[Sequence[int]]) -> list[int]:
        """The rank that scores each sample: who began with it, else the leader of its share."""
        begun = gather_objects([i for i, s in enumerate(samples) if _key(s) in self._pending])
        owned = {i: self.leaders[d] for d, share in enumerate(shares) for i in share}
        owners = [owned[i] for i in range(len(samples))]
        for rank in reversed(range(len(begun))):  # where two began, the lower rank
            for i in begun[rank]:
                owners[i] = rank
        return owners

    def _score_mine(
        self, samples: Sequence[Sample], mine: Sequence[int]
    ) -> tuple[_Report, dict[int, Any]]:
        started = time.perf_counter()
        report, packed = _Report(), {}
        if mine:
            self.submit([samples[i] for i in mine])
        for i in mine:
            try:
                found = self._pending[_key(samples[i])].result()
            except UserError as err:
                report.error = err
                break
            report.valid[i] = found.valid
            packed[i] = pack(found, self.k)
            report.count(samples[i], self._request(samples[i]), found)
        self.forget([samples[i] for i in mine])
        report.seconds = time.perf_counter() - started
        for name, value in self._spent().items():
            report.sums[name] = value
        return report, packed

    def _spent(self) -> dict[str, float]:
        """What this rank's scorer did since the last call."""
        if self._scorer is None:
            return {}
        now = {**self._scorer.counts, "bytes": self._scorer.bytes_received}
        spent = {name: float(now[name] - self._seen.get(name, 0)) for name in now}
        self._seen = now
        return spent

    def _exchange(
        self,
        samples: Sequence[Sample],
        shares: Sequence[Sequence[int]],
        owners: Sequence[int],
        packed: dict[int, Any],
    ) -> dict[int, Any] | None:
        """The share of this rank's data-parallel rank on the last stage; None on the others."""
        import torch.distributed as dist

        rank, grid = self.grid.rank, self.grid
        for dp_rank, share in enumerate(shares):
            leader = self.leaders[dp_rank]
            for owner in sorted({owners[i] for i in share} - {leader}):
                some = [i for i in share if owners[i] == owner]
                if rank == owner:
                    dist.send(self._joined(samples, some, packed), leader)
                elif rank == leader:
                    table = self._joined(samples, some, {})
                    dist.recv(table, owner)
                    packed |= self._split(samples, some, table)
        if not grid.is_last_stage:
            return None
        share = list(shares[grid.dp_rank])
        table = self._joined(samples, share, packed)
        if grid.tp_size * grid.cp_size > 1:
            dist.broadcast(table, self.leaders[grid.dp_rank], group=grid.groups.tp_cp)
        return self._split(samples, share, table)

    def _joined(self, samples: Sequence[Sample], which: Sequence[int], packed: Any) -> Any:
        """One tensor of these samples' rows on this rank's device; to be filled where not here."""
        import torch

        if which and all(i in packed for i in which):
            return torch.cat([packed[i] for i in which]).to(platform.device())
        count = sum(len(samples[i].response_ids) for i in which)
        return torch.empty(count, 1 + 2 * self.k, device=platform.device())

    def _split(self, samples: Sequence[Sample], which: Sequence[int], table: Any) -> dict[int, Any]:
        sizes = [len(samples[i].response_ids) for i in which]
        return dict(zip(which, table.cpu().split(sizes), strict=True))

    def close(self) -> None:
        """Drop what is under way. The servers go on."""
        if self._loop is not None and self._scorer is not None:
            self._loop.run(self._scorer.close())
            self._loop.close()


def _key(sample: Sample) -> Key:
    """What a sample keeps while rewards and the like are filled in."""
    return sample.prompt.id, sample.index, sample.response_ids


def _hand_over(future: "Future[TokenScores]", task: "asyncio.Task[TokenScores]") -> None:
    if task.cancelled():
        future.cancel()
    elif (err := task.exception()) is not None:
        future.set_exception(err)
    else:
        future.set_result(task.result())


def _raise_first(errors: Iterable[UserError | None]) -> None:
    """What one rank met, on every rank."""
    for error in errors:
        if error is not None:
            raise error


def _metrics(reports: Sequence[_Report]) -> dict[str, float]:
    """What scoring cost since the last time, by the name that it is logged under."""
    total: dict[str, float] = {}
    for report in reports:
        for name, value in report.sums.items():
            total[name] = total.get(name, 0.0) + value
    names = ("bytes", "calls", "requests", "failed_calls", "prompt_tokens", "cached_tokens")
    metrics = {f"teacher/{name}": total.get(name, 0.0) for name in names}
    metrics["teacher/seconds"] = max(report.seconds for report in reports)
    metrics["teacher/missing"] = total["missing"] / max(total["tokens"], 1.0)
    if total["entries"]:
        metrics["teacher/missing_entries"] = total["missing_entries"] / total["entries"]
    return metrics
