"""Settings of DNS that change while it answers: taken without a lost question, or named."""

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import dns.edns
import dns.message
import dns.rcode
import msgspec
import pytest
from tests.unit.dns_daemon import NAME, SETTINGS, Daemon, has_ended, shown, web
from tests.unit.dns_server import (
    Client,
    Datagrams,
    Stream,
    addresses,
    question,
    rcode,
    served,
)
from tests.waiting import until

from vipd.dns.facts import ServiceFacts
from vipd.dns.feed import Portion
from vipd.dns.forward.settings import ForwardSettings
from vipd.dns.server.answering import Answering
from vipd.dns.server.messages import Begin, Feed
from vipd.dns.server.places import Place
from vipd.dns.settings import DnsSettings
from vipd.proxy import reload
from vipd.proxy.config import Config, Flags
from vipd.proxy.errors import ConfigError
from vipd.proxy.events import Synced
from vipd.proxy.names import parse_network
from vipd.proxy.reload import Reloading

HEAD = "apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n"


@asynccontextmanager
async def running(settings: DnsSettings = SETTINGS) -> AsyncIterator[Daemon]:
    daemon = await Daemon(settings, None).start(web("10.96.0.1"), Synced())
    try:
        yield daemon
    finally:
        await daemon.service.stop()


def changed(settings: DnsSettings, **fields: object) -> DnsSettings:
    return msgspec.structs.replace(settings, **fields)


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@asynccontextmanager
async def asked(address: Client) -> AsyncIterator[list[str]]:
    """Ask all the time, over UDP and TCP; yield what is answered: "lost" where nothing is."""
    replies: list[str] = []
    over = asyncio.Event()

    async def datagrams() -> None:
        client = Datagrams(address)
        while not over.is_set():
            try:
                replies.append(rcode(await client.ask(question())))
            except TimeoutError:
                replies.append("lost")
        client.close()

    async def streams() -> None:
        stream = await Stream.to(address)
        while not over.is_set():
            try:
                replies.append(rcode(await stream.ask(question())))
            except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
                replies.append("lost")
                return
        await stream.close()

    tasks = [asyncio.ensure_future(one()) for one in (datagrams, datagrams, streams)]
    try:
        yield replies
    finally:
        over.set()
        await asyncio.gather(*tasks)


async def ttl(address: Client) -> int:
    client = Datagrams(address)
    reply = dns.message.from_wire(await client.ask(question()))
    client.close()
    return reply.answer[0].ttl


async def test_no_question_is_lost() -> None:
    settings = changed(SETTINGS, workers=2)
    async with running(settings) as daemon:
        pids = {one.pid for one in await daemon.service.told()}
        async with asked(daemon.address) as replies:
            for seconds in (7, 8, 9):
                before = len(replies)
                await daemon.service.change(changed(settings, ttl=seconds))
                await daemon.service.in_step()
                assert await ttl(daemon.address) == seconds
                await until(lambda before=before: len(replies) > before + 20)  # type: ignore[misc]
        assert set(replies) == {"NOERROR"}
        assert {one.pid for one in await daemon.service.told()} == pids


async def test_a_change_during_a_reload_is_answered_once_it_is_told() -> None:
    async with running() as daemon:
        await daemon.service.change(changed(SETTINGS, ttl=7))
        daemon.take(web("10.96.0.2"))
        await daemon.service.in_step()
        client = Datagrams(daemon.address)
        assert addresses(await client.ask(question())) == ["10.96.0.2"]
        client.close()


async def test_until_everything_is_told_anew_the_zone_before_follows_changes() -> None:
    answering = Answering()
    facts = ServiceFacts("default", "web", cluster_ips=(bytes([10, 96, 0, 1]),))
    await answering.begin(Begin(SETTINGS), [])
    await answering.feed(Feed(Portion(put=(facts,)), synced=True))
    await answering.begin(Begin(changed(SETTINGS, ttl=9)), [])

    def told() -> dns.message.Message:
        outcome = answering.serving.answers.udp(question())
        assert isinstance(outcome, bytes)
        return dns.message.from_wire(outcome)

    assert told().answer[0].ttl == 5
    await answering.feed(Feed(Portion(drop=(NAME,))))
    assert told().rcode() == dns.rcode.NXDOMAIN
    before = weakref.ref(answering.zone)
    await answering.feed(Feed(Portion(put=(facts,)), synced=True))
    assert told().answer[0].ttl == 9
    assert before() is None, "the zone before takes no memory; no collector looks at it"
    await answering.close()
    gc.unfreeze()


