"""Connections that say nothing: `python -m vipd.bench.datapath_idle ADDRESS PORT NUMBER`.

Lives here: opening them one after the other. Each asks once, so that it reaches the endpoint.
Prints `NUMBER` once all are open, and keeps them until its standard input ends.
Must not: read anybody's memory.
"""

import os
import resource
import socket
import sys

from vipd.bench.datapath_requests import REQUEST, read_answer

_ANSWER_SECONDS = 5.0


def allow(descriptors: int) -> None:
    """Raise the limits of open files where they are too low; raise OSError or ValueError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, max(hard, descriptors)))


def main() -> None:
    """Do what the arguments say; exit with a sentence where one connection is not to be had."""
    address, port, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    kept: list[socket.socket] = []
    try:
        allow(number + 100)
        for _ in range(number):
            opened = socket.create_connection((address, port), _ANSWER_SECONDS)
            kept.append(opened)
            opened.sendall(REQUEST)
            read_answer(opened)
    except (OSError, ValueError) as failure:
        sys.exit(f"{address}:{port}: connection {len(kept)}: {failure}")
    print(len(kept), flush=True)
    os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    main()
