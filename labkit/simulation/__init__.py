"""A network in memory and in virtual time, for thousands of nodes in one thread. What runs over it is what ships.

Reading order: `network` and `endpoint` (the seam of `wire/transport`), `latency`, `virtual_clock`; `lockstep` (trainers
that take turns with trio) and `swarm` (servers and a node on such a network).
"""
