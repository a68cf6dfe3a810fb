"""The nft text of small programs and changes, word for word.

`VIPD_UPDATE_GOLDEN=1 pytest tests/golden` writes the files anew; the difference is for a reviewer.
The clusters are those of tests/cases. `pipeline.nft` is the constant part, which every program has;
the others show what the cluster adds to it, and each of its steps what changes.
"""

import os
from pathlib import Path

import pytest
from tests.cases.test_resolve import FOLDER, events, read, stages

from vipd.backends.nftables.plan import NftPlan, compile_program, expected, plan, plan_changes
from vipd.proxy.resolve import resolve, update
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.virtualserver import NodeNetwork

HERE = Path(__file__).parent
UPDATE = bool(os.environ.get("VIPD_UPDATE_GOLDEN"))
CASES = (
    "affinity-on-every-address",
    "algorithms-with-weights",
    "both-policies-local",
    "cluster-ip-dual-stack",
    "conflict-by-age",
    "endpoints-come-and-go",
    "internal-policy-local-nobody-here",
    "node-port-addresses-primary",
    "service-ranges",
    "source-ranges-with-the-node-inside",
    "weights",
)


def compare(name: str, text: str) -> None:
    path = HERE / f"{name}.nft"
    if UPDATE:
        path.write_text(text)
    assert path.read_text() == text


def test_the_constant_pipeline() -> None:
    compare("pipeline", str(plan(None, compile_program((), NodeNetwork()))[0]))


@pytest.mark.parametrize("name", CASES)
def test_program_and_changes(name: str) -> None:
    case = read(FOLDER / f"{name}.yaml")
    settings = case.node.settings()
    snapshot, table, program = Snapshot(), None, None
    parts = []
    for step in stages(case):
        snapshot, touched = fold(snapshot, events(step.manifests, step.delete))
        if table is None or program is None:
            table = resolve(snapshot, settings)
            constant = expected(compile_program((), table.network))
            made, program = plan(constant, compile_program(table.virtual_servers(), table.network))
        else:
            table, changes = update(table, snapshot, settings, touched)
            made, program = plan_changes(program, changes)
        parts.append(_part(step.what, made))
    compare(name, "\n".join(parts))


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in HERE.glob("*.nft")} == {"pipeline", *CASES}


def _part(what: str, made: NftPlan) -> str:
    """Return a plan's text; units stand in any order in a plan, here they are sorted."""
    units = sorted(made.units, key=lambda unit: unit.key.sort_key() if unit.key else (0,))
    made = NftPlan(made.prologue, tuple(units), made.garbage, made.whole)
    return f"# {what} ({made.size} objects)\n{made}"
