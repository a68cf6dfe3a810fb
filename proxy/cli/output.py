"""How commands print: JSON as it came, tables on a terminal, plain aligned lines elsewhere.

Lives here: formatting for people. Must not: know what is printed.
"""

import sys
from collections.abc import Sequence

import click
import msgspec


def print_json(document: bytes) -> None:
    """Print a JSON document, indented on a terminal."""
    if sys.stdout.isatty():
        document = msgspec.json.format(document)
    click.echo(document.decode())


def printable(text: str) -> str:
    """Return the text on one line: what a stranger named cannot forge another."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headings: a table on a terminal, else columns that tools can cut."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in headings:
            table.add_column(
                heading, overflow="fold", no_wrap=heading not in ("ENDPOINTS", "NOTES")
            )
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
