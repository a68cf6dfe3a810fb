"""The sysctls of IPVS mode, each with its reason.

Lives here: which settings, for which kernel. Pure. Must not: read or write them (sysctl.py).
Sources: Documentation/networking/ipvs-sysctl.rst; kube-proxy's reference; docs/ipvs.md (measured).
"""

from vipd.backends.sysctl import Setting
from vipd.proxy.settings import IpvsSettings

CONNTRACK = "net/ipv4/vs/conntrack"
_REUSE_FIXED = (5, 9)
_REUSE_BROKEN_SINCE = (4, 1)


def wanted(settings: IpvsSettings, kernel: tuple[int, int]) -> list[Setting]:
    """Return the settings for a kernel of this version (major, minor)."""
    made = [
        Setting(CONNTRACK, "1", "masquerade and a live switch need an entry for every flow"),
        Setting(
            "net/ipv4/vs/expire_nodest_conn",
            "1",
            "a flow whose endpoint is gone is given another one with its next packet",
        ),
        Setting(
            "net/ipv4/vs/expire_quiescent_template",
            "1",
            "affinity does not hold a client at an endpoint that takes no new connections",
        ),
        Setting(
            "net/ipv4/vs/nat_icmp_send",
            "0",
            "1 ends flows that another dataplane translates while services are registered",
        ),
        Setting(
            "net/ipv4/tcp_early_demux",
            "0",
            "else the answer to a connection of the node itself can go to another of its sockets",
        ),
        # Kept when vipd leaves: whoever else forwards here relies on it by now.
        Setting("net/ipv4/ip_forward", "1", "packets of pods are forwarded", keep=True),
        Setting("net/ipv6/conf/all/forwarding", "1", "packets of pods are forwarded", keep=True),
    ]
    if _REUSE_BROKEN_SINCE <= kernel < _REUSE_FIXED:
        why = "with 1, a reused source port costs a second (kernels before 5.9)"
        made.append(Setting("net/ipv4/vs/conn_reuse_mode", "0", why))
    if settings.strict_arp:
        why = "ARP is answered only for addresses of the interface asked"
        made.append(Setting("net/ipv4/conf/all/arp_ignore", "1", why))
        made.append(Setting("net/ipv4/conf/all/arp_announce", "2", why))
    return made


def version(release: str) -> tuple[int, int]:
    """Return (major, minor) of a release such as ``6.1.0-56-amd64``; (0, 0) if unreadable."""
    major, _, rest = release.partition(".")
    minor = rest.partition(".")[0]
    if major.isdecimal() and minor.isdecimal():
        return int(major), int(minor)
    return 0, 0
