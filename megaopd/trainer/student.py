"""The student: a sharded model with its optimizer and schedule, updated one step at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megaopd import faults, platform
from megaopd.models.arch import Architecture, padded_vocab
from megaopd.models.chunks import build_chunks, load_chunks, sharded_chunks
from megaopd.models.config import LoraConfig, ModelConfig
from megaopd.models.convert import load_weights
from megaopd.models.lora import add_adapters
from megaopd.models.weights import WeightStream
from megaopd.objectives.spec import ObjectiveConfig
from megaopd.objectives.terms import make_terms
from megaopd.objectives.validate import needs
from megaopd.parallel import Grid
from megaopd.trainer.batch import MicroBatch
from megaopd.trainer.config import OptimConfig
from megaopd.trainer.importance import with_importance_weights
from megaopd.trainer.log_probs import sequence_log_probs, token_log_probs
from megaopd.trainer.optim import check_optimizer, make_optimizer, make_schedule, wrap_ddp
from megaopd.trainer.pace import Pace
from megaopd.trainer.sequences import with_sequences
from megaopd.trainer.step import FrozenLaw, objective_pass
from megaopd.trainer.teachers.base import BaseTeacher


class Student:
    """Built from a Hugging Face checkpoint; knows tensors, masks and weights, not the method.

    Args:
        vocab: ids that are real in student and teacher (the smaller vocabulary).
        vocab_rows: padded vocabulary over all tensor ranks.
        optim: None for a student that is only evaluated: no gradients, no optimizer state.
        total_steps: where the learning-rate decay ends.
        lora: train adapters on top of the checkpoint's weights, which stay frozen.
    """

    def __init__(
        self,
        config: ModelConfig,
        arch: Architecture,
        grid: Grid,
        objective: ObjectiveConfig,
        optim: OptimConfig | None,
        *,
        total_steps: int = 1,
        vocab: int | None = None,
        vocab_rows: int | None = None,
        lora: LoraConfig | None = None,
        progress: Any = None,
    ) -> None:
        if optim is not None:
            check_optimizer(optim)
        self.base, self.lora = config.path, lora or LoraConfig()
        self.arch, self.grid = arch, grid
        self.objectives, self.objective = objective, objective.at(0)  # of all steps, of this one
        self.vocab = vocab or arch.vocab
        rows = vocab_rows or padded_vocab(arch.vocab, grid.tp_size, config.vocab_multiple)
        self.vocab_rows = rows
        chunks = build_chunks(arch, config, grid, vocab_rows=rows)
        self.chunks = [chunk.to(platform.device()) for chunk in chunks]
        load_weights(self.chunks, config, arch, grid, progress=progress)
        if optim is None:  # to be evaluated only
            self.wrapped = [chunk.eval().requires_grad_(False) for chunk in self.chunks]
            return
        if self.lora.rank:
            add_adapters(self.chunks, self.lora)
        self.wrapped = wrap_ddp(self.chunks, optim, grid)
        self.pace = Pace(self.chunks[0].config)  # the one that the schedules read
        self.optimizer = make_optimizer(self.wrapped, optim, grid)
        self.schedule = make_schedule(self.optimizer, optim, total_steps)

    @property
    def model(self) -> Any:
        """The stage, where it is one model; a stage of several has `chunks`."""
        (only,) = self.chunks
        return only

    @property
    def ddp(self) -> Any:
        """The stage in its DDP, where it is one model; a stage of several has `wrapped`."""
        (only,) = self.wrapped
        return only

    def output_weight(self) -> Any:
        """[Vp, H] on the last stage."""
        return self.chunks[-1].output_weight()

    def weights(self, *, only_rank_0: bool = False) -> WeightStream:
        """(Hugging Face name, full tensor) of the current weights; iterating is a collective.

        only_rank_0: the other ranks take part and get nothing, so that they hold no full tensor.
        """
        return WeightStream(self.chunks, self.arch, self.grid, only_rank_0=only_rank_0)

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        teacher: BaseTeacher | None = None,
        *,
        reference: BaseTeacher | None = None,
        step: int = 0,
    ) -> dict[str, float]:
        """One optimizer step: `updates` of a single mini-batch."""
        return self.updates([micro_batches], teacher, reference=reference, step=step)

    def updates(
        self,
        mini_batches: Sequence[Sequence[MicroBatch]],
        teacher: BaseTeacher | None = None,
        *,
        reference: BaseTeacher | None = None,
        step: int = 0,
        epochs: int = 1,
        term_norms: bool = False,
    ) -> dict[str, float]:
        """An optimizer step for each mini-batch of one rollout, `epochs` times over.

        The objective's metrics with grad_norm and lr, equal on every rank; of several optimizer
        steps their means (metrics_of_updates). Old log-probs are all taken before the first one.
        The learning rate is that of `step`, for all of them.

        Args:
            reference: the base model of the objective's target.
            step: its number, from 0, where the objective changes over the steps.
            term_norms: also grad_norm/NAME of each term alone, before the first update, where the
                objective has several: a forward and a backward pass more for each.

        Raises:
            RuntimeError: a NaN gradient (megatron-core's check).
            UserError: importance weights for samples without log-probs.
        """
        self.objective = self.objectives.at(step)
        several = len(mini_batches) * epochs > 1
        laws = [_law(model, mini_batches[0]) for model in (teacher, reference)]
        terms = list(make_terms(self.objective)) if term_norms else []
        terms = terms if len(terms) > 1 else []  # the norm of a single one is grad_norm
        if terms or self.objective.needs_sequences:  # they are looked at before the update, too
            laws = [None if law is None else law.held() for law in laws]
        prepared = []
        for i, one in enumerate(mini_batches):
            again = i > 0 and self.objective.needs_sequences
            law = _law(teacher, one) if again else laws[0]
            prepared.append(self._look_ahead(one, law, ratio=several))
        norms = self._term_norms(prepared[0][0], laws, terms)
        found = []
        for micro_batches, told in [one for _ in range(epochs) for one in prepared]:
            if found:
                laws = [_law(model, micro_batches) for model in (teacher, reference)]
            found.append(told | self._optimizer_step(micro_batches, laws))
        self.schedule.step(increment=1)
        return metrics_of_updates(found) | norms

    def _term_norms(
        self,
        micro_batches: Sequence[MicroBatch],
        laws: Sequence[FrozenLaw | None],
        terms: Sequence[str],
    ) -> dict[str, float]:
        """Norms of what the objective's gradient is a sum of, coefficients included.

        That of a load-balancing loss of experts is in none of them.
        """
        found = {}
        for name in terms:
            self._empty_gradients()
            self._pass(micro_batches, *laws, forward_only=False, only=name)
            self.optimizer.prepare_grads()
            found[f"grad_norm/{name}"] = float(self.optimizer.get_grad_norm())
        return found

    def _empty_gradients(self) -> None:
        for ddp in self.wrapped:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _look_ahead(
        self, micro_batches: Sequence[MicroBatch], teacher: FrozenLaw | None, *, ratio: bool
    ) -> tuple[Sequence[MicroBatch], dict[str, float]]:
        """What the loss needs to know of the sampled tokens before the first update, with metrics.

        ratio: several updates follow, and losses on sampled tokens take their ratio to these.
        """
        wanted = needs(self.objective)
        ratio = ratio and wanted.ratio
        if not (wanted.old_log_prob_pass or ratio):
            return micro_batches, {}
        log_probs = token_log_probs(
            self.wrapped,
            self.output_weight,
            self.grid,
            micro_batches,
            vocab=self.vocab,
            chunk_size=self.objective.chunk_size or None,
            softcap=self.arch.final_softcap,
        )
        told: dict[str, float] = {}
        if self.objective.tis != "off":
            micro_batches = with_importance_weights(
                self.grid, micro_batches, log_probs, self.objective
            )
        if self.objective.needs_sequences:
            micro_batches, told = with_sequences(
                self.grid, micro_batches, log_probs, teacher, self.objective, vocab=self.vocab
            )
        if ratio:
            pairs = zip(micro_batches, log_probs, strict=True)
            micro_batches = [replace(micro, old_log_probs_T=old_T) for micro, old_T in pairs]
        return micro_batches, told

    def _optimizer_step(
        self, micro_batches: Sequence[MicroBatch], laws: Sequence[FrozenLaw | None]
    ) -> dict[str, float]:
        """laws: the teacher's and the reference's."""
        self.pace.begin()
        self._empty_gradients()
        metrics = self._pass(micro_batches, *laws, forward_only=False)
        faults.point("optimizer")
        lr = self.optimizer.param_groups[0]["lr"]
        done, grad_norm, _ = self.optimizer.step()
        assert done, "the optimizer skipped a step without loss scaling"
        return {**metrics, "grad_norm": float(grad_norm), "lr": float(lr)}

    def accumulate(
        self, micro_batches: Sequence[MicroBatch], teacher: BaseTeacher | None = None
    ) -> dict[str, float]:
        """The objective's gradients into emptied buffers (main_grad), and its metrics; no step.

        No importance weights, and nothing that needs a pass of its own before.
        """
        self._empty_gradients()
        return self._pass(micro_batches, _law(teacher, micro_batches), None, forward_only=False)

    def log_probs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Of token_ids[1:], each given what stands before it, at temperature 1; a collective."""
        return sequence_log_probs(
            self.wrapped,
            self.output_weight,
            self.grid,
            token_ids,
            vocab=self.vocab,
            softcap=self.arch.final_softcap,
        )

    def score(
        self,
        micro_batches: Sequence[MicroBatch],
        teacher: BaseTeacher | None = None,
        *,
        reference: BaseTeacher | None = None,
        objective: ObjectiveConfig | None = None,
    ) -> dict[str, float]:
        """The metrics of an objective, by default the run's, on these micro-batches: no gradient,
        no importance weights."""
        import torch

        with torch.no_grad():
            laws = [_law(model, micro_batches) for model in (teacher, reference)]
            return self._pass(micro_batches, *laws, forward_only=True, objective=objective)

    def _pass(
        self,
        micro_batches: Sequence[MicroBatch],
        teacher: FrozenLaw | None,
        reference: FrozenLaw | None,
        *,
        forward_only: bool,
        only: str = "",
        objective: ObjectiveConfig | None = None,
    ) -> dict[str, float]:
        return objective_pass(
            self.wrapped,
            self.output_weight,
            self.grid,
            micro_batches,
            objective or self.objective,
            vocab=self.vocab,
            teacher=teacher,
            reference=reference,
            forward_only=forward_only,
            softcap=self.arch.final_softcap,
            only=only,
        )

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """Model, optimizer, schedule and RNG as a sharded state dict for dist_checkpointing."""
        import torch
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        model = sharded_chunks(self.chunks)
        optimizer = self.optimizer.sharded_state_dict(
            model if len(self.chunks) > 1 else model["model"],
            is_loading=loading,
            metadata={"distrib_optim_sharding_type": "fully_reshardable"},
        )
        rng = {"torch": torch.get_rng_state(), "tracker": rng_tracker().get_states()}
        grid = self.grid
        place = (grid.pp_rank, grid.tp_rank, grid.dp_rank * grid.cp_size + grid.cp_rank)
        shape = (grid.pp_size, grid.tp_size, grid.dp_size * grid.cp_size)
        return {
            **model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "rng": ShardedObject("rng", rng, shape, place),
        }

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take what `sharded_state` saved; RNG only where the layout is the same."""
        import torch

        load_chunks(self.chunks, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if "rng" in state:
            torch.set_rng_state(state["rng"]["torch"])
            rng_tracker().set_states(state["rng"]["tracker"])


def metrics_of_updates(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of one rollout's optimizer steps: means over its tokens; their sum, and plain means of losses
    and gradient norms."""
    if len(found) == 1:
        return dict(found[0])
    tokens = [one["tokens"] for one in found]
    mean = {}
    for name in found[0]:
        weights = [1.0] * len(found) if name in ("loss", "grad_norm") else tokens
        total = sum(w * one[name] for w, one in zip(weights, found, strict=True))
        mean[name] = total / max(sum(weights), 1.0)
    return {**mean, "tokens": sum(tokens), "lr": found[0]["lr"], "updates": float(len(found))}


def _law(model: BaseTeacher | None, micro_batches: Sequence[MicroBatch]) -> FrozenLaw | None:
    """A frozen model's hidden states on these micro-batches; a collective."""
    if model is None:
        return None
    return FrozenLaw(model.hidden_states(micro_batches), model.output_weight, model.softcap)


def rng_tracker() -> Any:
    """megatron-core's tracker of named RNG streams, which parallel.make_grid seeded."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return get_cuda_rng_tracker()
