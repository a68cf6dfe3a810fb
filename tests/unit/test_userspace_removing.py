"""What of userspace mode is removed once its connections have ended, and what stays."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from vipd.backends.local_routes import SeenRoute, Wanted
from vipd.backends.userspace.driver import UserspaceDriver
from vipd.backends.userspace.objects import (
    ADDRESSES,
    ROUTE_PROTOCOL,
    Element,
    Route,
    Thing,
    Value,
)
from vipd.proxy.errors import DataplaneError, Rejected
from vipd.proxy.names import Family, parse_address

STAYS, GOES = parse_address("10.96.0.9"), parse_address("10.96.0.10")


class Kernel:
    """Routes of which one cannot be removed, and what nft is told."""

    protocol = ROUTE_PROTOCOL

    def __init__(self) -> None:
        self.there = {STAYS, GOES}
        self.lasts = {STAYS}
        self.nft: list[str] = []

    def change(self, wanted: Sequence[Wanted]) -> dict[Wanted, DataplaneError]:
        failed = [one for one in wanted if one.address in self.lasts]
        self.there -= {one.address for one in wanted if one not in failed}
        return {one: Rejected(f"del {one.address}", "never") for one in failed}

    def listed(self) -> list[SeenRoute]:
        return [SeenRoute(one, ROUTE_PROTOCOL, "", True) for one in self.there]

    async def run(self, arguments: Sequence[str], text: str = "") -> bytes:
        self.nft += text.splitlines()
        return b""

    async def tables(self) -> frozenset[tuple[str, str]]:
        return frozenset({("ip", "vipd-userspace")})


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def driver(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UserspaceDriver:
    made = UserspaceDriver(state=tmp_path)
    monkeypatch.setattr(made, "_routes", kernel)
    monkeypatch.setattr(made, "_nft", kernel)
    return made


async def test_a_route_that_cannot_be_removed_keeps_its_guard_and_is_tried_again(
    driver: UserspaceDriver, kernel: Kernel
) -> None:
    stays: dict[Thing, Value] = {
        Route(Family.IPV4, STAYS): "",
        Element(Family.IPV4, ADDRESSES, str(STAYS)): "",
    }
    goes: dict[Thing, Value] = {
        Route(Family.IPV4, GOES): "",
        Element(Family.IPV4, ADDRESSES, str(GOES)): "",
    }
    driver._waiting = {**stays, **goes}
    await driver._remove_idle()
    assert (kernel.there, driver._waiting) == ({STAYS}, stays)
    assert str(GOES) in kernel.nft[-1]
    assert not [line for line in kernel.nft if f"{STAYS} " in line]
    kernel.lasts.clear()
    await driver._remove_idle()
    assert (kernel.there, driver._waiting) == (set(), {})
    assert str(STAYS) in kernel.nft[-1]


async def test_what_guards_an_address_stays_where_it_cannot_be_taken_from_the_node(
    driver: UserspaceDriver, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing() -> list[str]:
        return []

    monkeypatch.setattr(driver, "leftovers", nothing)
    with pytest.raises(Rejected):
        await driver.teardown()
    assert (kernel.there, kernel.nft) == ({STAYS}, [])
