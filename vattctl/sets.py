"""A data set by its name: presets/sets/<set>.yaml and the recipe that it names -> settings.

It makes two sub-projects: sets/<set> downloads and preprocesses, experiments/<name> fine-tunes,
evaluates and reports on its shards, from the checkpoint that --from names. `vattctl ingest` makes
files of one's own the clips of the project itself; its settings are fitted to them here too.
"""

import difflib
import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vatt.errors import DataError, SettingsError, VattError
from vattctl.experiments import Experiment
from vattctl.params import PARAMS, PRESETS, Settings

if TYPE_CHECKING:
    from vatt.checkpoint import TrainClips
    from vatt.config import DataParams, ModelParams, Params
    from vatt.data.clips.files import ContentHashes
    from vatt.data.clips.manifest import Clip
    from vatt.data.sources.folder import Found

SETS, RECIPES = PRESETS / "sets", PRESETS / "recipes"
OWN = ("folder", "csv")
PAPER_FPS, PAPER_HZ = 25, 48_000  # of the paper's clips
SHOWN_WHOLE = 7 / 8  # of the short side, in a test crop

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SetRequest:
    """What the command line asks for."""

    name: str  # of the set
    start: Path  # a checkpoint's folder
    location: Path | None  # --data
    annotations: Path
    experiment: str
    init: tuple[str, ...] = ("pretrained",)
    modality: str | None = None
    drop_rate: float | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class SetPlan:
    """The two sub-projects of a set, and what to know before they run."""

    clips: Experiment
    work: Experiment
    about: str
    notes: tuple[str, ...]  # what was guessed about the files and the checkpoint
    trains: bool


def folder_of(wanted: SetRequest) -> str:
    """The folder of a set's shards; your own data gets one for each location."""
    if wanted.name not in OWN or wanted.location is None:
        return wanted.name
    short = hashlib.sha256(str(wanted.location).encode()).hexdigest()[:6]
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", wanted.location.stem).strip("-")
    return f"{wanted.name}-{readable}-{short}"


def names() -> list[str]:
    """The sets that have a file."""
    return sorted(path.stem for path in SETS.glob("*.yaml"))


def plan(wanted: SetRequest, project: "Params", assignments: Settings) -> SetPlan:
    """Settings for a set; what cannot work is refused here, before anything runs."""
    tree = overlay(wanted.name)
    start = start_model(wanted.start)
    about, files = tree.pop("about", ""), tree.pop("files", "")
    epochs = tree.pop("epochs", None)
    data = (
        tree["data"]
        | _kind_of(wanted)
        | {
            "location": None if wanted.location is None else str(wanted.location),
            "location_hash": None,
            "annotations": None if wanted.name in OWN else str(wanted.annotations),
        }
    )
    data |= {keys[1]: value for keys, value in assignments.items() if keys[:-1] == ("data",)}
    tree["data"] = data
    seen = look(wanted, project, data, files)
    data["location_hash"] = seen.mark
    if wanted.name in OWN:
        fit_own(tree, seen.clips, wanted, epochs)
    guessed = fit_rates(tree, start, project)
    task = tree.pop("task", None)
    if task is not None:
        if wanted.drop_rate is not None:
            task["drop_rate"] = wanted.drop_rate
        tree["finetune"] = {
            "run": [wanted.name],
            "init": list(wanted.init),
            "tasks": {wanted.name: task},
        }
    else:
        tree["finetune"] = {"run": [], "init": ["pretrained"], "tasks": {}}
    tree["report"] = {"title": f"VATT on {wanted.name}"}
    settings = assigned(flat(tree), assignments)
    notes = [
        f"{start.folder} does not say what it was trained on: {'.'.join(key)} is taken to be "
        f"{value}, as in the paper; to change it: --set {'.'.join(key)}=..."
        for key, value in guessed.items()
        if key not in assignments
    ]
    # The recipe too: `vattctl table` takes it from there. Another seed needs no other shards.
    own = {key: value for key, value in settings.items() if key[0] != "seed"}
    folder = Path("sets") / folder_of(wanted)
    trains = bool(settings["finetune", "run"])
    stages = ("finetune", "evaluate", "report") if trains else ("evaluate", "report")
    return SetPlan(
        clips=Experiment(folder, ("download", "preprocess"), own),
        work=Experiment(
            Path("experiments") / wanted.experiment,
            stages,
            settings,
            data=folder,
            start=wanted.start,
        ),
        about=about,
        notes=(*seen.notes, *notes),
        trains=trains,
    )


