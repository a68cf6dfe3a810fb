"""A name server that knows every name: `python -m vipd.bench.dns_upstream ADDRESS`.

Lives here: whom servers under test forward to. Port 53, UDP, IPv4; every A is 192.0.2.1 for an
hour, everything else is no data. Prints a line when it is open.
"""

import socket
import sys

_ANSWER = b"\xc0\x0c\x00\x01\x00\x01" + (3600).to_bytes(4) + b"\x00\x04" + bytes((192, 0, 2, 1))
_A_IN = b"\x00\x01\x00\x01"


def reply(data: bytes) -> bytes:
    """Return the answer to a question, with the name as it was spelled."""
    end = data.index(0, 12) + 5
    is_address = data[end - 4 : end] == _A_IN
    counts = b"\x00\x01" + is_address.to_bytes(2) + bytes(4)
    return data[:2] + b"\x81\x80" + counts + data[12:end] + (_ANSWER if is_address else b"")


def main() -> None:
    """Answer until killed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.bind((sys.argv[1], 53))
        print("open", flush=True)
        while True:
            data, source = opened.recvfrom(4096)
            opened.sendto(reply(data), source)


if __name__ == "__main__":
    main()
