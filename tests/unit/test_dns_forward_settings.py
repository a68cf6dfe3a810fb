"""What operators write: settings, upstreams, resolv.conf, hosts, records."""

import msgspec
import pytest
from msgspec import structs

from vipd.dns import names
from vipd.dns.forward.configured import Files, configure
from vipd.dns.forward.hosts import parse_hosts
from vipd.dns.forward.resolv_conf import parse_resolv_conf
from vipd.dns.forward.settings import CacheSettings, ForwardSettings, Policy, problems
from vipd.dns.forward.static import Record, Static, parse_record
from vipd.dns.forward.upstream import Upstream, parse_upstream


@pytest.mark.parametrize(
    ("text", "upstream", "shown"),
    [
        ("192.0.2.1", Upstream("192.0.2.1"), "192.0.2.1:53"),
        (" 192.0.2.1:5353 ", Upstream("192.0.2.1", 5353), "192.0.2.1:5353"),
        ("2001:DB8::1", Upstream("2001:db8::1"), "[2001:db8::1]:53"),
        ("[2001:db8::1]", Upstream("2001:db8::1"), "[2001:db8::1]:53"),
        ("tcp://[2001:db8::1]:99", Upstream("2001:db8::1", 99, True), "tcp://[2001:db8::1]:99"),
        ("fe80::1%eth0", Upstream("fe80::1%eth0"), "[fe80::1%eth0]:53"),
        ("tcp://192.0.2.1", Upstream("192.0.2.1", 53, True), "tcp://192.0.2.1:53"),
    ],
)
def test_an_upstream_is_an_address(text: str, upstream: Upstream, shown: str) -> None:
    assert parse_upstream(text) == upstream
    assert str(upstream) == shown
    assert parse_upstream(str(upstream)) == upstream


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "ns.example",
            "192.0.2.1:",
            "192.0.2.1:0",
            "192.0.2.1:65536",
            "192.0.2.1:5x",
            "1.2.3",
        ),
        *(
            "[2001:db8::1",
            "[2001:db8::1]x",
            "[2001:db8::1]:",
            "fe80::1",
            "0.0.0.0",
            "::",
            "224.0.0.1",
        ),
        *("https://192.0.2.1", "192.0.2.1:٣", "192.0.2.1 192.0.2.2"),
    ],
)
def test_what_is_no_upstream(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no|has no|needs its"):
        parse_upstream(text)


def test_a_resolv_conf() -> None:
    found = parse_resolv_conf(
        "# a comment\n"
        "nameserver 192.0.2.1  ; another\n"
        "nameserver\t2001:db8::1\n"
        "nameserver 192.0.2.1\n"
        "search a.example b.example\n"
        "options ndots:5 trust-ad use-vc\n"
        "nameserver ns.example\n"
        "nameserver 192.0.2.1:53\n"
        "nameserver\n"
        "unknown words\n"
    )
    assert [str(one) for one in found.upstreams] == ["tcp://192.0.2.1:53", "tcp://[2001:db8::1]:53"]
    assert found.trust_ad
    assert [line.partition(":")[0] for line in found.left_out] == ["line 7", "line 8", "line 9"]


def test_a_resolv_conf_with_too_many() -> None:
    found = parse_resolv_conf("".join(f"nameserver 192.0.2.{n}\n" for n in range(17)))
    assert len(found.upstreams) == 15
    assert found.left_out == tuple(f"line {n}: more than 15 name servers" for n in (16, 17))


def test_hosts() -> None:
    found = parse_hosts(
        "10.0.0.1 a.example A2.example.\n\n# x\nfe80::1%eth0 b.example # y\n"
        "nonsense c.example\n10.0.0.2\n10.0.0.3 d..example e.example\n"
    )
    assert [(str(one.address), names.text_of(one.name)) for one in found.hosts] == [
        ("10.0.0.1", "a.example."),
        ("10.0.0.1", "a2.example."),
        ("fe80::1", "b.example."),
        ("10.0.0.3", "e.example."),
    ]
    assert [number for number, _ in found.left_out] == [5, 6, 7]


def test_a_record() -> None:
    assert parse_record("Web.example. 60 IN A 10.0.0.1", 30) == Record(
        names.wire("web.example"), 1, 60, b"\x0a\0\0\1"
    )
    assert parse_record("web.example CNAME other", 30) == Record(
        names.wire("web.example"), 5, 30, names.wire("other")
    )


@pytest.mark.parametrize(
    "text",
    [
        *("", "web.example", "web.example A", "web.example A 10.0.0.256", "web.example CH TXT x"),
        *("web.example SOA a. b. 1 2 3 4 5", "web.example NS a.", "web.example DNAME a."),
        *("$INCLUDE /etc/passwd", "$ORIGIN example.", "web.example A 10.0.0.1\nx A 10.0.0.2"),
        *("web.example BOGUS x", "web.example TYPE0 x", "web.example 60 60 A 10.0.0.1"),
    ],
)
def test_what_is_no_record(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no record|cannot be given|more than one|only class"):
        parse_record(text, 30)


def test_records_that_cannot_stand_together() -> None:
    name, other = names.wire("a.example"), names.wire("b.example")
    address = Record(name, 1, 30, b"\x0a\0\0\1")
    static = Static([address, Record(name, 5, 30, other), Record(other, 5, 30, name)])
    assert static.left_out == ["a.example.: no other record can stand beside a CNAME"]
    assert static.target(name, 1) is None
    assert static.target(other, 1) == name
    many = [Record(name, 1, 30, n.to_bytes(4, "big")) for n in range(10_000)]
    static = Static(many)
    assert static.left_out
    got = static.find(name, 1)
    assert got is not None
    assert 60_000 < len(got.message) < 65_535


def test_settings_as_they_stand_in_a_file() -> None:
    text = b"""{"upstreams": ["192.0.2.1"], "stubDomains": {"corp.example": ["tcp://10.0.0.53"]},
      "policy": "inOrder", "forwardSingleLabels": true, "cache": {"mostBytes": 1048576}}"""
    found = msgspec.json.decode(text, type=ForwardSettings)
    assert found == ForwardSettings(
        upstreams=("192.0.2.1",),
        stub_domains={"corp.example": ("tcp://10.0.0.53",)},
        policy=Policy.IN_ORDER,
        forward_single_labels=True,
        cache=CacheSettings(most_bytes=1 << 20),
    )
    with pytest.raises(msgspec.ValidationError, match="unknown field `upstream`"):
        msgspec.json.decode(b'{"upstream": []}', type=ForwardSettings)


def test_the_defaults_are_right() -> None:
    assert problems(ForwardSettings()) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"upstreams": ("ns.example",)}, "upstreams[0]: 'ns.example' is no IP address"),
        ({"stub_domains": {"a..b": ()}}, "stubDomains[a..b]: "),
        ({"stub_domains": {"a.b": ("x",)}}, "stubDomains[a.b][0]: 'x' is no IP address"),
        ({"hosts": ("10.0.0.1 a", "x b")}, "hosts[1]: 'x' is no IP address"),
        ({"records": ("a A 1",)}, "records[0]: 'a A 1' is no record"),
        ({"questions": 0}, "questions: 0 is not from 1 to 100000"),
        ({"question_seconds": 0.0}, "questionSeconds: 0.0 is not from 0.1 to 30"),
        ({"least_timeout_seconds": 3.0}, "leastTimeoutSeconds: is more than mostTimeoutSeconds"),
        ({"message_bytes": 65_536}, "messageBytes: 65536 is not from 512 to 65535"),
        ({"cache": CacheSettings(most_bytes=-1)}, "cache.mostBytes: -1 is not from 0"),
        ({"cache": CacheSettings(denial_share=1.0)}, "cache.denialShare: 1.0 is not from"),
        ({"cache": CacheSettings(least_ttl=60, most_ttl=50)}, "cache.leastTtl: is more than"),
        ({"question_seconds": float("nan")}, "questionSeconds: nan is not from 0.1 to 30"),
    ],
)
def test_a_problem_names_its_field(change: dict[str, object], problem: str) -> None:
    found = problems(structs.replace(ForwardSettings(), **change))
    assert len(found) == 1
    assert str(found[0]).startswith(problem)


def test_what_is_left_out_is_told() -> None:
    told: list[dict[str, object]] = []

    def note(event: str, **facts: object) -> None:
        told.append({"event": event, **facts})

    records = tuple(f"a.example CNAME {n}.example" for n in range(30))
    made = configure(ForwardSettings(records=records), Files(), {("192.0.2.1", 53)}, note)
    assert len(told) == 22
    assert told[20]["reason"] == "and 9 more"
    assert "there is no upstream" in str(told[21]["event"])
    assert made.plan[b"\0"] == ()
