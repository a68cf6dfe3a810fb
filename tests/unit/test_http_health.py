"""/healthz and /livez over real HTTP, and what the health of a node is concluded from."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.unit.http_asking import ANYWHERE, World, ask, free_port, running
from tests.unit.test_sync import Rig, key
from tests.waiting import until

from vipd.proxy import dataplane as dataplane_module
from vipd.proxy.decode import decode
from vipd.proxy.errors import Busy, ConfigError, Rejected
from vipd.proxy.events import Applied, Deleted, Kind, Synced
from vipd.proxy.http import (
    listeners,
    server,  # noqa: F401 - so that no test waits for the import
    service,
)
from vipd.proxy.http.health import NEVER, TIMEOUT_SECONDS
from vipd.proxy.model import Node
from vipd.proxy.names import NamespacedName, parse_address
from vipd.proxy.settings import HttpSettings
from vipd.proxy.snapshot import Snapshot, fold

NOW = "2023-11-14T22:13:20.250000Z"
EARLIER = "2023-11-14T22:12:40Z"


def node(**more: Any) -> Node:
    told = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "n", **more.pop("metadata", {})},
        **more,
    }
    made = decode(json.dumps(told).encode(), "test")
    assert isinstance(made, Node)
    return made


DELETED = node(metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"})
TAINTED = node(spec={"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]})
CORDONED = node(
    spec={
        "unschedulable": True,
        "taints": [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}],
    }
)


async def test_healthy_from_the_start_before_anything_is_listed() -> None:
    async with running(World()) as world:
        healthz, livez = await world.ask("/healthz"), await world.ask("/livez")
    assert (healthz.status, livez.status) == (200, 200)
    assert healthz.headers["content-type"] == "application/json"
    assert healthz.headers["x-content-type-options"] == "nosniff"
    family = {"lastUpdated": NEVER, "healthy": True}
    document = {
        "lastUpdated": NOW,
        "currentTime": NOW,
        "healthy": True,
        "status": {"IPv4": family, "IPv6": family},
    }
    assert json.loads(healthz.body) == {**document, "nodeEligible": True}
    assert json.loads(livez.body) == document


async def test_a_change_that_waits_too_long_makes_it_unhealthy() -> None:
    async with running(World()) as world:
        world.updated_at = world.now - 40.25
        world.waiting_since = world.clock - TIMEOUT_SECONDS + 0.001
        assert (await world.ask("/healthz")).status == 200
        world.waiting_since = world.clock - TIMEOUT_SECONDS
        healthz, livez = await world.ask("/healthz"), await world.ask("/livez")
        assert (healthz.status, livez.status) == (503, 503)
        family = {"lastUpdated": EARLIER, "healthy": False}
        assert json.loads(healthz.body) == {
            "lastUpdated": EARLIER,
            "currentTime": NOW,
            "nodeEligible": True,
            "healthy": False,
            "status": {"IPv4": family, "IPv6": family},
        }
        world.waiting_since = None
        assert (await world.ask("/livez")).status == 200
        assert world.http.health.answers == {
            ("healthz", 200): 1,
            ("healthz", 503): 1,
            ("livez", 200): 1,
            ("livez", 503): 1,
        }


@pytest.mark.parametrize("one", [DELETED, TAINTED], ids=["deleted", "tainted"])
async def test_a_node_that_leaves_is_not_eligible_and_alive(one: Node) -> None:
    async with running(World()) as world:
        world.take(Applied(node()))
        assert (await world.ask("/healthz")).status == 200
        world.take(Applied(one))
        told = await world.ask("/healthz")
        assert told.status == 503
        said = json.loads(told.body)
        assert (said["nodeEligible"], said["healthy"]) == (False, True)
        assert (await world.ask("/livez")).status == 200
        world.take(Applied(node()))
        assert (await world.ask("/healthz")).status == 200


async def test_other_taints_do_not_count() -> None:
    async with running(World()) as world:
        world.take(Applied(CORDONED))
        assert (await world.ask("/healthz")).status == 200


async def test_a_node_that_is_gone_is_not_eligible() -> None:
    async with running(World(from_cluster=True)) as world:
        assert (await world.ask("/healthz")).status == 200, "nothing is known yet"
        world.take(Applied(node()))
        assert (await world.ask("/healthz")).status == 200
        world.take(Deleted(Kind.NODE, NamespacedName("", "n")))
        assert (await world.ask("/healthz")).status == 503


async def test_manifests_without_nodes_say_nothing_of_nodes() -> None:
    async with running(World()) as world:
        world.take()
        assert (await world.ask("/healthz")).status == 200
        world.take(Applied(Node(name="another")))
        assert (await world.ask("/healthz")).status == 503


def test_no_service_is_computed_again_when_a_node_leaves() -> None:
    before, _ = fold(Snapshot(), [Applied(node())])
    after, touched = fold(before, [Applied(TAINTED)])
    assert after.nodes["n"].leaving
    assert not touched.nodes
    _, touched = fold(
        after, [Applied(node(status={"addresses": []}, spec={"podCIDRs": ["10.0.0.0/8"]}))]
    )
    assert touched.nodes == {"n"}


class TestWhatWaits:
    """What the dataplane says of changes that are not committed."""

    @pytest.fixture(autouse=True)
    def _pauses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dataplane_module, "SHORTEST_PAUSE_SECONDS", 0.001)

    async def test_from_the_change_to_its_commit(self, tmp_path: Path) -> None:
        rig = Rig(tmp_path)
        before = rig.dataplane.waiting_since
        assert before is None
        rig.driver.gate.clear()
        rig.tell(*rig.service(1), Synced())
        await rig.until(lambda: rig.driver.commits)
        first = rig.dataplane.waiting_since
        assert first is not None
        rig.tell(*rig.service(2))
        await rig.until(lambda: len(rig.sync.snapshot.services) == 2)
        assert rig.dataplane.waiting_since == first, "the oldest counts"
        rig.driver.gate.set()
        await rig.until(lambda: rig.dataplane.waiting_since is None)
        assert set(rig.sync.table.claims) == {key(1), key(2)}
        rig.task.cancel()

    async def test_a_failing_commit_goes_on_waiting(self, tmp_path: Path) -> None:
        rig = Rig(tmp_path)
        rig.tell(*rig.service(1), Synced())
        await rig.until(lambda: rig.dataplane.synced)
        rig.driver.failures = [Busy("busy"), Busy("busy"), Rejected("x", "refused as a whole")]
        rig.tell(*rig.service(2))
        await rig.until(lambda: rig.dataplane.failed_syncs == 1)
        since = rig.dataplane.waiting_since
        assert since is not None
        await rig.until(lambda: rig.dataplane.given_up.is_set())
        assert rig.dataplane.waiting_since == since
        rig.tell(*rig.service(3))
        await rig.until(lambda: rig.dataplane.waiting_since is None)
        rig.task.cancel()

    async def test_what_the_kernel_alone_refuses_is_not_waited_for(self, tmp_path: Path) -> None:
        rig = Rig(tmp_path)
        rig.driver.rejected = {key(1): Rejected("x", "no")}
        rig.tell(*rig.service(1), Synced())
        await rig.until(lambda: rig.dataplane.rejected)
        assert rig.dataplane.waiting_since is None
        rig.task.cancel()

    async def test_a_repair_counts_until_it_is_done(self, tmp_path: Path) -> None:
        rig = Rig(tmp_path)
        rig.tell(*rig.service(1), Synced())
        await rig.until(lambda: rig.dataplane.synced)
        rig.driver.gate.clear()
        repair = asyncio.ensure_future(rig.dataplane.repair())
        await rig.until(lambda: rig.dataplane.waiting_since is not None)
        rig.tell(*rig.service(2))  # goes into the same commit
        rig.driver.gate.set()
        await repair
        await rig.until(lambda: rig.dataplane.waiting_since is None)
        rig.task.cancel()


class TestListening:
    async def test_a_taken_port_is_named_and_tried_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(service, "RETRY_SECONDS", 0.01)
        port = free_port()
        taken = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
        settings = HttpSettings(healthz=(parse_address("127.0.0.1"), port))
        async with running(World(settings)) as world:
            world.http.synced()
            (said,) = world.http.trouble()
            assert said.startswith(f"healthz cannot be listened for at 127.0.0.1:{port}: ")
            assert "in use" in said
            assert world.http.told() == ()
            taken.close()
            await until(lambda: not list(world.http.trouble()))
            assert (await ask("127.0.0.1", port, "/livez")).status == 200
            assert world.http.told() == (f"healthz 127.0.0.1:{port}",)

    async def test_a_failure_is_logged_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logged: list[dict[str, object]] = []
        monkeypatch.setattr(
            listeners.log, "warning", lambda event, **what: logged.append(what), raising=False
        )
        settings = HttpSettings(healthz=(parse_address("198.51.100.1"), 0))  # nobody's
        world = World(settings)
        world.http.open()
        world.http.open()
        assert [one["what"] for one in logged] == ["healthz"]
        await world.http.stop()

    async def test_where_it_has_to_listen_it_does_not_begin(self) -> None:
        settings = HttpSettings(metrics=(parse_address("198.51.100.1"), 80), must_bind=True)
        with pytest.raises(ConfigError, match=r"metrics address 198\.51\.100\.1:80: .*assign"):
            World(settings).http.open()

    async def test_it_moves_while_it_runs(self) -> None:
        async with running(World(ANYWHERE)) as world:
            world.http.synced()
            assert (await world.ask("/healthz")).status == 200
            old = world.http.places["healthz"][1]
            kept = world.http.places["metrics"]
            port = free_port("::1")
            await world.http.change(
                HttpSettings(healthz=(parse_address("::1"), port), metrics=ANYWHERE.metrics)
            )
            assert (await ask("::1", port, "/healthz")).status == 200
            assert world.http.places["metrics"] == kept
            with pytest.raises(ConnectionRefusedError):
                await ask("127.0.0.1", old, "/healthz")
            await world.http.change(HttpSettings())
            assert world.http.told() == ()
            with pytest.raises(ConnectionRefusedError):
                await ask("::1", port, "/healthz")

    def test_without_a_place_nothing_is_imported(self) -> None:
        script = (
            "import asyncio, sys\n"
            "from tests.unit.http_asking import World, running\n"
            "from vipd.proxy.settings import HttpSettings\n"
            "async def go():\n"
            "    async with running(World(HttpSettings())) as world:\n"
            "        world.take()\n"
            "        for _ in range(10): await asyncio.sleep(0)\n"
            "asyncio.run(go())\n"
            "assert 'aiohttp' not in sys.modules\n"
        )
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False
        )
        assert done.returncode == 0, done.stderr
