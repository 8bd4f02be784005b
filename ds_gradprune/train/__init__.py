"""One step after the other: what is exchanged, when, and how it is applied; no DeepSpeed."""
