"""Hosts on one machine: namespaces with their own network, names and processes, on shaped links.

    with Bed(hosts=2, rate="100mbit") as bed:
        bed.hosts[0].run(["deepspeed", "--hostfile", str(bed.hostfile), ...], env=bed.environ())
        bed.set_rate("20mbit")

Linux, as root, with iproute2, openssh-server and pdsh. Knows nothing of pruning.
"""

from tools.netbed.bed import Bed
from tools.netbed.host import Counters, Host
from tools.netbed.rates import parse_rate
from tools.netbed.schedule import Event, merge, outages, random_walk, square_wave, steps

__all__ = [
    "Bed",
    "Counters",
    "Event",
    "Host",
    "merge",
    "outages",
    "parse_rate",
    "random_walk",
    "square_wave",
    "steps",
]
