"""Who may ask, and how often the others are told that they may not."""

import pytest

from vipd.dns.server import access
from vipd.dns.server.access import Access, Refusals
from vipd.proxy.names import parse_network


def allowed(*texts: str) -> Access:
    return Access(map(parse_network, texts))


@pytest.mark.parametrize(
    ("source", "may"),
    [
        ("10.244.3.7", True),
        ("10.245.0.0", False),
        ("192.0.2.1", True),
        ("192.0.2.2", False),
        ("fd00:10::5", True),
        ("fd00:11::5", False),
        ("fe80::1%eth0", True),
        ("::a00:1", False),
    ],
)
def test_networks(source: str, may: bool) -> None:
    found = allowed("10.244.0.0/16", "192.0.2.1", "fd00:10::/48", "fe80::/64")
    assert found.admits(source) is may
    assert found.verdicts[source] is may
    assert found.admits(source) is may


def test_a_network_may_ask_until_its_last_reason_has_gone() -> None:
    found = allowed("10.244.0.0/16")
    pods, node = parse_network("10.244.0.0/16"), parse_network("192.0.2.1")
    assert not found.admits("192.0.2.1")
    found.admit((pods, node))
    assert found.admits("192.0.2.1")
    found.expel((pods, node))
    assert not found.admits("192.0.2.1")
    assert found.admits("10.244.3.7")
    found.expel((pods,))
    assert not found.admits("10.244.3.7")


def test_nobody_may_where_nothing_is_said() -> None:
    assert not allowed().admits("127.0.0.1")


def test_everybody_may() -> None:
    assert allowed("0.0.0.0/0").admits("8.8.8.8")
    assert not allowed("0.0.0.0/0").admits("::1")


def test_not_all_sources_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_REMEMBERED", 10)
    found = allowed("10.0.0.0/8")
    for last in range(100):
        assert found.admits(f"10.0.0.{last}")
    assert len(found.verdicts) <= 10


def test_refusals_of_a_network_are_counted_together() -> None:
    refusals = Refusals(2, now=0.0)
    told = [refusals.may(f"192.0.2.{last}", 0.0) for last in range(5)]
    assert told == [True, True, False, False, False]
    assert refusals.may("192.0.3.1", 0.0)
    assert refusals.may("192.0.2.1", 0.5)
    assert not refusals.may("192.0.2.1", 0.5)


def test_ipv6_networks_are_64_bits() -> None:
    refusals = Refusals(1, now=0.0)
    assert refusals.may("2001:db8::1", 0.0)
    assert not refusals.may("2001:db8::ffff", 0.0)
    assert refusals.may("2001:db8:0:1::1", 0.0)


def test_refusals_save_nothing_up() -> None:
    refusals = Refusals(2, now=0.0)
    assert [refusals.may("192.0.2.1", 1000.0) for _ in range(4)] == [True, True, False, False]


def test_forged_sources_get_no_more_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_PER_SECOND", 10)
    monkeypatch.setattr(access, "MOST_NETWORKS", 50)
    refusals = Refusals(5, now=0.0)
    told = [refusals.may(f"192.{n // 256}.{n % 256}.1", 0.0) for n in range(1000)]
    assert sum(told) == 10
    assert len(refusals._left) <= 50


def test_none_at_all() -> None:
    assert not Refusals(0, now=0.0).may("192.0.2.1", 10.0)
