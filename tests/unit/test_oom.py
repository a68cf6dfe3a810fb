"""oom_score_adj of this process, through the real file."""

import subprocess
import sys

import pytest
from structlog.testing import capture_logs

from vipd.proxy import oom

PROGRAM = "from vipd.proxy import oom; oom.adjust({}); print(open(oom.PATH).read())"


@pytest.mark.parametrize(("score", "found"), [(500, "500"), (1000, "1000")])
def test_it_is_set(score: int, found: str) -> None:
    told = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM.format(score)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == found


def test_what_is_not_said_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oom, "PATH", "/proc/none")
    with capture_logs() as logs:
        oom.adjust(None)
    assert logs == []


def test_a_failure_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oom, "PATH", "/proc/none/oom_score_adj")
    with capture_logs() as logs:
        oom.adjust(-999)
    (told,) = logs
    assert (told["log_level"], told["asked"]) == ("warning", -999)
    assert told["why"] == "No such file or directory"
