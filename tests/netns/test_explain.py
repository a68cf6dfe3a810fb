"""What `vipd explain` says of the running daemon is what real connections meet."""

import re
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
from tests.netns.cluster import (
    LOCAL,
    REFUSED,
    REMOTE,
    SILENCE,
    TCP4,
    TCP6,
    UDP4,
    Cluster,
    Flavour,
    held,
    service_cidr,
    until,
)

from vipd.proxy.explain import Explanation, Verdict
from vipd.proxy.names import Address
from vipd.proxy.virtualserver import Endpoint
from vipd.proxy.words import counted as counted_words

pytestmark = pytest.mark.netns

CONNECTIONS = 200
BOTH_KINDS = pytest.mark.modes("nftables", "userspace")
"""The modes in which a kernel forwards are alike here; test_equivalence.py compares them."""


@pytest.fixture(scope="module")
def flags() -> tuple[str, ...]:
    return ("--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48")


@pytest.fixture(autouse=True)
def as_seen(cluster: Cluster) -> Iterator[None]:
    """Here it matters whom an endpoint saw, whatever the table says."""
    cluster.as_promised = False
    yield
    cluster.as_promised = True


def explained(
    cluster: Cluster, source: str, to: Address, port: int = 80, *more: str
) -> Explanation:
    host = f"[{to}]" if to.version == 6 else str(to)
    done = cluster.cli(
        "explain", source, f"{host}:{port}", "--json", "--socket", cluster.socket, *more
    )
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=Explanation)


def promised(told: Explanation, client: str) -> set[str]:
    """What connections of the client should meet, in the words of Cluster.outcome."""
    if told.verdict is Verdict.REJECT:
        return {REFUSED}
    if told.verdict is not Verdict.ENDPOINT:
        return {SILENCE}
    return {f"{one.pod} saw {client if one.source else 'node'}" for one in told.endpoints}


@BOTH_KINDS
@pytest.mark.essential
@pytest.mark.parametrize("flavour", [TCP4, TCP6], ids=str)
def test_two_hundred_connections_go_where_it_says_as_often_as_it_says(
    cluster: Cluster, flavour: Flavour
) -> None:
    served = cluster.serve(flavour, LOCAL, "web-2", REMOTE, annotations={"vipd/weights": "web-2=2"})
    for client in ("client-1", "outside", "node", LOCAL):
        source = cluster.lab.node(client).address(flavour.family)
        told = explained(cluster, str(source), served.address)
        met = Counter(served.outcome(client) for _ in range(CONNECTIONS))
        assert set(met) == promised(told, client)
        for one in told.endpoints:
            seen = sum(count for what, count in met.items() if what.startswith(f"{one.pod} saw "))
            # Six standard deviations of a binomial distribution: wrong once in 10^8.
            deviation = (CONNECTIONS * one.share * (1 - one.share)) ** 0.5
            assert abs(seen - CONNECTIONS * one.share) < 6 * deviation


@BOTH_KINDS
@pytest.mark.parametrize("flavour", [TCP4, TCP6], ids=str)
@pytest.mark.parametrize(
    ("endpoints", "spec"),
    [
        ((), {}),
        ((REMOTE,), {"internalTrafficPolicy": "Local"}),
        ((LOCAL, REMOTE), {"internalTrafficPolicy": "Local"}),
        ((LOCAL, REMOTE), {"type": "NodePort", "externalTrafficPolicy": "Local"}),
    ],
    ids=["none", "elsewhere", "local", "external"],
)
def test_policies_mean_what_it_says(
    cluster: Cluster, flavour: Flavour, endpoints: tuple[str, ...], spec: dict[str, str]
) -> None:
    served = cluster.serve(flavour, *endpoints, **spec)
    places = [(served.address, 80)]
    if "type" in spec:
        places.append(served.on_node())
    for client in ("client-1", "outside"):
        source = cluster.lab.node(client).address(flavour.family)
        for to, port in places:
            told = explained(cluster, str(source), to, port)
            assert served.outcomes(client, to, port) == promised(told, client)


