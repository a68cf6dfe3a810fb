"""What needs Debian's kernel: pytest in one virtual machine, and what came of it, file by file.

Elsewhere the same tests run on the host's kernel, where that has what they need.
"""

import os
import sys
from typing import NamedTuple

import pytest
from tests.netns.modes import EMULATED, IPVS
from tests.vm import machine
from tests.vm.kernel import Kernel
from tests.vm.report import STARTED, Outcome, outcomes

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(EMULATED, reason="this is the virtual machine"),
]

ALL = os.environ.get("VIPD_VM_TESTS") == "all"
"""Everything takes a quarter of an hour, more than a run of all tests may; so there is a choice."""
NEED_IPVS = (
    {
        "test_services": "ipvs",
        "test_cluster_ip": "ipvs",
        "test_external": "ipvs",
        "test_balancing": "ipvs",
        "test_ipvs_kernel": "ipvs",
        "test_repair": "ipvs",
        "test_switch": "TestEachPair and ipvs",
    }
    if ALL
    else {
        "test_ipvs_kernel": "textbook or others_have or keeps_its",
    }
)
"""Files of tests/netns, and what of each needs IPVS and is run here (as for `pytest -k`)."""
IN_ANY_CASE = {"test_services": "nftables"} if ALL else {}
"""What is run here also where the host has IPVS: nftables of another kernel version."""
LIMITS = machine.Limits(deadline=1800, silence=600)


class Run(NamedTuple):
    """What came of all of it."""

    status: int
    outcomes: tuple[Outcome, ...]


@pytest.fixture(scope="module")
def run(
    request: pytest.FixtureRequest, kernel: Kernel, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    results = tmp_path_factory.mktemp("vm")
    wanted = [*IN_ANY_CASE.items(), *(NEED_IPVS.items() if IPVS.obstacle() else ())]
    command = machine.pytest_command(
        kernel,
        *("-q", "-p", "tests.vm.report", "-p", "no:cacheprovider"),
        *("-k", " or ".join(f"({module} and {what})" for module, what in wanted)),
        *(f"tests/netns/{module}.py" for module in dict(wanted)),
    )
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # it takes minutes: let it be seen
        sys.stdout.write("\n")
        sys.stdout.flush()
        status = machine.run(kernel, command, results, LIMITS)
    return Run(status, tuple(outcomes(results)))


def test_the_machine_ran_to_its_end(run: Run) -> None:
    done = {one.test for one in run.outcomes if one.result != STARTED}
    left = [one.test for one in run.outcomes if one.test not in done]
    # 1 is pytest's status for tests that failed: those are told below.
    assert run.status in (0, 1), f"status {run.status}, in {left or 'no test'}"


@pytest.mark.parametrize("module", NEED_IPVS)
def test_on_debians_kernel(run: Run, module: str) -> None:
    mine = [one for one in run.outcomes if one.module == module]
    failed = [one for one in mine if one.result == "failed"]
    if failed:
        pytest.fail("\n\n".join(f"== {one.test}\n{one.text}" for one in failed), pytrace=False)
    if IPVS.obstacle() is None and module not in IN_ANY_CASE:
        pytest.skip("this kernel has IPVS: the tests ran on it directly")
    assert any(one.result == "passed" for one in mine), "nothing of this file ran"
