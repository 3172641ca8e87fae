"""Hugging Face -> Megatron: the same as `megaopd convert hf-to-megatron`."""

import sys

from megaopd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
