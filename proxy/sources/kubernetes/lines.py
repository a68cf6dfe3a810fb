"""Bytes as they arrive, cut into lines: a watch is a stream of them, one event in each.

Lives here: what is left of a line until its end comes. Must not: know what a line says.
"""


class LineTooLong(Exception):
    """A line is longer than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"a line is longer than {limit >> 20} MiB")


class Lines:
    """Cuts a stream into lines. Never keeps more than `limit` bytes and one chunk."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that end in this chunk, without their ends; empty ones are left out.

        Raise LineTooLong; the rest of the stream is of no use then.
        """
        *ended, rest = chunk.split(b"\n")
        if ended:
            self._parts.append(ended[0])
            ended[0] = b"".join(self._parts)
            self._parts, self._size = [], 0
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
        if self._size > self._limit or any(len(line) > self._limit for line in ended):
            raise LineTooLong(self._limit)
        return [line for line in ended if line.strip()]
