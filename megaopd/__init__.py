"""megaopd: on-policy distillation of language models on megatron-core."""

__version__ = "0.1.0"
