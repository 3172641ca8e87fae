"""Speed, memory, traffic and gradient error of the losses: `python tools/bench_loss.py --help`."""

import os
import sys

# Read when torch is imported: one thread a rank, and a profiler that does not talk.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
    os.environ[name] = "1"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# Large pages for large tensors, for every method alike: fewer page faults in fresh buffers.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if __name__ == "__main__":
    from bench.cli import main

    sys.exit(main())
