"""What the tests with real packets share: a lab for the session, a daemon for a module and mode.

A module with a wish for the daemon overrides `flags`; a test that starts, stops or breaks the
daemon takes `new_cluster` and must be in a module where nothing takes `cluster`.
"""

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from tests.netns.cluster import FLAVOURS, Cluster, Flavour
from tests.netns.modes import EMULATED, NFTABLES, Mode, kept, named
from tests.netns.planes import SHOWN, evidence, ours

from vipd.bench.lab import Lab, obstacle, running

_UNLIMITED = (
    ("ipv4/icmp_ratelimit", "0"),
    ("ipv4/icmp_ratemask", "0"),
    ("ipv6/icmp/ratelimit", "0"),
)
"""A node answers each peer with about one refusal a second, which tests in a row would meet."""


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "modes(*names): the modes of the daemon that a test is run in (tests/netns/modes.py)",
        "essential: run also where a mode or a machine is slow",
    ):
        config.addinivalue_line("markers", marker)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mode" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("modes")
        if marker is not None:
            metafunc.parametrize("mode", named(marker), ids=str, indirect=True, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = kept(items)
    if len(left) < len(items):
        config.hook.pytest_deselected(items=[one for one in items if one not in set(left)])
        items[:] = left


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a failure show what the kernel had at that moment: some of them cannot be repeated."""
    report = yield
    given = getattr(item, "funcargs", {})
    if report.when == "call" and report.failed and isinstance(given.get("lab"), Lab):
        report.sections += evidence(given["lab"])
        if isinstance(cluster := given.get("cluster"), Cluster):
            report.sections.append(("log of the daemon", cluster.daemon.log_tail(SHOWN)))
    return report


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
def mode(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mode]:
    """What the daemon is run as; nftables where the test does not say."""
    one: Mode = getattr(request, "param", NFTABLES)
    reason = one.obstacle()
    if reason is not None and EMULATED:
        pytest.fail(reason)
    elif reason is not None:
        pytest.skip(reason)
    with one.chosen(tmp_path_factory.mktemp("bin")):
        yield one


@pytest.fixture(scope="module")
def module_cluster(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory, mode: Mode, flags: tuple[str, ...]
) -> Iterator[Cluster]:
    built = Cluster(lab, tmp_path_factory.mktemp("vipd"), *flags, mode=mode.mode)
    try:
        built.start()
        yield built
    finally:
        built.stop()
        _wipe(built)


def _wipe(cluster: Cluster) -> None:
    cluster.wipe()
    assert ours(cluster.lab) == [], "this would meet the tests that come next"


@pytest.fixture
def cluster(module_cluster: Cluster) -> Iterator[Cluster]:
    """The module's daemon, with an empty folder for each test."""
    yield module_cluster
    module_cluster.clear()


@pytest.fixture
def new_cluster(lab: Lab, tmp_path: Path, mode: Mode) -> Iterator[Callable[..., Cluster]]:
    """Make a cluster with flags; its daemon is not started yet. One for each test."""
    made: list[Cluster] = []

    def make(*flags: str) -> Cluster:
        built = Cluster(lab, tmp_path, *flags, mode=mode.mode)
        made.append(built)
        return built

    yield make
    for one in made:
        one.stop()
        _wipe(one)


@pytest.fixture(params=FLAVOURS, ids=str)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    assert isinstance(request.param, Flavour)
    return request.param
