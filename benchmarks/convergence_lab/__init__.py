"""The laboratory behind benchmarks/convergence.py: what pruning costs in loss, per bit received."""
