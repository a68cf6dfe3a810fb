"""Which dataplane serves and which ones drain: the decisions of a live switch, without effects.

Lives here: the state, the events that move it and the actions that follow. Must not: touch a
dataplane, a file or a clock (switching.py does, and does exactly the actions it is given).

A switch probes the new dataplane, brings it up beside the old one, verifies it by observing, and
then lets the old one drain: that is, take nothing new, and keep what established flows need until
they have ended or the deadline is reached. Until it is verified the old dataplane serves alone in
name, so everything before that is undone by removing the new one. docs/switching.md draws it.
"""

from collections.abc import Collection, Sequence
from enum import StrEnum

from msgspec import Struct, structs

LONGEST_DRAIN_SECONDS = 86400
ON_THE_ADDRESS = frozenset({"ipvs", "userspace"})
"""Modes that answer on the service address itself: IPVS takes a packet before any listener sees it,
so neither can take over while the other still has flows."""
BETWEEN = ("nftables", "iptables")
"""Modes that serve while one of those drains for the other: they translate before both."""
MOST_LINES, LONGEST_LINE = 20, 300
"""Of what went wrong; it is told to people, and kept in the status."""


class Step(StrEnum):
    """What a switch that is under way is doing."""

    PROBE = "probe"
    OVERLAP = "overlap"
    VERIFY = "verify"


class Drain(Struct, frozen=True):
    """A dataplane that only carries old flows. Times are seconds since the boot."""

    mode: str
    deadline: float
    flows: int | None = None
    """Flows left when they were last counted; None: not counted yet, or not countable."""
    removing: bool = False
    """It is to be removed from the kernel now; it stands here until that is done."""


class Asked(Struct, frozen=True):
    """Somebody asks for a mode: an event, and what is remembered of it while it has to wait."""

    mode: str
    drain_seconds: float
    force: bool = False


class State(Struct, frozen=True):
    """Who serves, who is to serve next, and who drains; each mode stands at most once."""

    serving: str
    target: str | None = None
    step: Step | None = None
    drain_seconds: float = 0.0
    """What the old dataplane of the switch under way will be given."""
    force: bool = False
    resumed: Drain | None = None
    """The drain that the switch under way has interrupted: its target was draining."""
    drains: tuple[Drain, ...] = ()
    then: Asked | None = None
    """What follows as soon as nothing drains that it clashes with."""


# Events


class Probed(Struct, frozen=True):
    """The target was probed: what the host lacks, and what cannot be served, as sentences."""

    missing: Sequence[str] = ()
    unserved: Sequence[str] = ()


class Committed(Struct, frozen=True):
    """Everything is programmed in the target; `rejected` is what the kernel refused there only."""

    rejected: Sequence[str] = ()


class Verified(Struct, frozen=True):
    """The target was observed; `differences` is empty where it is as it should be."""

    differences: str
    now: float


class Broken(Struct, frozen=True):
    """The target cannot be brought up or observed."""

    why: str


class Counted(Struct, frozen=True):
    """The flows of a draining dataplane were counted; None: they could not be."""

    mode: str
    flows: int | None
    now: float


class Removed(Struct, frozen=True):
    """Nothing of a draining dataplane is left in the kernel."""

    mode: str


class Shortened(Struct, frozen=True):
    """What drains has until then, and no longer."""

    deadline: float


Event = Asked | Probed | Committed | Verified | Broken | Counted | Removed | Shortened


# Actions


class Probe(Struct, frozen=True):
    """Find out whether the mode works here and can serve everything."""

    mode: str


class BringUp(Struct, frozen=True):
    """Program everything in the mode, beside what is there."""

    mode: str


class Verify(Struct, frozen=True):
    """Observe the mode and compare."""

    mode: str


class Retire(Struct, frozen=True):
    """Stop keeping the mode in step, let it take nothing new, watch its flows end, remove it."""

    mode: str


class Say(Struct, frozen=True):
    """The switch has ended; `failure` is why it did not succeed, empty when it did."""

    failure: str = ""


Action = Probe | BringUp | Verify | Retire | Say


