"""`vipd env`: cases/environment/ says what a pod gets; here, the forms it is printed in.

A case has manifests and `pods`: for each, all its variables, or the cluster IP of each service, or
the names of its ``…_SERVICE_HOST`` variables; and the notes, or the error.
"""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct, convert
from ryaml import loads  # type: ignore[attr-defined] # its stub forgets to say so

from vipd.proxy import control
from vipd.proxy.answers import Answers
from vipd.proxy.cli.env import dotenv, shell, unnamable
from vipd.proxy.environment import (
    MOST_CLASHES,
    MOST_EXEC_BYTES,
    Wanted,
    checked,
    environment,
    wanted,
)
from vipd.proxy.errors import ConfigError, ControlError, ManifestError, QuestionError
from vipd.proxy.events import Applied, Problem, Synced
from vipd.proxy.model import Pod, Service, ServicePort
from vipd.proxy.names import NamespacedName, Protocol
from vipd.proxy.settings import NodeSettings
from vipd.proxy.sources.manifests import ManifestSource, load
from vipd.proxy.sync import Sync

FOLDER = Path(__file__).parent.parent / "cases" / "environment"
FILES = sorted(FOLDER.glob("*.yaml"))
NASTY = (
    "",
    "a b",
    "$(echo x)",
    "`echo x`",
    "it's",
    '"',
    "\\",
    "$HOME",
    "a\nb",
    "*",
    "~",
    "a;b",
    "é",
)


class Expected(Struct, forbid_unknown_fields=True):
    """What one pod gets. Exactly one of variables, hosts, names and error is said."""

    namespace: str = "default"
    pod: str = ""
    service_links: bool = True
    variables: str | None = None
    hosts: dict[str, str] | None = None
    names: list[str] | None = None
    error: str | None = None
    notes: list[str] = []


class Case(Struct, forbid_unknown_fields=True):
    """A file."""

    description: str
    manifests: str
    pods: list[Expected]


def objects(path: Path) -> tuple[dict[NamespacedName, Service], dict[NamespacedName, Pod]]:
    events = load([str(path)])
    assert not [one for one in events if isinstance(one, Problem)]
    found = [one.object for one in events if isinstance(one, Applied)]
    return (
        {one.name: one for one in found if isinstance(one, Service)},
        {one.name: one for one in found if isinstance(one, Pod)},
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_case(file: Path, tmp_path: Path) -> None:
    case = convert(loads(file.read_text()), Case)
    manifests = tmp_path / "cluster.yaml"
    manifests.write_text(case.manifests)
    services, pods = objects(manifests)
    for expected in case.pods:
        asked = Wanted(
            namespace=expected.namespace, pod=expected.pod, service_links=expected.service_links
        )
        if expected.error is not None:
            with pytest.raises(QuestionError) as raised:
                environment(asked, services, pods)
            assert str(raised.value) == expected.error
            continue
        made = environment(asked, services, pods)
        hosts = {
            name.removesuffix("_SERVICE_HOST"): value
            for name, value in made.variables.items()
            if name.endswith("_SERVICE_HOST")
        }
        if expected.variables is not None:
            assert list(dotenv(made.variables)) == expected.variables.splitlines()
        elif expected.hosts is not None:
            assert hosts == expected.hosts
        else:
            assert [f"{name}_SERVICE_HOST" for name in hosts] == expected.names
        assert list(made.notes) == expected.notes


def a_service(name: str, number: int, namespace: str = "default") -> Service:
    return Service(
        name=NamespacedName(namespace, name),
        cluster_ips=(ip_address(0x0A600000 + number),),
        ports=(ServicePort(name="", protocol=Protocol.TCP, port=80),),
    )


def by_name(*services: Service) -> dict[NamespacedName, Service]:
    return {one.name: one for one in services}


def test_the_order_that_services_come_in_does_not_matter() -> None:
    services = [a_service(name, i) for i, name in enumerate(("web", "web-service", "a", "z", "m"))]
    asked = Wanted(namespace="default")
    first = environment(asked, by_name(*services), {})
    shuffled = random.Random(1)
    for _ in range(20):
        shuffled.shuffle(services)
        again = environment(asked, by_name(*services), {})
        assert (list(again.variables.items()), again.notes) == (
            list(first.variables.items()),
            first.notes,
        )


def test_more_than_a_process_can_be_given_is_said() -> None:
    few = [a_service(f"service-{i}", i + 1) for i in range(100)]
    many = [a_service(f"service-{i:05}", i + 1) for i in range(8000)]
    asked = Wanted(namespace="default")
    assert not any("bytes" in note for note in environment(asked, by_name(*few), {}).notes)
    notes = environment(asked, by_name(*many), {}).notes
    assert f"more than the {MOST_EXEC_BYTES} that Linux hands to a new process" in notes[-1]
    assert "enableServiceLinks: false" in notes[-1]


def test_clashes_are_named_up_to_a_number() -> None:
    services = [a_service(f"web{i}{end}", i + 1) for i in range(20) for end in ("", "-service")]
    notes = environment(Wanted(namespace="default"), by_name(*services), {}).notes
    assert sum("wants" in note for note in notes) == MOST_CLASHES
    assert notes[-1] == "two services want 10 more variables"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Wanted(namespace=""), "--namespace: '' is not a name"),
        (Wanted(namespace="a/b"), "--namespace: 'a/b' is not a name"),
        (Wanted(namespace="a\nb"), r"--namespace: 'a\nb' is not a name"),
        (Wanted(namespace="a", pod="b c"), "--pod: 'b c' is not a name"),
        (
            Wanted(namespace="a", pod="b/c"),
            "--pod: 'b/c' is not a name; write --namespace NS --pod NAME",
        ),
    ],
)
def test_what_is_no_name(asked: Wanted, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        checked(asked)
    assert str(raised.value) == said


def test_the_question_as_it_travels() -> None:
    assert wanted('{"namespace": "a", "pod": "b"}') == Wanted(namespace="a", pod="b")
    for text in ("", "[]", "{}", '{"namespace": 1}'):
        with pytest.raises(ControlError, match="request not understood"):
            wanted(text)


def test_service_links_that_are_no_boolean(tmp_path: Path) -> None:
    path = tmp_path / "pod.yaml"
    path.write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop}\n"
        "spec: {enableServiceLinks: 'no'}\n"
    )
    errors = [one.error for one in load([str(path)]) if isinstance(one, Problem)]
    assert [(type(one), str(one).partition(": ")[2]) for one in errors] == [
        (ManifestError, "Pod shop/p: spec.enableServiceLinks: expected bool | null, got str")
    ]


