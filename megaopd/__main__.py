"""python -m megaopd."""

import sys

from megaopd.cli import main

if __name__ == "__main__":
    sys.exit(main())
