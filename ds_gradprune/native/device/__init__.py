"""Triton kernels for accelerators, bit for bit equal to the references. Imported where used."""
