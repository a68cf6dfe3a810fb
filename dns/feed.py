"""From the snapshot to what the processes that answer are told: all of it, then what changes.

Lives here: which services, pods and namespaces a change concerns, and what is still to be told to
one process. Pure. Must not: send (server/workers.py).

What is to be told is kept as names only, and looked up in the newest snapshot when it is told: a
process that is slow gets the last state of each, and what waits for it is bounded by what there is.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from msgspec import Struct

from vipd.dns.facts import PodFacts, ServiceFacts, facts_of, facts_of_pod
from vipd.proxy.events import Applied, Deleted, Event, Kind, Synced
from vipd.proxy.model import Namespace, Pod
from vipd.proxy.names import Address, NamespacedName
from vipd.proxy.snapshot import Snapshot, Touched

T = TypeVar("T")
MOST_AT_ONCE = 500
"""Services, pods or sources in one portion: a process reads them in about 2 ms each, in which it
answers nobody."""


class Portion(Struct, array_like=True, frozen=True):
    """Changes to the zone. What is None is not told."""

    put: tuple[ServiceFacts, ...] = ()
    drop: tuple[NamespacedName, ...] = ()
    put_pods: tuple[PodFacts, ...] = ()
    drop_pods: tuple[NamespacedName, ...] = ()
    namespaces: frozenset[str] | None = None
    admit: tuple[str, ...] = ()
    """Sources that may ask: CIDRs of the cluster's nodes and pods, and this node's own addresses.
    They may have been told before."""
    expel: tuple[str, ...] = ()
    """Sources that may not any more, or never might."""


class Kept:
    """All that DNS answers from: the newest snapshot, and what the snapshot has not."""

    def __init__(self, *, pods: bool) -> None:
        self.snapshot = Snapshot()
        self.pods: dict[NamespacedName, PodFacts] | None = {} if pods else None
        """None where no name depends on them."""
        self.namespaces: set[str] = set()
        self.own: tuple[Address, ...] = ()
        """This node's addresses."""
        self.sources: dict[str, int] = {}
        """Who may ask, as far as the cluster says: this node, all nodes and their pods. With each,
        how many say so."""
        self.serial = 0
        """When names were changed last, in seconds since 1970: all processes tell the same."""
        self.synced = False
        """Whether the source has told everything that existed at its start."""

    def stamp(self, changed: "Changed", now: float) -> None:
        """Note when names were changed; it never goes back."""
        if changed.services or changed.pods or changed.namespaces:
            self.serial = max(self.serial, int(now))

    def take_own(self, addresses: tuple[Address, ...]) -> "Changed":
        """Take this node's addresses."""
        before, self.own = self.own, addresses
        return Changed(sources=self._take_sources(map(str, before), map(str, addresses)))

    def take(
        self, events: Iterable[Event], before: Snapshot, after: Snapshot, touched: Touched
    ) -> "Changed":
        """Take events that were folded. Return what of it can be seen in names."""
        self.snapshot = after
        services = [one for one in touched.services if _facts(before, one) != _facts(after, one)]
        pods: list[NamespacedName] = []
        had = len(self.namespaces)
        gone = False
        for event in events:
            match event:
                case Applied(Pod() as pod) if self.pods is not None:
                    pods += self._take_pod(pod.name, facts_of_pod(pod))
                case Deleted(Kind.POD, name) if self.pods is not None:
                    pods += self._take_pod(name, None)
                case Applied(Namespace(name)):
                    self.namespaces.add(name)
                case Deleted(Kind.NAMESPACE, name):
                    gone |= name.name in self.namespaces
                    self.namespaces.discard(name.name)
                case Synced():
                    self.synced = True
                case _:
                    pass
        return Changed(
            services,
            pods,
            namespaces=gone or had != len(self.namespaces),
            sources=self._take_sources(
                _sources(before, touched.nodes), _sources(after, touched.nodes)
            ),
        )

    def _take_sources(self, before: Iterable[str], after: Iterable[str]) -> list[str]:
        """Count sources that were said and those that are; return those that come or go."""
        changed: dict[str, int] = {}
        for step, texts in ((-1, before), (1, after)):
            for text in texts:
                changed[text] = changed.get(text, 0) + step
        found = []
        for text, step in changed.items():
            had = self.sources.pop(text, 0)
            if had + step:
                self.sources[text] = had + step
            if bool(had) != bool(had + step):
                found.append(text)
        return found

    def _take_pod(self, name: NamespacedName, facts: PodFacts | None) -> Sequence[NamespacedName]:
        if self.pods is None or self.pods.get(name) == facts:
            return ()
        if facts is None:
            del self.pods[name]
        else:
            self.pods[name] = facts
        return (name,)

    def everything(self) -> "Changed":
        """Return the names of all there is."""
        return Changed(
            list(self.snapshot.services), list(self.pods or ()), list(self.sources), namespaces=True
        )


class Changed(Struct, frozen=True):
    """Names of what is another than it was."""

    services: Sequence[NamespacedName] = ()
    pods: Sequence[NamespacedName] = ()
    sources: Sequence[str] = ()
    namespaces: bool = False

    def __bool__(self) -> bool:
        return bool(self.services or self.pods or self.sources or self.namespaces)


class Untold:
    """What one process has not been told yet."""

    def __init__(self) -> None:
        self._services: dict[NamespacedName, None] = {}
        self._pods: dict[NamespacedName, None] = {}
        self._sources: dict[str, None] = {}
        self._namespaces = False

    def __bool__(self) -> bool:
        return bool(self._services or self._pods or self._sources or self._namespaces)

    def note(self, changed: Changed) -> None:
        """Note that it has to be told."""
        self._services |= dict.fromkeys(changed.services)
        self._pods |= dict.fromkeys(changed.pods)
        self._sources |= dict.fromkeys(changed.sources)
        self._namespaces |= changed.namespaces

    def portion(self, kept: Kept) -> Portion:
        """Take the next portion of it, as it is now."""
        put, drop = [], []
        for name in _first(self._services):
            facts = _facts(kept.snapshot, name)
            if facts is None:
                drop.append(name)
            else:
                put.append(facts)
        put_pods, drop_pods = [], []
        for name in _first(self._pods):
            found = (kept.pods or {}).get(name)
            if found is None:
                drop_pods.append(name)
            else:
                put_pods.append(found)
        sources = _first(self._sources)
        made = Portion(
            tuple(put),
            tuple(drop),
            tuple(put_pods),
            tuple(drop_pods),
            frozenset(kept.namespaces) if self._namespaces else None,
            tuple([one for one in sources if one in kept.sources]),
            tuple([one for one in sources if one not in kept.sources]),
        )
        self._namespaces = False
        return made


def _sources(snapshot: Snapshot, nodes: Iterable[str]) -> Iterator[str]:
    """Return the sources that some nodes stand for."""
    for name in nodes:
        node = snapshot.nodes.get(name)
        if node is not None:
            yield from map(str, (*node.addresses, *node.pod_cidrs))


def _first(names: dict[T, None]) -> list[T]:
    """Take the first names, a portion of them."""
    found = [name for name, _ in zip(names, range(MOST_AT_ONCE), strict=False)]
    for name in found:
        del names[name]
    return found


def _facts(snapshot: Snapshot, name: NamespacedName) -> ServiceFacts | None:
    service = snapshot.services.get(name)
    return None if service is None else facts_of(service, snapshot.slices.get(name, ()))
