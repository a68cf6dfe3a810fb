"""How the tour looks: tables on a terminal, plain lines elsewhere.

Lives here: what a step hands over to be shown, and drawing it. Must not: know what is shown.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field


def milliseconds(seconds: float) -> str:
    """A short duration as people say it."""
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


@dataclass(kw_only=True)
class Shown:
    """The result of one step: a table, and claims with whether they hold.

    `command` is what a person could type instead, after `vipd lab`.
    """

    what: str
    command: str
    header: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    claims: list[tuple[str, bool]] = field(default_factory=list)

    def check(self, holds: bool, claim: str) -> None:
        """Add a claim."""
        self.claims.append((claim, holds))


class Screen:
    """Standard output. `program` is how a person starts a lab command, such as `vipd lab`."""

    def __init__(self, program: str) -> None:
        self.program = program
        self._draws = sys.stdout.isatty()

    def note(self, text: str) -> None:
        """A line as it is; flushed, so that a log shows how far it is."""
        print(text, flush=True)

    def title(self, text: str) -> None:
        """The start of a step."""
        self.note(f"\n\033[1m{text}\033[0m" if self._draws else f"\n== {text}")

    def show(self, shown: Shown) -> None:
        """What was done, how to do it oneself, what came out, and which claims hold."""
        self.note(f"{shown.what}\n  $ {self.program} {shown.command}")
        if self._draws:
            self._draw(shown)
        else:
            for row in (tuple(shown.header), *shown.rows):
                self.note("  " + " | ".join(row))
        for claim, holds in shown.claims:
            if holds:
                self.note(f"  \033[32m✓\033[0m {claim}" if self._draws else f"  ok: {claim}")
            else:
                self.failure(claim)

    def failure(self, text: str) -> None:
        """Something that is not as it should be."""
        self.note(f"  \033[31m✗ {text}\033[0m" if self._draws else f"  NOT OK: {text}")

    def verdict(self, failures: Sequence[str]) -> None:
        """The end of the tour."""
        self.note("\nEvery step did what it said." if not failures else "\nNot as it should be:")
        for text in failures:
            self.failure(text)

    def _draw(self, shown: Shown) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(*shown.header)
        for row in shown.rows:
            table.add_row(*row)
        Console().print(table)
