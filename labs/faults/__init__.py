"""The fault laboratory: schedules of faults from a seed, on loopback and on a bed of hosts."""
