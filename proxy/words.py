"""Words that people read, wherever they are printed.

Lives here: numbers with their nouns. Pure. Must not: know what is counted.
"""


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, whose plural ends in s: ``1 restart``, ``2 restarts``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
