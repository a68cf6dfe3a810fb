"""What is told of the DNS server and of workers that forward, and when that is bad news."""

import pytest
from msgspec.structs import replace

from vipd.backends.usage import Silent, Usage, WorkerUsage
from vipd.proxy.counted import worker
from vipd.proxy.status import (
    DnsView,
    Status,
    dns_line,
    judged,
    late,
    worker_notes,
    worker_trouble,
)

GOOD = DnsView(
    workers=2,
    wanted=2,
    restarts=0,
    synced=True,
    services=7,
    questions=40,
    failed=1,
    upstreams={"192.0.2.1:53": True, "192.0.2.2:53": False},
)


def status(dns: DnsView | None) -> Status:
    return Status(
        version="1", pid=1, mode="nftables", node="n", manifests=(), started=0.0, synced=True,
        services=0, virtual_servers=0, endpoints=0, syncs=1, failed_syncs=0, last_sync=None,
        failure="", problems=(), conflicts=(), rejected=(), notes=(), passed_over=(), dns=dns,
    )  # fmt: skip


def test_one_line() -> None:
    said = dns_line(("10.96.0.10:53", "[fd00::a]:53"), GOOD)
    assert said == (
        "10.96.0.10:53, [fd00::a]:53; 7 services; 40 questions, 1 failed; 1 of 2 upstreams up"
    )
    assert dns_line(("127.0.0.1:53",), None) == "127.0.0.1:53"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"workers": 1}, "; 1 of 2 workers do not answer; 7 services"),
        ({"synced": False}, "; services not known yet"),
        ({"upstreams": {"192.0.2.1:53": False}}, "; 0 of 1 upstreams up"),
        ({"workers": 0, "synced": False}, "; 2 of 2 workers do not answer; 40 questions"),
    ],
)
def test_bad_news(told: dict[str, object], words: str) -> None:
    view = replace(GOOD, **told)
    assert words in dns_line(("127.0.0.1:53",), view)
    assert judged(status(view)).degraded


def test_who_was_not_heard_is_not_up() -> None:
    view = replace(GOOD, upstreams={"192.0.2.1:53": None, "192.0.2.2:53": True})
    assert dns_line((), view).endswith("; 1 of 2 upstreams up, 1 not heard yet")
    assert not judged(status(view)).degraded


def test_addresses_that_are_not_the_nodes_are_marked() -> None:
    said = dns_line(("10.96.0.2:53", "127.0.0.1:53"), None, ("10.96.0.2:53",))
    assert said == "10.96.0.2:53 (not the node's), 127.0.0.1:53"


def test_good_news() -> None:
    assert not judged(status(GOOD)).degraded
    assert not judged(status(None)).degraded


def forwarding(number: int, *, retired: bool = False, full: bool = False) -> WorkerUsage:
    return WorkerUsage(
        number=number, pid=100 + number, seconds=1.0, restarts=0, retired=retired, listeners=1,
        open=7, counters={}, files=1024, full=full,
    )  # fmt: skip


def test_workers_that_are_silent_or_missing_are_named_and_bad_news() -> None:
    told = Usage({}, (forwarding(0), forwarding(1, retired=True)), (Silent(2, 102),), wanted=4)
    assert list(worker_trouble(told)) == [
        "worker 2 (pid 102) does not answer",
        "2 of 4 workers not there",
    ]
    views = tuple(map(worker, told.workers))
    for wanted, bad in ((1, False), (2, True)):
        one = replace(status(None), workers=views, workers_wanted=wanted)
        assert judged(one).degraded is bad
    assert not list(worker_trouble(Usage({}, told.workers, wanted=1)))


def test_a_worker_that_is_full_is_a_note() -> None:
    told = Usage({}, (forwarding(0), forwarding(1, full=True)), wanted=2)
    (note,) = worker_notes(told)
    assert note.startswith("worker 1 (pid 101) is full: 7 open, at most 1024 files")
    assert not list(worker_trouble(told))


def test_a_commit_that_does_not_come_to_its_end_is_told() -> None:
    assert list(late(9.9)) == []
    assert list(late(91.4)) == ["a change has been waiting for its commit for 91 s"]
