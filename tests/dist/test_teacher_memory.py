"""No rank holds logits of all tokens: the largest tensor of an update is one chunk of them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dist.models import save_tiny
from tests.dist.test_teacher_grids import archs, parallel

V, SAMPLES, RESPONSE, CHUNK = 16384, 128, 64, 512
T = SAMPLES * RESPONSE  # 8192 tokens in one micro-batch


class Largest(TorchDispatchMode):
    """Bytes and shape of the largest storage behind any tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes, self.shape, self.op, self.seen = 0, (), "", 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes()
                self.seen += 1
                if size > self.bytes:
                    self.bytes, self.shape, self.op = size, tuple(tensor.shape), str(func)
        return made


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    shape = {"vocab_size": V, "num_hidden_layers": 1, "eos_token_id": 1}
    return [
        str(save_tiny(root / "student", "qwen3", tied=True, **shape)),
        str(save_tiny(root / "teacher", "qwen3", tied=False, seed=9, **shape, hidden_size=96)),
    ]


def batch():
    import random

    from megaopd.data.types import Prompt, Sample

    rng = random.Random(0)
    made = []
    for i in range(SAMPLES):
        prompt = Prompt(str(i), (rng.randrange(V), rng.randrange(V)), "", None, "")
        ids = tuple(rng.randrange(V) for _ in range(RESPONSE))
        made.append(Sample(prompt, ids, None, "stop", 0))
    return made


def update(paths, sequence, regrouped):
    """The largest tensor of one update: (bytes, shape, operation, tensors seen, tokens)."""
    from megaopd.models.arch import padded_vocab
    from megaopd.models.config import ModelConfig
    from megaopd.objectives.spec import ObjectiveConfig
    from megaopd.parallel import ParallelConfig, make_grid
    from megaopd.trainer.batch import make_micro_batches
    from megaopd.trainer.config import OptimConfig
    from megaopd.trainer.student import Student
    from megaopd.trainer.teacher import Teacher
    from megaopd.trainer.teachers.exchange import RegroupedTeacher
    from megaopd.worlds import second_layout

    grid = make_grid(parallel((2, 1, sequence)))
    arch, teacher_arch = archs(paths)
    objective = ObjectiveConfig(chunk_size=CHUNK)
    student = Student(ModelConfig(paths[0]), arch, grid, objective, OptimConfig(lr=1e-3))
    rows, config = padded_vocab(V, 2, 8), ModelConfig(path=paths[1])
    if regrouped:
        layout = second_layout(ParallelConfig())
        teacher = RegroupedTeacher(config, teacher_arch, grid, layout, vocab_rows=rows)
    else:
        teacher = Teacher(config, teacher_arch, grid, vocab_rows=rows)
    micro_batches = make_micro_batches(
        batch(), grid=grid, micro_batch_size=SAMPLES, pad_id=0, loss_agg="token-mean"
    )
    with Largest() as largest:
        metrics = student.update(micro_batches, teacher)
    assert metrics["grad_norm"] > 0
    return largest.bytes, largest.shape, largest.op, largest.seen, metrics["tokens"]


@pytest.mark.parametrize(("sequence", "regrouped"), [(False, False), (True, False), (False, True)])
def test_the_largest_tensor_is_a_chunk_of_logits(ranks, paths, sequence, regrouped):
    found = ranks.run(update, 2, paths, sequence, regrouped, timeout=300)
    for size, shape, op, seen, tokens in found:
        print(f"largest {size / 2**20:.1f} MiB {shape} by {op}; {seen} tensors seen")
        assert tokens == T and seen > 1000
        # All logits would be 256 MiB; a chunk is 16.
        assert size <= CHUNK * V // 2 * 4, f"{shape} by {op}: {size} bytes"
    # The chunk itself was seen, so that the figure is not of something else.
    assert all(size == CHUNK * V // 2 * 4 for size, *_ in found)
