"""Files, folders and standard input as a source; real files, really watched."""

import asyncio
import io
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vipd.proxy.decode import Bytes, Decoded, Head, decode
from vipd.proxy.errors import SourceError
from vipd.proxy.events import Applied, Deleted, Event, Kind, Problem, Synced, name_of
from vipd.proxy.model import Service
from vipd.proxy.sources.files import content
from vipd.proxy.sources.manifests import ManifestSource, load
from vipd.proxy.sources.reading import SETTLE_SECONDS, Reading


def text(*names: str, port: int = 80, ip: str = "10.0.0.1") -> str:
    return "".join(
        f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n"
        f"spec: {{clusterIP: {ip}, ports: [{{port: {port}}}]}}\n"
        for name in names
    )


def names(events: list[Event]) -> list[str]:
    return [name_of(event.object).name for event in events if isinstance(event, Applied)]


def problems(events: list[Event]) -> list[Problem]:
    return [event for event in events if isinstance(event, Problem)]


class World:
    """What the events of a watched source add up to."""

    def __init__(self, *paths: Path) -> None:
        self.source = ManifestSource([str(path) for path in paths])
        self.batches: AsyncIterator[list[Event]] = self.source.events()
        self.objects: dict[str, object] = {}
        self.problems: dict[str, str] = {}
        self.events: list[Event] = []

    async def step(self) -> list[Event]:
        async with asyncio.timeout(20):
            events = await anext(self.batches)
        for event in events:
            if isinstance(event, Applied):
                self.objects[name_of(event.object).name] = event.object
            elif isinstance(event, Deleted):
                del self.objects[event.name.name]
            elif isinstance(event, Problem) and event.error is None:
                del self.problems[event.key]
            elif isinstance(event, Problem):
                self.problems[event.key] = str(event.error)
        self.events += events
        return events

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not true():
                await self.step()

    async def holds(self, *expected: str) -> None:
        await self.until(lambda: sorted(self.objects) == sorted(expected))

    def port(self, name: str) -> int:
        found = self.objects[name]
        assert isinstance(found, Service)
        return found.ports[0].port


@pytest.fixture
async def watch(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., World]]:
    # Else a change that the watch misses would be found after ten seconds, and no test would fail.
    monkeypatch.setattr("vipd.proxy.sources.manifests.LOOK_AROUND_SECONDS", 3600.0)
    worlds: list[World] = []

    def start(*paths: Path) -> World:
        worlds.append(World(*paths))
        return worlds[-1]

    yield start
    for world in worlds:
        await world.batches.aclose()  # type: ignore[attr-defined]


Watcher = Callable[..., World]


def test_folders_suffixes_and_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.yaml").write_text(text("b"))
    (tmp_path / "sub/c.yml").write_text(text("c"))
    (tmp_path / "a.json").write_text(
        '{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}'
    )
    for hidden in (".b.yaml.swp", ".#b.yaml", "notes.txt", "b.yaml~"):
        (tmp_path / hidden).write_text("a: [")
    events = load([str(tmp_path)])
    assert names(events) == ["a", "b", "c"]
    assert events[-1] == Synced()
    assert not problems(events)


@pytest.mark.parametrize(
    "empty", ["", "---\n", "# nothing\n", "\n---\n---\n...\n", "%YAML 1.2\n---\n"]
)
def test_empty_files_are_fine(tmp_path: Path, empty: str) -> None:
    (tmp_path / "a.yaml").write_text(empty)
    assert load([str(tmp_path)]) == [Synced()]


@pytest.mark.parametrize("kind", ["json", "yaml"])
@pytest.mark.parametrize("typed", [False, True])
def test_lists(tmp_path: Path, kind: str, typed: bool) -> None:
    head = "" if typed else '"apiVersion": "v1", "kind": "Service", '
    items = ", ".join(
        f'{{{head}"metadata": {{"name": "{n}"}}, "spec": {{"ports": [{{"port": 1}}]}}}}'
        for n in "ab"
    )
    name = "ServiceList" if typed else "List"
    whole = f'"apiVersion": "v1", "items": [{items}], "kind": "{name}"'
    (tmp_path / f"a.{kind}").write_text(f"{{{whole}}}" if kind == "json" else f"--- {{{whole}}}")
    assert names(load([str(tmp_path)])) == ["a", "b"]


