"""Bringing up one run on many processes: who is there, what they agree on, where the run lies."""
