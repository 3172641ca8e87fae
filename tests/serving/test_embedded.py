"""The embedded engine obeys the contract of every engine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megaopd.rollout.hf import EmbeddedEngine
from tests.serving.conformance import EOS, Conformance, weights_of


class TestEmbedded(Conformance):
    @pytest.fixture(scope="class")
    def engine(self, hf_dir: Path, reference: Any) -> EmbeddedEngine:
        engine = EmbeddedEngine(
            hf_dir,
            eos_ids=[EOS],
            pad_id=0,
            dtype=torch.float32,
            device=torch.device("cpu"),
            batch_size=300,
        )
        engine.update_weights(weights_of(reference), 3)
        return engine