async def test_sources_come_and_go_whatever_becomes_of_the_settings() -> None:
    answering = Answering()
    await answering.begin(Begin(changed(SETTINGS, allow=("192.0.2.0/24",))), [])
    access = answering.serving.access
    await answering.feed(Feed(Portion(admit=("198.51.100.1", "192.0.2.9"))))
    await answering.feed(Feed(Portion(admit=("198.51.100.1",))))
    assert access.admits("198.51.100.1")
    assert access.admits("192.0.2.9")
    await answering.begin(Begin(SETTINGS), [])
    assert [access.admits(f"192.0.2.{last}") for last in (8, 9)] == [False, True]
    await answering.feed(Feed(Portion(expel=("192.0.2.9", "198.51.100.1", "203.0.113.1"))))
    assert not access.admits("198.51.100.1")
    assert not access.admits("192.0.2.9")
    assert access.admits("127.0.0.1")
    assert answering.serving.access is access
    await answering.close()


async def test_settings_that_no_name_depends_on_leave_the_zone() -> None:
    settings = changed(SETTINGS, identity="one")
    async with running(settings) as daemon:
        client = Datagrams(daemon.address)
        await shown(client, "10.96.0.1")
        (before,) = await daemon.service.told()
        assert await daemon.service.change(changed(settings, identity="two", waiting=7)) == []
        await daemon.service.in_step()
        (after,) = await daemon.service.told()
        assert (after.serial, after.services) == (before.serial, before.services)
        query = dns.message.make_query(
            "web.default.svc.cluster.local.",
            "A",
            use_edns=0,
            options=[dns.edns.GenericOption(dns.edns.NSID, b"")],
        )
        reply = dns.message.from_wire(await client.ask(query.to_wire()))
        assert b"two" in reply.options[0].to_wire()
        client.close()


async def test_forwarding_is_turned_on_and_off() -> None:
    async with running() as daemon:
        client = Datagrams(daemon.address)
        await shown(client, "10.96.0.1")
        await daemon.service.change(changed(SETTINGS, forwards=True))
        await daemon.service.in_step()
        await daemon.service.change(changed(SETTINGS, forwards=False))
        await daemon.service.in_step()
        assert rcode(await client.ask(question("a.example."))) == "REFUSED"
        client.close()


async def test_other_networks_have_their_reverse_names_here_and_may_ask() -> None:
    settings = changed(SETTINGS, forwards=False)
    async with running(settings) as daemon:
        client = Datagrams(daemon.address)
        await shown(client, "10.96.0.1")
        asked = dns.message.make_query("9.0.9.10.in-addr.arpa.", "PTR").to_wire()
        assert rcode(await client.ask(asked)) == "REFUSED"
        pods, services = parse_network("10.8.0.0/16"), parse_network("10.9.0.0/16")
        await daemon.service.change_networks([pods], [services])
        await daemon.service.in_step()
        assert rcode(await client.ask(asked)) == "NXDOMAIN"
        await daemon.service.change(changed(settings, ttl=9))
        await daemon.service.in_step()
        assert rcode(await client.ask(asked)) == "NXDOMAIN"
        assert "10.8.0.0/16" in daemon.service.settings.allow
        await daemon.service.change_networks([], [])
        await daemon.service.in_step()
        assert rcode(await client.ask(asked)) == "REFUSED"
        assert await ttl(daemon.address) == 9
        client.close()


