"""What `vipd bench dns` asks, and what dnsperf says of the answers. Pure.

Lives here: lists of questions, and parsing. Must not: run anything.
"""

import re
from collections.abc import Sequence
from random import Random

from msgspec import Struct

from vipd.bench.datapath_printed import Unreadable
from vipd.bench.dns_cluster import SUFFIX, name_of
from vipd.bench.dns_plan import FORWARDED_DOMAIN, Measure

FORWARDED_NAMES = 1000
_PAIRS, _MISSES, _SRV = 8, 3, 1
"""Of the mixed questions: A and AAAA in pairs as resolvers ask, what search lists make of a name,
and SRV."""


def questions(measure: Measure, services: int) -> list[str]:
    """Return lines of `NAME TYPE` in random order, the same each time."""
    lots = Random(services)
    numbers = range(services)
    match measure:
        case Measure.UNKNOWN:
            found = [f"no-{number}.{SUFFIX} A" for number in numbers]
        case Measure.SRV:
            found = [f"_http._tcp.{name_of(number)} SRV" for number in numbers]
        case Measure.FORWARDED:
            found = [f"host-{number}.{FORWARDED_DOMAIN} A" for number in range(FORWARDED_NAMES)]
        case Measure.MIXED:
            found = [one for number in numbers for one in _mixed(number, lots)]
        case _:
            found = [f"{name_of(number)} A" for number in numbers]
    lots.shuffle(found)
    return found


def _mixed(number: int, lots: Random) -> tuple[str, ...]:
    lot = lots.randrange(_PAIRS + _MISSES + _SRV)
    name = name_of(number)
    if lot < _PAIRS:
        return f"{name} A", f"{name} AAAA"
    if lot < _PAIRS + _MISSES:
        return f"{name}.{SUFFIX} A", f"{name}.{SUFFIX} AAAA"
    return (f"_http._tcp.{name} SRV",)


def rcodes(measure: Measure) -> frozenset[str]:
    """Return what all answers have to say."""
    if measure is Measure.UNKNOWN:
        return frozenset({"NXDOMAIN"})
    return frozenset({"NOERROR", "NXDOMAIN"} if measure is Measure.MIXED else {"NOERROR"})


class Asked(Struct, frozen=True):
    """What dnsperf counted."""

    completed: int
    lost: int
    seconds: float
    rcodes: dict[str, int]

    @property
    def rate(self) -> float:
        """Answers each second."""
        return self.completed / self.seconds

    def problem(self, wanted: frozenset[str]) -> str | None:
        """Return what is wrong with the answers, or None."""
        other = {name: count for name, count in self.rcodes.items() if name not in wanted}
        if other:
            return "answers with " + ", ".join(f"{name} {n}" for name, n in other.items())
        if self.lost * 1000 > self.completed:
            return f"{self.lost} questions lost, {self.completed} answered"
        return None


def dnsperf(printed: str) -> Asked:
    """Return what dnsperf's statistics say; raise Unreadable."""
    completed = _number(r"Queries completed: +(\d+)", printed)
    seconds = _number(r"Run time \(s\): +([\d.]+)", printed)
    if not completed or not seconds:
        raise Unreadable("dnsperf got no answer")
    line = re.search(r"Response codes: +(.*)", printed)
    counts = re.findall(r"(\w+) (\d+) \(", line[1] if line else "")
    lost = int(_number(r"Queries lost: +(\d+)", printed))
    return Asked(int(completed), lost, seconds, {name: int(n) for name, n in counts})


def _number(pattern: str, printed: str) -> float:
    found = re.search(pattern, printed)
    if found is None:
        raise Unreadable(f"dnsperf printed no statistics: {printed.strip()[-200:]}")
    return float(found[1])


def wire_questions(lines: Sequence[str]) -> list[bytes]:
    """Return questions of type A as messages without their id."""
    found = []
    for line in lines:
        labels = line.partition(" ")[0].encode().split(b".")
        name = b"".join(bytes((len(one),)) + one for one in labels)
        found.append(b"\x01\x00\x00\x01" + bytes(6) + name + b"\x00\x00\x01\x00\x01")
    return found
