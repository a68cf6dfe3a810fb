"""The variables that worker processes are started with. Pure: what there is is passed in."""

import os
from collections.abc import Mapping

_NEEDED = ("PATH", "LANG", "LC_ALL", "TZ")
_BEGINNINGS = ("PYTHON", "VIPD_", "COVERAGE_")


def worker_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Return of our variables what a worker needs: the rest, secrets perhaps, is not its business.

    Folders to import from are made absolute, as workers run in ``/``.
    """
    kept = {
        name: value
        for name, value in ours.items()
        if name in _NEEDED or name.startswith(_BEGINNINGS)
    }
    if kept.get("PYTHONPATH"):
        folders = kept["PYTHONPATH"].split(os.pathsep)
        kept["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, folders))
    return kept
