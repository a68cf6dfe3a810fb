"""One run of a tool that reads its script from standard input: nft, and those of iptables.

Lives here: starting it, waiting for its end, and letting it be known for ours (runs.py). Must not:
know what its script is about, or what its failure means.
"""

import asyncio
import os
from collections.abc import Sequence
from typing import NamedTuple

from vipd.backends.runs import RUNS
from vipd.proxy.errors import Busy, UnknownResult


class Ended(NamedTuple):
    """How a run ended: exit code, or a signal's number below 0; standard output; and error."""

    code: int
    printed: bytes
    said: str


async def ended(
    command: Sequence[str], text: str, patience_seconds: float, inherited: Sequence[int] = ()
) -> Ended:
    """Run a command to its end; `inherited` are descriptors that it holds, too.

    Raise Busy where it cannot be started, UnknownResult where it takes longer than it may.
    """
    try:
        process = await _start(command, text, inherited)
    except OSError as error:
        # Even "no such file": a package upgrade puts it back in a moment.
        raise Busy(f"{command[0]} cannot be started: {error.strerror}") from error
    try:
        async with asyncio.timeout(patience_seconds):
            printed, complaint = await process.communicate()
    except TimeoutError as error:
        name = os.path.basename(command[0])
        raise UnknownResult(f"{name} did not end within {patience_seconds:.0f} s") from error
    finally:
        if process.returncode is None:  # out of patience, or cancelled: it must not write on
            process.kill()
            await process.wait()
        RUNS.ended(process.pid)
    return Ended(process.returncode or 0, printed, complaint.decode(errors="replace"))


async def _start(
    command: Sequence[str], text: str, inherited: Sequence[int]
) -> asyncio.subprocess.Process:
    # A file in memory instead of a pipe: the tool reads it at its own pace, whatever else this
    # process is computing.
    script = os.memfd_create("script")
    try:
        with os.fdopen(script, "w", encoding="utf-8", closefd=False) as file:
            file.write(text)
        os.lseek(script, 0, os.SEEK_SET)
        async with RUNS.starting() as started:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=script,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C"},
                pass_fds=tuple(inherited),
            )
            started(process.pid)
        return process
    finally:
        os.close(script)