@BOTH_KINDS
@pytest.mark.essential
def test_what_nobody_serves(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    cluster.apply(service_cidr("10.96.0.0/16"))
    cluster.settled()
    free = served.address + 1
    for to, port in ((served.address, 81), (free, 80)):
        told = explained(cluster, str(cluster.lab.node("client-1").ipv4), to, port)
        assert {served.outcome("client-1", to, port)} == promised(told, "client-1")


@pytest.mark.modes("nftables", "iptables-legacy", "iptables-nft", "ipvs")
@pytest.mark.essential
@pytest.mark.parametrize("flavour", [TCP4, TCP6], ids=str)
def test_the_kernel_is_asked_for_what_concerns_the_packet(
    cluster: Cluster, flavour: Flavour
) -> None:
    served = cluster.serve(flavour, LOCAL, REMOTE, sessionAffinity="ClientIP")
    other = cluster.serve(flavour, "web-2")
    client = str(cluster.lab.node("client-1").address(flavour.family))
    stranger = explained(cluster, client, served.address, 80, "--live")
    assert len(stranger.endpoints) == 2
    unknown = "IPVS has no entry of {}" if cluster.mode == "ipvs" else "{} is not remembered"
    assert [one for one in stranger.live if one.startswith(unknown.format(client))]
    (pod,) = {served.ask("client-1").pod for _ in range(3)}
    after = explained(cluster, client, served.address, 80, "--live")
    assert [(one.pod, one.share) for one in after.endpoints] == [(pod, 1.0)]
    assert [one.why for one in after.left_out] == [
        f"affinity: {client} is remembered, and goes where it was"
    ]
    host = cluster.lab.node(pod).address(flavour.family)
    to = str(Endpoint(host, flavour.target))
    for pattern in counted(cluster.mode, served.address, host, flavour.target):
        assert [one for one in after.live if re.search(pattern, one)], (pattern, after.live)
    flows = [one for one in after.live if one.startswith("flow, source port ")]
    assert len(flows) == 3
    assert all(f": to {to}/TCP, " in one for one in flows)
    assert not [one for one in after.live if str(other.address) in one]


def counted(mode: str, address: Address, host: Address, port: int) -> list[str]:
    """What three connections to one endpoint leave behind, as patterns."""
    to = re.escape(str(Endpoint(host, port)))
    if mode == "nftables":
        chosen = f"{host} . {port}"
        return [
            f"^endpoints: {chosen}, 3 new connections$",
            f"^affinity remembers the client: to {chosen}, for",
            f"^services: {address} . tcp . 80 : goto own-",
        ]
    if mode == "iptables":
        return [
            f"^nat VIPD-SVC-[A-Z2-7]{{16}}: to {to}, 3 new connections$",
            r"^nat VIPD-SERVICES: -m set --match-set VIPD-SERVED\S* \S+ \S+ \S+, [1-9]",
            f"^affinity remembers the client: to {to}, for 10[78]\\d\\ds yet$",
        ]
    where = re.escape(f"IPVS TCP {Endpoint(address, 80)}")
    return [
        rf"^{where}: \d+ connections? so far, \d+ active, \d+ inactive$",
        rf"^{where}, real server {to} of weight 1: \d+ connections? so far, ",
        f"^IPVS entry of affinity: to {to}, [A-Z]+, \\d+ s left$",
        f"^IPVS entry, source port \\d+: to {to}, [A-Z_]+, \\d+ s left$",
    ]


@pytest.mark.modes("userspace")
@pytest.mark.essential
@pytest.mark.parametrize("flavour", [TCP4, TCP6, UDP4], ids=str)
def test_workers_are_asked_for_what_concerns_the_packet(cluster: Cluster, flavour: Flavour) -> None:
    served = cluster.serve(flavour, LOCAL, REMOTE, sessionAffinity="ClientIP")
    other = cluster.serve(flavour, "web-2")
    other.ask("client-1")
    client = str(cluster.lab.node("client-1").address(flavour.family))
    question = (client, served.address, 80, "--live")
    stranger = explained(cluster, *question)
    assert len(stranger.endpoints) == 2
    assert f"{client} is not remembered by affinity" in stranger.live
    (pod,) = {served.ask("client-1").pod for _ in range(3)}
    host = cluster.lab.node(pod).address(flavour.family)
    to = Endpoint(host, flavour.target)
    after = explained(cluster, *question)
    assert [(one.pod, one.share) for one in after.endpoints] == [(pod, 1.0)]
    where = re.escape(f"{Endpoint(served.address, 80)}/{flavour.protocol}")
    patterns = (
        rf"^worker \d listens at {where}: \d (session|connection)s? open, 3 so far$",
        rf"^endpoint {re.escape(str(to))}: \d open, 3 so far$",
        rf"^affinity remembers the client: to {re.escape(str(to))}, for 10[78]\d\d s yet$",
    )
    for pattern in patterns:
        assert [one for one in after.live if re.search(pattern, one)], (pattern, after.live)
    assert not [one for one in after.live if str(other.address) in one]


@pytest.mark.modes("userspace")
@pytest.mark.essential
def test_what_is_open_is_told_with_its_source_port(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    client = str(cluster.lab.node("client-1").ipv4)
    with held(cluster, "client-1", served.address) as connection:
        assert connection.who() == LOCAL
        to = Endpoint(cluster.lab.node(LOCAL).ipv4, TCP4.target)
        told = explained(cluster, client, served.address, 80, "--live").live
        assert f"connection, source port {connection.port}: to {to}" in told
    until(
        lambda: (
            f"no connection of {client} is open here"
            in explained(cluster, client, served.address, 80, "--live").live
        ),
        "the connection has ended",
    )


def test_the_slots_of_an_endpoint_are_counted_together(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL, REMOTE, annotations={"vipd/algorithm": "maglev"})
    client = str(cluster.lab.node("client-1").ipv4)
    met = Counter(served.pods("client-1"))
    told = explained(cluster, client, served.address, 80, "--live").live
    for pod, count in met.items():
        place = f"{cluster.lab.node(pod).ipv4} . {served.flavour.target}"
        assert f"endpoints: {place}, {counted_words(count, 'new connection')}" in told


def test_a_name_that_nobody_has_is_refused_in_one_sentence(cluster: Cluster) -> None:
    done = cluster.cli("explain", "nobody", "10.96.0.1:80", "--socket", cluster.socket)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("vipd: SRC: no endpoint is a pod called nobody")


def test_a_pod_and_a_service_by_name(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL, REMOTE)
    done = cluster.cli(
        "explain", f"test/{LOCAL}", f"test/{served.name}:main", "--socket", cluster.socket
    )
    assert done.returncode == 0, done.stderr
    assert f"pod test/{LOCAL} on this node" in done.stdout
    assert f"to         {served.address}:80/TCP\n" in done.stdout
