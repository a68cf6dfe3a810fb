"""The forwarder of this process: made when it is wanted, told when its settings change.

Lives here: its life, and what it is told of this server. Must not: know how upstreams are asked
(forward/).
"""

from collections.abc import Collection

from vipd.backends import log
from vipd.dns.forward import wire
from vipd.dns.forward.forwarder import Forwarder, Own
from vipd.dns.server.messages import Sample, WireListen
from vipd.dns.server.serving import Serving
from vipd.dns.settings import DnsSettings

_HEAD = b"\0\0\x01\0\0\x01\0\0\0\0\0\0"
_IN = b"\0\x01"


class Forwarding:
    """Lets `serving` have a forwarder of the settings, or none."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._forwarder: Forwarder | None = None

    async def change(self, settings: DnsSettings, own: Collection[WireListen]) -> None:
        """Forward by these settings from now on; what is under way or cached stays.

        `own` are the addresses that this server answers at.
        """
        forwarder = self._forwarder
        if not settings.forwards:
            self._serving.asks = self._forwarder = None
            if forwarder is not None:
                await forwarder.close()
        elif forwarder is None:
            forwarder = Forwarder(
                settings.forward,
                is_ours=self._is_ours,
                own_zone=self._own_zone,
                own=own,
                note=log.warning,
            )
            try:
                await forwarder.start()
            except Exception:  # the cluster's names are answered whatever becomes of the others
                log.exception("names of others are not forwarded")
                return
            self._serving.asks = self._forwarder = forwarder
        else:
            await forwarder.reload(settings.forward, own)

    def samples(self) -> list[Sample]:
        """Return what it has counted."""
        if self._forwarder is None:
            return []
        return [(one.name, list(one.labels), float(one.value)) for one in self._forwarder.samples()]

    async def close(self) -> None:
        """End it, with what waits."""
        if self._forwarder is not None:
            await self._forwarder.close()

    def _is_ours(self, name: bytes) -> bool:
        return self._serving.answers.zone.is_ours(name)

    def _own_zone(self, name: bytes, kind: int) -> Own | None:
        """Return what the zone says where a CNAME of others leads into it."""
        answers = self._serving.answers
        found = answers.tcp(b"%b%b%b%b" % (_HEAD, name, kind.to_bytes(2), _IN))
        if isinstance(found, bytes):
            return Own(found)
        if found is None or not found.before:  # names of others: it is not asked for these
            return None
        ttl = answers.zone.settings.ttl
        chain = [wire.record(wire.CNAME, ttl, target, owner) for owner, target in found.before]
        return Own(wire.reply(name, kind, answers=tuple(chain)), found.name)
