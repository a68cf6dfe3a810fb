"""The roles of deploy/ against what the source really asks of an API server: neither less nor more.

A request is told apart as kube-apiserver does (apiserver/pkg/endpoints/request/requestinfo.go).
"""

import asyncio
import contextlib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from tests.api.follower import endpoint_slice, kubeconfig, service

from vipd.bench.api_server import ApiServer
from vipd.bench.api_store import Store
from vipd.proxy.notice import on_node, on_service
from vipd.proxy.sources.kubernetes.resources import Wanted
from vipd.proxy.sources.kubernetes.source import KubernetesSource

DEPLOY = Path(__file__).parents[2] / "deploy"
DEADLINE_SECONDS = 20.0
EVENTS = ("events.k8s.io", "events")
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Access(NamedTuple):
    """What a role allows, or a request needs."""

    verb: str
    group: str
    resource: str


REJECTED = on_service("shop", "web", "RejectedByKernel", "Commit", "no memory")
FAILING = on_node("node", "DataplaneFailing", "Commit", "no memory")


def needed(method: str, target: str) -> Access:
    """Return what a request needs."""
    url = urlsplit(target)
    words = url.path.strip("/").split("/")
    group, rest = ("", words[2:]) if words[0] == "api" else (words[1], words[3:])
    if rest[0] == "namespaces" and len(rest) > 2:
        rest = rest[2:]
    verb = VERBS.get(method)
    if verb is None:
        query = parse_qs(url.query)
        is_watch = query.get("watch", ["false"])[0] in ("true", "1")
        verb = "get" if len(rest) > 1 else "watch" if is_watch else "list"
    return Access(verb, group, rest[0])


def allowed(*folders: str) -> set[Access]:
    """Return what the roles in these folders of deploy/ allow."""
    return {
        Access(verb, group, resource)
        for folder in folders
        for thing in yaml.safe_load_all((DEPLOY / folder / "rbac.yaml").read_text())
        if thing["kind"] == "ClusterRole"
        for rule in thing["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


async def asked(folder: Path, wanted: Wanted, *, watch_list: bool) -> set[Access]:
    """Return what a source asks for, until it has watched every kind and written Events.

    One is told twice: its count is written then.
    """
    store = Store()
    for thing in (service("web"), endpoint_slice("web-1", "10.244.1.5")):
        store.put(thing)
    store.put({"kind": "Node", "metadata": {"name": "node"}})
    server = ApiServer(store, watch_list=watch_list)
    port = await server.start()
    path = kubeconfig(folder / "kubeconfig", f"http://127.0.0.1:{port}")
    source = KubernetesSource(path, "node", wanted)

    async def follow() -> None:
        async for _ in source.events():
            pass

    told = (REJECTED, REJECTED, FAILING)
    for notice in told:
        source.tell(notice)
    following = asyncio.ensure_future(follow())
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                found = {needed(method, target) for method, target in server.requests}
                kinds = {one[1:] for one in found} - {EVENTS}
                # A list by way of a watch is one request; where there is none, both are needed.
                watched = {one[1:] for one in found if one.verb == "watch"}
                are_written = source.notices.written == len(told)
                everything = len(kinds) >= 4 + wanted.names + wanted.pods and watched == kinds
                if everything and are_written:
                    if watch_list:
                        return found
                    if {one[1:] for one in found if one.verb == "list"} == kinds:
                        return found
                await asyncio.sleep(0.01)
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
        await server.stop()


@pytest.mark.parametrize(
    ("wanted", "folders"),
    [
        (Wanted(), ("base",)),
        (Wanted(names=True), ("base", "components/dns")),
        (
            Wanted(names=True, pods=True),
            ("base", "components/dns", "components/dns-pods"),
        ),
    ],
    ids=["services", "names", "pods"],
)
async def test_the_roles_allow_what_is_asked_and_nothing_else(
    wanted: Wanted, folders: tuple[str, ...], tmp_path: Path
) -> None:
    found: set[Access] = set()
    for watch_list in (True, False):
        found |= await asked(tmp_path, wanted, watch_list=watch_list)
    allows = allowed(*folders)
    assert found - allows == set(), "asked, and not allowed"
    assert allows - found == set(), "allowed, and never asked"


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("GET", "/api/v1/services?limit=500", Access("list", "", "services")),
        ("GET", "/api/v1/nodes?watch=true&limit=1", Access("watch", "", "nodes")),
        ("GET", "/api/v1/nodes/node", Access("get", "", "nodes")),
        ("GET", "/api/v1/namespaces", Access("list", "", "namespaces")),
        ("GET", "/api/v1/namespaces/shop/pods", Access("list", "", "pods")),
        (
            "POST",
            "/apis/events.k8s.io/v1/namespaces/shop/events",
            Access("create", "events.k8s.io", "events"),
        ),
        (
            "PATCH",
            "/apis/events.k8s.io/v1/namespaces/shop/events/a",
            Access("patch", "events.k8s.io", "events"),
        ),
    ],
)
def test_a_request_is_told_apart_as_the_api_server_does(
    method: str, target: str, expected: Access
) -> None:
    assert needed(method, target) == expected