def test_json_after_json(tmp_path: Path) -> None:
    one = '{"apiVersion": "v1", "kind": "Namespace",\n "metadata": {"name": "%s"}}'
    (tmp_path / "a.json").write_text((one % "a") + "\n" + (one % "é") + (one % "b"))
    events = load([str(tmp_path)])
    assert names(events) == ["a", "b"]
    (problem,) = problems(events)
    assert "document 2" in str(problem.error)


def test_types_of_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "apiVersion: v1\nkind: Service\n"
        "metadata: {name: on, creationTimestamp: 2026-01-02T03:04:05Z, annotations: {b: '80'}}\n"
        "x: &x {port: 80}\n"
        "spec:\n  selector: {a: yes, b: 1_000, c: '80', d: no}\n"
        "  ports: [{<<: *x, nodePort: 0o14}]\n"
    )
    (event, _) = load([str(tmp_path)])
    assert isinstance(event, Applied)
    assert isinstance(event.object, Service)
    assert event.object.selector == (("a", "yes"), ("b", "1_000"), ("c", "80"), ("d", "no"))
    assert event.object.ports[0].port == 80
    assert event.object.ports[0].node_port == 12
    assert event.object.created is not None


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text(text("a"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text("b").encode())))
    assert names(load(["-", str(tmp_path)])) == ["b", "a"]


async def test_other_kinds_are_counted(tmp_path: Path, watch: Watcher) -> None:
    (tmp_path / "a.yaml").write_text(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\n" + text("b")
    )
    world = watch(tmp_path)
    assert names(await world.step()) == ["b"]
    assert world.source.passed_over == {"apps/v1 Deployment": 1}


def test_missing_path() -> None:
    for start in (load, ManifestSource):
        with pytest.raises(SourceError, match="/no/such: no such"):
            start(["/no/such"])


def test_the_same_object_twice_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text("a") + text("a", port=81))
    events = load([str(tmp_path)])
    (problem,) = problems(events)
    assert "document 2: Service default/a: stands there twice" in str(problem.error)
    assert names(events) == ["a"]


@given(st.binary() | st.text().map(str.encode), st.sampled_from(["a.yaml", "a.json"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_in_a_file(raw: bytes, name: str) -> None:
    before = content(name, text("a").encode())
    after = content(name, raw, before)
    assert set(after.objects) == (set(before.objects) if after.incomplete else set())


@given(st.integers(0, 400), st.binary(max_size=8), st.integers(0, 20))
@settings(deadline=None)
def test_a_damaged_file_changes_nothing_or_tells(at: int, junk: bytes, cut: int) -> None:
    good = text("a", "b", "c").encode()
    before = content("a.yaml", good)
    after = content("a.yaml", good[:at] + junk + good[at + cut :], before)
    if before.objects.keys() - after.objects.keys():
        assert not after.incomplete


def test_only_what_changed_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    before = content("a.yaml", text("a", "b", "c").encode())
    decoded: list[str] = []

    def counted(raw: Bytes, origin: str, head: Head) -> Decoded | None:
        decoded.append(origin)
        return decode(raw, origin, head)

    monkeypatch.setattr("vipd.proxy.sources.files.decode", counted)
    after = content("a.yaml", (text("a") + text("b", port=81) + text("c")).encode(), before)
    assert decoded == ["a.yaml document 2"]
    assert after.objects.keys() == before.objects.keys()


def test_a_broken_object_keeps_its_form_in_the_file() -> None:
    before = content("a.yaml", text("a", "b").encode())
    after = content("a.yaml", (text("a", port=0) + text("b")).encode(), before)
    assert dict(after.objects) == dict(before.objects)
    assert not after.incomplete
    assert list(after.problems) == ["a.yaml Service default/a"]


def test_a_loss_waits_and_a_change_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text("a", "b"))
    reading = Reading([str(tmp_path)])
    assert len(reading.refresh(100.0)) == 2
    path.write_text(text("a", port=81))
    assert names(reading.refresh(101.0)) == ["a"]
    assert [reading.due] == [101.0 + SETTLE_SECONDS]
    path.write_text("")
    assert reading.refresh(101.01) == []
    assert reading.refresh(101.02, set()) == []
    path.write_text(text("a", port=81))
    assert reading.refresh(101.03) == []
    (event,) = reading.refresh(102.0, set())
    assert isinstance(event, Deleted)
    assert event.name.name == "b"
    assert reading.due is None
    path.unlink()
    assert reading.refresh(103.0, {str(path)}) == []
    assert len(reading.refresh(104.0, set())) == 1
    assert reading.due is None
    assert reading.refresh(105.0) == []


def test_a_file_that_is_never_quiet_loses_its_objects_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text("a", "b"))
    reading = Reading([str(tmp_path)])
    reading.refresh(0.0)
    gone: list[Event] = []
    for hundredth in range(110):
        path.write_text(text("a", port=1000 + hundredth))
        gone += [e for e in reading.refresh(1 + hundredth / 100) if isinstance(e, Deleted)]
    assert len(gone) == 1


async def test_change_add_and_delete(tmp_path: Path, watch: Watcher) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text("a", "b"))
    world = watch(tmp_path)
    first = await world.step()
    assert (names(first), first[-1]) == (["a", "b"], Synced())
    path.write_text(text("a") + text("b", port=81))
    await world.until(lambda: world.port("b") == 81)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/c.yaml").write_text(text("c"))
    await world.holds("a", "b", "c")
    path.write_text(text("b", port=81))
    await world.holds("b", "c")
    path.unlink()
    await world.holds("c")
    assert not problems(world.events)
    assert names(world.events) == ["a", "b", "b", "c"]


