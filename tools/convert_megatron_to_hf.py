"""Megatron -> Hugging Face: the same as `megaopd convert megatron-to-hf`."""

import sys

from megaopd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
