"""A remote teacher's scores of one step's samples, laid out for its micro-batches.

Shapes: N samples, S positions of a padded one, R response tokens of one, K entries of a list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megaopd.data.types import Sample
from megaopd.losses import ListedTeacher
from megaopd.losses.remote import ABSENT


@dataclass(frozen=True)
class RemoteScores:
    """What every rank knows of all samples, and the rows of this rank's own share.

    Attributes:
        payload: "topk" or "sampled" (objectives.validate.PAYLOADS).
        support: whose lists: "teacher_topk" or "student_topk"; None without lists.
        k: entries of a list.
        valid: [R] bool of each sample: positions with all that was asked for. On every rank.
        packed: sample -> float32 [R, 1 + 2 K]: log q of the sampled token, log q of the list, its
            ids (int32, bit by bit). Of the data-parallel rank's share; None off the last stage.
        metrics: what it cost, equal on every rank.
    """

    payload: str
    support: str | None
    k: int
    valid: Sequence[Any]
    packed: Mapping[int, Any] | None
    metrics: dict[str, float] = field(default_factory=dict)

    def keep_scored(self, loss_mask_NS: Any, samples: Sequence[Sample]) -> Any:
        """The mask without the tokens that the teacher did not score: they weigh nothing."""
        import torch

        kept = loss_mask_NS.clone()
        for row, (sample, valid) in enumerate(zip(samples, self.valid, strict=False)):
            kept[row, _rows(sample)] &= torch.from_numpy(valid)
        return kept

    def listed(
        self, which: Sequence[int], samples: Sequence[Sample], length: int
    ) -> ListedTeacher | None:
        """Rows of samples `which`, [len(which) * length + 1]; None off the last stage.

        Row j*length + s is token s of sample which[j], the last row that of padding. What was not
        scored is absent, and 0 at the label.
        """
        import torch

        if self.packed is None:
            return None
        table = torch.zeros(len(which) * length + 1, 1 + self.k)
        ids = torch.full((len(table), self.k), ABSENT, dtype=torch.int32)
        for place, index in enumerate(which):
            if index in self.packed:
                own, packed = _rows(samples[index]), self.packed[index]
                rows = slice(place * length + own.start, place * length + own.stop)
                table[rows] = packed[:, : 1 + self.k]
                ids[rows] = packed[:, 1 + self.k :].contiguous().view(torch.int32)
        label = torch.nan_to_num(table[:, 0], nan=0.0)
        if self.support is None:
            return ListedTeacher(label_log_q=label)
        return ListedTeacher(ids, table[:, 1:], label, self.support)


def pack(scores: Any, k: int) -> Any:
    """[R, 1 + 2 K] float32 of rollout.score_tables.TokenScores; lists are filled up to K."""
    import numpy as np
    import torch

    packed = np.full((len(scores.log_q), 1 + 2 * k), np.nan, np.float32)
    packed[:, 0] = scores.log_q
    if k:
        ids = np.full((len(scores.log_q), k), ABSENT, np.int32)
        if scores.ids is not None:
            width = scores.ids.shape[1]
            ids[:, :width] = scores.ids
            packed[:, 1 : 1 + width] = scores.list_log_q
        packed[:, 1 + k :] = ids.view(np.float32)
    return torch.from_numpy(packed)


def _rows(sample: Sample) -> slice:
    """Where a sample's response tokens are predicted."""
    start = len(sample.prompt.token_ids) - 1
    return slice(start, start + len(sample.response_ids))
