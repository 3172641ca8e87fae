from dataclasses import dataclass
import torch
@dataclass
class PaddedBatch:
    tokens: object; position_ids: object; labels: object; loss_mask: object; rollout_log_probs: object; lengths: object
def pad_batch(samples, *, pad_id, multiple_of=1, length=None):
    n = max(len(s.tokens) for s in samples); S = length or -(-n // multiple_of) * multiple_of; N = len(samples)
    tok = torch.full((N, S), pad_id); lab = torch.full((N, S), pad_id); m = torch.zeros(N, S, dtype=torch.bool); lp = torch.zeros(N, S)
    for i, s in enumerate(samples):
        t = torch.tensor(s.tokens); tok[i, :len(t)] = t; lab[i, :len(t) - 1] = t[1:]
        p = len(s.prompt.token_ids); r = len(s.response_ids)
        m[i, p - 1:p - 1 + r] = torch.tensor(s.loss_mask or (1,) * r, dtype=torch.bool)
        if s.log_probs: lp[i, p - 1:p - 1 + r] = torch.tensor(s.log_probs)
    return PaddedBatch(tok, torch.arange(S).expand(N, S), lab, m, lp, torch.tensor([len(s.tokens) for s in samples]))
