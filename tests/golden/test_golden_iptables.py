"""What iptables-restore and ipset are told for small programs and changes, word for word.

`VIPD_UPDATE_GOLDEN=1 pytest tests/golden` writes the files anew; the difference is for a reviewer.
The clusters are those of tests/cases. `pipeline.txt` is the constant part, which every program has;
the others show what the cluster adds to it, and each of its steps what changes.
"""

import os
from pathlib import Path

import pytest
from tests.cases.test_resolve import FOLDER, events, read, stages

from vipd.backends.iptables.compile import program
from vipd.backends.iptables.observed import expected
from vipd.backends.iptables.plan import IptablesPlan, plan, plan_changes
from vipd.proxy.resolve import resolve, update
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.virtualserver import NodeNetwork

HERE = Path(__file__).parent / "iptables"
UPDATE = bool(os.environ.get("VIPD_UPDATE_GOLDEN"))
CASES = (
    "affinity-on-every-address",
    "algorithms-with-weights",
    "both-policies-local",
    "cluster-ip-dual-stack",
    "endpoints-come-and-go",
    "internal-policy-local-nobody-here",
    "node-port-addresses-primary",
    "service-ranges",
    "source-ranges-with-the-node-inside",
)


def compare(name: str, text: str) -> None:
    path = HERE / f"{name}.txt"
    if UPDATE:
        path.write_text(text)
    assert path.read_text() == text


def test_the_constant_pipeline() -> None:
    compare("pipeline", f"{plan(None, program((), NodeNetwork()))[0]}\n")


@pytest.mark.parametrize("name", CASES)
def test_program_and_changes(name: str) -> None:
    case = read(FOLDER / f"{name}.yaml")
    settings = case.node.settings()
    snapshot, table, programmed = Snapshot(), None, None
    parts = []
    for step in stages(case):
        snapshot, touched = fold(snapshot, events(step.manifests, step.delete))
        if table is None or programmed is None:
            table = resolve(snapshot, settings)
            constant = expected(program((), table.network))
            made, programmed = plan(constant, program(table.virtual_servers(), table.network))
        else:
            table, changes = update(table, snapshot, settings, touched)
            made, programmed = plan_changes(programmed, changes)
        parts.append(_part(step.what, made))
    compare(name, "\n".join(parts))


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == {"pipeline", *CASES}


def _part(what: str, made: IptablesPlan) -> str:
    return f"# {what} ({made.size} objects)\n{made}\n"
