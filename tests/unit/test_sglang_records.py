"""What a request to SGLang says, and what is made of its answers."""

import dataclasses
from typing import Any

import pytest

from megaopd.data.types import Prompt, Span
from megaopd.errors import UserError
from megaopd.rollout.base import Request, SamplingParams
from megaopd.rollout.records import (
    BadAnswer,
    Draft,
    Leg,
    Limits,
    UnknownWeights,
    check_law,
    generate_body,
    read_leg,
)

LIMITS = Limits(vocab=101, max_positions=64, mask_tokens=4096, seeded=False)
REQUEST = Request(Prompt("p", (5, 9, 3), "", None, ""), seed=11, index=2)
VERSIONS = {"run-3": 3, "run-4": 4}


def body(params: SamplingParams, draft: Draft | None = None, **limits: Any) -> dict[str, Any]:
    return generate_body(
        REQUEST,
        params,
        draft or Draft(),
        rid="r",
        ends=frozenset({100, 7}),
        limits=dataclasses.replace(LIMITS, **limits),
    )


def answer(tokens: list[int], finish: str = "length", **meta: Any) -> dict[str, Any]:
    return {
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": finish},
            "output_token_logprobs": [[-0.5 - i, t, None] for i, t in enumerate(tokens)],
            "weight_versions": [{"version": "run-3", "start": 0, "end": len(tokens)}],
            **meta,
        },
    }


