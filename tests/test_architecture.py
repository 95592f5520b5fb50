"""Imports point one way, and the map in the docs shows what the code does."""

import ast
import re
from collections import Counter

from tests.architecture import (
    EVERYWHERE,
    PICTURE,
    ROOMS,
    ROOT,
    draw,
    edges,
    imports,
    modules,
    room_of,
    within,
)

ALLOWED = {  # longest prefix wins; a room may always import itself
    "stages": ("vatt",),
    "vattctl": ("vatt",),
    "vatt.studies": ("vatt.paper",),
    "vatt.beyond": ("vatt.studies",),
    "vatt.report": ("vatt.paper", "vatt.studies", "vatt.beyond", "vatt.flops"),
    "vatt.verify": (
        "vatt.paper",
        "vatt.model",
        "vatt.flops",
        "vatt.losses",
        "vatt.training.optimizer",
        "vatt.checkpoint",
        "vatt.release",
    ),
    "vatt.tracking": (
        "vatt.training",
        "vatt.search",
        "vatt.checkpoint",
        "vatt.model",
        "vatt.senses",
        "vatt.data",
    ),
    "vatt.training": (
        "vatt.model",
        "vatt.senses",
        "vatt.data",
        "vatt.flops",
        "vatt.losses",
        "vatt.metrics",
        "vatt.checkpoint",
    ),
    "vatt.plan": (
        "vatt.training",
        "vatt.model",
        "vatt.senses",
        "vatt.data",
        "vatt.flops",
        "vatt.losses",
        "vatt.checkpoint",
    ),
    "vatt.evaluation": (
        "vatt.model",
        "vatt.senses",
        "vatt.data",
        "vatt.metrics",
        "vatt.checkpoint",
        "vatt.flops",
    ),
    "vatt.search": ("vatt.checkpoint", "vatt.model", "vatt.data", "vatt.senses"),
    "vatt.checkpoint": ("vatt.model", "vatt.release.model"),
    "vatt.release": ("vatt.model", "vatt.checkpoint", "vatt.data.fetching"),
    "vatt.export": ("vatt.model", "vatt.checkpoint"),
    "vatt.flops": ("vatt.model", "vatt.senses"),
    "vatt.model": ("vatt.senses",),
    "vatt.senses": ("vatt.data.clips",),
    "vatt.data.loading": (
        "vatt.data.clips",
        "vatt.data.workers",
        "vatt.data.fetching",
        "vatt.senses",
    ),
    "vatt.data.sharding": ("vatt.data.clips", "vatt.data.workers", "vatt.senses"),
    "vatt.data.fetching": ("vatt.data.clips", "vatt.data.workers"),
    "vatt.data.sources": ("vatt.data.clips", "vatt.data.workers", "vatt.senses"),
    "vatt.data.clips": (),
    "vatt.losses": (),
    "vatt.metrics": (),
}
LOSSES_MAY_IMPORT = {"torch", "dataclasses", "math", "collections", "typing", "vatt"}


def test_imports_point_down_the_list() -> None:
    wrong = []
    for module, file in modules().items():
        rule = max((p for p in ALLOWED if within(module, (p,))), key=len, default=None)
        allowed = (rule, *ALLOWED[rule]) if rule else ("vatt",) if module == "vatt" else ()
        for imported in imports(file):
            ours = within(imported, ("vatt", "vattctl", "stages"))
            if ours and imported not in (*EVERYWHERE, "vatt") and not within(imported, allowed):
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_losses_know_torch_only() -> None:
    tops = {name.partition(".")[0] for name in imports(ROOT / "vatt" / "losses.py")}
    assert tops <= LOSSES_MAY_IMPORT, tops - LOSSES_MAY_IMPORT


def test_stages_are_thin() -> None:
    long = {
        f.name: n
        for f in (ROOT / "stages").glob("*.py")
        if (n := len(f.read_text(encoding="utf-8").splitlines())) > 50
    }
    assert not long, f"longer than 50 lines: {long}"


def test_no_import_circle_hides_anywhere() -> None:
    """Imports inside functions count: a circle is one wherever its arrows are drawn."""
    known = modules()
    below = {module: imports(file) & known.keys() for module, file in known.items()}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in sorted(below[module]):
                walk(imported, (*path, module))
            done.add(module)

    for module in known:
        walk(module, ())


def test_dvc_is_run_from_one_module() -> None:
    """A list of words with "dvc" in it is a command; `import dvc` would be a way around it."""
    running = set()
    for module, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            words = node.elts if isinstance(node, ast.List | ast.Tuple) else []
            if any(isinstance(word, ast.Constant) and word.value == "dvc" for word in words):
                running.add(module)
        running |= {module for name in imports(file) if within(name, ("dvc",))}
    assert running == {"vattctl.dvc"}


def test_rooms_are_few() -> None:
    files = [file for module, file in modules().items() if not within(module, ("stages",))]
    assert len(files) <= 126  # 120 for the paper, six for what goes beyond it
    rooms = Counter(file.parent.relative_to(ROOT).as_posix() for file in files)
    assert max(rooms.values()) <= 15, rooms.most_common(3)


def test_the_picture_shows_every_room_and_every_import() -> None:
    missing = {room for room in map(room_of, modules()) if room is not None} - ROOMS.keys()
    assert not missing, f"give these a place in ROOMS of tests/architecture.py: {missing}"
    upwards = [(a, b) for a, to in edges().items() for b in to if ROOMS[a].row > ROOMS[b].row]
    assert not upwards, upwards
    drawn = PICTURE.read_text(encoding="utf-8")
    assert drawn == draw(), "imports have changed: run `python -m tests.architecture`"


def test_the_documents_name_only_files_that_exist() -> None:
    tops = "vatt|vattctl|stages|tests|bench|presets|docs"
    named = re.compile(rf"(?<![\w./-])((?:{tops})/[\w./-]*\w\.(?:py|md|yaml|svg|png|json))\b")
    missing = [
        f"{document.relative_to(ROOT)}: {name}"
        for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
        for name in named.findall(document.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    ]
    assert not missing, missing
