"""What a notice is to the API server: an Event of events.k8s.io/v1, or of core v1 on an old one.

Lives here: names, paths and JSON. Pure. Must not: send anything.
Source: api/events/v1/types.go and api/core/v1/types.go, v1.36; validation in
pkg/apis/core/validation/events.go: all but the series is immutable, an object without a namespace
has its events in ``default``.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import blake2b

import msgspec

from vipd.proxy.notice import Notice

EVENTS, CORE = "events.k8s.io/v1", "v1"
CONTROLLER = "vipd"
SHARED_SECONDS = 3600.0
"""A shared notice is one event in each stretch of this length: the first node writes it, the others
find it there."""
_LONGEST_INSTANCE, _LONGEST_NAME = 128, 200


def namespace(notice: Notice) -> str:
    """Return the namespace of the event."""
    return notice.subject.namespace or "default"


def path(version: str, notice: Notice) -> str:
    """Return where an event is created."""
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return f"{root}/namespaces/{namespace(notice)}/events"


def name(notice: Notice, instance: str, uid: str, now: float) -> str:
    """Return the event's name. All nodes come to the same for a shared notice.

    `instance` is who writes, `now` in seconds since the epoch.
    """
    who = f"{now // SHARED_SECONDS:.0f}" if notice.shared else f"{instance} {now:.6f}"
    parts = (uid, notice.reason, notice.action, notice.text, who)
    digest = blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
    return f"{notice.subject.name[:_LONGEST_NAME].rstrip('.-')}.{digest}"


def created(version: str, notice: Notice, name: str, node: str, uid: str, now: float) -> bytes:
    """Return the new event. `uid` is that of the object it is on, empty where it has none."""
    subject = notice.subject
    on = {
        "apiVersion": subject.api_version,
        "kind": subject.kind,
        "name": subject.name,
        **({"namespace": subject.namespace} if subject.namespace else {}),
        **({"uid": uid} if uid else {}),
    }
    event: dict[str, object] = {
        "apiVersion": version,
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace(notice)},
        "eventTime": _micro(now),
        "reportingInstance": instance(node),
        "action": notice.action,
        "reason": notice.reason,
        "type": "Warning" if notice.warning else "Normal",
    }
    if version == EVENTS:
        event |= {"reportingController": CONTROLLER, "regarding": on, "note": notice.text}
    else:
        event |= {
            "reportingComponent": CONTROLLER,
            "source": {"component": CONTROLLER, "host": node},
            "involvedObject": on,
            "message": notice.text,
            "firstTimestamp": _seconds(now),
            "lastTimestamp": _seconds(now),
            "count": 1,
        }
    return msgspec.json.encode(event)


def again(version: str, count: int, now: float) -> bytes:
    """Return the merge patch of an event that was told again."""
    if version == EVENTS:
        change: Mapping[str, object] = {"series": {"count": count, "lastObservedTime": _micro(now)}}
    else:
        change = {"count": count, "lastTimestamp": _seconds(now)}
    return msgspec.json.encode(change)


def instance(node: str) -> str:
    """Return who writes, of all that are called vipd."""
    return f"{CONTROLLER}-{node}"[:_LONGEST_INSTANCE] if node else CONTROLLER


def _micro(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _seconds(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
