"""The dense truth in fp64, once for each shape and objective, kept in files that all ranks read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopd.losses import reference

from .cases import Inputs

ROWS = 64  # tokens whose fp64 logits are held at once; autograd runs over each block


@dataclass(frozen=True)
class Truth:
    """Loss and its gradients with respect to hidden states [T, H] and the whole weight [V, H]."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


def dense_truth(inputs: Inputs, objective: dict[str, Any]) -> Truth:
    """Autograd through the full logits of each token; the blocks only bound the memory."""
    student, teacher = (w.detach().double() for w in (inputs.weight, inputs.teacher_weight))
    student.requires_grad_()
    hidden = inputs.hidden.detach().double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for a in range(0, hidden.shape[0], ROWS):
        rows = slice(a, a + ROWS)
        s = hidden[rows] @ student.t()
        t = inputs.teacher_hidden[rows].double() @ teacher.t()
        part = inputs.token_weights[rows].double() @ reference.divergence(s, t, **objective)
        part.backward()
        loss += part.detach()
    assert hidden.grad is not None and student.grad is not None
    return Truth(loss, hidden.grad, student.grad)


class Truths:
    """A folder of truths by shape, dtype and objective."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, inputs: Inputs, objective: dict[str, Any]) -> Path:
        sizes = inputs.shape.tokens, inputs.shape.hidden, inputs.shape.vocab
        key = repr((sizes, inputs.hidden.dtype, sorted(objective.items())))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"

    def prepare(self, inputs: Inputs, objective: dict[str, Any]) -> None:
        """Compute what is not there yet; `inputs` hold the whole vocabulary."""
        path = self._path(inputs, objective)
        if not path.exists():
            torch.save(vars(dense_truth(inputs, objective)), path)

    def load(self, inputs: Inputs, objective: dict[str, Any]) -> Truth | None:
        """The truth, with the rows of the weight gradient that this rank holds."""
        path = self._path(inputs, objective)
        if not path.exists():
            return None
        truth = Truth(**torch.load(path, mmap=True))
        rows = inputs.weight.shape[0]
        mine = truth.weight[inputs.rank * rows : (inputs.rank + 1) * rows]
        return Truth(truth.loss, truth.hidden, mine)
