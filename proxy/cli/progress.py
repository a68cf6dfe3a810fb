"""How far a bench has come, on standard error."""

import sys

import click


class Stages:
    """A bar on a terminal; elsewhere one line at the start of each stage."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._stage = ""

    def __enter__(self) -> "Stages":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar: Progress | None = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=1.0)
        else:
            self._bar = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, share: float) -> None:
        """Show a stage, and the share of everything that is done (0 to 1)."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._title} {stage}", completed=share)
        elif stage != self._stage:
            click.echo(f"{self._title}: {stage}", err=True)
        self._stage = stage
