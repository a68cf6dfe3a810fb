"""A pytest plugin for the machine: writes down each outcome at once, so that a machine that is
killed has told what it did. Must not: be loaded elsewhere."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.vm.initramfs import RESULTS

NAME = "outcomes"
STARTED = "started"


class Outcome(NamedTuple):
    """One test: started, passed, skipped or failed, with what pytest said about it."""

    test: str
    result: str
    text: str = ""

    @property
    def module(self) -> str:
        return Path(self.test.partition("::")[0]).stem


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(Outcome(nodeid, STARTED))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        _write(Outcome(report.nodeid, report.outcome, "" if report.passed else report.longreprtext))


def _write(outcome: Outcome) -> None:
    with Path(RESULTS, NAME).open("a") as outcomes:
        outcomes.write(json.dumps(outcome) + "\n")


def outcomes(results: Path) -> Iterator[Outcome]:
    """What a machine has written, from outside."""
    path = results / NAME
    for line in path.read_text().splitlines() if path.exists() else ():
        yield Outcome(*json.loads(line))
