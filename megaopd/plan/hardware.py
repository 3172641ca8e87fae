"""Figures of GPUs and of the links between them, and what is assumed of both.

Peaks are the vendor's; everything that says ASSUMED is a round number, not a measurement.
"""

from dataclasses import dataclass

from megaopd.errors import UserError

GIB = 2**30

# ASSUMED share of the peak that matrix products of this size reach, without any waiting.
EFFICIENCY = 0.5
# ASSUMED share of a link's rate that large collectives reach.
LINK_EFFICIENCY = 0.75
# ASSUMED microseconds of one collective call, whatever its size.
CALL_US = 20.0
# ASSUMED bytes that no tensor of ours holds: CUDA context, cuBLAS and Transformer Engine
# workspaces, NCCL buffers of some ten groups.
FIXED_RESERVE = 3 * GIB
# ASSUMED share of the memory that the caching allocator cannot use: fragments, rounding.
FRAGMENTS = 0.06
# ASSUMED bytes that a rollout server on the same GPU keeps while it sleeps: its own CUDA context
# and graphs; weights and key/value cache are released.
SLEEPING_SERVER = 4 * GIB


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in nodes of `per_node`, with one network card a GPU."""

    name: str
    memory: int  # bytes that a process can have
    flops: float  # dense bf16, a second
    node_link: float  # bytes a second and direction to another GPU of the node
    network: float  # the same to another node
    per_node: int = 8

    @property
    def reserve(self) -> float:
        """Bytes that the plan leaves free."""
        return FIXED_RESERVE + FRAGMENTS * self.memory


# Memory: what torch.cuda reports, a little less than the label.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 79 * GIB, 312e12, 300e9, 25e9),
        Gpu("h100", 79 * GIB, 989e12, 450e9, 50e9),
        Gpu("h200", 139 * GIB, 989e12, 450e9, 50e9),
        Gpu("b200", 178 * GIB, 2250e12, 900e9, 50e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """The figures of a GPU by name."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}", expected="one of " + ", ".join(GPUS))
    return GPUS[name.lower()]
