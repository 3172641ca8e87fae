"""Other implementations of the same objectives: plain autograd, Liger, TRL, NVIDIA ModelOpt.

Each gets our inputs and yields gradients for hidden states and weight. A library is imported when
its method is built; launch/requirements-bench.txt lists what they need.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megaopd.losses import reference

from .cases import Forward, Inputs, Method, Outcome

RKL = {"kind": "rkl"}
TOP_64 = {"kind": "fkl", "support": "teacher_topk", "k": 64, "variant": "renorm"}
PACKAGES = ("liger-kernel", "trl", "nvidia-modelopt", "triton", "megatron-core")


def alternatives() -> list[Method]:
    """In the order of the table."""

    def one_rank(
        name: str, build: Callable[[Inputs], Forward], note: str, logits_copies: int = 0
    ) -> Method:
        return Method(
            name, RKL, build, note=note, tensor_parallel=False, logits_copies=logits_copies
        )

    return [
        one_rank("dense autograd", _dense, "reverse KL on all tokens' logits in plain torch", 8),
        one_rank("Liger", lambda i: _liger(i, False), "LigerFusedLinearJSDLoss as reverse KL"),
        one_rank("Liger compiled", lambda i: _liger(i, True), "the same under torch.compile"),
        one_rank(
            "TRL generalized_jsd_loss", _trl_dense, "GKD's loss on all logits as reverse KL", 10
        ),
        one_rank(
            "TRL chunked",
            lambda i: _trl_chunked(i, None),
            "ChunkedDivergenceFunction as reverse KL, in its tiles of 4096 tokens x 32768 ids",
            10,
        ),
        one_rank(
            "TRL our chunk", lambda i: _trl_chunked(i, i.shape.chunk), "the same with our chunk"
        ),
        Method(
            "ModelOpt LogitsKLLoss",
            RKL,
            _modelopt_full,
            note="on all logits, as reverse KL",
            logits_copies=10,
            partial_loss=True,
        ),
        Method(
            "ModelOpt TopKLogitsKLLoss",
            TOP_64,
            _modelopt_top_k,
            note="on all logits; the objective of kl_top64",
            logits_copies=4,
        ),
    ]


def _quiet_import(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _dense(inputs: Inputs) -> Forward:
    """Reverse KL on the logits of all tokens, in the fewest lines."""

    def forward() -> Outcome:
        log_p = torch.log_softmax((inputs.hidden @ inputs.weight.t()).float(), -1)
        with torch.no_grad():
            teacher = inputs.teacher_hidden @ inputs.teacher_weight.t()
            log_q = torch.log_softmax(teacher.float(), -1)
        per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
        return Outcome((inputs.token_weights * per_token).sum(), [per_token])

    return forward


def reverse_kl_setting(loss: Callable[[Tensor, Tensor, float], Tensor]) -> float:
    """Which of beta = 0 and 1 makes loss(student, teacher, beta) sum up KL(student || teacher).

    Found by its gradient on small random logits. Raises ValueError where neither does.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 32, generator=generator)
    student.requires_grad_()
    (expected,) = torch.autograd.grad(reference.rkl(student, teacher).sum(), student)
    for beta in (1.0, 0.0):
        (found,) = torch.autograd.grad(loss(student, teacher, beta), student)
        if torch.allclose(found, expected, rtol=1e-4, atol=1e-6):
            return beta
    raise ValueError("neither beta=0 nor beta=1 is the reverse KL")


def _liger(inputs: Inputs, compiled: bool) -> Forward:
    module = _quiet_import("liger_kernel.chunked_loss")

    def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        function = _quiet_import("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction
        return function.distillation_loss_fn(student, teacher, beta=beta)

    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=reverse_kl_setting(divergence),
        compiled=compiled,
        chunk_size=inputs.shape.chunk,
    )

    def forward() -> Outcome:
        return Outcome(
            loss(
                inputs.hidden,
                inputs.weight,
                inputs.teacher_hidden,
                inputs.teacher_weight,
                inputs.labels,
            )
        )

    return forward


