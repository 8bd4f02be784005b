"""Adaptive gradient pruning for DeepSpeed over slow, unstable Ethernet."""

__version__ = "0.1.0"
