"""A notice: a sentence on an object of the cluster, for those who look at that object.

Lives here: what a notice is. Must not: decide which there are (notices.py), or write any (a source
does). The API calls what it becomes an Event; here an event is what a source says (events.py).
Source: events.k8s.io/v1 of the Kubernetes API, v1.36 (apis/core/validation/events.go for lengths).
"""

from msgspec import Struct

LONGEST_TEXT_BYTES = 1024
"""What the API takes as a text."""


class Subject(Struct, frozen=True):
    """The object that a notice is on. `namespace` is empty of a cluster-wide one."""

    api_version: str
    kind: str
    namespace: str
    name: str


class Notice(Struct, frozen=True):
    """What is told. Two that are equal are the same thing, told again."""

    subject: Subject
    reason: str
    """One word in camel case, for programs and for those who search."""
    action: str
    """What was done, or tried: one word in camel case."""
    text: str
    warning: bool = True
    shared: bool = False
    """Whether every node of the cluster comes to the same: one of them writing it is enough."""


def on_node(name: str, reason: str, action: str, text: str, *, warning: bool = True) -> Notice:
    """Return a notice on a Node."""
    subject = Subject("v1", "Node", "", name)
    return Notice(subject, reason, action, shortened(text), warning=warning)


def on_service(
    namespace: str, name: str, reason: str, action: str, text: str, *, shared: bool = False
) -> Notice:
    """Return a warning on a Service."""
    subject = Subject("v1", "Service", namespace, name)
    return Notice(subject, reason, action, shortened(text), shared=shared)


def health_check_port_failed(namespace: str, name: str, node: str, port: int, why: str) -> Notice:
    """Return the warning that a Service's health-check node port could not be opened.

    Its reason is kube-proxy's (pkg/proxy/healthcheck/service_health.go).
    """
    return on_service(
        namespace,
        name,
        "FailedToStartServiceHealthcheck",
        "Listen",
        f"node {node} failed to start health check on node port {port}: {why}",
    )


def shortened(text: str) -> str:
    """Return a text on one line and no longer than the API takes."""
    line = " ".join(text.split())
    line = "".join(letter for letter in line if letter.isprintable())
    encoded = line.encode(errors="replace")
    if len(encoded) <= LONGEST_TEXT_BYTES:
        return line
    return encoded[: LONGEST_TEXT_BYTES - 3].decode(errors="ignore") + "…"
