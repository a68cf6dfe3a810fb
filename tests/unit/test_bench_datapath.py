"""The datapath bench's arithmetic: what is parsed, how rounds add up, what the tables say."""

import json
import random
from ipaddress import IPv4Address, IPv4Network

import msgspec
import pytest

from vipd.bench.datapath_plan import (
    CONNECTIONS_EACH,
    DIRECT,
    FIGURES,
    HAPROXY,
    SERVICE_ADDRESS,
    TARGETS,
    USERSPACE,
    VARIANTS,
    Measure,
    Plan,
    asked,
    descriptors,
    haproxy_configuration,
    manifests,
    measures,
    most_connections,
    order,
)
from vipd.bench.datapath_printed import (
    Unreadable,
    busy_ticks,
    iperf3,
    process_ticks,
    proportional_bytes,
    wrk,
)
from vipd.bench.datapath_report import (
    Result,
    Spread,
    Turn,
    expected,
    quantile,
    ratio_table,
    ratios,
    spread,
    spreads,
    table,
)
from vipd.bench.sync_cluster import SERVICE_RANGE, service_address

ENDPOINT = "10.244.1.21"


def plan(*variants: str, wanted: tuple[Measure, ...] = (Measure.BULK,), services: int = 1) -> Plan:
    return Plan(
        variants=variants or VARIANTS,
        measures=wanted,
        rounds=3,
        seconds=2,
        idle=1000,
        services=services,
        workers=2,
    )


def turn(number: int, variant: str, *failures: str, **figures: float) -> Turn:
    return Turn(round=number, variant=variant, figures=figures, failures=failures)


def result(wanted: Plan, *turns: Turn, **unavailable: str) -> Result:
    return Result(
        plan=wanted,
        tools={"wrk": "4.1.0"},
        busy_cores=0.0,
        unavailable=unavailable,
        turns=turns,
        figures=spreads(turns),
        ratios=ratios(turns),
    )


