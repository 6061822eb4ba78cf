"""How experts are written in the DHT and found again: the only place that knows.

Reading order: `index` (what the records hold), `directory` (declare, find, failures), `cache` (when the DHT is asked),
`suspicion` (which declared experts are not offered, and until when).
"""

from labkit.directory.cache import DirectoryConfig, Records
from labkit.directory.directory import Directory
from labkit.directory.index import Children
from labkit.directory.suspicion import SuspicionConfig

__all__ = ["Children", "Directory", "DirectoryConfig", "Records", "SuspicionConfig"]
