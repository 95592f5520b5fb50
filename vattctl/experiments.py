"""Experiments: sub-projects of a project, each a folder with settings and stages of its own.

An experiment is the project around it with some settings changed. It runs some of the stages
itself, and takes the outputs of the others from the project (or from another experiment). One git
and DVC repository holds them all, so DVC knows that an experiment's pre-training waits for the
project's shards, a killed stage continues where it stopped, what two experiments share is run once,
and nothing of the project is overwritten. In the project's folder::

    wide = Experiment(
        Path("experiments/wide"),
        stages=("pretrain", "evaluate"),  # the shards are the project's
        settings={("model", "va_dim"): 1024},
    )
    run_experiment(wide)  # writes or updates the folder, then `dvc repro` there

    ucf101 = Experiment(
        Path("sets/ucf101"),
        stages=("download", "preprocess", "finetune", "evaluate", "report"),  # its own clips
        settings={("data", "source"): "ucf101", ("finetune", "tasks"): {"ucf101": {...}}},
        start=Path("imported/mbs"),  # a checkpoint's folder, anywhere
    )
    run_experiment(ucf101, ("finetune",), upstream=False)  # never trains `start` again

Afterwards `cd experiments/wide && dvc repro` and `vattctl --project experiments/wide status` work
as in any project. `.gitignore` leaves the three files of a folder in `experiments/` or `sets/` to
git (params.yaml, dvc.yaml, dvc.lock): DVC refuses stages that git ignores.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vatt.errors import SettingsError
from vatt.files import inside
from vattctl.dvc import STAGES, run_dvc
from vattctl.params import PARAMS, Edit, edit

if TYPE_CHECKING:
    from vatt.config import Params

PIPELINE = Path("dvc.yaml")
HERE = Path()
# Paths in params.yaml by the stage that makes them; an experiment without it takes them elsewhere.
MADE_BY = {
    "download": ("manifest", "download_ledger", "media"),
    "preprocess": ("shards", "preprocess_ledger"),
    "pretrain": ("pretrained",),
}
INPUTS = (  # settings that name files of the project, which an experiment shares
    ("data", "location"),
    ("data", "annotations"),
    ("data", "demo", "voices"),
    ("preprocess", "vocabulary_file"),
    ("preprocess", "stop_words"),
    ("machine", "shard_cache"),
    ("machine", "ffmpeg"),
    ("machine", "cookies"),
    ("machine", "proxy"),
)
SQLITE = "sqlite:///"
HEADER = "# Made by vattctl from {parent}: change the settings there, or copy this folder.\n"


@dataclass(frozen=True, slots=True)
class Experiment:
    """A sub-project; every path counts from the project's folder.

    `settings` are changes to the project's, as `--set` makes them: a complete value for each key
    of params.yaml (for a task of your own, all of `finetune.tasks`). Relative paths in them start
    at the experiment's folder, as all paths in params.yaml do.
    """

    folder: Path
    stages: tuple[str, ...]  # that it runs itself
    settings: Mapping[tuple[str, ...], Any] = field(default_factory=dict)
    data: Path = HERE  # the project or experiment whose shards it uses, when it makes none
    start: Path | None = None  # a checkpoint, when it trains none; None: the project's


def write_experiment(experiment: Experiment) -> None:
    """Make or update the experiment's params.yaml and dvc.yaml from the project's, here.

    Nothing is written where nothing has changed; each file appears whole, the settings first.
    """
    import yaml

    unknown = set(experiment.stages) - set(STAGES)
    if unknown:
        raise SettingsError(f"no stage '{min(unknown)}'", hint=f"stages: {', '.join(STAGES)}")
    own = {
        name: stage
        for name, stage in _read(PIPELINE)["stages"].items()
        if name in experiment.stages
    }
    stages = {name: _moved(stage, experiment) for name, stage in own.items()}
    plain = yaml.safe_dump({"stages": stages}, sort_keys=False, width=4096)
    edited = edit_of(experiment)
    _ = edited.params  # raises when a setting is wrong
    header = HEADER.format(parent=_from(experiment.folder, PARAMS))
    _write(experiment.folder / PARAMS, header + edited.text())
    _write(experiment.folder / PIPELINE, header + plain)


def run_experiment(
    experiment: Experiment,
    targets: tuple[str, ...] = (),
    *,
    upstream: bool = True,
    quiet: bool = False,
) -> None:
    """Write the experiment, then let DVC run the targets (all its stages) and what they need.

    Without `upstream`, outputs of other projects are used as they are, up to date or not.
    """
    write_experiment(experiment)
    wanted = targets or tuple(name for name in STAGES if name in experiment.stages)
    with inside(experiment.folder):
        if upstream:
            run_dvc(["repro", *targets], quiet=quiet)
        else:
            last = max(STAGES.index(target.partition("@")[0]) for target in wanted)
            before = [name for name in STAGES[:last] if name in experiment.stages]
            own = [name for name in before if name not in wanted] + list(wanted)
            run_dvc(["repro", "--single-item", *own], quiet=quiet)


def settings_of(experiment: Experiment) -> "Params":
    """The experiment's settings, whether it has been written or not."""
    return edit_of(experiment).params


