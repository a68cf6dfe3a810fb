"""What a run of `vipd bench dns` is told as: tables of figures, ratios and targets. Pure.

Lives here: the result, and its rows. Must not: measure.
"""

from msgspec import Struct

from vipd.bench.datapath_report import Spread, Turn, ratios, spreads, written
from vipd.bench.dns_plan import (
    RATIO_TARGETS,
    TARGETS,
    UNBOUND,
    VIPD,
    Plan,
    expected,
    figures_of,
)

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Headings and rows."""


class Result(Struct, frozen=True, kw_only=True):
    """A whole run, with every turn."""

    plan: Plan
    tools: dict[str, str]
    """Versions of the programs of others."""
    busy_cores: float
    """Of the machine before the run, with what has nothing to do with it: it should be near 0."""
    unavailable: dict[str, str]
    """Variants that were wanted, and why they are not in the table."""
    turns: tuple[Turn, ...]
    figures: dict[str, dict[str, Spread]]
    """By variant and figure."""
    ratios: dict[str, dict[str, Spread]]
    """vipd to each other variant, by variant and figure, formed within rounds."""

    @property
    def failures(self) -> tuple[str, ...]:
        """Everything that failed, with where it did."""
        return tuple(
            f"round {turn.round} {turn.variant}: {one}"
            for turn in self.turns
            for one in turn.failures
        )


def result(
    plan: Plan, tools: dict[str, str], busy: float, missing: dict[str, str], turns: list[Turn]
) -> Result:
    """Return a run, summed up."""
    others = [one for one in plan.variants if one not in (VIPD, *missing)]
    return Result(
        plan=plan,
        tools=tools,
        busy_cores=round(busy, 2),
        unavailable=missing,
        turns=tuple(turns),
        figures=spreads(turns),
        ratios={one: ratios(turns, VIPD, one) for one in others},
    )


def table(of: Result) -> Table:
    """Return a figure each row, a variant each column."""
    variants = [one for one in of.plan.variants if one in of.figures]
    rows = []
    for figure in figures_of(of.plan.measures):
        cells = []
        for variant in variants:
            value = of.figures[variant].get(figure.name)
            absent = "failed" if expected(figure.measure, variant) else "–"
            cells.append(absent if value is None else written(figure, value))
        rows.append((f"{figure.title}, {figure.unit}", *cells))
    return ("MEDIAN (MIN–MAX)", *variants), rows


def ratio_table(of: Result) -> Table:
    """Return vipd to each of the others; no rows where nobody is there to be compared with."""
    others = [one for one, found in of.ratios.items() if found]
    rows = []
    for figure in figures_of(of.plan.measures):
        found = [of.ratios[one].get(figure.name) for one in others]
        if any(found):
            rows.append((figure.title, *(_ratio(one) for one in found)))
    return ("RATIO OF VIPD TO", *others), rows


def target_table(of: Result) -> Table:
    """Return what vipd reached of what it must and is meant to."""
    rows: list[tuple[str, ...]] = []
    for figure in figures_of(of.plan.measures):
        wanted = (
            (TARGETS.get(figure.name), of.figures.get(VIPD, {}), f"{figure.title}, {figure.unit}"),
            (
                RATIO_TARGETS.get(figure.name),
                of.ratios.get(UNBOUND, {}),
                f"{figure.title}, to {UNBOUND}",
            ),
        )
        for target, figures, title in wanted:
            value = figures.get(figure.name)
            if target is None or value is None:
                continue
            bounds = target.spelled(target.must), target.spelled(target.aim)
            rows.append((title, f"{value.median:.2f}", *bounds, target.verdict(value.median)))
    return ("VIPD", "MEDIAN", "MUST", "AIM", "REACHED"), rows


def _ratio(value: Spread | None) -> str:
    if value is None:
        return "–"
    return f"{value.median:.2f} ({value.least:.2f}–{value.most:.2f})"
