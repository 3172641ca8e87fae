"""`megaopd plan` as a script: memory, traffic and time of a run before it is started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megaopd.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