async def test_addresses_come_and_go() -> None:
    async with running(changed(SETTINGS, workers=2)) as daemon:
        first = daemon.address
        other = f"127.0.0.2:{free_port()}"
        both = changed(SETTINGS, workers=2, listen=("127.0.0.1:0", other))
        async with asked(first) as replies:
            assert await daemon.service.change(both) == []
            await daemon.service.in_step()
            second = "127.0.0.2", int(other.rpartition(":")[2])
            clients = [Datagrams(second) for _ in range(8)]  # to the sockets of either worker
            for client in clients:
                assert addresses(await client.ask(question())) == ["10.96.0.1"]
            stream = await Stream.to(second)
            assert addresses(await stream.ask(question())) == ["10.96.0.1"]
            await daemon.service.change(changed(SETTINGS, workers=2))
            await daemon.service.in_step()
            # An established connection goes on until it is idle; nobody new is heard.
            assert addresses(await stream.ask(question())) == ["10.96.0.1"]
            await stream.close()
            with pytest.raises(ConnectionRefusedError):
                await Stream.to(second)
            for client in clients:
                with pytest.raises(ConnectionRefusedError):
                    await client.ask(question())
                client.close()
            seen = len(replies)
            await until(lambda: len(replies) > seen + 10)
        assert set(replies) == {"NOERROR"}
        assert [str(one.address) for one in daemon.service.listens] == ["127.0.0.1"]


async def test_what_has_arrived_at_an_address_that_goes_is_answered() -> None:
    server = served()
    server.udp.stop()
    server.tcp.stop()
    sockets = server.udp.listener, server.tcp.listener
    place = Place(("127.0.0.1", 0), sockets, server.serving, server.connections)
    clients = [Datagrams(server.address) for _ in range(100)]
    for client in clients:
        client.socket.send(question())
    stream = await Stream.to(server.tcp_address)
    await place.leave()
    for client in clients:
        assert rcode(await client.receive()) == "NOERROR"
        client.close()
    assert rcode(await stream.ask(question())) == "NOERROR"
    await stream.close()
    server.connections.close()


async def test_an_address_that_is_taken_changes_nothing() -> None:
    async with running() as daemon:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            taken = f"127.0.0.1:{other.getsockname()[1]}"
            settings = changed(SETTINGS, ttl=9, listen=("127.0.0.1:0", "127.0.0.2:0", taken))
            with pytest.raises(ConfigError, match=f"{taken}.*in use"):
                await daemon.service.change(settings)
        assert len(daemon.service.listens) == 1
        assert await ttl(daemon.address) == 5


async def test_what_needs_a_restart_is_named() -> None:
    async with running() as daemon:
        wanted = changed(SETTINGS, workers=3, pods="verified", ttl=6)
        assert await daemon.service.change(wanted) == ["pods", "workers"]
        await daemon.service.in_step()
        assert len(await daemon.service.told()) == 1
        assert await ttl(daemon.address) == 6


async def test_off_and_on() -> None:
    async with running() as daemon:
        (before,) = await daemon.service.told()
        await daemon.service.change(changed(SETTINGS, listen=()))
        await until(lambda: has_ended(before.pid))
        assert daemon.service.listens == []
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            taken = f"127.0.0.1:{other.getsockname()[1]}"
            with pytest.raises(ConfigError, match="in use"):
                await daemon.service.change(changed(SETTINGS, listen=(taken,)))
        assert daemon.service.listens == []
        await daemon.service.change(SETTINGS)
        await daemon.service.in_step()
        client = Datagrams(daemon.address)
        assert addresses(await client.ask(question())) == ["10.96.0.1"]
        client.close()


async def test_off_and_on_again_while_a_question_waits() -> None:
    """The worker that goes has the sockets until its last question is answered."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        upstream = f"127.0.0.1:{silent.getsockname()[1]}"
        forward = ForwardSettings(upstreams=(upstream,), loop_check=False)
        port = free_port()
        settings = changed(SETTINGS, listen=(f"127.0.0.1:{port}",), forwards=True, forward=forward)
        async with running(settings) as daemon:
            (before,) = await daemon.service.told()
            waits = Datagrams(daemon.address)
            waits.socket.send(question("a.example."))
            async with asyncio.timeout(20):
                await asyncio.to_thread(silent.recv, 512)  # the worker has it
            await daemon.service.change(changed(settings, listen=()))
            assert not has_ended(before.pid)
            await daemon.service.change(settings)
            await daemon.service.in_step()
            client = Datagrams(daemon.address)
            assert addresses(await client.ask(question())) == ["10.96.0.1"]
            assert (await daemon.service.told())[0].pid != before.pid
            assert rcode(await waits.receive()) == "SERVFAIL"  # of the worker that goes
            waits.close()
            client.close()


# The file


class Told:
    """Whoever hears what becomes of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taken: list[DnsSettings] = []
        self.heard: list[tuple[str, list[str]]] = []
        self.left: list[str] = []
        self.refuses = 0
        """How often it will not take it."""
        self.reloading = Reloading(
            Flags(config=str(path), cluster_domain=("cluster.local",)),
            {"dns": self.take},
            lambda refused, restart: self.heard.append((refused, list(restart))),
        )

    async def take(self, config: Config) -> Sequence[str]:
        if self.refuses:
            self.refuses -= 1
            raise ConfigError("DNS", "somebody has the place")
        self.taken.append(config.dns)
        return self.left

    def write(self, text: str) -> None:
        draft = self.path.with_suffix(".new")
        draft.write_text(f"{HEAD}{text}\n")
        draft.replace(self.path)


