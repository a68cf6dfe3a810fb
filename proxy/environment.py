"""The variables of services that the kubelet starts a container with: `vipd env`.

Lives here: which services a pod gets variables of, what each variable is called and holds, and what
a person should know about them. Pure. Must not: know a shell or a file format (cli/env.py).
Source: pkg/kubelet/kubelet_pods.go (getServiceEnvVarMap, makeEnvironmentVariables) and
pkg/kubelet/envvars/envvars.go of Kubernetes, at commit 001a80e975bb (2026).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec
from msgspec import Struct

from vipd.proxy.decode_fields import is_name, shown
from vipd.proxy.errors import ConfigError, ControlError, QuestionError
from vipd.proxy.model import Pod, Service, ServicePort, ServiceType
from vipd.proxy.names import Address, NamespacedName
from vipd.proxy.words import counted

KUBERNETES = NamespacedName("default", "kubernetes")
"""The service that every pod gets variables of, whatever its namespace and its spec."""
MOST_EXEC_BYTES = 2 << 20
"""What arguments and variables of a new process may take together on Linux with the default stack
limit of 8 MiB (a quarter of it, execve(2)). Beyond, no container starts: kubernetes#84539."""
MOST_CLASHES = 10
"""Variables that two services want, named one by one."""
MOST_NAMES = 5
_POINTER_BYTES = 8


