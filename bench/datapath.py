"""`vipd bench datapath`: what each dataplane moves, beside a direct way and HAProxy.

Lives here: rounds of turns, each in a lab of its own. Must not: know how a measure is taken
(datapath_measures.py) or a variant started (datapath_variants.py), or format (cli/bench.py).
"""

import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

from vipd.bench import datapath_tools
from vipd.bench.datapath_measures import Probe, busy_cores
from vipd.bench.datapath_plan import CLIENT, HAPROXY, NODE, SERVER, Plan, descriptors, order
from vipd.bench.datapath_printed import Unreadable
from vipd.bench.datapath_report import Result, Turn, ratios, spreads
from vipd.bench.datapath_servers import Servers
from vipd.bench.datapath_variants import serving, unavailable
from vipd.bench.lab import Lab, running
from vipd.bench.lab_errors import LabError

_MANY_CONNECTIONS = (
    ("ipv4/ip_local_port_range", "10000 65000"),
    # A client that closes first has its ports again after a second instead of a minute.
    ("ipv4/tcp_tw_reuse", "1"),
)
"""Set on every host, so that source ports do not run out before a measure ends."""
_SHORT_MEMORY = (("netfilter/nf_conntrack_tcp_timeout_time_wait", "10"),)
"""Seconds, on the node, so that closed connections do not fill the table."""

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done (0 to 1)."""


def measure(plan: Plan, progress: Progress) -> Result:
    """Run all rounds. Raise LabError where a tool is missing or no variant can be measured.

    A measure that fails is told in its turn and leaves its figure out; the others go on.
    """
    datapath_tools.require(plan.measures)
    progress("looking what works here", 0.0)
    missing = unavailable(plan.variants)
    variants = [one for one in plan.variants if one not in missing]
    if not variants:
        told = "; ".join(f"{one}: {why}" for one, why in missing.items())
        raise LabError(f"nothing to measure ({told})")
    if HAPROXY in variants:
        _allow(descriptors(plan))
    busy = busy_cores()
    turns: list[Turn] = []
    steps = plan.rounds * len(variants)
    for number in range(plan.rounds):
        for variant in order(variants, number):

            def within(stage: str, share: float, title: str = f"{number + 1} {variant}") -> None:
                progress(f"round {title} {stage}", (len(turns) + share) / steps)

            turns.append(_turn(variant, number + 1, plan, within))
    tools = {*datapath_tools.needed(plan.measures)} | ({HAPROXY} & {*variants})
    return Result(
        plan=plan,
        tools={one: datapath_tools.version(one) for one in sorted(tools)},
        busy_cores=round(busy, 2),
        unavailable=missing,
        turns=tuple(turns),
        figures=spreads(turns),
        ratios=ratios(turns),
    )


def _turn(variant: str, number: int, plan: Plan, progress: Progress) -> Turn:
    """Start a variant afresh and take every measure of it."""
    with (
        running(f"vb{os.getpid()}") as lab,
        tempfile.TemporaryDirectory(prefix="vipd-bench-") as name,
    ):
        folder = Path(name)
        _prepare(lab)
        progress("starting", 0.0)
        with Servers(lab, folder, plan.measures, plan.workers, plan.idle):
            try:
                with serving(lab, variant, plan, folder) as proxy:
                    probe = Probe(lab, proxy, plan, folder)
                    for place, one in enumerate(plan.measures):
                        progress(one, place / len(plan.measures))
                        try:
                            probe.take(one)
                        except (LabError, Unreadable) as error:
                            probe.failures.append(f"{one}: {error}")
            except LabError as error:
                return Turn(round=number, variant=variant, failures=(str(error),))
    return Turn(
        round=number,
        variant=variant,
        figures=probe.figures,
        failures=tuple(probe.failures),
        processes=probe.processes,
    )


def _allow(files: int) -> None:
    """Let processes that are started from here raise their limit so far; raise LabError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard >= files:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, files))
    except (OSError, ValueError):
        raise LabError(
            f"HAProxy needs {files} open files and may have {hard} here:"
            " less --idle or --services, or more by `ulimit -Hn`"
        ) from None


def _prepare(lab: Lab) -> None:
    for host in (CLIENT, NODE, SERVER):
        lab.run(host, lambda: _write(_MANY_CONNECTIONS))
    lab.run(NODE, lambda: _write(_SHORT_MEMORY))


def _write(settings: tuple[tuple[str, str], ...]) -> None:
    for name, value in settings:
        Path("/proc/sys/net", name).write_text(value)
