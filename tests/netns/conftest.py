"""What the tests with real packets share: one lab for the session, one daemon for a module.

A module with a wish for the daemon overrides `flags`; a test that starts, stops or breaks the
daemon takes `new_cluster` and must be in a module where nothing takes `cluster`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.netns.cluster import FLAVOURS, Cluster, Flavour

from vipd.bench.lab import Lab, obstacle, running

_UNLIMITED = (
    ("ipv4/icmp_ratelimit", "0"),
    ("ipv4/icmp_ratemask", "0"),
    ("ipv6/icmp/ratelimit", "0"),
)
"""A node answers each peer with about one refusal a second, which tests in a row would meet."""


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    reason = obstacle()
    if reason is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    with running(f"vt{os.getpid()}") as built:
        for host in ("node", "outside"):
            built.run(host, _lift_limits)
        yield built


def _lift_limits() -> None:
    for name, value in _UNLIMITED:
        Path("/proc/sys/net", name).write_text(value)


@pytest.fixture(scope="module")
def flags() -> tuple[str, ...]:
    """Flags of the module's daemon."""
    return ()


@pytest.fixture(scope="module")
def module_cluster(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory, flags: tuple[str, ...]
) -> Iterator[Cluster]:
    built = Cluster(lab, tmp_path_factory.mktemp("vipd"), *flags)
    yield from _running(built)


@pytest.fixture
def cluster(module_cluster: Cluster) -> Iterator[Cluster]:
    """The module's daemon, with an empty folder for each test."""
    yield module_cluster
    module_cluster.clear()


@pytest.fixture
def new_cluster(lab: Lab, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Make a cluster with flags; its daemon is not started yet. One for each test."""
    made: list[Cluster] = []

    def make(*flags: str) -> Cluster:
        built = Cluster(lab, tmp_path, *flags)
        made.append(built)
        return built

    yield make
    for one in made:
        one.stop()
        one.nft("flush", "ruleset")


def _running(cluster: Cluster) -> Iterator[Cluster]:
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        cluster.nft("flush", "ruleset")


@pytest.fixture(params=FLAVOURS, ids=str)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    assert isinstance(request.param, Flavour)
    return request.param
