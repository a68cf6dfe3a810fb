"""The real kernel and the real nft hold after each plan what the model says: nothing is assumed."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from tests.properties import strategies as some
from tests.properties.worlds import program_of, snapshot_of

from vipd.backends.nftables.driver import NftablesDriver
from vipd.backends.nftables.plan import expected, plan, plan_changes
from vipd.bench import lab_netns
from vipd.proxy.events import Event
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import fold

pytestmark = [
    pytest.mark.netns,
    pytest.mark.usefixtures("small_maglev"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not shutil.which("nft"), reason="needs nft (Debian's package nftables)"),
]


@pytest.fixture(scope="module")
def namespace() -> Iterator[Path]:
    """Return the path of a network namespace that is this module's own."""
    path = lab_netns.DIRECTORY / f"vipd-test-{os.getpid()}"
    lab_netns.DIRECTORY.mkdir(exist_ok=True)
    lab_netns.create(path, lambda: None)
    yield path
    lab_netns.delete(path)


@settings(max_examples=10)
@given(first=some.clusters(), later=some.batches, node=some.node_settings)
def test_the_kernel_holds_what_was_planned(
    namespace: Path, first: list[Event], later: list[list[Event]], node: NodeSettings
) -> None:
    async def do() -> None:
        driver = NftablesDriver()
        await driver.teardown()
        snapshot = snapshot_of(first)
        table = resolve(snapshot, node)
        made, program = plan(await driver.observe(), program_of(table))
        assert not (await driver.commit(made)).rejected
        assert await driver.observe() == expected(program)
        for batch in later[:2]:
            snapshot, touched = fold(snapshot, batch)
            table, changes = update(table, snapshot, node, touched)
            made, program = plan_changes(program, changes)
            assert not (await driver.commit(made)).rejected
            observed = await driver.observe()
            assert observed == expected(program)
            assert not plan(observed, program_of(table))[0]

    lab_netns.inside(namespace, lambda: asyncio.run(do()))
