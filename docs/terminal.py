"""Records a command in a terminal as a moving picture: `python docs/terminal.py OUT.gif COMMAND`.

Pauses are shortened, so that minutes become seconds; the picture says how much time has passed.
"""

import fcntl
import itertools
import os
import pty
import struct
import sys
import termios
import time
from pathlib import Path

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS, SIZE = 100, 26, 13
FRAMES = 45  # at most
LONGEST, LAST = 0.6, 4.0  # seconds that a frame is shown, and the last one
PAPER, INK = "#1e1e2e", "#cdd6f4"
COLOURS = {
    "default": INK, "black": "#45475a", "red": "#f38ba8", "green": "#a6e3a1", "brown": "#f9e2af",
    "blue": "#89b4fa", "magenta": "#f5c2e7", "cyan": "#94e2d5", "white": "#bac2de",
}  # fmt: skip


def record(command: list[str]) -> tuple[list[tuple[float, list[list[pyte.screens.Char]]]], int]:
    """The screens of a command, each with the seconds since it began; and its exit code."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream, began = pyte.ByteStream(screen), time.monotonic()
    child, handle = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        os.execvp(command[0], command)
    fcntl.ioctl(handle, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    screens = []
    while True:
        try:
            data = os.read(handle, 65536)
        except OSError:  # the command has ended
            break
        if not data:
            break
        stream.feed(data)
        lines = [[screen.buffer[y][x] for x in range(COLUMNS)] for y in range(ROWS)]
        if not screens or lines != screens[-1][1]:
            screens.append((time.monotonic() - began, lines))
    return screens, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def draw(lines: list[list[pyte.screens.Char]], head: str) -> Image.Image:
    """A screen below one line that says what ran and since when."""
    file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"
    font = ImageFont.truetype(str(file), SIZE)
    width, height = round(font.getlength("M")), SIZE + 4
    picture = Image.new("RGB", ((COLUMNS + 2) * width, (ROWS + 3) * height), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((width, height // 2), head, fill=COLOURS["green"], font=font)
    for y, line in enumerate(lines):
        for x, cell in enumerate(line):
            if cell.data.strip():
                colour = COLOURS.get(cell.fg, f"#{cell.fg}" if len(cell.fg) == 6 else INK)
                place = ((x + 1) * width, (y + 2) * height)
                pen.text(place, cell.data, fill=colour, font=font)
    return picture.quantize(8)


def main() -> int:
    """Record and write."""
    out, command = Path(sys.argv[1]), sys.argv[2:]
    screens, code = record(command)
    step = max(1, -(-len(screens) // FRAMES))
    chosen = [*screens[:-1:step], screens[-1]]
    title = f"$ {' '.join(command)}"
    frames = [draw(lines, f"{title}   {seconds:4.0f} s") for seconds, lines in chosen]
    times = [min(LONGEST, max(0.1, b[0] - a[0])) for a, b in itertools.pairwise(chosen)]
    frames[0].save(
        out,
        save_all=True,
        append_images=frames[1:],
        duration=[round(1000 * seconds) for seconds in (*times, LAST)],
        loop=0,
        optimize=True,
    )
    print(f"{out}: {len(frames)} of {len(screens)} screens, {out.stat().st_size / 1000:.0f} kB")
    return code


if __name__ == "__main__":
    sys.exit(main())