class TestPlan:
    def test_latency_brings_the_measure_whose_rate_it_needs(self) -> None:
        assert measures([Measure.LATENCY]) == (Measure.KEPT, Measure.LATENCY)
        assert measures([Measure.UDP, Measure.BULK]) == (Measure.BULK, Measure.UDP)

    def test_each_variant_begins_a_round_in_turn(self) -> None:
        rounds = [order(("a", "b", "c"), number) for number in range(4)]
        assert rounds == [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b"), ("a", "b", "c")]

    def test_only_direct_asks_the_endpoint_itself(self) -> None:
        assert asked(DIRECT, ENDPOINT).address == ENDPOINT
        assert asked(DIRECT, ENDPOINT).http == 8000
        for variant in VARIANTS[1:]:
            assert (asked(variant, ENDPOINT).address, asked(variant, ENDPOINT).http) == (
                SERVICE_ADDRESS,
                80,
            )

    def test_the_measured_address_is_no_other_services(self) -> None:
        assert IPv4Address(SERVICE_ADDRESS) in IPv4Network(SERVICE_RANGE)
        assert IPv4Address(SERVICE_ADDRESS) > service_address(58_999)

    def test_manifests_hold_the_measured_service_and_the_others(self) -> None:
        items = json.loads(manifests(ENDPOINT, 3))["items"]
        services = [one for one in items if one["kind"] == "Service"]
        assert [one["metadata"]["name"] for one in services] == [
            "measured",
            "svc-0",
            "svc-1",
            "svc-2",
        ]
        ports = {one["name"]: one["targetPort"] for one in services[0]["spec"]["ports"]}
        assert ports == {"http": 8000, "bulk": 5201, "udp": 5301}
        (addresses,) = [
            one["endpoints"][0]["addresses"]
            for one in items
            if one["kind"] == "EndpointSlice" and one["metadata"]["name"] == "measured-abcde"
        ]
        assert addresses == [ENDPOINT]

    def test_haproxy_has_the_same_services_but_no_udp(self) -> None:
        lines = haproxy_configuration(ENDPOINT, plan(services=2)).splitlines()
        binds = [one.split()[1] for one in lines if one.startswith("    bind")]
        others = [f"{service_address(number)}:80" for number in range(2)]
        assert binds == [f"{SERVICE_ADDRESS}:80", f"{SERVICE_ADDRESS}:5201", *others]
        assert "    nbthread 2" in lines
        assert f"    server s0 {ENDPOINT}:8000" in lines

    def test_ten_thousand_connections_need_two_files_each(self) -> None:
        few, many = plan(), msgspec.structs.replace(plan(), idle=10_000, services=500)
        assert (most_connections(few), most_connections(many)) == (1_020, 10_020)
        assert 20_540 <= descriptors(many) <= 20_700
        under_load = msgspec.structs.replace(plan(), idle=1, workers=64)
        assert most_connections(under_load) > 64 * CONNECTIONS_EACH

    def test_every_target_is_of_a_figure(self) -> None:
        names = [one.name for one in FIGURES]
        assert set(TARGETS) <= set(names)
        assert len(names) == len(set(names))

    def test_verdicts(self) -> None:
        more, less = TARGETS["kept"], TARGETS["p99"]
        assert [more.verdict(one) for one in (1.0, 0.8, 0.79)] == ["aim", "must", "missed"]
        assert [less.verdict(one) for one in (1.0, 1.5, 1.51)] == ["aim", "must", "missed"]
        assert (more.spelled(more.must), less.spelled(less.aim)) == ("≥ 0.8", "≤ 1")


class TestPrinted:
    def test_iperf3_says_what_arrived(self) -> None:
        received = {"seconds": 2.0, "bytes": 250_000_000, "bits_per_second": 1e9, "sender": True}
        sent = {**received, "bytes": 260_000_000, "retransmits": 3}
        told = iperf3(
            json.dumps({"start": {}, "end": {"sum_sent": sent, "sum_received": received}})
        )
        assert (told.bits, told.bits_per_second) == (2_000_000_000, 1e9)

    @pytest.mark.parametrize(
        ("printed", "why"),
        [
            (
                '{"start": {}, "end": {}, "error": "unable to connect to server: refused"}',
                "unable to connect",
            ),
            ('{"start": {}, "end": {}}', "nothing arrived"),
            ("iperf3: parameter error", "no result"),
            ("", "no result"),
        ],
    )
    def test_iperf3_failures_are_told(self, printed: str, why: str) -> None:
        with pytest.raises(Unreadable, match=why):
            iperf3(printed)

    def test_wrk_ends_with_the_line_of_the_script(self) -> None:
        line = '{"requests":5000,"microseconds":2000000,"connect":0,"read":3,"write":0,"timeout":1}'
        told = wrk(f"Running 2s test @ http://10.0.0.1/\n  Requests/sec: 2500.00\n\n{line}\n")
        assert (told.rate, told.errors) == (2500.0, "read 3, timeout 1")

    @pytest.mark.parametrize(
        "printed",
        [
            "",
            "unable to connect to 10.0.0.1:80 Connection refused\n",
            '{"requests":0,"microseconds":9}',
        ],
    )
    def test_wrk_without_an_answer_is_a_failure(self, printed: str) -> None:
        with pytest.raises(Unreadable, match="wrk"):
            wrk(printed)

    def test_busy_is_without_idle_iowait_steal_and_what_guests_count_twice(self) -> None:
        stat = "cpu  10 20 30 4000 5000 6 7 8000 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
        assert busy_ticks(stat) == 10 + 20 + 30 + 6 + 7

    def test_a_process_may_be_called_anything(self) -> None:
        fields = ["S", *("0" for _ in range(10)), "5", "6", "7", "8", "20"]
        assert process_ticks(f"42 (a) b (c) {' '.join(fields)}") == 26

    def test_proportional_memory(self) -> None:
        assert (
            proportional_bytes("0-f ---p [rollup]\nRss: 100 kB\nPss:  40 kB\nPss_Anon: 9 kB")
            == 40_960
        )
        assert proportional_bytes("") == 0


class TestFigures:
    def test_median_and_extremes(self) -> None:
        assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
        assert spread([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)

    def test_a_failed_round_is_left_out(self) -> None:
        turns = [turn(1, DIRECT, bulk=2.0), turn(2, DIRECT, "bulk: no"), turn(3, DIRECT, bulk=4.0)]
        assert spreads(turns) == {DIRECT: {"bulk": Spread(3.0, 2.0, 4.0)}}

    def test_ratios_are_formed_in_each_round(self) -> None:
        turns = [
            # The machine was twice as fast in the second round: the ratio does not show it.
            *(turn(1, USERSPACE, bulk=1.0, udp=5.0), turn(1, HAPROXY, bulk=2.0)),
            *(turn(2, HAPROXY, bulk=4.0), turn(2, USERSPACE, bulk=2.0)),
            *(turn(3, USERSPACE, bulk=9.0), turn(3, HAPROXY, "bulk: it ended")),
        ]
        assert ratios(turns) == {"bulk": Spread(0.5, 0.5, 0.5)}

    def test_nothing_divides_by_zero(self) -> None:
        turns = [turn(1, USERSPACE, rss_each=1.0), turn(1, HAPROXY, rss_each=0.0)]
        assert ratios(turns) == {}

    def test_quantiles_are_values_that_occurred(self) -> None:
        values = [float(one) for one in range(1, 101)]
        assert [quantile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
        assert quantile([7.0], 0.99) == 7.0
        chance = random.Random(1)
        drawn = sorted(chance.random() for _ in range(1000))
        assert sum(one <= quantile(drawn, 0.9) for one in drawn) == 900


class TestTables:
    def test_a_row_for_each_figure_and_a_column_for_each_variant_that_ran(self) -> None:
        wanted = plan(DIRECT, USERSPACE, HAPROXY)
        turns = [
            turn(1, DIRECT, bulk=10.0, bulk_cpu=100.0),
            turn(1, HAPROXY, "bulk: hung"),
            turn(2, DIRECT, bulk=12.0, bulk_cpu=90.0),
            turn(2, HAPROXY, bulk=5.0, bulk_cpu=300.0, bulk_cpu_proxy=120.0),
        ]
        headings, rows = table(result(wanted, *turns, userspace="this vipd has no mode userspace"))
        assert headings == ("MEDIAN (MIN–MAX)", DIRECT, HAPROXY)
        assert rows == [
            ("bulk, Gbit/s", "11.00 (10.00–12.00)", "5.00 (5.00–5.00)"),
            ("CPU each Gbit, machine, ms", "95.0 (90.0–100.0)", "300.0 (300.0–300.0)"),
            ("CPU each Gbit, proxy, ms", "–", "120.0 (120.0–120.0)"),
        ]

    def test_what_failed_looks_different_from_what_does_not_apply(self) -> None:
        wanted = plan(DIRECT, HAPROXY, wanted=(Measure.NEW, Measure.UDP))
        turns = [turn(1, DIRECT, "new: hung", udp=9.0, udp_lost=0.0), turn(1, HAPROXY, new=8.0)]
        _, rows = table(result(wanted, *turns))
        assert [row[1:] for row in rows] == [
            ("failed", "8 (8–8)"),
            ("9 (9–9)", "–"),
            ("0.00 (0.00–0.00)", "–"),
        ]

    def test_ratio_lines_say_what_is_reached(self) -> None:
        wanted = plan(USERSPACE, HAPROXY, wanted=(Measure.KEPT,))
        turns = [
            turn(1, USERSPACE, kept=90.0, kept_cpu=3.0),
            turn(1, HAPROXY, kept=100.0, kept_cpu=2.0),
        ]
        headings, rows = ratio_table(result(wanted, *turns))
        assert headings == ("userspace/haproxy", "RATIO (MIN–MAX)", "MUST", "AIM", "REACHED")
        assert rows == [
            ("kept connections", "0.90 (0.90–0.90)", "≥ 0.8", "≥ 1", "must"),
            ("CPU each 1000 req, machine", "1.50 (1.50–1.50)", "", "", ""),
        ]

    def test_no_ratio_lines_without_both(self) -> None:
        turns = [turn(1, DIRECT, bulk=1.0), turn(1, HAPROXY, bulk=1.0)]
        assert ratio_table(result(plan(DIRECT, HAPROXY), *turns))[1] == []

    def test_failures_are_told_with_their_place(self) -> None:
        told = result(plan(DIRECT), turn(1, DIRECT, bulk=1.0), turn(2, DIRECT, "bulk: it hung"))
        assert told.failures == ("round 2 direct: bulk: it hung",)

    def test_what_a_variant_must_have(self) -> None:
        every = tuple(Measure)
        names = {one.name for one in FIGURES}
        assert set(expected(every, USERSPACE)) == names
        assert names - set(expected(every, HAPROXY)) == {"udp", "udp_lost"}
        forwarders = {"bulk_cpu_proxy", "kept_cpu_proxy", "rss_each", "rss_proxy", "pss_proxy"}
        assert names - set(expected(every, "nftables")) == forwarders
        assert names - set(expected(every, DIRECT)) == forwarders | {"rss", "pss"}
