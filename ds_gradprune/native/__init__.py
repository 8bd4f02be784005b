"""The hot loops in C++, built on first use: the same bits as the numpy and torch references.

`native.library.kernels` gives them, or None where they cannot be had; `native.build` compiles.
"""
