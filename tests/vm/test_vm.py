"""What needs Debian's kernel: pytest in one virtual machine, and what came of it, file by file.

Elsewhere the same tests run on the host's kernel, where that has what they need.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from tests.netns.modes import EMULATED, IPVS
from tests.vm import machine
from tests.vm.initramfs import RESULTS
from tests.vm.kernel import Kernel

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(EMULATED, reason="this is the virtual machine"),
]

NEED_IPVS = {
    "test_services": "ipvs",
    "test_cluster_ip": "ipvs",
    "test_external": "ipvs",
    "test_balancing": "ipvs",
    "test_ipvs_kernel": "ipvs",
    "test_switch": "TestEachPair and ipvs",
}
"""Files of tests/netns, and what of each needs IPVS and is run here (as for `pytest -k`)."""
IN_ANY_CASE = {"test_services": "nftables"}
"""What is run here also where the host has IPVS: nftables of another kernel version."""
LIMITS = machine.Limits(deadline=1800, silence=240)


class Outcome(NamedTuple):
    """One test of the machine: passed, skipped or failed, with what pytest said about it."""

    module: str
    name: str
    result: str
    text: str = ""


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
        *("-q", f"--junitxml={RESULTS}/report.xml", "-p", "no:cacheprovider"),
        *("-k", " or ".join(f"({module} and {what})" for module, what in wanted)),
        *(f"tests/netns/{module}.py" for module in dict(wanted)),
    )
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # it takes minutes: let it be seen
        sys.stdout.write("\n")
        sys.stdout.flush()
        status = machine.run(kernel, command, results, LIMITS)
    return Run(status, tuple(_read(results / "report.xml")))


def _read(report: Path) -> Iterator[Outcome]:
    """The outcomes in a JUnit file, such as `pytest --junitxml` writes."""
    if not report.exists():
        return
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        module = case.get("classname", "").split(".")[2]
        told = next((one for one in case if one.tag in ("failure", "error", "skipped")), None)
        text = "" if told is None else told.text or told.get("message") or ""
        result = "passed" if told is None else told.tag
        yield Outcome(module, case.get("name", ""), result, text)


def test_the_machine_ran_to_its_end(run: Run) -> None:
    # 1 is pytest's status for tests that failed: those are told below.
    assert run.status in (0, 1), f"status {run.status}: see what it printed"


@pytest.mark.parametrize("module", NEED_IPVS)
def test_on_debians_kernel(run: Run, module: str) -> None:
    mine = [one for one in run.outcomes if one.module == module]
    failed = [one for one in mine if one.result in ("failure", "error")]
    if failed:
        pytest.fail("\n\n".join(f"== {one.name}\n{one.text}" for one in failed), pytrace=False)
    if IPVS.obstacle() is None and module not in IN_ANY_CASE:
        pytest.skip("this kernel has IPVS: the tests ran on it directly")
    assert any(one.result == "passed" for one in mine), "nothing of this file ran"
