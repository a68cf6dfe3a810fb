"""Who changed the kernel: a process id counts as ours while the run lasts, and little longer."""

import asyncio
from types import ModuleType

import pytest

from vipd.backends import tool_run, xtables
from vipd.backends.nftables import tool
from vipd.backends.nftables.tool import Nft
from vipd.backends.runs import KEPT_SECONDS, Runs
from vipd.backends.xtables import Variant, Xtables
from vipd.proxy.names import Family

OURS, OTHERS = 33, 34


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def run(runs: Runs, process: int) -> None:
    async with runs.starting() as started:
        started(process)


async def test_a_run_is_ours_while_it_lasts_and_a_moment_longer() -> None:
    clock = Clock()
    runs = Runs(clock)
    await run(runs, OURS)
    clock.now += 1000
    assert await runs.include(OURS, 0)
    assert not await runs.include(OTHERS, 0)
    runs.ended(OURS)
    clock.now += KEPT_SECONDS / 2
    assert await runs.include(OURS, 0)


async def test_another_that_gets_the_number_later_is_not_ours() -> None:
    """In a PID namespace of its own, another program soon has every small number."""
    clock = Clock()
    runs = Runs(clock)
    for number in range(300):
        await run(runs, number)
        runs.ended(number)
    clock.now += KEPT_SECONDS + 0.1
    assert [number for number in range(300) if await runs.include(number, number)] == []
    await run(runs, OURS)
    assert await runs.include(OURS, 0)


@pytest.mark.parametrize("module", [tool, xtables])
async def test_the_end_of_each_run_is_noted(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    runs = Runs(clock)
    monkeypatch.setattr(tool_run, "RUNS", runs)
    noted: list[int] = []
    monkeypatch.setattr(runs, "ended", lambda process: noted.append(process))
    if module is tool:
        await Nft("/bin/true").run([])
    else:
        await Xtables(Variant.NFT, find_program=lambda name: "/bin/true").save(Family.IPV4, "nat")
    (process,) = noted
    assert await runs.include(process, 0)


async def test_what_is_just_started_is_waited_for() -> None:
    runs = Runs()
    async with runs.starting() as started:
        asked = asyncio.ensure_future(runs.include(OURS, 0))
        await asyncio.sleep(0)
        assert not asked.done()
        started(OURS)
    assert await asked
