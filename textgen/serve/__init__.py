"""A trained model over HTTP, as OpenAI's clients expect it.

`slots` and `batch` run the model, `engine` holds the queue, `app` speaks HTTP, `watch` reloads.
"""
