"""Episodes of several turns over any engine: many at once, interleaved on one of its sessions.

`AgentEngine` wraps an engine and is one. A request whose prompt belongs to an environment
(data.tasks.get_environment) becomes an episode: the student's turn, the environment's answer, the
next turn, and so on; its Sample holds all of them. Other requests pass through.

In the Sample of an episode
    response_ids  the student's turns and, between them, the environment's answers
    loss_mask     1 on what the student sampled, 0 on the rest, whose log-probs are 0 and whose
                  top_ids are empty
    spans         cover the sampled tokens: at least one for each turn
    reward        of the episode, in [0, 1]: see AgentConfig.reward; None where it was not played to
                  an end through no fault of the student's (end "error" or "abort")
    meta          "end": why it ended, one of episode.ENDS; "turns": [start, end) of each turn in
                  response_ids; "turn_rewards": one for each turn; "error": what the environment
                  raised
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from queue import Empty, SimpleQueue
from typing import Any, Literal

from megaopd.data.tasks import environment_task, get_environment
from megaopd.data.tasks.environments import Step, seed_of
from megaopd.data.types import Sample
from megaopd.rollout.base import (
    Probe,
    Request,
    RolloutEngine,
    SamplingParams,
    Session,
    check_requests,
)
from megaopd.rollout.config import AgentConfig
from megaopd.rollout.episode import End, Episode, turn_seed
from megaopd.rollout.steps import Call, StepPool
from megaopd.rollout.turns import TurnFormat

# Seconds to look for steps that are finished before the engine is waited for. An engine that works
# inside `wait` works on what it is given then: for it the steps of all episodes are worth a wait.
STEP_WAIT_S = {True: 0.02, False: 1.0}  # by engine.shared


class AgentEngine:
    """An engine whose prompts may begin episodes; see the top of the file.

    Args:
        template: how the prompts were rendered (data.template).
        vocab: token ids are below it.
        max_positions: the student's context.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: Any,
        config: AgentConfig,
        *,
        template: Literal["raw", "chat"],
        vocab: int,
        max_positions: int,
    ) -> None:
        self.engine, self.config, self.vocab = engine, config, vocab
        self._make_turns = partial(TurnFormat, tokenizer, template)
        self.max_tokens = min(config.max_tokens or max_positions, max_positions)
        self.pool = StepPool(config.threads)
        self.ends: Counter[End] = Counter()  # of the episodes so far

    @property
    def weight_version(self) -> int:
        return self.engine.weight_version

    @property
    def shared(self) -> bool:
        return self.engine.shared

    @cached_property
    def turns(self) -> TurnFormat:
        """Read where the first episode begins: a tokenizer without episodes need not have one."""
        return self._make_turns()

    def update_weights(
        self, weights: Iterable[tuple[str, Any]], version: int, *, probe: Probe | None = None
    ) -> dict[str, float]:
        return self.engine.update_weights(weights, version, probe=probe)

    def session(self) -> "AgentSession":
        return AgentSession(self)

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        """One sample per request, in order."""
        if not any(environment_task(request.prompt.task) for request in requests):
            return self.engine.generate(requests, params)
        session, made = self.session(), {}
        try:
            tickets = [session.submit(request, params) for request in requests]
            while session.pending:
                made |= dict(session.wait())
        finally:
            session.close()
        return [made[ticket] for ticket in tickets]

    def check(self, request: Request, params: SamplingParams) -> None:
        """Refuse an episode that could not begin, or not go on.

        Raises:
            UserError: a bad prompt, or a chat template that does not serve.
        """
        _ = self.turns
        one_token = replace(params, max_new_tokens=1)
        check_requests([request], one_token, vocab=self.vocab, max_positions=self.max_tokens)

    def metrics(self) -> dict[str, float]:
        return self.engine.metrics()

    def release(self) -> None:
        self.engine.release()

    def resume(self, what: Literal["weights", "kv_cache"]) -> None:
        self.engine.resume(what)

    def close(self) -> None:
        self.pool.close()
        self.engine.close()


