"""What rich prints on stdout: as wide as the terminal, and a line a row where there is none."""

from typing import Any

PIPED_WIDTH = 300  # columns; a pipe has no width, and a name that is cut off there is lost


def show(*parts: Any) -> None:
    """Print tables and lines of plain text, one below the other."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    for part in parts:
        # the terminal breaks long lines itself, so that they can be copied whole
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))
