"""What every rollout engine must do. `Conformance` takes an engine and a reference model.

A subclass gives the fixture `engine` (scope "class"): loaded with the weights of `reference`, which
`hf_dir` holds, as version 3; its end token is EOS. Every test leaves version 3 behind.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megaopd.errors import UserError
from megaopd.rollout.base import NeedsWeights, Request, SamplingParams
from tests.dist.models import VOCAB
from tests.serving.reference import (
    EOS,
    POSITIONS,
    check_samples,
    law,
    many,
    model,
    prompt,
    requests,
    weights_of,
)
from tests.serving.sessions import SessionConformance

__all__ = ["EOS", "POSITIONS", "Conformance", "model", "requests", "weights_of"]


class Conformance(SessionConformance):
    """Inherit and give `engine`; say in the class variables what it cannot do."""

    @pytest.fixture(scope="class")
    def hf_dir(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        where = tmp_path_factory.mktemp("engine") / "model"
        model().save_pretrained(where)
        return where

    @pytest.fixture(scope="class")
    def reference(self, hf_dir: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(hf_dir).eval()

    @pytest.fixture(scope="class")
    def other(self) -> Any:
        """A model of the same shape with other weights."""
        return model(seed=99)

    def check_law(self, reference: Any, samples: Any, params: SamplingParams) -> None:
        """Every reported log-prob is that of the law, by the reference model's own forward."""
        assert all(s.spans for s in samples)
        models = {s.spans[0].version: reference for s in samples}
        check_samples(models, samples, params, self.tolerance)

    def test_greedy_equals_transformers(self, engine: Any, reference: Any) -> None:
        params = SamplingParams(max_new_tokens=12, temperature=0.0)
        samples = engine.generate(requests(), params)
        for sample in samples:
            ids = torch.tensor([sample.prompt.token_ids])
            out = reference.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
            expected = out.tolist()
            if EOS in expected:
                expected = expected[: expected.index(EOS) + 1]
            assert list(sample.response_ids) == expected
        self.check_law(reference, samples, params)

    def test_greedy_ignores_the_cuts(self, engine: Any, reference: Any) -> None:
        """Temperature 0 with top-p and the others set is plain greedy, log-probs and all."""
        params = SamplingParams(8, temperature=0.0, top_p=0.5, top_k=3, min_p=0.2)
        samples = engine.generate(requests(), params)
        plain = engine.generate(requests(), SamplingParams(8).greedy())
        assert [s.response_ids for s in samples] == [s.response_ids for s in plain]
        self.check_law(reference, samples, params)

    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(10),
            SamplingParams(10, temperature=0.7),
            SamplingParams(10, top_k=5),
            SamplingParams(10, top_k=1),
            SamplingParams(10, top_p=0.8),
            SamplingParams(10, temperature=2.0, min_p=0.1),
            SamplingParams(10, temperature=1.5, top_k=20, top_p=0.6),
            SamplingParams(10, temperature=2.0, top_k=10, top_p=0.7, min_p=0.05),
            SamplingParams(10, temperature=2.0, top_p=0.6, min_p=0.1),
        ],
        ids=lambda p: f"T{p.temperature:g}-k{p.top_k}-p{p.top_p:g}-m{p.min_p:g}",
    )
    def test_log_probs_are_of_the_law_sampled_from(
        self, engine: Any, reference: Any, params: SamplingParams
    ) -> None:
        self.check_law(reference, engine.generate(many(12), params), params)

    def test_records(self, engine: Any) -> None:
        params = SamplingParams(max_new_tokens=6)
        wanted = [Request(r.prompt, r.seed, index=i + 5) for i, r in enumerate(requests())]
        samples = engine.generate(wanted, params)
        assert [s.prompt for s in samples] == [r.prompt for r in wanted]
        assert [s.index for s in samples] == [5, 6, 7, 8]
        for sample in samples:
            assert sample.weight_version == sample.newest_version == 3
            assert [(s.start, s.end) for s in sample.spans] == [(0, len(sample.response_ids))]
            stopped = sample.response_ids[-1] == EOS
            assert sample.finish_reason == ("stop" if stopped else "length")
            assert EOS not in sample.response_ids[:-1]
            assert stopped or len(sample.response_ids) == 6
            assert sample.top_ids is None and sample.reward is None and sample.loss_mask is None

    def test_nothing_to_do(self, engine: Any) -> None:
        assert engine.generate([], SamplingParams(4)) == []

    def test_a_response_may_fill_the_context(self, engine: Any, reference: Any) -> None:
        """Prompt and response of exactly as many tokens as the model has positions."""
        params = SamplingParams(24, temperature=0.5)
        long = [Request(prompt([3 + i] * (POSITIONS - 24)), i) for i in range(3)]
        samples = engine.generate(long, params)
        assert any(len(s.tokens) == POSITIONS for s in samples)
        for sample in samples:
            stopped = sample.response_ids[-1] == EOS
            assert stopped or (len(sample.response_ids), sample.finish_reason) == (24, "length")
        self.check_law(reference, samples, params)

    def test_stops_at_the_end_token(self, engine: Any) -> None:
        """Many samples: some must stop early, and the end token is part of the response."""
        samples = engine.generate(many(200), SamplingParams(20, temperature=5.0))
        stopped = [s for s in samples if s.finish_reason == "stop"]
        assert stopped and all(s.response_ids[-1] == EOS for s in stopped)
        assert any(len(s.response_ids) < 20 for s in stopped)

    def test_stops_at_other_tokens_too(self, engine: Any, reference: Any) -> None:
        params = SamplingParams(20, temperature=3.0, stop_ids=(11, 12, 13))
        ends = {EOS, 11, 12, 13}
        samples = engine.generate(many(60), params)
        assert {s.response_ids[-1] for s in samples if s.finish_reason == "stop"} & {11, 12, 13}
        for sample in samples:
            assert not ends & set(sample.response_ids[:-1])
            assert (sample.response_ids[-1] in ends) == (sample.finish_reason == "stop")
        self.check_law(reference, samples[:8], params)

    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    @torch.no_grad()
    def test_top_ids_of_every_position(
        self, engine: Any, reference: Any, temperature: float
    ) -> None:
        """The most probable ids at temperature 1, most probable first, also under a cut law."""
        cut = {"top_k": 4, "top_p": 0.9} if temperature else {}
        samples = engine.generate(requests(), SamplingParams(8, temperature, top_ids=6, **cut))
        for sample in samples:
            logits = reference(torch.tensor([sample.tokens])).logits[0]
            start = len(sample.prompt.token_ids) - 1
            expected = logits[start : len(sample.tokens) - 1].topk(6).indices
            assert sample.top_ids == tuple(map(tuple, expected.tolist()))

    def test_a_seed_alone_decides_a_sample(self, engine: Any) -> None:
        if not self.deterministic:
            pytest.skip("this engine has no per-request determinism")
        params = SamplingParams(8)
        together = engine.generate(requests([11, 12, 13, 14]), params)
        alone = engine.generate(requests([11, 12, 13, 14])[2:3], params)
        assert alone[0].response_ids == together[2].response_ids
        other = engine.generate(requests([21, 22, 23, 24]), params)
        assert [s.response_ids for s in other] != [s.response_ids for s in together]

    @torch.no_grad()
    def test_frequencies_follow_the_law(self, engine: Any, reference: Any) -> None:
        """First tokens of 4,000 samples against the model's distribution (total variation)."""
        asked = requests()[0].prompt
        params = SamplingParams(1, temperature=1.5, top_k=12, top_p=0.8, min_p=0.02)
        samples = engine.generate([Request(asked, seed) for seed in range(4000)], params)
        counts = torch.zeros(VOCAB)
        for sample in samples:
            counts[sample.response_ids[0]] += 1
        expected = law(reference(torch.tensor([asked.token_ids])).logits[0, -1], params).exp()
        assert int((expected > 0).sum()) >= 3, "a law of one token shows nothing"
        assert 0.5 * (counts / 4000 - expected).abs().sum() < 0.04

    def test_bad_requests_are_refused(self, engine: Any) -> None:
        for ids, new, said in (
            ((1, VOCAB), 4, f"token id {VOCAB}"),
            ((-1,), 4, "token id -1"),
            ((1,) * (POSITIONS - 4), 5, f"at most {POSITIONS} positions"),
        ):
            bad = Request(prompt(ids), 0)
            with pytest.raises(UserError, match=said):
                engine.generate([*requests(), bad], SamplingParams(new))
            session = engine.session()
            with pytest.raises(UserError, match=said):
                session.submit(bad, SamplingParams(new))
            assert session.pending == 0
            session.close()

    def test_new_weights_change_the_law(self, engine: Any, reference: Any, other: Any) -> None:
        measured = engine.update_weights(weights_of(other), 4)
        assert all(isinstance(value, float | int) for value in measured.values())
        params = SamplingParams(6)
        samples = engine.generate(requests(), params)
        assert engine.weight_version == 4 and {s.weight_version for s in samples} == {4}
        self.check_law(other, samples, params)
        engine.update_weights(weights_of(reference), 3)
        self.check_law(reference, engine.generate(requests(), params), params)

    def test_weights_of_another_dtype(self, engine: Any, reference: Any) -> None:
        """They are taken in the engine's own dtype."""
        rounded = model(seed=5)
        stream = [(name, tensor.bfloat16()) for name, tensor in weights_of(rounded)]
        rounded.load_state_dict(dict(stream))
        engine.update_weights(stream, 4)
        params = SamplingParams(6)
        self.check_law(rounded, engine.generate(requests(), params), params)
        engine.update_weights(weights_of(reference), 3)

    @pytest.mark.parametrize("fault", ["missing", "no such", "shape"])
    def test_bad_weights_are_refused(
        self, engine: Any, reference: Any, other: Any, fault: str
    ) -> None:
        good = weights_of(other)
        name, tensor = good[2]
        stream = {
            "missing": good[:-1],
            "no such": [*good[:5], ("extra", torch.zeros(1)), *good[5:]],
            "shape": [*good[:2], (name, torch.zeros(*tensor.shape, 2)), *good[3:]],
        }[fault]
        with pytest.raises(UserError, match=fault):
            engine.update_weights(stream, 5)
        assert engine.weight_version == 3
        params = SamplingParams(6)
        try:
            samples = engine.generate(requests(), params)
        except NeedsWeights:
            assert not self.keeps_weights
        else:
            assert {s.weight_version for s in samples} == {3}
            self.check_law(reference, samples, params)
        engine.update_weights(weights_of(reference), 3)
        self.check_law(reference, engine.generate(requests(), params), params)
