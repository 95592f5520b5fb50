"""Imports point one way: the table of allowed imports, checked by walking every module's AST."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
EVERYWHERE = (
    "vatt.config",
    "vatt.errors",
    "vatt.files",
    "vatt.slurm",
    "vatt",
)  # `vatt` itself imports nothing
ALLOWED = {  # longest prefix wins
    "stages": ("vatt",),
    "vattctl": ("vatt", "vattctl"),
    "vatt.studies": ("vatt.studies", "vatt.paper"),
    "vatt.report": ("vatt.report", "vatt.paper", "vatt.studies", "vatt.model.flops"),
    "vatt.verify": (
        "vatt.verify",
        "vatt.paper",
        "vatt.model",
        "vatt.losses",
        "vatt.training.schedule",
    ),
    "vatt.training": (
        "vatt.training",
        "vatt.model",
        "vatt.data",
        "vatt.losses",
        "vatt.metrics",
        "vatt.checkpoint",
    ),
    "vatt.plan": (
        "vatt.plan",
        "vatt.training",
        "vatt.model",
        "vatt.data",
        "vatt.losses",
        "vatt.checkpoint",
    ),
    "vatt.multi_label": ("vatt.metrics",),
    "vatt.evaluation": (
        "vatt.evaluation",
        "vatt.model",
        "vatt.data",
        "vatt.metrics",
        "vatt.multi_label",
        "vatt.checkpoint",
    ),
    "vatt.search": ("vatt.checkpoint", "vatt.model", "vatt.data"),
    "vatt.checkpoint": ("vatt.model",),
    "vatt.release": ("vatt.release", "vatt.model", "vatt.checkpoint"),
    "vatt.export": ("vatt.model", "vatt.checkpoint"),
    "vatt.model": ("vatt.model",),
    "vatt.data": ("vatt.data",),
    "vatt.losses": (),
    "vatt.metrics": (),
}
LOSSES_MAY_IMPORT = {"torch", "dataclasses", "math", "collections", "typing", "vatt"}


def modules() -> dict[str, Path]:
    files = [f for top in ("vatt", "vattctl", "stages") for f in sorted((ROOT / top).rglob("*.py"))]
    return {
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f
        for f in files
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


def test_imports_point_down_the_list() -> None:
    wrong = []
    for module, file in modules().items():
        rule = max((p for p in ALLOWED if within(module, (p,))), key=len, default=None)
        allowed = ALLOWED[rule] if rule else ("vatt",) if module == "vatt" else ()
        for imported in imports(file):
            ours = within(imported, ("vatt", "vattctl", "stages"))
            if ours and imported not in EVERYWHERE and not within(imported, allowed):
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
