"""A teacher on a real SGLang server scores tokens; a proxy of our own breaks in its place."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from aiohttp import web

from megaopd.errors import UserError
from megaopd.rollout import score_tables
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.loop import LoopThread
from megaopd.rollout.score_tables import ScoreRequest, TokenScores
from megaopd.rollout.scoring import Scorer, ScoringLimits
from tests.dist.models import VOCAB, save_tiny

pytest.importorskip("sglang", reason="SGLang is not installed")

from megaopd.rollout.server import Fleet

POSITIONS = 64
# SGLang keeps some positions free; a response may fill all of the model's.
ROOM = ("--json-model-override-args", f'{{"max_position_embeddings": {POSITIONS + 16}}}')
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher"), "qwen3", tied=False, seed=11)


@pytest.fixture(scope="module")
def reference(hf_dir: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(hf_dir).eval()


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("test-scoring")
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def url(hf_dir: Path, loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    logs = tmp_path_factory.mktemp("logs")
    config = ServerConfig(port=31310, extra_args=ROOM)
    fleet = Fleet(config, hf_dir, device="cpu", dtype="float32", log_dir=logs)
    loop.run(fleet.start())
    yield fleet.servers[0].url
    loop.run(fleet.stop())


@pytest.fixture
def score(url: str, loop: LoopThread) -> Iterator[Any]:
    """Scores requests with a scorer of its own; `score.scorer` is the last one."""

    def run(*requests: ScoreRequest, **limits: Any) -> list[TokenScores]:
        scorer = run.scorer = Scorer([url], limits=ScoringLimits(**limits))
        run.open.append(scorer)

        async def work() -> list[TokenScores]:
            await scorer.open()
            return await asyncio.gather(*map(scorer.score, requests))

        return loop.run(work())

    run.open, run.scorer = [], None
    yield run
    for scorer in run.open:
        loop.run(scorer.close())


def sequences(count: int, seed: int = 0, **more: Any) -> list[ScoreRequest]:
    """Random prompts and responses; the last id of the vocabulary is among them."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 12)))
        response = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
        response[rng.randrange(len(response))] = VOCAB - 1
        made.append(ScoreRequest(f"s{i}", prompt, tuple(response), **more))
    return made


def supports(requests: list[ScoreRequest], k: int, skip: float = 0.1) -> list[ScoreRequest]:
    """The same with k ids at most positions."""
    rng = random.Random(1)
    return [
        ScoreRequest(
            r.name, r.prompt_ids, r.response_ids,
            top_ids=tuple(
                tuple(rng.sample(range(VOCAB), k)) if rng.random() > skip else ()
                for _ in r.response_ids
            ),
        )
        for r in requests
    ]  # fmt: skip


@torch.no_grad()
def law(reference: Any, request: ScoreRequest) -> torch.Tensor:
    """[R, V] log q at each response position."""
    tokens = torch.tensor([request.prompt_ids + request.response_ids])
    return reference(tokens).logits[0].log_softmax(-1)[len(request.prompt_ids) - 1 : -1]


def check(reference: Any, request: ScoreRequest, scores: TokenScores) -> None:
    log_q = law(reference, request)
    labels = torch.tensor(request.response_ids)[:, None]
    want = log_q.gather(1, labels)[:, 0]
    assert (torch.from_numpy(scores.log_q) - want).abs().max() < TOLERANCE
    if scores.ids is None:
        return
    ids, got = torch.from_numpy(scores.ids).long(), torch.from_numpy(scores.list_log_q)
    there = ids != score_tables.ABSENT
    assert (log_q.gather(1, ids.clamp_min(0)) - got)[there].abs().max() < TOLERANCE
    if request.top_ids is not None:
        assert [tuple(i for i in row if i >= 0) for row in ids.tolist()] == list(request.top_ids)
    else:
        top = log_q.topk(request.k).values
        assert ids.shape[1] == request.k and (got - top).abs().max() < TOLERANCE