def _trl_dense(inputs: Inputs) -> Forward:
    function = _quiet_import("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss

    def total(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        return function(student, teacher, beta=beta, reduction="sum")

    beta = reverse_kl_setting(total)

    def forward() -> Outcome:
        student = inputs.hidden @ inputs.weight.t()
        with torch.no_grad():
            teacher = inputs.teacher_hidden @ inputs.teacher_weight.t()
        # "batchmean" divides by the first dimension, which is the number of tokens here.
        return Outcome(function(student, teacher, beta=beta, reduction="batchmean"))

    return forward


def _trl_chunked(inputs: Inputs, token_chunk: int | None) -> Forward:
    """The function of TRL's DistillationTrainer, which multiplies again in backward: six products.

    It works on tiles of 4096 tokens and 32768 ids; token_chunk replaces the 4096.
    """
    module = _own_copy("trl.kernels.chunked_divergence")
    if token_chunk is not None:
        module.TOKEN_CHUNK_SIZE = token_chunk
        module.VOCAB_CHUNK_SIZE = min(module.VOCAB_CHUNK_SIZE, inputs.shape.vocab)
    function = module.ChunkedDivergenceFunction.apply

    def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        # Identity weights make the logits the hidden states.
        eye = torch.eye(student.shape[1])
        return function(student, eye, None, teacher, eye, None, beta)[0].sum()

    beta = reverse_kl_setting(divergence)

    def forward() -> Outcome:
        student = (inputs.hidden, inputs.weight, None)
        teacher = (inputs.teacher_hidden, inputs.teacher_weight, None)
        per_token, entropy = function(*student, *teacher, beta)
        return Outcome((inputs.token_weights * per_token).sum(), [per_token, entropy])

    return forward


def _own_copy(name: str) -> Any:
    """A fresh instance of a module, so that its constants can be set for one method only."""
    _quiet_import(name)
    original = importlib.util.find_spec(name)
    assert original is not None and original.origin is not None
    spec = importlib.util.spec_from_file_location(f"{name}_copy", original.origin)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _modelopt_full(inputs: Inputs) -> Forward:
    """Its loss is a part of a sum over ranks, as NVIDIA's trainers expect."""
    plugin, config = _modelopt(inputs)

    def of(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        alone = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)
        return plugin.LogitsKLLoss(alone, reverse=beta == 1.0)(student[None], teacher[None])[
            0
        ].sum()

    loss = plugin.LogitsKLLoss(config, reverse=reverse_kl_setting(of) == 1.0)
    return _modelopt_forward(inputs, loss)


def _modelopt_top_k(inputs: Inputs) -> Forward:
    """Forward KL of the laws that are renormalised on the teacher's top-k."""
    plugin, config = _modelopt(inputs)
    return _modelopt_forward(inputs, plugin.TopKLogitsKLLoss(config, top_k=TOP_64["k"]))


def _modelopt(inputs: Inputs) -> tuple[Any, Any]:
    """(the plugin, a model configuration); megatron-core knows the group of all ranks."""
    plugin = _quiet_import("modelopt.torch.distill.plugins.megatron")
    parallel_state = _quiet_import("megatron.core.parallel_state")
    if inputs.ranks > 1 and not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=inputs.ranks)
    config = SimpleNamespace(tensor_model_parallel_size=inputs.ranks, sequence_parallel=False)
    return plugin, config


def _modelopt_forward(inputs: Inputs, loss: Any) -> Forward:
    mappings = _quiet_import("megatron.core.tensor_parallel.mappings")

    def forward() -> Outcome:
        hidden = inputs.hidden
        if inputs.ranks > 1:  # as in ColumnParallelLinear: backward sums over the ranks
            hidden = mappings.copy_to_tensor_model_parallel_region(hidden)
        student = hidden @ inputs.weight.t()
        with torch.no_grad():
            teacher = inputs.teacher_hidden @ inputs.teacher_weight.t()
        per_token, *_ = loss(student[:, None], teacher[:, None])  # [S, B, V] -> [B, S]
        return Outcome((per_token[0] * inputs.token_weights).sum(), [per_token])

    return forward
