"""A real file that changes under a process: what is taken while running, and what is named."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tests.waiting import until

from vipd.proxy import reload
from vipd.proxy.config import Config, Flags, load
from vipd.proxy.errors import ConfigError
from vipd.proxy.events import Applied, Synced
from vipd.proxy.model import Service, ServicePort
from vipd.proxy.names import NamespacedName, Protocol, parse_address
from vipd.proxy.reload import Reloading, Take
from vipd.proxy.sync import OnUpdate, Sync
from vipd.proxy.virtualserver import Changes, Kind, Masquerade, Table

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
EXTERNAL = {Kind.EXTERNAL: Masquerade.ALWAYS}
VIPD = "---\napiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n"


class Followed:
    """A configuration as kubelet mounts a ConfigMap: a link to a folder that is replaced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self.heard: list[tuple[str, list[str]]] = []
        """What became of each reading: one write may be read twice."""
        self.notes: Callable[[], Iterator[str]]
        """What those who read the status are told."""
        self.path = folder / "config.conf"

    def write(self, text: str) -> None:
        self._number += 1
        data = self._folder / f"..{self._number}"
        data.mkdir()
        (data / "config.conf").write_text(text)
        draft = self._folder / "..draft"
        draft.symlink_to(data.name)
        draft.replace(self._folder / "..data")
        if not self.path.is_symlink():
            self.path.symlink_to("..data/config.conf")

    @asynccontextmanager
    async def by(self, sections: dict[str, Take], **flags: str) -> AsyncIterator[None]:
        """Follow it; what becomes of each change is in `heard`."""
        reloading = Reloading(
            Flags(config=str(self.path), **flags),  # type: ignore[arg-type]
            sections,
            lambda refused, restart: self.heard.append((refused, list(restart))),
        )
        self.notes = reloading.notes
        following = asyncio.ensure_future(reloading.run())
        await until(lambda: self.heard == [("", [])])
        yield
        following.cancel()

    async def says(self, *restart: str) -> None:
        """Wait until the last reading named these fields."""
        await until(lambda: self.heard[-1] == ("", list(restart)))


@pytest.fixture
def followed(tmp_path: Path) -> Followed:
    made = Followed(tmp_path)
    made.write(HEAD)
    return made


def with_a_service(on_update: OnUpdate) -> Sync:
    made = Sync(load(Flags(node_name="n")).node, on_update)
    port = ServicePort(name="", protocol=Protocol.TCP, port=80)
    addresses = (parse_address("10.96.0.1"),)
    name = NamespacedName("default", "web")
    made.take(
        [
            Applied(
                Service(
                    name=name,
                    cluster_ips=addresses,
                    external_ips=(parse_address("198.51.100.1"),),
                    ports=(port,),
                )
            ),
            Synced(),
        ]
    )
    return made


async def test_settings_of_the_table_are_taken_with_all_that_follows(
    followed: Followed,
) -> None:
    changed: list[Changes] = []

    def note(before: Table, changes: Changes) -> None:
        changed.append(changes)

    sync = with_a_service(note)

    async def take(config: Config) -> Sequence[str]:
        sync.change(config.node)
        return []

    fields = ("clusterCIDRs", "masqueradeAll", "nodePortAddresses", "serveExternalIPs")

    def how() -> dict[Kind, Masquerade]:
        return {one.kind: one.masquerade for one in sync.table.virtual_servers()}

    async with followed.by(dict.fromkeys(fields, take), node_name="n"):
        followed.write(f"{HEAD}clusterCIDR: 10.0.0.0/8\n")
        await until(lambda: how() == {Kind.CLUSTER: Masquerade.OFF_CLUSTER, **EXTERNAL})
        assert [str(one) for one in sync.table.network.pod_sources.cidrs] == ["10.0.0.0/8"]
        assert changed[-1].network == sync.table.network
        followed.write(f"{HEAD}iptables: {{masqueradeAll: true}}\n")
        await until(lambda: how() == {Kind.CLUSTER: Masquerade.ALWAYS, **EXTERNAL})
        assert not sync.table.network.pod_sources.cidrs
        followed.write(
            f"{HEAD}nodePortAddresses: [192.0.2.0/24]\n"
            "featureGates: {AllowServiceExternalIPs: false}\n"
        )
        await until(lambda: how() == {Kind.CLUSTER: Masquerade.NEVER})
        ranges = [str(one) for one in sync.table.network.node_port_ranges]
        assert ranges == ["192.0.2.0/24", "::/0"]


