"""What the iptables mode needs of a host, and how that is found out.

Lives here: the probes and what brings what is missing. Must not: change a table: rules are tried
with `iptables-restore --test`, sets by making and removing one of our own names.
"""

from collections.abc import Sequence

from vipd.backends.ipset import IpSets, SetSpec
from vipd.backends.iptables.pipeline import SETS
from vipd.backends.protocol import Capability
from vipd.backends.xtables import INSTALL, PREFIX, Tools, Xtables, program
from vipd.proxy.errors import DataplaneError, Unsupported
from vipd.proxy.names import Family

_KERNEL = "Debian's package linux-image-amd64"

_FEATURES = (
    ("match conntrack", "-m conntrack --ctstate DNAT -j RETURN", "xt_conntrack", True),
    ("match addrtype", "-m addrtype --dst-type LOCAL -j RETURN", "xt_addrtype", True),
    ("match comment", '-m comment --comment "vipd" -j RETURN', "xt_comment", True),
    (
        "match statistic",
        "-m statistic --mode random --probability 0.5 -j RETURN",
        "xt_statistic",
        True,
    ),
    ("target CONNMARK", "-j CONNMARK --set-xmark 0x1/0x1", "xt_connmark", True),
    ("target DNAT", "-p tcp -j DNAT --to-destination {host}:80", "xt_nat", True),
    ("match recent", "-m recent --set --name vipd-probe --rsource -j RETURN", "xt_recent", False),
    (
        "match cluster",
        "-m cluster --cluster-total-nodes 2 --cluster-local-node 1 "
        "--cluster-hash-seed 0x1 -j RETURN",
        "xt_cluster",
        False,
    ),
)
"""Name, rule that tries it, module that brings it, and whether every service needs it."""
_HOST = {Family.IPV4: "192.0.2.1", Family.IPV6: "[2001:db8::1]"}


async def capabilities(tools: Xtables, sets: IpSets) -> list[Capability]:
    """Return what was found: tools and variant, leftovers, matches and targets, types of sets."""
    try:
        found = await tools.find()
        variant = await tools.variant()
    except Unsupported as error:
        return [Capability(error.capability, False, remedy=error.remedy)]
    except DataplaneError as error:
        return [Capability("iptables", False, str(error), INSTALL)]
    in_use = f"{variant} ({_why(found)})"
    made = [Capability("iptables", tools.has(Family.IPV4, variant), in_use, INSTALL)]
    name = program(variant, Family.IPV6)
    six = tools.has(Family.IPV6, variant)
    made.append(Capability("ip6tables", six, name, INSTALL, needed=False))
    if found.leftovers:
        told = f"{', '.join(found.leftovers[:3])}… ({len(found.leftovers)} chains)"
        remedy = "`vipd cleanup --mode iptables` while another mode serves"
        made.append(Capability("one variant only", False, told, remedy, needed=False))
    if made[0].present:
        made += [await _feature(tools, *feature) for feature in _FEATURES]
    made += await _set_types(sets)
    return made


def _why(found: Tools) -> str:
    same = found.in_use is found.default
    return "the host's iptables" if same else "the host's rules are in it"


async def _feature(tools: Xtables, name: str, rule: str, module: str, needed: bool) -> Capability:
    # A chain of its own, so that the kernel looks at the rule: nothing leads to it.
    chain = f"{PREFIX}PROBE"
    text = f"*nat\n:{chain} - [0:0]\n-A {chain} {rule.format(host=_HOST[Family.IPV4])}\nCOMMIT\n"
    try:
        await tools.restore(Family.IPV4, text, test=True)
    except DataplaneError as error:
        remedy = f"`modprobe {module}` ({_KERNEL})"
        return Capability(name, False, str(error), remedy, needed=needed)
    return Capability(name, True, needed=needed)


async def _set_types(sets: IpSets) -> Sequence[Capability]:
    made = []
    for kind in sorted({one.type for one in SETS.values()}):
        name = f"{PREFIX}PROBE"
        try:
            await sets.create(SetSpec(name, kind))
            await sets.destroy(name)
        except Unsupported as error:
            made.append(Capability(f"ipset {kind}", False, error.capability, error.remedy))
        except DataplaneError as error:
            made.append(Capability(f"ipset {kind}", False, str(error)))
        else:
            made.append(Capability(f"ipset {kind}", True))
    return made
