"""The plans of IPVS and userspace mode for small programs and changes, word for word.

`VIPD_UPDATE_GOLDEN=1 pytest tests/golden` writes the files anew; the difference is for a reviewer.
The clusters are those of tests/cases. `fixed.txt` is what every program has: sets and rules.
"""

import os
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from tests.cases.test_resolve import FOLDER, events, read, stages

from vipd.backends.ipvs import plan as ipvs
from vipd.backends.ipvs.backend import IpvsCompiler
from vipd.backends.userspace import plan as userspace
from vipd.backends.userspace.backend import UserspaceCompiler
from vipd.proxy.resolve import resolve, update
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.virtualserver import NodeNetwork, PodSources

HERE = Path(__file__).parent
UPDATE = bool(os.environ.get("VIPD_UPDATE_GOLDEN"))
MODES: dict[str, tuple[Any, Any]] = {
    "ipvs": (IpvsCompiler(), ipvs.expected),
    "userspace": (UserspaceCompiler(), userspace.expected),
}
"""Compiler, and what is there where exactly a program is."""
CASES = (
    "affinity-on-every-address",
    "algorithms-with-weights",
    "both-policies-local",
    "cluster-ip-dual-stack",
    "endpoints-come-and-go",
    "internal-policy-local-nobody-here",
    "node-port-addresses-primary",
    "proxy-protocol-and-failing-endpoints",
    "source-ranges-with-the-node-inside",
)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def compare(mode: str, name: str, text: str) -> None:
    path = HERE / mode / f"{name}.txt"
    if UPDATE:
        path.write_text(text)
    assert path.read_text() == text


def test_the_fixed_rules_and_sets(mode: str) -> None:
    compiler, _ = MODES[mode]
    ranges = (ip_network("10.244.0.0/16"), ip_network("fd00:10:244::/48"))
    network = NodeNetwork(pod_sources=PodSources(cidrs=ranges))
    compare(mode, "fixed", str(compiler.plan(None, compiler.compile((), network))[0]))


@pytest.mark.parametrize("name", CASES)
def test_program_and_changes(mode: str, name: str) -> None:
    compiler, expected = MODES[mode]
    case = read(FOLDER / f"{name}.yaml")
    settings = case.node.settings()
    own = tuple(sorted(map(ip_address, ("192.168.0.1", "fd00:192:168::1")), key=str))
    snapshot, table, program = structs.replace(Snapshot(), own_addresses=own), None, None
    parts = []
    for step in stages(case):
        snapshot, touched = fold(snapshot, events(step.manifests, step.delete))
        if table is None or program is None:
            table = resolve(snapshot, settings)
            fixed = expected(compiler.compile((), table.network))
            wanted = compiler.compile(table.virtual_servers(), table.network)
            made, program = compiler.plan(fixed, wanted)
        else:
            table, changes = update(table, snapshot, settings, touched)
            made, program = compiler.plan_changes(program, changes)
        parts.append(_part(step.what, made))
    compare(mode, name, "\n".join(parts))


def test_no_file_is_left_over(mode: str) -> None:
    assert {path.stem for path in (HERE / mode).glob("*.txt")} == {"fixed", *CASES}


def _part(what: str, made: Any) -> str:
    """Return a plan's text; units stand in any order in a plan, here they are sorted."""
    units = sorted(made.units, key=lambda unit: unit.key.sort_key() if unit.key else (0,))
    return f"# {what} ({made.size} operations)\n{structs.replace(made, units=tuple(units))}"