def edit_of(experiment: Experiment) -> Edit:
    """The project's settings with the experiment's own and its paths."""
    settings = {**_places(experiment, _read(PARAMS)), **experiment.settings}
    return edit(settings, source=experiment.folder / PARAMS)


def _places(experiment: Experiment, known: Any) -> dict[tuple[str, ...], Any]:
    """Where the experiment finds what it does not make itself."""
    folder = experiment.folder
    places: dict[tuple[str, ...], Any] = {}
    others = experiment.data / PARAMS  # of an experiment that is still to be written: as here
    makers = _read(others) if others.exists() else known
    for stage, names in MADE_BY.items():
        if stage in experiment.stages:
            continue
        for name in names:
            of = known if stage == "pretrain" else makers
            base = HERE if stage == "pretrain" else experiment.data
            places["paths", name] = _from(folder, base / of["paths"][name])
    if experiment.start is not None:
        places["paths", "pretrained"] = _from(folder, experiment.start)
    for keys in INPUTS:
        value = reduce(lambda section, key: section.get(key) or {}, keys, known)
        if value:
            places[keys] = _from(folder, Path(value))
    uri = known["machine"]["mlflow_uri"]
    if uri.startswith(SQLITE) and not uri.startswith(f"{SQLITE}/"):
        store = _from(folder, Path(uri.removeprefix(SQLITE)))
        places["machine", "mlflow_uri"] = SQLITE + store
    return places


def _moved(stage: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """A stage for the experiment's folder: the paths of its code are changed."""
    deps = [
        dep if str(dep).startswith("${") else _from(experiment.folder, Path(dep))
        for dep in stage["deps"]
    ]
    trains = [name for name in ("pretrain", "finetune") if name in experiment.stages]
    if "${paths.checkpoints}" in deps:  # the folder of both, where they are trained here
        if not trains:
            deps.remove("${paths.checkpoints}")
        if "pretrain" not in experiment.stages and "${paths.pretrained}" not in deps:
            deps.append("${paths.pretrained}")
    return {**stage, "deps": deps}


def _from(folder: Path, path: Path) -> str:
    """A path of the project as seen from the experiment's folder; absolute outside the project."""
    whole = _whole(path)
    if not whole.is_relative_to(_repository()):
        return str(whole)
    return Path(os.path.relpath(whole, _whole(folder))).as_posix()


def _whole(path: Path) -> Path:
    """The absolute path; links are kept, as DVC goes by the path of a link."""
    return Path(os.path.normpath(Path.cwd() / path))


def _repository() -> Path:
    """The folder of the git and DVC repository around this project; the project's without one."""
    here = Path.cwd()
    return next((parent for parent in (here, *here.parents) if (parent / ".dvc").is_dir()), here)


def _read(file: Path) -> Any:
    import yaml

    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _write(file: Path, text: str) -> None:
    from vatt.files import atomic_write, lock
    from vatt.process import SETTINGS_LOCK

    if file.exists() and file.read_text(encoding="utf-8") == text:
        return
    busy = f"busy: {file} cannot be changed while a stage of {file.parent} runs"
    with lock(file.parent / SETTINGS_LOCK, busy=busy), atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
