"""Which manifest files there are under the given paths, and which folders tell when that changes.

Lives here: walking folders, signatures of files, what to watch. Must not: read files.
A folder is read with its subfolders; names that start with a dot are left out (editors' swap and
lock files; the ``..data`` of a mounted ConfigMap, whose files are reached through their links).
"""

import os
import stat
from collections.abc import Iterable
from typing import NamedTuple

SUFFIXES = (".yaml", ".yml", ".json")


class Signature(NamedTuple):
    """What differs when a file is another one; the change time tells of chmod."""

    modified_ns: int
    changed_ns: int
    size: int
    inode: int
    device: int


class Watch(NamedTuple):
    """What to watch: folders with all below, folders alone, and which folders they are just now."""

    trees: tuple[str, ...]
    folders: tuple[str, ...]
    identities: tuple[tuple[int, int], ...]


class Tree(NamedTuple):
    """The files found, in the order in which they are read."""

    files: dict[str, Signature]
    watch: Watch
    unreadable: dict[str, str]
    """Folders that cannot be listed, and why."""


def signature(path: str) -> Signature | None:
    """Return the signature of a file, None if there is no such regular file; links are followed."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return Signature(
        found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev
    )


def is_manifest(path: str) -> bool:
    """Whether a file in a folder is read, going by its name."""
    name = os.path.basename(path)
    return name.endswith(SUFFIXES) and not name.startswith(".")


def tree(roots: Iterable[str]) -> Tree:
    """Return what there is under `roots`, absolute paths of files and folders that may be gone."""
    files: dict[str, Signature] = {}
    trees: dict[str, None] = {}
    folders: dict[str, None] = {}
    unreadable: dict[str, str] = {}
    for root in roots:
        folders[_existing(os.path.dirname(root))] = None
        if not os.path.isdir(root):
            if (found := signature(root)) is not None:
                files[root] = found
                folders[_existing(os.path.dirname(os.path.realpath(root)))] = None
            continue
        trees[root] = None
        seen: set[tuple[int, int]] = set()
        for path in _walk(root, seen, unreadable):
            if (found := signature(path)) is not None:
                files.setdefault(path, found)
                real = os.path.realpath(path)
                if os.path.islink(path) or real != path:
                    folders[_existing(os.path.dirname(real))] = None
    identities = []
    for path in (*trees, *folders):
        try:
            found_folder = os.stat(path)
        except OSError:
            continue
        identities.append((found_folder.st_dev, found_folder.st_ino))
    return Tree(files, Watch(tuple(trees), tuple(folders), tuple(identities)), unreadable)


def _existing(folder: str) -> str:
    """Return the folder, or the nearest one above that exists, where it would appear."""
    while folder != "/" and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _walk(folder: str, seen: set[tuple[int, int]], unreadable: dict[str, str]) -> Iterable[str]:
    try:
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            return
        seen.add((here.st_dev, here.st_ino))
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except OSError as error:
        unreadable[folder] = error.strerror or str(error)
        return
    for entry in found:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _walk(entry.path, seen, unreadable)
        elif is_manifest(entry.path):
            yield entry.path


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
