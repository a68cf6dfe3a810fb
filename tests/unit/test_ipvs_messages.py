"""The netlink messages of IPVS mode, held against those that pyroute2 encodes."""

import socket
from typing import Any

import pytest
from pyroute2.netlink.generic import ipvs

from vipd.backends import netlink
from vipd.backends.ipvs import kernel, messages
from vipd.backends.ipvs.objects import (
    ADD,
    DELETE,
    SET,
    Destination,
    Manner,
    Operation,
    Service,
    Verb,
)
from vipd.backends.ipvs.schedulers import Scheduler
from vipd.proxy.names import Family, Protocol, parse_address

FAMILY_ID = 30
RR = Scheduler("rr")
FOUR = Service(Family.IPV4, Protocol.TCP, parse_address("10.96.0.1"), 80)
SIX = Service(Family.IPV6, Protocol.UDP, parse_address("fd00:10:96::1"), 53)
SCTP = Service(Family.IPV4, Protocol.SCTP, parse_address("10.96.0.2"), 9)
NUMBER = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}


def identity(service: Service) -> list[tuple[str, Any]]:
    return [
        ("IPVS_SVC_ATTR_AF", _af(service.family)),
        ("IPVS_SVC_ATTR_PROTOCOL", NUMBER[service.protocol]),
        ("IPVS_SVC_ATTR_ADDR", str(service.address)),
        ("IPVS_SVC_ATTR_PORT", service.port),
    ]


def encoded(command: int, attributes: list[tuple[str, Any]], flags: int = 5) -> bytes:
    message = ipvs.ipvsmsg()
    message["cmd"], message["version"] = command, 1
    message["header"]["type"], message["header"]["flags"] = FAMILY_ID, flags
    message["attrs"] = attributes
    message.encode()
    return bytes(message.data)


def _af(family: Family) -> int:
    return socket.AF_INET if family is Family.IPV4 else socket.AF_INET6


@pytest.mark.parametrize("service", [FOUR, SIX, SCTP], ids=str)
@pytest.mark.parametrize(("verb", "command"), [(ADD, 1), (SET, 2)])
@pytest.mark.parametrize("persistence", [0, 600])
def test_a_service(service: Service, verb: Verb, command: int, persistence: int) -> None:
    made = messages.ipvs(
        FAMILY_ID, Operation(verb, service, Manner(Scheduler("mh", 0x18), persistence))
    )
    flags = 0x18 | (1 if persistence else 0)
    six = service.family is Family.IPV6
    expected = encoded(
        command,
        [
            (
                "IPVS_CMD_ATTR_SERVICE",
                {
                    "attrs": [
                        *identity(service),
                        ("IPVS_SVC_ATTR_SCHED_NAME", "mh"),
                        ("IPVS_SVC_ATTR_FLAGS", {"flags": flags, "mask": 0xFFFFFFFF}),
                        ("IPVS_SVC_ATTR_TIMEOUT", persistence),
                        ("IPVS_SVC_ATTR_NETMASK", "128.0.0.0" if six else "255.255.255.255"),
                    ]
                },
            )
        ],
    )
    assert made == expected


@pytest.mark.parametrize("service", [FOUR, SIX, SCTP], ids=str)
@pytest.mark.parametrize(("verb", "command"), [(ADD, 5), (SET, 6)])
@pytest.mark.parametrize("weight", [0, 3])
def test_a_destination(service: Service, verb: Verb, command: int, weight: int) -> None:
    address = "10.0.0.7" if service.family is Family.IPV4 else "fd00::7"
    one = Destination(service, parse_address(address), 8080)
    assert messages.ipvs(FAMILY_ID, Operation(verb, one, weight)) == encoded(
        command,
        [
            ("IPVS_CMD_ATTR_SERVICE", {"attrs": identity(service)}),
            (
                "IPVS_CMD_ATTR_DEST",
                {
                    "attrs": [
                        ("IPVS_DEST_ATTR_ADDR", address),
                        ("IPVS_DEST_ATTR_PORT", 8080),
                        ("IPVS_DEST_ATTR_FWD_METHOD", 0),
                        ("IPVS_DEST_ATTR_WEIGHT", weight),
                        ("IPVS_DEST_ATTR_U_THRESH", 0),
                        ("IPVS_DEST_ATTR_L_THRESH", 0),
                        ("IPVS_DEST_ATTR_ADDR_FAMILY", _af(service.family)),
                    ]
                },
            ),
        ],
    )


def test_deletions_name_the_thing_only() -> None:
    manner = Manner(RR)
    assert messages.ipvs(FAMILY_ID, Operation(DELETE, FOUR, manner)) == encoded(
        3, [("IPVS_CMD_ATTR_SERVICE", {"attrs": identity(FOUR)})]
    )


def test_what_the_kernel_tells_of_a_service_is_read_again() -> None:
    for service in (FOUR, SIX, SCTP):
        manner = Manner(Scheduler("mh", 0x18), 600)
        told = messages.ipvs(FAMILY_ID, Operation(ADD, service, manner))
        assert messages.seen_service(told) == (service, manner)


def test_proc_lists_services_of_both_families_and_none_by_mark() -> None:
    lines = (
        "IP Virtual Server version 1.2.1 (size=4096)",
        "Prot LocalAddress:Port Scheduler Flags",
        "  -> RemoteAddress:Port Forward Weight ActiveConn InActConn",
        "TCP  0A600001:0050 rr  persistent 150000 FFFFFFFF",
        "  -> 0A020202:1F90      Masq    1      2          3         ",
        "FWM  00000007 rr  ",
        "  -> 0A020203:0050      Masq    1      9          9         ",
        "UDP  [fd00:0010:0096:0000:0000:0000:0000:0001]:0035 wrr ",
        "  -> [fd00:0000:0000:0000:0000:0000:0000:0002]:1F90      Masq    3      0          4     ",
    )
    assert kernel.parse("\n".join(lines)) == {
        FOUR: [messages.Counted(parse_address("10.2.2.2"), 8080, 1, 5)],
        SIX: [messages.Counted(parse_address("fd00::2"), 8080, 3, 4)],
    }


def test_messages_of_a_batch_are_told_apart_by_their_numbers() -> None:
    made = [
        netlink.numbered(number, messages.ipvs(FAMILY_ID, Operation(DELETE, one, Manner(RR))))
        for number, one in ((7, FOUR), (8, SIX))
    ]
    found = list(netlink.split(b"".join(made)))
    assert [(kind, number, whole) for kind, _, number, whole in found] == [
        (FAMILY_ID, 7, made[0]),
        (FAMILY_ID, 8, made[1]),
    ]