# Forms


def evaluated(lines: str, names: Mapping[str, str]) -> dict[str, str]:
    """What a real shell makes of them."""
    script = f"{lines}\nset -- {' '.join(names)}\nenv -0"
    done = subprocess.run(
        ["/bin/sh", "-euc", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=True
    )
    found = dict(one.split("=", 1) for one in done.stdout.decode().split("\0") if one)
    return {name: found[name] for name in names}


def test_lines_for_a_shell_mean_what_they_say() -> None:
    variables = {f"NASTY_{i}": value for i, value in enumerate(NASTY)}
    assert evaluated("\n".join(shell(variables)), variables) == variables


def test_names_that_a_shell_cannot_have_are_left_out_and_told() -> None:
    variables = {"1ST_PORT": "1", "A.B_PORT": "2", "OK_PORT": "3"}
    assert list(shell(variables)) == ["export OK_PORT=3"]
    assert list(unnamable(variables)) == [
        "left out: 1ST_PORT and 1 more, which a shell cannot name; --format json has all"
    ]
    assert list(unnamable({"OK_PORT": "3"})) == []


def test_lines_of_an_env_file_are_taken_as_they_are() -> None:
    service = a_service("web", 1)
    six = Service(
        name=NamespacedName("default", "six"),
        cluster_ips=(ip_address("fd00::1"),),
        ports=service.ports,
    )
    variables = environment(Wanted(namespace="default"), by_name(service, six), {}).variables
    lines = list(dotenv(variables))
    assert dict(line.split("=", 1) for line in lines) == variables
    assert evaluated("\n".join(["set -a", *lines]), variables) == variables


@pytest.mark.parametrize("value", [one for one in NASTY if one])
def test_a_value_that_an_env_file_cannot_hold_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="would need quotes"):
        list(dotenv({"A": value}))


# The command


def vipd_env(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "vipd.proxy.cli", "env", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **how,
    )


