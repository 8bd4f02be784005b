"""What `benchmarks/ethernet.py` is made of: methods, the ranks that train with them, the figures.

methods.py     names of methods and what they mean
job.py         what a rank is told, as JSON
worker.py      one rank: trains with one method, on command
engines.py     the method at work, in DeepSpeed or in torch's DistributedDataParallel
onebit_adam.py 1-bit Adam and 0/1 Adam, simulated: their update
onebit.py      their average in one bit per element, on a real wire
crew.py        the ranks of one method: started, commanded, their bytes counted
campaign.py    which runs are made, in which order
record.py      what was measured so far, on disk
figures.py     from runs to medians, curves, and the time to dense's loss
breakeven.py   the link rate below which pruning wins, predicted and checked
page.py        tables
plots.py       one picture per question
command.py     the command line
"""