async def test_editor_that_renames(tmp_path: Path, watch: Watcher) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text("a"))
    world = watch(path)
    await world.step()
    for port in (81, 82, 83):
        (tmp_path / "a.new").write_text(text("a", port=port))
        path.rename(tmp_path / "a.yaml~")
        (tmp_path / "a.new").rename(path)
        await world.until(lambda port=port: world.port("a") == port)  # type: ignore[misc]
    assert not [event for event in world.events if isinstance(event, Deleted)]


async def test_truncated_and_written_again(tmp_path: Path, watch: Watcher) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text("a", "b"))
    world = watch(tmp_path)
    await world.step()
    path.write_text("")
    path.write_text(text("a", "b", "c"))
    await world.holds("a", "b", "c")
    assert not [event for event in world.events if isinstance(event, Deleted)]


async def test_moving_objects_between_files_is_no_event(tmp_path: Path, watch: Watcher) -> None:
    (tmp_path / "a.yaml").write_text(text("a", "b"))
    world = watch(tmp_path)
    await world.step()
    (tmp_path / "a.yaml").rename(tmp_path / "z.yaml")
    (tmp_path / "c.yaml").write_text(text("c"))
    await world.holds("a", "b", "c")
    (tmp_path / "c.yaml").unlink()
    await world.holds("a", "b")
    assert names(world.events) == ["a", "b", "c"]
    assert not problems(world.events)