def decide(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """Return the state after an event, and what is to be done, in order.

    Every state that this returns is safe to crash in: see `restarted`.
    """
    match event:
        case Asked():
            return _asked(state, event)
        case Counted():
            return _counted(state, event), ()
        case Removed(mode):
            return structs.replace(state, drains=_without(state.drains, mode)), ()
        case Shortened(deadline):
            drains = tuple(
                structs.replace(one, deadline=min(one.deadline, deadline)) for one in state.drains
            )
            return structs.replace(state, drains=drains), ()
        case _ if state.target is None:
            return state, ()  # of a switch that has ended meanwhile
        case Probed() if state.step is Step.PROBE:
            return _probed(state, state.target, event)
        case Committed(rejected) if state.step is Step.OVERLAP:
            if rejected and not state.force:
                return _undone(state, state.target, _listed("the kernel refused", rejected))
            return structs.replace(state, step=Step.VERIFY), (Verify(state.target),)
        case Verified(differences, now) if state.step is Step.VERIFY:
            if differences:
                why = f"the kernel has not what was committed:\n{_shortened(differences)}"
                return _undone(state, state.target, why)
            return _succeeded(state, state.target, now)
        case Broken(why) if state.step is not Step.PROBE:
            return _undone(state, state.target, _shortened(why))
        case _:
            return state, ()


def _asked(state: State, event: Asked) -> tuple[State, tuple[Action, ...]]:
    if state.target is not None:
        return state, (Say(f"a switch to {state.target} is under way ({state.step})"),)
    if event.mode == state.serving:
        return structs.replace(state, then=None), (Say(),)
    if clashes(state, event.mode) and state.serving not in ON_THE_ADDRESS:
        return structs.replace(state, then=event), (Say(),)
    after = structs.replace(
        state,
        target=event.mode,
        then=None,
        step=Step.PROBE,
        drain_seconds=event.drain_seconds,
        force=event.force,
    )
    return after, (Probe(event.mode),)


def clashes(state: State, mode: str) -> bool:
    """Return whether a mode cannot take over yet, because of one that has flows."""
    there = {state.serving, *(one.mode for one in state.drains)} - {mode}
    return mode in ON_THE_ADDRESS and bool(there & ON_THE_ADDRESS)


def due(state: State) -> Asked | None:
    """Return what somebody asked for and may begin now."""
    if state.then is None or state.target is not None or clashes(state, state.then.mode):
        return None
    return state.then


def _probed(state: State, target: str, event: Probed) -> tuple[State, tuple[Action, ...]]:
    refusal = ""
    if event.missing and state.then is not None and target != BETWEEN[-1]:
        other = BETWEEN[BETWEEN.index(target) + 1]
        return structs.replace(state, target=other), (Probe(other),)
    if event.missing:
        refusal = _listed(f"mode {target} does not work here", event.missing)
    elif event.unserved and not state.force:
        refusal = _listed(f"mode {target} cannot serve", event.unserved) + " (--force to go on)"
    if refusal:
        return _at_rest(state), (Say(refusal),)
    if clashes(state, target):
        then = Asked(target, state.drain_seconds, state.force)
        return structs.replace(state, target=BETWEEN[0], then=then), (Probe(BETWEEN[0]),)
    resumed = next((one for one in state.drains if one.mode == target), None)
    after = structs.replace(
        state, step=Step.OVERLAP, resumed=resumed, drains=_without(state.drains, target)
    )
    return after, (BringUp(target),)


def _succeeded(state: State, target: str, now: float) -> tuple[State, tuple[Action, ...]]:
    old = Drain(state.serving, now + state.drain_seconds)
    after = State(serving=target, drains=(*state.drains, old), then=state.then)
    return after, (Retire(old.mode), Say())


def _undone(state: State, target: str, why: str) -> tuple[State, tuple[Action, ...]]:
    """Go back: what was draining before drains on, anything else of the target is removed."""
    drain = state.resumed or Drain(target, 0.0, removing=True)
    after = structs.replace(_at_rest(state), drains=(*state.drains, drain))
    return after, (Retire(target), Say(why))


def _counted(state: State, event: Counted) -> State:
    def after(drain: Drain) -> Drain:
        if drain.mode != event.mode or drain.removing:
            return drain
        flows = drain.flows if event.flows is None else event.flows
        return structs.replace(
            drain, flows=flows, removing=event.flows == 0 or event.now >= drain.deadline
        )

    return structs.replace(state, drains=tuple(map(after, state.drains)))


def _at_rest(state: State) -> State:
    return State(serving=state.serving, drains=state.drains)


def _without(drains: tuple[Drain, ...], mode: str) -> tuple[Drain, ...]:
    return tuple(one for one in drains if one.mode != mode)


def _listed(what: str, things: Sequence[str], most: int = 5) -> str:
    more = f"; and {len(things) - most} more" if len(things) > most else ""
    return f"{what}: {'; '.join(things[:most])}{more}"


def _shortened(text: str) -> str:
    lines = text.splitlines()
    more = f"\n… {len(lines)} lines in all" if len(lines) > MOST_LINES else ""
    return "\n".join(line[:LONGEST_LINE] for line in lines[:MOST_LINES]) + more


# Restart


class Record(Struct, frozen=True):
    """What a daemon leaves for the next one. `configured` is the mode its configuration asked for.

    A mode that somebody switched to by hand lasts until the configuration asks for another one.
    `chosen` is what `configured` meant on this host, and `why`.
    """

    configured: str
    state: State
    chosen: str = ""
    why: str = ""


def restarted(record: Record | None, configured: str, chosen: str) -> State:
    """Return the state that a new daemon begins with.

    `chosen` is the mode that `configured` means on this host. A switch that was not verified is
    undone: its old dataplane serves, and what there is of the new one drains with the others.
    """
    then = None
    if record is None or record.configured != configured:
        serving, drains = chosen, record.state.drains if record else ()
        if record is not None and clashes(record.state, chosen):
            serving, then = BETWEEN[0], Asked(chosen, record.state.drain_seconds, force=True)
    else:
        then = record.state.then
        serving, drains = record.state.serving, record.state.drains
        if record.state.resumed is not None:
            drains = (*drains, record.state.resumed)
    return State(serving=serving, drains=_without(drains, serving), then=then)


def found(
    state: State, modes: Collection[str], drain_seconds: float, now: float
) -> tuple[State, tuple[Action, ...]]:
    """Return the state and actions after other modes were found in the kernel at a start.

    To be asked once the serving dataplane is complete: until then, the one found may be the only
    one that carries traffic. A deadline of before a boot means nothing; none is later than a day.
    """
    known = {one.mode for one in state.drains}
    new = [Drain(mode, now + drain_seconds) for mode in modes if mode not in known]
    kept = [
        structs.replace(one, deadline=min(one.deadline, now + LONGEST_DRAIN_SECONDS))
        for one in state.drains
        if one.mode in modes
    ]
    drains = (*kept, *new)
    after = structs.replace(state, drains=drains)
    return after, tuple(Retire(one.mode) for one in drains)
