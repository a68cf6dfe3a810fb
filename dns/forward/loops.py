"""Upstreams that ask us what we ask them.

Lives here: names that nobody else knows, one for each upstream, and what it means when one comes
back. Pure. Must not: send them (forwarder.py).

An upstream through which its name comes back is left out until its next name does not. The usual
reason is a resolv.conf that names this very server, or a resolver of the node that forwards here.
"""

from vipd.dns.forward import wire
from vipd.dns.forward.got import Got
from vipd.dns.forward.question import Question
from vipd.dns.forward.standing import Standing

RECHECK_SECONDS = 30.0
"""How often it is looked again at those that loop."""
_LABEL_BITS = 64
_LABELS = 2


class Loops:
    """The names that are under way, each with the upstream it was sent to."""

    def __init__(self, bits: wire.RandomBits) -> None:
        self.names: dict[bytes, Standing] = {}
        """Wire form, lower case."""
        self._bits = bits
        self._seen: set[Standing] = set()

    def begin(self, standing: Standing, domain: bytes) -> Question:
        """Return a question to send to an upstream, for a name in one of its domains."""
        labels = b"".join(b"\x10%016x" % self._bits(_LABEL_BITS) for _ in range(_LABELS))
        # A stub domain may be too long for it; the upstream is asked all the same.
        name = labels + (domain if len(labels) + len(domain) <= 255 else b"\0")
        self.names[name] = standing
        self._seen.discard(standing)
        return Question(name, wire.HINFO)

    def came_back(self, name: bytes, qtype: int) -> Got:
        """Take one of the names from a client, and return what to answer."""
        self._seen.add(self.names[name])
        return Got(wire.reply(name, qtype, wire.REFUSED), wire.EDE_OTHER)

    def end(self, question: Question) -> bool:
        """Return whether its upstream loops, now that the upstream has answered or not."""
        standing = self.names.pop(question.name)
        standing.looping = standing in self._seen
        self._seen.discard(standing)
        return standing.looping
