"""Questions as bytes: every row of the table of malformed input (reference dns.md 5.3)."""

import dns.message
import pytest

from vipd.dns.message import Malformed, Query, asked_again, header_only, parse
from vipd.dns.records import Rcode

NAME = b"\x03Web\x07default\x03svc\x07cluster\x05local\0"
QUESTION = NAME + b"\0\x01\0\x01"
OPT = b"\0\0\x29\x04\xd0\0\0\0\0\0\0"
TSIG = b"\x03key\0\0\xfa\0\xff\0\0\0\0\0\x00"


def message(*sections: bytes, flags: int = 0x0100, counts: tuple[int, ...] = (1, 0, 0, 0)) -> bytes:
    """Return a message of id 0xABCD."""
    head = b"\xab\xcd" + flags.to_bytes(2) + b"".join(n.to_bytes(2) for n in counts)
    return head + b"".join(sections)


def refused(data: bytes) -> bytes | None:
    """Return the reply to what is malformed."""
    with pytest.raises(Malformed) as caught:
        parse(data)
    return caught.value.reply


def with_opt(opt: bytes) -> bytes:
    """Return a query with this OPT record."""
    return message(QUESTION, opt, counts=(1, 0, 0, 1))


def test_a_question() -> None:
    query = parse(message(QUESTION))
    assert query == Query(b"\xab\xcd", 0x0100, NAME, NAME.lower(), 1, 1, None)
    assert query.recursion_desired
    assert not query.checking_disabled
    assert not query.dnssec_ok
    assert query.question == QUESTION


def test_flags_of_a_question() -> None:
    query = parse(message(QUESTION, flags=0x0010))
    assert query.checking_disabled
    assert not query.recursion_desired


def test_what_an_opt_record_says() -> None:
    option = b"\0\x0a\0\x08cookie12" + b"\xfd\xe9\0\0"
    opt = b"\0\0\x29\x10\0\0\0\x80\0" + len(option).to_bytes(2) + option
    edns = parse(with_opt(opt)).edns
    assert edns is not None
    assert (edns.size, edns.version, edns.dnssec_ok) == (4096, 0, True)
    assert edns.options == ((10, b"cookie12"), (65001, b""))


def test_smaller_sizes_count_as_512() -> None:
    edns = parse(with_opt(b"\0\0\x29\0\x10\0\0\0\0\0\0")).edns
    assert edns is not None
    assert edns.size == 512


def test_messages_of_dnspython_are_read_alike() -> None:
    theirs = dns.message.make_query("Web.Default.svc.cluster.local", "AAAA", want_dnssec=True)
    query = parse(theirs.to_wire())
    assert int.from_bytes(query.id) == theirs.id
    assert query.name == theirs.question[0].name.to_wire()
    assert (query.type, query.class_) == (28, 1)
    assert query.dnssec_ok


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xab",
        message()[:11],
        message(QUESTION, flags=0x8100),
        message(QUESTION, flags=0xF800),
    ],
    ids=["nothing", "a byte", "11 bytes", "a reply", "a reply of an unknown kind"],
)
def test_silence(data: bytes) -> None:
    assert refused(data) is None


@pytest.mark.parametrize("opcode", range(1, 16))
def test_other_opcodes_are_not_implemented(opcode: int) -> None:
    """IQUERY, STATUS, NOTIFY, UPDATE, DSO and those without a name; RD and the opcode come back."""
    flags = opcode << 11 | 0x0130
    assert refused(message(QUESTION, flags=flags)) == (
        b"\xab\xcd" + (0x8000 | opcode << 11 | 0x0100 | 4).to_bytes(2) + bytes(8)
    )


