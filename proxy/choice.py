"""Which mode a daemon begins with: what is configured, what was switched to, what works here.

Lives here: probing modes at a start. Must not: program anything, or know how a switch goes on.
"""

from msgspec import Struct, structs

from vipd.backends.registry import AUTO, MODES, Backend, backend
from vipd.proxy.config import Config
from vipd.proxy.errors import DataplaneError, Unsupported
from vipd.proxy.switch import Record, restarted


class Chosen(Struct, frozen=True):
    """The mode that a configuration means on this host; `why` is said where it had a choice."""

    mode: str
    why: str = ""


async def begin(config: Config, left: Record | None) -> Record:
    """Return the record that a daemon begins with, from what the last one left.

    A mode that is configured by name is not probed: its first sync tells. Raise Unsupported where
    the configuration leaves the mode open and none works.
    """
    if left is None or left.configured != config.mode:
        chosen = Chosen(config.mode) if config.mode != AUTO else await choose(config)
    elif left.state.serving == config.mode:
        return structs.replace(left, state=restarted(left, config.mode, config.mode))
    else:
        serving = left.state.serving
        try:
            await require(backend(serving, config.dataplane))
        except Unsupported as error:
            chosen = await choose(config) if config.mode == AUTO else Chosen(config.mode)
            # The configuration decides, as if it had been changed.
            left = structs.replace(left, configured="")
            chosen = Chosen(chosen.mode, f"{serving}, which was in use, is gone: {error}")
        else:
            return structs.replace(left, state=restarted(left, config.mode, serving))
    state = restarted(left, config.mode, chosen.mode)
    return Record(config.mode, state, chosen.mode, chosen.why)


async def choose(config: Config) -> Chosen:
    """Return the mode that the configuration means: the first that works here, where it is auto.

    Raise Unsupported with everything that is missing where there is none.
    """
    if config.mode != AUTO:
        await require(backend(config.mode, config.dataplane))
        return Chosen(config.mode)
    failures = []
    for mode in MODES:
        try:
            await require(backend(mode, config.dataplane))
        except Unsupported as error:
            failures.append(str(error))
        else:
            why = "; ".join(failures) or f"everything that {mode} needs is here"
            return Chosen(mode, why)
    raise Unsupported("no mode works here", "; ".join(failures))


async def require(dataplane: Backend) -> None:
    """Raise Unsupported where the mode cannot work here, with all that is missing."""
    mode = dataplane.compiler.mode
    try:
        capabilities = await dataplane.driver.probe()
    except DataplaneError as error:
        raise Unsupported(f"mode {mode} does not work here", str(error)) from error
    missing = [one for one in capabilities.found if one.needed and not one.present]
    if missing:
        raise Unsupported(
            f"mode {mode} does not work here",
            "; ".join(f"no {one.name}: {one.remedy or one.detail}" for one in missing),
        )
