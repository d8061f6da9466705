"""Draw a join at a glance in the terminal, again whenever something changed: `fedsoda-edge status --watch`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fedsoda_edge.ports.console import note
from fedsoda_edge.ports.log_lines import printable

if TYPE_CHECKING:
    from rich.console import Group

    from fedsoda_edge.join.glance import Glance

LOOK_SECONDS = 0.5
QUIET_SECONDS = 60.0  # after which a log gets a line although only figures changed
BAR, NARROW = 30, 60  # columns of the bar, and of a terminal on which every column counts
STYLES = {"busy": "green", "waiting": "cyan", "paused": "yellow", "over": "bold", "trouble": "red"}
MARKS = {"busy": "*", "waiting": ".", "paused": "=", "over": "-", "trouble": "!"}


def looks(look: Callable[[], Glance], sleep: Callable[[float], None] = time.sleep) -> Iterator[Glance]:
    """Look again and again until no join runs any more; the last look is its end."""
    while True:
        now = look()
        yield now
        if not now.running:
            return
        sleep(LOOK_SECONDS)


def watch(look: Callable[[], Glance]) -> None:
    """Show a join until it ends, or until Ctrl+C."""
    try:
        if sys.stderr is not None and sys.stderr.isatty():
            _watch_live(look)
        else:
            _watch_plain(look)
    except KeyboardInterrupt:  # it ends the watching, and not the join
        pass


def _watch_live(look: Callable[[], Glance]) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    shown: tuple[Glance, int, int] | None = None
    with Live(console=console, auto_refresh=False, redirect_stderr=False, redirect_stdout=False) as live:
        for now in looks(look):
            size = console.size
            if (now, size.width, size.height) != shown:
                shown = now, size.width, size.height
                live.update(drawn(now, size.width), refresh=True)


def drawn(now: Glance, width: int) -> Group:
    """Draw a glance for a terminal of `width` columns. What others wrote is text, never markup or an escape."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    style = STYLES[now.tone]
    head = Text(f"{MARKS[now.tone]} {printable(now.headline)}", style=f"bold {style}")
    parts: list[Text | Table] = [head]
    if now.progress is not None:
        columns = min(BAR, max(10, width - 8))
        full = round(columns * now.progress)
        bar = Text("█" * full, style=style) + Text("░" * (columns - full), style="dim")
        parts.append(bar + Text(f" {now.progress:4.0%}"))
    table = Table.grid(padding=(0, 1 if width < NARROW else 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for fact in now.facts:
        table.add_row(fact.about, Text(printable(fact.said)))
    parts.append(table)
    if now.running:
        parts.append(Text("Ctrl+C ends this view, not the join", style="dim"))
    return Group(*parts)


def _watch_plain(look: Callable[[], Glance]) -> None:
    """Write a line when the state or the round changes, and now and then how far the round is."""
    said, said_at = None, 0.0
    for now in looks(look):
        facts = {fact.about: fact.said for fact in now.facts}
        step = facts.get("round", "")
        key = now.headline if now.tone != "paused" else now.tone, step.partition(",")[0], now.running
        if key != said or time.monotonic() - said_at >= QUIET_SECONDS:
            said, said_at = key, time.monotonic()
            note(now.headline + (f": round {step}" if step else ""))
    for fact in now.facts:
        note(f"{fact.about}: {fact.said}")
