"""Where the time of a step goes: rank 0's timeline, exchange waited for and hidden."""
