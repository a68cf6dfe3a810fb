"""`vipd bench dns` for real, a second each measure: every figure is there, however large."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vipd.bench import dns_tools
from vipd.bench.dns_plan import COREDNS, DNSMASQ, VIPD, Measure, expected, figures_of
from vipd.bench.lab import obstacle
from vipd.bench.machine import machine
from vipd.proxy.cli.bench import bench

_OBSTACLE = obstacle()
pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(_OBSTACLE is not None, reason=_OBSTACLE or ""),
    pytest.mark.skipif("emulated" in machine(), reason="an emulated machine is no place for load"),
]
SHORT = (
    *("dns", "--rounds", "1", "--seconds", "1"),
    *("--services", "120", "--headless", "3", "--changes", "4", "--rate", "500"),
)


@pytest.mark.skipif(dns_tools.found("dnsperf") is None, reason="apt-get install dnsperf")
@pytest.mark.skipif(dns_tools.found("dnsmasq") is None, reason="apt-get install dnsmasq-base")
def test_every_figure_of_two_servers(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    known, latency = Measure.KNOWN, Measure.LATENCY
    measures = (Measure.START, known, latency, Measure.MEMORY, Measure.CHANGE, Measure.SYNC)
    wanted = ("--variants", f"{VIPD},{DNSMASQ}", "--measures", ",".join(measures))
    told = CliRunner().invoke(
        bench, [*SHORT, *wanted, "--output", str(output)], catch_exceptions=False
    )
    assert told.exit_code == 0, told.output
    (result,) = json.loads(output.read_bytes())["results"]
    assert [turn["variant"] for turn in result["turns"]] == [VIPD, DNSMASQ]
    for turn in result["turns"]:
        assert turn["failures"] == []
        of_variant = [one for one in measures if expected(one, turn["variant"])]
        names = {one.name for one in figures_of(of_variant)}
        # A second of little load may take no whole tick of the processor.
        assert names - {name for name in names if name.endswith("_cpu")} <= set(turn["figures"])
        assert all(value > 0 for value in turn["figures"].values())


def test_what_is_not_there_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dns_tools, "found", lambda _: None)
    told = CliRunner().invoke(bench, [*SHORT, "--measures", "known"])
    assert str(told.exception) == "`dnsperf` was not found: apt-get install dnsperf"
    output = tmp_path / "figures.json"
    wanted = ("--variants", f"{COREDNS},{DNSMASQ}", "--measures", "start")
    told = CliRunner().invoke(bench, [*SHORT, *wanted, "--output", str(output)])
    assert "no `coredns` on PATH" in str(told.exception)
    assert "apt-get install dnsmasq-base" in str(told.exception)