def _kind_of(wanted: SetRequest) -> Tree:
    """Which files of a folder are meant, where --modality says so."""
    if wanted.name != "folder" or wanted.modality is None:
        return {}
    return {"file_kind": "images" if wanted.modality == "image" else "recordings"}


def overlay(name: str) -> Tree:
    """The set's file over its recipe's."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        raise SettingsError(
            f"no data set '{name}'",
            hint=f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(names())}",
        )
    tree = _read(SETS / f"{name}.yaml")
    return merged(_read(RECIPES / f"{tree.pop('recipe')}.yaml"), tree)


def merged(under: Tree, over: Mapping[str, Any]) -> Tree:
    """Merge section by section; values of `over` win."""
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def flat(tree: Tree) -> Settings:
    """Sections and their keys, as `--set` names them: {("data", "source"): ...}."""
    return {(section, key): value for section, keys in tree.items() for key, value in keys.items()}


def assigned(settings: Settings, assignments: Settings) -> Settings:
    """With the command line's --set, which may reach into a value such as the task."""
    result = dict(settings)
    for keys, value in assignments.items():
        if len(keys) <= 2 or keys[:2] not in result:
            result[keys] = value
            continue
        result[keys[:2]] = changed(result[keys[:2]], keys, value, depth=2)
    return result


def changed(section: Any, keys: tuple[str, ...], value: Any, *, depth: int) -> Any:
    """A copy of nested settings in which one is changed; a key that is not there is an error."""
    if not isinstance(section, dict) or keys[depth] not in section:
        known = sorted(section) if isinstance(section, dict) else []
        close = difflib.get_close_matches(keys[depth], known, n=1)
        raise SettingsError(
            f"--set: no key {'.'.join(keys)}",
            hint=f"did you mean '{'.'.join((*keys[:depth], close[0]))}'?" if close
            else f"{'.'.join(keys[:depth])} has: {', '.join(known) or 'no keys'}",
        )  # fmt: skip
    last = depth == len(keys) - 1
    inner = value if last else changed(section[keys[depth]], keys, value, depth=depth + 1)
    return {**section, keys[depth]: inner}


# --- what the checkpoint and the data decide ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """The checkpoint that training starts from."""

    folder: Path
    model: "ModelParams"
    clips: "TrainClips | None"  # that it was trained on; None: it does not say
    is_released: bool


def start_model(folder: Path) -> Start:
    """What the checkpoint says of itself."""
    from vatt.checkpoint import load_config, train_clips
    from vatt.config import ModelParams

    if not folder.is_dir():
        raise DataError(
            f"no checkpoint in {folder}",
            hint="train one with `vattctl pretrain`, convert a released one with `vattctl import`, "
            "or name another with --from DIR",
        )
    config = load_config(folder)
    if "classifier" in config:
        raise DataError(
            f"{folder} holds a classifier, which has no text tower and no common space",
            hint="start from the pre-trained checkpoint that it was made from",
        )
    model = ModelParams.model_validate(config["model"])
    return Start(folder, model, train_clips(config), "source" in config)


@dataclass(frozen=True, slots=True)
class SourceListing:
    """What the source lists, and a mark that changes with it."""

    clips: "list[Clip]"
    mark: str | None
    notes: tuple[str, ...] = ()


