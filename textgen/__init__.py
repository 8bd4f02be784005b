"""A small text generator: data, tokenizer, models, training loop, replies.

It knows nothing of pruning and of launching. Of ds_gradprune it imports the errors alone.
"""
