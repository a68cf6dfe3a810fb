"""Section dns of the configuration: defaults, flags, and problems that name their field."""

from pathlib import Path

import msgspec
import pytest

from vipd.dns.server import messages
from vipd.dns.settings import DnsSettings, Listen, parse_listen, problems, zone_settings
from vipd.proxy.config import Flags, load
from vipd.proxy.errors import ConfigError
from vipd.proxy.names import parse_address

HEAD = "apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n"


def test_defaults_are_right() -> None:
    assert problems(DnsSettings()) == []
    assert load(Flags()).dns == DnsSettings()


def test_settings_survive_the_way_to_a_worker() -> None:
    settings = DnsSettings(listen=("127.0.0.1",), ttl=9, reverse=("10.0.0.0/8",))
    sent = messages.encode(messages.Begin(settings, [("127.0.0.1", 53)]))
    assert messages.request_of(sent) == messages.Begin(settings, [("127.0.0.1", 53)])
    with pytest.raises(msgspec.DecodeError):
        messages.request_of(sent[:-1])


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("127.0.0.1", Listen(parse_address("127.0.0.1"), 53)),
        ("127.0.0.1:0", Listen(parse_address("127.0.0.1"), 0)),
        ("[::1]:5353", Listen(parse_address("::1"), 5353)),
        ("[::1]:0", Listen(parse_address("::1"), 0)),
        ("fd00::53", Listen(parse_address("fd00::53"), 53)),
    ],
)
def test_where_to_listen(text: str, listen: Listen) -> None:
    assert parse_listen(text) == listen
    assert parse_listen(str(listen)) == listen


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("dns.example", "no ADDRESS:PORT"),
        ("0.0.0.0:53", "every address"),
        ("[::]:53", "every address"),
        ("224.0.0.251", "multicast"),
        ("127.0.0.1:99999", "99999 is no port"),
        ("127.0.0.1:", "no number"),
        ("[::1]53", "no number"),
        ("127.0.0.1:x", "no number"),
        ("tcp://127.0.0.1", "ADDRESS:PORT"),
        ("", "no ADDRESS:PORT"),
    ],
)
def test_where_not_to_listen(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_listen(text)


def test_name_servers_are_where_others_reach_them() -> None:
    made = zone_settings(DnsSettings(listen=("127.0.0.1", "169.254.20.10", "169.254.20.10:5353")))
    assert made.name_server_addresses == (parse_address("169.254.20.10"),)


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("{ttl: 4000}", "dns.ttl: 4000 is not from 0 to 3600"),
        ("{listen: [here]}", r"dns.listen\[0\]: 'here' is no ADDRESS:PORT"),
        (f"{{listen: [{', '.join(['10.0.0.1'] * 65)}]}}", "dns.listen: 65 addresses; at most 64"),
        (f"{{http: [{', '.join(['10.0.0.1'] * 65)}]}}", "dns.http: 65 addresses; at most 64"),
        ("{listen: ['fe80::1%eth0']}", r"dns.listen\[0\]: 'fe80::1%eth0' is .* one interface's"),
        ("{domains: []}", "dns.domains: must not be empty"),
        ("{domains: ['.']}", r"dns.domains\[0\]: '.' is the root"),
        ("{allow: [10.0.0.0/33]}", r"dns.allow\[0\]: '10.0.0.0/33'"),
        ("{pods: some}", "dns.pods: Invalid enum value 'some'"),
        ("{tll: 4}", "dns.tll: there is no such field; did you mean dns.ttl?"),
        ("{forward: {upstreams: [nobody]}}", r"dns.forward.upstreams\[0\]: 'nobody'"),
        ("{forward: {attempts: 0}}", "dns.forward.attempts: 0 is not from 1"),
        (
            "{forward: {stubDomains: {Shop.Cluster.Local: [192.0.2.1]}}}",
            r"dns.forward.stubDomains\[Shop.Cluster.Local\]: .* in the cluster domain cluster",
        ),
        (
            "{domains: [a.example], forward: {hosts: [192.0.2.1 x.example b.a.example]}}",
            r"dns.forward.hosts\[0\]: 'b.a.example.' is in the cluster domain a.example",
        ),
        (
            "{forward: {records: [x.svc.cluster.local A 192.0.2.1]}}",
            r"dns.forward.records\[0\]: 'x.svc.cluster.local.' is in the cluster domain",
        ),
        (
            "{reverse: [10.0.0.0/8], forward: {stubDomains: {1.10.in-addr.arpa: [192.0.2.1]}}}",
            r"dns.forward.stubDomains\[1.10.in-addr.arpa\]: .* the reverse zone of 10.0.0.0/8",
        ),
        ("{tcpIdleSeconds: long}", "dns.tcpIdleSeconds: Expected `float`, got `str`"),
    ],
)
def test_problems_name_the_file_and_the_field(tmp_path: Path, yaml: str, said: str) -> None:
    file = tmp_path / "vipd.yaml"
    file.write_text(f"{HEAD}dns: {yaml}\n")
    with pytest.raises(ConfigError, match=f"^{file}: {said}"):
        load(Flags(config=str(file)))


def test_what_lies_beside_the_cluster_may_be_said(tmp_path: Path) -> None:
    file = tmp_path / "vipd.yaml"
    stubs = "stubDomains: {local: [192.0.2.1], xcluster.local: [192.0.2.1]}"
    forward = f"{{{stubs}, hosts: [10.1.1.1 x.example]}}"
    file.write_text(f"{HEAD}dns: {{reverse: [10.0.0.0/8], forward: {forward}}}\n")
    assert load(Flags(config=str(file))).dns.forward.hosts == ("10.1.1.1 x.example",)


def test_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "vipd.yaml"
    file.write_text(f"{HEAD}dns: {{listen: [127.0.0.1], ttl: 7, domains: [a.example]}}\n")
    told = Flags(config=str(file), dns_listen=("127.0.0.2:53",), cluster_domain=("b.example",))
    settings = load(told).dns
    assert (settings.listen, settings.domains) == (("127.0.0.2:53",), ("b.example",))
    assert settings.ttl == 7


def test_problems_of_flags_name_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--dns-listen: 'x' is no ADDRESS:PORT"):
        load(Flags(dns_listen=("x",)))
    with pytest.raises(ConfigError, match=r"^--cluster-domain: "):
        load(Flags(cluster_domain=("a..b",)))
