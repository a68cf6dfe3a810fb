"""How a question comes to its answer, asked of a server that runs.

Lives here: what is known now, put together for the tracing (dns/tracing.py). It is imported when
somebody asks: what it needs of names of others is only the workers' otherwise.
"""

from collections.abc import Sequence

from msgspec import DecodeError, json

from vipd.dns.asked_name import Known
from vipd.dns.forward.configured import Files, configure
from vipd.dns.forward.upkeep import read_files
from vipd.dns.settings import Listen
from vipd.dns.tracing import Asked, Course, course
from vipd.proxy.errors import ControlError


def answered(argument: str, known: Known, listens: Sequence[Listen]) -> Course:
    """Return the course of a question as the control socket brings it. Raise ControlError."""
    try:
        return traced(json.decode(argument, type=Asked), known, listens)
    except (DecodeError, ValueError) as error:
        raise ControlError(f"the question is not understood: {error}") from error


def traced(asked: Asked, known: Known, listens: Sequence[Listen] = ()) -> Course:
    """Read what files say of names of others, and trace."""
    forward = known.settings.forward
    own = [(str(one.address), one.port) for one in listens]
    made = configure(forward, read_files(forward, Files(), _unsaid), own, _unsaid)
    return course(asked, known._replace(configured=made))


def _unsaid(event: str, **facts: object) -> None:
    """Tell nobody: the worker has."""
