"""Which tables nftables has, and the rules of one chain, asked of the kernel itself.

Lives here: those two listings. `nft list tables` reads the whole rule set first: 0.4 s and 70 MB
with 70,000 elements (nft 1.0.6), where this is one answer of some hundred bytes.
Source: include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h, Linux 6.1.
"""

import errno
import struct

from vipd.backends import netlink
from vipd.backends.netlink import DUMP, HEADER, REQUEST, attribute, attributes
from vipd.proxy.errors import DataplaneError, OutOfStep, Unsupported

_GET_TABLE = 10 << 8 | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_GET_RULE = 10 << 8 | 7  # NFT_MSG_GETRULE
_NAME = 1  # NFTA_TABLE_NAME
_RULE_TABLE, _RULE_CHAIN = 1, 2
_ANY_FAMILY = struct.pack("=BBH", 0, 0, 0)
_WORDS = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_NUMBERS = {word: number for number, word in _WORDS.items()}
_NO_NF_TABLES = (errno.EOPNOTSUPP, errno.EINVAL, errno.EPROTONOSUPPORT, errno.ENOENT)


def listed() -> set[tuple[str, str]]:
    """Return every table: (family word as nft has it, name). Raise DataplaneError."""
    asking = HEADER.pack(HEADER.size + len(_ANY_FAMILY), _GET_TABLE, REQUEST | DUMP, 0, 0)
    try:
        with netlink.netfilter() as socket:
            answers = socket.ask(asking + _ANY_FAMILY)
    except (OSError, DataplaneError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NO_NF_TABLES:
            raise Unsupported("nf_tables", "a kernel with nf_tables") from error
        raise
    return {_table(one) for one in answers}


def rules(word: str, table: str, chain: str) -> list[bytes]:
    """Return the rules of a chain as the kernel tells them; none where there is no such chain.

    Raise DataplaneError.
    """
    said = struct.pack("=BBH", _NUMBERS[word], 0, 0)
    said += attribute(_RULE_TABLE, f"{table}\0".encode()) + attribute(
        _RULE_CHAIN, f"{chain}\0".encode()
    )
    asking = HEADER.pack(HEADER.size + len(said), _GET_RULE, REQUEST | DUMP, 0, 0) + said
    try:
        with netlink.netfilter() as socket:
            return socket.ask(asking)
    except OutOfStep:
        return []


def _table(answer: bytes) -> tuple[str, str]:
    family = answer[HEADER.size]
    name = dict(attributes(answer, HEADER.size + len(_ANY_FAMILY))).get(_NAME, b"")
    return _WORDS.get(family, str(family)), name.rstrip(b"\0").decode(errors="replace")