def look(wanted: SetRequest, project: "Params", data: Tree, files: str) -> SourceListing:
    """The clips of one's own data; of an official list the first, to see that it can be read."""
    from vatt.config import OF_FILES, parse_params
    from vatt.data.clips.files import ContentHashes
    from vatt.data.sources.choice import list_doubts, listed, mark_of_lists
    from vatt.data.sources.folder import scan

    if wanted.location is None and wanted.name in (*OWN, *OF_FILES):
        what = "a csv file" if wanted.name == "csv" else "the folder with the unpacked files"
        raise SettingsError(
            f"{wanted.name} needs --data", hint=f"vattctl finetune {wanted.name} --data: {what}"
        )
    tree = project.model_dump()
    params = parse_params({**tree, "data": {**tree["data"], **data}}, source=PARAMS).data
    media = Path("sets") / folder_of(wanted) / project.paths.media
    hashes = ContentHashes.beside(media, writes=not wanted.dry_run)
    try:
        if params.source == "folder" and params.location is not None:
            found = scan(params.location, params, hashes=hashes)
            return SourceListing(found.clips, found.mark, found.notes)
        clips = iter(listed(params, project.seed))
        if wanted.name not in OWN:
            return SourceListing([next(clips)], mark_of_lists(params, hashes))
        own = list(clips)
        return SourceListing(
            own, mark_of_lists(params, hashes), tuple(list_doubts(own, params, hashes))
        )
    except StopIteration:
        raise DataError(f"the lists of {wanted.name} hold no clip", hint=files or None) from None
    except VattError as error:
        if not files:
            raise
        raise type(error)(
            str(error).partition("\n  -> ")[0],
            hint=f"{error.hint or ''}\n     {wanted.annotations / wanted.name} should hold {files}",
        ) from None


def fit_own(tree: Tree, clips: "list[Clip]", wanted: SetRequest, epochs: int) -> None:
    """Modality, label, split and steps of a folder or csv of one's own."""
    task = tree["task"]
    names = dict.fromkeys(name for clip in clips for name in clip.labels)
    label = task["label"]
    if label not in names:  # a column may be called Label
        label = next((name for name in names if name.casefold() == label), label)
        task["label"] = label
    splits = Counter(clip.split for clip in clips if clip.labels.get(label))
    classes = {
        clip.labels[label] for clip in clips if clip.split == "train" and label in clip.labels
    }
    if len(classes) < 2:
        raise DataError(
            f"{len(classes)} classes among {splits['train']} labelled train files: "
            "a classifier needs two",
            hint="a folder for each class: root/class/file, or root/train/class/file"
            if wanted.name == "folder" else "a column named label with two values or more",
        )  # fmt: skip
    if not splits["test"]:
        raise DataError(
            f"{wanted.location} has no test files",
            hint="call its folder test (column split: test), or leave all splits out and a share "
            "of the files is drawn",
        )
    task["modality"] = wanted.modality or modality_of(clips)
    steps = max(math.ceil(epochs * splits["train"] / task["batch_size"]), 100)
    task["steps"], task["optimizer"]["warmup_steps"] = steps, steps // 10
    tree["data"]["require"] = ["audio"] if task["modality"] == "audio" else ["video"]
    kind = "audio" if task["modality"] == "audio" else "video"
    probe = {"modality": kind, "label": label, "train_labels": None, "folds": []}
    tree["evaluate"]["probes"] = {wanted.name: probe}
    if task["modality"] == "image":
        tree["preprocess"] |= {"clip_seconds": 1.0, "fps": 1, "video_storage": "jpeg"}
        tree["preprocess"] |= {"jpeg_scale": 2, "min_clip_seconds": 1.0}
    tree["evaluate"]["retrieval_pool"] = max(splits["test"], 2)


