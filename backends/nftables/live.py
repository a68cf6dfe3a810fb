"""What the tables of the nftables mode have counted and remembered for one packet.

Lives here: asking the kernel for the very elements that the packet meets, and no others. Must not:
change anything.
"""

import re
from collections import Counter
from collections.abc import Sequence

from vipd.backends.nftables.compile import Program
from vipd.backends.nftables.objects import FAMILY_WORD, TABLE
from vipd.backends.nftables.tool import Nft
from vipd.backends.nftables.trace import looked_up
from vipd.backends.protocol import Known, Packet
from vipd.proxy.errors import DataplaneError, OutOfStep
from vipd.proxy.names import family_of, parse_address
from vipd.proxy.virtualserver import Endpoint
from vipd.proxy.words import counted

KEYS_AT_ONCE = 32
"""Elements in one `get element`: nft 1.0.6 dies of signal 11 with 200 (100 are well)."""

_ELEMENTS = re.compile(r"elements = \{(.*?)\}", re.DOTALL)
_COUNTED = re.compile(r"(.*?) counter packets ([0-9]+) bytes [0-9]+ : (.*)", re.DOTALL)
_REMEMBERED = re.compile(r"expires ([0-9]+[dhms])(\S*) : (\S+)")


async def counters(program: Program, packet: Packet) -> Known:
    """Return what the elements that the packet meets have counted, and where affinity remembers it.

    Counts are new connections since the element was made.
    """
    by_map: dict[str, list[str]] = {}
    for name, key in looked_up(program, packet):
        by_map.setdefault(name, []).append(key)
    nft, family = Nft(), FAMILY_WORD[family_of(packet.destination)]
    printed: dict[str, list[str]] = {}
    lines: list[str] = []
    for name, keys in by_map.items():
        try:
            printed[name] = await _get(nft, f"{family} {TABLE} {name}", list(dict.fromkeys(keys)))
        except OutOfStep:
            lines.append(
                f"{packet.source} is not remembered by affinity"
                if _is_memory(name)
                else f"{name} lacks an element that it should have ({', '.join(keys[:3])} …)"
            )
        except DataplaneError as error:
            return Known((f"counters are not known: {error}",))
    endpoints = _by_last_part([one for found in printed.values() for one in found])
    remembered = None
    for name, found in printed.items():
        if not _is_memory(name):
            lines += _counted(name, found)
            continue
        for identity, rest in _remembered(found):
            to = endpoints.get(identity)
            where = to or "an endpoint that is gone"
            lines.append(f"affinity remembers the client: to {where}, for {rest} yet")
            remembered = _endpoint(to) if to else None
    return Known(tuple(lines), remembered)


async def _get(nft: Nft, where: str, keys: Sequence[str]) -> list[str]:
    """Return the elements with these keys, as nft prints them; OutOfStep if one is not there."""
    script = "".join(
        f"get element {where} {{ {', '.join(keys[start : start + KEYS_AT_ONCE])} }}\n"
        for start in range(0, len(keys), KEYS_AT_ONCE)
    )
    text = (await nft.run(["-f", "-"], script)).decode(errors="replace")
    return [
        one for found in _ELEMENTS.findall(text) for one in re.split(r",\s+", str(found).strip())
    ]


def _is_memory(name: str) -> bool:
    return name.removeprefix("local-").startswith("clients-")


def _by_last_part(elements: Sequence[str]) -> dict[str, str]:
    """Return the value of each element by the last part of its key: the slot, or an identity."""
    matches = (_COUNTED.fullmatch(one) for one in elements)
    return {one[1].rpartition(" . ")[2]: one[3] for one in matches if one}


def _remembered(elements: Sequence[str]) -> Sequence[tuple[str, str]]:
    """Return the endpoint's identity, and how long it is remembered still."""
    matches = (_REMEMBERED.search(one) for one in elements)
    return [(one[3], f"{one[1]}{_to_seconds(one[2])}") for one in matches if one]


def _endpoint(text: str) -> Endpoint:
    address, _, port = text.partition(" . ")
    return Endpoint(parse_address(address), int(port))


def _to_seconds(rest: str) -> str:
    return re.sub(r"[0-9]+ms$", "", rest)


def _counted(name: str, elements: Sequence[str]) -> Sequence[str]:
    """Return a line for each element; slots of one endpoint are added up."""
    is_slots = name.removeprefix("node-port-") == "endpoints"
    packets: Counter[str] = Counter()
    for one in elements:
        if match := _COUNTED.fullmatch(one):
            packets[match[3] if is_slots else f"{match[1]} : {match[3]}"] += int(match[2])
    return [
        f"{name}: {what}, {counted(count, 'new connection')}" for what, count in packets.items()
    ]
