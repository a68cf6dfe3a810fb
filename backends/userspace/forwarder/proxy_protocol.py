"""The header of PROXY protocol version 2, which tells an endpoint who its client is.

Lives here: its encoding for TCP over IPv4 and IPv6. Pure. Must not: decode, or know sockets.
Source: "The PROXY protocol", versions 1 & 2, HAProxy project, §2.2.
"""

from vipd.proxy.names import Address

_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_VERSION_2_PROXY = b"\x21"
_TCP = {4: b"\x11", 6: b"\x21"}


def header(client: Address, client_port: int, address: Address, port: int) -> bytes:
    """Return what is sent to the endpoint first: 28 bytes for IPv4, 52 for IPv6.

    `address` and `port` are those that the client connected to. Raises ValueError where the two
    addresses are not of one family.
    """
    if client.version != address.version:
        raise ValueError(f"{client} and {address} are not of one family")
    addresses = client.packed + address.packed
    ports = client_port.to_bytes(2, "big") + port.to_bytes(2, "big")
    body = addresses + ports
    return b"".join(
        (_SIGNATURE, _VERSION_2_PROXY, _TCP[client.version], len(body).to_bytes(2, "big"), body)
    )
