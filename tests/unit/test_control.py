"""The control socket without a daemon: who may listen where, and what is answered."""

import asyncio
import socket
import stat
from pathlib import Path

import msgspec
import pytest

from vipd.proxy import control
from vipd.proxy.errors import ConfigError, ControlError, InUseError, QuestionError


async def hello(argument: str = "") -> object:
    return {"hello": "world"}


async def test_what_is_asked_is_answered(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with await control.serve(path, {"hello": hello}):
        assert await asyncio.to_thread(control.read, path, "hello") == b'{"hello":"world"}'
        with pytest.raises(ControlError, match="no request 'other'"):
            await asyncio.to_thread(control.read, path, "other")


async def test_what_stands_behind_the_name_is_its_argument(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def told(argument: str) -> object:
        if not argument:
            raise QuestionError("about what?")
        return argument

    async with await control.serve(path, {"tell": told}):
        said = await asyncio.to_thread(control.read, path, "tell", '{"a": "b c"}')
        assert msgspec.json.decode(said) == '{"a": "b c"}'
        with pytest.raises(ControlError, match=r"^about what\?$"):
            await asyncio.to_thread(control.read, path, "tell")


async def test_only_this_user_may_connect(tmp_path: Path) -> None:
    path = tmp_path / "below" / "s"
    async with await control.serve(str(path), {}):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_a_socket_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    async with await control.serve(path, {"hello": hello}):
        assert await asyncio.to_thread(control.read, path, "hello")


async def test_a_socket_that_answers_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with await control.serve(path, {"hello": hello}):
        with pytest.raises(InUseError, match="another vipd"):
            await control.serve(path, {})
        assert await asyncio.to_thread(control.read, path, "hello")


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir], ids=["file", "folder"])
async def test_anything_else_is_refused_and_left(tmp_path: Path, make: object) -> None:
    path = tmp_path / "precious"
    assert callable(make)
    make(path)
    with pytest.raises(ConfigError, match="exists and is no socket"):
        await control.serve(str(path), {})
    assert path.exists()


async def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is no socket"):
        await control.serve(str(tmp_path / "link"), {})


async def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        await control.serve(str(tmp_path / ("x" * 108)), {})


async def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--socket: .*file/s"):
        await control.serve(str(tmp_path / "file" / "s"), {})


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"is `vipd run` running\?"):
        control.read(str(tmp_path / "s"), "status")


def test_a_path_that_is_too_long_to_ask(tmp_path: Path) -> None:
    with pytest.raises(ControlError):
        control.read(str(tmp_path / ("x" * 108)), "status")


async def test_a_request_that_is_too_long_gets_no_answer(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with await control.serve(path, {"hello": hello}):
        with pytest.raises(ControlError):
            await asyncio.to_thread(control.read, path, "x" * 100_000)
        assert await asyncio.to_thread(control.read, path, "hello")
