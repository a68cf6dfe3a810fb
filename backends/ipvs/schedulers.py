"""IPVS schedulers: which one a virtual server gets.

Lives here: the choice, and the flags that go with it. Pure. Must not: know how the kernel is told,
or which there are (proxy/model.py).
Source: net/netfilter/ipvs/ip_vs_*.c and include/uapi/linux/ip_vs.h, Linux 6.1; ipvsadm(8).
"""

from collections.abc import Iterable
from types import MappingProxyType
from typing import NamedTuple

from vipd.proxy.model import Algorithm
from vipd.proxy.virtualserver import Endpoint

_FALLBACK = 0x08
_PORT = 0x10
_FLAGS = MappingProxyType({"sh": _FALLBACK, "mh": _FALLBACK | _PORT})
"""IP_VS_SVC_F_SCHED1 and 2. Without the fallback, sh and mh refuse a client whose endpoint is at
weight 0 (ip_vs_sh.c, ip_vs_mh.c: is_unavailable). The source port is hashed for Maglev, as
kube-proxy and the other dataplanes do, and not for the plain source hash."""
_WEIGHTED = MappingProxyType({"rr": "wrr", "lc": "wlc"})
"""The twin that honours weights; the plain one only tells 0 from the rest."""


class Scheduler(NamedTuple):
    """A scheduler and its flags (bits of IPVS_SVC_ATTR_FLAGS)."""

    name: str
    flags: int = 0

    def __str__(self) -> str:
        options = (("fallback", _FALLBACK), ("port", _PORT))
        words = [word for word, bit in options if self.flags & bit]
        told = ",".join(f"{self.name}-{word}" for word in words)
        return f"{self.name} -b {told}" if told else self.name


def module(name: str) -> str:
    """Return the kernel module that brings a scheduler."""
    return f"ip_vs_{name}"


def choose(
    asked: str, algorithm: Algorithm, endpoints: Iterable[Endpoint], default: str
) -> Scheduler:
    """Return the scheduler: the one asked for, else what the algorithm says, else the default.

    IPVS has no random choice; the default stands for it.
    """
    name = asked
    if not name:
        match algorithm:
            case Algorithm.SOURCE_HASH:
                name = "sh"
            case Algorithm.MAGLEV:
                name = "mh"
            case Algorithm.ROUND_ROBIN:
                name = "rr"
            case Algorithm.LEAST_CONNECTIONS:
                name = "lc"
            case Algorithm.RANDOM:
                name = default
        if name in _WEIGHTED and len({one.weight for one in endpoints}) > 1:
            name = _WEIGHTED[name]
    return Scheduler(name, _FLAGS.get(name, 0))
