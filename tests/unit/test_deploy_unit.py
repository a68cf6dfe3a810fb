"""deploy/vipd.service: systemd understands it, and it is as closed as the docs say."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/vipd.service"
PAGE = ROOT / "docs/configuration.md"
pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here"
)


def analyze(*arguments: str) -> str:
    ran = subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False
    )
    return ran.stdout + ran.stderr


def test_it_is_no_more_exposed_than_the_page_says() -> None:
    told = re.search(r"exposure level of (\d+\.\d)", PAGE.read_text())
    assert told is not None
    printed = analyze("security", "--offline=true", str(UNIT))
    found = re.search(r"exposure level for vipd.service: (\d+\.\d)", printed)
    assert found is not None, printed
    assert float(found[1]) <= float(told[1])


def test_systemd_knows_every_line(tmp_path: Path) -> None:
    copy = tmp_path / "vipd.service"
    # verify wants the programs to be there.
    copy.write_text(UNIT.read_text().replace("/usr/local/bin/vipd", "/bin/true"))
    lines = analyze("verify", "--man=no", str(copy)).splitlines()
    assert [line for line in lines if line.startswith(str(copy))] == []
