"""Tiny random models of every family and feature, and how far Megatron's are from transformers'."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.dist.models import VOCAB, tokens

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "eos_token_id": VOCAB - 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@dataclass(frozen=True)
class Case:
    """One model: a config class of transformers and what differs from SHAPE."""

    config: str
    changes: dict[str, Any]
    expert: bool = False

    def save(self, root: Path, name: str) -> str:
        """A random model under `root`, norms and biases away from their initial values."""
        torch.manual_seed(7)
        config = getattr(transformers, self.config)(**{**SHAPE, **self.changes})
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        for part, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in part:
                centre = 0.0 if "Gemma" in self.config else 1.0
                torch.nn.init.normal_(tensor, centre, 0.3)
            elif "bias" in part:
                torch.nn.init.normal_(tensor, 0.0, 0.3)
            elif "gate" in part or "experts" in part:
                torch.nn.init.normal_(tensor, 0.0, 0.2)
        model.save_pretrained(root / name)
        return str(root / name)


CASES = {
    "llama": Case("LlamaConfig", {}),
    "llama, tied, llama3 rope": Case(
        "LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}
    ),
    "llama, biases, yarn": Case(
        "LlamaConfig", {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}
    ),
    "llama, linear rope, head size 12": Case(
        "LlamaConfig",
        {
            "head_dim": 12,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
        },
    ),
    "mistral, window": Case("MistralConfig", {"sliding_window": 5, "head_dim": 16}),
    "qwen2, window from layer 2": Case(
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    ),
    "qwen3, tied": Case("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": Case(
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": Case(
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        {**EXPERTS, "head_dim": 16, "mlp_only_layers": [1], "norm_topk_prob": True},
        expert=True,
    ),
    "qwen3_moe, weights not normalised": Case(
        "Qwen3MoeConfig", {**EXPERTS, "head_dim": 16, "tie_word_embeddings": True}, expert=True
    ),
    "mixtral, window": Case(
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
        expert=True,
    ),
    "deepseek_v3": Case(
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 24,
            "q_lora_rank": 40,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 20,
            "num_mtp_layers": 0,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        expert=True,
    ),
}


@dataclass(frozen=True)
class Layout:
    """Ranks: data parallel is what an expert size beyond the tensor size needs."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        parts = {"TP": self.tensor, "PP": self.pipeline, "EP": self.expert, "DP": self.data}
        return " ".join(f"{name}{size}" for name, size in parts.items() if size > 1) or "one rank"


LAYOUTS = [
    Layout(),
    Layout(2),
    Layout(1, 2),
    Layout(2, 2),
    Layout(data=2),
    Layout(expert=2, data=2),
    Layout(2, expert=2),
    Layout(2, 2, expert=2),
    Layout(2, expert=4, data=2),
]


@dataclass(frozen=True)
class Measured:
    """Of one model under one layout, on one rank. Differences are largest ones."""

    logits: float  # absolute
    gradient: float  # of a tensor's gradient, over the tensor's largest entry
    grad_norm: float  # relative
    changed: list[str]  # tensors that a round trip changed, missed or invented
    to_rank_0: list[str]  # the same of the stream to rank 0 alone


def measure(paths: list[str], layout: Layout) -> list[Measured]:
    """Each checkpoint under one layout, on this rank."""
    from megaopd.parallel import ParallelConfig, make_grid

    torch.use_deterministic_algorithms(False)
    config = ParallelConfig(
        layout.tensor, layout.pipeline, expert=layout.expert, sequence=layout.tensor > 1
    )
    grid = make_grid(config)
    return [_measure_one(path, grid) for path in paths]


def _measure_one(path: str, grid: Any) -> Measured:
    from megaopd.models.arch import architecture, check_layout, read_hf_config
    from megaopd.models.build import build_model
    from megaopd.models.config import ModelConfig
    from megaopd.models.weights import HfReader, WeightStream, load_hf_weights
    from tests.dist.test_models import logits

    arch = architecture(read_hf_config(path))
    check_layout(arch, grid.config, who=arch.family)
    model = build_model(arch, ModelConfig(path=path), grid)
    load_hf_weights(model, path, arch, grid)
    reader = HfReader(path)
    state = {name: reader.read(name, None, 0, 0, 0) for name in reader.files}

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager"
    ).eval()
    ids = tokens(4)
    mine = logits(model, ids, grid)
    difference = 0.0
    if mine is not None:
        wanted = reference(ids).logits
        if arch.final_softcap:
            mine = arch.final_softcap * (mine / arch.final_softcap).tanh()
        difference = float((mine[..., : wanted.shape[-1]] - wanted).abs().max())
    streams = [
        {n: t.clone() for n, t in WeightStream(model, arch, grid, only_rank_0=only)}
        for only in (False, True)
    ]
    changed = [changes(streamed, state) for streamed in streams]
    if grid.rank:
        changed[1] = sorted(streams[1])
    gradient, norm = _gradients(model, arch, grid, reference, ids)
    return Measured(difference, gradient, norm, *changed)


