"""What tools print and the kernel tells, as figures. Pure.

Lives here: parsing for `vipd bench datapath`. Must not: run or read anything.
"""

import msgspec
from msgspec import Struct


class Unreadable(ValueError):
    """A tool reported a failure, or printed what is no result; the message says what."""


class _Iperf3Sum(Struct):
    bytes: int
    bits_per_second: float


class _Iperf3End(Struct):
    sum_received: _Iperf3Sum | None = None


class _Iperf3(Struct):
    end: _Iperf3End
    error: str | None = None


class Bulk(Struct, frozen=True):
    """What iperf3 moved: bits that arrived, and how many of them each second."""

    bits: int
    bits_per_second: float


def iperf3(printed: str | bytes) -> Bulk:
    """Return what `iperf3 --json` says of the receiving side; raise Unreadable."""
    try:
        told = msgspec.json.decode(printed, type=_Iperf3)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"iperf3 printed no result: {error}") from error
    if told.error is not None:
        raise Unreadable(f"iperf3: {told.error}")
    received = told.end.sum_received
    if received is None or received.bytes == 0:
        raise Unreadable("iperf3: nothing arrived")
    return Bulk(received.bytes * 8, received.bits_per_second)


WRK_SCRIPT = """\
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\n{"requests":%d,"microseconds":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d,"status":%d}\\n',
    summary.requests, summary.duration, e.connect, e.read, e.write, e.timeout, e.status))
end
"""
"""For `wrk --script`: a last line for `wrk`, below."""


class Requests(Struct, frozen=True):
    """What wrk counted. The last five are errors of its connections and answers that are no 200."""

    requests: int
    microseconds: int
    connect: int = 0
    read: int = 0
    write: int = 0
    timeout: int = 0
    status: int = 0

    @property
    def rate(self) -> float:
        """Answers each second."""
        return self.requests * 1e6 / self.microseconds

    @property
    def errors(self) -> str:
        """The errors in words, or nothing."""
        names = ("connect", "read", "write", "timeout", "status")
        counts = {name: getattr(self, name) for name in names}
        return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def wrk(printed: str | bytes) -> Requests:
    """Return what the last line of wrk with WRK_SCRIPT says; raise Unreadable."""
    lines = printed.strip().splitlines()
    try:
        told = msgspec.json.decode(lines[-1] if lines else b"", type=Requests)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"wrk printed no result: {error}") from error
    if told.requests == 0 or told.microseconds == 0:
        raise Unreadable(f"wrk got no answer ({told.errors or 'no error'})")
    return told


# What the kernel says


def busy_ticks(stat: str) -> int:
    """Return the ticks that all processors together worked, from /proc/stat (proc(5)).

    Without idle, waiting for I/O, and time that the hypervisor gave to others. Guests' time is in
    that of users already.
    """
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, stat.split("\n")[0].split()[1:])
    return user + nice + system + irq + softirq


def process_ticks(stat: str) -> int:
    """Return the ticks of one process and the children it has waited for, from /proc/PID/stat."""
    return sum(map(int, stat.rpartition(")")[2].split()[11:15]))


def proportional_bytes(rollup: str) -> int:
    """Return Pss from /proc/PID/smaps_rollup, 0 where it is not there."""
    for line in rollup.splitlines():
        name, _, value = line.partition(":")
        if name == "Pss":
            return int(value.split()[0]) * 1024
    return 0
