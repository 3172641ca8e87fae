"""The embedded engine obeys the contract of every engine."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megaopd.errors import UserError
from megaopd.rollout.base import NeedsWeights, Request, SamplingParams
from megaopd.rollout.hf import EmbeddedEngine, law
from tests.dist.models import VOCAB, tiny
from tests.serving import reference as truth
from tests.serving.conformance import EOS, Conformance, weights_of
from tests.serving.reference import many, requests


def embedded(hf_dir: Path, batch_size: int = 300) -> EmbeddedEngine:
    return EmbeddedEngine(
        hf_dir,
        eos_ids=[EOS],
        pad_id=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        batch_size=batch_size,
    )


class TestEmbedded(Conformance):
    @pytest.fixture(scope="class")
    def engine(self, hf_dir: Path, reference: Any) -> EmbeddedEngine:
        engine = embedded(hf_dir)
        engine.update_weights(weights_of(reference), 3)
        return engine

    def test_a_session_cuts_batches_by_size_and_params(self, hf_dir: Path, reference: Any) -> None:
        engine = embedded(hf_dir, batch_size=3)
        session = engine.session()
        one, two = SamplingParams(3), SamplingParams(3, temperature=0.5)
        tickets = [session.submit(r, two if r.index == 1 else one) for r in many(6)]
        with pytest.raises(NeedsWeights):
            session.wait()
        assert session.pending == 6
        engine.update_weights(weights_of(reference), 0)
        batches = [[t for t, _ in session.wait()] for _ in range(3)]
        assert batches == [[tickets[i] for i in ids] for ids in ((0, 2, 3), (1,), (4, 5))]

    def test_an_update_keeps_no_memory_of_the_stream(self, hf_dir: Path, reference: Any) -> None:
        """The trainer goes on changing the tensors that it streamed."""
        engine = embedded(hf_dir)
        stream = [(name, tensor.clone()) for name, tensor in weights_of(reference)]
        engine.update_weights(stream, 1)
        before = engine.generate(requests(), SamplingParams(4))
        for _, tensor in stream:
            tensor.zero_()
        assert engine.generate(requests(), SamplingParams(4)) == before

    @pytest.mark.parametrize("params", [SamplingParams(6), SamplingParams(6, 1.3, 0.9, min_p=0.02)])
    def test_tokens_of_a_mixture_with_a_teacher(
        self, hf_dir: Path, reference: Any, tmp_path: Path, params: SamplingParams
    ) -> None:
        """Log-probs are the mixture's under any padding; a greedy answer is the student's.

        The teacher has fewer ids than the student: the others come from the student alone.
        """
        teacher = tiny("qwen3", tied=False, seed=11, vocab_size=VOCAB - 5)
        teacher.save_pretrained(tmp_path)
        engine = embedded(hf_dir)
        engine.update_weights(weights_of(reference), 0)
        mixed = dataclasses.replace(params, teacher_mix=0.3)
        with pytest.raises(UserError, match="without a teacher"):
            engine.generate(requests(), mixed)
        alone = engine.generate(requests(), params)
        engine.mix_in(tmp_path, weights_of(teacher))
        assert engine.generate(requests(), params) == alone
        assert engine.generate(requests(), mixed.greedy()) == engine.generate(
            requests(), params.greedy()
        )
        told = dataclasses.replace(truth.prompt([1, 2]), teacher_prompt_ids=(3, 1, 2))
        with pytest.raises(UserError, match="prompt of its own"):
            engine.generate([Request(told, 0)], mixed)
        samples = engine.generate(many(200), mixed)
        assert samples[:4] != alone
        shares = []
        for sample in samples:
            start = len(sample.prompt.token_ids)
            ids = torch.tensor([[*sample.prompt.token_ids, *sample.response_ids]])
            p = reference(ids).logits[0, start - 1 : -1]
            q = teacher(ids.clamp_max(VOCAB - 6)).logits[0, start - 1 : -1]
            q = torch.nn.functional.pad(q, (0, 5), value=-torch.inf)
            laws = [torch.stack([truth.law(row, params) for row in x]).exp() for x in (p, q)]
            law_at = (0.7 * laws[0] + 0.3 * laws[1]).gather(1, ids[0, start:, None])[:, 0]
            torch.testing.assert_close(
                law_at.log(), torch.tensor(sample.log_probs), rtol=1e-4, atol=1e-4
            )
            shares += (0.3 * laws[1].gather(1, ids[0, start:, None])[:, 0] / law_at).tolist()
        # The mean of the teacher's posterior share of what was drawn is its share of the mixture.
        assert abs(sum(shares) / len(shares) - 0.3) < 0.05


@pytest.mark.parametrize("top_k", [0, 1, 7, VOCAB, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.9])
def test_the_law_in_a_batch_is_the_plain_one(top_k: int, top_p: float, min_p: float) -> None:
    params = SamplingParams(1, 1.7, top_p, top_k, min_p)
    logits = 3 * torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(3))
    expected = torch.stack([truth.law(row, params) for row in logits])
    made = law(logits, params)
    assert torch.equal(made.isfinite(), expected.isfinite())
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
