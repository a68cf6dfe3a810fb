"""The exposition: every part's facts under their names, with kube-proxy's buckets, per mode."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.test_connections import given, owner, server, table
from tests.unit.test_status import GOOD, status
from tests.waiting import until

from vipd.backends.counts import Count, Outcome, Take
from vipd.proxy.errors import Busy, Rejected
from vipd.proxy.measured import SYNC_SECONDS, Distribution
from vipd.proxy.metrics import counters as reading
from vipd.proxy.metrics import written
from vipd.proxy.metrics.connections import Connections
from vipd.proxy.metrics.counters import Counters
from vipd.proxy.metrics.described import KUBE_PROXY, METRICS, MODES, OWN
from vipd.proxy.metrics.exposition import Metrics
from vipd.proxy.metrics.kube_proxy import without_local_endpoints
from vipd.proxy.metrics.subjects import Subjects, WritingEvents
from vipd.proxy.names import Family
from vipd.proxy.programming import NETWORK_PROGRAMMING_SECONDS, Kinds, Programming, Stage
from vipd.proxy.sources.kubernetes.notice_writer import Counts
from vipd.proxy.sources.kubernetes.resources import Wanted
from vipd.proxy.sources.kubernetes.source import KubernetesSource
from vipd.proxy.status import DrainView, LastSync, Status
from vipd.proxy.virtualserver import Kind, Refusal, Use, VirtualServer

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Driver:
    """Counts what it is told to, as every driver does."""

    def __init__(self) -> None:
        self.counts: list[Count] = [given(4), given(3, at="b", end="10.244.0.2:80")]
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.tallies = 0
        self.rules = {("nat", Family.IPV4): 70, ("filter", Family.IPV4): 12}
        self.written = Counter({("nat", Family.IPV4): 7})
        self.lock_waits = 5
        self.cleanup_failures = Counter({Family.IPV4: 6})

    async def tally(self, servers: Collection[VirtualServer], take: Take, seconds: float) -> None:
        self.tallies += 1
        await self.gate.wait()
        take(self.counts)
        if self.failure is not None:
            raise self.failure


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A daemon's parts as far as they are measured."""

    def __init__(self, mode: str = "nftables") -> None:
        self.clock = Clock()
        self.driver = Driver()
        rejecting = server(1, ["10.244.0.1", "10.244.0.2"])
        self.table = table(rejecting, server(2, ["10.244.0.1"]))
        self.serving = SimpleNamespace(
            mode=mode,
            driver=self.driver,
            synced=True,
            failure="",
            rejected={rejecting.key: Rejected("", "no")},
            last_sync=LastSync(1.0, 2.0, 3, 40, full=False),
        )
        self.programming = Programming(900.0, self.clock)
        self.programming.queued(self.table.claims)
        self.programming.synced(self.table.claims, 0.0035, 40, full=False)
        self.programming.synced(self.table.claims, 3.0, 400, full=True)
        self.programming.failed(Kinds(mode, full=False), self.table.claims)
        self.programming.latency[Family.IPV4] = Distribution((0.25, 1.0))
        self.programming.last_event["Service"] = 1.0
        with self.programming.stage(Stage.COMMIT):
            pass
        self.counters = Counters(
            Connections(), lambda: cast(Any, self.serving), lambda: self.table, self.clock
        )
        self.subjects = Subjects(
            programming=self.programming,
            sync=cast(Any, SimpleNamespace(table=self.table, resolved=Distribution(SYNC_SECONDS))),
            switching=cast(
                Any,
                SimpleNamespace(
                    serving=self.serving,
                    switches=Counter({("iptables", True): 2}),
                    repairs=SimpleNamespace(count=3, waiting=lambda: {"other": 8.0}),
                ),
            ),
            departures=cast(Any, None),
            source=SimpleNamespace(
                silence=lambda: {"Service": 12.5},
                notices=Counts(written=11, held_back=12, failed=13, lost=14),
            ),
            counters=self.counters,
            health=SimpleNamespace(answers=Counter({("healthz", 200): 8, ("livez", 503): 9})),
            stale_flows=SimpleNamespace(
                deleted=Counter({Family.IPV6: 21}), took={Family.IPV6: Distribution(SYNC_SECONDS)}
            ),
            refusing=(SimpleNamespace(refused=("net.netfilter.nf_conntrack_max",)),),
        )
        self.asked = 0

    async def status(self) -> Status:
        self.asked += 1
        drains = (DrainView("iptables", 0.0, 31),)
        told = replace(status(GOOD), drains=drains, conflicts=("c",), departed=5, flows_cut=6)
        return replace(told, mode=self.serving.mode, workers_wanted=2)

    def text(self) -> bytes:
        """Read everything and return what Prometheus is told."""

        async def made() -> bytes:
            await self.counters.refresh()
            return written.text(self.subjects, await self.status())

        return asyncio.run(made())

    def families(self) -> dict[str, Metric]:
        """Return what is told as Prometheus reads it."""
        return {one.name: one for one in parsed(self.text())}


def parsed(text: bytes) -> Iterable[Metric]:
    return text_string_to_metric_families(text.decode())


