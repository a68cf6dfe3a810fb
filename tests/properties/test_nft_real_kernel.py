"""The real kernel and the real nft hold after each plan what the model says: nothing is assumed."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import strategies as some
from tests.properties.worlds import program_of, snapshot_of

from vipd.backends.nftables.driver import NftablesDriver
from vipd.backends.nftables.plan import compile_program, expected, plan, plan_changes
from vipd.backends.nftables.tool import Nft
from vipd.bench import lab_netns
from vipd.proxy.errors import DataplaneError, OutOfStep
from vipd.proxy.events import Event
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import fold
from vipd.proxy.virtualserver import NodeNetwork

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


DAMAGE = (
    "flush ruleset",
    "delete table ip vipd",
    "delete table ip6 vipd-skeleton",
    "flush table ip6 vipd",
    "flush chain ip vipd dispatch",
    "flush map ip vipd services",
    "flush map ip vipd endpoints\nflush set ip vipd cluster-ips",
    "add element ip vipd services { 192.0.2.1 . tcp . 99 : drop }",
    "add element ip vipd node-ports { udp . 3 : accept }",
    "add element ip vipd allowed-sources { 192.0.2.1 . tcp . 99 . 10.0.0.0/8 }",
    "add rule ip vipd check-source drop",
)


@settings(max_examples=8)
@given(
    events=some.clusters(),
    later=some.batches,
    node=some.node_settings,
    damage=st.lists(st.sampled_from(DAMAGE), min_size=1, max_size=4, unique=True),
)
def test_whatever_is_damaged_is_mended(
    namespace: Path,
    events: list[Event],
    later: list[list[Event]],
    node: NodeSettings,
    damage: list[str],
) -> None:
    async def do() -> None:
        driver = NftablesDriver()
        nft = Nft()
        await driver.teardown()
        snapshot = snapshot_of(events)
        table = resolve(snapshot, node)
        made, program = plan(await driver.observe(), program_of(table))
        await driver.commit(made)
        for batch in later[:1]:
            snapshot, touched = fold(snapshot, batch)
            table, changes = update(table, snapshot, node, touched)
            made, program = plan_changes(program, changes)
            await driver.commit(made)
        assert await driver.mend(program) == 0
        for one in damage:
            with contextlib.suppress(DataplaneError):  # what it is about is gone already
                await nft.run(["-f", "-"], one)
            differs = await driver.observe() != expected(program)
            assert bool(await driver.differing(program)) == differs, one
            assert bool(await driver.mend(program)) == differs, one
            assert await driver.observe() == expected(program), one

    lab_netns.inside(namespace, lambda: asyncio.run(do()))


def test_another_declaration_is_not_for_mending(namespace: Path) -> None:
    """An observation has to see it: the table is built anew then."""
    program = compile_program([], NodeNetwork())

    async def do() -> None:
        driver = NftablesDriver()
        await driver.teardown()
        made, _ = plan(None, program)
        await driver.commit(made)
        run = Nft().run
        await run(["-f", "-"], "flush table ip vipd\ndelete map ip vipd node-ports\n")
        spec = 'type inet_proto . inet_service : verdict; comment "another";'
        await run(["-f", "-"], f"add map ip vipd node-ports {{ {spec} }}")
        with pytest.raises(OutOfStep, match="node-ports"):
            await driver.mend(program)

    lab_netns.inside(namespace, lambda: asyncio.run(do()))
