"""The endpoint of `vipd bench sync`: answers every connection with the address it was reached at.

Lives here: the server process, `python -m vipd.bench.sync_server PORT`. It stands for all endpoints
at once, because its host has a local route for their whole range. Must not: import anything big.
"""

import socket
import sys


def main() -> None:
    """Serve for ever; print a line once connections are accepted."""
    listener = socket.create_server(("0.0.0.0", int(sys.argv[1])), backlog=4096)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        try:
            connection.sendall(connection.getsockname()[0].encode())
        except OSError:
            pass  # the prober gave up on this one
        finally:
            connection.close()


if __name__ == "__main__":
    main()