def samples(families: dict[str, Metric]) -> Samples:
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in families.values()
        for one in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def exported(name: str) -> str:
    """The name of a family as the parser has it: that of a counter has no suffix."""
    return name.removesuffix("_total") if METRICS[name].type == "counter" else name


PORT = {"namespace": "shop", "service": "web-1", "port": "http", "protocol": "TCP"}


def test_facts_are_under_their_names() -> None:
    found = samples(Rig().families())
    four, six = {"ip_family": "IPv4"}, {"ip_family": "IPv6"}
    rules = "kubeproxy_sync_proxy_rules"
    assert value(found, f"{rules}_duration_seconds_count", **four) == 2
    assert value(found, f"{rules}_duration_seconds_bucket", le="0.004", **four) == 1
    assert value(found, f"{rules}_duration_seconds_bucket", le="4.096", **four) == 2
    assert value(found, "kubeproxy_sync_full_proxy_rules_duration_seconds_sum", **four) == 3
    assert value(found, f"{rules}_last_timestamp_seconds", **four) == 1000
    assert value(found, f"{rules}_nftables_sync_failures_total", **four) == 1
    assert value(found, f"{rules}_nftables_cleanup_failures_total", **four) == 6
    assert value(found, "kubeproxy_conntrack_reconciler_deleted_entries_total", **six) == 21
    assert value(found, "kubeproxy_proxy_healthz_total", code="200") == 8
    assert value(found, "kubeproxy_proxy_livez_total", code="503") == 9
    assert value(found, "vipd_mode", mode="nftables") == 1
    assert value(found, "vipd_mode", mode="iptables") == 0
    assert value(found, "vipd_service_connections_total", **PORT) == 7
    assert value(found, "vipd_endpoint_connections_total", endpoint="10.244.0.2:80", **PORT) == 3
    assert value(found, "vipd_service_rejected", **PORT) == 1
    assert value(found, "vipd_services_rejected") == 1
    assert value(found, "vipd_conflicts") == 1
    assert value(found, "vipd_syncs_total", full="true") == 1
    assert value(found, "vipd_sync_failures_total", mode="nftables", full="false") == 1
    assert value(found, "vipd_sync_objects_total") == 440
    assert value(found, "vipd_sync_stage_duration_seconds_count", stage="commit") == 1
    assert value(found, "vipd_api_silence_seconds", kind="Service") == 12.5
    told = [
        value(found, "vipd_events_total", outcome=one)
        for one in ("written", "held_back", "failed", "lost")
    ]
    assert told == [11, 12, 13, 14]
    assert value(found, "vipd_repairs_total") == 3
    assert value(found, "vipd_repair_pause_seconds") == 8
    assert value(found, "vipd_settings_refused", setting="net.netfilter.nf_conntrack_max") == 1
    assert value(found, "vipd_draining_flows", mode="iptables") == 31
    assert value(found, "vipd_switches_total", mode="iptables", outcome="success") == 2
    assert value(found, "vipd_dns_server_up") == 1
    assert value(found, "process_resident_memory_bytes") > 1 << 20
    assert any(name == "python_info" for name, _ in found)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_exported_is_described_and_of_the_mode(mode: str) -> None:
    families = Rig(mode).families()
    for name, described in METRICS.items():
        family = families.get(exported(name))
        if mode not in described.modes:
            assert family is None, name
        elif family is not None:
            assert family.type == described.type
            assert family.documentation == described.help
            labels = {key for one in family.samples for key in one.labels} - {"le"}
            assert labels <= set(described.labels)
    known = {exported(name) for name in METRICS}
    assert {name for name in families if name not in known} <= {
        name.removesuffix("_total") for name in families if name.startswith(("process_", "python_"))
    }
    if mode == "iptables":
        found = samples(families)
        where = {"ip_family": "IPv4", "table": "nat"}
        assert value(found, "kubeproxy_sync_proxy_rules_iptables_total", **where) == 70
        assert value(found, "kubeproxy_sync_proxy_rules_iptables_last", **where) == 7
        assert value(found, "vipd_xtables_lock_waits_total") == 5


def test_buckets_are_those_of_kube_proxy() -> None:
    families = Rig().families()
    found: dict[str, set[str]] = {}
    for family in families.values():
        for one in family.samples:
            found.setdefault(one.name, set()).add(one.labels.get("le", ""))
    of_syncs = {"0.001", "0.002", "0.004", "0.008", "0.016", "0.032", "0.064", "0.128", "0.256"}
    of_syncs |= {"0.512", "1.024", "2.048", "4.096", "8.192", "16.384", "+Inf"}
    for name in ("sync_proxy_rules", "sync_full_proxy_rules", "sync_partial_proxy_rules"):
        assert found[f"kubeproxy_{name}_duration_seconds_bucket"] == of_syncs
    seconds = NETWORK_PROGRAMMING_SECONDS
    assert seconds[:4] == (0.25, 0.5, 1, 2)
    assert seconds[60:63] == (59, 60, 65)
    assert seconds[-8:] == (115, 120, 150, 180, 210, 240, 270, 300)


