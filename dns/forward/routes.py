"""Who knows a name: the upstreams of its domain, or nobody but this program.

Lives here: domains and what is done with names in them. Pure. Must not: ask.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from vipd.dns import names
from vipd.dns.forward import special, wire
from vipd.dns.forward.got import Got
from vipd.dns.forward.group import Group
from vipd.dns.forward.settings import ForwardSettings
from vipd.dns.forward.special import Special
from vipd.dns.forward.standing import Standing
from vipd.dns.forward.upstream import Upstream, parse_upstream

ROOT = b"\0"
Plan = dict[bytes, tuple[Upstream, ...] | Special]


class Route(NamedTuple):
    """What is done with a name."""

    domain: bytes
    group: Group | None
    """Whom to ask; None: the domain is special."""
    special: Special
    is_default: bool
    """Whether no stub domain has it."""


def plan(settings: ForwardSettings, default: Iterable[Upstream]) -> Plan:
    """Return what is done with each domain; `default` are the upstreams of all others.

    A stub domain goes before a special one of the same name.
    """
    made: Plan = {ROOT: tuple(dict.fromkeys(default))}
    reverse = settings.forward_private_reverse
    made |= special.special_domains(forward_private_reverse=reverse)
    for domain, upstreams in settings.stub_domains.items():
        found = tuple(dict.fromkeys(parse_upstream(one) for one in upstreams))
        made[names.wire(domain)] = found or Special.NOTHING
    return made


def changed(before: Plan, after: Plan) -> frozenset[bytes]:
    """Return the domains, without the root, for which something else is done now."""
    either = (before.keys() | after.keys()) - {ROOT}
    return frozenset(one for one in either if before.get(one) != after.get(one))


class Routes:
    """All domains. Built at once, never changed."""

    def __init__(
        self, made: Plan, settings: ForwardSettings, standing: Callable[[Upstream], Standing]
    ) -> None:
        self._settings = settings
        self._routes = {
            domain: Route(domain, None, found, is_default=False)
            if isinstance(found, Special)
            else Route(
                domain,
                Group(
                    [standing(one) for one in found],
                    settings.policy,
                    refuses_private=settings.refuse_private and domain == ROOT,
                ),
                Special.NOTHING,
                is_default=domain == ROOT,
            )
            for domain, found in made.items()
        }

    def find(self, name: bytes, qtype: int) -> Group | Got:
        """Return whom to ask, or the reply where nobody has to be asked."""
        route = next(filter(None, map(self._routes.get, wire.suffixes(name))))
        if route.group is None:
            return special.answer(name, qtype, route.domain, route.special)
        kept = route.is_default and not self._settings.forward_single_labels
        if kept and special.is_address_of_single_label(name, qtype):
            return special.answer(name, qtype, ROOT, Special.NOTHING)
        return route.group

    def groups(self) -> list[tuple[bytes, Group]]:
        """Return the domains that have upstreams, with them."""
        return [(one.domain, one.group) for one in self._routes.values() if one.group is not None]
