"""deploy/ as a cluster would read it: known fields, references, ports, paths."""

import re
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.kustomize import Json, built

from vipd.backends import sysctl, xtables
from vipd.proxy.config import DEFAULT_SOCKET, Flags, load

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPONENTS = sorted(path.parent for path in DEPLOY.glob("components/*/kustomization.yaml"))
HEALTHZ_PORT = 10256
"""kube-proxy's, as cloud load balancers ask it (reference: KubeProxyConfiguration's default)."""


def all_of_it(tmp_path: Path) -> list[Json]:
    """Return the example with every component."""
    told = yaml.safe_load((DEPLOY / "example/kustomization.yaml").read_text())
    told["resources"] = [str(DEPLOY / "base")]
    told["components"] = [str(one) for one in COMPONENTS]
    del told["configMapGenerator"]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(told))
    return built(tmp_path)


def one(objects: list[Json], kind: str) -> Json:
    (found,) = [thing for thing in objects if thing["kind"] == kind]
    return found


def pod(objects: list[Json]) -> Json:
    spec: Json = one(objects, "DaemonSet")["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("folder", ["base", "example"])
def test_kubectl_makes_the_same_of_it(folder: str) -> None:
    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("kubectl is not here")
    printed = subprocess.run(
        [kubectl, "kustomize", str(DEPLOY / folder)], capture_output=True, text=True, check=True
    )

    def key(thing: Json) -> tuple[str, str]:
        return thing["kind"], thing["metadata"]["name"]

    assert sorted(yaml.safe_load_all(printed.stdout), key=key) == sorted(
        built(DEPLOY / folder), key=key
    )


@cache
def models() -> Any:
    from kubernetes_asyncio.client import models

    return models


def unknown(kind: str, thing: object, where: str) -> list[str]:
    """Return what the API's own description of `kind` does not have, or has otherwise."""
    if kind.startswith("list["):
        assert isinstance(thing, list), where
        return [
            problem
            for number, each in enumerate(thing)
            for problem in unknown(kind[5:-1], each, f"{where}[{number}]")
        ]
    if kind in ("str", "int", "bool"):
        return [] if type(thing).__name__ == kind else [f"{where}: {thing!r} is no {kind}"]
    if kind == "object" or kind.startswith("dict("):
        return []
    model = getattr(models(), kind)
    fields = {name: attribute for attribute, name in model.attribute_map.items()}
    assert isinstance(thing, dict), where
    problems = [f"{where}.{name}: unknown" for name in thing if name not in fields]
    for name in thing.keys() & fields.keys():
        problems += unknown(model.openapi_types[fields[name]], thing[name], f"{where}.{name}")
    return problems


def test_every_field_is_one_that_the_api_has(tmp_path: Path) -> None:
    for thing in all_of_it(tmp_path):
        assert unknown(f"V1{thing['kind']}", thing, thing["kind"]) == []


def test_a_field_that_the_api_does_not_have_is_found() -> None:
    thing = {"kind": "DaemonSet", "spec": {"template": {"spec": {"hostNetworks": True}}}}
    assert unknown("V1DaemonSet", thing, "DaemonSet") == [
        "DaemonSet.spec.template.spec.hostNetworks: unknown"
    ]


def test_what_is_named_is_there(tmp_path: Path) -> None:
    objects = all_of_it(tmp_path)
    there = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}
    spec = pod(objects)
    assert ("ServiceAccount", spec["serviceAccountName"]) in there
    for binding in (thing for thing in objects if thing["kind"] == "ClusterRoleBinding"):
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in there
        account = one(objects, "ServiceAccount")["metadata"]
        for subject in binding["subjects"]:
            assert subject["namespace"] == account["namespace"]
            assert (subject["kind"], subject["name"]) in there
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    used = set()
    for container in spec["containers"]:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert ports[container[probe]["httpGet"]["port"]] == HEALTHZ_PORT
        used |= {mount["name"] for mount in container["volumeMounts"]}
        told = " ".join(container["args"])
        variables = {each["name"] for each in container["env"]}
        assert set(re.findall(r"\$\((\w+)\)", told)) <= variables
    assert used == set(volumes)
    for volume in volumes.values():
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in there


def test_what_the_daemon_uses_is_mounted_where_it_looks(tmp_path: Path) -> None:
    objects = all_of_it(tmp_path)
    (container,) = pod(objects)["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    hosts = {
        volume["name"]: volume["hostPath"]["path"]
        for volume in pod(objects)["volumes"]
        if "hostPath" in volume
    }
    assert hosts[mounts[str(Path(DEFAULT_SOCKET).parent)]] == str(Path(DEFAULT_SOCKET).parent)
    assert hosts[mounts[xtables.LOCK]] == xtables.LOCK
    assert hosts[mounts[str(sysctl.MOUNTED / "net")]] == str(sysctl.ROOT / "net")
    (config,) = [each for each in container["args"] if each.startswith("--config=")]
    path = Path(config.partition("=")[2])
    assert path.name in one(objects, "ConfigMap")["data"]
    assert mounts[str(path.parent)] == "config"


def test_a_daemon_has_no_way_to_more_than_its_capabilities(tmp_path: Path) -> None:
    for container in pod(all_of_it(tmp_path))["containers"]:
        context = container["securityContext"]
        assert context["capabilities"]["drop"] == ["ALL"]
        assert "privileged" not in context
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        added = context["capabilities"]["add"]
        assert not {"SYS_ADMIN", "SYS_MODULE", "SYS_PTRACE", "ALL"} & set(added)


@pytest.mark.parametrize("path", ["base/vipd.yaml", "example/vipd.yaml"])
def test_vipd_reads_its_part_of_the_configuration(path: str, tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all((DEPLOY / path).read_text()))
    assert [each["kind"] for each in documents] == ["KubeProxyConfiguration", "VipdConfiguration"]
    own = tmp_path / "vipd.yaml"
    own.write_text(yaml.safe_dump(documents[1]))
    load(Flags(config=str(own), node_name="node"))


def test_the_image_has_the_paths_that_are_relied_on() -> None:
    said = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", said, re.MULTILINE)
    for name in " ".join(copied).split():
        assert (DEPLOY.parent / name).exists(), name
    assert "COPY deploy/kube-proxy /usr/local/bin/kube-proxy" in said
    script = DEPLOY / "kube-proxy"
    assert script.stat().st_mode & 0o111 == 0o111
    last = said.rpartition("\nFROM ")[2]
    assert not re.search(r"\b(gcc|pip|python3-dev|python3-venv)\b", last)


def test_every_folder_with_code_is_in_the_wheel() -> None:
    told = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        ".".join(("vipd", *path.parent.relative_to(DEPLOY.parent).parts))
        for top in ("proxy", "backends", "dns", "bench")
        for path in (DEPLOY.parent / top).rglob("*.py")
    }
    assert there == set(told["packages"])
