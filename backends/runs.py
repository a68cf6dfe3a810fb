"""Who changed the kernel: this process and the tools it runs, or somebody else.

Lives here: the process ids of our tools and the ports of our netlink sockets, of late. Must not:
run anything. The kernel's notifications name who made a change by one of both.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable


class Runs:
    """The last runs of nft and the iptables tools by this process, and its last netlink sockets."""

    def __init__(self) -> None:
        self._processes: deque[int] = deque(maxlen=256)
        self._ports: deque[int] = deque(maxlen=256)
        self._starting = 0
        self._started = asyncio.Event()

    @contextlib.asynccontextmanager
    async def starting(self) -> AsyncIterator[Callable[[int], None]]:
        """Give what is to be called with the process id, as soon as that is known."""
        self._starting += 1
        try:
            yield self._processes.append
        finally:
            self._starting -= 1
            self._started.set()

    def note_port(self, port: int) -> None:
        """Note the port of a netlink socket of this process."""
        self._ports.append(port)

    def has_port(self, port: int) -> bool:
        """Return whether a netlink socket of this process has or had the port."""
        return port in self._ports

    async def include(self, *processes: int) -> bool:
        """Whether one of these is a run of ours; of one that starts the id is waited for.

        The first is the port of the netlink socket, which is the process id as a rule.
        """
        while processes[0] not in self._processes and self._starting:
            self._started.clear()
            await self._started.wait()
        return processes[0] in self._ports or any(one in self._processes for one in processes)


RUNS = Runs()
