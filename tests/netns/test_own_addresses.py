"""The source of the node's own addresses, on a host of the lab."""

import asyncio

import pytest

from vipd.bench.lab import Lab
from vipd.proxy.names import Address, parse_address
from vipd.proxy.sources.addresses import events, read

pytestmark = pytest.mark.netns
MORE = "198.51.100.9"


def test_they_are_those_of_all_interfaces_but_loopback(lab: Lab) -> None:
    found = set(lab.run("node", read).addresses)
    assert found >= set(lab.node("node").addresses)
    assert not any(one.is_loopback for one in found)


def test_an_address_that_comes_or_goes_is_told(lab: Lab) -> None:
    def change(word: str) -> None:
        # With the other end of a link, which is not the node's.
        told = ["ip", "addr", word, MORE, "peer", "198.51.100.10/32", "dev", "node"]
        done = lab.exec("outside", told)
        assert done.returncode == 0, done.stderr

    async def watch() -> list[tuple[Address, ...]]:
        told = []
        async for (one,) in events():
            told.append(one.addresses)
            if len(told) == 3:
                return told
            await asyncio.to_thread(change, "add" if len(told) == 1 else "del")
        raise AssertionError("it ended")

    async def bounded() -> list[tuple[Address, ...]]:
        async with asyncio.timeout(20):
            return await watch()

    before, during, after = lab.run("outside", lambda: asyncio.run(bounded()))
    assert set(during) - set(before) == {parse_address(MORE)}
    assert after == before
