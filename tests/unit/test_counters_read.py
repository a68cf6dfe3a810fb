"""What dataplanes count is read: elements of nftables as bytes, rules as text, workers' reports."""

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_userspace_usage import OTHER, OWNER, A, endpoint, place, reported, server

from vipd.backends.counts import Outcome
from vipd.backends.iptables import balance
from vipd.backends.iptables import counters as rules
from vipd.backends.iptables.objects import hashed
from vipd.backends.netlink import HEADER, attribute
from vipd.backends.nftables import counters as nftables
from vipd.backends.userspace import counters as workers
from vipd.backends.userspace import messages
from vipd.backends.userspace.messages import PlaceReport
from vipd.proxy.metrics.host import lost
from vipd.proxy.names import Family

# nftables


def element(key: bytes, value: bytes, packets: int, *, more: bytes = b"") -> bytes:
    """An element as nf_tables_fill_setelem() writes it; a value of no bytes is a verdict."""
    counter = attribute(1, bytes(8)) + attribute(2, packets.to_bytes(8))
    data = attribute(1, value) if value else attribute(2, attribute(1, b"\xff" * 4) + more)
    return attribute(
        1,
        attribute(1, attribute(1, key))
        + attribute(2, data)
        + attribute(7, attribute(1, b"counter\0") + attribute(2, counter)),
    )


def message(*elements: bytes) -> bytes:
    listed = (
        attribute(1, b"vipd\0") + attribute(2, b"services\0") + attribute(3, b"".join(elements))
    )
    return HEADER.pack(HEADER.size + 4 + len(listed), 0, 0, 0, 0) + bytes(4) + listed


def test_elements_of_one_length() -> None:
    ones = [(bytes([10, 96, 0, n]), bytes([10, 244, 0, n, 0, 80, 0, 0]), n << 20) for n in range(9)]
    assert list(nftables.elements(message(*(element(*one) for one in ones)))) == ones


def test_elements_of_several_lengths_and_without_a_counter() -> None:
    bare = attribute(1, attribute(1, attribute(1, b"none")))
    told = message(
        element(b"aaaa", b"", 1, more=attribute(2, b"random-5\0")),
        element(b"bbbb", b"", 2, more=attribute(2, b"local-random-10\0")),
        bare,
        element(b"cccc", b"", 3, more=attribute(2, b"random-6\0")),
    )
    assert list(nftables.elements(told)) == [
        (b"aaaa", b"", 1),
        (b"bbbb", b"", 2),
        (b"cccc", b"", 3),
    ]


@given(st.integers(0, 400), st.binary(max_size=8))
def test_no_bytes_make_it_raise(at: int, noise: bytes) -> None:
    told = bytearray(message(*(element(b"aaaa", b"12345678", 1) for _ in range(4))))
    told[at : at + len(noise)] = noise
    assert len(list(nftables.elements(bytes(told)))) <= 8


# iptables


def test_rules_of_a_service() -> None:
    one, other = server("10.96.0.1"), server("10.96.0.2", owner=OTHER)
    chain, below = balance.cluster_chain(one), hashed("SVP", "anything")
    deeper = hashed("SVP", "else")
    text = "\n".join(
        (
            "*nat",
            f":{chain} - [0:0]",
            f"[1:60] -A {deeper} -p tcp -j DNAT --to-destination 10.244.0.9:80",
            f'[4:240] -A {chain} -p tcp -m comment --comment "shop/web #1" -m recent --update '
            "-j DNAT --to-destination 10.244.0.1:80",
            f"[3:180] -A {chain} -p tcp -m statistic -j DNAT --to-destination 10.244.0.1:80",
            f"[0:0] -A {chain} -p tcp -j DNAT --to-destination 10.244.0.2:80",
            f"[9:540] -A {chain} -p tcp -g {below}",
            f"[9:540] -A {below} -p tcp -g {deeper}",
            f"[2:120] -A {balance.local_chain(other)} -j DNAT --to-destination [fd00::1]:80",
            "[5:1] -A VIPD-SVC-AAAAAAAAAAAAAAAA -j DNAT --to-destination 10.244.0.7:80",
            "[5:1] -A KUBE-SVC-AAAAAAAAAAAAAAAA -j DNAT --to-destination 10.244.0.7:80",
            "COMMIT",
        )
    )
    found = {(c.owner, c.endpoint): c.number for c in rules.counts(text, (one, other), Family.IPV4)}
    assert found == {
        (OWNER, "10.244.0.9:80"): 1,
        (OWNER, "10.244.0.1:80"): 7,
        (OTHER, "[fd00::1]:80"): 2,
    }
    assert rules.rules(text) == 8


# Workers


def test_what_each_worker_says_is_a_counter_of_its_own() -> None:
    here = place("10.96.0.1")
    told = PlaceReport(messages.wire_place(here), True, 1, 12, 2, 3, [endpoint(A)])
    where = {here: server("10.96.0.1").key}
    found = list(
        workers.counts(
            [reported(0, told), reported(1, told)], where, {server("10.96.0.1").key: OWNER}
        )
    )
    assert len({one.at for one in found}) == len(found) == 6
    numbers = [(one.endpoint, one.outcome, one.number) for one in found if one.owner == OWNER]
    assert sorted(numbers) == sorted(
        2
        * [
            ("10.244.0.1:80", Outcome.GIVEN, 10),
            ("", Outcome.DENIED, 2),
            ("", Outcome.UNSERVED, 3),
        ]
    )


# Connection tracking


def test_what_connection_tracking_lost_is_hexadecimal_and_for_each_processor() -> None:
    text = (
        "entries  clashres found insert insert_failed drop early_drop\n"
        "00000003  00000000 00000001 00000000 0000000a 00000001 00000000\n"
        "00000003  00000000 00000001 00000000 00000001 00000010 00000000\n"
    )
    assert lost(text) == {"drop": 17, "early_drop": 0, "insert_failed": 11}
