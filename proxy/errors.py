"""Every error that vipd raises on purpose. Any other exception is a bug and ends the daemon.

Lives here: the classes and what the catcher may do about each. Must not: know anything else of
vipd. An original exception is always chained.
"""

from enum import Enum


class VipdError(Exception):
    """Ancestor of them all; never raised itself."""


class ConfigError(VipdError):
    """A setting is wrong. `where` names file and field or the flag, `why` what is allowed."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why


class ManifestError(VipdError):
    """An object is malformed and is skipped, or its last good form is kept.

    `origin` is the file and document, or the watch; `thing` is kind and name as far as they are
    known; `field` is a path such as ``spec.ports[0].port``, empty where the whole object is meant.
    """

    def __init__(self, origin: str, thing: str, field: str, why: str) -> None:
        super().__init__(": ".join(part for part in (origin, thing, field, why) if part))
        self.origin = origin
        self.thing = thing
        self.field = field
        self.why = why


class SourceError(VipdError):
    """A source cannot be read at all (no such file, no permission, no connection)."""


class InUseError(VipdError):
    """Another vipd already serves this network namespace or listens on this socket."""


class ControlError(VipdError):
    """The daemon's control socket cannot be reached, or refused what was asked."""


class QuestionError(VipdError):
    """What was asked about is not known here, or means more than one thing."""


class Retry(Enum):
    """What a driver's error asks of its caller."""

    AFTER_BACKOFF = "after backoff"
    """The kernel or a lock was busy; the same plan may work later."""
    AFTER_OBSERVE = "after observe"
    """It is not known what the kernel has now; observe, plan again, commit."""
    NEVER = "never"
    """The kernel rejects this plan as it is; keep serving what was there and report."""


class DataplaneError(VipdError):
    """A dataplane did not do what it was asked; raised only as one of its children."""

    retry = Retry.AFTER_OBSERVE


class Unsupported(DataplaneError):
    """This host lacks something. `capability` is what, `remedy` brings it (package or module)."""

    retry = Retry.NEVER

    def __init__(self, capability: str, remedy: str) -> None:
        super().__init__(f"{capability}: {remedy}" if remedy else capability)
        self.capability = capability
        self.remedy = remedy


class Busy(DataplaneError):
    """A lock or buffer was not free (EBUSY, ENOBUFS, xtables lock)."""

    retry = Retry.AFTER_BACKOFF


class UnknownResult(DataplaneError):
    """The tool died or was cut off: the plan may be in the kernel or not."""

    retry = Retry.AFTER_OBSERVE


class Rejected(DataplaneError):
    """The kernel or its tool refused an operation. `operation` is its text, shortened; empty where
    it was not even tried, and `stderr` is all there is to say."""

    retry = Retry.NEVER

    def __init__(self, operation: str, stderr: str) -> None:
        super().__init__(f"{operation}: {stderr}" if operation else stderr)
        self.operation = operation
        self.stderr = stderr


class OutOfStep(DataplaneError):
    """The kernel does not have what the plan assumed: someone else changed our objects."""

    retry = Retry.AFTER_OBSERVE
