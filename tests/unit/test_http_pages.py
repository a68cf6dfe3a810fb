"""What stands on the metrics server: the status page, /configz, /statusz, /flagz and the rest."""

import html
import json
from html.parser import HTMLParser
from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec
from tests.unit.http_asking import Told, World, running

from vipd.dns.settings import DnsSettings
from vipd.proxy.config import Config, Flags
from vipd.proxy.counted import CountersView, EndpointCountersView
from vipd.proxy.http import server  # noqa: F401 - so that no test waits for the import
from vipd.proxy.http.metrics_pages import Asked, Shown, metrics_pages
from vipd.proxy.http.status_page import MOST_ENDPOINTS, MOST_SENTENCES, status_page
from vipd.proxy.settings import ConntrackSettings, HttpSettings, NodeSettings
from vipd.proxy.status import LastSync, RepairView, Status
from vipd.proxy.views import EndpointView, VirtualServerView

NOW = 1_700_000_000.0
CONFIG = Config(
    mode="auto",
    manifests=(),
    kubeconfig="/etc/vipd.conf",
    socket="/run/vipd/vipd.sock",
    node=NodeSettings(
        node_name="n",
        cluster_cidrs=(ip_network("10.244.0.0/16"), ip_network("fd00::/48")),
        node_port_addresses=(ip_network("192.0.2.0/24"),),
        dns_listens=frozenset({(ip_address("10.96.0.10"), 53)}),
    ),
    dns=DnsSettings(listen=("10.96.0.10:53",)),
    conntrack=ConntrackSettings(),
    http=HttpSettings(healthz=(ip_address("::"), 10256), metrics=(ip_address("127.0.0.1"), 10249)),
    oom_score_adjust=-999,
)
STATUS = Status(
    version="1.2.3",
    pid=42,
    mode="nftables",
    node="n",
    manifests=("/etc/manifests",),
    started=NOW - 3723,
    synced=True,
    services=1,
    virtual_servers=1,
    endpoints=1,
    syncs=7,
    failed_syncs=1,
    last_sync=LastSync(NOW - 5, 1.5, 1, 3, False),
    failure="",
    problems=(),
    conflicts=(),
    rejected=(),
    notes=(),
    passed_over=(),
    repairs=RepairView(count=2, at=NOW - 60, what=("chain gone",), by="nft"),
    http=("metrics 127.0.0.1:10249",),
)
SERVER = VirtualServerView(
    service="shop/web:http",
    kind="cluster",
    address="10.96.0.1:80",
    protocol="TCP",
    algorithm="random",
    policy="cluster",
    endpoints=[EndpointView("10.244.1.2:8080", 1, True, pod="web-1")],
    counters=CountersView(
        endpoints=[EndpointCountersView(address="10.244.1.2:8080", open=3, so_far=17)]
    ),
)
EVIL = "<script>alert(1)</script>\"'&\u202e\x00"


