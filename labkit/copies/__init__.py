"""Copies: each expert's state is kept at other servers of its grid too, so that one of them can carry it on.

An expert's *primary* is the server that serves it. It sends copies of the state to a few others, its *backups*. The
*epoch* grows with each change of primary; of two copies that with the higher `(epoch, updates)` is newer.

No batch passes here. From the words to the work:

    messages     what primaries and backups say to each other
    store        the copies that a server keeps: one file each, replaced atomically
    checking     whether a file that has arrived is a sound state of the expert that it is said to be
    receiving    the backup's side: takes copies in, part by part, and lets them count when they are whole
    sending      the primary's side, under a budget of bytes
    servers      the servers of a grid, as they write themselves into the DHT
    placement    which of them is to keep a copy of which expert
    copying      keeps copies of the experts that are served here; backups: at which servers; made: which there are
    watching     notices who is gone; takeover: claims its experts
    handover     gives experts to others; levelling: until loads are even
    meeting      settles with another server that serves an expert, too, who goes on with it
    keeper       all of it, for one server; experts: what it needs of that

Nothing here imports `server`: what a copy needs of one is handed in.
"""

from labkit.copies.checking import check_copy
from labkit.copies.messages import CopyHead
from labkit.copies.placement import rank
from labkit.copies.receiving import CopyReceiver
from labkit.copies.sending import CopyBudget, send_copy
from labkit.copies.servers import GridServers, ServerRecord
from labkit.copies.store import Copy, CopyStore

__all__ = [
    "Copy", "CopyBudget", "CopyHead", "CopyReceiver", "CopyStore", "GridServers", "ServerRecord", "check_copy",
    "rank", "send_copy",
]  # fmt: skip
