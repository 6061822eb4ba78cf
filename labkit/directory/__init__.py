"""How experts are declared in the DHT and found again. No other package knows how their records look.

Reading order: `index` (what the records hold), `declaring`, `directory` (finding, failures), `cache` (when the DHT is
asked), `second_look` (before a call counts as lost), `suspicion` (which declared experts are not offered, and until
when), `declarations` (what is declared, whether offered or not), `claims` (who is about to serve what), `views` (the
directory with more or fewer experts), `grids` (the sizes of grids), `genuine` (who may claim what).
"""

from labkit.directory.cache import DirectoryConfig, Records
from labkit.directory.directory import Directory
from labkit.directory.index import Children, Declared
from labkit.directory.suspicion import SuspicionConfig

__all__ = ["Children", "Declared", "Directory", "DirectoryConfig", "Records", "SuspicionConfig"]
