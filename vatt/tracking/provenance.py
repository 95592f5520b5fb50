"""What a stage was made from: one hash over its settings, its code and its input data."""

import hashlib
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vatt.files import atomic_write, read_json
from vatt.process import MARKS

if TYPE_CHECKING:
    from vatt.config import Params

PIPELINE_FILE = Path("dvc.yaml")
LOCK_FILE = Path("dvc.lock")
CODE = Path(__file__).parents[2]  # the folder of vatt and stages: a clone, or site-packages


def git_commit() -> str:
    """The commit of this folder, marked if files differ from it; empty where there is none."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = commit and git("status", "--porcelain", "-uno")
        return f"{commit}, with changes" if changed else commit
    except FileNotFoundError:
        return ""


def stage_hash(stage: str, params: "Params", **item: str) -> str:
    """The sha256 of a stage's resolved params and deps, as dvc.yaml declares them.

    Outputs of earlier stages count by their hash in dvc.lock, also when they lie inside a dep or
    were made by another project of the repository; a source file counts by its content.
    `item` names the variant of a stage with a matrix.
    """
    declared = yaml.safe_load(PIPELINE_FILE.read_text(encoding="utf-8"))["stages"][stage]
    declared = declared.get("do", declared)
    raw_params = params.model_dump(mode="json")
    digest = hashlib.sha256()
    for key in sorted(map(str, declared.get("params", []))):
        key = _resolve(key, raw_params, item)
        digest.update(f"{key}={_lookup(raw_params, key)!r}\n".encode())
    deps = sorted(_resolve(str(dep), raw_params, item) for dep in declared.get("deps", []))
    made = _hashes_of_outputs(deps)
    for path in deps:
        within = sorted(out for out in made if Path(out).is_relative_to(path))
        for out in within:
            digest.update(f"{out}:{made[out]}\n".encode())
        if not within:
            digest.update(f"{path}:{_hash_of_file(Path(path))}\n".encode())
    return digest.hexdigest()


def _hashes_of_outputs(deps: list[str]) -> dict[str, str]:
    """The hashes in dvc.lock, here and in the folders above each dep, by path from here."""
    here = Path.cwd()
    above = {parent for dep in deps for parent in Path(os.path.normpath(here / dep)).parents}
    hashes = {}
    for folder in sorted(above | {here}):
        if (folder / LOCK_FILE).is_file():
            locked = yaml.safe_load((folder / LOCK_FILE).read_text(encoding="utf-8"))
            stages = locked.get("stages", {}).values()
            for out in (out for stage in stages for out in stage.get("outs", [])):
                if not Path(out["path"]).is_relative_to(MARKS):  # these count as they are now
                    hashes[os.path.relpath(folder / out["path"], here)] = str(out.get("md5"))
    return hashes


def write_marks(pipeline: Path, project: Path) -> None:
    """Note the hash of every source file that a stage of `pipeline` depends on, a file a stage."""
    stages = yaml.safe_load(pipeline.read_text(encoding="utf-8"))["stages"]
    for name, declared in stages.items():
        deps = [str(dep) for dep in declared.get("deps", []) if not str(dep).startswith("${")]
        files = sorted(file for dep in deps for file in _source_files(CODE / dep))
        text = "".join(
            f"{_hash_of_file(file)}  {file.relative_to(CODE).as_posix()}\n" for file in files
        )
        mark = project / MARKS / name
        if not mark.is_file() or mark.read_text(encoding="utf-8") != text:
            with atomic_write(mark) as path:
                path.write_text(text, encoding="utf-8")


def _source_files(path: Path) -> list[Path]:
    found = path.rglob("*") if path.is_dir() else [path]
    return [file for file in found if file.is_file() and file.suffix != ".pyc"]


def _hash_of_file(path: Path) -> str:
    """For a folder, of all its files; compiled Python is left out."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
        lines = [f"{file.relative_to(path).as_posix()}:{_hash_of_file(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"


def _lookup(raw: dict[str, Any], key: str) -> Any:
    value: Any = raw
    for part in key.split("."):
        value = value[part]
    return value


def _resolve(text: str, raw_params: dict[str, Any], item: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        key = match.group(1)
        return item[key[5:]] if key.startswith("item.") else str(_lookup(raw_params, key))

    return re.sub(r"\$\{([^}]+)\}", value, text)


def data_hash(shards: Path) -> str:
    """The sha256 that names exactly the clips in the shards, by their index."""
    return _hash_of_file(shards / "index.jsonl")


def listed_hash(metrics: Path) -> str | None:
    """The sha256 that names the clips of the manifest, as the download stage noted it."""
    try:
        found = read_json(metrics / "download.json", dict, hint="run `vattctl download --force`")
    except FileNotFoundError:
        return None
    return found.get("corpus", {}).get("hash")