async def test_what_cannot_be_taken_is_named_as_the_file_spells_it(followed: Followed) -> None:
    async with followed.by({}):
        followed.write(
            f"{HEAD}clusterCIDR: 10.0.0.0/8\nhostnameOverride: other\nipvs: {{scheduler: lc}}\n"
            f"conntrack: {{min: 7}}\nbindAddressHardFail: true\n"
        )
        await followed.says(
            "hostnameOverride",
            "clusterCIDR",
            "ipvs.scheduler",
            "conntrack.min",
            "bindAddressHardFail",
        )
        followed.write(f"{HEAD}{VIPD}drainSeconds: 7\nmasqueradeBit: 3\n")
        await followed.says("masqueradeBit", "drainSeconds")
        followed.write(HEAD)
        await followed.says()


async def test_what_a_flag_says_does_not_change(followed: Followed) -> None:
    async with followed.by({}, cluster_cidr="10.1.0.0/16"):
        followed.write(f"{HEAD}clusterCIDR: 10.0.0.0/8\nmode: ipvs\n")
        await followed.says("mode")


async def test_what_follows_from_the_mode_waits_for_it(followed: Followed) -> None:
    """masqueradeAll of another section, node ports at other addresses: not by halves."""
    taken: list[Config] = []

    async def take(config: Config) -> Sequence[str]:
        taken.append(config)
        return []

    other = "mode: nftables\nnftables: {masqueradeAll: true}\n"
    async with followed.by(dict.fromkeys(("masqueradeAll", "nodePortAddresses"), take)):
        followed.write(HEAD + other)
        await followed.says("mode")
        assert taken == []
        followed.write(f"{HEAD}{other}iptables: {{masqueradeAll: true}}\n")
        await until(lambda: taken)
        assert (taken[-1].mode, taken[-1].node.masquerade_all) == ("nftables", True)
        assert taken[-1].node.node_port_addresses is not None
        followed.write(HEAD)
        await followed.says()


async def test_what_is_taken_of_a_file_that_is_refused_in_part_is_named(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "RETRY_SECONDS", 0.01)
    tried: list[Config] = []
    is_free = False

    async def take(config: Config) -> Sequence[str]:
        return []

    async def refuse(config: Config) -> Sequence[str]:
        tried.append(config)
        if not is_free:
            raise ConfigError("http.healthz", "the address is taken")
        return []

    def refused() -> set[str]:
        return {one for one in followed.notes() if "refused" in one}

    with capture_logs() as logs:
        async with followed.by({"drainSeconds": take, "http": refuse, "oomScoreAdj": take}):
            followed.write(f"{HEAD}{VIPD}drainSeconds: 7\nhttp: {{healthz: '192.0.2.1:1'}}\n")
            await until(lambda: len(tried) > 2)  # the refusal, and retries
            (told,) = refused()
            assert "is refused (taken of it: drainSeconds): http.healthz: the address" in told
            is_free = True
            await followed.says()
            assert refused() == set()
            is_free = False
            followed.write(f"{HEAD}{VIPD}drainSeconds: 7\nhttp: {{healthz: '192.0.2.2:1'}}\n")
            await until(refused)
            (told,) = refused()
            assert "is refused: http.healthz" in told
    said = [one for one in logs if "why" in one]
    first = [one for one in said if one.get("taken")]
    assert {one["taken"] for one in first} == {"drainSeconds"}
    assert {one["event"] for one in first} == {"configuration is taken in part; the rest stays"}
    assert said[-1]["event"] == "configuration is refused; the one before stays"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"{HEAD}mode: x\n", "mode: 'x' is no mode"),
        (f"{HEAD}oomScoreAdj: low\n", "oomScoreAdj: Expected"),
        (f"{HEAD}mode: [\n", "not YAML"),
        ("kind: Other\n", "kind is 'Other'"),
    ],
)
async def test_a_broken_file_changes_nothing(followed: Followed, text: str, why: str) -> None:
    taken: list[Config] = []

    async def take(config: Config) -> Sequence[str]:
        taken.append(config)
        return []

    async with followed.by({"masqueradeAll": take}):
        followed.write(text.replace(HEAD, f"{HEAD}iptables: {{masqueradeAll: true}}\n"))
        await until(lambda: followed.heard[-1][0])
        refused, restart = followed.heard[-1]
        assert f"{followed.path}: {why}" in refused
        assert (restart, taken) == ([], [])
        followed.write(f"{HEAD}iptables: {{masqueradeAll: true}}\n")
        await followed.says()
        assert [one.node.masquerade_all for one in taken] == [True]


async def test_what_has_no_effect_is_named_once(followed: Followed) -> None:
    followed.write(f"{HEAD}portRange: 1-2\n")
    with capture_logs() as logs:
        async with followed.by({}):
            for mode in ("ipvs", "nftables"):
                text = f"portRange: 1-2\nenableProfiling: true\nmode: {mode}\n"
                followed.write(f"{HEAD}{text}")
                await followed.says("mode")
    told = [one["where"] for one in logs if one["event"] == "configuration without effect"]
    assert told == [f"{followed.path}: enableProfiling"]
