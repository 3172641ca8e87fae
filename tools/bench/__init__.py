"""The benchmark of the losses: tools/bench_loss.py is its command."""
