"""Relays: how others reach a node that takes no connections, such as one behind a router.

A node that can be reached relays for those that cannot. A hidden node reserves a port at a relay, and holds a TCP
connection to it, over which it is told of each caller at that port. It then opens one more connection to the relay, and
one to its own listening socket; the relay splices the caller's bytes with the first, and the hidden node splices the
first with the second. All connections between the two are opened by the hidden node. Encryption (CURVE) runs from the
caller to the hidden node, so that a relay sees none of the plain text, and ZeroMQ knows nothing of it all.

Reading order: `splice` (two streams joined, with back-pressure), `turns` (fair shares), `messages` (what relay and
hidden node say to each other), `limits`, `server` (relays for others), `reservation` (a port at a relay, as the hidden
node holds it), `finding` (relays in the DHT), `keeper` (keeps a node reachable: finds a relay, and takes another),
`neighbours` (relayed nodes of one network call each other directly), `passages` and `crossing` (nodes that have only
IPv4 and those that have only IPv6 call each other, at the relay and at the caller), `relaying` (all of it, for one
node).
"""
