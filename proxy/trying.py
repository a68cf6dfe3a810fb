"""What a switch to a mode would do, and what stands in its way. Nothing is changed here.

Lives here: asking a backend, and the sentences on what it says. Must not: know how a switch goes
(switching.py), or what is decided in one (switch.py).
"""

import asyncio

from vipd.backends.registry import MODES, Backend
from vipd.proxy.errors import ControlError, DataplaneError
from vipd.proxy.switch import Probed
from vipd.proxy.virtualserver import Table
from vipd.proxy.words import counted


def require_known(mode: str) -> None:
    """Raise ControlError where there is no such mode."""
    if mode not in MODES:
        raise ControlError(f"{mode!r} is no mode; there is: {', '.join(MODES)}")


async def probed(backend: Backend, table: Table) -> Probed:
    """Return what this host lacks for a backend, and what of the table it cannot serve."""
    try:
        found = await backend.driver.probe()
    except DataplaneError as error:
        return Probed(missing=(str(error),))
    missing = [
        f"no {one.name}: {one.remedy or one.detail}"
        for one in found.found
        if one.needed and not one.present
    ]
    lacking = ((one, backend.compiler.lacks(one, found)) for one in table.virtual_servers())
    unserved = [f"{one.owner} on {one.key}: {why}" for one, why in lacking if why]
    return Probed(missing, sorted(unserved))


async def tried(target: Backend, serving: Backend, table: Table) -> list[str]:
    """Return what a switch would do, as sentences."""
    compiler, now = target.compiler, serving.compiler.mode
    found = await probed(target, table)
    lines = [f"missing: {one}" for one in found.missing]
    lines += [f"cannot serve: {one}" for one in found.unserved]
    if compiler.mode == now:
        return [*lines, f"{now} serves already"]
    if found.missing:
        return lines
    observed = await target.driver.observe()

    def plan_size() -> int:
        wanted = compiler.compile(table.virtual_servers(), table.network)
        return int(compiler.plan(observed, wanted)[0].size)

    size = counted(await asyncio.to_thread(plan_size), "kernel object")
    lines += [f"would do otherwise: {one.name}: {one.what}" for one in compiler.differences]
    lines.append(f"would program {size} of {compiler.mode} beside the old ones")
    try:
        old = await serving.driver.flows()
        lines.append(f"would drain {counted(old.total, 'flow')} of {now}")
    except DataplaneError as error:
        lines.append(f"would drain {now}; its flows cannot be counted: {error}")
    return lines
