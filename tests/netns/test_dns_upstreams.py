"""The forwarder and name servers that people run: unbound, dnsmasq and Knot DNS, from Debian.

All of them run in a network namespace of this module, at addresses of loopback and port 53.
"""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rcode
import pytest
from msgspec import structs
from tests.unit.dns_forward_servers import (
    Clock,
    addresses,
    ask,
    counted,
    forwarders,
    rcode,
    read,
    texts,
)
from tests.waiting import until

from vipd.bench import lab_netns
from vipd.bench.lab import obstacle
from vipd.dns.forward.forwarder import Forwarder
from vipd.dns.forward.settings import Policy

UNBOUND, DNSMASQ, KNOT, ITSELF, VALIDATOR = (f"127.0.1.{n}" for n in range(1, 6))
UNBOUND6 = "::1"
MANY = frozenset(f"10.1.{n >> 7}.{n & 127}" for n in range(300))
A, PTR, TXT, AAAA = 1, 12, 16, 28
READY_SECONDS = 30.0
DURATIONS = "coredns_proxy_request_duration_seconds_count"
T = TypeVar("T")

_ZONE = """\
$ORIGIN corp.test.
$TTL 300
@ SOA ns hostmaster 1 3600 600 86400 20
@ NS ns
ns A {knot}
www A 10.0.0.1
www AAAA fd00::1
alias CNAME www
large TXT {large}
_http._tcp SRV 0 5 80 www
*.wild A 10.0.0.9
"""
_LARGE = " ".join(f'"{chr(97 + n % 26) * 200}"' for n in range(40))


class Programs:
    """The servers' processes in their namespace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = lab_netns.DIRECTORY / f"vt{os.getpid()}-dns"
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Programs":
        self.path.parent.mkdir(exist_ok=True)
        lab_netns.create(self.path, _raise_loopback)
        return self

    def __exit__(self, *_: object) -> None:
        for address in list(self._running):
            self.stop(address)
        lab_netns.delete(self.path)

    def start(self, address: str, *command: str, ready: str = "NOERROR") -> None:
        """Start a server and wait until it answers, as it should when it knows everything."""
        assert address not in self._running
        log = (self.folder / f"{address}.log").open("ab")
        self._running[address] = lab_netns.inside(
            self.path,
            lambda: subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder),
        )
        log.close()
        question = dns.message.make_query("www.corp.test.", "A")
        for _ in range(int(READY_SECONDS / 0.2)):
            assert self._running[address].poll() is None, self.log(address)
            try:
                reply = self.inside(lambda: dns.query.udp(question, address, timeout=0.2))
            except (OSError, dns.exception.DNSException):
                continue
            if dns.rcode.to_text(reply.rcode()) == ready:
                return
        pytest.fail(f"{command[0]} does not answer:\n{self.log(address)}")

    def stop(self, address: str) -> None:
        process = self._running.pop(address, None)
        if process is not None:
            process.kill()
            process.wait()

    def log(self, address: str) -> str:
        return (self.folder / f"{address}.log").read_text(errors="replace")[-4000:]

    def inside(self, call: Callable[[], T]) -> T:
        return lab_netns.inside(self.path, call)

    def run(self, test: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine with sockets in the namespace."""

        async def bounded() -> T:
            async with asyncio.timeout(60):
                return await test()

        return self.inside(lambda: asyncio.run(bounded()))

    # The servers

    def unbound(self, address: str = UNBOUND, ready: str = "NOERROR", **more: str) -> None:
        config = self.folder / f"unbound-{address}.conf"
        config.write_text(_unbound(self.folder, address, **more))
        self.start(address, _found("unbound"), "-d", "-p", "-c", str(config), ready=ready)

    def dnsmasq(self, *more: str) -> None:
        hosts = self.folder / "many"
        hosts.write_text("".join(f"{one} many.corp.test\n" for one in sorted(MANY)))
        self.start(
            DNSMASQ,
            _found("dnsmasq"),
            *("--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"),
            *(f"--listen-address={DNSMASQ}", "--bind-interfaces", "--user=root", "--pid-file="),
            *("--host-record=www.corp.test,10.0.0.1,fd00::1,300", "--local=/corp.test/"),
            *("--cname=alias.corp.test,www.corp.test", "--edns-packet-max=1232"),
            *(f"--addn-hosts={hosts}", "--address=/wild.corp.test/10.0.0.9", *more),
            *("--srv-host=_http._tcp.corp.test,www.corp.test,80,0,5", "--local-ttl=300"),
            "--txt-record=large.corp.test," + _LARGE.replace('"', "").replace(" ", ","),
        )

    def knot(self) -> None:
        zone = self.folder / "corp.test.zone"
        many = "".join(f"many A {one}\n" for one in sorted(MANY))
        zone.write_text(_ZONE.format(knot=KNOT, large=_LARGE) + many)
        config = self.folder / "knot.conf"
        config.write_text(_knot(self.folder))
        self.start(KNOT, _found("knotd"), "-c", str(config))


