"""What forwarding gives back: a whole reply, ready to be made the client's.

Lives here: that one type. Pure.
"""

from typing import NamedTuple


class Got(NamedTuple):
    """A whole reply in wire form: id 0, QR, RD and RA set, question in lower case, no OPT.

    TTLs are already aged. `extended_error` is an RFC 8914 code to tell the client, or None.
    """

    message: bytes
    extended_error: int | None = None
    before: tuple[bytes, ...] = ()
    """Replies in the same form whose CNAMEs led to the question of `message`: the first is to the
    question that was asked, each next one to the target of the one before. They are not joined
    here, as it is not known here what of them a client has room for."""
