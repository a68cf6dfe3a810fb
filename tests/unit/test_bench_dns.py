"""The DNS bench's arithmetic: that all servers are told the same names, what is parsed and told."""

from pathlib import Path, PurePath

import dns.message
import dns.rrset
import dns.zone
import pytest
from tests.unit.dns_zone_facts import read

from vipd.bench import dns_configurations, dns_upstream
from vipd.bench.datapath_printed import Unreadable
from vipd.bench.datapath_report import Turn
from vipd.bench.dns_cluster import SUFFIX, Cluster, headless, name_of, services
from vipd.bench.dns_plan import (
    COREDNS,
    DNSMASQ,
    DOMAIN,
    FIGURES,
    KNOT,
    TARGETS,
    UNBOUND,
    VARIANTS,
    VIPD,
    Measure,
    Plan,
    expected,
)
from vipd.bench.dns_questions import Asked, dnsperf, questions, rcodes, wire_questions
from vipd.bench.dns_report import Result, ratio_table, result, table, target_table
from vipd.dns.answer import Answers
from vipd.dns.facts import facts_of
from vipd.dns.zone import Zone
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.sources.manifests import load

PRINTED = """\
Statistics:

  Queries sent:         12000
  Queries completed:    11990 (99.92%)
  Queries lost:         10 (0.08%)

  Response codes:       NOERROR 11000 (91.74%), NXDOMAIN 990 (8.26%)
  Average packet size:  request 46, response 62
  Run time (s):         2.000000
  Queries per second:   5995.000000

  Average Latency (s):  0.001000 (min 0.000100, max 0.010000)
"""


def plan(*variants: str, measures: tuple[Measure, ...] = tuple(Measure)) -> Plan:
    return Plan(
        variants=variants or VARIANTS,
        measures=measures,
        rounds=2,
        seconds=1,
        services=100,
        headless=3,
        rate=1000,
        changes=4,
    )


def turn(number: int, variant: str, *failures: str, **figures: float) -> Turn:
    return Turn(round=number, variant=variant, figures=figures, failures=failures)


def run(*turns: Turn, wanted: Plan | None = None, **missing: str) -> Result:
    return result(wanted or plan(), {"dnsperf": "2.10.0"}, 0.0, missing, list(turns))


class TestSameNames:
    @pytest.mark.parametrize("cluster", [services(7), headless(5)], ids=["services", "headless"])
    def test_vipd_answers_what_the_others_are_told(self, cluster: Cluster, tmp_path: Path) -> None:
        (tmp_path / "cluster.json").write_bytes(cluster.manifests)
        snapshot, touched = fold(Snapshot(), load([str(tmp_path / "cluster.json")]))
        zone = Zone()
        for name in touched.services:
            facts = facts_of(snapshot.services[name], snapshot.slices.get(name, ()))
            assert facts is not None
            zone.put(facts)
        zone.synced = True
        answers = Answers(zone)
        wanted: dict[tuple[str, str], set[str]] = {}
        for one in cluster.records:
            wanted.setdefault((one.owner, one.type), set()).add(one.data)
        for (owner, kind), data in wanted.items():
            answer = read(answers.udp(dns.message.make_query(owner, kind).to_wire())).answer
            assert {one.to_text().removesuffix(".") for one in answer[0]} == data

    def test_a_zone_file_holds_them(self) -> None:
        cluster = services(3)
        zone = dns.zone.from_text(dns_configurations.zone(cluster.records), f"{DOMAIN}.")
        for one in cluster.records:
            found = zone.find_rdataset(f"{one.owner}.", one.type)
            assert [data.to_text(zone.origin, relativize=False) for data in found] == [
                one.data if one.type == "A" else f"{one.data}."
            ]

    @pytest.mark.parametrize("variant", [UNBOUND, KNOT, DNSMASQ, COREDNS])
    def test_each_configuration_holds_them(self, variant: str) -> None:
        cluster = services(3)
        made = dns_configurations.setup(
            variant, cluster.records, "192.0.2.1", "192.0.2.9", PurePath("/folder")
        )
        text = "".join(made.files.values())
        assert "192.0.2.1" in text
        assert ("192.0.2.9" in text) == expected(Measure.FORWARDED, variant)
        for one in cluster.records:
            line = next(line for line in text.splitlines() if one.owner in line)
            assert all(word in text for word in one.data.split()), line


