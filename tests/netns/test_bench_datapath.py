"""`vipd bench datapath` for real, a second each measure: every figure is there, however large."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vipd.bench import datapath_tools
from vipd.bench.datapath_plan import DIRECT, HAPROXY, Measure
from vipd.bench.datapath_report import expected
from vipd.bench.lab import obstacle
from vipd.bench.machine import machine
from vipd.proxy.cli.bench import bench

_MISSING = [
    datapath_tools.PACKAGES[tool]
    for tool in datapath_tools.needed(Measure)
    if datapath_tools.found(tool) is None
]
_OBSTACLE = obstacle() or (f"apt-get install {' '.join(_MISSING)}" if _MISSING else None)
pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(_OBSTACLE is not None, reason=_OBSTACLE or ""),
    pytest.mark.skipif("emulated" in machine(), reason="an emulated machine is no place for load"),
]
SHORT = ("datapath", "--rounds", "1", "--seconds", "1", "--idle", "50")


def test_every_figure_of_two_variants(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    wanted = ("--variants", f"{DIRECT},nftables", "--output", str(output))
    told = CliRunner().invoke(bench, [*SHORT, *wanted], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    (result,) = json.loads(output.read_bytes())["results"]
    assert result["unavailable"] == {}
    assert [turn["variant"] for turn in result["turns"]] == [DIRECT, "nftables"]
    for turn in result["turns"]:
        assert turn["failures"] == []
        figures = turn["figures"]
        assert set(figures) == set(expected(tuple(Measure), turn["variant"]))
        assert all(value > 0 for name, value in figures.items() if name != "udp_lost")


@pytest.mark.skipif(datapath_tools.found("haproxy") is None, reason="apt-get install haproxy")
def test_haproxy_has_what_a_forwarder_has(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    wanted = ("--variants", HAPROXY, "--measures", "memory,kept", "--output", str(output))
    told = CliRunner().invoke(bench, [*SHORT, *wanted], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    (result,) = json.loads(output.read_bytes())["results"]
    (turn,) = result["turns"]
    names = set(expected((Measure.MEMORY, Measure.KEPT), HAPROXY))
    assert set(turn["figures"]) == names
    assert {one["name"] for one in turn["processes"]} == {"haproxy"}


def test_a_missing_tool_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datapath_tools, "found", lambda tool: None if tool == "wrk" else "/bin/x")
    told = CliRunner().invoke(bench, [*SHORT, "--measures", "new"])
    assert str(told.exception) == "wrk not found: apt-get install wrk"


def test_a_variant_that_is_not_there_is_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    places = {tool: datapath_tools.found(tool) for tool in datapath_tools.PACKAGES}
    places["haproxy"] = None
    monkeypatch.setattr(datapath_tools, "found", places.get)
    output = tmp_path / "figures.json"
    wanted = ("--variants", f"{HAPROXY},{DIRECT}", "--measures", "kept", "--output", str(output))
    told = CliRunner().invoke(bench, [*SHORT, *wanted], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    (result,) = json.loads(output.read_bytes())["results"]
    assert result["unavailable"] == {HAPROXY: "apt-get install haproxy"}
    assert "without haproxy: apt-get install haproxy" in told.output
