"""Recorded sysctls: old values come back, whoever is killed when."""

from pathlib import Path

import pytest

from vipd.backends import sysctl
from vipd.backends.sysctl import Setting, Sysctls

ONE = Setting("net/one", "1", "a reason")
KEPT = Setting("net/kept", "1", "a reason", keep=True)
ABSENT = Setting("net/absent", "1", "a reason")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "net").mkdir()
    (tmp_path / "net/one").write_text("0\n")
    (tmp_path / "net/kept").write_text("0\n")
    return tmp_path


def test_what_was_changed_comes_back_and_what_is_to_be_kept_stays(root: Path) -> None:
    made = Sysctls(root / "run/record", root)
    assert made.apply([ONE, KEPT]) == {}
    assert (root / "net/one").read_text() == "1"
    again = Sysctls(root / "run/record", root)
    again.apply([ONE])
    assert again.changed() == ["net.one back to 0"]
    assert again.restore() == ["net.one back to 0"]
    assert (root / "net/one").read_text() == "0"
    assert (root / "net/kept").read_text() == "1"
    assert again.restore() == []


def test_what_cannot_be_written_is_told_and_the_rest_is_done(root: Path) -> None:
    failed = Sysctls(root / "run/record", root).apply([ABSENT, ONE])
    assert list(failed) == [ABSENT]
    assert (root / "net/one").read_text() == "1"


def test_what_somebody_has_changed_since_is_left_alone(root: Path) -> None:
    made = Sysctls(root / "run/record", root)
    made.apply([ONE])
    (root / "net/one").write_text("2")
    assert made.restore() == []
    assert (root / "net/one").read_text() == "2"


def test_the_hosts_folder_is_taken_where_it_is_mounted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysctl, "MOUNTED", root)
    assert Sysctls(tmp_path / "run/record").apply([ONE]) == {}
    assert (root / "net/one").read_text() == "1"