class Texts(HTMLParser):
    """What a browser would show, and the elements it is in."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {"src", "href", "onclick"} & {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def asked(status: Status = STATUS, servers: Shown = ([SERVER], 1)) -> Asked:
    async def exposition() -> bytes:
        return b"vipd_up 1\n"

    async def told_status() -> Status:
        return status

    async def told_servers(most: int) -> Shown:
        return servers[0][:most], servers[1]

    return Asked(
        exposition=exposition,
        status=told_status,
        servers=told_servers,
        mode=lambda: "ipvs",
        config=lambda: CONFIG,
        flags=Flags(kubeconfig="/etc/vipd.conf", manifests=("a", "b"), masquerade_all=True),
    )


async def page(path: str) -> Told:
    async with running(World(pages=metrics_pages(asked()))) as world:
        return await world.ask(path, server="metrics")


async def test_small_pages() -> None:
    ok, mode, metrics = [await page(one) for one in ("/healthz", "/proxyMode", "/metrics")]
    assert (ok.status, ok.body) == (200, b"ok")
    assert (mode.body, mode.headers["content-type"]) == (b"ipvs", "text/plain; charset=utf-8")
    assert metrics.body == b"vipd_up 1\n"
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert (await page("/debug/pprof/")).status == 404


async def test_configz_is_kube_proxys_and_ours() -> None:
    told = await page("/configz")
    assert told.headers["content-type"] == "application/json"
    said = json.loads(told.body)
    theirs = said["kubeproxy.config.k8s.io"]
    assert theirs["kind"] == "KubeProxyConfiguration"
    assert theirs["mode"] == "ipvs"
    assert theirs["clusterCIDR"] == "10.244.0.0/16,fd00::/48"
    assert theirs["nodePortAddresses"] == ["192.0.2.0/24"]
    assert (theirs["healthzBindAddress"], theirs["metricsBindAddress"]) == (
        "[::]:10256",
        "127.0.0.1:10249",
    )
    assert theirs["conntrack"]["tcpEstablishedTimeout"] == "24h0m0s"
    assert theirs["conntrack"]["tcpCloseWaitTimeout"] == "1h0m0s"
    assert theirs["clientConnection"] == {"kubeconfig": "/etc/vipd.conf"}
    assert theirs["oomScoreAdj"] == -999
    assert said["vipd"]["node"]["dns_listens"] == [["10.96.0.10", 53]]
    assert said["vipd"]["kubeconfig"] == "/etc/vipd.conf"


async def test_statusz_and_flagz() -> None:
    statusz = (await page("/statusz")).body.decode()
    assert statusz.startswith("\nvipd statusz\nWarning: ")
    assert "Started: Tue Nov 14 21:11:17 UTC 2023\n" in statusz
    assert "Binary version: 1.2.3\n" in statusz
    assert "repairs.what: chain gone\n" in statusz
    assert "last_sync.milliseconds: 1.5\n" in statusz
    flagz = (await page("/flagz")).body.decode()
    assert flagz.splitlines()[4:] == [
        "kubeconfig=/etc/vipd.conf",
        "manifests=a,b",
        "masquerade-all=True",
    ]


async def test_the_page_says_what_there_is() -> None:
    told = await page("/")
    assert told.headers["content-type"] == "text/html; charset=utf-8"
    assert told.headers["content-security-policy"].startswith("default-src 'none'")
    text = " ".join(Texts(told.body).texts)
    for said in (
        "vipd on n",
        "health: good",
        "nftables",
        "shop/web:http",
        "10.96.0.1:80/TCP",
        "10.244.1.2:8080, web-1, here, 3 open, 17 so far",
        "chain gone",
        "metrics 127.0.0.1:10249",
    ):
        assert said in text, said


def test_nothing_of_a_stranger_is_markup() -> None:
    evil = msgspec.structs.replace(
        SERVER,
        service=EVIL,
        rejected=EVIL,
        endpoints=[EndpointView("10.0.0.1:1", 1, False, pod=EVIL)],
    )
    status = msgspec.structs.replace(
        STATUS, node=EVIL, problems=(EVIL,), notes=(EVIL,), failure=EVIL, http=(EVIL,)
    )
    plain = set(Texts(status_page(STATUS, [SERVER], 1, NOW).body).tags)
    made = status_page(status, [evil], 1, NOW).body
    assert set(Texts(made).tags) <= {*plain, "span"}
    assert html.escape(EVIL).encode() in made
    assert b"<script" not in made


def test_the_page_has_an_end() -> None:
    endpoints = [EndpointView(f"10.0.{n // 250}.{n % 250}:1", 1, False) for n in range(5000)]
    many = msgspec.structs.replace(SERVER, endpoints=endpoints, counters=None)
    status = msgspec.structs.replace(STATUS, problems=tuple(f"problem {n}" for n in range(9999)))
    made = status_page(status, [many], 44_125, NOW).body
    text = " ".join(Texts(made).texts)
    assert len(made) < 10_000
    assert f"… and {9999 - MOST_SENTENCES} more" in text
    assert text.count("10.0.0.") == MOST_ENDPOINTS
    assert "… 5000 in all" in text
    assert "the first 1 of them here" in text


async def test_a_page_that_many_ask_for_is_made_once() -> None:
    made = 0
    plain = asked()

    async def counted() -> Status:
        nonlocal made
        made += 1
        return await plain.status()

    pages = metrics_pages(msgspec.structs.replace(plain, status=counted))
    async with running(World(pages=pages)) as world:
        for _ in range(20):
            assert (await world.ask("/", server="metrics")).status == 200
    assert made < 20


def test_the_examples_are_complete() -> None:
    """Every field of the configuration can be told, whatever is added to it."""
    from vipd.proxy.config import load
    from vipd.proxy.http.configz import configz

    config = load(Flags(manifests=(str(Path(__file__).parent),), node_name="n"))
    assert json.loads(configz(config, "nftables"))["vipd"]["mode"] == "auto"