def _raise_loopback() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def _found(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        package = {"knotd": "knot", "dnsmasq": "dnsmasq-base"}.get(name, name)
        pytest.skip(f"{name} is missing: apt-get install {package}")
    return found


def _unbound(folder: Path, address: str, zone: str = "", anchor: str = "") -> str:
    local = "\n".join(
        [
            '  local-zone: "corp.test." static',
            '  local-data: "corp.test. 300 SOA ns hostmaster.corp.test. 1 3600 600 86400 20"',
            '  local-data: "www.corp.test. 300 A 10.0.0.1"',
            '  local-data: "www.corp.test. 300 AAAA fd00::1"',
            '  local-zone: "wild.corp.test." redirect',
            '  local-data: "wild.corp.test. 300 A 10.0.0.9"',
            '  local-data: "_http._tcp.corp.test. 300 SRV 0 5 80 www.corp.test."',
            f"  local-data: 'large.corp.test. 300 TXT {_LARGE}'",
            *(f'  local-data: "many.corp.test. 300 A {one}"' for one in sorted(MANY)),
        ]
    )
    return f"""\
server:
  interface: {address}
  access-control: 127.0.0.0/8 allow
  access-control: ::1/128 allow
  chroot: ""
  username: ""
  pidfile: ""
  directory: "{folder}"
  use-syslog: no
  logfile: ""
  num-threads: 1
  do-not-query-localhost: no
  edns-buffer-size: 1232
  max-udp-size: 1232
  ede: yes
  module-config: "{"validator " * bool(anchor)}iterator"
{anchor}
{local if not zone else '  local-zone: "test." nodefault'}
remote-control:
  control-enable: no
{zone}
"""


def _knot(folder: Path) -> str:
    return f"""\
server:
  rundir: {folder}/knot
  listen: {KNOT}@53
  udp-max-payload: 1232
log:
- target: stderr
  any: warning
database:
  storage: {folder}/knot
policy:
- id: fast
  single-type-signing: on
  algorithm: ecdsap256sha256
mod-cookies:
- id: cookies
  badcookie-slip: 1
template:
- id: default
  storage: {folder}
  global-module: mod-cookies/cookies
zone:
- domain: corp.test
  file: corp.test.zone
  zonefile-sync: -1
  zonefile-load: difference-no-serial
  journal-content: all
  dnssec-signing: on
  dnssec-policy: fast
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    reason = obstacle()
    if reason is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    folder = tmp_path_factory.mktemp("dns")
    (folder / "knot").mkdir()
    with Programs(folder) as made:
        yield made


Several = Callable[..., None]


@pytest.fixture
def several(programs: Programs) -> Iterator[Several]:
    """Starts servers, by address, for this test."""
    with ExitStack() as stack:

        def start(*servers: str) -> None:
            for one in servers:
                if one in (UNBOUND, UNBOUND6):
                    programs.unbound(one)
                elif one == DNSMASQ:
                    programs.dnsmasq()
                else:
                    programs.knot()
                stack.callback(programs.stop, one)

        yield start


@pytest.fixture
def server(several: Several, request: pytest.FixtureRequest) -> str:
    """The address of a server that runs for this test."""
    address = str(request.param)
    several(address)
    return address


every_server = pytest.mark.parametrize(
    "server", [UNBOUND, DNSMASQ, KNOT], ids=["unbound", "dnsmasq", "knot"], indirect=True
)
those_with_soa = pytest.mark.parametrize(
    "server", [UNBOUND, KNOT], ids=["unbound", "knot"], indirect=True
)


@asynccontextmanager
async def started(*upstreams: str, **more: Any) -> AsyncIterator[Forwarder]:
    """A forwarder that runs. Upstreams are asked in order; `own` are arguments of Forwarder."""
    async with forwarders() as make:
        yield await make(*upstreams, **more)


@every_server
@pytest.mark.parametrize("transport", ["", "tcp://"], ids=["udp", "tcp"])
def test_what_each_knows_is_handed_on(programs: Programs, server: str, transport: str) -> None:
    async def run() -> None:
        async with started(transport + server) as one:
            assert texts((await ask(one, "www.corp.test")).message) == [
                "www.corp.test. 300 A 10.0.0.1"
            ]
            assert addresses((await ask(one, "www.corp.test", AAAA)).message) == {"fd00::1"}
            assert addresses((await ask(one, "x.wild.corp.test")).message) == {"10.0.0.9"}
            got = await ask(one, "_http._tcp.corp.test", 33)
            assert texts(got.message) == ["_http._tcp.corp.test. 300 SRV 0 5 80 www.corp.test."]
            if server != UNBOUND:  # whose local data knows no chains
                assert len(texts((await ask(one, "alias.corp.test")).message)) == 2
            nodata = await ask(one, "www.corp.test", TXT)
            assert (rcode(nodata.message), texts(nodata.message)) == ("NOERROR", [])
            assert rcode((await ask(one, "nobody.corp.test")).message) == "NXDOMAIN"
            # Each of them gives back the spelling: nothing was unwanted, nobody seemed ill.
            assert counted(one, "vipd_dns_forward_unwanted_total") == 0
            assert counted(one, "vipd_dns_forward_upstream_down") == 0
            assert one.cached(b"\x03www\x04corp\x04test\x00", A) is not None

    programs.run(run)


@every_server
def test_what_does_not_fit_comes_over_tcp(programs: Programs, server: str) -> None:
    async def run() -> None:
        async with started(server) as one:
            assert addresses((await ask(one, "many.corp.test")).message) == MANY
            large = await ask(one, "large.corp.test", TXT)
            assert sum(line.count("a") for line in texts(large.message)) >= 200
            assert len(large.message) > 8000
            assert counted(one, "vipd_dns_forward_truncated_total") == 2
            assert counted(one, "coredns_proxy_conn_cache_misses_total", proto="tcp") == 1

    programs.run(run)


@those_with_soa
def test_denials_are_cached_for_as_long_as_they_say(programs: Programs, server: str) -> None:
    async def run() -> None:
        clock = Clock()
        async with started(server, own={"clock": clock}) as one:
            for name, qtype in (("nobody.corp.test", A), ("www.corp.test", TXT)):
                got = await ask(one, name, qtype)
                (soa,) = read(got.message).authority
                assert (soa.name.to_text(), soa.ttl) == ("corp.test.", 20)
            clock.shift += 18
            before = counted(one, "coredns_cache_misses_total")
            await ask(one, "nobody.corp.test")
            assert counted(one, "coredns_cache_misses_total") == before
            clock.shift += 3
            await ask(one, "nobody.corp.test")
            assert counted(one, "coredns_cache_misses_total") == before + 1

    programs.run(run)


@every_server
def test_a_crowd_of_questions(programs: Programs, server: str) -> None:
    async def run() -> None:
        async with started(
            server, f"tcp://{server}", policy=Policy.RANDOM, randomize_case=True
        ) as one:
            asking = (ask(one, f"x{number}.wild.corp.test") for number in range(400))
            found = await asyncio.gather(*asking)
            assert {frozenset(addresses(got.message)) for got in found} == {frozenset({"10.0.0.9"})}
            assert counted(one, "vipd_dns_forward_questions") == 0
            assert counted(one, "vipd_dns_forward_upstream_in_flight") == 0

    programs.run(run)


def test_over_ipv6(programs: Programs, several: Several) -> None:
    """UDP, what is truncated over TCP, TCP alone, and a port where nobody listens."""
    several(UNBOUND6)

    async def run() -> None:
        nobody = f"[{UNBOUND6}]:54"
        async with started(nobody, UNBOUND6) as one:
            assert addresses((await ask(one, "www.corp.test")).message) == {"10.0.0.1"}
            assert counted(one, DURATIONS, to=f"[{UNBOUND6}]:53", rcode="NOERROR") == 1
            assert addresses((await ask(one, "many.corp.test")).message) == MANY
            assert counted(one, "vipd_dns_forward_truncated_total") == 1
            assert counted(one, "coredns_proxy_conn_cache_misses_total", proto="tcp") == 1
        async with started(f"tcp://[{UNBOUND6}]:53") as one:
            assert addresses((await ask(one, "www.corp.test", AAAA)).message) == {"fd00::1"}
        async with started(nobody) as one:
            got = await ask(one, "www.corp.test")
            assert (rcode(got.message), got.extended_error) == ("SERVFAIL", 23)

    programs.run(run)


def test_knot_s_cookies_are_learned_and_insisted_on(programs: Programs, several: Several) -> None:
    several(KNOT)

    async def run() -> None:
        async with started(KNOT) as one:
            await ask(one, "a.wild.corp.test")
            (standing,) = one._asking.standings()
            assert len(standing.server_cookie) in range(8, 33)
            await ask(one, "b.wild.corp.test")
            assert counted(one, "vipd_dns_forward_unwanted_total") == 0

    programs.run(run)


def test_one_is_killed_and_started_while_others_ask(programs: Programs, several: Several) -> None:
    several(UNBOUND, DNSMASQ)

    async def run() -> None:
        clock = Clock()
        async with started(UNBOUND, DNSMASQ, own={"clock": clock}) as one:
            for number in range(10):
                assert await _has_address(one, f"a{number}")
            programs.stop(UNBOUND)
            for number in range(10):
                assert await _has_address(one, f"b{number}")
            assert counted(one, "vipd_dns_forward_upstream_down", to=f"{UNBOUND}:53") == 1
            await asyncio.to_thread(programs.unbound)
            clock.shift += 15
            assert await _has_address(one, "c")
            await until(lambda: counted(one, "vipd_dns_forward_upstream_down") == 0)

    programs.run(run)


async def _has_address(one: Forwarder, label: str) -> bool:
    return addresses((await ask(one, f"{label}.wild.corp.test")).message) == {"10.0.0.9"}


def test_what_was_known_outlives_the_only_upstream(programs: Programs, several: Several) -> None:
    several(UNBOUND)

    async def run() -> None:
        clock = Clock()
        async with started(UNBOUND, own={"clock": clock}) as one:
            await ask(one, "www.corp.test")
            programs.stop(UNBOUND)
            clock.shift += 301
            got = await ask(one, "www.corp.test")
            assert texts(got.message) == ["www.corp.test. 30 A 10.0.0.1"]
            assert got.extended_error == 3
            unknown = await ask(one, "mail.corp.test")
            assert (rcode(unknown.message), unknown.extended_error) == ("SERVFAIL", 23)

    programs.run(run)


class Itself(asyncio.DatagramProtocol):
    """As this program's server: what comes is asked."""

    def __init__(self, one: Forwarder) -> None:
        self.one = one
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, source: Any) -> None:
        self.tasks.add(asyncio.get_running_loop().create_task(self._answer(data, source)))

    async def _answer(self, data: bytes, source: Any) -> None:
        question = dns.message.from_wire(data).question[0]
        got = await ask(self.one, question.name.to_text().lower(), question.rdtype)
        end = 12 + len(question.name.to_wire() or b"") + 4
        whole = data[:2] + got.message[2:12] + data[12:end] + got.message[end:]
        self.transport.sendto(whole, source)


