"""Messages with bytes changed, for the tests that nothing that comes in makes the DNS raise."""

import os
from random import Random

EXPLORE = int(os.environ.get("VIPD_EXPLORE", "0"))
"""So many messages instead of a test's own number; the nightly run says a million."""


def mutated(lots: Random, data: bytes, other: bytes) -> bytes:
    """Return a message with a few changes."""
    made = bytearray(data)
    for _ in range(lots.randint(1, 4)):
        at = lots.randrange(len(made) + 1)
        match lots.randrange(8):
            case 0 if made:
                made[at % len(made)] ^= 1 << lots.randrange(8)
            case 1 if made:
                made[at % len(made)] = lots.choice((0, 1, 12, 63, 64, 0x80, 0xC0, 0xFF))
            case 2:
                made[at:at] = lots.randbytes(lots.randint(1, 8))
            case 3:
                del made[at : at + lots.randint(1, 8)]
            case 4:
                del made[at:]
            case 5:
                made[at:] = other[lots.randrange(len(other)) :]
            case 6:
                made[at : at + 2] = (0xC000 | lots.randrange(64)).to_bytes(2)
            case 7 if len(made) >= 12:
                count = lots.choice((4, 6, 8, 10))
                made[count : count + 2] = lots.choice((0, 1, 2, 3, 0xFFFF)).to_bytes(2)
    return bytes(made)
