"""Folders that are watched, with the real kernel: what is told of each change, and what is not."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest

from vipd.proxy.inotify import Inotify, changes


def changed(watched: Inotify) -> set[str]:
    """Return what is told; events are there when the call that caused them has returned."""
    return watched.changed()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "x").write_text("")
    return root


def test_what_happens_to_a_file_is_told_by_its_path(tree: Path) -> None:
    watched = Inotify([str(tree)], recursive=True)
    file = tree / "a" / "b" / "x"
    for change in (
        lambda: file.write_text("more"),
        lambda: file.chmod(0o600),
        lambda: file.rename(tree / "a" / "b" / "y"),
        lambda: (tree / "a" / "b" / "y").rename(file),
        file.unlink,
        lambda: os.symlink("nowhere", file),
    ):
        change()
        assert str(file) in changed(watched)
        assert changed(watched) == set()
    watched.close()


def test_reading_is_no_change(tree: Path) -> None:
    watched = Inotify([str(tree)], recursive=True)
    (tree / "a" / "b" / "x").read_text()
    assert changed(watched) == set()
    watched.close()


def test_without_recursion_folders_below_are_not_watched(tree: Path) -> None:
    watched = Inotify([str(tree)], recursive=False)
    (tree / "a" / "b" / "x").write_text("more")
    (tree / "a" / "c").mkdir()
    assert changed(watched) == set()
    (tree / "y").write_text("")
    assert changed(watched) == {str(tree / "y")}
    watched.close()


def test_folders_that_come_are_watched_with_all_below(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    watched = Inotify([str(tree)], recursive=True)
    other.rename(tree / "new")
    assert changed(watched) == {str(tree / "new")}
    (tree / "new" / "deep" / "z").write_text("")
    assert str(tree / "new" / "deep" / "z") in changed(watched)
    os.symlink("new/deep", tree / "link")  # which has its path already
    (tree / "made").mkdir()
    assert changed(watched) == {str(tree / "link"), str(tree / "made")}
    (tree / "made" / "z").write_text("")
    assert str(tree / "made" / "z") in changed(watched)
    watched.close()


def test_another_name_of_a_folder_is_its_path_from_then_on(tree: Path) -> None:
    watched = Inotify([str(tree)], recursive=True)
    (tree / "a").rename(tree / "moved")
    assert {str(tree), str(tree / "a"), str(tree / "moved")} <= changed(watched)
    (tree / "moved" / "b" / "x").write_text("more")
    assert changed(watched) == {str(tree / "moved" / "b" / "x")}
    watched.close()


def test_a_link_that_leads_elsewhere_now_leaves_what_it_led_to_watched(tree: Path) -> None:
    """Where the link was the folder's path, the folder has another one then."""
    for name in ("v1", "v2"):
        (tree / name).mkdir()
    os.symlink("v1", tree / "current")
    watched = Inotify([str(tree)], recursive=True)
    (tree / "v1" / "x").write_text("")
    assert str(tree / "current" / "x") in changed(watched)
    os.symlink("v2", tree / "next")
    (tree / "next").rename(tree / "current")
    assert str(tree) in changed(watched)
    (tree / "v1" / "x").write_text("more")
    (tree / "v2" / "x").write_text("more")
    assert {str(tree / "v1" / "x"), str(tree / "current" / "x")} <= changed(watched)
    watched.close()


def test_links_that_lead_upwards_have_an_end(tree: Path) -> None:
    os.symlink("..", tree / "a" / "b" / "up")
    os.symlink(str(tree), tree / "a" / "self")
    watched = Inotify([str(tree)], recursive=True)
    (tree / "a" / "b" / "x").write_text("more")
    assert changed(watched) == {str(tree / "a" / "b" / "x")}
    watched.close()


def test_a_name_that_is_no_text_is_told_as_python_spells_it(tree: Path) -> None:
    watched = Inotify([str(tree)], recursive=True)
    name = os.fsencode(tree) + b"/\xff"
    with open(name, "wb"):
        pass
    assert changed(watched) == {os.fsdecode(name)}
    watched.close()


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        Inotify([str(tmp_path), str(tmp_path / "none")], recursive=False)
    assert os.listdir("/proc/self/fd") == before


def test_more_than_the_kernel_remembers_is_an_error(tree: Path) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    watched = Inotify([str(tree)], recursive=True)
    for number in range(most // 2 + 1):
        os.chmod(tree / "a" / "b" / "x", 0o600)  # two the same in a row would be one
        os.utime(tree / "a", (number, number))
    with pytest.raises(OSError, match="more changes than"):
        changed(watched)
    watched.close()


async def test_changes_that_come_together_are_told_together(tree: Path) -> None:
    async def write(told: AsyncGenerator[set[str], None]) -> set[str]:
        waiting = asyncio.ensure_future(anext(told))
        await asyncio.sleep(0)  # the watch stands
        for name in ("1", "2", "3"):
            (tree / name).write_text("")
        return await waiting

    async with asyncio.timeout(20), aclosing(_changes(tree)) as told:
        assert await write(told) == {str(tree / one) for one in ("1", "2", "3")}
        assert await write(told) == {str(tree / one) for one in ("1", "2", "3")}


async def test_a_watch_that_ends_leaves_no_descriptor(tree: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    told = _changes(tree)
    waiting = asyncio.ensure_future(anext(told))
    await asyncio.sleep(0)
    assert set(os.listdir("/proc/self/fd")) > before
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert set(os.listdir("/proc/self/fd")) == before


def _changes(tree: Path) -> AsyncGenerator[set[str], None]:
    return changes([str(tree)], recursive=True, quiet_seconds=0.003, longest_seconds=0.02)