MANIFESTS = """
apiVersion: v1
kind: Service
metadata: {name: kubernetes}
spec: {clusterIP: 10.96.0.1, ports: [{port: 443}]}
---
apiVersion: v1
kind: Service
metadata: {name: six, namespace: shop}
spec: {clusterIP: "fd00:10:96::6", ports: [{port: 80}]}
"""
BAD = """---
apiVersion: v1
kind: Service
metadata: {name: bad, namespace: shop}
spec: {clusterIP: 10.96.0.300, ports: [{port: 80}]}
"""


@pytest.fixture
def manifests(tmp_path: Path) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(MANIFESTS)
    return str(path)


def test_the_three_forms_say_the_same(manifests: str) -> None:
    as_json = vipd_env("-f", manifests, "-n", "shop", "--format", "json")
    assert (as_json.returncode, as_json.stderr) == (0, "")
    variables = json.loads(as_json.stdout)
    assert variables["SIX_PORT_80_TCP"] == "tcp://[fd00:10:96::6]:80"
    for_shell = vipd_env("-f", manifests, "-n", "shop").stdout
    as_file = vipd_env("-f", manifests, "-n", "shop", "--format", "dotenv").stdout
    assert evaluated(for_shell, variables) == variables
    assert evaluated(f"set -a\n{as_file}", variables) == variables
    assert "export SIX_PORT='tcp://[fd00:10:96::6]:80'\n" in for_shell


def test_from_standard_input() -> None:
    told = vipd_env("-f", "-", "--format", "dotenv", input=MANIFESTS)
    assert (told.returncode, told.stdout.splitlines()[0]) == (
        0,
        "KUBERNETES_SERVICE_HOST=10.96.0.1",
    )


def test_objects_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(MANIFESTS + BAD)
    told = vipd_env("-f", str(path), "-n", "shop")
    assert told.returncode == 3
    assert told.stdout.startswith("export KUBERNETES_SERVICE_HOST=10.96.0.1\n")
    assert "Service shop/bad: spec.clusterIP: '10.96.0.300' is not an IP address" in told.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-n", "a/b"], 2, "--namespace: 'a/b' is not a name"),
        (["--pod", "shop/web"], 2, "--pod: 'shop/web' is not a name"),
        (["--format", "xml"], 2, "xml"),
        (["extra"], 2, "extra"),
        (["--pod", "web"], 1, "no Pod default/web is known; there is none in this namespace"),
    ],
)
def test_wrong_questions(manifests: str, arguments: list[str], code: int, words: str) -> None:
    told = vipd_env("-f", manifests, *arguments)
    assert (told.returncode, told.stdout) == (code, "")
    assert words in told.stderr
    assert "Traceback" not in told.stderr


def test_without_a_daemon(tmp_path: Path) -> None:
    told = vipd_env("--socket", str(tmp_path / "none"))
    assert (told.returncode, told.stdout) == (1, "")
    assert "no vipd listens on" in told.stderr


POD = """---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop}
spec: {enableServiceLinks: false}
"""


async def test_the_daemon_is_asked_over_its_socket(tmp_path: Path) -> None:
    path, file = str(tmp_path / "s"), tmp_path / "cluster.yaml"
    file.write_text(MANIFESTS + POD)
    source, sync = ManifestSource([str(file)]), Sync(NodeSettings(node_name="node"))
    sync.take([*source._reading.refresh(0.0), Synced()])
    nothing: Any = None
    answers = Answers(nothing, sync, nothing, nothing, source, 0.0, nothing, nothing, nothing)
    asked = ("--socket", path, "-n", "shop", "--format", "json")
    async with await control.serve(path, answers.requests()):
        told = await asyncio.to_thread(vipd_env, *asked)
        few = await asyncio.to_thread(vipd_env, *asked, "--no-service-links")
        of_pod = await asyncio.to_thread(vipd_env, *asked, "--pod", "web-1")
        refused = await asyncio.to_thread(vipd_env, *asked, "--pod", "web-2")
    services, pods = objects(file)
    assert (
        json.loads(told.stdout) == environment(Wanted(namespace="shop"), services, pods).variables
    )
    assert "SIX_SERVICE_HOST" in json.loads(told.stdout)
    assert {name.partition("_")[0] for name in json.loads(few.stdout)} == {"KUBERNETES"}
    assert of_pod.stdout == few.stdout
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "vipd: no Pod shop/web-2 is known; there are web-1\n"
