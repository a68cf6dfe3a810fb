"""The query log: who is told, how, and what becomes of lines that nobody takes."""

import asyncio
import json
import os
import re
from collections.abc import Iterator

import dns.message
import pytest
from tests.unit.dns_server import WEB, Datagrams, Served, Stream, question, served, zone

from vipd.backends import log
from vipd.dns.answer import Answers
from vipd.dns.message import parse
from vipd.dns.server import query_log
from vipd.dns.server.query_log import QueryLog, line_of, logging_of
from vipd.dns.settings import DnsSettings

LINE = re.compile(
    r"\[INFO\] (?P<client>\S+) - (?P<id>\d+) "
    r'"(?P<type>\S+) (?P<class>\S+) (?P<name>\S+) (?P<proto>\S+) (?P<size>\d+) (?P<do>\w+) '
    r'(?P<bufsize>\d+)" (?P<rcode>\S+) (?P<flags>\S+) (?P<rsize>\d+) (?P<duration>[\d.]+)s'
)
"""As https://coredns.io/plugins/log/ describes the default."""


class Pipe:
    """Whoever reads the log, when it likes."""

    def __init__(self) -> None:
        self.reads, self.writes = os.pipe()
        os.set_blocking(self.reads, False)

    def lines(self) -> list[str]:
        found = b""
        while True:
            try:
                data = os.read(self.reads, 1 << 16)
            except BlockingIOError:
                break
            found += data
        return found.decode().splitlines()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    made = Pipe()
    monkeypatch.setattr(log, "_STDERR", made.writes)
    log.configure("text")
    yield made
    os.close(made.reads)
    os.close(made.writes)


def logged(**settings: object) -> tuple[Served, QueryLog]:
    server = served()
    made = logging_of(None, DnsSettings(**settings))  # type: ignore[arg-type]
    assert made is not None
    server.serving.log = made
    return server, made


async def test_each_question_is_a_line_as_corednss(pipe: Pipe) -> None:
    server, made = logged(query_log="full")
    client = Datagrams(server.address)
    asked = dns.message.make_query("wEb.default.svc.cluster.local.", "A", want_dnssec=True)
    asked.id = 4711
    await client.ask(asked.to_wire())
    await client.ask(question("nobody.default.svc.cluster.local.", "AAAA"))
    await client.ask(question("a.example."))
    stream = await Stream.to(server.tcp_address)
    await stream.ask(question(WEB, "TYPE1234"))
    await stream.ask(question("b.example."))
    made.flush()
    lines = pipe.lines()
    found = [match.groupdict() for match in map(LINE.fullmatch, lines) if match]
    assert len(found) == len(lines) == 5
    first = found[0]
    assert first["client"].startswith("127.0.0.1:")
    assert first["client"].endswith(f":{client.socket.getsockname()[1]}")
    assert (first["id"], first["type"], first["class"]) == ("4711", "A", "IN")
    assert (first["name"], first["proto"], first["do"]) == (
        "wEb.default.svc.cluster.local.",
        "udp",
        "true",
    )
    assert (first["rcode"], first["flags"]) == ("NOERROR", "qr,aa,rd,ra")
    assert int(first["size"]) == len(asked.to_wire())
    assert [one["rcode"] for one in found] == ["NOERROR", "NXDOMAIN", *["NOERROR"] * 3]
    assert [one["proto"] for one in found] == ["udp"] * 3 + ["tcp"] * 2
    assert [one["name"] for one in found[2::2]] == ["a.example.", "b.example."]
    assert found[3]["type"] == "TYPE1234"
    await stream.close()
    client.close()
    server.close()


async def test_one_in_so_many(pipe: Pipe) -> None:
    server, made = logged(query_log="sampled", query_log_every=10)
    client = Datagrams(server.address)
    for _ in range(25):
        await client.ask(question())
    for _ in range(5):
        await client.ask(question("a.example."))
    made.flush()
    lines = pipe.lines()
    assert len(lines) == 3
    assert [WEB in one for one in lines] == [True] * 3
    client.close()
    server.close()


async def test_sources_that_may_not_ask_and_garbage(pipe: Pipe) -> None:
    server = served(allow=("127.0.0.1/32",))
    server.serving.log = made = QueryLog(1)
    stranger = Datagrams(server.address, "127.0.0.9")
    await stranger.ask(question())
    client = Datagrams(server.address)
    await client.ask(question()[:-3])
    made.flush()
    refused, malformed = pipe.lines()
    assert refused.startswith("[INFO] 127.0.0.9:")
    assert " REFUSED " in refused
    assert '"- - - udp ' in malformed
    assert " FORMERR " in malformed
    for one in (stranger, client):
        one.close()
    server.close()


def test_an_rcode_that_does_not_fit_the_header() -> None:
    query = dns.message.make_query("web.default.svc.cluster.local.", "A", use_edns=1)
    reply = Answers(zone()).udp(query.to_wire())
    assert isinstance(reply, bytes)
    line = line_of(parse(query.to_wire()), 70, reply, ("10.0.0.1", 7), 0.1, "udp")
    assert '" BADVERS qr' in line


def test_names_forge_no_lines() -> None:
    name = b'\x13a"\n[INFO] \x00\xffforged.\x00'
    query = parse(b"\0\1\0\0\0\1\0\0\0\0\0\0" + name + b"\0\1\0\1")
    reply = b"\0\1\x81\x80" + bytes(8)
    told = line_of(query, 50, reply, ("::1", 53), 0.001, "udp")
    match = LINE.fullmatch(told)
    assert match is not None
    assert match["client"] == "[::1]:53"
    assert match["name"] == r"a\"\010[INFO]\032\000\255forged\.."


def test_json_has_the_same_by_name() -> None:
    log.configure("json")
    try:
        query = parse(question())
        told = json.loads(line_of(query, 50, bytes(12), ("10.0.0.1", 53), 0.0015, "udp"))
    finally:
        log.configure("text")
    assert (told["event"], told["level"], told["client"]) == ("query", "info", "10.0.0.1:53")
    assert (told["name"], told["type"], told["do"], told["seconds"]) == (WEB, "A", False, 0.0015)


async def test_lines_that_nobody_takes_are_dropped_and_counted(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_log, "LONGEST_WAITING", 4000)
    server, made = logged(query_log="full")
    os.set_blocking(pipe.writes, False)
    try:
        while True:
            os.write(pipe.writes, bytes(4096))
    except BlockingIOError:
        pass
    client = Datagrams(server.address)
    for _ in range(100):
        await client.ask(question())
        made.flush()
    assert made.written == 0
    assert 50 < made.dropped < 90  # about 30 lines wait
    pipe.lines()
    await client.ask(question())
    made.flush()
    lines = pipe.lines()
    assert len(lines) == made.written
    assert made.written + made.dropped == 101
    client.close()
    server.close()


async def test_a_reader_that_has_gone(pipe: Pipe) -> None:
    server, made = logged(query_log="full")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, pipe.reads)
    os.close(nothing)
    client = Datagrams(server.address)
    await client.ask(question())
    made.flush()
    await client.ask(question())
    assert made.written == 0
    client.close()
    server.close()


async def test_lines_come_by_themselves(pipe: Pipe) -> None:
    server, made = logged(query_log="full")
    client = Datagrams(server.address)
    await client.ask(question())
    async with asyncio.timeout(20):
        while not made.written:  # noqa: ASYNC110 - a timer is waited for
            await asyncio.sleep(0.01)
    assert len(pipe.lines()) == 1
    assert logging_of(made, DnsSettings()) is None
    client.close()
    server.close()
