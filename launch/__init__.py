"""Scripts that start training and replies. Their imports are relative: `textgen/launch` is this."""
