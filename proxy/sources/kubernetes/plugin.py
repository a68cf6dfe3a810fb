"""An exec plugin of a kubeconfig: a program that says who we are (client.authentication.k8s.io).

Lives here: running it, bounded in what it may say, and ending it for certain. Must not: quote
anything that it says, on whichever stream: that is where credentials come from.
Source: client-go plugin/pkg/client/auth/exec/exec.go, v1.37.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from vipd.proxy.errors import SourceError

MAX_BYTES = 1 << 20
"""What it may say: a token or a certificate chain with its key are some thousand bytes."""


class Said(Struct, rename="camel"):
    """An ExecCredential. `status` is what the client library takes from there."""

    api_version: str
    kind: str
    status: dict[str, Any]


class Plugin:
    """Stands in for the library's ExecProvider, which leaves a plugin that hangs running for good,
    keeps whatever it writes, and logs its errors.

    `told` is the library's own provider, which has read the section `exec`.
    """

    def __init__(self, told: Any) -> None:
        self._arguments: Sequence[str] = told.args
        self._environment: Mapping[str, str] = told.env
        self._api_version = str(told.api_version)

    async def run(self) -> dict[str, Any]:
        """Return its ``status``. Raise SourceError, or OSError where it cannot be started."""
        asked = {
            "apiVersion": self._api_version,
            "kind": "ExecCredential",
            "spec": {"interactive": False},
        }
        info = {"KUBERNETES_EXEC_INFO": msgspec.json.encode(asked).decode()}
        text = await _output(self._arguments, {**self._environment, **info})
        try:
            said = msgspec.json.decode(text, type=Said)
        except msgspec.DecodeError:
            raise SourceError("the exec plugin printed no ExecCredential with a status") from None
        if said.api_version != self._api_version or said.kind != "ExecCredential":
            why = f"printed no ExecCredential of {self._api_version}"
            raise SourceError(f"the exec plugin {why}")
        return said.status


async def _output(arguments: Sequence[str], environment: Mapping[str, str]) -> bytes:
    process = await asyncio.create_subprocess_exec(
        *arguments,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        said = b""
        while part := await process.stdout.read(1 << 16):
            said += part
            if len(said) > MAX_BYTES:
                raise SourceError(f"the exec plugin printed more than {MAX_BYTES >> 20} MiB")
        code = await process.wait()
    finally:
        # It is the first of its process group, which may outlive it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if code != 0:
        why = f"ended with status {code}; run it by hand to see why: what it prints is not logged"
        raise SourceError(f"the exec plugin {why}")
    return said