@pytest.mark.parametrize("flat", [True, False])
def test_scores_are_those_of_transformers(
    score: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, flat: bool
) -> None:
    """Sampled tokens, the teacher's lists in both forms of the answer, the student's supports."""
    if not flat:
        probe = Scorer._probe

        async def without(self: Scorer, server: Any) -> None:
            await probe(self, server)
            assert server.flat, "this release should offer base64"
            server.flat = False

        monkeypatch.setattr(Scorer, "_probe", without)
    requests = [
        *sequences(8),
        *sequences(8, seed=1, k=5),
        *supports(sequences(8, seed=2), 7),
    ]
    for request, scores in zip(requests, score(*requests), strict=True):
        check(reference, request, scores)
    assert score.scorer.bytes_received > 0
    assert score.scorer.counts["cached_tokens"] > 0  # pieces find their prefix


def test_calls_are_bounded_by_tokens(score: Any, reference: Any) -> None:
    """One sequence a call where the bound is small, all of them where it is large."""
    requests = sequences(12)
    for request, scores in zip(requests, score(*requests, batch_tokens=1, calls=1), strict=True):
        check(reference, request, scores)
    assert score.scorer.counts["calls"] == 12
    score(*requests, batch_tokens=100_000, calls=1)
    assert score.scorer.counts["calls"] <= 2 and score.scorer.counts["requests"] == 12


def test_a_full_context_and_an_empty_response(score: Any, reference: Any) -> None:
    full = ScoreRequest("full", (1, 2), tuple(i % VOCAB for i in range(POSITIONS - 2)), k=3)
    check(reference, full, score(full)[0])
    for empty in (ScoreRequest("empty", (1,), (), k=4), ScoreRequest("empty", (1,), ())):
        assert score(empty)[0].valid.shape == (0,)
    whole = ScoreRequest("all ids", (3,), (4, 5), k=VOCAB)
    check(reference, whole, score(whole)[0])


def test_another_prompt_gives_other_scores_of_the_same_response(score: Any, reference: Any) -> None:
    """Privileged information: rows are aligned by response offset, not by position."""
    plain = sequences(1, seed=4)[0]
    informed = ScoreRequest("informed", (7,) * 9 + plain.prompt_ids, plain.response_ids)
    found = score(plain, informed)
    check(reference, plain, found[0])
    check(reference, informed, found[1])
    assert abs(found[0].log_q - found[1].log_q).max() > 0.1


def test_scores_are_of_temperature_one_whatever_is_asked(url: str, loop: LoopThread) -> None:
    """The reason for which other temperatures are refused (objectives/remote.py)."""
    from megaopd.rollout.http import ServerClient

    async def ask(temperature: float) -> Any:
        client = ServerClient(url)
        answer = await client.post("/generate", {
            "input_ids": [5, 6, 7, 8], "return_logprob": True, "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 0, "temperature": temperature},
        })  # fmt: skip
        await client.close()
        return [row[0] for row in answer["meta_info"]["input_token_logprobs"][1:]]

    assert loop.run(ask(0.5)) == pytest.approx(loop.run(ask(1.0)), abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (ScoreRequest("a", (1,), (2, VOCAB)), f"token id {VOCAB}"),
        (ScoreRequest("a", (-1,), (2,)), "token id -1"),
        (ScoreRequest("a", (1,), (2,), top_ids=((5, VOCAB),)), f"token id {VOCAB}"),
        (ScoreRequest("a", (1,), (2,) * 90), "--context-length"),
        (ScoreRequest("a", (), (2,)), "no prompt"),
        (ScoreRequest("a", (1,), (2,), k=VOCAB + 1), f"of {VOCAB} ids"),
    ],
)
def test_what_would_kill_a_server_is_not_sent(
    score: Any, reference: Any, request_: ScoreRequest, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        score(request_)
    good = sequences(1)[0]
    check(reference, good, score(good)[0])


def test_a_support_that_would_explode_is_refused_with_the_numbers(score: Any) -> None:
    request = supports(sequences(1), 20, skip=0.0)[0]
    with pytest.raises(UserError, match=r"log-probs in \d+ requests .*\n.*at most 300"):
        score(request, max_entries=300)
    with pytest.raises(UserError, match="20 ids at one position"):
        score(request, max_union=19)


def test_a_server_that_is_not_there(loop: LoopThread) -> None:
    with pytest.raises(UserError, match="does not answer"):
        loop.run(Scorer(["http://127.0.0.1:31399"]).open())


class Faulty:
    """Stands before a real server, and breaks answers as it is told: by call to /generate."""

    def __init__(self, url: str, faults: list[str]) -> None:
        self.url, self.faults, self.aborted = url, faults, 0
        self.stopped = asyncio.Event()

    async def start(self) -> str:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self.handle)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # pyright: ignore

    async def handle(self, request: web.Request) -> web.Response:
        from megaopd.rollout.http import ServerClient

        body = await request.json() if request.can_read_body else None
        self.aborted += request.path == "/abort_request"
        fault = ""
        if request.path == "/generate" and self.faults:
            fault = self.faults.pop(0)
        if fault == "500":
            return web.json_response({"error": {"message": "broken"}}, status=500)
        if fault == "400":
            return web.json_response({"error": {"message": "not like this"}}, status=400)
        if fault == "hang":
            await self.stopped.wait()
            return web.Response()
        client = ServerClient(self.url)
        answer = await client.request(request.method, request.path, body)
        await client.close()
        if fault:
            self.spoil(fault, answer[0]["meta_info"])
        return web.json_response(answer) if not isinstance(answer, str) else web.Response()

    @staticmethod
    def spoil(fault: str, meta: dict[str, Any]) -> None:
        rows = meta["input_token_logprobs"]
        if fault == "short":
            rows.pop()
        elif fault == "other tokens":
            rows[1][1] = (rows[1][1] + 1) % VOCAB
        elif fault == "positive":
            rows[1][0] = 0.5
        elif fault == "abort":
            meta["finish_reason"] = {"type": "abort", "message": "no memory"}
        elif fault == "none":
            rows[1][0] = None
            rows[2][0] = None
            rows[3][0] = 5e-5
        else:
            assert fault == "ok"

    async def stop(self) -> None:
        self.stopped.set()
        await self.runner.cleanup()


