"""The real kernel and the real nft hold after each plan what the model says: nothing is assumed."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import strategies as some
from tests.properties.worlds import program_of, snapshot_of

from vipd.backends.nftables.compile import Program
from vipd.backends.nftables.driver import NftablesDriver
from vipd.backends.nftables.objects import SKELETON, TABLE
from vipd.backends.nftables.plan import compile_program, expected, plan, plan_changes
from vipd.backends.nftables.tool import Nft
from vipd.backends.skeleton import Skeleton
from vipd.bench import lab_netns
from vipd.proxy.errors import DataplaneError, OutOfStep
from vipd.proxy.events import Event
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName, parse_address
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import fold
from vipd.proxy.virtualserver import Changes, Endpoint, Key, Kind, NodeNetwork, VirtualServer

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
BESIDE_COMMENTS = (
    "chain ip vipd nat-prerouting { policy drop; }",
    "chain ip6 vipd-skeleton pre { policy drop; }",
    "add chain ip vipd evil { type filter hook prerouting priority -400; policy drop; }",
    "add chain ip6 vipd-skeleton evil { type filter hook input priority 7; policy drop; }",
    "flush chain ip vipd nat-output\ndelete chain ip vipd nat-output\n"
    "add chain ip vipd nat-output { type filter hook forward priority 9; }",
    "add table ip vipd { flags dormant; }",
)
"""What changes no rule, set or element: observing does not tell of it."""


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


async def _programmed(program: Program) -> NftablesDriver:
    driver = NftablesDriver()
    await driver.teardown()
    made, _ = plan(None, program)
    await driver.commit(made)
    return driver


async def _rule_that_drops(word: str, table: str, chain: str) -> str:
    """Return what replaces the first rule of a chain by one that has its comment."""
    listing = await Nft().run(["--handle", "list", "chain", word, table, chain])
    comment, handle = re.findall(r'comment ("[^"]*") # handle (\d+)', listing.decode())[0]
    return f"{word} {table} {chain} handle {handle} counter drop comment {comment}"


async def _ruleset() -> str:
    """What nft prints of everything, but for handles, counts and the order of chains."""
    lines = (await Nft().run(["--stateless", "list", "ruleset"])).decode().splitlines()
    return "\n".join(sorted(re.sub(r"__(set|map)\d+", "", line) for line in lines))


def test_what_no_comment_tells_is_mended(namespace: Path) -> None:
    program = compile_program([], NodeNetwork())

    async def do() -> None:
        driver = await _programmed(program)
        whole = await _ruleset()
        assert await driver.differing(program) == ()
        for one in BESIDE_COMMENTS:
            await Nft().run(["-f", "-"], one)
            assert await _ruleset() != whole, one
            assert await driver.differing(program), one
            assert await driver.mend(program), one
            assert await _ruleset() == whole, one
            assert await driver.mend(program) == 0, one

    lab_netns.inside(namespace, lambda: asyncio.run(do()))


RULES = [("ip", "vipd", "nat-prerouting"), ("ip6", "vipd", "dispatch"), ("ip", SKELETON, "pre")]


@pytest.mark.parametrize("place", RULES, ids=" ".join)
def test_a_rule_that_keeps_its_comment_is_not_ours(
    namespace: Path, place: tuple[str, str, str]
) -> None:
    program = compile_program([], NodeNetwork())

    async def do() -> None:
        driver = await _programmed(program)
        whole = await _ruleset()
        assert await driver.differing(program) == ()
        await Nft().run(["-f", "-"], f"replace rule {await _rule_that_drops(*place)}")
        assert await driver.differing(program)
        assert await driver.mend(program)
        assert await _ruleset() == whole
        assert await driver.mend(program) == 0

    lab_netns.inside(namespace, lambda: asyncio.run(do()))


def test_the_skeleton_of_other_modes_is_mended(namespace: Path) -> None:
    async def do() -> None:
        await NftablesDriver().teardown()
        skeleton = Skeleton(Nft())
        await skeleton.ensure()
        whole = await _ruleset()
        assert await skeleton.mend() == 0
        drop = await _rule_that_drops("ip", SKELETON, "pre")
        for damage in (
            f"replace rule {drop}",
            *(one for one in BESIDE_COMMENTS if SKELETON in one),
        ):
            await Nft().run(["-f", "-"], damage)
            assert await _ruleset() != whole, damage
            assert await skeleton.mend() == 1, damage
            assert await _ruleset() == whole, damage
            assert await skeleton.mend() == 0, damage

    lab_netns.inside(namespace, lambda: asyncio.run(do()))


def test_what_is_told_before_anything_was_compared_is_mended(namespace: Path) -> None:
    program = compile_program([], NodeNetwork())

    async def do() -> None:
        driver = await _programmed(program)
        whole = await _ruleset()
        (watch,) = driver.watches()
        told = watch()
        first = asyncio.ensure_future(anext(aiter(told)))
        await asyncio.sleep(0)  # it has subscribed
        rule = await _rule_that_drops("ip", TABLE, "dispatch")
        # Not by a run of our own, of which nothing is told.
        await asyncio.to_thread(subprocess.run, ["nft", f"replace rule {rule}"], check=True)
        assert (await first).by == "nft"
        assert await driver.mend(program)
        assert await _ruleset() == whole
        assert await driver.mend(program) == 0

    lab_netns.inside(namespace, lambda: asyncio.run(do()))


def test_what_is_written_by_ourselves_is_no_damage(namespace: Path) -> None:
    """A service with chains of its own comes, goes and comes again between two comparisons."""
    server = VirtualServer(
        key=Key(Family.IPV4, parse_address("10.96.0.1"), Protocol.TCP, 80),
        owner=ServicePortName(NamespacedName("default", "web"), "http", Protocol.TCP),
        kind=Kind.CLUSTER,
        cluster=(Endpoint(parse_address("10.244.1.2"), 8080),),
        local=(),
        affinity_seconds=60,
    )
    nothing = compile_program([], NodeNetwork())

    async def do() -> None:
        driver = await _programmed(nothing)
        program = nothing
        for there in (server, None, server):
            made, program = plan_changes(program, Changes({server.key: there}))
            await driver.commit(made)
            if there is not None:
                assert await driver.differing(program) == ()
        assert await driver.mend(program) == 0

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
