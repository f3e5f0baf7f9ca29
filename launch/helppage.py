"""How `--help` shows the settings: every text as one paragraph, no default that says nothing. Knows no command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cyclopts.help import DefaultFormatter, HelpPanel, InlineText

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

EMPTY = {"()", '""'}
"""Defaults as cyclopts writes them."""


class HelpPage(DefaultFormatter):
    """As cyclopts does it, but for these two things."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        entries = [
            entry.copy(
                description=_joined(entry.description), default=None if entry.default in EMPTY else entry.default
            )
            for entry in panel.entries
        ]
        super().__call__(console, options, panel.copy(entries=entries))


def _joined(description: Any) -> Any:
    """Lines end where the source's do, which is nowhere in particular on a terminal."""
    if not isinstance(description, InlineText):
        return description
    return InlineText.from_format(" ".join(str(description.primary_renderable).split()), "plaintext")