@pytest.fixture
def through(url: str, loop: LoopThread) -> Iterator[Any]:
    """Scores through servers that break: through(faults of each server, *requests, **limits)."""
    closing: list[Any] = []

    def run(faults: list[list[str]], *requests: ScoreRequest, **limits: Any) -> Any:
        async def work() -> Any:
            servers = [Faulty(url, list(some)) for some in faults]
            urls = [await server.start() for server in servers]
            scorer = Scorer(urls, vocab_size=VOCAB, limits=ScoringLimits(**limits))
            closing.extend([scorer.close, *(server.stop for server in servers)])
            await scorer.open()
            found = await asyncio.gather(*map(scorer.score, requests), return_exceptions=True)
            return found, scorer, servers

        return loop.run(work())

    yield run
    for close in closing:
        loop.run(close())


FAULTS = ["500", "short", "other tokens", "positive", "abort"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_met_by_trying_again(through: Any, reference: Any, fault: str) -> None:
    request = sequences(1, seed=6, k=4)[0]
    (scores,), scorer, _ = through([[fault]], request)
    check(reference, request, scores)
    assert scorer.counts["calls"] == 2


def test_another_server_takes_over(through: Any, reference: Any) -> None:
    requests = sequences(6, seed=7)
    found, _, _ = through([["500"] * 20, []], *requests, batch_tokens=1, calls=1, retries=2)
    for request, scores in zip(requests, found, strict=True):
        check(reference, request, scores)


def test_a_call_that_hangs_is_aborted_and_sent_again(through: Any, reference: Any) -> None:
    request = sequences(1, seed=8)[0]
    (scores,), _, servers = through([["hang"]], request, timeout_s=1.0)
    check(reference, request, scores)
    assert servers[0].aborted == 1


def test_an_end_of_patience_names_server_and_cause(through: Any) -> None:
    (err,), _, _ = through([["500", "500"]], sequences(1)[0], retries=1)
    assert isinstance(err, UserError) and "did not score s0 in 2 tries" in str(err)
    assert "broken" in str(err)


def test_a_refusal_is_not_repeated(through: Any) -> None:
    (err,), scorer, _ = through([["400"]], sequences(1)[0])
    assert isinstance(err, UserError) and "not like this" in str(err)
    assert scorer.counts["calls"] == 1


def test_missing_values_are_masked_and_rounding_is_cut(through: Any) -> None:
    request = ScoreRequest("s", (1, 2), (3, 4, 5, 6, 7))
    (scores,), _, _ = through([["none"]], request)
    assert scores.valid.tolist() == [False, False, True, True, True]
    assert scores.log_q[2] == 0.0