def test_a_loop_through_dnsmasq_is_found(programs: Programs, several: Several) -> None:
    """As on a node whose resolv.conf names a dnsmasq that forwards to the cluster's DNS."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        async with started(DNSMASQ, UNBOUND) as one:
            transport, _ = await loop.create_datagram_endpoint(
                lambda: Itself(one), local_addr=(ITSELF, 53)
            )
            try:
                await one.reload(structs.replace(one.settings, loop_check=True))
                looping = "vipd_dns_forward_upstream_looping"
                await until(lambda: counted(one, looping, to=f"{DNSMASQ}:53") == 1)
                assert counted(one, looping, to=f"{UNBOUND}:53") == 0
                # dnsmasq knows it by heart, and is not asked all the same.
                assert addresses((await ask(one, "www.corp.test")).message) == {"10.0.0.1"}
                assert counted(one, DURATIONS, to=f"{UNBOUND}:53", rcode="NOERROR") == 1
                assert counted(one, DURATIONS, to=f"{DNSMASQ}:53", rcode="NOERROR") == 0
            finally:
                transport.close()

    programs.dnsmasq(f"--server={ITSELF}")
    try:
        several(UNBOUND)
        programs.run(run)
    finally:
        programs.stop(DNSMASQ)


@pytest.fixture
def validator(programs: Programs, several: Several) -> Iterator[Callable[[bool], None]]:
    """Starts an unbound that validates what Knot signs, with the right key or a wrong one."""
    several(KNOT)
    with ExitStack() as stack:

        def start(is_right: bool) -> None:
            question = dns.message.make_query("corp.test.", "DNSKEY", want_dnssec=True)
            reply = programs.inside(lambda: dns.query.tcp(question, KNOT, timeout=5))
            key = reply.answer[0][0].to_text()
            programs.unbound(
                VALIDATOR,
                ready="NOERROR" if is_right else "SERVFAIL",
                anchor=f'  trust-anchor: "corp.test. DNSKEY {key if is_right else _other(key)}"',
                zone=f'stub-zone:\n  name: "corp.test"\n  stub-addr: {KNOT}',
            )
            stack.callback(programs.stop, VALIDATOR)

        yield start


def _other(key: str) -> str:
    return key[:-12] + "A" * 12


def test_unbound_s_verdict_on_signatures_is_handed_on(programs: Programs, validator: Any) -> None:
    validator(True)

    async def run() -> None:
        async with started(VALIDATOR, trust_ad=True) as one:
            plain = await ask(one, "www.corp.test")
            assert read(plain.message).flags & dns.flags.AD
            assert len(texts(plain.message)) == 1
            signed = await ask(one, "www.corp.test", dnssec=True)
            assert [line.split()[2] for line in texts(signed.message)] == ["A", "RRSIG"]
            denied = await ask(one, "nobody.corp.test", dnssec=True)
            kinds = {int(rrset.rdtype) for rrset in read(denied.message).authority}
            assert kinds == {6, 46, 47}
            await one.reload(structs.replace(one.settings, trust_ad=False))
            doubting = await ask(one, "other.wild.corp.test")
            assert not read(doubting.message).flags & dns.flags.AD

    programs.run(run)


def test_bogus_data_is_a_failure_with_its_reason(programs: Programs, validator: Any) -> None:
    validator(False)

    async def run() -> None:
        async with started(VALIDATOR) as one:
            got = await ask(one, "www.corp.test")
            assert rcode(got.message) == "SERVFAIL"
            assert got.extended_error in range(5, 13)  # what RFC 8914 has for DNSSEC
            unchecked = await ask(one, "www.corp.test", checking_disabled=True)
            assert addresses(unchecked.message) == {"10.0.0.1"}
            assert read(unchecked.message).flags & dns.flags.CD

    programs.run(run)
