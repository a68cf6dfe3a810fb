"""A time as people and kube-proxy's configuration write it: ``90s``, ``15m0s``, ``1h30m``.

Lives here: reading one. Pure. Must not: know what the time is for.
Source: metav1.Duration of the Kubernetes API, which is Go's time.ParseDuration.
"""

import re

_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)?")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Return seconds; raise ValueError where `text` is no time.

    A number without a unit is seconds (Go allows that for 0 only).
    """
    found = list(_PART.finditer(text))
    if not found or "".join(one.group() for one in found) != text:
        raise ValueError(f"{text!r} is no time such as 90s, 5m or 1h30m")
    if len(found) > 1 and not all(one[2] for one in found):
        raise ValueError(f"{text!r} has a number without a unit")
    return sum(float(one[1]) * _SECONDS[one[2] or "s"] for one in found)


def whole_seconds(text: str) -> int:
    """Return seconds; raise ValueError where `text` is no time, or not whole seconds."""
    seconds = parse_duration(text)
    if seconds != int(seconds):
        raise ValueError(f"{text!r} is not whole seconds")
    return int(seconds)


def as_duration(seconds: int) -> str:
    """Return whole seconds as metav1.Duration is written, such as ``1h0m0s``."""
    minutes, left = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{left}s"
