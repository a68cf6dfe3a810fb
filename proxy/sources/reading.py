"""The manifests of some paths, read again step by step: files in, events out, no waiting.

Lives here: which files to read now, what to do when one vanishes or cannot be read. Must not: wait
or watch (manifests.py); time comes in as an argument.
A loss waits: when a file loses objects or vanishes, they stay for a moment, because editors
truncate, rename and write in pieces. Everything else takes effect at once.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from vipd.proxy.errors import ManifestError, SourceError
from vipd.proxy.events import Event, Problem
from vipd.proxy.model import Pod
from vipd.proxy.names import NamespacedName
from vipd.proxy.sources.claims import Claims
from vipd.proxy.sources.controller import Controller
from vipd.proxy.sources.files import NOTHING, Content, content
from vipd.proxy.sources.tree import Signature, Tree, Watch, is_manifest, signature, tree

SETTLE_SECONDS = 0.05
"""How long a loss of objects must stand before it is believed, where a file is written in place."""
SETTLE_REPLACED_SECONDS = 0.005
"""The same where the file is gone, or another was put in its place: that is one step, and only an
editor that moves the old file away first makes two of it, within less than a millisecond."""
LONGEST_SETTLE_SECONDS = 1.0
"""A file that loses objects and is written all the time is believed after this."""
MAX_FILE_BYTES = 512 << 20
STDIN = "-"


class Reading:
    """What has been read under `paths` so far. SourceError if a path does not exist at first.

    `stdin` is what standard input held, for the path ``-``.
    """

    def __init__(self, paths: Sequence[str], stdin: bytes | None = None) -> None:
        self._roots = tuple(dict.fromkeys(os.path.abspath(p) for p in paths if p != STDIN))
        for root in self._roots:
            if not os.path.exists(root):
                raise SourceError(f"{root}: no such file or folder")
            if not os.path.isfile(root) and not os.path.isdir(root):
                raise SourceError(f"{root}: neither file nor folder; - reads standard input once")
        self._names = {os.path.abspath(p): p for p in paths}
        self._stdin = stdin
        self._signatures: dict[str, Signature] = {}
        self._contents: dict[str, Content] = {}
        self._problems: dict[str, dict[str, ManifestError]] = {}
        self._due: dict[str, tuple[float, float]] = {}
        self._claims = Claims()
        self._controller = Controller()
        self._problem_events: list[Event] = []
        self._unreadable: dict[str, str] = {}
        self._has_links = False
        self.watch = Watch((), (), ())

    @property
    def passed_over(self) -> Counter[str]:
        """How many objects of kinds that vipd does not read there are, by version and kind."""
        total: Counter[str] = Counter()
        for each in self._contents.values():
            total.update(each.passed_over)
        return total

    def pods(self) -> dict[NamespacedName, Pod]:
        """Return the Pods by name. May be asked from any thread."""
        return {one.name: one for one in self._claims.holding() if isinstance(one, Pod)}

    @property
    def due(self) -> float | None:
        """When `refresh` must be called next even if nothing changes."""
        return min((when for when, _ in self._due.values()), default=None)

    def refresh(self, now: float, changed: Iterable[str] | None = None) -> list[Event]:
        """Return what is different now. `changed` are paths to look at, None means all.

        `now` is a monotonic time in seconds.
        """
        self._problem_events = []
        due = {path for path, (when, _) in self._due.items() if when <= now}
        some = self._some(changed)
        if some is None:
            self._all(tree(self._roots), now, due)
        else:
            for path in sorted(some | due):
                self._look(path, signature(path), now, path in due)
        for root in self._roots:
            name = self._names[root]
            gone = ManifestError(name, "", "", "is gone, and so is what it said; it is waited for")
            self._report(f"root {root}", {} if os.path.exists(root) else {f"root {name}": gone})
        changes, problems = self._claims.settle()
        return [*self._controller.apply(changes), *self._problem_events, *problems]

    def _some(self, changed: Iterable[str] | None) -> set[str] | None:
        """Return the files to look at, or None if only a walk can tell."""
        if changed is None:
            return None
        files: set[str] = set()
        linked = set(self.watch.folders)
        for path in changed:
            if path in self._signatures and not os.path.islink(path):
                files.add(path)
            elif not self._concerns(path):
                if os.path.dirname(path) in linked and self._has_links:
                    return None
            elif is_manifest(path) and signature(path) is not None and not os.path.islink(path):
                if os.path.basename(os.path.dirname(path)).startswith("."):
                    return None
                files.add(path)
            else:
                return None
        return files

    def _concerns(self, path: str) -> bool:
        """Whether a path is, is in, or leads to one of the roots."""
        return any(
            path == root or path.startswith(f"{root}/") or root.startswith(f"{path.rstrip('/')}/")
            for root in self._roots
        )

    def _all(self, found: Tree, now: float, due: set[str]) -> None:
        self.watch = found.watch
        self._has_links = any(os.path.realpath(path) != path for path in found.files)
        if self._stdin is not None and STDIN not in self._contents:
            self._put(STDIN, content("standard input", self._stdin))
        for path in [*found.files, *(p for p in self._signatures if p not in found.files)]:
            hidden = any(path.startswith(f"{folder}/") for folder in found.unreadable)
            if path in found.files or not hidden:
                self._look(path, found.files.get(path), now, path in due)
        for folder in [*found.unreadable, *self._unreadable]:
            why = found.unreadable.get(folder)
            error = ManifestError(self._name(folder), "", "", why) if why else None
            self._report(f"folder {folder}", {folder: error} if error else {})
        self._unreadable = dict(found.unreadable)

    def _look(self, path: str, found: Signature | None, now: float, due: bool) -> None:
        """Take in one file if it is not what it was."""
        if found is None:
            if path in self._signatures:
                self._lose(path, NOTHING, now, due, SETTLE_REPLACED_SECONDS)
                if path not in self._due:
                    del self._signatures[path]
            return
        if found == self._signatures.get(path) and not due:
            return
        before = self._contents.get(path, NOTHING)
        known = self._signatures.get(path)
        in_place = known is not None and known.inode == found.inode
        self._signatures[path] = found
        name = self._name(path)
        try:
            if found.size > MAX_FILE_BYTES:
                raise OSError(0, f"is larger than {MAX_FILE_BYTES >> 20} MiB")  # noqa: TRY301
            with open(path, "rb") as file:
                text = file.read()
        except FileNotFoundError:
            self._look(path, None, now, due)
            return
        except OSError as error:
            self._report(path, {name: ManifestError(name, "", "", error.strerror or str(error))})
            return
        settle = SETTLE_SECONDS if in_place else SETTLE_REPLACED_SECONDS
        self._lose(path, content(name, text, before), now, due, settle)

    def _lose(self, path: str, new: Content, now: float, due: bool, settle: float) -> None:
        """Put in a content, or put it off for `settle` seconds where objects would be lost."""
        before = self._contents.get(path, NOTHING)
        lost = before.objects.keys() - new.objects.keys()
        first = self._due.pop(path, (0.0, now))[1]
        if not lost or due or now - first >= LONGEST_SETTLE_SECONDS:
            self._put(path, new)
            return
        self._due[path] = (min(now + settle, first + LONGEST_SETTLE_SECONDS), first)
        objects = {key: before.objects[key] for key in before.objects if key in lost}
        objects.update(new.objects)
        new = Content(
            new.documents, new.entries, objects, new.problems, new.passed_over, new.incomplete
        )
        self._contents[path] = new
        self._claims.update(path, objects, lost)
        self._report(path, new.problems)

    def _put(self, path: str, new: Content) -> None:
        if new is NOTHING:
            self._contents.pop(path, None)
        else:
            self._contents[path] = new
        self._claims.update(path, new.objects)
        self._report(path, new.problems)

    def _report(self, path: str, problems: Mapping[str, ManifestError]) -> None:
        """Say which problems of a file are new, others or over."""
        old = self._problems.pop(path, {})
        if problems:
            self._problems[path] = dict(problems)
        self._problem_events += [Problem(key, None) for key in old if key not in problems]
        self._problem_events += [
            Problem(key, error)
            for key, error in problems.items()
            if key not in old or str(old[key]) != str(error)
        ]

    def _name(self, path: str) -> str:
        """Return a path as the user spelled its root."""
        for root, spelled in self._names.items():
            if path == root:
                return spelled
            if path.startswith(f"{root}/"):
                return os.path.join(spelled, path[len(root) + 1 :])
        return path