def changes(got: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names that are not in both, bit for bit."""
    return sorted(
        name
        for name in got.keys() | wanted.keys()
        if name not in got or name not in wanted or not torch.equal(got[name], wanted[name])
    )


def _gradients(model: Any, arch: Any, grid: Any, reference: Any, ids: Any) -> tuple[float, float]:
    """(largest difference of a gradient, of the gradient norm) of the mean log-prob of labels."""
    from megaopd.models.weights import WeightStream
    from megaopd.rollout.hf_names import by_file_name
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.optim import make_optimizer, wrap_ddp

    labels = tokens(*ids.shape, seed=2)
    scores = reference(ids).logits.log_softmax(-1).gather(-1, labels[..., None])
    (-scores.mean()).backward()
    wanted = by_file_name({n: p.grad for n, p in reference.named_parameters()}, arch)

    # A distributed optimizer would leave each rank the sum of its own part only.
    optim = OptimConfig(lr=1e-9, distributed=False)
    (ddp,) = wrap_ddp([model.train()], optim, grid)
    optimizer = make_optimizer([ddp], optim, grid)
    backward(ddp, model, arch, grid, ids, labels)
    stream = WeightStream(model, arch, grid)
    zero = torch.zeros(arch.experts.count if arch.experts else 0)
    stream.own = [
        replace(entry, parameter=getattr(entry.parameter, "main_grad", zero))
        for entry in stream.own
    ]
    worst = 0.0
    for name, got in stream:
        if name in wanted:
            scale = float(wanted[name].abs().max()) or 1.0
            worst = max(worst, float((got - wanted[name]).abs().max()) / scale)
        else:
            assert name.endswith("e_score_correction_bias"), name
    total = sum(float(g.double().square().sum()) for g in wanted.values()) ** 0.5
    _, norm, _ = optimizer.step()
    return worst, abs(float(norm) / total - 1)


def backward(
    ddp: Any,
    model: Any,
    arch: Any,
    grid: Any,
    ids: Any,
    labels: Any,
    *,
    weight: float = 1.0,
    padding: Any = None,
) -> None:
    """Gradients of weight x the mean negative log-prob of `labels`, one sequence a micro-batch.

    padding: [N, S] bool, the places of `ids` that hold no token.
    """
    from megaopd.losses import fused_linear_cross_entropy
    from megaopd.trainer.batch import MicroBatch
    from megaopd.trainer.step import forward_micro_batch, run_schedule

    share = len(ids) // grid.dp_size
    empty = torch.zeros(0)
    micro_batches = [
        MicroBatch(
            ids[i : i + 1],
            torch.arange(ids.shape[1])[None],
            None,
            labels[i],
            torch.full(ids.shape[1:], weight / ids.numel()),
            empty,
            empty,
            False,
            padding=None if padding is None else padding[i : i + 1],
        )
        for i in range(grid.dp_rank * share, (grid.dp_rank + 1) * share)
    ]

    def forward_step(iterator: Any, stage: Any) -> Any:
        micro = next(iterator)

        def loss(hidden: Any) -> Any:
            made = fused_linear_cross_entropy(
                hidden.flatten(0, 1),
                model.output_weight(),
                micro.labels_T,
                token_weights=micro.weights_T,
                vocab_size=arch.vocab,
                group=grid.groups.tp,
                sequence_parallel=grid.config.sequence,
                softcap=arch.final_softcap,
                into_main_grad=True,
            )
            return made.loss, torch.zeros((), dtype=torch.int), {}

        return forward_micro_batch(stage, micro), loss

    ddp.zero_grad_buffer()
    run_schedule(ddp, grid, micro_batches, forward_step, forward_only=False)
