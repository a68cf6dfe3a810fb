"""The log of a worker."""

import json
import os
import select
from collections.abc import Callable
from pathlib import Path

import pytest

from vipd.backends import log


@pytest.fixture(autouse=True)
def as_text() -> None:
    log.configure("text")


def test_a_line_is_read_as_those_of_the_daemon() -> None:
    text = log.line("warning", "accept is paused", {"lack_of": "EMFILE", "connections": 3})
    timestamp, rest = text.split(" ", 1)
    assert timestamp.startswith("timestamp=20")
    assert timestamp.endswith("Z")
    assert rest == 'level=warning event="accept is paused" lack_of=EMFILE connections=3'


@pytest.mark.parametrize(
    ("value", "spelled"),
    [("a=b", '"a=b"'), ('a"b', '"a\\"b"'), ("a\nb", "a\\nb"), ("", ""), (None, "None")],
)
def test_a_fact_stays_one_word_and_one_line(value: object, spelled: str) -> None:
    assert log.line("warning", "x", {"why": value}).endswith(f" why={spelled}")


def test_json_holds_whatever_a_fact_is() -> None:
    log.configure("json")
    try:
        told = json.loads(log.line("warning", "x y", {"who": Path("x"), "number": 3}))
    finally:
        log.configure("text")
    assert (told["event"], told["who"], told["number"]) == ("x y", "x", 3)


def test_an_exception_comes_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "write", lines.append)
    try:
        int("one")
    except ValueError:
        log.exception("broken", place="here")
    (line,) = lines
    assert "level=error event=broken place=here exception=" in line
    assert "ValueError: invalid literal" in line


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    reads, writes = os.pipe()
    monkeypatch.setattr(log, "_STDERR", writes)
    return reads, writes


def full(writes: int) -> None:
    os.set_blocking(writes, False)
    while True:
        try:
            os.write(writes, bytes(select.PIPE_BUF))
        except BlockingIOError:
            os.set_blocking(writes, True)
            return


@pytest.mark.parametrize("hinder", [full, os.close])
def test_a_line_that_nobody_takes_stops_nothing(
    pipe: tuple[int, int], hinder: Callable[[int], None]
) -> None:
    reads, writes = pipe
    hinder(writes)
    log.write("x")
    os.close(reads)


def test_a_line_without_readers_is_lost(pipe: tuple[int, int]) -> None:
    reads, writes = pipe
    os.close(reads)
    log.write("x")
    os.close(writes)


def test_a_line_is_never_longer_than_a_pipe_takes_at_once(pipe: tuple[int, int]) -> None:
    reads, writes = pipe
    log.write("x" * (2 * select.PIPE_BUF))
    log.write("y")
    os.close(writes)
    with open(reads, "rb") as told:
        first, second = told.read().splitlines()
    assert len(first) == select.PIPE_BUF - 1
    assert second == b"y"
