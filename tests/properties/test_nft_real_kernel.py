"""The real kernel and the real nft hold after each plan what the model says: nothing is assumed."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from tests.properties import strategies as some
from tests.properties.worlds import program_of, snapshot_of

from vipd.backends.nftables.driver import NftablesDriver
from vipd.backends.nftables.plan import expected, plan, plan_changes
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
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NftablesDriver]:
    """Return a driver whose nft runs in a network namespace of its own."""
    name = f"vipd-test-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    wrapper: Path = tmp_path_factory.mktemp("nft") / "nft"
    wrapper.write_text(f'#!/bin/sh\nexec ip netns exec {name} nft "$@"\n')
    wrapper.chmod(0o755)
    yield NftablesDriver(str(wrapper))
    subprocess.run(["ip", "netns", "delete", name], check=True)


@settings(max_examples=10)
@given(first=some.clusters(), later=some.batches, node=some.node_settings)
def test_the_kernel_holds_what_was_planned(
    driver: NftablesDriver, first: list[Event], later: list[list[Event]], node: NodeSettings
) -> None:
    async def do() -> None:
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

    asyncio.run(do())
