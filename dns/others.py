"""Who answers for a name that is not the cluster's: `vipd dns query --trace`.

Lives here: the sentence. Pure. Must not: ask, or know what is cached (the workers do).
"""

from vipd.dns.forward import wire
from vipd.dns.forward.configured import Configured
from vipd.dns.forward.special import Special, is_address_of_single_label
from vipd.dns.names import text_of
from vipd.dns.settings import DnsSettings


def who_answers(name: bytes, kind: int, settings: DnsSettings, made: Configured) -> str:
    """Return who answers for a name, in the order in which the server looks (docs/dns.md)."""
    if not settings.forwards:
        return "nobody: names of others are refused (dns.forwards: false)"
    if name in made.static:
        target = made.static.target(name, kind)
        to = f", a CNAME to {text_of(target)}" if target is not None else ""
        return f"dns.forward: records, hosts or hostsFile has this name{to}"
    domain = next(one for one in wire.suffixes(name) if one in made.plan)
    found = made.plan[domain]
    if isinstance(found, Special):
        return f"this server: {text_of(domain)} is a name that is never forwarded"
    is_default = domain == b"\0"
    kept = is_default and not settings.forward.forward_single_labels
    if kept and is_address_of_single_label(name, kind):
        return "this server: a single label is no name of others (forwardSingleLabels: false)"
    upstreams = ", ".join(map(str, found))
    if not upstreams:
        return "nobody: there is no upstream"
    stub = "" if is_default else f", for stub domain {text_of(domain)}"
    return f"the cache, or upstream {upstreams}{stub}"
