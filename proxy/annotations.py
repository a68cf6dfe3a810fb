"""The annotations under ``vipd/`` that a Service may carry.

Lives here: their names, their grammar, what may be in them. Must not: know any other field.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from msgspec import Struct

from vipd.proxy.decode_fields import FieldError, address, is_name, shown
from vipd.proxy.model import SCHEDULERS, Algorithm

PREFIX = "vipd/"
ALGORITHM = "vipd/algorithm"
WEIGHTS = "vipd/weights"
SCHEDULER = "vipd/ipvs-scheduler"
DRAIN_SECONDS = "vipd/drain-seconds"
PROXY_PROTOCOL = "vipd/proxy-protocol"
KEEP_FAILING = "vipd/keep-failing-endpoints"
MAX_WEIGHT = 100
"""An endpoint of weight w holds w slots, so a weight is also a size."""
MAX_DRAIN_SECONDS = 86400
_KNOWN: Mapping[str, None] = MappingProxyType(
    dict.fromkeys(
        (ALGORITHM, WEIGHTS, SCHEDULER, DRAIN_SECONDS, PROXY_PROTOCOL, KEEP_FAILING),
    )
)
_NUMBER = re.compile(r"[0-9]{1,5}\Z", re.ASCII)


class Asked(Struct, frozen=True, kw_only=True):
    """What the annotations of a Service ask for; the fields are those of `model.Service`."""

    algorithm: Algorithm = Algorithm.RANDOM
    weights: tuple[tuple[str, int], ...] = ()
    scheduler: str = ""
    drain_seconds: int | None = None
    proxy_protocol: bool = False
    keeps_failing: bool = False


NOTHING = Asked()


def asked(annotations: Mapping[str, str]) -> Asked:
    """Return what the annotations of a Service ask for; FieldError for a wrong or unknown one.

    A name under ``vipd/`` that is not known is an error: a typo must not be silent.
    """
    for name in annotations:
        if name.startswith(PREFIX) and name not in _KNOWN:
            raise FieldError(_field(name), f"is not known; there are {', '.join(_KNOWN)}")
    return Asked(
        algorithm=_algorithm(annotations.get(ALGORITHM)),
        weights=_weights(annotations.get(WEIGHTS)),
        scheduler=_scheduler(annotations.get(SCHEDULER)),
        drain_seconds=_drain_seconds(annotations.get(DRAIN_SECONDS)),
        proxy_protocol=_proxy_protocol(annotations.get(PROXY_PROTOCOL)),
        keeps_failing=_keeps_failing(annotations.get(KEEP_FAILING)),
    )


def _algorithm(text: str | None) -> Algorithm:
    if text is None:
        return Algorithm.RANDOM
    try:
        return Algorithm(text.strip())
    except ValueError as error:
        allowed = ", ".join(each.value for each in Algorithm)
        raise FieldError(_field(ALGORITHM), f"{shown(text)} is not one of {allowed}") from error


def _scheduler(text: str | None) -> str:
    if text is None:
        return ""
    if text.strip() not in SCHEDULERS:
        allowed = ", ".join(SCHEDULERS)
        raise FieldError(_field(SCHEDULER), f"{shown(text)} is not one of {allowed}")
    return text.strip()


def _drain_seconds(text: str | None) -> int | None:
    if text is None:
        return None
    number = text.strip()
    if not _NUMBER.match(number) or int(number) > MAX_DRAIN_SECONDS:
        why = f"{shown(text)} is not a number of seconds, 0-{MAX_DRAIN_SECONDS}"
        raise FieldError(_field(DRAIN_SECONDS), why)
    return int(number)


def _proxy_protocol(text: str | None) -> bool:
    if text is None:
        return False
    if text.strip() != "v2":
        raise FieldError(_field(PROXY_PROTOCOL), f"{shown(text)} is not v2")
    return True


def _keeps_failing(text: str | None) -> bool:
    if text is None:
        return False
    if text.strip() not in ("true", "false"):
        raise FieldError(_field(KEEP_FAILING), f"{shown(text)} is not one of true, false")
    return text.strip() == "true"


def _weights(text: str | None) -> tuple[tuple[str, int], ...]:
    """Return (endpoint address or pod name, weight) from ``10.0.0.1=3, pod-a=2``."""
    if text is None:
        return ()
    weights: dict[str, int] = {}
    for entry in text.split(","):
        who, equals, number = (part.strip() for part in entry.partition("="))
        if not equals or not who:
            raise FieldError(_field(WEIGHTS), f"{shown(entry.strip())} is not 'endpoint=weight'")
        if not _NUMBER.match(number) or not 1 <= int(number) <= MAX_WEIGHT:
            raise FieldError(
                _field(WEIGHTS),
                f"the weight of {shown(who)} is {shown(number)}, not 1-{MAX_WEIGHT}",
            )
        who = _endpoint(who)
        if who in weights:
            raise FieldError(_field(WEIGHTS), f"{shown(who)} stands there twice")
        weights[who] = int(number)
    return tuple(weights.items())


def _endpoint(who: str) -> str:
    """Return an address in its usual spelling, or a pod's name as it is."""
    try:
        return str(address(who))
    except ValueError as error:
        if ":" in who or not is_name(who) or not any(letter.isalpha() for letter in who):
            raise FieldError(
                _field(WEIGHTS), f"{shown(who)} is neither an endpoint address nor a pod name"
            ) from error
        return who


def _field(name: str) -> str:
    return f'metadata.annotations["{name}"]'
