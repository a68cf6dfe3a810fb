"""The modes there are, by name.

Lives here: the one place that knows every backend. Imports a backend only when it is asked for.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from vipd.backends.protocol import Compiler, Driver
from vipd.proxy.errors import ConfigError
from vipd.proxy.settings import DataplaneSettings

MODES = ("nftables", "iptables", "ipvs", "userspace")
"""In the order in which ``auto`` tries them."""
AUTO = "auto"
"""Not a mode, but may be configured as one: the first of MODES that works on this host."""
NEED_OWN_ADDRESSES = ("ipvs", "userspace")
"""Modes that have to know every address of this node's interfaces."""
END_FLOWS = ("ipvs", "userspace")
"""Modes whose removal ends the flows that they still carry. Those of the others hang on their
conntrack entries alone, and go on."""
_DEFAULT = DataplaneSettings()
WITH_SKELETON = ("nftables",)
"""Modes whose own program holds the skeleton."""
STATE_DIRECTORY = Path("/run/vipd")
"""Where a dataplane records what it changed outside its own objects, such as sysctls."""


class Backend(Struct, frozen=True):
    """Both halves of a backend; programs and plans of one fit no other."""

    compiler: Compiler[Any, Any, Any]
    driver: Driver[Any, Any]


def backend(
    mode: str,
    settings: DataplaneSettings = _DEFAULT,
    inherited: Sequence[int] = (),
    state: Path = STATE_DIRECTORY,
) -> Backend:
    """Return the backend of a mode; its tools hold the `inherited` descriptors while they run."""
    match mode:
        case "nftables":
            from vipd.backends.nftables.backend import NftablesCompiler
            from vipd.backends.nftables.driver import NftablesDriver

            return Backend(NftablesCompiler(), NftablesDriver(inherited=inherited))
        case "iptables":
            from vipd.backends.iptables.backend import IptablesCompiler
            from vipd.backends.iptables.driver import IptablesDriver

            return Backend(IptablesCompiler(settings), IptablesDriver(settings, inherited))
        case "ipvs":
            from vipd.backends.ipvs.backend import IpvsCompiler
            from vipd.backends.ipvs.driver import IpvsDriver

            return Backend(IpvsCompiler(settings), IpvsDriver(settings, inherited, state))
        case "userspace":
            from vipd.backends.userspace.backend import UserspaceCompiler
            from vipd.backends.userspace.driver import UserspaceDriver

            return Backend(UserspaceCompiler(settings), UserspaceDriver(settings, inherited, state))
        case _:
            raise ConfigError("--mode", f"{mode!r} is no mode; there is: {', '.join(MODES)}")