class Wanted(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whose variables are asked for, as it travels over the control socket."""

    namespace: str
    pod: str = ""
    """Name of a Pod whose ``enableServiceLinks`` holds; empty for any pod of the namespace."""
    service_links: bool = True
    """False: as if the Pod said ``enableServiceLinks: false``."""


class Environment(Struct, frozen=True):
    """The variables by name, in the order of the services' names, then in the kubelet's."""

    variables: dict[str, str]
    notes: tuple[str, ...] = ()
    """Sentences on what is there or missing for a reason that is seldom meant."""


def wanted(text: str) -> Wanted:
    """Return the question in a JSON text; raise ControlError."""
    try:
        return msgspec.json.decode(text, type=Wanted)
    except msgspec.DecodeError as error:
        raise ControlError(f"request not understood: {error}") from error


def checked(asked: Wanted) -> Wanted:
    """Return the question as it is; raise ConfigError where namespace or pod are no names."""
    if not is_name(asked.namespace):
        raise ConfigError("--namespace", f"{shown(asked.namespace)} is not a name")
    if asked.pod and not is_name(asked.pod):
        hint = "; write --namespace NS --pod NAME" if "/" in asked.pod else ""
        raise ConfigError("--pod", f"{shown(asked.pod)} is not a name{hint}")
    return asked


def environment(
    asked: Wanted,
    services: Mapping[NamespacedName, Service],
    pods: Mapping[NamespacedName, Pod],
) -> Environment:
    """Return the variables of a pod's containers, as they would be if it started now.

    Of `pods` only the one that is asked about matters; QuestionError where it is not among them.
    """
    links = asked.service_links and (not asked.pod or _pod(asked, pods).service_links)
    chosen = _chosen(asked.namespace, services, links=links)
    told, clashes = _assigned(chosen)
    notes = [*_absences(asked.namespace, services, chosen, links=links), *_said(clashes)]
    size = sum(len(name) + len(value) + 2 + _POINTER_BYTES for name, value in told.items())
    if size > MOST_EXEC_BYTES:
        notes.append(
            f"the variables take {size} bytes, more than the {MOST_EXEC_BYTES} that Linux hands to "
            "a new process: containers of this namespace do not start (argument list too long); "
            "their Pods need spec.enableServiceLinks: false"
        )
    return Environment(told, tuple(notes))


def _pod(asked: Wanted, pods: Mapping[NamespacedName, Pod]) -> Pod:
    name = NamespacedName(asked.namespace, asked.pod)
    found = pods.get(name)
    if found is None:
        others = sorted(one.name for one in pods if one.namespace == asked.namespace)
        known = ", ".join(others[:MOST_NAMES]) + (", …" if len(others) > MOST_NAMES else "")
        there = f"there are {known}" if others else "there is none in this namespace"
        raise QuestionError(f"no Pod {name} is known; {there}")
    return found


def _chosen(
    namespace: str, services: Mapping[NamespacedName, Service], *, links: bool
) -> list[Service]:
    """Return the services that get variables, by name; the pod's own namespace comes first.

    A service of the pod's own namespace that is called kubernetes takes the place of the one in
    default, as in the kubelet.
    """
    found: dict[str, Service] = {}
    master = services.get(KUBERNETES)
    if master is not None and _has_variables(master):
        found[master.name.name] = master
    if links:
        own = (one for one in services.values() if one.name.namespace == namespace)
        found.update((one.name.name, one) for one in own if _has_variables(one))
    return [found[name] for name in sorted(found)]


def _has_variables(service: Service) -> bool:
    """Whether it has a cluster IP: labels that keep proxies away do not matter to the kubelet."""
    return (
        service.type is not ServiceType.EXTERNAL_NAME
        and bool(service.cluster_ips)
        and bool(service.ports)
    )


def _assigned(chosen: Iterable[Service]) -> tuple[dict[str, str], list[str]]:
    """Return the variables, and a sentence for each that two services want with other values.

    The kubelet goes through services in no order, and the last one has the variable. Here it is the
    last by name, which is one of the kubelet's possible results.
    """
    told: dict[str, str] = {}
    owners: dict[str, Service] = {}
    clashes: list[str] = []
    for service in chosen:
        for name, value in _variables(service):
            before = owners.get(name, service)
            if before is not service and told[name] != value:
                clashes.append(
                    f"{name}: Service {before.name} wants {told[name]} and Service {service.name} "
                    f"wants {value}; the kubelet takes either, by chance: here it is the latter"
                )
            told[name], owners[name] = value, service
    return told, clashes


def _variables(service: Service) -> Iterator[tuple[str, str]]:
    """Yield the variables of one service, in the kubelet's order.

    Of a dual-stack service it is the first cluster IP: the kubelet reads spec.clusterIP alone.
    """
    name, address = variable_name(service.name.name), service.cluster_ips[0]
    yield f"{name}_SERVICE_HOST", str(address)
    yield f"{name}_SERVICE_PORT", str(service.ports[0].port)
    for port in service.ports:
        if port.name:
            yield f"{name}_SERVICE_PORT_{variable_name(port.name)}", str(port.port)
    yield f"{name}_PORT", _url(address, service.ports[0])
    for port in service.ports:
        stem = f"{name}_PORT_{port.port}_{port.protocol}"
        yield stem, _url(address, port)
        yield f"{stem}_PROTO", port.protocol.lower()
        yield f"{stem}_PORT", str(port.port)
        yield f"{stem}_ADDR", str(address)


def variable_name(name: str) -> str:
    """Return the part of a variable's name that a service's or port's name makes.

    A leading digit stays, as the kubelet has it (Kubernetes 1.36 allows it in a Service's name): a
    program can read such a variable, a shell cannot name it.
    """
    return name.upper().replace("-", "_")


def _url(address: Address, port: ServicePort) -> str:
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"{port.protocol.lower()}://{host}:{port.port}"


def _absences(
    namespace: str,
    services: Mapping[NamespacedName, Service],
    chosen: Iterable[Service],
    *,
    links: bool,
) -> Iterator[str]:
    if links and not any(one.namespace == namespace for one in services):
        yield f"no Service is in namespace {namespace}"
    if not any(one.name.name == KUBERNETES.name for one in chosen):
        known = KUBERNETES in services
        why = "has no cluster IP" if known else "is not known"
        yield f"Service {KUBERNETES} {why}: KUBERNETES_* are missing, which a pod of a cluster has"


def _said(clashes: Sequence[str]) -> Iterator[str]:
    yield from clashes[:MOST_CLASHES]
    if len(clashes) > MOST_CLASHES:
        yield f"two services want {counted(len(clashes) - MOST_CLASHES, 'more variable')}"
