"""A container, as Docker makes it: its host translates its address, and reaches it where nobody else does."""

from __future__ import annotations

from labkit.contact import Contact
from tests.network.waiting import until_answered, until_said

OPEN = "tcp://0.0.0.0:*"


def test_a_container_is_relayed_as_soon_as_others_come_or_reached_at_ports_that_are_published(on):
    host, inside, other = (on.notebook(name) for name in ("docker", "container", "two_faced"))
    invite = host.start(listen=OPEN, relay=True)
    assert Contact.from_invitation(invite).host == "5.5.5.40"  # and not that of docker0
    inside.join(invite, listen=OPEN)
    inside.serve(grid=[1])
    until_said(inside, "reachable: 5.5.5.40 called back at 172.17.0.2")
    other.join(invite, listen=OPEN)
    until_answered(other, ["ffn.0"], 40)
    until_said(other, "(relayed by 5.5.5.40:")
    inside.join(invite, listen="tcp://0.0.0.0:31000-31009", announce="5.5.5.40:31000")
    inside.serve(grid=[1])
    until_said(inside, "called back at 5.5.5.40:31000")
    assert "servers[0]  running  5.5.5.40:31001" in inside.look() and "relayed" not in inside.look()
    until_answered(other, ["ffn.0"])
    until_answered(host, ["ffn.0"])
