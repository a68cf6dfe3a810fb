"""What a resolver in a pod makes of a name before it asks: the search list and its `ndots`.

Lives here: the candidates, in the order in which they are asked. Pure. Must not: ask, or know which
names there are. Source: resolv.conf(5); the kubelet's dnsPolicy ClusterFirst, which lets pods have
`<namespace>.svc.<domain> svc.<domain> <domain>` and `ndots:5`.
"""

from vipd.dns.names import wire

NDOTS = 5


def candidates(name: str, namespace: str, domain: str, ndots: int = NDOTS) -> tuple[str, ...]:
    """Return the names that are asked one after the other, each with its last dot.

    A name with its last dot is asked alone; one with fewer dots than `ndots` goes through the list
    first. What would be too long for a name is not asked.
    """
    if name.endswith("."):
        return (name,)
    domain = domain.removesuffix(".")
    search = (f"{namespace}.svc.{domain}", f"svc.{domain}", domain)
    listed = [f"{name}.{suffix}." for suffix in search]
    made = [f"{name}.", *listed] if name.count(".") >= ndots else [*listed, f"{name}."]
    return tuple([one for one in made if _is_name(one)])


def _is_name(text: str) -> bool:
    try:
        wire(text)
    except ValueError:
        return False
    return True
