"""From the figures of all rounds to medians, spreads, ratios and tables. Pure.

Lives here: what a run is told as, and how a number is written. Must not: measure.
"""

import statistics
from collections.abc import Sequence

from msgspec import Struct

from vipd.bench.datapath_plan import (
    FIGURES,
    FORWARDERS,
    HAPROXY,
    TARGETS,
    USERSPACE,
    Figure,
    Measure,
    Plan,
)


class Turn(Struct, frozen=True, kw_only=True):
    """What one variant did in one round."""

    round: int
    variant: str
    figures: dict[str, float] = {}
    """By name of the figure. None is there where it does not apply or could not be had."""
    failures: tuple[str, ...] = ()
    """Measures that failed, and answers that did not come, in words."""
    processes: tuple["Memory", ...] = ()
    """The proxy's processes with the idle connections open."""


class Memory(Struct, frozen=True):
    """One process of the proxy: bytes that are resident, and its share of them (proportional).

    `forwards`: bytes of clients pass through it; not so with the daemon.
    """

    name: str
    forwards: bool
    rss: int
    pss: int


class Spread(Struct, frozen=True):
    """The median of all rounds, and the least and the most of them."""

    median: float
    least: float
    most: float


class Result(Struct, frozen=True, kw_only=True):
    """A whole run, with every turn."""

    plan: Plan
    tools: dict[str, str]
    """Versions of the tools that were used."""
    busy_cores: float
    """Of the machine before the run, with what has nothing to do with it: it should be near 0."""
    unavailable: dict[str, str]
    """Variants that were wanted, and why they are not in the table."""
    turns: tuple[Turn, ...]
    figures: dict[str, dict[str, Spread]]
    """By variant and figure."""
    ratios: dict[str, Spread]
    """Userspace to HAProxy, by figure, where both were measured."""

    @property
    def failures(self) -> tuple[str, ...]:
        """Everything that failed, with where it did."""
        return tuple(
            f"round {turn.round} {turn.variant}: {one}"
            for turn in self.turns
            for one in turn.failures
        )


def spread(values: Sequence[float]) -> Spread:
    """Return median, least and most; raise ValueError where there is none."""
    return Spread(statistics.median(values), min(values), max(values))


def spreads(turns: Sequence[Turn]) -> dict[str, dict[str, Spread]]:
    """Return the spread of every figure that was had, by variant and figure."""
    found: dict[str, dict[str, list[float]]] = {}
    for turn in turns:
        of_variant = found.setdefault(turn.variant, {})
        for name, value in turn.figures.items():
            of_variant.setdefault(name, []).append(value)
    return {
        variant: {name: spread(values) for name, values in figures.items()}
        for variant, figures in found.items()
    }


def ratios(turns: Sequence[Turn], of: str = USERSPACE, to: str = HAPROXY) -> dict[str, Spread]:
    """Return the ratio of two variants for each figure, formed in each round and then summed up.

    Within a round both met the same machine; a round without one of them does not count.
    """
    by_round: dict[tuple[int, str], dict[str, float]] = {
        (turn.round, turn.variant): turn.figures for turn in turns
    }
    found: dict[str, list[float]] = {}
    for (number, variant), figures in by_round.items():
        if variant != of:
            continue
        others = by_round.get((number, to), {})
        for name, value in figures.items():
            if other := others.get(name):
                found.setdefault(name, []).append(value / other)
    return {name: spread(values) for name, values in found.items()}


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value that so large a share (0 to 1) of the ordered values does not exceed."""
    if not ordered:
        raise ValueError("a quantile of nothing")
    place = max(0, -int(-share * len(ordered) // 1) - 1)
    return ordered[min(place, len(ordered) - 1)]


# The tables


def written(figure: Figure, value: Spread) -> str:
    """Return a spread as `1234 (1200–1300)`."""

    def number(one: float) -> str:
        return f"{one:.{figure.digits}f}"

    return f"{number(value.median)} ({number(value.least)}–{number(value.most)})"


def table(result: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and rows: a figure each row, a variant each column."""
    variants = [one for one in result.plan.variants if one in result.figures]
    rows = [
        (
            f"{figure.title}, {figure.unit}",
            *(_cell(figure, variant, result.figures[variant]) for variant in variants),
        )
        for figure in figures_of(result.plan.measures)
    ]
    return ("MEDIAN (MIN–MAX)", *variants), rows


def ratio_table(result: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and rows of userspace to HAProxy; no rows where one of them is not there."""
    rows: list[tuple[str, ...]] = []
    for figure in figures_of(result.plan.measures):
        if (ratio := result.ratios.get(figure.name)) is None:
            continue
        target = TARGETS.get(figure.name)
        told = f"{ratio.median:.2f} ({ratio.least:.2f}–{ratio.most:.2f})"
        wanted = (
            ("", "", "")
            if target is None
            else (
                target.spelled(target.must),
                target.spelled(target.aim),
                target.verdict(ratio.median),
            )
        )
        rows.append((figure.title, told, *wanted))
    return (f"{USERSPACE}/{HAPROXY}", "RATIO (MIN–MAX)", "MUST", "AIM", "REACHED"), rows


def figures_of(measures: Sequence[str]) -> tuple[Figure, ...]:
    """Return the figures that come of some measures, in the order of the table."""
    return tuple(one for one in FIGURES if one.measure in measures)


def expected(measures: Sequence[str], variant: str) -> tuple[str, ...]:
    """Return the names of the figures that a turn of a variant has if nothing fails."""
    return tuple(
        one.name
        for one in figures_of(measures)
        if (variant in FORWARDERS or not one.of_forwarders)
        and not (variant == HAPROXY and one.measure is Measure.UDP)
        and not (variant == "direct" and one.measure is Measure.MEMORY)
    )


def _cell(figure: Figure, variant: str, figures: dict[str, Spread]) -> str:
    value = figures.get(figure.name)
    if value is not None:
        return written(figure, value)
    return "failed" if figure.name in expected((figure.measure,), variant) else "–"
