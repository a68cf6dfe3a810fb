"""Who changed the kernel: this process and the tools it runs, or somebody else.

Lives here: the process ids of our tools while they run, and the ports of our netlink sockets, of
late. Must not: run anything. The kernel's notifications name who made a change by one of both.

A tool's port is its process id as its own PID namespace has it, and somebody else's may be the same
number in another one. So an id counts only while the tool runs, and a little longer.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

KEPT_SECONDS = 5.0
"""After the end of a run: what the kernel told of it may not have been read yet."""


class Runs:
    """The runs of nft and the iptables tools by this process, and its last netlink sockets.

    `clock` returns seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._running: set[int] = set()
        self._ended: deque[tuple[float, int]] = deque()
        self._ports: deque[int] = deque(maxlen=256)
        self._starting = 0
        self._started = asyncio.Event()
        self._clock = clock

    @contextlib.asynccontextmanager
    async def starting(self) -> AsyncIterator[Callable[[int], None]]:
        """Give what is to be called with the process id, as soon as that is known."""
        self._starting += 1
        try:
            yield self._running.add
        finally:
            self._starting -= 1
            self._started.set()

    def ended(self, process: int) -> None:
        """Note that a run is over."""
        self._forget()
        self._running.discard(process)
        self._ended.append((self._clock() + KEPT_SECONDS, process))

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
        while not self._has_run(processes[0]) and self._starting:
            self._started.clear()
            await self._started.wait()
        return processes[0] in self._ports or any(map(self._has_run, processes))

    def _has_run(self, process: int) -> bool:
        self._forget()
        return process in self._running or any(one == process for _, one in self._ended)

    def _forget(self) -> None:
        while self._ended and self._ended[0][0] < self._clock():
            self._ended.popleft()


RUNS = Runs()
