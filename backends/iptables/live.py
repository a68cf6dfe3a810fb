"""What the chains of the iptables mode have counted and remembered for one packet.

Lives here: reading the counters of the rules that the packet meets, and the lists in which affinity
keeps its clients. Must not: change anything.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from vipd.backends.iptables.compile import Program
from vipd.backends.iptables.objects import NAT, Chain
from vipd.backends.iptables.trace import met
from vipd.backends.protocol import Known, Packet
from vipd.backends.xtables import Xtables
from vipd.proxy.errors import DataplaneError
from vipd.proxy.names import family_of, parse_address
from vipd.proxy.virtualserver import Endpoint
from vipd.proxy.words import counted

LISTS = Path("/proc/thread-self/net/xt_recent")
TIMERS = Path("/proc/timer_list")
"""Where the kernel says what time it is in jiffies, by which it remembers (root)."""
_TRANSLATION = "-j DNAT --to-destination "
_COUNTED = re.compile(r"\[(\d+):\d+\] -A (\S+) ")
_MEMORY = re.compile(r"-m recent --update --seconds (\d+) --reap --name (\S+) ")

Met = Sequence[tuple[str, Chain, int]]


async def counters(program: Program, packet: Packet) -> Known:
    """Return what the rules that the packet meets have counted, and where affinity remembers it.

    Counts are since the chain was written last: new connections, in the table filter packets. Each
    table is read as a whole; a part of a legacy one cannot be had.
    """
    rules = await asyncio.to_thread(met, program, packet)
    family, tools = family_of(packet.destination), Xtables()
    lines: list[str] = []
    for table in dict.fromkeys(table for table, _, _ in rules):
        here = [one for one in rules if one[0] == table]
        try:
            text = await tools.save(family, table, counters=True)
        except DataplaneError as error:
            lines.append(f"counters of the table {table} are not known: {error}")
            continue
        lines += await asyncio.to_thread(_counts, table, text, here)
    told = await asyncio.to_thread(_memory, rules, packet)
    return Known((*lines, *told.lines), told.remembered)


def _counts(table: str, text: str, rules: Met) -> Sequence[str]:
    """Return a line for each rule; rules that translate to one endpoint are added up."""
    held: dict[str, list[int]] = {chain.name: [] for _, chain, _ in rules}
    for line in text.splitlines():
        match = _COUNTED.match(line)
        if match and match[2] in held:
            held[match[2]].append(int(match[1]))
    total: Counter[str] = Counter()
    other = []
    places = {(chain.name, number): chain for _, chain, number in rules}
    for (_, number), chain in places.items():
        rule, counts = chain.rules[number], held[chain.name]
        if len(counts) != len(chain.rules):
            other.append(f"{table} {chain.name} is not as it should be")
            continue
        what = rule.text
        if rule.target.startswith(_TRANSLATION):
            what = f"to {rule.target.removeprefix(_TRANSLATION)}"
        total[f"{table} {chain.name}: {what}"] += counts[number]
    unit = "new connection" if table == NAT else "packet"
    told = [f"{what}, {counted(count, unit)}" for what, count in total.items()]
    return [*told, *dict.fromkeys(other)]


def _memory(rules: Met, packet: Packet) -> Known:
    """Return the first endpoint whose list holds the source, as the rules ask one after another."""
    asked = [
        (match[2], int(match[1]), chain.rules[number].target.removeprefix(_TRANSLATION))
        for _, chain, number in rules
        if (match := _MEMORY.search(chain.rules[number].match))
    ]
    if not asked:
        return Known(())
    try:
        clock = read_clock(TIMERS.read_text())
        for name, seconds, to in asked:
            seen = last_seen(LISTS.joinpath(name).read_text().splitlines(), packet)
            left = seconds - (clock[0] - seen) // clock[1] if seen is not None else 0
            if left > 0:
                host, _, port = to.rpartition(":")
                line = f"affinity remembers the client: to {to}, for {left}s yet"
                endpoint = Endpoint(parse_address(host.strip("[]")), int(port))
                return Known((line,), endpoint)
    except OSError as error:
        return Known((f"affinity's memory is not known: {error.filename}: {error.strerror}",))
    except ValueError as error:
        return Known((f"affinity's memory is not known: {error}",))
    return Known((f"{packet.source} is not remembered by affinity",))


def last_seen(lines: Iterable[str], packet: Packet) -> int | None:
    """Return when a list met the packet's source last, in jiffies; None: it is not in it.

    Format: recent_seq_show() in net/netfilter/xt_recent.c.
    """
    for line in lines:
        fields = line.split()
        if parse_address(fields[0].removeprefix("src=")) == packet.source:
            return int(fields[fields.index("last_seen:") + 1])
    return None


def read_clock(text: str) -> tuple[int, int]:
    """Return the kernel's time in jiffies, and how many are a second, from its list of timers.

    Jiffies begin at 2**32 less five minutes (INITIAL_JIFFIES); their rate (CONFIG_HZ) is the one of
    four that fits the time since boot, which stands there too. ValueError where it does not.
    """
    now, jiffies = (re.search(rf"^{word} (\d+)", text, re.M) for word in ("now at", "jiffies:"))
    if now is None or jiffies is None:
        raise ValueError(f"{TIMERS} does not tell the time")
    since, ticks = int(now[1]) / 1e9 - 300, int(jiffies[1]) - (1 << 32)
    return int(jiffies[1]), min((100, 250, 300, 1000), key=lambda rate: abs(ticks - rate * since))
