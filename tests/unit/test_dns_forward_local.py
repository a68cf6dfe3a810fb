"""Names that are answered without upstreams, stub domains, files, and changes of all of these."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from tests.unit.dns_forward_servers import (
    Make,
    addresses,
    ask,
    counted,
    forwarders,
    rcode,
    read,
    reply,
    says,
    serving,
    texts,
    wire,
)
from tests.waiting import until

from vipd.dns.forward import sources
from vipd.dns.forward.forwarder import Forwarder

A, PTR, TXT, AAAA, DS, HTTPS = 1, 12, 16, 28, 43, 65
SOON = 0.03
LOOPBACK6 = "1." + "0." * 31 + "ip6.arpa"


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    async with forwarders() as made:
        yield made


def here(address: str) -> Any:
    return says(f"@ 300 A {address}")


async def reloaded(forwarder: Forwarder, **more: Any) -> None:
    await forwarder.reload(structs.replace(forwarder.settings, **more))


# Special names


@pytest.mark.parametrize(
    ("name", "qtype", "records"),
    [
        ("localhost", A, ["A 127.0.0.1"]),
        ("localhost", AAAA, ["AAAA ::1"]),
        ("db.localhost", A, ["A 127.0.0.1"]),
        ("localhost", TXT, []),
        ("1.0.0.127.in-addr.arpa", PTR, ["PTR localhost."]),
        (LOOPBACK6, PTR, ["PTR localhost."]),
    ],
)
async def test_localhost_is_this_host(
    make: Make, name: str, qtype: int, records: list[str]
) -> None:
    async with serving(here("192.0.2.66")) as (server,):
        got = await ask(await make(server.text), name, qtype)
        assert [line.split(maxsplit=2)[2] for line in texts(got.message)] == records
        assert rcode(got.message) == "NOERROR"
        assert len(read(got.message).authority) == (not records)
        assert server.asked == []


@pytest.mark.parametrize(
    ("name", "qtype"),
    [
        ("a.invalid", A),
        ("invalid", TXT),
        ("abc.onion", A),
        ("printer.local", A),
        ("5.0.0.127.in-addr.arpa", PTR),
        ("9.9.254.169.in-addr.arpa", PTR),
        ("mysql", A),
        ("mysql", AAAA),
        ("mysql", HTTPS),
    ],
)
async def test_what_is_nobody_elses_business_does_not_exist(
    make: Make, name: str, qtype: int
) -> None:
    async with serving(here("192.0.2.66")) as (server,):
        forwarder = await make(server.text)
        got = await ask(forwarder, name, qtype)
        assert rcode(got.message) == "NXDOMAIN"
        assert len(read(got.message).authority) == 1
        assert server.asked == []
        assert counted(forwarder, "vipd_dns_forward_special_total") == 1


@pytest.mark.parametrize(
    ("name", "qtype"),
    [
        ("com", DS),
        (".", 2),
        ("4.3.2.10.in-addr.arpa", PTR),
        ("4.3.20.172.in-addr.arpa", PTR),
        ("notlocal", DS),
        ("a.notlocalhost", A),
        ("my.localhost.example", A),
    ],
)
async def test_what_only_looks_special_is_asked_for(make: Make, name: str, qtype: int) -> None:
    async with serving(here("192.0.2.1")) as (server,):
        await ask(await make(server.text), name, qtype)
        assert len(server.asked) == 1


async def test_single_labels_and_private_reverse_names_as_configured(make: Make) -> None:
    async with serving(here("192.0.2.1")) as (server,):
        forwarder = await make(
            server.text, forward_single_labels=True, forward_private_reverse=False
        )
        assert addresses((await ask(forwarder, "mysql")).message) == {"192.0.2.1"}
        for name in ("4.3.2.10.in-addr.arpa", "4.3.31.172.in-addr.arpa", "1.d.f.ip6.arpa"):
            assert rcode((await ask(forwarder, name, PTR)).message) == "NXDOMAIN"
        assert rcode((await ask(forwarder, "10.in-addr.arpa", PTR)).message) == "NOERROR"
        await ask(forwarder, "4.3.32.172.in-addr.arpa", PTR)
        assert len(server.asked) == 2


# Stub domains


async def test_the_longest_stub_domain_counts(make: Make) -> None:
    scripts = (here("192.0.2.1"), here("192.0.2.2"), here("192.0.2.3"))
    async with serving(*scripts) as (default, corp, deep):
        stubs = {"corp.example": (corp.text,), "a.corp.example": (deep.text,)}
        forwarder = await make(default.text, stub_domains=stubs)
        for name, address in {
            "www.example": "192.0.2.1",
            "corp.example": "192.0.2.2",
            "b.corp.example": "192.0.2.2",
            "x.a.corp.example": "192.0.2.3",
            "notcorp.example": "192.0.2.1",
        }.items():
            assert addresses((await ask(forwarder, name)).message) == {address}


async def test_a_stub_domain_goes_before_a_special_one(make: Make) -> None:
    async with serving(here("192.0.2.1")) as (server,):
        stubs = {"local": (server.text,), "10.in-addr.arpa": (server.text,)}
        forwarder = await make(stub_domains=stubs, forward_private_reverse=False)
        assert addresses((await ask(forwarder, "printer.local")).message) == {"192.0.2.1"}
        await ask(forwarder, "1.0.0.10.in-addr.arpa", PTR)
        assert len(server.asked) == 2


async def test_a_stub_domain_without_upstreams_does_not_exist(make: Make) -> None:
    async with serving(here("192.0.2.1")) as (server,):
        forwarder = await make(server.text, stub_domains={"ads.example": ()})
        assert rcode((await ask(forwarder, "x.ads.example")).message) == "NXDOMAIN"
        assert server.asked == []


# Hosts and records


async def test_hosts_are_answered_both_ways(make: Make) -> None:
    hosts = ("10.1.2.3 db.corp.example Alias.corp.example", "fd00::3 db.corp.example # six")
    async with serving(here("192.0.2.66")) as (server,):
        forwarder = await make(server.text, hosts=hosts)
        assert texts((await ask(forwarder, "db.corp.example")).message) == [
            "db.corp.example. 30 A 10.1.2.3"
        ]
        assert addresses((await ask(forwarder, "db.corp.example", AAAA)).message) == {"fd00::3"}
        assert addresses((await ask(forwarder, "alias.corp.example")).message) == {"10.1.2.3"}
        nothing = await ask(forwarder, "alias.corp.example", AAAA)
        assert (rcode(nothing.message), texts(nothing.message)) == ("NOERROR", [])
        assert read(nothing.message).authority
        back = await ask(forwarder, "3.2.1.10.in-addr.arpa", PTR)
        assert texts(back.message) == ["3.2.1.10.in-addr.arpa. 30 PTR db.corp.example."]
        assert server.asked == []
        # Names above and below are others.
        await ask(forwarder, "corp.example")
        await ask(forwarder, "x.db.corp.example")
        assert len(server.asked) == 2


async def test_records_are_answered_and_their_chains_followed(make: Make) -> None:
    records = (
        'note.corp.example 60 TXT "two words" second',
        "db.corp.example CNAME db.cloud.example.",
        "loop.corp.example CNAME loop.corp.example",
        "_http._tcp.corp.example 10 IN SRV 0 5 80 db.corp.example",
    )
    async with serving(here("192.0.2.1")) as (server,):
        forwarder = await make(server.text, records=records)
        assert texts((await ask(forwarder, "note.corp.example", TXT)).message) == [
            'note.corp.example. 60 TXT "two words" "second"'
        ]
        assert texts((await ask(forwarder, "db.corp.example")).message) == [
            "db.corp.example. 30 CNAME db.cloud.example.",
            "db.cloud.example. 300 A 192.0.2.1",
        ]
        assert texts((await ask(forwarder, "db.corp.example", 5)).message) == [
            "db.corp.example. 30 CNAME db.cloud.example."
        ]
        assert len(texts((await ask(forwarder, "_http._tcp.corp.example", 33)).message)) == 1
        assert rcode((await ask(forwarder, "loop.corp.example")).message) == "SERVFAIL"
        assert [one.name.lower() for one in server.asked] == ["db.cloud.example."]


async def test_private_addresses_are_refused_where_configured(make: Make) -> None:
    public_too = says("@ 300 A 10.0.0.1", "@ 300 A 192.88.99.1")
    private = says("@ 300 A 127.0.0.1", "@ 300 A 169.254.169.254", "@ 300 A 192.168.1.1")
    async with serving(public_too, says("@ 300 A 10.0.0.2")) as (server, corp):
        forwarder = await make(
            server.text, refuse_private=True, stub_domains={"corp.example": (corp.text,)}
        )
        assert addresses((await ask(forwarder, "a.example")).message) == {"192.88.99.1"}
        server.script = private
        got = await ask(forwarder, "b.example")
        assert (texts(got.message), got.extended_error) == ([], 15)
        server.script = says("@ 300 AAAA ::ffff:10.0.0.1", "@ 300 AAAA fd00::1")
        assert texts((await ask(forwarder, "c.example", AAAA)).message) == []
        # A company's own names have such addresses: that is what its stub domain is for.
        assert addresses((await ask(forwarder, "d.corp.example")).message) == {"10.0.0.2"}


# Reloading


async def test_a_question_under_way_survives_a_reload(make: Make) -> None:
    async with serving(lambda asked: None, here("192.0.2.2")) as (old, new):
        forwarder = await make(old.text)
        waiting = asyncio.create_task(ask(forwarder, "a.example.com"))
        await old.was_asked()
        await reloaded(forwarder, upstreams=(new.text,))
        old.send(reply(old.asked[0], "@ 300 A 192.0.2.1").to_wire(), old.sources[0])
        assert addresses((await waiting).message) == {"192.0.2.1"}
        assert addresses((await ask(forwarder, "b.example.com")).message) == {"192.0.2.2"}


async def test_a_reload_keeps_the_cache_but_for_what_is_others_business_now(make: Make) -> None:
    async with serving(here("192.0.2.1"), here("192.0.2.2")) as (default, corp):
        forwarder = await make(default.text)
        for name in ("www.example", "a.corp.example"):
            await ask(forwarder, name)
        await reloaded(forwarder, stub_domains={"corp.example": (corp.text,)})
        assert forwarder.cached(wire("www.example"), A) is not None
        assert addresses((await ask(forwarder, "a.corp.example")).message) == {"192.0.2.2"}
        await reloaded(forwarder, hosts=("10.0.0.1 www.example",))
        assert addresses((await ask(forwarder, "www.example")).message) == {"10.0.0.1"}


async def test_wrong_settings_change_nothing(make: Make) -> None:
    async with serving(here("192.0.2.1")) as (server,):
        forwarder = await make(server.text)
        with pytest.raises(ValueError, match=r"^upstreams\[1\]: 'ns1.example' is no IP address"):
            await reloaded(forwarder, upstreams=("192.0.2.9", "ns1.example"))
        assert addresses((await ask(forwarder, "a.example")).message) == {"192.0.2.1"}


async def test_connections_to_upstreams_that_are_left_are_closed(make: Make) -> None:
    async with serving(here("192.0.2.1"), here("192.0.2.2")) as (old, new):
        forwarder = await make(f"tcp://{old.text}")
        await ask(forwarder, "a.example")
        assert old.open_connections == 1
        await reloaded(forwarder, upstreams=(new.text,))
        await until(lambda: not old.open_connections)


# Files


async def test_resolv_conf_is_followed(make: Make, tmp_path: Path) -> None:
    async with serving(here("192.0.2.1"), here("192.0.2.2")) as (first, second):
        # A resolv.conf has no ports, so the two are told apart by their being asked at all.
        path = tmp_path / "resolv.conf"
        path.write_text("nameserver 127.1.2.3\n")
        forwarder = await make(resolv_conf=str(path), first_timeout_seconds=SOON)
        assert _upstreams(forwarder) == {"127.1.2.3:53"}
        path.write_text("nameserver 127.1.2.4\noptions use-vc\n")
        await until(lambda: _upstreams(forwarder) == {"tcp://127.1.2.4:53"})
        other = tmp_path / "new"
        other.write_text("nameserver 127.1.2.5\nnameserver fd00::1\n")
        other.rename(path)
        await until(lambda: _upstreams(forwarder) == {"127.1.2.5:53", "[fd00::1]:53"})
        assert first.asked == second.asked == []


async def test_an_empty_or_lost_resolv_conf_changes_nothing(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 127.1.2.3\n")
    told: list[str] = []
    forwarder = await make(
        resolv_conf=str(path), own={"note": lambda event, **facts: told.append(event)}
    )
    path.write_text("")
    await until(lambda: "a file names no upstream; the old ones are kept" in told)
    path.unlink()
    await until(lambda: "a file cannot be read; what it said is kept" in told)
    assert _upstreams(forwarder) == {"127.1.2.3:53"}


async def test_a_hosts_file_behind_a_link_is_followed(make: Make, tmp_path: Path) -> None:
    # As kubelet mounts a ConfigMap: the file is a link through a link that is moved.
    for version, address in (("one", "10.0.0.1"), ("two", "10.0.0.2")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "hosts").write_text(f"{address} db.example\nbad line\n")
    data, file = tmp_path / "data", tmp_path / "hosts"
    data.symlink_to("one")
    file.symlink_to("data/hosts")
    told: list[dict[str, Any]] = []
    forwarder = await make(
        hosts_file=str(file), own={"note": lambda event, **facts: told.append(facts)}
    )
    assert addresses((await ask(forwarder, "db.example")).message) == {"10.0.0.1"}
    assert {"reason": "line 2: 'bad' is no IP address", "file": str(file)} in told
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").rename(data)
    found: set[str] = set()

    def is_new() -> bool:
        got = forwarder.cached(wire("db.example"), A)
        found.update(addresses(got.message) if got else ())
        return "10.0.0.2" in found

    await until(is_new)
    assert counted(forwarder, "coredns_hosts_entries") == 1


async def test_a_file_in_a_folder_that_comes_later_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "later" / "hosts"
    seen = sources.changes([str(path)], look_seconds=0.01)
    assert await anext(seen) == {str(path)}
    waiting = asyncio.ensure_future(anext(seen))
    path.parent.mkdir()
    path.write_text("10.0.0.1 a")
    async with asyncio.timeout(20):
        assert await waiting == {str(path)}
    await seen.aclose()


def test_systemd_s_own_listener_stands_for_what_it_asks(tmp_path: Path) -> None:
    stub, real = tmp_path / "stub", tmp_path / "real"
    stub.write_text("nameserver 127.0.0.53\noptions edns0 trust-ad\n")
    assert [str(one) for one in sources.read_resolv_conf(str(stub), str(real)).upstreams] == [
        "127.0.0.53:53"
    ]
    real.write_text("nameserver 192.0.2.53\n")
    assert [str(one) for one in sources.read_resolv_conf(str(stub), str(real)).upstreams] == [
        "192.0.2.53:53"
    ]
    stub.write_text("nameserver 127.0.0.53\nnameserver 192.0.2.54\n")
    assert len(sources.read_resolv_conf(str(stub), str(real)).upstreams) == 2


def test_a_file_beyond_the_bound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("#" * sources.MOST_RESOLV_CONF_BYTES + "\n")
    with pytest.raises(ValueError, match="is longer than 65536 bytes"):
        sources.read_resolv_conf(str(path))


def _upstreams(forwarder: Forwarder) -> set[str]:
    name = "vipd_dns_forward_upstream_down"
    return {dict(one.labels)["to"] for one in forwarder.samples() if one.name == name}
