"""ipset over netlink, with the real kernel in a namespace: every form of entry, every refusal."""

import os
import shutil
from ipaddress import IPv4Address

import pytest
from tests.unit.iptables_cases import command, in_namespace

from vipd.backends.ipset import AT_ONCE, IpSets, SetSpec
from vipd.proxy.errors import Busy, OutOfStep, Rejected, Unsupported
from vipd.proxy.names import Family

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not shutil.which("ip"), reason="needs ip (Debian's package iproute2)"),
]
SETS = IpSets()


@pytest.mark.parametrize(
    ("kind", "family", "entries"),
    [
        ("hash:ip", Family.IPV4, {"10.0.0.1", "192.0.2.255"}),
        ("hash:ip", Family.IPV6, {"fd00::1", "::ffff:102:304"}),
        ("hash:net", Family.IPV4, {"10.0.0.0/8", "192.0.2.1"}),
        ("hash:net", Family.IPV6, {"fd00::/8", "2001:db8::1"}),
        ("hash:ip,port", Family.IPV4, {"10.0.0.1,tcp:80", "10.0.0.1,udp:80", "10.0.0.1,sctp:9"}),
        ("hash:ip,port", Family.IPV6, {"fd00::1,tcp:80", "fd00::1,sctp:65535"}),
        ("hash:ip,port,ip", Family.IPV4, {"10.0.0.1,tcp:80,10.0.0.1"}),
        ("hash:ip,port,ip", Family.IPV6, {"fd00::1,udp:53,fd00::1"}),
        ("hash:ip,port,net", Family.IPV4, {"10.0.0.1,tcp:80,10.0.0.0/8", "10.0.0.1,udp:8,9.9.9.9"}),
        ("hash:ip,port,net", Family.IPV6, {"fd00::1,tcp:80,8000::/1", "fd00::1,tcp:80,::1"}),
        ("hash:net,port", Family.IPV4, {"0.0.0.0/1,tcp:30080", "128.0.0.0/1,tcp:30080"}),
        ("bitmap:port", Family.IPV4, {"80", "30080"}),
    ],
)  # fmt: skip
def test_entries_come_back_as_they_went(kind: str, family: Family, entries: set[str]) -> None:
    async def do() -> None:
        await SETS.create(SetSpec("VIPD-T", kind, family))
        assert await SETS.add("VIPD-T", entries) == {}
        assert await SETS.add("VIPD-T", entries) == {}, "what is there already stays"
        assert await SETS.entries("VIPD-T") == entries
        one = min(entries)
        assert await SETS.delete("VIPD-T", [one]) == {}
        assert await SETS.delete("VIPD-T", [one]) == {}, "what is gone is no error"
        assert await SETS.entries("VIPD-T") == entries - {one}
        assert await SETS.destroy("VIPD-T")
        assert not await SETS.destroy("VIPD-T")
        assert await SETS.entries("VIPD-T") is None

    in_namespace(do)


def numbered(count: int, first: int = 0) -> list[str]:
    return [f"{IPv4Address(0x0A000000 + first + number)},tcp:80" for number in range(count)]


def test_many_entries_and_a_bad_one_among_them() -> None:
    async def do() -> None:
        await SETS.create(SetSpec("VIPD-T", "hash:ip,port", size=100_000))
        entries = numbered(3 * AT_ONCE)
        told = [*entries[:AT_ONCE], "fd00::1,tcp:80", *entries[AT_ONCE:]]
        failed = await SETS.add("VIPD-T", told)
        assert list(failed) == ["fd00::1,tcp:80"]
        assert isinstance(failed["fd00::1,tcp:80"], Rejected)
        assert await SETS.entries("VIPD-T") == set(entries)

    in_namespace(do)


def test_a_full_set_says_which_entries_it_did_not_take() -> None:
    async def do() -> None:
        await SETS.create(SetSpec("VIPD-T", "hash:ip,port", size=700))
        entries = numbered(1000)
        failed = await SETS.add("VIPD-T", entries)
        held = await SETS.entries("VIPD-T")
        assert held is not None
        assert held | failed.keys() == set(entries)
        assert not held & failed.keys()
        assert {str(error) for error in failed.values()} == {
            "ipset add VIPD-T: Set is full, more elements cannot be added"
        }

    in_namespace(do)


def test_a_set_of_another_type_is_refused_and_stays() -> None:
    async def do() -> None:
        await SETS.create(SetSpec("VIPD-T", "hash:ip"))
        await SETS.create(SetSpec("VIPD-T", "hash:ip"))
        await SETS.add("VIPD-T", ["10.0.0.1"])
        for other in (SetSpec("VIPD-T", "hash:net"), SetSpec("VIPD-T", "hash:ip", size=9)):
            with pytest.raises(Rejected, match="another type"):
                await SETS.create(other)
        assert await SETS.entries("VIPD-T") == {"10.0.0.1"}

    in_namespace(do)


def test_a_type_that_the_kernel_lacks_names_its_module() -> None:
    async def do() -> None:
        with pytest.raises(Unsupported, match="modprobe ip_set_hash_nonsense"):
            await SETS.create(SetSpec("VIPD-T", "hash:nonsense"))

    in_namespace(do)


def test_a_set_that_is_not_there() -> None:
    async def do() -> None:
        for call in (SETS.add("VIPD-T", ["10.0.0.1"]), SETS.delete("VIPD-T", ["10.0.0.1"])):
            with pytest.raises(OutOfStep):
                await call
        assert await SETS.names() == set()

    in_namespace(do)


@pytest.mark.skipif(not shutil.which("iptables-nft"), reason="needs iptables")
def test_a_set_that_a_rule_uses_is_busy() -> None:
    async def do() -> None:
        await SETS.create(SetSpec("VIPD-T", "hash:ip"))
        rule = "-m set --match-set VIPD-T src -j ACCEPT"
        command("iptables-nft", "-A", "INPUT", *rule.split())
        with pytest.raises(Busy):
            await SETS.destroy("VIPD-T")
        command("iptables-nft", "-D", "INPUT", *rule.split())

    in_namespace(do)


def test_two_sets_exchange_what_they_hold() -> None:
    async def do() -> None:
        for name in ("VIPD-A", "VIPD-B"):
            await SETS.create(SetSpec(name, "hash:ip"))
        await SETS.add("VIPD-A", ["10.0.0.1"])
        await SETS.swap("VIPD-A", "VIPD-B")
        assert await SETS.entries("VIPD-B") == {"10.0.0.1"}
        assert await SETS.names() == {"VIPD-A", "VIPD-B"}
        with pytest.raises(OutOfStep):
            await SETS.swap("VIPD-A", "VIPD-C")

    in_namespace(do)


def test_an_entry_with_a_time_lives_that_long() -> None:
    async def do() -> None:
        spec = SetSpec("VIPD-T", "hash:ip", timeout=600)
        await SETS.create(spec)
        assert "timeout 600" in spec.command
        assert "timeout 600" in command("ipset", "list", "VIPD-T")

    in_namespace(do)
