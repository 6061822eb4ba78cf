"""The DHT: Kademlia over labkit's remote calls (paper: Maymounkov & Mazieres, "Kademlia", IPTPS 2002).

Reading order: `routing` (the nodes that are known), `storage` (the records that are held), `eviction` (what gives way
when it is full), `protocol` (what crosses the wire), `lookup` (which nodes to ask next), `shared_lookups` (those that
several wait for), `peers` (all calls to other nodes), `service` (the answers to theirs), `replicas` (where a record is
stored), `maintenance` (background work), `node` (the DHT node itself). `signing` is for records that have an owner.
"""

from labkit.dht.node import DHTConfig, DHTNode, Entry, Value
from labkit.dht.signing import Signer

__all__ = ["DHTConfig", "DHTNode", "Entry", "Signer", "Value"]
