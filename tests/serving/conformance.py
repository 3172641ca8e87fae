"""What every rollout engine must do. `Conformance` takes an engine and a reference model.

A subclass gives the fixture `engine`: loaded with the weights of `hf_dir` as version 3.
"""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

from megaopd.data.types import Prompt
from megaopd.errors import UserError
from megaopd.rollout.base import Request, SamplingParams
from tests.dist.models import VOCAB, save_tiny, tiny

EOS = VOCAB - 1
PROMPTS = [[5, 9, 3], [7, 7, 7, 7, 7, 7, 7], [1], [50, 20, 30, 40]]


def requests(seeds: list[int] | None = None) -> list[Request]:
    made = [
        Prompt(id=str(i), token_ids=tuple(ids), text="", answer=None, task="", meta={})
        for i, ids in enumerate(PROMPTS)
    ]
    return [Request(p, s) for p, s in zip(made, seeds or range(len(made)), strict=True)]


def weights_of(model: Any) -> list[tuple[str, torch.Tensor]]:
    return list(model.state_dict().items())


def law(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """log of the distribution that a token is drawn from, written out plainly."""
    log_p = (logits / (params.temperature or 1.0)).log_softmax(-1)
    order = log_p.argsort(descending=True)
    keep = torch.ones_like(log_p, dtype=torch.bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
    if params.top_p < 1:
        kept = log_p.masked_fill(~keep, -torch.inf).log_softmax(-1)[order].exp()
        keep[order[kept.cumsum(0) - kept >= params.top_p]] = False
    return log_p.masked_fill(~keep, -torch.inf).log_softmax(-1)


class Conformance:
    """Inherit and give `engine`."""

    tolerance: ClassVar[float] = 1e-4
    deterministic: ClassVar[bool] = True

    @pytest.fixture(scope="class")
    def hf_dir(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_tiny(tmp_path_factory.mktemp("engine"), "qwen3", tied=False)

    @pytest.fixture(scope="class")
    def reference(self, hf_dir: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(hf_dir).eval()

    @torch.no_grad()
    def check_law(self, reference: Any, samples: Any, params: SamplingParams) -> None:
        """Every reported log-prob is that of the law, by the reference model's own forward."""
        for sample in samples:
            prompt = list(sample.prompt.token_ids)
            logits = reference(torch.tensor([prompt + list(sample.response_ids)])).logits[0]
            for t, (token, reported) in enumerate(
                zip(sample.response_ids, sample.log_probs, strict=True)
            ):
                expected = float(law(logits[len(prompt) - 1 + t], params)[token])
                assert abs(expected - reported) < self.tolerance, (t, expected, reported)

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

    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(10),
            SamplingParams(10, temperature=0.7),
            SamplingParams(10, top_k=5),
            SamplingParams(10, top_p=0.8),
            SamplingParams(10, temperature=1.5, top_k=20, top_p=0.9),
        ],
    )
    def test_log_probs_are_of_the_law_sampled_from(
        self, engine: Any, reference: Any, params: SamplingParams
    ) -> None:
        self.check_law(reference, engine.generate(requests(), params), params)

    def test_records(self, engine: Any) -> None:
        params = SamplingParams(max_new_tokens=6)
        samples = engine.generate(requests(), params)
        assert [s.prompt.id for s in samples] == ["0", "1", "2", "3"]
        for sample in samples:
            assert sample.weight_version == 3
            stopped = sample.response_ids[-1] == EOS
            assert sample.finish_reason == ("stop" if stopped else "length")
            assert EOS not in sample.response_ids[:-1]
            assert stopped or len(sample.response_ids) == 6

    def test_stops_at_the_end_token(self, engine: Any) -> None:
        """Many samples: some must stop early, and the end token is part of the response."""
        prompt = requests()[0].prompt
        samples = engine.generate(
            [Request(prompt, seed) for seed in range(200)], SamplingParams(20, temperature=5.0)
        )
        stopped = [s for s in samples if s.finish_reason == "stop"]
        assert stopped and all(s.response_ids[-1] == EOS for s in stopped)
        assert any(len(s.response_ids) < 20 for s in stopped)

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
        prompt = requests()[0].prompt
        params = SamplingParams(1, top_k=6)
        samples = engine.generate([Request(prompt, seed) for seed in range(4000)], params)
        counts = torch.zeros(VOCAB)
        for sample in samples:
            counts[sample.response_ids[0]] += 1
        logits = reference(torch.tensor([prompt.token_ids])).logits[0, -1]
        distance = 0.5 * (counts / 4000 - law(logits, params).exp()).abs().sum()
        assert distance < 0.04

    def test_bad_requests_are_refused(self, engine: Any) -> None:
        def one(ids: tuple[int, ...]) -> list[Request]:
            return [Request(Prompt("bad", ids, "", None, "", {}), 0)]

        for ids, new, said in (
            ((1, VOCAB), 4, f"token id {VOCAB}"),
            ((-1,), 4, "token id -1"),
            ((1,) * 60, 10, "at most 64 positions"),
        ):
            with pytest.raises(UserError, match=said):
                engine.generate(one(ids), SamplingParams(new))

    def test_new_weights_change_the_law(self, engine: Any, reference: Any, hf_dir: Path) -> None:
        other = tiny("qwen3", tied=False, seed=99)
        engine.update_weights(weights_of(other), 4)
        params = SamplingParams(6)
        samples = engine.generate(requests(), params)
        assert {s.weight_version for s in samples} == {4}
        self.check_law(other, samples, params)
        engine.update_weights(weights_of(reference), 3)
        self.check_law(reference, engine.generate(requests(), params), params)

    def test_incomplete_weights_are_refused(self, engine: Any, reference: Any) -> None:
        good = weights_of(reference)
        with pytest.raises(UserError, match="missing"):
            engine.update_weights(good[:-1], 5)
        with pytest.raises(UserError, match="no such"):
            engine.update_weights([("extra", torch.zeros(1)), *good], 5)
        engine.update_weights(good, 3)
