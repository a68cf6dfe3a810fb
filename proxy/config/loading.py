"""From flags and the file they name to the configuration: who wins, and what has no effect.

Lives here: the order of the places. Must not: know a field, but for those that two kinds of file
mean differently.
"""

from collections.abc import Mapping

from msgspec import Struct

from vipd.proxy.config import flags as of_flags
from vipd.proxy.config import kube_proxy_meaning as of_kube_proxy
from vipd.proxy.config.checks import Checks
from vipd.proxy.config.effective import Config
from vipd.proxy.config.fields import Said, built
from vipd.proxy.config.file import File, read_file
from vipd.proxy.config.flags import Flags
from vipd.proxy.config.notes import Note
from vipd.proxy.config.vipd_configuration import VipdConfiguration
from vipd.proxy.errors import ConfigError

_SOURCES = ("manifests", "kubeconfig")


class Loaded(Struct, frozen=True):
    """The configuration, and how it came about."""

    config: Config
    origins: Mapping[str, str]
    """Who says it, by path of VipdConfiguration; what is not in it is a default."""
    notes: tuple[Note, ...]
    """What is said and has no effect."""
    wrong: tuple[ConfigError, ...]
    """Where there is any, the configuration is not to be used."""


def load(flags: Flags) -> Config:
    """Return the configuration from flags and the file they name. Raise ConfigError."""
    return loaded(flags).config


def loaded(flags: Flags, mode: str = "") -> Loaded:
    """Return the same with how it came about. Raise ConfigError for the first that is wrong.

    What depends on the mode is as `mode` has it, where that is given: that of a running process.
    """
    found = examined(flags, mode)
    if found.wrong:
        raise found.wrong[0]
    return found


def examined(flags: Flags, for_mode: str = "") -> Loaded:
    """Return the same with all that is wrong. Raise ConfigError where a file cannot be read.

    Flags win over the file, and in it VipdConfiguration over KubeProxyConfiguration.
    """
    wrong: list[ConfigError] = []
    told = File() if flags.config is None else read_file(flags.config)
    wrong += told.wrong
    by_flags = of_flags.sayings(flags, wrong)
    by_vipd = told.vipd or {}
    mode = for_mode or _text(by_flags, "mode") or _text(by_vipd, "mode")
    notes = list(told.notes)
    by_kube_proxy: dict[str, Said] = {}
    if told.kube_proxy is not None:
        origin = flags.config or ""
        mode = of_kube_proxy.chosen_mode(told.kube_proxy, mode)
        wrong += of_kube_proxy.wrong(told.kube_proxy, origin)
        by_kube_proxy = of_kube_proxy.sayings(told.kube_proxy, origin, mode)
        notes += of_kube_proxy.notes(told.kube_proxy, origin, mode)
    by_flags.update(of_flags.masquerade_bit(flags, mode))
    notes += of_flags.notes(flags, mode)
    places = (by_kube_proxy, by_vipd, by_flags)
    said = {path: one for place in places for path, one in place.items()}
    _keep_one_source(said, places, wrong)
    config = Checks(built(VipdConfiguration, said, wrong), said, wrong, flags.config or "").config()
    origins = {path: one.where for path, one in said.items()}
    return Loaded(config, origins, tuple(notes), tuple(wrong))


def _text(place: Mapping[str, Said], path: str) -> str:
    value = place[path].value if path in place else ""
    return value if isinstance(value, str) else ""


def _keep_one_source(
    said: dict[str, Said], places: tuple[Mapping[str, Said], ...], wrong: list[ConfigError]
) -> None:
    """Keep the source of the place that wins; none may say two."""
    for place in reversed(places):
        named = [one for one in _SOURCES if one in place and place[one].value]
        if len(named) > 1:
            why = "does not go with manifests: there is one source"
            wrong.append(ConfigError(place["kubeconfig"].where, why))
        if named:
            for one in _SOURCES:
                if one not in named:
                    said.pop(one, None)
            return