POINTER_TO_ITSELF = b"\xc0\x0c"
MALFORMED = {
    "no question": message(counts=(0, 0, 0, 0)),
    "no question but a cookie": message(
        b"\0\0\x29\x04\xd0\0\0\0\0\0\x0c\0\x0a\0\x08cookie12", counts=(0, 0, 0, 1)
    ),
    "two questions": message(QUESTION, QUESTION, counts=(2, 0, 0, 0)),
    "a question promised": message(),
    "a question cut in the name": message(NAME[:7]),
    "a question cut before the end of the name": message(NAME[:-1]),
    "a question cut in the type": message(NAME, b"\0"),
    "a question cut in the class": message(NAME, b"\0\x01\0"),
    "a pointer to itself": message(POINTER_TO_ITSELF, b"\0\x01\0\x01"),
    "a pointer forward": message(b"\xc0\x14", b"\0\x01\0\x01", NAME),
    "a pointer back into the header": message(b"\x01a\xc0\x04", b"\0\x01\0\x01"),
    "a pointer into the question": message(b"\x01a\xc0\x0c", b"\0\x01\0\x01"),
    "half a pointer": message(b"\xc0"),
    "label type 01": message(b"\x41" + b"a" * 65 + b"\0", b"\0\x01\0\x01"),
    "label type 10": message(b"\x81" + b"a" * 129 + b"\0", b"\0\x01\0\x01"),
    "a label of 64": message(b"\x40" + b"a" * 64 + b"\0", b"\0\x01\0\x01"),
    "a name of 256": message(b"\x03abc" * 63 + b"\x02ab\0", b"\0\x01\0\x01"),
    "a name without end": message(b"\x01a" * 30000),
    "two answers": message(QUESTION, TSIG, TSIG, counts=(1, 2, 0, 0)),
    "two authority records": message(QUESTION, TSIG, TSIG, counts=(1, 0, 2, 0)),
    "three additional records": message(QUESTION, OPT, OPT, OPT, counts=(1, 0, 0, 3)),
    "an additional record promised": message(QUESTION, counts=(1, 0, 0, 1)),
    "more promised than could be": message(QUESTION, counts=(1, 65535, 65535, 65535)),
    "two OPT": message(QUESTION, OPT, OPT, counts=(1, 0, 0, 2)),
    "OPT with an owner": with_opt(b"\x01a" + OPT),
    "OPT whose owner is a pointer to the root": message(
        NAME, b"\0\x01\0\x01", b"\xc0" + bytes((12 + len(NAME) - 1,)) + OPT[1:], counts=(1, 0, 0, 1)
    ),
    "OPT as an answer": message(QUESTION, OPT, counts=(1, 1, 0, 0)),
    "OPT as authority": message(QUESTION, OPT, counts=(1, 0, 1, 0)),
    "OPT cut": with_opt(OPT[:-1]),
    "OPT longer than the message": with_opt(OPT[:-2] + b"\0\x01"),
    "OPT with half an option": with_opt(OPT[:-2] + b"\0\x03\0\x0a\0"),
    "OPT with an option longer than itself": with_opt(OPT[:-2] + b"\0\x05\0\x0a\0\x02a"),
    "signed": message(QUESTION, TSIG, counts=(1, 0, 0, 1)),
    "OPT, and signed": message(QUESTION, OPT, TSIG, counts=(1, 0, 0, 2)),
    "an owner that is half a pointer": message(QUESTION, b"\xc0", counts=(1, 0, 0, 1)),
    "an owner of label type 10": message(QUESTION, b"\x80" + OPT, counts=(1, 0, 0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_format_errors_are_told_with_the_header_alone(data: bytes) -> None:
    assert refused(data) == b"\xab\xcd\x81\x01" + bytes(8)


TOLERATED = {
    "bytes behind the message": message(QUESTION, b"\0\xff\x07"),
    "the Z bit": message(QUESTION, flags=0x0140),
    "AA, TC and RA": message(QUESTION, flags=0x0780),
    "an rcode": message(QUESTION, flags=0x010F),
    "an authority record (IXFR)": message(
        QUESTION, b"\xc0\x0c\0\x06\0\x01\0\0\0\0\0\x02hi", counts=(1, 0, 1, 0)
    ),
    "padding": message(
        QUESTION, OPT[:-2] + b"\x01\x90" + b"\0\x0c\x01\x8c" + bytes(396), counts=(1, 0, 0, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("data", TOLERATED.values(), ids=TOLERATED)
def test_what_does_no_harm_is_ignored(data: bytes) -> None:
    query = parse(data)
    assert (query.key, query.type, query.class_) == (NAME.lower(), 1, 1)


@pytest.mark.parametrize(
    "name",
    [
        b"\x03a.b\0",
        b"\x03a\0b\0",
        b"\x02\xff\xfe\0",
        b"\0",
        b"\x01 \0",
        b"\x03abc" * 63 + b"\x01a\0",
    ],
)
def test_labels_are_octets_whatever_they_hold(name: bytes) -> None:
    query = parse(message(name, b"\0\x01\0\x01"))
    assert query.name == name
    assert query.key == name


def test_only_letters_of_ascii_are_folded() -> None:
    name = bytes((63, *range(0x40, 0x7F))) + bytes((63, *range(0xC0, 0xFF))) + b"\0"
    folded = parse(message(name, b"\0\x01\0\x01")).key
    assert folded == name.translate(bytes(c + 32 if 65 <= c <= 90 else c for c in range(256)))
    assert folded[0] == 63


def test_the_same_question_with_another_name() -> None:
    first = parse(with_opt(OPT))
    other = b"\x05Other\0\0\x1c\0\x01"
    data = message(other, OPT, counts=(1, 0, 0, 1))
    assert asked_again(data, 12 + len(other), first) == parse(data)


@pytest.mark.parametrize(
    "rest",
    [
        b"\x41" + b"a" * 65 + b"\0\0\x01\0\x01",
        b"\x03abc" * 63 + b"\x02ab\0\0\x01\0\x01",
        b"\x05a\0\0\x01\0\x01",
        b"\x01a\0\0\x01\0",
        b"\x01a\0",
        b"\x01a",
        b"",
    ],
)
def test_another_question_that_is_malformed(rest: bytes) -> None:
    first = parse(message(QUESTION))
    data = message(rest)
    with pytest.raises(Malformed) as caught:
        asked_again(data, data.find(0, 12) + 5, first)
    assert caught.value.reply == b"\xab\xcd\x81\x01" + bytes(8)


def test_another_name_with_a_nul_in_it() -> None:
    """What seems to be the end of the name is none: the message is read from the beginning."""
    data = message(b"\x03a\0b\0\0\x01\0\x01")
    first = parse(message(b"\x01a\0\0\x01\0\x01"))
    assert asked_again(data, data.find(0, 12) + 5, first) == parse(data)


def test_replies_without_sections() -> None:
    assert header_only(message(flags=0x0130), Rcode.REFUSED) == b"\xab\xcd\x81\x05" + bytes(8)
