"""A simulator in which control laws steer a training run, and runs of ours on a real link."""