class AgentSession:
    """Episodes, and plain requests, on one session of the engine.

    Episodes move on inside `wait`: where the caller is elsewhere, the engine and the environments
    finish the turns that they have. Like any session it may be left with NeedsWeights.
    """

    def __init__(self, agent: AgentEngine) -> None:
        self._agent, self._config = agent, agent.config
        self._inner: Session = agent.engine.session()
        self._episodes: dict[int, Episode] = {}  # by our ticket
        self._by_turn: dict[int, Episode] = {}  # by the engine's ticket
        self._plain: dict[int, int] = {}  # the engine's ticket -> ours, of plain requests
        self._finished: list[tuple[int, Sample]] = []
        self._steps: SimpleQueue[Call] = SimpleQueue()  # finished ones
        self._by_call: dict[Call, Episode] = {}
        self._submitted = 0
        self._outside, self._left = 0.0, time.monotonic()  # seconds not spent in wait, since when

    @property
    def pending(self) -> int:
        return len(self._episodes) + len(self._plain) + len(self._finished)

    def submit(self, request: Request, params: SamplingParams) -> int:
        environment = get_environment(request.prompt)
        ticket = self._submitted
        if environment is None:
            self._plain[self._inner.submit(request, params)] = ticket
        else:
            self._agent.check(request, params)
            begin = partial(environment.reset, seed_of(request.prompt))
            deadline = self._left - self._outside + self._config.episode_timeout_s
            episode = Episode(ticket, request, params, environment, deadline)
            self._episodes[ticket] = episode
            self._ask(episode, begin)
        self._submitted += 1
        return ticket

    def wait(self, timeout: float | None = None) -> list[tuple[int, Sample]]:
        begun = time.monotonic()
        self._outside += begun - self._left
        until = math.inf if timeout is None else begun + timeout
        try:
            while True:
                self._take_steps()
                self._stop_late_ones()
                over = time.monotonic() > until
                if self._finished or not self.pending or over:
                    finished, self._finished = self._finished, []
                    return finished
                if self._inner.pending:
                    for ticket, sample in self._inner.wait(self._patience(until)):
                        self._take_turn(ticket, sample)
        finally:
            self._left = time.monotonic()

    def abort(self, tickets: Iterable[int] | None = None) -> None:
        plain = {ours: theirs for theirs, ours in self._plain.items()}
        wanted = [*self._episodes, *plain] if tickets is None else tickets
        turns = []
        for ticket in wanted:
            if ticket in plain:
                turns.append(plain[ticket])
            elif (episode := self._episodes.get(ticket)) is not None:
                turns += self._stop(episode, "abort")
        self._inner.abort(turns)

    def close(self) -> None:
        for call in self._by_call:
            self._agent.pool.give_up(call)
        self._inner.close()
        for waiting in (self._episodes, self._by_turn, self._plain, self._by_call, self._finished):
            waiting.clear()

    def _clock(self) -> float:
        """Seconds spent in `wait`, and a constant."""
        return time.monotonic() - self._outside

    def _patience(self, until: float) -> float | None:
        """How long the engine may be waited for: until something else may happen."""
        if self._by_call:
            return STEP_WAIT_S[True]
        going = (e.deadline for e in self._episodes.values() if not e.stopping)
        late = min(going, default=math.inf)
        left = min(until - time.monotonic(), late - self._clock())
        return None if left == math.inf else max(left, 0.0)

    def _ask(self, episode: Episode, question: Any) -> None:
        """Have the environment do something, in a thread."""
        episode.call = self._agent.pool.submit(question, self._steps)
        self._by_call[episode.call] = episode

    def _take_steps(self) -> None:
        """Go on with the episodes whose environment has answered; wait a moment for others."""
        until = time.monotonic() + STEP_WAIT_S[self._agent.shared]
        calls = []
        try:
            while len(calls) < len(self._by_call):
                calls.append(self._steps.get(timeout=max(until - time.monotonic(), 0.0)))
        except Empty:
            pass
        # By ticket, so that it does not depend on the threads what the engine is given when. One
        # that was given up just as it finished is nobody's.
        answered = [(self._by_call.pop(c), c) for c in calls if c in self._by_call]
        for episode, call in sorted(answered, key=lambda pair: pair[0].ticket):
            episode.call = None
            self._take_step(episode, call)

    def _take_step(self, episode: Episode, call: Call) -> None:
        step = call.result
        if call.error is not None:
            self._finish(episode, "error", f"{type(call.error).__name__}: {call.error}"[:500])
        elif not episode.turns:
            self._next_turn(episode)  # it was reset: the prompt holds its first observation
        elif not isinstance(step, Step) or not math.isfinite(step.reward):
            self._finish(episode, "error", f"a step of {step!r}"[:500])
        else:
            episode.rewards.append(float(step.reward))
            if step.done:
                self._finish(episode, "done")
            elif len(episode.turns) == self._config.max_turns:
                self._finish(episode, "turns")
            else:
                answer = self._agent.turns.answer(episode.last_turn, step.observation)
                if len(episode.context) + len(answer) >= self._agent.max_tokens:
                    self._finish(episode, "tokens")
                else:
                    episode.add_answer(answer)
                    self._next_turn(episode)

    def _next_turn(self, episode: Episode) -> None:
        """Have the student go on."""
        request, context = episode.request, episode.context
        room = self._agent.max_tokens - len(context)
        params = replace(episode.params, max_new_tokens=min(episode.params.max_new_tokens, room))
        turn = Request(
            replace(request.prompt, token_ids=context),
            turn_seed(request.seed, len(episode.turns)),
            request.index,
        )
        episode.turn = self._inner.submit(turn, params)
        self._by_turn[episode.turn] = episode

    def _take_turn(self, ticket: int, sample: Sample) -> None:
        """What the engine has finished: a turn of an episode, or a plain request."""
        if ticket in self._plain:
            self._finished.append((self._plain.pop(ticket), sample))
            return
        episode = self._by_turn.pop(ticket)
        episode.turn = None
        if sample.response_ids:
            episode.add_turn(sample)
        if episode.stopping or sample.finish_reason == "abort":
            self._finish(episode, episode.stopping or "abort")
        else:
            text = self._agent.turns.text(sample.response_ids)
            self._ask(episode, partial(episode.environment.step, text))

    def _stop_late_ones(self) -> None:
        now, turns = time.monotonic(), []
        for episode in list(self._episodes.values()):
            began = episode.call.began if episode.call is not None else None
            if began is not None and now - began > self._config.step_timeout_s:
                self._stop(episode, "step_time")
            elif self._clock() > episode.deadline and not episode.stopping:
                turns += self._stop(episode, "episode_time")
        if turns:
            self._inner.abort(turns)

    def _stop(self, episode: Episode, end: End) -> list[int]:
        """End an episode now; where the student is at work, the tickets to abort for it."""
        if episode.turn is not None:
            episode.stopping = episode.stopping or end
            return [episode.turn]
        assert episode.call is not None, "it is always somebody's turn"
        self._agent.pool.give_up(episode.call)
        del self._by_call[episode.call]
        self._finish(episode, end)
        return []

    def _finish(self, episode: Episode, end: End, error: str = "") -> None:
        del self._episodes[episode.ticket]
        self._agent.ends[end] += 1
        sample = episode.sample(end, self._config.reward, self._agent.weight_version, error)
        self._finished.append((episode.ticket, sample))
