"""What lies where in a bucket, and what of it is kept: layouts, blocks, selection, application."""