def test_names_are_those_of_a_kind() -> None:
    assert all(one.name.startswith("kubeproxy_") for one in KUBE_PROXY)
    assert all(one.name.startswith("vipd_") for one in OWN)
    counters = [one.name for one in OWN if one.type == "counter"]
    assert counters == [one.name for one in OWN if one.name.endswith("_total")]
    assert all(one.help.endswith(".") for one in METRICS.values())


def test_ports_without_an_endpoint_here() -> None:
    def one(last: int, how: Use, kind: Kind, empty: Refusal = Refusal.DROP) -> VirtualServer:
        made = server(last, ["10.244.0.1"])
        return replace(made, use=how, kind=kind, when_empty=empty)

    found = without_local_endpoints(
        table(
            one(1, Use.LOCAL, Kind.CLUSTER),
            one(2, Use.LOCAL_FROM_OUTSIDE, Kind.LOAD_BALANCER),
            replace(one(3, Use.LOCAL_FROM_OUTSIDE, Kind.EXTERNAL), owner=owner(2)),
            one(4, Use.LOCAL, Kind.CLUSTER, Refusal.REJECT),  # none anywhere
            one(5, Use.CLUSTER, Kind.CLUSTER),
            replace(one(6, Use.LOCAL, Kind.CLUSTER), local=server(1, ["10.244.0.1"]).cluster),
        )
    )
    assert found == {(Family.IPV4, "internal"): 1, (Family.IPV4, "external"): 1}


async def test_connections_can_be_switched_off() -> None:
    rig = Rig()
    text = await Metrics(
        dataclasses.replace(rig.subjects, counts=lambda: False), rig.status
    ).exposition()
    assert rig.driver.tallies == 0
    assert not [one for one in parsed(text) if "connection" in one.name]


def test_the_source_that_writes_events_says_what_became_of_them() -> None:
    source: WritingEvents = KubernetesSource("kubeconfig", "node-1", Wanted())
    assert isinstance(source, WritingEvents)
    assert source.notices.written == 0


# When it is read


async def test_one_text_for_all_who_ask_at_once() -> None:
    rig = Rig()
    metrics = Metrics(rig.subjects, rig.status)
    texts = await asyncio.gather(*(metrics.exposition() for _ in range(20)))
    assert (len(set(texts)), rig.asked, rig.driver.tallies) == (1, 1, 1)


async def test_who_asks_and_goes_takes_nothing_from_the_others() -> None:
    rig = Rig()
    rig.driver.gate.clear()
    metrics = Metrics(rig.subjects, rig.status)
    first, second = (asyncio.ensure_future(metrics.exposition()) for _ in range(2))
    await until(lambda: rig.driver.tallies == 1)
    first.cancel()
    rig.driver.gate.set()
    assert b"vipd_service_connections_total{" in await second
    assert await metrics.exposition() is second.result()
    assert (rig.asked, rig.driver.tallies, first.cancelled()) == (1, 1, True)


async def test_connections_are_read_one_at_a_time_and_not_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()
    rig.driver.gate.clear()
    monkeypatch.setattr(reading, "PATIENCE_SECONDS", 0.0)
    await asyncio.gather(rig.counters.refresh(), rig.counters.refresh())
    assert rig.counters.connections.services == {}
    assert rig.counters.age() is None
    monkeypatch.undo()
    rig.driver.gate.set()
    await asyncio.gather(rig.counters.refresh(), rig.counters.refresh())
    assert rig.driver.tallies == 1
    assert rig.counters.connections.services[owner(1)][Outcome.GIVEN] == 7
    await rig.counters.refresh()
    rig.clock.now += reading.SHORTEST_PAUSE_SECONDS - 0.1
    await rig.counters.refresh()
    assert rig.driver.tallies == 1
    rig.clock.now += 0.1
    await rig.counters.refresh()
    assert rig.driver.tallies == 2


async def test_a_reading_that_fails_is_counted_and_leaves_what_was_read() -> None:
    rig = Rig()
    rig.driver.failure = Busy("slow")
    await rig.counters.refresh()
    assert rig.counters.failures == 1
    assert rig.counters.connections.services[owner(1)][Outcome.GIVEN] == 7
    rig.driver.failure = ZeroDivisionError("a bug")
    rig.clock.now += 100
    await rig.counters.refresh()
    assert rig.counters.failures == 2
    rig.driver.failure = None
    rig.clock.now += 100
    await rig.counters.refresh()
    assert (rig.counters.failures, rig.driver.tallies) == (2, 3)


async def test_a_long_reading_is_followed_by_a_long_pause() -> None:
    rig = Rig()

    async def slow(servers: Any, take: Take, seconds: float) -> None:
        rig.driver.tallies += 1
        rig.clock.now += 2.0

    rig.driver.tally = slow  # type: ignore[method-assign]
    await rig.counters.refresh()
    rig.clock.now += 2.0 / reading.SHARE - 1
    await rig.counters.refresh()
    assert rig.driver.tallies == 1
    rig.clock.now += 1
    await rig.counters.refresh()
    assert rig.driver.tallies == 2
