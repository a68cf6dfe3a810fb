"""A load on services in the lab: new connections and kept flows from several hosts at once.

Lives here: starting one worker on each host, asking them, adding up what they say. Must not: know
what happens to the services meanwhile. One process for each host (load_worker.py), because a
namespace belongs to a thread and Python's threads share one processor.

    with Load(lab, works) as load:      # every kept flow has had an answer
        …
        load.wait_for(100)              # a hundred new connections more on each host
        report = load.stop()            # every kept flow has spoken once more
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from vipd.bench.lab import Lab
from vipd.bench.lab_errors import LabError
from vipd.bench.load_work import Kind, Report, Work, total

_POLL_SECONDS = 0.05
_LONGEST_SECONDS = 120.0


class Load:
    """The traffic of several hosts. It runs from entering the block until `stop`."""

    def __init__(self, lab: Lab, works: Sequence[Work]) -> None:
        self._lab = lab
        self._works = works
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Load":
        self._workers = [_Worker(self._lab, work) for work in self._works]
        try:
            for worker in self._workers:
                worker.listen()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []

    def counts(self) -> Report:
        """What has become of the load until now."""
        return total(self._each("counts"))

    def wait_for(self, answers: int, alive: Callable[[], None] = lambda: None) -> Report:
        """Wait for so many more attempts to end on each host; return what became of all.

        `alive` raises where there is nothing to wait for. Raise LabError after two minutes.
        """
        wanted = [_ended(one) + answers for one in self._each("counts")]
        deadline = time.monotonic() + _LONGEST_SECONDS
        while True:
            alive()
            reports = self._each("counts")
            if all(_ended(one) >= least for one, least in zip(reports, wanted, strict=True)):
                return total(reports)
            if time.monotonic() > deadline:
                raise LabError(f"no {answers} connections on each host in {_LONGEST_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> Report:
        """Open nothing more, let every kept flow speak once more; return what became of all."""
        return total(self._each("stop"))

    def _each(self, word: str) -> list[Report]:
        for worker in self._workers:
            worker.tell(word)
        return [msgspec.json.decode(worker.listen(), type=Report) for worker in self._workers]


def _ended(report: Report) -> int:
    count = report.counts.get(Kind.NEW_TCP)
    return 0 if count is None else count.answers + count.failed


class _Worker:
    """The process on one host."""

    def __init__(self, lab: Lab, work: Work) -> None:
        self._host = work.host
        # -P: the working directory may hold a folder called dns or bench.
        self._process = lab.popen(
            work.host,
            [sys.executable, "-P", "-m", "vipd.bench.load_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C on the terminal is for whoever started it.
            start_new_session=True,
        )
        self.tell(msgspec.json.encode(work).decode())

    def tell(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise LabError(f"the load on {self._host} has ended") from None

    def listen(self) -> bytes:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise LabError(f"the load on {self._host} ended with {self._process.wait()}")
        return line

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # what was not sent yet is for nobody
                if pipe is not None:
                    pipe.close()
