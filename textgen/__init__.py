"""A small text generator: data, tokenizer, models, training loop, replies.

An island: it knows nothing of pruning, and imports nothing of this package but its errors.
"""
