"""The DHT: Kademlia over labkit's remote calls (paper: Maymounkov & Mazieres, "Kademlia", IPTPS 2002).

Reading order: `routing` (whom we know), `storage` (what we hold), `search` (whom to ask next), `protocol` (what crosses
the wire), `peers` (every call made), `node` (the DHT node itself). `signing` is for records that have an owner.
"""

from labkit.dht.node import DHTConfig, DHTNode, Entry, Value
from labkit.dht.signing import Signer

__all__ = ["DHTConfig", "DHTNode", "Entry", "Signer", "Value"]
