"""The tie between DeepSpeed and the rest: groups, shards, hooks, checkpoints."""