async def test_configmap_swap(tmp_path: Path, watch: Watcher) -> None:
    def version(number: int) -> None:
        folder = tmp_path / f"..{number}"
        folder.mkdir()
        (folder / "web.yaml").write_text(text("web", port=number))
        (tmp_path / "..data_tmp").symlink_to(folder.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    version(1)
    (tmp_path / "web.yaml").symlink_to("..data/web.yaml")
    for world in (watch(tmp_path), watch(tmp_path / "web.yaml")):
        await world.step()
        last = world.port("web")
        version(last + 1)
        await world.until(lambda world=world, last=last: world.port("web") == last + 1)  # type: ignore[misc]


async def test_link_to_a_file_elsewhere(tmp_path: Path, watch: Watcher) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a.yaml").write_text(text("a"))
    (tmp_path / "here/a.yaml").symlink_to("../there/a.yaml")
    world = watch(tmp_path / "here")
    await world.step()
    (tmp_path / "there/a.yaml").write_text(text("a", port=81))
    await world.until(lambda: world.port("a") == 81)
    (tmp_path / "there/b").write_text(text("a", port=82))
    (tmp_path / "there/b").rename(tmp_path / "there/a.yaml")
    await world.until(lambda: world.port("a") == 82)


async def test_folder_removed_and_made_again(tmp_path: Path, watch: Watcher) -> None:
    folder = tmp_path / "x/manifests"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text(text("a"))
    world = watch(folder)
    await world.step()
    for port in (81, 82):
        (folder / "a.yaml").unlink()
        folder.rmdir()
        folder.parent.rmdir()
        await world.holds()
        folder.mkdir(parents=True)
        (folder / "a.yaml").write_text(text("a", port=port))
        await world.until(lambda port=port: "a" in world.objects and world.port("a") == port)  # type: ignore[misc]


async def test_broken_file_keeps_what_was_and_is_cleared(tmp_path: Path, watch: Watcher) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text("a", "b"))
    world = watch(tmp_path)
    await world.step()
    path.write_text(text("a", port=81) + "---\nkind: Serv\n  broken: [\n")
    await world.until(lambda: bool(world.problems))
    assert list(world.problems) == [str(path)]
    assert (sorted(world.objects), world.port("a")) == (["a", "b"], 81)
    path.write_text(text("a", port=81))
    await world.until(lambda: not world.problems)
    await world.holds("a")


async def test_broken_object_keeps_its_last_good_form(tmp_path: Path, watch: Watcher) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text("a", "b"))
    world = watch(tmp_path)
    await world.step()
    path.write_text(text("a", port=0) + text("b", port=81) + text("never", port=0))
    await world.until(lambda: len(world.problems) == 2)
    assert set(world.problems) == {
        f"{path} Service default/a",
        f"{path} Service default/never",
    }
    assert {name: world.port(name) for name in world.objects} == {"a": 80, "b": 81}
    path.write_text(text("b", port=81))
    await world.holds("b")
    assert not world.problems


async def test_the_same_object_in_two_files(tmp_path: Path, watch: Watcher) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text(text("a"))
    second.write_text(text("a", port=81) + text("b"))
    world = watch(tmp_path)
    await world.step()
    (message,) = world.problems.values()
    assert str(first) in message
    assert str(second) in message
    assert world.port("a") == 80
    first.unlink()
    await world.until(lambda: world.port("a") == 81)
    assert not world.problems
    assert Deleted not in {type(event) for event in world.events}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
async def test_file_that_may_not_be_read(tmp_path: Path, watch: Watcher) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text("a"))
    path.chmod(0)
    world = watch(tmp_path)
    await world.step()
    assert list(world.problems) == [str(path)]


async def test_file_that_cannot_be_read(
    tmp_path: Path, watch: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text("a"))
    world = watch(tmp_path)
    await world.step()
    monkeypatch.setattr("vipd.proxy.sources.reading.MAX_FILE_BYTES", 100)
    path.write_text(text("a", "b"))
    await world.until(lambda: bool(world.problems))
    assert list(world.problems) == [str(path)]
    assert sorted(world.objects) == ["a"]
    monkeypatch.undo()
    path.write_text(text("b"))
    await world.holds("b")
    assert not world.problems


async def test_kind_and_name_of_a_deletion(tmp_path: Path, watch: Watcher) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n")
    world = watch(path)
    await world.step()
    path.unlink()
    # The path itself was named, so that it is gone is told first; the loss settles a moment later.
    told = await world.step()
    while not any(isinstance(event, Deleted) for event in told):
        told += await world.step()
    (problem,) = (event for event in told if isinstance(event, Problem))
    assert "is gone" in str(problem.error)
    (event,) = (event for event in told if isinstance(event, Deleted))
    assert (event.kind, str(event.name)) == (Kind.NAMESPACE, "/a")
    path.write_text("")
    assert Problem(problem.key, None) in await world.step()


async def test_a_file_name_that_is_no_text_harms_nobody(tmp_path: Path, watch: Watcher) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n")
    world = watch(tmp_path)
    await world.step()
    strange = tmp_path / os.fsdecode(b"x\xff.yaml")
    strange.touch()
    path.write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n")
    told = await world.step()
    assert any(isinstance(event, Applied) for event in told)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="neither file nor folder"):
        load([str(tmp_path / "pipe")])