def modality_of(clips: "list[Clip]") -> str:
    """What most files are, by their names: image, audio or video."""
    from vatt.data.clips.files import AUDIO, IMAGES

    kinds = Counter(
        "image" if suffix in IMAGES else "audio" if suffix in AUDIO else "video"
        for suffix in (_suffix(clip.url) for clip in clips)
    )
    return kinds.most_common(1)[0][0]


def _suffix(url: str) -> str:
    """The ending of a file; its own name may hold any characters, an address may hold a query."""
    path = url if url.startswith("folder:") else urlsplit(url).path
    return Path(path).suffix.lower()


def fit_rates(tree: Tree, start: Start, project: "Params") -> Settings:
    """Rates and sizes that the set leaves open are those that the checkpoint was trained with.

    One that does not say them was trained as the project says, if it has the shape of the
    project's model, and else as the paper says. Returns the rate of the set's modality where it is
    such a guess.
    """
    from vatt.checkpoint import TrainClips

    here, model = TrainClips.of(project), start.model
    alike = model.model_dump(exclude={"text"}) == project.model.model_dump(exclude={"text"})
    side = model.video.frame_size
    papers = TrainClips(
        fps=PAPER_FPS / 2,
        stored_fps=PAPER_FPS,
        short_side=round((side if isinstance(side, int) else max(side)) / SHOWN_WHOLE),
        audio_hz=PAPER_HZ,
    )
    known = start.clips or (here if alike else papers)
    preprocess, evaluate = tree["preprocess"], tree["evaluate"]
    task = tree.get("task", {})
    rate = "audio_hz" if task.get("modality") == "audio" else "fps"
    is_open, open_fps = rate not in preprocess, "fps" not in preprocess
    preprocess.setdefault("fps", known.stored_fps)
    preprocess.setdefault("audio_hz", known.audio_hz)
    preprocess.setdefault("short_side", known.short_side)
    if known.audio_peak is not None:
        preprocess.setdefault("audio_peak", known.audio_peak)
    shown = project.evaluate.fps if alike and known == here else known.fps
    evaluate.setdefault("fps", min(shown, preprocess["fps"]))
    if task.get("modality") == "video" and task["fps"] is None:
        task["fps"] = min(shown, preprocess["fps"]) if open_fps else preprocess["fps"] / 2
    is_guess = known is papers and is_open and not start.is_released
    return {("preprocess", rate): preprocess[rate]} if is_guess else {}


# --- files of one's own as the clips of the project -----------------------------------------------

SMALL, LARGE = "small", "one-gpu"  # presets for files of one's own
WINDOWS = (3.2, 1.6, 0.8)  # seconds that the model sees at once; the first is the paper's
LONG_ENOUGH = 0.8  # share of the files that must be as long as the window
LARGE_CLIPS, LARGE_MEMORY = 1000, 20 * 2**30  # clips and bytes of a GPU: from there on one-gpu
PASSES, TASK_PASSES = 30, 20  # over the train clips, of pre-training and of a task
MOST_BATCH, LEAST_STEPS, MOST_STEPS = 64, 100, 2000
MOST_TASKS = 3  # labels that become tasks
FITTED = {("data", key) for key in ("source", "location", "location_hash", "min_clips")}


def own_source(
    source: Path, data: "DataParams", hashes: "ContentHashes", *, opens: bool = True
) -> "Found":
    """What a folder, or a csv list, holds; with `opens` its files are opened, too."""
    from vatt.data.sources.choice import list_doubts, listed, mark_of_lists
    from vatt.data.sources.folder import Found, scan

    if source.is_dir():
        return scan(source, data, opens=opens, hashes=hashes)
    listing = data.model_copy(update={"source": "urls", "location": source})
    clips = list(listed(listing, 0))
    if not clips:
        raise DataError(f"{source} lists no clip", hint="docs/own-data.md describes the columns")
    spans = [clip.end - clip.start for clip in clips if clip.end is not None]
    notes = [] if spans else ["the list gives no spans: the lengths of the clips are not known"]
    notes += list_doubts(clips, listing, hashes)
    return Found(
        clips,
        with_captions=sum(bool(clip.captions) for clip in clips),
        broken=[],
        seconds=tuple(spans),
        sounding=frozenset(),
        ignored={},
        captions_dropped=0,
        mark=mark_of_lists(listing, hashes) or "",
        notes=tuple(notes),
    )


