"""The kernel's side of IPVS mode: services and real servers, done and listed.

Lives here: what is sent in which batch, and what the kernel's error numbers mean. Must not: decide
what should be there. Everything blocks; the driver calls it beside its event loop.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from vipd.backends import netlink
from vipd.backends.ipvs import messages
from vipd.backends.ipvs.messages import Counted, Usage
from vipd.backends.ipvs.objects import (
    ADD,
    DELETE,
    SET,
    Destination,
    Manner,
    Operation,
    Service,
)
from vipd.backends.ipvs.schedulers import module
from vipd.proxy.errors import Busy, DataplaneError, OutOfStep, Rejected, Unsupported
from vipd.proxy.names import Address, Family, Protocol

LISTING = Path("/proc/thread-self/net/ip_vs")
"""Everything in one read. Asked over netlink, each service's real servers are a dump of their own.
Persistence is printed in jiffies and flags not at all (6.1), so services are asked over netlink."""
REMEDY = "modprobe ip_vs (Debian: part of linux-image-amd64)"
_PROTOCOLS = {one.value: one for one in Protocol}
_GONE = (errno.ENOENT, errno.ESRCH)


class Kernel:
    """Talks to the IPVS of this network namespace."""

    def __init__(self) -> None:
        self._family = 0

    def available(self) -> bool:
        """Return whether the kernel has IPVS loaded."""
        try:
            self._family_id()
        except Unsupported:
            return False
        return True

    def ipvs(self, operations: Sequence[Operation]) -> dict[Operation, DataplaneError]:
        """Do operations on services and real servers in order; return those that failed.

        A removal of what is not there has succeeded. Raise OutOfStep where something is changed
        that is not there.
        """
        if not operations:
            return {}
        family = self._family_id()
        with netlink.generic() as socket:
            codes = socket.request([messages.ipvs(family, one) for one in operations])
            failed = {one: code for one, code in zip(operations, codes, strict=True) if code}
            # A real server that is there already gets the weight it should have.
            again = [
                Operation(SET, one.thing, one.value)
                for one, code in failed.items()
                if code == errno.EEXIST and isinstance(one.thing, Destination)
            ]
            codes = socket.request([messages.ipvs(family, one) for one in again])
        if any(codes):
            raise OutOfStep(f"{again[0]}: {os.strerror(max(codes))}")
        done = {one.thing for one in again}
        return {
            one: _meaning(one, code)
            for one, code in failed.items()
            if one.thing not in done and not _harmless(one, code)
        }

    def services(self) -> dict[Service, Manner]:
        """Return every service of the kernel, whoever made it; services by mark are left out."""
        if not self.available():
            return {}
        with netlink.generic() as socket:
            listed = socket.ask(messages.get_services(self._family_id()))
        return dict(one for one in map(messages.seen_service, listed) if one is not None)

    def connections(self, services: Iterable[Service]) -> dict[Service, list[Counted]]:
        """Return the real servers of these services; none for one that is not there."""
        family = self._family_id()
        found = {}
        with netlink.generic() as socket:
            for service in services:
                try:
                    listed = socket.ask(messages.get_destinations(family, service))
                except OutOfStep:
                    continue
                found[service] = [messages.seen_destination(one) for one in listed]
        return found

    def usage(self, service: Service) -> tuple[int, list[Usage]] | None:
        """Return the connections that a service has had, and what its real servers count.

        None where it is not there.
        """
        family = self._family_id()
        with netlink.generic() as socket:
            try:
                (told,) = socket.ask(messages.get_service(family, service))
                listed = socket.ask(messages.get_destinations(family, service))
            except OutOfStep:
                return None
        return messages.total(told), [messages.usage(one) for one in listed]

    def everything(self) -> dict[Service, list[Counted]]:
        """Return all services with their real servers."""
        try:
            return parse(LISTING.read_text())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise Busy(f"{LISTING}: {error.strerror}") from error

    def set_timeouts(self, tcp: int, tcp_fin: int, udp: int) -> None:
        """Set the time-outs of all of IPVS at once; 0 leaves one as it is."""
        with netlink.generic() as socket:
            (code,) = socket.request([messages.set_timeouts(self._family_id(), tcp, tcp_fin, udp)])
        if code:
            raise Rejected(f"ipvsadm --set {tcp} {tcp_fin} {udp}", os.strerror(code))

    def _family_id(self) -> int:
        if not self._family:
            with netlink.generic() as socket:
                try:
                    self._family = messages.family_id(socket.ask(messages.get_family("IPVS"))[0])
                except OutOfStep as error:
                    raise Unsupported("IPVS", REMEDY) from error
        return self._family


def parse(text: str) -> dict[Service, list[Counted]]:
    """Return what ``/proc/net/ip_vs`` says (ip_vs_info_seq_show in ip_vs_ctl.c, 6.1)."""
    found: dict[Service, list[Counted]] = {}
    current: list[Counted] = []
    for line in text.splitlines()[3:]:
        parts = line.split()
        if not parts:
            continue
        if parts[0] == "->":
            address, port = _place(parts[1])
            current.append(Counted(address, port, int(parts[3]), int(parts[4]) + int(parts[5])))
        elif parts[0] in _PROTOCOLS:
            address, port = _place(parts[1])
            family = Family.IPV4 if address.version == 4 else Family.IPV6
            current = found.setdefault(Service(family, _PROTOCOLS[parts[0]], address, port), [])
        else:
            current = []  # a service by mark, which is never ours
    return found


def _place(text: str) -> tuple[Address, int]:
    host, _, port = text.rpartition(":")
    if host.startswith("["):
        return IPv6Address(host[1:-1]), int(port, 16)
    return IPv4Address(int(host, 16)), int(port, 16)


def _harmless(one: Operation, code: int) -> bool:
    """Return whether a failure means that it is already as it should be."""
    quiet = one.verb is DELETE or (one.verb is SET and one.value == 0)
    return quiet and code in _GONE


def _meaning(one: Operation, code: int) -> DataplaneError:
    thing, text = one.thing, os.strerror(code)
    if code in (errno.EPERM, errno.EACCES):
        raise Unsupported("CAP_NET_ADMIN", "run as root, or inside `unshare -Urnm`")
    if isinstance(thing, Service):
        if code == errno.EEXIST:
            return Rejected(str(one), "another program has this IPVS virtual server")
        if code == errno.ENOENT and isinstance(one.value, Manner):
            name = module(one.value.scheduler.name)
            return Rejected(
                str(one),
                f"the kernel has no module {name}: modprobe {name} "
                "(Debian: part of linux-image-amd64)",
            )
    if code in _GONE and one.verb is not ADD:
        raise OutOfStep(f"{one}: {text}")
    return Rejected(str(one), text)
