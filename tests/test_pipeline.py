"""dvc.yaml says what the stages do: their settings, their paths, and the files they import."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.architecture import ROOT, modules

STAGES = ("download", "preprocess", "pretrain", "finetune", "evaluate", "report")
# settings that reach a stage another way: `machine` must change no result, `paths` are templated
UNDECLARED = {"machine", "paths"}
# modules that change no result: the schema (its effect is in params), where work runs, messages,
# progress, MLflow
WITHOUT_EFFECT = {
    "vatt.config",
    "vatt.data.workers",
    "vatt.errors",
    "vatt.files",
    "vatt.process",
    "vatt.progress",
    "vatt.tracking.provenance",
    "vatt.tracking.mlflow",
    "vatt.tracking.records",
    "vatt.training.telemetry",
}
# rooms that count as a whole where a stage imports most of one; the others are listed file by
# file, because an edit there must not repeat a pre-training for nothing
WHOLE = (
    "vatt/data/clips",
    "vatt/data/fetching",
    "vatt/data/loading",
    "vatt/data/sharding",
    "vatt/data/sources",
    "vatt/evaluation",
    "vatt/model",
    "vatt/report",
    "vatt/senses",
)
MOST = 2 / 3


def pipeline() -> dict[str, Any]:
    stages: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))[
        "stages"
    ]
    return stages


def imported_at_top(file: Path) -> set[str]:
    """Our modules that a file imports outside functions: a callback's import inside is left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [n for n in node.body if not isinstance(n, ast.Import | ast.ImportFrom)]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            deeper = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            names |= deeper or {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & modules().keys()


def import_closure(stage: str) -> set[str]:
    """Files that a stage's result depends on; packages' empty __init__ files are left out."""
    known, seen, todo = modules(), set(), [f"stages.{stage}"]
    while todo:
        module = todo.pop()
        if module in seen or module in WITHOUT_EFFECT:
            continue
        seen.add(module)
        todo += imported_at_top(known[module])
    files = {known[module].relative_to(ROOT) for module in seen}
    return {str(file) for file in files if file.name != "__init__.py"}


def code_deps(stage: str) -> set[str]:
    """The import closure, with the folder in place of its files where it holds most of one."""
    closure = import_closure(stage)
    for room in WHOLE:
        files = {f"{room}/{file.name}" for file in (ROOT / room).glob("*.py")}
        files.discard(f"{room}/__init__.py")
        if len(files & closure) >= MOST * len(files):
            closure = closure - files | {room}
    return closure


def sections_read(stage: str) -> tuple[set[str], set[str]]:
    """First-level sections of params that a stage's module reads, and the paths it uses."""
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text(encoding="utf-8"))
    read: set[str] = set()
    paths: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner == "params":
                read.add(node.attr)
            elif owner in ("paths", "params.paths"):
                paths.add(node.attr)
    return read, paths


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_import_closure(stage: str) -> None:
    entry = pipeline()[stage]
    declared = {d for d in map(str, entry.get("deps", [])) if d.startswith(("stages/", "vatt/"))}
    code = {d for d in declared if d.endswith(".py") or (ROOT / d).is_dir()}
    wanted = code_deps(stage)
    assert code == wanted, f"deps of {stage} should hold:\n" + "\n".join(
        f"      - {file}" for file in sorted(wanted)
    )


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_sections_the_module_reads(stage: str) -> None:
    declared = {str(key).partition(".")[0] for key in pipeline()[stage].get("params", [])}
    read, _ = sections_read(stage)
    assert declared == read - UNDECLARED


@pytest.mark.parametrize("stage", STAGES)
def test_every_path_a_stage_uses_is_declared(stage: str) -> None:
    """By name, or by the folder that holds it."""
    text = yaml.safe_dump(pipeline()[stage])
    settings = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["paths"]
    declared = [Path(place) for name, place in settings.items() if f"${{paths.{name}}}" in text]
    _, used = sections_read(stage)
    # nothing depends on run ids and timings; media and the states of trainings are no outputs, so
    # that a clone which has pulled everything is up to date without them
    missing = {
        name
        for name in used - {"runs", "media", "pretrain_state", "finetune_state"}
        if not any(Path(settings[name]).is_relative_to(place) for place in declared)
    }
    assert not missing


def test_params_file_is_the_demo_preset() -> None:
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "presets" / "demo.yaml").read_bytes()


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_are_valid(preset: Path) -> None:
    from vatt.config import load_params

    assert load_params(preset).paths.manifest.suffix == ".jsonl"
