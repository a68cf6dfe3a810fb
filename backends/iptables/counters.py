"""What the rules of our chains have counted, as iptables-save prints it.

Lives here: the reading of that text, and whose each rule is. Pure. Must not: run a tool
(driver.py), or add up. Refusals are not in it: one rule counts those of all virtual servers.
"""

import re
from collections.abc import Collection, Iterator

from vipd.backends.counts import Count, Outcome
from vipd.backends.iptables import balance
from vipd.proxy.names import Family, ServicePortName
from vipd.proxy.virtualserver import VirtualServer

_RULE = re.compile(
    r"^\[(\d+):\d+\] -A (VIPD-SV[CLP]-\w+) .*-(?:j DNAT --to-destination (\S+)|g (VIPD-SVP-\w+))",
    re.MULTILINE,
)
_OURS = re.compile(r"^\[\d+:\d+\] -A VIPD-", re.MULTILINE)


def rules(text: str) -> int:
    """Return how many rules of ours a table has."""
    return sum(1 for _ in _OURS.finditer(text))


def counts(text: str, servers: Collection[VirtualServer], family: Family) -> Iterator[Count]:
    """Yield what the rules count that translate to endpoints; chains that nobody has are left out.

    A list that is long has chains below its own; they come in any order.
    """
    owners: dict[str, ServicePortName] = {}
    for one in servers:
        if one.key.family is family:
            owners[balance.cluster_chain(one)] = owners[balance.local_chain(one)] = one.owner
    above: dict[str, str] = {}
    packets: dict[tuple[str, str], int] = {}
    # An endpoint can have several rules in a chain: turns, and one for clients that are known.
    for match in _RULE.finditer(text):  # one at a time: there are 60,000 of them
        told, chain, endpoint, lower = match.groups("")
        if lower:
            above[lower] = chain
        elif told != "0":
            packets[chain, endpoint] = packets.get((chain, endpoint), 0) + int(told)
    for (chain, endpoint), number in packets.items():
        owner = owners.get(_root(chain, above))
        if owner is not None:
            yield Count((family, chain, endpoint), owner, endpoint, Outcome.GIVEN, number)


def _root(chain: str, above: dict[str, str]) -> str:
    """Return the chain from which another one is come to in the end."""
    for _ in range(len(above)):
        if chain not in above:
            break
        chain = above[chain]
    return chain