@pytest.fixture
def told(tmp_path: Path) -> Told:
    path = tmp_path / "vipd.yaml"
    path.write_text(f"{HEAD}dns: {{ttl: 5}}\nmode: nftables\n")
    return Told(path)


async def test_a_file_that_changes_is_taken(told: Told) -> None:
    following = asyncio.ensure_future(told.reloading.run())
    await until(lambda: told.heard == [("", [])])
    assert told.taken == []
    told.write("dns: {ttl: 6}\nmode: nftables")
    await until(lambda: told.taken)
    assert (told.taken[0].ttl, told.taken[0].domains) == (6, ("cluster.local",))
    following.cancel()


async def test_what_is_refused_is_tried_again(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "RETRY_SECONDS", 0.01)
    following = asyncio.ensure_future(told.reloading.run())
    await until(lambda: told.heard == [("", [])])
    told.refuses = 3
    told.write("dns: {ttl: 6}\nmode: nftables")
    await until(lambda: told.taken)
    await until(lambda: told.heard[-1] == ("", []))
    assert [one.ttl for one in told.taken] == [6]
    said = [refused for refused, _ in told.heard]
    assert said.count("DNS: somebody has the place") == 1, "it is said once, and counted once"
    following.cancel()


async def test_what_nobody_takes_is_named_until_it_is_back(told: Told) -> None:
    told.write("dns: {ttl: 6, workers: 2}\nmode: ipvs\nclusterCIDRs: [10.0.0.0/8]")
    told.left = ["workers"]
    await told.reloading.reread()
    assert told.heard[-1] == ("", ["mode", "clusterCIDRs", "dns.workers"])
    await told.reloading.reread()
    assert told.heard[-1] == ("", ["mode", "clusterCIDRs", "dns.workers"])
    assert len(told.taken) == 1
    told.write("dns: [")
    await told.reloading.reread()
    refused, restart = told.heard[-1]
    assert "not YAML" in refused
    assert restart == ["mode", "clusterCIDRs", "dns.workers"]
    told.left = []
    told.write("dns: {ttl: 5}\nmode: nftables")
    await told.reloading.reread()
    assert told.heard[-1] == ("", [])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("dns: {ttl: 9999}\nmode: nftables", "dns.ttl: 9999 is not from 0 to 3600"),
        ("dns: {queryLog: much}", "dns.queryLog: Invalid enum value 'much'"),
        ("dns: {http: [here]}", "dns.http[0]: 'here' is no ADDRESS:PORT"),
        ("dns: {ttl: 6}\nmode: magic", "mode: 'magic' is no mode"),
        ("dns: [", "not YAML"),
    ],
)
async def test_a_broken_file_changes_nothing(told: Told, text: str, why: str) -> None:
    told.write(text)
    await told.reloading.reread()
    refused, restart = told.heard[-1]
    assert f"{told.path}: {why}" in refused
    assert (told.taken, restart) == ([], [])
    told.path.unlink()
    await told.reloading.reread()
    assert "No such file" in told.heard[-1][0]
    told.write("dns: {ttl: 7}\nmode: nftables")
    await told.reloading.reread()
    assert told.heard[-1] == ("", [])
    assert [one.ttl for one in told.taken] == [7]
