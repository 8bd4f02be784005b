"""Scripts that train, reply and report, and the shell scripts that prepare a machine for them."""