def own_preset(found: "Found", project: "Params") -> str | None:
    """The preset that fits; None where the project has a model of its own choice."""
    from vatt.config import load_params

    shipped = [load_params(PRESETS / f"{name}.yaml").model for name in ("demo", SMALL)]
    if project.model not in shipped:
        return None
    clips = sum(int(length // 10) for length in found.seconds)  # of ten seconds
    return LARGE if clips >= LARGE_CLIPS and _gpu_memory() >= LARGE_MEMORY else SMALL


def _gpu_memory() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def carried(project: "Params", preset: str) -> Settings:
    """What a person has changed in the project: it stays when another preset is taken."""
    from vatt.config import load_params

    for name in ("demo", SMALL, LARGE, "paper"):
        known = load_params(PRESETS / f"{name}.yaml")
        if known.model == project.model:
            break
    else:
        known = load_params(PRESETS / f"{preset}.yaml")
    before, now = known.model_dump(mode="json"), project.model_dump(mode="json")
    return {
        (section, key): value
        for section in ("data", "paths", "machine")
        for key, value in now[section].items()
        if value != before[section].get(key) and (section, key) not in FITTED
    }


def own_settings(found: "Found", source: Path, base: "Params") -> Settings:
    """The settings that make the pipeline run well on these files; sizes of the preset `small` are
    fitted, those of others only where they could not work."""
    from vatt.config import load_params

    small = load_params(PRESETS / f"{SMALL}.yaml").model
    settings: Settings = {
        ("data", "source"): "folder" if source.is_dir() else "urls",
        ("data", "location"): str(source),
        ("data", "location_hash"): found.mark or None,
        ("report", "title"): f"VATT on {source.stem if source.is_file() else source.name}",
    }
    if base.model == small and found.seconds:
        settings |= _fitted_windows(found.seconds)
    length = settings.get(("preprocess", "clip_seconds"), base.preprocess.clip_seconds)
    least = settings.get(("preprocess", "min_clip_seconds"), base.preprocess.min_clip_seconds)
    cut = base.preprocess.model_copy(update={"clip_seconds": length, "min_clip_seconds": least})
    clips = found.num_samples(cut) if found.seconds else len(found.clips)
    splits = Counter(clip.split for clip in found.clips)
    each = clips / len(found.clips)
    if clips < base.data.min_clips:
        settings["data", "min_clips"] = max(clips // 2, 1)
    tests = int(splits["test"] * each)
    if tests < base.evaluate.retrieval_pool:
        settings["evaluate", "retrieval_pool"] = max(tests, 2)
    settings |= _fitted_steps(int(splits["train"] * each), base, fits=base.model == small)
    return settings | _label_tasks(found, base, settings)


def _fitted_windows(seconds: Sequence[float]) -> Settings:
    """Window and length of a clip for files of these lengths: more, shorter clips of few files."""
    window = next(
        (w for w in WINDOWS if sum(s >= w for s in seconds) >= LONG_ENOUGH * len(seconds)),
        WINDOWS[-1],
    )
    many = sum(int(length // 10) for length in seconds) >= LARGE_CLIPS
    fps = 8 / window  # of the small preset's 8 frames
    return {
        ("preprocess", "clip_seconds"): 10.0 if many else 1.25 * window,
        ("preprocess", "min_clip_seconds"): window,
        ("model", "audio", "samples"): int(8000 * window),
        ("pretrain", "fps"): fps,
        ("evaluate", "fps"): fps,
    }


def _fitted_steps(train: int, base: "Params", *, fits: bool) -> Settings:
    """A batch that the train clips fill; for the small preset steps of some passes, too."""
    most = MOST_BATCH if fits else base.pretrain.batch_size
    batch = most
    while batch > 2 and batch * 2 > train and train < most * 2:
        batch //= 2
    settings: Settings = {}
    if batch != base.pretrain.batch_size and (fits or train < base.pretrain.batch_size):
        settings["pretrain", "batch_size"] = batch
    if fits:
        steps = min(max(PASSES * train // batch, LEAST_STEPS), MOST_STEPS)
        settings["pretrain", "steps"] = steps
        settings["pretrain", "optimizer", "warmup_steps"] = steps // 5
    return settings


def _label_tasks(found: "Found", base: "Params", settings: Settings) -> Settings:
    """A task and a probe for each label that train and test share, of picture and of sound."""
    clips = found.clips
    names = [name for name in dict.fromkeys(key for clip in clips for key in clip.labels)
             if _is_learnable(clips, name)][:MOST_TASKS]  # fmt: skip
    heard = [clip for clip in clips if clip.url in found.sounding]
    tasks: Tree = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "label"
        for kind, usable in (("video", clips), ("audio", heard)):
            task = _task_like(kind, base, settings) if _is_learnable(usable, name) else None
            if task is not None:
                count = sum(clip.split == "train" and name in clip.labels for clip in usable)
                steps = min(max(TASK_PASSES * count // task["batch_size"], LEAST_STEPS), 1000)
                fitted = {"label": name, "train_labels": None, "steps": steps}
                tasks[f"{plain}_sound" if kind == "audio" else plain] = {**task, **fitted}
    probes = {
        name: {"modality": task["modality"], "label": task["label"], "train_labels": None,
               "folds": []}
        for name, task in tasks.items()
    }  # fmt: skip
    return {
        ("finetune", "run"): list(tasks),
        **({("finetune", "tasks"): tasks} if tasks else {}),
        ("evaluate", "class_labels"): names,
        ("evaluate", "probes"): probes,
    }


def _is_learnable(clips: "Sequence[Clip]", name: str) -> bool:
    """Two classes to learn, and something to test."""
    values = {
        split: {clip.labels[name] for clip in clips if clip.split == split and name in clip.labels}
        for split in ("train", "test")
    }
    return len(values["train"]) > 1 and bool(values["test"])


def _task_like(kind: str, base: "Params", settings: Settings) -> Tree | None:
    """The first task of the preset with this modality, in the window of the settings."""
    for task in base.finetune.tasks.values():
        if task.modality == kind:
            plain = task.model_dump(mode="json")
            if kind == "video":
                plain["fps"] = settings.get(("pretrain", "fps"), plain["fps"])
            else:
                plain["audio_samples"] = settings.get(
                    ("model", "audio", "samples"), plain["audio_samples"]
                )
            return plain
    return None


def expectations(clips: int, tests: int) -> tuple[str, ...]:
    """What can be learned from so many clips, and what to try first."""
    from vatt.report.tables import FEWEST_SEARCHED

    if clips < 200:
        learned = "too few to learn from: a run shows that everything works, no more"
    elif clips < 10_000:
        learned = "enough to try out settings; features will be far behind the released weights"
    else:
        learned = "enough for features of some use; the paper used millions of clips"
    lines = [f"{clips:,} clips: {learned}"]
    if tests < FEWEST_SEARCHED:
        lines.append(
            f"{tests} test clips: {FEWEST_SEARCHED} or more are needed before retrieval means "
            "anything; add files, or raise data.test_share"
        )
    if clips < 10_000:
        lines.append(
            "to search or classify now, start from released weights: docs/released-weights.md, "
            "then vattctl search WORDS --in DIR --checkpoint FOLDER, or vattctl finetune folder"
        )
    return tuple(lines)


def _read(path: Path) -> Tree:
    import yaml

    tree: Tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tree
