"""What `benchmarks/ethernet.py` is made of: methods, the ranks that train with them, the figures.

methods.py     names of methods and what they mean
job.py         what a rank is told, as JSON
worker.py      one rank: trains with one method, on command
engine.py      what the engines have in common
engines.py     a method at work in DeepSpeed, with and without us
ddp.py         a method at work in torch's DistributedDataParallel
simulated.py   1-bit Adam and 0/1 Adam at work, simulated
onebit_adam.py their update
onebit.py      their average in one bit per element, on a real wire
crew.py        the ranks of one method: started, commanded, their bytes counted
campaign.py    which runs are made, in which order
record.py      what was measured so far, on disk
figures.py     from runs to medians, curves, and the time to dense's loss
breakeven.py   the link rate below which pruning wins, predicted and checked
page.py        tables
plots.py       one picture per question
files.py       JSON, page and pictures of a campaign
command.py     the command line
"""
