"""What a worker's process goes without, to be small.

Lives here: modules that are kept out before anything imports them. Must not: be imported by a
process that is more than a worker.
"""

import sys
from importlib import import_module

_OWN_HASHES = ("_md5", "_sha1", "_sha3", "_blake2")


def without_openssl() -> None:
    """Keep OpenSSL out: 8 MB of a worker, which encrypts nothing.

    asyncio does without ``ssl``, and hashlib without ``_hashlib``, as they have to where Python was
    built without OpenSSL; hashlib only where Python has the hashes itself.
    """
    sys.modules["ssl"] = None  # type: ignore[assignment]
    try:
        for name in _OWN_HASHES:
            import_module(name)
    except ImportError:
        return
    sys.modules["_hashlib"] = None  # type: ignore[assignment]
