"""Tables of the commands, made with rich."""

import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from moe_groups._common.arguments import need

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_ROWS = 24
"""Tables with more rows are folded or cut off."""

_WIDTH = 100


def check_tables() -> None:
    """Raise InvalidArgumentError if the tables cannot be printed."""
    need("rich", "cli", "tables (--json does without)")


def print_with(draw: Callable[["Console"], None]) -> None:
    """Print what ``draw`` prints, for a terminal or a file of 100 columns, without end blanks."""
    from rich.console import Console

    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 0)).columns)
    console = Console(width=width if sys.stdout.isatty() else _WIDTH)
    with console.capture() as shown:
        draw(console)
    print(re.sub(r" +$", "", shown.get(), flags=re.MULTILINE), end="")


def new_table(title: str, columns: Iterable[str]) -> "Table":
    """An empty table; columns that start with ``>`` are aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    table.show_edge = table.pad_edge = False
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    return table


def say_hidden(table: "Table", rows: int) -> None:
    """Add a line below the table with the number of rows that it leaves out."""
    if rows:
        table.caption = f"... and {rows:,} more; --all or --json shows them"
        table.caption_justify = "left"


class Named(Protocol):
    """A row of a table for one group."""

    @property
    def name(self) -> str: ...


_Row = TypeVar("_Row", bound=Named)


def same_but_numbers(groups: Iterable[_Row], key: Callable[[_Row], object]) -> list[list[_Row]]:
    """Lists of groups of equal key whose names differ only in numbers, ordered by their first."""
    found: dict[object, list[_Row]] = {}
    for group in groups:
        words = tuple(re.split(r"\d+", group.name))
        found.setdefault((words, key(group)), []).append(group)
    return list(found.values())


def name_pattern(names: Sequence[str]) -> str:
    """``layers.{0..31}.mlp`` for names that differ in a number."""
    words = re.split(r"\d+", names[0])
    numbers = zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True)
    ranges = [(min(found), max(found)) for found in map(tuple, numbers)]
    shown = [str(low) if low == high else f"{{{low}..{high}}}" for low, high in ranges]
    return "".join(word + number for word, number in zip(words, [*shown, ""], strict=True))
