"""What is the matter with a name that does not exist, or is not the cluster's: in words.

Lives here: the sentences of `vipd dns query --trace` that help to the right name. Pure. Must not:
decide whether there is such a name (zone.py).
"""

from collections.abc import Iterator
from difflib import get_close_matches

from vipd.dns.asked_name import AskedName
from vipd.dns.names import address_in
from vipd.dns.origins import is_headless
from vipd.proxy.names import NamespacedName, parse_network

_MOST_ELSEWHERE = 5
_MOST_LETTERS = 2
"""By which a name that may be meant is longer or shorter."""
_MOST_COMPARED = 1000
"""Names; each takes 60 µs, and of many that are alike none is a hint."""


def of_no_name(name: AskedName) -> Iterator[str]:
    """Yield what is the matter with a name of the cluster's that does not exist."""
    if name.address is not None:
        yield f"no Service has {name.address} as its cluster IP or a ready headless endpoint's"
    elif name.kind == "svc":
        yield from _no_service(name)
    elif name.kind == "pod":
        yield from _no_pod(name)
    elif len(name.under) >= 2 and NamespacedName(*name.under[:2]) in name.known.snapshot.services:
        yield f"the label svc is missing: {'.'.join(reversed(name.under))}.svc.{name.domain}"
    elif len(name.under) == 1 and name.has_namespace(name.under[0]):
        right = f"SERVICE.{name.under[0]}.svc.{name.domain}"
        yield f"{name.under[0]} is a namespace; the names of its services are {right}"


def _no_service(name: AskedName) -> Iterator[str]:
    namespace, exposed = name.namespace, name.known.settings.namespaces
    if exposed and namespace not in exposed:
        yield f"namespace {namespace} is not among dns.namespaces: its services have no names"
        return
    if not name.has_namespace(namespace):
        yield f"there is no namespace {namespace}: no Namespace object, and no Service in it"
        known = name.known.namespaces | {one.namespace for one in name.known.snapshot.services}
        yield from _similar(namespace, known)
    if name.service is not None:
        headless = is_headless(name.service)
        if headless and not any(one.endpoint.ready for one in name.behind(name.service)):
            yield "no endpoint is ready: a headless Service has no name then (specification 2.4.1)"
        return
    if len(name.under) < 3:
        return
    wanted = name.under[2]
    yield f"there is no Service {namespace}/{wanted}"
    services = name.known.snapshot.services
    elsewhere = sorted(one.namespace for one in services if one.name == wanted)
    if elsewhere:
        more = ", …" if len(elsewhere) > _MOST_ELSEWHERE else ""
        yield f"one of that name is in: {', '.join(elsewhere[:_MOST_ELSEWHERE])}{more}"
    yield from _similar(wanted, {one.name for one in services if one.namespace == namespace})


def _no_pod(name: AskedName) -> Iterator[str]:
    mode = name.known.settings.pods
    if mode == "disabled":
        yield "Pods have no names: setting pods is disabled"
    elif not name.has_namespace(name.namespace):
        yield f"there is no namespace {name.namespace}"
    elif len(name.under) != 3 or address_in(name.under[2].encode("latin-1")) is None:
        yield "a Pod's name is its address with dashes: 10-244-1-21.NAMESPACE.pod"
    elif mode == "verified":
        yield f"no live Pod of namespace {name.namespace} has that address (pods: verified)"


def _similar(wanted: str, known: set[str] | frozenset[str]) -> Iterator[str]:
    near = [one for one in known if abs(len(one) - len(wanted)) <= _MOST_LETTERS]
    close = get_close_matches(wanted, near, 3) if len(near) <= _MOST_COMPARED else []
    if close:
        yield f"did you mean {' or '.join(close)}?"


def of_others(name: AskedName) -> Iterator[str]:
    """Yield why a name may look like the cluster's and is not."""
    domains = name.known.settings.domains
    labels = [one.decode("latin-1") for one in name.labels]
    services = name.known.snapshot.services
    if name.address is not None:
        networks = [parse_network(one) for one in name.known.settings.reverse or ()]
        if not any(one.version == name.address.version and name.address in one for one in networks):
            told = ", ".join(map(str, networks)) or "none"
            yield f"{name.address} is no cluster IP, and in no reverse network ({told})"
        return
    for kind in ("svc", "pod"):
        if kind in labels[1:] and labels[-1] != "arpa":
            rest = ".".join(labels[labels.index(kind, 1) + 1 :])
            right = f"{'.'.join(labels[: labels.index(kind, 1) + 1])}.{domains[0]}"
            if not rest:
                yield f"the cluster domain is missing: {right}"
            else:
                yield f"{rest} is no cluster domain (domains: {', '.join(domains)}): {right}"
            return
    at = NamespacedName(labels[1], labels[0]) if len(labels) == 2 else None
    if at in services or (len(labels) == 1 and any(one.name == labels[0] for one in services)):
        yield "a Service is called so: Pods ask by their search list; try --namespace"
