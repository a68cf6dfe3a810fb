"""Configuration: files of kind VipdConfiguration and KubeProxyConfiguration, and flags.

Lives here: reading and checking of settings. Must not: act on them. Every problem is a ConfigError
that names the file and field, or the flag.
"""

from vipd.proxy.config.effective import Config, as_file
from vipd.proxy.config.flags import Flags
from vipd.proxy.config.loading import Loaded, examined, load, loaded
from vipd.proxy.config.notes import Note
from vipd.proxy.config.vipd_configuration import DEFAULT_SOCKET

__all__ = [
    "DEFAULT_SOCKET",
    "Config",
    "Flags",
    "Loaded",
    "Note",
    "as_file",
    "examined",
    "load",
    "loaded",
]