def spans(*parts: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [{"version": v, "start": s, "end": e} for v, s, e in parts]


class TestBody:
    def test_temperature_alone(self):
        made = body(SamplingParams(20, temperature=0.7))
        assert made["input_ids"] == [5, 9, 3] and made["rid"] == "r"
        assert made["return_logprob"] is True and made["logprob_start_len"] == -1
        assert made["sampling_params"] == {
            "max_new_tokens": 20,
            "temperature": 0.7,
            "stop_token_ids": [7, 100],
        }
        assert "return_sampling_mask" not in made and "top_logprobs_num" not in made

    def test_a_seed_goes_where_it_is_heard(self):
        """Older releases refuse the field, and others ignore it unless they are deterministic."""
        assert body(SamplingParams(1), seeded=True)["sampling_params"]["sampling_seed"] == 11

    def test_greedy_ignores_cuts(self):
        law = body(SamplingParams(20, temperature=0.0, top_p=0.5, top_k=3))["sampling_params"]
        assert law["temperature"] == 0.0 and "top_k" not in law and "top_p" not in law

    @pytest.mark.parametrize(
        ("params", "limits", "top_k"),
        [
            (SamplingParams(1, top_k=5), {}, 5),
            (SamplingParams(1, top_k=5000), {}, 101),
            (SamplingParams(1, top_p=0.9), {}, 101),
            (SamplingParams(1, min_p=0.1), {"vocab": 150_000}, 4096),
        ],
    )
    def test_a_cut_law_has_a_finite_top_k(self, params: Any, limits: Any, top_k: int):
        made = body(params, **limits)
        assert made["return_sampling_mask"] is True
        law = made["sampling_params"]
        assert (law["top_k"], law["top_p"], law["min_p"]) == (top_k, params.top_p, params.min_p)

    def test_the_rest_of_a_response(self):
        draft = Draft(tokens=[1, 2], log_probs=[-1.0, -1.0])
        made = body(SamplingParams(20, top_ids=4), draft)
        assert made["input_ids"] == [5, 9, 3, 1, 2]
        assert made["sampling_params"]["max_new_tokens"] == 18
        assert made["top_logprobs_num"] == 4


class TestLaw:
    def test_supported(self):
        check_law(SamplingParams(1, top_k=50, top_p=0.9, min_p=0.1), LIMITS)
        check_law(SamplingParams(1, top_k=5000), LIMITS)  # above the vocabulary: no cut
        check_law(SamplingParams(1), dataclasses.replace(LIMITS, mask_tokens=0, seeded=True))

    @pytest.mark.parametrize(
        ("params", "limits", "said"),
        [
            (SamplingParams(1, top_p=0.9), {"mask_tokens": 0}, "does not report"),
            (SamplingParams(1, top_k=5000), {"vocab": 150_000}, "at most 4096"),
            (SamplingParams(1, min_p=0.1), {"seeded": True}, "deterministic"),
        ],
    )
    def test_refused(self, params: Any, limits: Any, said: str):
        with pytest.raises(UserError, match=said):
            check_law(params, dataclasses.replace(LIMITS, **limits))


class TestLeg:
    def test_plain(self):
        leg = read_leg(answer([8, 100], "stop"), SamplingParams(9), VERSIONS)
        assert leg == Leg([8, 100], [-0.5, -1.5], [Span(3, 0, 2)], None, "stop")

    def test_a_cut_law_has_log_probs_of_its_own(self):
        made = answer([8, 9], output_token_sampling_logprobs=[-0.1, 0.0])
        leg = read_leg(made, SamplingParams(9, top_k=5), VERSIONS)
        assert leg.log_probs == [-0.1, 0.0]

    def test_top_ids(self):
        rows = [[[-0.1, 8, None], [-0.2, 3, None]], [[-0.1, 4, None], [-0.3, 9, None]]]
        made = answer([8, 9], output_top_logprobs=rows)
        assert read_leg(made, SamplingParams(9, top_ids=2), VERSIONS).top_ids == [(8, 3), (4, 9)]
        with pytest.raises(BadAnswer):
            read_leg(answer([8, 9], output_top_logprobs=rows[:1]), SamplingParams(9, top_ids=2), {})

    def test_spans(self):
        named = spans(("run-3", 0, 2), ("run-4", 2, 3))
        leg = read_leg(answer([1, 2, 3], weight_versions=named), SamplingParams(9), VERSIONS)
        assert leg.spans == [Span(3, 0, 2), Span(4, 2, 3)]

    @pytest.mark.parametrize(
        ("named", "current"),
        [
            (spans(("default", 0, 3)), True),
            (spans(("run-3", 0, 2), ("other-4", 2, 3)), True),
            (spans(("other-3", 0, 2), ("run-4", 2, 3)), False),
        ],
    )
    def test_unknown_weights(self, named: Any, current: bool):
        with pytest.raises(UnknownWeights) as caught:
            read_leg(answer([1, 2, 3], weight_versions=named), SamplingParams(9), VERSIONS)
        assert caught.value.current is current

    @pytest.mark.parametrize("named", [spans(("run-3", 0, 2)), spans(("run-3", 1, 3)), []])
    def test_spans_that_leave_tokens_out(self, named: Any):
        with pytest.raises(BadAnswer):
            read_leg(answer([1, 2, 3], weight_versions=named), SamplingParams(9), VERSIONS)

    def test_a_release_without_spans(self):
        made = answer([1, 2], weight_version="run-3")
        del made["meta_info"]["weight_versions"]
        leg = read_leg(made, SamplingParams(9), VERSIONS, unbroken=3)
        assert leg.spans == [Span(3, 0, 2)]
        for unbroken in (None, 4):  # weights changed meanwhile; they are not what was sent to
            with pytest.raises(UnknownWeights):
                read_leg(made, SamplingParams(9), VERSIONS, unbroken=unbroken)

    def test_nothing_was_sampled(self):
        made = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}}}
        params = SamplingParams(9, top_k=4, top_ids=2)
        leg = read_leg({**made}, params, VERSIONS)
        assert leg == Leg([], [], [], [], "abort")

    def test_an_abort_in_the_queue_tells_no_log_probs_of_a_cut_law(self):
        leg = read_leg(answer([1, 2], "abort"), SamplingParams(9, top_k=4), VERSIONS)
        assert leg.tokens == [] and leg.spans == []
        leg = read_leg(answer([1, 2], "abort"), SamplingParams(9), VERSIONS)
        assert leg.tokens == [1, 2] and leg.spans == [Span(3, 0, 2)]

    @pytest.mark.parametrize(
        "broken",
        [
            [],
            "text",
            {},
            {"output_ids": [1]},
            answer([1, 2], output_token_logprobs=[[-0.5, 1, None]]),
            answer([1, 2], output_token_logprobs=[[-0.5, 1, None], [-0.5, 3, None]]),
            answer([1], output_token_logprobs=[[None, 1, None]]),
            answer([1], output_token_logprobs=[[float("-inf"), 1, None]]),
            answer([1], output_token_logprobs=[[0.01, 1, None]]),
            answer([1], finish_reason=None),
            answer([1], "paused"),
            answer([1], finish_reason={"type": "stop", "matched": "NaN happened"}),
        ],
    )
    def test_broken_answers(self, broken: Any):
        with pytest.raises(BadAnswer):
            read_leg(broken, SamplingParams(9), VERSIONS)

    def test_rounding_above_zero_is_cut_off(self):
        made = answer([1, 2], output_token_logprobs=[[3e-6, 1, None], [-0.5, 2, None]])
        assert read_leg(made, SamplingParams(9), VERSIONS).log_probs == [0.0, -0.5]


class TestDraft:
    def test_legs_are_joined(self):
        draft = Draft()
        draft.extend(Leg([1, 2], [-0.1, -0.2], [Span(3, 0, 2)], [(1, 9), (2, 9)], "abort"))
        draft.extend(Leg([], [], [], [], "abort"))
        draft.extend(
            Leg([4, 5, 6], [-0.3] * 3, [Span(3, 0, 1), Span(4, 1, 3)], [(4, 9)] * 3, "stop")
        )
        sample = draft.sample(REQUEST, SamplingParams(9, top_ids=2), "stop", version=5)
        assert sample.response_ids == (1, 2, 4, 5, 6)
        assert sample.log_probs == (-0.1, -0.2, -0.3, -0.3, -0.3)
        assert sample.spans == (Span(3, 0, 3), Span(4, 3, 5))
        assert sample.top_ids == ((1, 9), (2, 9), (4, 9), (4, 9), (4, 9))
        assert (sample.weight_version, sample.newest_version, sample.index) == (3, 4, 2)

    def test_no_tokens(self):
        sample = Draft().sample(REQUEST, SamplingParams(9), "abort", version=5)
        assert sample.response_ids == () and sample.log_probs == () and sample.spans == ()
        assert sample.weight_version == 5 and sample.top_ids is None
