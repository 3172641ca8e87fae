"""A second model that reads along while the embedded engine samples, for a mixture of two laws.

MiniLLM (arXiv 2306.08543, section 2.2) draws from (1 - a) student + a teacher: its samples hold
fewer of the student's own degenerate stretches. The importance weight student / mixture is the
usual one, of the trainer's log-prob over that of the law that was sampled from (objective.tis).

Shapes: B batch, P positions so far, V the student's vocabulary.
"""

import math
from typing import Any

import torch


class ReadAlong:
    """Next-token logits of a model whose tokens somebody else's generate() chooses.

    Args:
        model: a transformers causal language model.
        mask: [B, P0] of the left-padded prompts, 1 where there is a token.
    """

    def __init__(self, model: Any, mask: torch.Tensor) -> None:
        self.model, self.mask = model, mask
        self.cache: Any = None

    def __call__(self, input_ids: torch.Tensor, vocab: int) -> torch.Tensor:
        """[B, P] of all tokens so far, one more than at the last call -> [B, vocab] in fp32.

        Ids that the model does not have (padding of the student's) are impossible in its law, and
        read as its last one; those beyond `vocab` are left out.
        """
        new = input_ids if self.cache is None else input_ids[:, -1:]
        if self.cache is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        out = self.model(
            input_ids=new.clamp_max(self.model.config.vocab_size - 1),
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        logits = out.logits[:, -1, :vocab].float()
        missing = vocab - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)


def mixture(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> torch.Tensor:
    """log((1 - share) p + share q) of log-probs [B, V], share in (0, 1)."""
    return torch.logaddexp(log_p + math.log1p(-share), log_q + math.log(share))
