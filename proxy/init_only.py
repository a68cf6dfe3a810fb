"""What takes privileges that a daemon may be without: kernel settings, made once (--init-only).

Lives here: in which order. Must not: program services. kube-proxy has the same flag, for a
container that runs with more privileges and ends before the daemon starts.
"""

from pathlib import Path

import structlog

from vipd.backends.protocol import SettingUp
from vipd.backends.registry import backend
from vipd.proxy import kernel_settings
from vipd.proxy.choice import choose
from vipd.proxy.config import Config

log = structlog.get_logger()


async def initialise(config: Config) -> list[str]:
    """Set what the configuration and its mode mean; return sentences about what could not be set.

    Raise Unsupported where the mode does not work here at all.
    """
    refused: list[str] = []
    if config.conntrack is not None:
        refused += kernel_settings.apply(config.conntrack)
    chosen = await choose(config)
    driver = backend(chosen.mode, config.dataplane, state=Path(config.socket).parent).driver
    if isinstance(driver, SettingUp):
        refused += await driver.set_up()
    for one in refused:
        log.warning("kernel setting refused", why=one)
    log.info("kernel settings made", mode=chosen.mode, refused=len(refused))
    return refused