class TestQuestions:
    def test_known_names_are_all_of_them_in_random_order(self) -> None:
        found = questions(Measure.KNOWN, 50)
        assert sorted(found) == sorted(f"{name_of(number)} A" for number in range(50))
        assert found != [f"{name_of(number)} A" for number in range(50)]
        assert questions(Measure.TCP, 50) == found

    def test_unknown_names_are_unknown(self) -> None:
        known = {one.owner for one in services(50).records}
        assert not known & {one.split()[0] for one in questions(Measure.UNKNOWN, 50)}

    def test_mixed_ones_have_pairs_misses_and_srv(self) -> None:
        found = questions(Measure.MIXED, 500)
        known = [one for one in found if one.split()[0] in {name_of(n) for n in range(500)}]
        assert len([one for one in known if one.endswith(" A")]) * 2 == len(known)
        assert any(one.endswith(" SRV") for one in found)
        assert any(one.split()[0].endswith(f".{SUFFIX}.{SUFFIX}") for one in found)

    def test_on_the_wire(self) -> None:
        (made,) = wire_questions(["a-1.example A"])
        message = dns.message.from_wire(b"\x00\x07" + made)
        assert message.question == [dns.rrset.from_text("a-1.example.", 0, "IN", "A")]

    def test_the_upstream_knows_every_name(self) -> None:
        asked = dns.message.make_query("WWW.Example.com", "A", use_edns=0)
        reply = dns.message.from_wire(dns_upstream.reply(asked.to_wire()))
        assert asked.is_response(reply)
        assert reply.answer[0].to_text() == "WWW.Example.com. 3600 IN A 192.0.2.1"
        nothing = dns_upstream.reply(dns.message.make_query("example.com", "AAAA").to_wire())
        assert not dns.message.from_wire(nothing).answer


class TestDnsperf:
    def test_its_statistics(self) -> None:
        told = dnsperf(PRINTED)
        assert told == Asked(11990, 10, 2.0, {"NOERROR": 11000, "NXDOMAIN": 990})
        assert told.rate == 5995

    @pytest.mark.parametrize("printed", ["", PRINTED.replace("11990", "0"), "[Error] unable"])
    def test_without_an_answer_there_is_no_figure(self, printed: str) -> None:
        with pytest.raises(Unreadable):
            dnsperf(printed)

    def test_answers_have_to_be_the_right_ones(self) -> None:
        told = dnsperf(PRINTED)
        assert told.problem(rcodes(Measure.MIXED)) is None
        assert told.problem(rcodes(Measure.KNOWN)) == "answers with NXDOMAIN 990"
        assert told.problem(rcodes(Measure.UNKNOWN)) == "answers with NOERROR 11000"
        many = Asked(1000, 2, 1.0, {"NOERROR": 1000})
        assert many.problem(rcodes(Measure.KNOWN)) == "2 questions lost, 1000 answered"


class TestReport:
    def test_each_measure_has_a_figure_and_each_target_one(self) -> None:
        assert {one.measure for one in FIGURES} == set(Measure)
        assert set(TARGETS) <= {one.name for one in FIGURES}

    def test_what_a_server_does_not_do_is_no_failure(self) -> None:
        headings, rows = table(run(turn(1, VIPD, known=5.0), turn(1, KNOT, known=4.0)))
        cells = {row[0]: row[1:] for row in rows}
        assert headings == ("MEDIAN (MIN–MAX)", VIPD, KNOT)
        assert cells["known names, /s"] == ("5 (5–5)", "4 (4–4)")
        assert cells["forwarded, cached, /s"] == ("failed", "–")
        assert cells["change p99, ms"] == ("failed", "–")

    def test_ratios_are_formed_within_rounds(self) -> None:
        told = run(
            turn(1, VIPD, known=50.0),
            turn(1, UNBOUND, known=100.0),
            turn(2, VIPD, known=90.0),
            turn(2, UNBOUND, known=90.0),
            wanted=plan(VIPD, UNBOUND, measures=(Measure.KNOWN,)),
        )
        assert ratio_table(told) == (
            ("RATIO OF VIPD TO", UNBOUND),
            [("known names", "0.75 (0.50–1.00)")],
        )

    def test_targets(self) -> None:
        told = run(
            turn(1, VIPD, known=70_000.0, change_p99=4.0, rss=100.0),
            turn(1, UNBOUND, known=70_000.0),
        )
        _, rows = target_table(told)
        assert [(row[0], row[-1]) for row in rows] == [
            ("known names, /s", "must"),
            ("known names, to unbound", "aim"),
            ("memory, MB", "missed"),
            ("change p99, ms", "aim"),
        ]

    def test_failures_say_where(self) -> None:
        told = run(turn(2, KNOT, "tcp: 3 questions lost, 5 answered"), coredns="not there")
        assert told.failures == ("round 2 knot: tcp: 3 questions lost, 5 answered",)
        assert told.ratios.keys() == {UNBOUND, KNOT, DNSMASQ}
