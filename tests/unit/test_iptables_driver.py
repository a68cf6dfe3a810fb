"""The iptables driver with the real tools and kernel, in namespaces of its own, both variants."""

import asyncio
import fcntl
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import msgspec
import pytest
from tests.unit.iptables_cases import (
    NETWORK,
    OBSTACLE,
    in_namespace,
    many,
    rules,
    server,
    tell,
)

from vipd.backends import ipset_counts, legacy_tables, xtables
from vipd.backends.iptables.backend import IptablesCompiler
from vipd.backends.iptables.compile import Program
from vipd.backends.iptables.driver import IptablesDriver
from vipd.backends.iptables.objects import set_name
from vipd.backends.iptables.pipeline import JUMPS
from vipd.backends.protocol import Committed
from vipd.backends.xtables import PREFIX, Variant, Xtables
from vipd.proxy.errors import Busy, OutOfStep, Rejected, UnknownResult
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Family
from vipd.proxy.virtualserver import Changes, Endpoint, VirtualServer

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE),
    pytest.mark.parametrize("variant", list(Variant)),
]
COMPILER = IptablesCompiler()
DOCKER = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8081 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -m comment --comment "a firewall's #deadbeef" -j RETURN
COMMIT
"""
"""Chains and rules as docker makes them, and one whose comment looks like a digest of ours."""


async def set_up(driver: IptablesDriver, servers: list[VirtualServer]) -> tuple[Program, Committed]:
    plan, program = COMPILER.plan(await driver.observe(), COMPILER.compile(servers, NETWORK))
    return program, await driver.commit(plan)


async def left_to_do(driver: IptablesDriver, program: Program) -> str:
    """Return what a restart with the same program would do."""
    return str(COMPILER.plan(await driver.observe(), program)[0])


def test_a_restart_finds_nothing_to_do(variant: Variant) -> None:
    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        assert await driver.observe() is None
        program, done = await set_up(driver, many(40))
        assert done.rejected == {}
        assert await left_to_do(IptablesDriver(variant=variant), program) == ""
        observed = await driver.observe()
        assert observed == COMPILER.load(COMPILER.dump(program))

    in_namespace(do)


def test_changes_lead_where_a_fresh_start_leads(variant: Variant) -> None:
    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        servers = many(40)
        program, _ = await set_up(driver, servers)
        other = server(7, "10.244.7.9", affinity_seconds=5)
        gone = servers[9]
        new = server(77, "10.244.3.3", address="172.16.0.1", port=443)
        empty = msgspec.structs.replace(servers[11], cluster=())
        for changes in (
            {other.key: other},
            {gone.key: None, new.key: new},
            {empty.key: empty},
            {one.key: one for one in servers},
            {one.key: None for one in servers[3:]},
        ):
            plan, program = COMPILER.plan_changes(program, Changes(changes))
            assert (await driver.commit(plan)).rejected == {}
            assert wrong(driver, variant) == []
            assert await left_to_do(driver, program) == ""

    in_namespace(do)


@pytest.mark.parametrize("endpoints", [7, 32, 203])
def test_the_kernel_takes_a_source_hash_of_many(variant: Variant, endpoints: int) -> None:
    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        targets = [f"10.244.{number // 200}.{number % 200 + 1}" for number in range(endpoints)]
        one = server(7, *targets, algorithm=Algorithm.SOURCE_HASH)
        program, done = await set_up(driver, [one])
        assert done.rejected == {}
        assert await left_to_do(driver, program) == ""

    in_namespace(do)


def test_a_change_meets_tables_that_somebody_flushed(variant: Variant) -> None:
    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        servers = many(10)
        program, _ = await set_up(driver, servers)
        tell(variant, "*nat\n-F PREROUTING\n-F VIPD-SERVICES\nCOMMIT\n")
        other = server(7, "10.244.7.9")
        plan, after = COMPILER.plan_changes(program, Changes({other.key: other}))
        with pytest.raises(OutOfStep):
            await driver.commit(plan)
        plan, _ = COMPILER.plan(await driver.observe(), after)
        await driver.commit(plan)
        assert await left_to_do(driver, after) == ""

    in_namespace(do)


def damage_rule(variant: Variant) -> None:
    line = next(one for one in rules(variant) if "--to-destination 10.244.5.2:8080" in one)
    tell(variant, f"*nat\n-D {line.removeprefix('-A ')}\nCOMMIT\n")


def damage_target(variant: Variant) -> None:
    line = next(one for one in rules(variant) if "--to-destination 10.244.5.2:8080" in one)
    chain = line.split()[1]
    tell(variant, f"*nat\n-R {chain} 2 -p tcp -j DNAT --to-destination 10.0.0.1:1\nCOMMIT\n")


def damage_jump(variant: Variant) -> None:
    line = next(one for one in rules(variant) if one.startswith("-A OUTPUT"))
    tell(variant, f"*nat\n-D {line.removeprefix('-A ')}\nCOMMIT\n")


def damage_by_adding(variant: Variant) -> None:
    tell(variant, "*nat\n-A VIPD-DISPATCH -j RETURN\n:VIPD-STRAY - [0:0]\nCOMMIT\n")


def damage_by_flush(variant: Variant) -> None:
    tell(variant, "*filter\n-F VIPD-SERVICES\nCOMMIT\n")


@pytest.mark.parametrize(
    ("damage", "repair"),
    [
        (damage_rule, 3),
        (damage_target, 3),
        (damage_jump, 1),
        (damage_by_adding, 6),
        (damage_by_flush, 8),
    ],
)
def test_what_somebody_changed_is_repaired_and_nothing_else(
    variant: Variant, damage: Callable[[Variant], None], repair: int
) -> None:
    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        program, _ = await set_up(driver, many(40))
        before = {table: rules(variant, table) for table in ("nat", "filter")}
        damage(variant)
        plan, _ = COMPILER.plan(await driver.observe(), program)
        text = str(plan)
        assert sum(line.startswith(("-A", "-I", "-X")) for line in text.splitlines()) == repair
        await driver.commit(plan)
        assert await left_to_do(driver, program) == ""
        after = {table: rules(variant, table) for table in ("nat", "filter")}
        assert {table: sorted(text) for table, text in after.items()} == {
            table: sorted(text) for table, text in before.items()
        }

    in_namespace(do)


def test_a_set_that_somebody_changed_is_repaired(variant: Variant) -> None:
    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        program, _ = await set_up(driver, many(5))
        await driver.sets.delete("VIPD-SERVED-4", ["10.96.0.1,tcp:80"])
        await driver.sets.add("VIPD-REJECT-4", ["10.96.0.2,tcp:80"])
        plan, _ = COMPILER.plan(await driver.observe(), program)
        assert str(plan).splitlines() == [
            "add VIPD-SERVED-4 10.96.0.1,tcp:80",
            "del VIPD-REJECT-4 10.96.0.2,tcp:80",
        ]
        await driver.commit(plan)
        assert await left_to_do(driver, program) == ""

    in_namespace(do)


def test_what_is_others_stays_byte_for_byte(variant: Variant) -> None:
    async def do() -> None:
        tell(variant, DOCKER)
        before = {table: rules(variant, table) for table in ("nat", "filter")}
        driver = IptablesDriver(variant=variant)
        program, _ = await set_up(driver, many(20))
        plan, program = COMPILER.plan_changes(program, Changes({many(20)[3].key: None}))
        await driver.commit(plan)
        for table, told in before.items():
            now = [line for line in rules(variant, table) if "VIPD-" not in line]
            assert now == told
            first = [line for line in rules(variant, table) if line.startswith("-A")]
            hooks = {line.split()[1]: line for line in reversed(first)}
            assert "VIPD-" in hooks["PREROUTING" if table == "nat" else "FORWARD"]
        assert await driver.teardown()
        assert {table: rules(variant, table) for table in ("nat", "filter")} == before
        assert await driver.leftovers() == []
        assert await driver.teardown() == []

    in_namespace(do)


def test_quiesce_takes_no_new_flow_and_a_commit_undoes_it(variant: Variant) -> None:
    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        program, _ = await set_up(driver, many(5))
        await driver.quiesce()
        await driver.quiesce()
        jumps = [line for line in rules(variant) if line.startswith(("-A PRE", "-A OUT"))]
        assert jumps == []
        assert any("-A FORWARD" in line for line in rules(variant, "filter"))
        plan, _ = COMPILER.plan(await driver.observe(), program)
        await driver.commit(plan)
        assert await left_to_do(driver, program) == ""

    in_namespace(do)


def test_only_the_service_that_the_kernel_refuses_is_rejected(variant: Variant) -> None:
    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        bad = server(3, "10.244.1.1", affinity_seconds=1 << 40)
        servers = [one for one in many(30) if one.key != bad.key]
        program, done = await set_up(driver, [*servers, bad])
        assert set(done.rejected) == {bad.key}
        good = COMPILER.without(COMPILER.compile((), NETWORK), program, done.rejected)
        assert await left_to_do(driver, good) == ""
        plan, after = COMPILER.plan_changes(good, Changes({bad.key: bad, servers[2].key: None}))
        done = await driver.commit(plan)
        assert set(done.rejected) == {bad.key}
        assert isinstance(done.rejected[bad.key], Rejected)
        after = COMPILER.without(good, after, done.rejected)
        assert await left_to_do(driver, after) == ""

    in_namespace(do)


def test_a_refusal_that_names_no_line_is_found_by_halves(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = server(13)
    real = Xtables.restore

    async def refusing(self: Xtables, family: Family, text: str, **options: object) -> None:
        if f"-g {xtables.PREFIX}SVC" in text and f"-d {bad.key.address}/32" in text:
            raise xtables.RejectedAt("restore", "line 99 failed", 0)
        await real(self, family, text, **options)  # type: ignore[arg-type]

    async def do() -> None:
        monkeypatch.setattr(Xtables, "restore", refusing)
        driver = IptablesDriver(variant=variant)
        program, done = await set_up(driver, many(30))
        assert set(done.rejected) == {bad.key}
        good = COMPILER.without(COMPILER.compile((), NETWORK), program, done.rejected)
        assert await left_to_do(driver, good) == ""

    in_namespace(do)


@pytest.mark.parametrize("full", ["MASQ-OUT", "SERVED"])
def test_a_full_set_rejects_what_does_not_fit(variant: Variant, full: str) -> None:
    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        spec = driver._spec(full, Family.IPV4)
        await driver.sets.create(msgspec.structs.replace(spec, size=5))
        program = COMPILER.compile((), NETWORK)
        servers = [server(number) for number in range(7)]
        changes = Changes({one.key: one for one in servers})
        empty, _ = COMPILER.plan(await driver.observe(), program)
        await driver.commit(empty)
        plan, after = COMPILER.plan_changes(program, changes)
        done = await driver.commit(plan)
        assert len(done.rejected) == 2
        assert all("full" in str(error) for error in done.rejected.values())
        after = COMPILER.without(program, after, done.rejected)
        assert await left_to_do(driver, after) == ""

    in_namespace(do)


def test_a_lock_that_another_program_holds_is_waited_for_and_counted(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))
    monkeypatch.setattr(xtables, "LOCK_SECONDS", 1)
    monkeypatch.setattr(xtables, "LOCK_RUNS", 1)

    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if variant is Variant.NFT:
                await set_up(driver, many(3))  # it has no lock
                assert driver.tools.lock_waits == 0
                return
            with pytest.raises(Busy, match="lock"):
                await set_up(driver, many(3))
            assert driver.tools.lock_waits == 1
        program, done = await set_up(driver, many(3))
        assert done.rejected == {}
        assert await left_to_do(driver, program) == ""

    in_namespace(do)


def test_a_restore_that_is_killed_leaves_a_table_as_it_was_or_done(
    variant: Variant, tmp_path: Path
) -> None:
    """The tool is ended by a signal before or after it did its work."""
    for order in ("kill -9 $$; {}", "{}; kill -9 $$"):

        async def do(order: str = order) -> None:
            def find(name: str) -> str | None:
                path = xtables._which(name)
                if path is None or not name.endswith(f"{variant}-restore"):
                    return path
                wrapper = tmp_path / name
                wrapper.write_text(
                    f"#!/bin/bash\n{order.format(f'{path} ' + chr(34) + '$@' + chr(34))}\n"
                )
                wrapper.chmod(0o755)
                return str(wrapper)

            driver = IptablesDriver(tools=Xtables(variant, find_program=find))
            with pytest.raises(UnknownResult):
                await set_up(driver, many(10))
            program, done = await set_up(IptablesDriver(variant=variant), many(10))
            assert done.rejected == {}
            assert await left_to_do(IptablesDriver(variant=variant), program) == ""

        in_namespace(do)


def test_the_variant_that_holds_rules_is_used_and_ours_in_the_other_are_reported(
    variant: Variant,
) -> None:
    other = Variant.NFT if variant is Variant.LEGACY else Variant.LEGACY

    async def do() -> None:
        tell(variant, DOCKER)
        assert await IptablesDriver().tools.variant() is variant
        await set_up(IptablesDriver(variant=other), many(1))
        found = await Xtables(variant).find()
        reported = {one.split()[0] for one in (found.leftovers or ())}
        assert found.in_use is found.default
        here = f"iptables-{other if found.default is variant else variant}"
        assert (here in reported) is (found.default is variant)
        driver = IptablesDriver(variant=variant)
        assert all(str(other) in one for one in await driver.teardown() if "table" in one)
        assert [line for line in rules(other) if "VIPD" in line] == []

    in_namespace(do)


async def test_probe_changes_nothing_and_finds_everything(variant: Variant) -> None:
    async def do() -> None:
        found = await IptablesDriver(variant=variant).probe()
        assert found.supported, found
        assert str(variant) in found.found[0].detail
        assert await IptablesDriver(variant=variant).observe() is None

    await asyncio.to_thread(in_namespace, do)


def test_an_endpoint_keeps_its_memory_over_a_commit(variant: Variant) -> None:
    """Lists of xt_recent live as long as a rule uses them, whatever else is written."""

    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        servers = many(3)
        program, _ = await set_up(driver, servers)
        lists = Path("/proc/thread-self/net/xt_recent")
        one = next(it for it in servers if it.affinity_seconds == 60)
        line = next(it for it in rules(variant) if "--update --seconds 60" in it)
        kept = lists / line.split("--name ")[1].split()[0]
        kept.write_text("+10.244.3.3")
        more = (*one.cluster, Endpoint(ip_address("10.244.9.4"), 8080))
        changed = msgspec.structs.replace(one, cluster=more)
        plan, program = COMPILER.plan_changes(program, Changes({one.key: changed}))
        await driver.commit(plan)
        assert "10.244.3.3" in kept.read_text()
        fewer = msgspec.structs.replace(one, cluster=())
        plan, program = COMPILER.plan_changes(program, Changes({one.key: fewer}))
        await driver.commit(plan)
        assert not kept.exists(), "an endpoint that left remembers nobody"

    in_namespace(do)


def wrong(driver: IptablesDriver, variant: Variant) -> list[str]:
    """Return what a look at the kernel's numbers finds."""
    tally = driver._tally
    found = tally.wrong_sets(list(tally.sets), ipset_counts.held())
    if variant is Variant.NFT:
        return found  # the kernel tells of its chains
    for place, chains in tally.chains.items():
        shape = legacy_tables.shape(*place, PREFIX, {})
        found += tally.wrong_chains(place, shape.rules)
        wanted = {(one.chain, one.to) for one in JUMPS if one.table == place[1] and chains}
        found += [f"jump {one}" for one in sorted(wanted ^ shape.jumps)]
    return found


def test_numbers_tell_that_somebody_changed_something(variant: Variant) -> None:
    async def do() -> None:
        driver = IptablesDriver(variant=variant)
        tell(variant, DOCKER)
        await set_up(driver, many(3))
        assert wrong(driver, variant) == []
        served = set_name("SERVED", Family.IPV4)
        await driver.sets.delete(served, list(await driver.sets.entries(served) or ())[:1])
        (told,) = wrong(driver, variant)
        assert told.startswith(f"set {served}: ")
        if variant is Variant.NFT:
            return
        before = legacy_tables.info(Family.IPV4, "nat")
        tell(variant, "*nat\n-F DOCKER\nCOMMIT\n")
        assert legacy_tables.info(Family.IPV4, "nat") != before
        assert wrong(driver, variant) == [told]
        tell(variant, "*nat\n-F PREROUTING\n-F VIPD-DISPATCH\nCOMMIT\n")
        assert wrong(driver, variant)[1:] == [
            "chain VIPD-DISPATCH of IPv4 nat: 0 rules, not 5",
            "jump ('PREROUTING', 'VIPD-SERVICES')",
        ]

    in_namespace(do)
