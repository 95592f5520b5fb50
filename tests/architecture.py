"""The rooms of the code and the imports between them, as a picture: docs/images/architecture.svg.

`python -m tests.architecture` draws it again; tests/test_architecture.py compares it with the code.
"""

import ast
from collections import defaultdict
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
TOPS = ("stages", "vattctl", "vatt")  # `vatt` itself is the interface in Python
EVERYWHERE = {  # what every room may import
    "vatt.config": "settings and their schema",
    "vatt.errors": "what a user can fix",
    "vatt.files": "files that appear complete",
    "vatt.process": "processes and signals",
    "vatt.progress": "progress on stderr",
}
Edges = dict[str, set[str]]


class Room(NamedTuple):
    """A box of the picture: a folder or a single file of `vatt`."""

    column: float
    row: int
    group: str  # its colour
    about: str
    width: float = 1.0  # in columns

    @property
    def middle(self) -> float:
        return self.column + self.width / 2


ROOMS = {
    "beyond": Room(5, 1, "report", "studies beyond the paper"),
    "tracking": Room(1, 1, "learn", "MLflow, history, energy"),
    "plan": Room(2, 1, "learn", "memory, time and cost"),
    "verify": Room(3, 1, "learn", "the published figures"),
    "report": Room(4, 1, "report", "the page, its figures"),
    "search": Room(0, 3, "data", "moments by words"),
    "evaluation": Room(1, 2, "judge", "retrieval, probes"),
    "training": Room(2.5, 2, "learn", "loop, engine, resuming"),
    "studies": Room(4, 2, "report", "tables as experiments"),
    "export": Room(5, 2, "model", "checkpoint to ONNX"),
    "metrics": Room(1, 3, "judge", "values and intervals"),
    "losses": Room(2, 3, "learn", "NCE and MIL-NCE"),
    "flops": Room(3, 3, "model", "operations of a model"),
    "paper": Room(4, 3, "report", "the published numbers"),
    "release": Room(5, 3, "model", "TensorFlow weights"),
    "data.sources": Room(0, 4, "data", "data set to manifest"),
    "data.fetching": Room(1, 4, "data", "manifest to media"),
    "data.sharding": Room(2, 4, "data", "media to shards"),
    "data.loading": Room(3, 4, "data", "shards to batches"),
    "checkpoint": Room(4.5, 4, "model", "weights and config"),
    "data.workers": Room(0, 5, "data", "one machine or many"),
    "data.clips": Room(1, 5, "data", "manifest, ledger, media, text, samples", 2.0),
    "senses": Room(3, 5, "data", "a modality is one file"),
    "model": Room(4, 5, "model", "the paper's model"),
    "release.model": Room(5, 5, "model", "the released variant"),
}
# Where a long arrow passes between two boxes: (column, row).
VIA: dict[tuple[str, str], tuple[float, int]] = {
    ("verify", "paper"): (3.76, 2),
    ("report", "flops"): (3.76, 2),
    ("evaluation", "data.loading"): (2.0, 3),
    ("evaluation", "checkpoint"): (2.0, 3),
    ("training", "data.loading"): (3.0, 3),
    ("training", "checkpoint"): (4.0, 3),
    ("export", "checkpoint"): (5.0, 3),
    ("flops", "model"): (4.25, 4),
}


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    files = [file for top in TOPS for file in sorted((ROOT / top).rglob("*.py"))]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def imports(file: Path) -> set[str]:
    """Modules that a file imports, at its top or inside functions."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = deeper & known.keys()
            found |= submodules or {node.module}
    return found


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def room_of(module: str) -> str | None:
    """The smallest room that holds a module; None for the command line and what all may use."""
    folders = ("vatt", "vatt.data")  # their rooms are inside
    if not within(module, ("vatt",)) or module in (*folders, *EVERYWHERE):
        return None
    rooms = [room for room in ROOMS if within(module, (f"vatt.{room}",))]
    return max(rooms, key=len) if rooms else module.removeprefix("vatt.")


def edges() -> Edges:
    """Which rooms each room imports."""
    found: Edges = defaultdict(set)
    for module, file in modules().items():
        room = room_of(module)
        if room is not None:
            found[room] |= {to for to in map(room_of, imports(file)) if to not in (None, room)}
    return dict(found)


def shortest(every: Edges) -> list[tuple[str, str]]:
    """The arrows that are drawn: those that no longer way already implies."""

    def reached(room: str) -> set[str]:
        return every.get(room, set()).union(*(reached(to) for to in every.get(room, ())))

    return [
        (room, to)
        for room in sorted(every)
        for to in sorted(every[room])
        if not any(to in reached(other) for other in every[room] - {to})
    ]


COLUMN, ROW, LEFT, TOP = 172.0, 104.0, 24.0, 12.0  # pixels of the board
WIDE, HIGH, GAP = 1080.0, 712.0, 9.0
BOX = 52.0  # height of a box
LANE = 5.0  # between arrows that pass side by side
STYLE = """
text{font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:#57606a}
.name{font:600 14px ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;fill:#1f2328}
.board{fill:#fff}.band{fill:#f6f8fa;stroke:#d0d7de}
.box{stroke-width:1.5}.arrow{fill:none;stroke-width:1.6}
.data{fill:#e7f5f1;stroke:#2a8c74}.model{fill:#efeafc;stroke:#7a5cc4}.learn{fill:#fff3e0;stroke:#c77b1b}
.judge{fill:#e6f1fc;stroke:#2f79bd}.report{fill:#fdeaf0;stroke:#c2527d}
path.data,path.model,path.learn,path.judge,path.report{fill:none}
.h-data{fill:#2a8c74}.h-model{fill:#7a5cc4}.h-learn{fill:#c77b1b}.h-judge{fill:#2f79bd}.h-report{fill:#c2527d}
"""


def draw() -> str:
    """The picture as SVG."""
    arrows = shortest(edges())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE:g} {HIGH:g}" role="img" '
        f'aria-label="The rooms of vattctl and the imports between them"><style>{STYLE}</style>',
        f'<rect class="board" width="{WIDE:g}" height="{HIGH:g}" rx="10"/>',
        *(_head(group) for group in sorted({room.group for room in ROOMS.values()})),
        _band(16, {"stages": "one file per DVC stage", "vattctl": "the command line",
                  "vatt.load": "the model in Python"}, "may import every room below", BOX + 19),
        _band(HIGH - BOX - 16, {name.removeprefix("vatt."): about
                                for name, about in EVERYWHERE.items()},
              "every room may import these", -10),
    ]  # fmt: skip
    parts += [_arrow(room, to, arrows) for room, to in arrows]
    parts += [_box(name, room) for name, room in ROOMS.items()]
    return "\n".join([*parts, "</svg>\n"])


def _head(group: str) -> str:
    return (
        f'<marker id="{group}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path class="h-{group}" d="M0 0L8 4L0 8z"/></marker>'
    )


def _band(y: float, entries: dict[str, str], title: str, note: float) -> str:
    step = (WIDE - 2 * LEFT) / len(entries)
    texts = [
        _words(LEFT + (place + 0.5) * step, y, name, about)
        for place, (name, about) in enumerate(entries.items())
    ]
    return (
        f'<rect class="band" x="{LEFT:g}" y="{y:g}" width="{WIDE - 2 * LEFT:g}" height="{BOX:g}" '
        f'rx="8"/>{"".join(texts)}'
        f'<text text-anchor="middle" x="{WIDE / 2:g}" y="{y + note:.1f}">{escape(title)}</text>'
    )


def _words(x: float, y: float, name: str, about: str) -> str:
    return (
        f'<text class="name" text-anchor="middle" x="{x:.1f}" y="{y + 22:.1f}">{name}</text>'
        f'<text text-anchor="middle" x="{x:.1f}" y="{y + 40:.1f}">{escape(about)}</text>'
    )


def _box(name: str, room: Room) -> str:
    x, y = LEFT + room.column * COLUMN + GAP, TOP + room.row * ROW
    return (
        f'<rect class="box {room.group}" x="{x:.1f}" y="{y:.1f}" rx="8" height="{BOX:g}" '
        f'width="{room.width * COLUMN - 2 * GAP:.1f}"/>'
        + _words(LEFT + room.middle * COLUMN, y, name, room.about)
    )


def _arrow(start: str, end: str, arrows: list[tuple[str, str]]) -> str:
    """A curve from below one box to above another, or sideways within a row."""
    one, other = ROOMS[start], ROOMS[end]
    if one.row == other.row:
        y, right = TOP + one.row * ROW + BOX / 2, other.column > one.column
        x1 = LEFT + COLUMN * (one.column + one.width * right) - GAP * (1 if right else -1)
        x2 = LEFT + COLUMN * (other.column + other.width * (not right)) + GAP * (1 if right else -1)
        shape = f"M{x1:.1f} {y:.1f}H{x2:.1f}"
    else:
        points = [(_port(start, arrows, end, 0), TOP + one.row * ROW + BOX)]
        if (start, end) in VIA:
            column, row = VIA[start, end]
            lanes = [arrow for arrow in arrows if VIA.get(arrow) == (column, row)]
            shift = lanes.index((start, end)) - (len(lanes) - 1) / 2
            x = LEFT + column * COLUMN + LANE * shift
            points += [(x, TOP + row * ROW), (x, TOP + row * ROW + BOX)]
        points.append((_port(end, arrows, start, 1), TOP + other.row * ROW))
        shape = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for place, ((x1, y1), (x2, y2)) in enumerate(pairwise(points)):
            if place == 1:
                shape += f"V{y2:.1f}"
                continue
            half = (y1 + y2) / 2
            shape += f"C{x1:.1f} {half:.1f} {x2:.1f} {half:.1f} {x2:.1f} {y2:.1f}"
    return f'<path class="arrow {one.group}" marker-end="url(#{one.group})" d="{shape}"/>'


def _order(room: str, arrows: list[tuple[str, str]], partner: str, side: int) -> tuple[int, int]:
    """The place of one arrow among those that leave (0) or reach (1) a room, and their number."""
    partners = [arrow[1 - side] for arrow in arrows if arrow[side] == room]
    partners = [name for name in partners if ROOMS[name].row != ROOMS[room].row]
    partners.sort(key=lambda name: (ROOMS[name].middle, ROOMS[name].row))
    return partners.index(partner), len(partners)


def _port(room: str, arrows: list[tuple[str, str]], partner: str, side: int) -> float:
    place, count = _order(room, arrows, partner, side)
    spread = min(26.0, 0.75 * COLUMN * ROOMS[room].width / max(count, 1))
    return LEFT + ROOMS[room].middle * COLUMN + (place - (count - 1) / 2) * spread


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
