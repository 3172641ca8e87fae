"""python -m megaopd."""

import sys

from megaopd.cli import main

# The guard matters: dist_checkpointing spawns a helper process that imports this module again.
if __name__ == "__main__":
    sys.exit(main())
