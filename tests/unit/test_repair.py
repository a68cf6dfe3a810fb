"""Who is waited for before a repair, and what the kernel's notifications say."""

import asyncio
import struct
from collections.abc import AsyncIterator
from functools import partial

import pytest
from tests.waiting import until

from vipd.backends.nftables.notified import (
    MOST_BESIDE,
    MOST_TOLD,
    SKELETONS,
    Notified,
    Ours,
    Transaction,
)
from vipd.backends.watching import Drift
from vipd.proxy import repair as repair_module
from vipd.proxy.errors import Busy, DataplaneError
from vipd.proxy.repair import (
    FORGIVEN_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MOST_PARTIES,
    PATIENT_LOOKS,
    PATIENT_REPAIRS,
    Patience,
    Repair,
    Repairs,
)
from vipd.proxy.status import repair_lines


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def repaired(patience: Patience, party: str) -> float:
    """Return how long was waited before what the party did was put right."""
    pause = patience.pause(party)
    patience.note(party)
    return pause


def test_who_does_it_again_and_again_is_waited_for_longer_and_longer() -> None:
    patience = Patience(Clock())
    pauses = [repaired(patience, "other") for _ in range(PATIENT_REPAIRS + 9)]
    assert pauses == [0.0] * PATIENT_REPAIRS + [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert patience.waiting == {"other": 60}
    assert patience.pause("another") == 0.0


def test_a_false_alarm_is_held_against_nobody() -> None:
    patience = Patience(Clock())
    assert [patience.pause("other") for _ in range(99)] == [0.0] * 99


def test_who_stops_is_forgiven() -> None:
    clock = Clock()
    patience = Patience(clock)
    for _ in range(PATIENT_REPAIRS + 1):
        patience.note("other")
    clock.now += FORGIVEN_SECONDS / 2
    assert patience.pause("other") > 1
    clock.now += FORGIVEN_SECONDS + LONGEST_PAUSE_SECONDS
    assert patience.pause("other") == 0.0
    assert patience.waiting == {}


def test_a_crowd_of_parties_is_bounded() -> None:
    patience = Patience(Clock())
    assert all(repaired(patience, f"party {number}") == 0 for number in range(MOST_PARTIES))
    assert repaired(patience, "one more") == LONGEST_PAUSE_SECONDS
    assert repaired(patience, "one more") == LONGEST_PAUSE_SECONDS


def test_what_was_repaired_is_counted() -> None:
    repairs = Repairs()
    assert repairs.view() is None
    repairs.done("nftables", Drift(("table deleted ip vipd",), "nft", 7), 12)
    told = repairs.view()
    assert told is not None
    (line,) = repair_lines(told, told.at + 3)
    assert line == "1, the last 3 s ago: table deleted ip vipd, by nft (process 7)"


OURS = Ours(
    SKELETONS | {("ip", "vipd"), ("ip6", "vipd")},
    frozenset({("ip", "nat"), ("ip6", "nat")}),
    "VIPD-",
)


class Watched:
    """Something that is watched over: `tell` tells of drift, `wrong` is what mending finds."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Drift] = asyncio.Queue()
        self.wrong: list[int | DataplaneError] = []
        self.mended = 0
        self.repairs = Repairs()
        self.ready = asyncio.Event()
        self.ready.set()
        self.repair = Repair(
            "it", self.repairs, (self.watch, self.nothing), self.mend, None, self.ready.wait
        )

    async def watch(self) -> AsyncIterator[Drift]:
        while True:
            yield await self.told.get()

    async def nothing(self) -> AsyncIterator[Drift]:
        for one in list[Drift]():
            yield one

    async def mend(self) -> int:
        self.mended += 1
        found = self.wrong.pop(0) if self.wrong else 0
        if isinstance(found, DataplaneError):
            raise found
        return found

    def tell(self, what: str, by: str = "") -> None:
        self.told.put_nowait(Drift((what,), by))


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    made = Watched()
    task = asyncio.ensure_future(made.repair.run())
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _is_mended(watched: Watched, times: int) -> bool:
    return watched.mended == times


async def test_what_is_told_is_put_right_and_counted(watched: Watched) -> None:
    watched.wrong = [3]
    watched.tell("a table", "nft")
    await until(lambda: watched.repairs.count == 1)
    assert watched.repairs.last == Drift(("a table",), "nft")


async def test_nothing_is_put_right_before_it_is_there() -> None:
    other = Watched()
    other.ready.clear()
    other.wrong = [1]
    task = asyncio.ensure_future(other.repair.run())
    other.tell("a table")
    other.tell("another", "nft")
    await until(other.told.empty)
    assert other.mended == 0
    other.ready.set()
    await until(lambda: other.repairs.count == 1)
    assert other.repairs.last == Drift(("a table", "another"), "nft")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_false_alarm_is_no_repair(watched: Watched) -> None:
    for number in range(1, PATIENT_LOOKS + 1):
        watched.tell("nothing")
        await until(partial(_is_mended, watched, number))
    assert watched.repairs.count == 0
    watched.wrong = [1]
    watched.tell("a table")
    await until(lambda: watched.repairs.count == 1)


async def test_what_cannot_be_put_right_is_tried_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair_module, "FIRST_PAUSE_SECONDS", 0.0)
    watched.wrong = [Busy("the lock"), 2]
    watched.tell("a table", "nft")
    await until(lambda: watched.repairs.count == 1)
    assert watched.repairs.last == Drift(("a table",), "nft")


# The messages as Linux 6.18 sends them, put together by hand: header, family, attributes.


def attribute(kind: int, value: bytes) -> bytes:
    text = struct.pack("=HH", 4 + len(value), kind) + value
    return text + bytes(-len(text) % 4)


def message(kind: int, *attributes: bytes, family: int = 2, port: int = 77) -> bytes:
    body = bytes([family, 0, 0, 0]) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), 10 << 8 | kind, 0, 1, port) + body


def named(kind: int, *names: str, family: int = 2) -> bytes:
    found = [attribute(number, f"{name}\0".encode()) for number, name in enumerate(names, 1)]
    return message(kind, *found, family=family)


def end(process: int = 4242, name: str = "firewalld", port: int = 77) -> bytes:
    return message(
        15,
        attribute(1, struct.pack(">I", 9)),
        attribute(2, struct.pack(">I", process)),
        attribute(3, f"{name}\0".encode()),
        port=port,
    )


def read(*datagrams: bytes) -> list[Transaction]:
    notified = Notified(OURS)
    return [one for datagram in datagrams for one in notified.feed(datagram)]


def test_a_change_of_ours_is_told_with_who_made_it() -> None:
    (told,) = read(named(2, "vipd") + named(8, "vipd", "dispatch", family=10), end())
    assert told == Transaction(
        77,
        4242,
        "firewalld",
        ("table deleted ip vipd", "rule deleted from ip6 vipd dispatch"),
    )


def test_what_others_do_with_their_own_touches_nothing() -> None:
    first, second = read(named(2, "filter") + end(), named(12, "vipd", "services") + end())
    assert first.touched == ()
    assert second.touched == ("element added to ip vipd services",)


def test_chains_of_ours_in_tables_of_everybody() -> None:
    told = read(
        named(8, "nat", "VIPD-SERVICES") + named(8, "nat", "DOCKER"),
        named(8, "nat", "PREROUTING")
        + named(6, "nat", "PREROUTING")
        + named(8, "raw", "PREROUTING"),
        named(2, "nat") + end(),
    )
    assert [(one.touched, one.beside) for one in told] == [
        (
            ("rule deleted from ip nat VIPD-SERVICES",),
            (("ip", "nat", "DOCKER"), ("ip", "nat", "PREROUTING")),
        )
    ]


def test_a_flood_of_chains_of_others_is_bounded() -> None:
    (told,) = read(*(named(8, "nat", f"chain-{number}") for number in range(1000)), end())
    assert len(told.beside) == MOST_BESIDE


def test_what_was_lost_is_not_put_together_with_what_comes() -> None:
    notified = Notified(OURS)
    assert list(notified.feed(named(2, "vipd"))) == []
    notified.lost()
    assert [one.touched for one in notified.feed(end())] == [()]


def test_a_flood_is_told_by_its_beginning() -> None:
    many = [named(8, "vipd", f"chain-{number}") for number in range(1000)]
    (told,) = read(*many, end())
    assert len(told.touched) == MOST_TOLD


def test_of_a_flood_no_more_is_read_than_is_told() -> None:
    """Who made it comes in a datagram of its own, so the rest of this one is of no use.

    A flush of 10,000 services is 80,000 messages, and the repair begins after the last.
    """
    many = b"".join(named(14, "vipd", f"map-{number}") for number in range(2 * MOST_TOLD))
    assert read(many + end(1)) == []
    (told,) = read(many + end(1), end(2))
    assert told.process == 2


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"x",
        bytes(64),
        message(2)[:-1],
        message(2, b"\x01\x00\x01\x00"),
        message(2, attribute(1, b"\xff\xfe")),
        struct.pack("=IHHII", 0xFFFFFFFF, 10 << 8, 0, 0, 0) + bytes(8),
    ],
)
def test_no_bytes_make_it_raise(datagram: bytes) -> None:
    assert read(datagram) == []
    assert read(datagram + end()) in ([], read(end()))


async def test_what_waits_for_its_repair_is_told(watched: Watched) -> None:
    watched.tell("a table")
    await until(partial(_is_mended, watched, 1))
    assert list(watched.repairs.trouble()) == []
    for _ in range(PATIENT_REPAIRS + 9):
        watched.repairs.patience["it"].note("other")
    watched.tell("a table", "other")
    await until(lambda: watched.repairs.undone)
    told = "it: a table, by other; the repair waits, because this goes on"
    assert list(watched.repairs.trouble()) == [told]
