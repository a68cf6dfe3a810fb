"""The modes there are, by name.

Lives here: the one place that knows every backend. Imports a backend only when it is asked for.
"""

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from vipd.backends.protocol import Compiler, Driver
from vipd.proxy.errors import ConfigError

MODES = ("nftables",)


class Backend(Struct, frozen=True):
    """Both halves of a backend; programs and plans of one fit no other."""

    compiler: Compiler[Any, Any, Any]
    driver: Driver[Any, Any]


def backend(mode: str, inherited: Sequence[int] = ()) -> Backend:
    """Return the backend of a mode; its tools hold the `inherited` descriptors while they run."""
    if mode == "nftables":
        from vipd.backends.nftables.backend import NftablesCompiler
        from vipd.backends.nftables.driver import NftablesDriver

        return Backend(NftablesCompiler(), NftablesDriver(inherited=inherited))
    raise ConfigError("--mode", f"{mode!r} is no mode; there is: {', '.join(MODES)}")
