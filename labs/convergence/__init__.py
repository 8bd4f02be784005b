"""The laboratory of convergence: what pruning costs in loss, per bit received.

All islands train in one process through the product's own classes on a loopback, so what is
measured here is what the product does, but for time.
"""
