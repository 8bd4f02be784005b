"""What `labs.gpu_check` finds out on a GPU machine, part by part."""
