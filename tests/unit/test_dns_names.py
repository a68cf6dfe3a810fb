"""Domain names as text, on the wire, of addresses."""

from ipaddress import ip_address

import dns.name
import dns.reversename
import pytest

from vipd.dns.names import address_in, dashed, label_wire, reverse_name, starts, text_of, wire


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (".", b"\0"),
        ("local", b"\x05local\0"),
        ("Cluster.Local.", b"\x07cluster\x05local\0"),
        ("_http._tcp.x", b"\x05_http\x04_tcp\x01x\0"),
        ("a" * 63, b"\x3f" + b"a" * 63 + b"\0"),
    ],
)
def test_text_becomes_a_key(text: str, key: bytes) -> None:
    assert wire(text) == key
    assert dns.name.from_text(text.lower()).to_wire() == key


@pytest.mark.parametrize(
    "text",
    ["", "..", "a..b", ".a", "a" * 64, "a b", "é", "a\n", "\x7f", "a\0b", ".".join(["abc"] * 64)],
)
def test_text_that_is_no_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"no label|longer"):
        wire(text)


def test_the_longest_name() -> None:
    text = ".".join(["abc"] * 63) + ".a"
    assert len(wire(text)) == 255
    with pytest.raises(ValueError, match="longer"):
        wire(text + "b")


def test_a_label_may_have_63_characters() -> None:
    assert label_wire("A" * 63) == b"\x3f" + b"a" * 63
    with pytest.raises(ValueError, match="1 to 63"):
        label_wire("a" * 64)


@pytest.mark.parametrize(
    "name", [b"\0", b"\x01a\0", b"\x03a.b\x01\0\x01c\0", b'\x04\xff\\\x20"\0', b"\x05@$();\0"]
)
def test_names_are_shown_so_that_they_can_be_read_again(name: bytes) -> None:
    assert dns.name.from_text(text_of(name)).to_wire() == name


def test_where_labels_begin() -> None:
    assert starts(b"\0") == []
    assert starts(b"\x03a.b\x01c\0") == [0, 4]


@pytest.mark.parametrize("text", ["10.0.0.1", "255.255.255.255", "0.0.0.0", "fd00::1", "::"])
def test_reverse_names_of_addresses(text: str) -> None:
    packed = ip_address(text).packed
    assert reverse_name(packed) == dns.reversename.from_address(text).to_wire()


@pytest.mark.parametrize(
    ("address", "label"),
    [
        ("10.244.1.21", b"10-244-1-21"),
        ("fd00:244::21", b"fd00-244--21"),
        ("fd00::", b"fd00--0"),
        ("::1", b"0--1"),
        ("::", b"0--0"),
        ("1:2:3:4:5:6:7:8", b"1-2-3-4-5-6-7-8"),
    ],
)
def test_addresses_are_labels_and_back(address: str, label: bytes) -> None:
    packed = ip_address(address).packed
    assert dashed(packed) == label
    assert address_in(label) == packed


@pytest.mark.parametrize(
    "label",
    [
        b"", b"-", b"10-0-0", b"10-0-0-256", b"10-0-0-01", b"10-0-0-1-1", b"10.0.0.1", b"1:2",
        b"--ffff-10.0.0.1", b"fd00--1%eth0", b"fd00--1--2", b"web", b"10-0-0-1 ", b"\xff-0-0-1",
        b"FD00--1", b"--", b"---", b"1-2-3-4-5-6-7", b"12345--",
    ],
)  # fmt: skip
def test_labels_that_are_no_addresses(label: bytes) -> None:
    # "--" is the address ::, and stays one in another spelling.
    assert address_in(label) == (bytes(16) if label == b"--" else None)
