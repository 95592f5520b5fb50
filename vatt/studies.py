"""The paper's tables as experiments: the runs that each cell needs, at full size and scaled down.

The runs of `vattctl table` and the rows of the report come from one list. Scaled down to the demo
corpus, frames and frame sizes are those of the paper divided by FACTOR, rounded to complete
patches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vatt.paper import PaperTable, paper_tables

FACTOR = 3.5
DEPTH, STORED = 4, 72  # frames per patch; height and width of the demo's clips in pixels
SEEDS = (0, 1, 2)
DROP_RATES = {"drop_75": 0.75, "drop_50": 0.5, "drop_25": 0.25, "drop_0": 0.0}
STUDIES = "studies"  # name of the metrics file with the results of the runs

Settings = Mapping[str, Any]  # `pretrain.drop_rate`: 0.75
ScaleName = Literal["demo", "paper"]


@dataclass(frozen=True, slots=True)
class Task:
    """A fine-tuning: the task `like` of the project with some settings changed."""

    name: str
    like: str
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StudyRun:
    """One experiment: a pre-training, or a use of the weights of another run."""

    name: str
    settings: Settings = field(default_factory=dict)
    start: str | None = None  # the run whose weights it uses; None: it pre-trains
    data: str | None = None  # the data set whose clips it uses; None: the project's
    tasks: tuple[Task, ...] = ()
    inits: tuple[str, ...] = ("pretrained",)
    seed: int | None = None  # None: the project's
    corpus: str | None = None  # the run that makes its clips; None: the project, or base-seed-N

    @property
    def bringer(self) -> str | None:
        """The run whose clips it uses, itself maybe; None: the clips are the project's."""
        if self.corpus is None and self.seed is not None:
            return f"{BASE}-seed-{self.seed}"
        return self.corpus


@dataclass(frozen=True, slots=True)
class Answer:
    """Where to find the number of a cell: a run, and a path in its results."""

    run: str
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Study:
    """A table: its runs, and the answer for each cell (row, column)."""

    number: int
    runs: tuple[StudyRun, ...]
    answers: Mapping[tuple[int, str], Answer]


@dataclass(frozen=True, slots=True)
class Scale:
    """The size at which the tables are run."""

    name: ScaleName
    settings: Settings  # of every run

    def frames(self, frames: int) -> int:
        """Frames of a clip."""
        return int(frames / FACTOR) // DEPTH * DEPTH if self.name == "demo" else frames

    def size(self, pixels: int) -> int:
        """Height or width of a frame."""
        return round(pixels / FACTOR) if self.name == "demo" else pixels

    def crop(self, pixels: int) -> Settings:
        """Settings for the part of a frame in training; scaled down, the same as in tests."""
        if self.name == "paper":
            return {}
        area = round(min(1.0, self.size(pixels) / STORED) ** 2, 2)
        return {"crop_area": [area, area]}


DEMO = Scale(
    "demo",
    {
        "pretrain.drop_rate": 0.5,
        "pretrain.steps": 160,
        "pretrain.optimizer.warmup_steps": 40,
        "pretrain.save_every": 40,
        "evaluate.probes.action": {
            "modality": "video",
            "label": "action",
            "train_labels": None,
            "folds": [],
        },
    },
)
# The paper's explorations use batches of 512 (tables 5, 9 and 10).
PAPER = Scale("paper", {"pretrain.drop_rate": 0.5, "pretrain.batch_size": 512})
SCALES: dict[str, Scale] = {"demo": DEMO, "paper": PAPER}

# What replaces a column of the paper on the demo corpus: words for the report, and the path.
STAND_INS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ucf101": ("digit, probe on video", ("probes", "digit", "svm", "pretrained")),
    "hmdb51": ("who does what, probe on video", ("probes", "action", "svm", "pretrained")),
    "esc50": ("rhythm, probe on sound", ("probes", "rhythm", "svm", "pretrained")),
    "youcook2_r10": (
        "text to video, R@10",
        ("retrieval", "pretrained", "text_to_video", "recall_at_10"),
    ),
    "youcook2_median_rank": (
        "text to video, median rank",
        ("retrieval", "pretrained", "text_to_video", "median_rank"),
    ),
    "msrvtt_r10": (
        "video to text, R@10",
        ("retrieval", "pretrained", "video_to_text", "recall_at_10"),
    ),
    "msrvtt_median_rank": (
        "video to text, median rank",
        ("retrieval", "pretrained", "video_to_text", "median_rank"),
    ),
    "k400_top1": ("who does what, top-1", ("classification", "action", "pretrained", "top_1")),
    "k400_top5": ("who does what, top-5", ("classification", "action", "pretrained", "top_5")),
    "mean_ap": ("rhythm, top-1", ("classification", "audio", "pretrained", "top_1")),
    "top1": ("digit of a frame, top-1", ("classification", "image", "pretrained", "top_1")),
    "top5": ("digit of a frame, top-5", ("classification", "image", "pretrained", "top_5")),
    "multimodal_gflops": ("GFLOPs of a clip", ("gflops", "pretrain")),
}
BASE, AGNOSTIC = "base", "agnostic"
SEEDED = (BASE, AGNOSTIC, "drop-75", "drop-25", "drop-0")  # the runs with three seeds


def dropping(rate: float) -> str:
    """The name of the run that pre-trains with this rate of DropToken."""
    return BASE if rate == 0.5 else f"drop-{100 * rate:.0f}"


def with_seed(run: StudyRun, seed: int) -> StudyRun:
    """The same run with another seed and its own name; the first seed is that of the project."""
    if seed == SEEDS[0]:
        return run
    start, corpus = (
        None if name is None else f"{name}-seed-{seed}" for name in (run.start, run.corpus)
    )
    return replace(
        run,
        name=f"{run.name}-seed-{seed}",
        start=start,
        corpus=corpus,
        settings={**run.settings, "seed": seed},
        seed=seed,
    )


# On the paper's data sets, the task or probe of a column has the name of the set.
TASKS_OF = {
    "k400": "kinetics400",
    "k600": "kinetics600",
    "mit": "moments",
    "mean": "audioset",
    "auc": "audioset",
    "d": "audioset",
    "top1": "imagenet",
    "top5": "imagenet",
}
PROBE_SETS = ("ucf101", "hmdb51", "esc50")
RETRIEVAL_SETS = ("youcook2", "msrvtt")
MEASURES = {"top1": "top_1", "top5": "top_5", "mean_ap": "mean_ap", "auc": "auc"}
MEASURES |= {"d_prime": "d_prime"}

MEL_FRAMES = {"demo": 38, "paper": 150}  # 0.8 and 3.2 seconds, 21 ms each


def _sizes(video: str, audio: str = "base", text: str = "small") -> Settings:
    towers = {"video": video, "audio": audio, "text": text}
    return {f"model.{tower}.size": size for tower, size in towers.items()}


MODELS = {  # at the paper's size, whatever the size of the project's own model
    "BBS": _sizes("base"),
    "MBS": _sizes("medium"),
    "LBS": _sizes("large"),
    "MA": {"model.backbone": "agnostic", **_sizes("medium", "medium", "medium")},
}


def _table(number: int) -> PaperTable:
    return next(table for table in paper_tables() if table.number == number)


def _rows(number: int) -> dict[str, int]:
    return {row.name: place for place, row in enumerate(_table(number).rows)}


def pretraining(scale: Scale, name: str, settings: Settings | None = None) -> StudyRun:
    """A pre-training of an exploration; those that are fine-tuned have tasks."""
    tasks: tuple[Task, ...] = ()
    if scale.name == "demo" and name in (BASE, AGNOSTIC):
        tasks = tuple(Task(name, name) for name in ("action", "audio", "image"))
    inits = ("pretrained", "scratch") if name == BASE else ("pretrained",)
    return StudyRun(name, {**scale.settings, **(settings or {})}, tasks=tasks, inits=inits)


def _model(scale: Scale, model: str) -> StudyRun:
    """A pre-training that tables 1 to 4 and 8 compare; scaled down, there is one size."""
    if scale.name == "paper":
        return StudyRun(model.lower(), MODELS[model])
    if model == "MA":
        return pretraining(scale, AGNOSTIC, {"model.backbone": "agnostic"})
    return pretraining(scale, BASE)


def _data_set(column: str) -> str:
    name = column.split("_")[0]
    return TASKS_OF.get(name, name)


def _answer(
    run: StudyRun, column: str, scale: Scale, kind: str = "svm"
) -> tuple[StudyRun | None, Answer]:
    """The answer to a column for a pre-training, and the extra run on the column's data set."""
    if scale.name == "demo" or column == "multimodal_gflops":
        path = tuple(kind if part == "svm" else part for part in STAND_INS[column][1])
        return None, Answer(run.name, path)
    data = _data_set(column)
    on = StudyRun(f"{run.name}-{data}", start=run.name, data=data)
    if data in PROBE_SETS:
        return on, Answer(on.name, ("probes", data, kind, "pretrained"))
    measure = column if column in MEASURES else column.partition("_")[2]
    if data in RETRIEVAL_SETS:
        path = ("retrieval", "pretrained", "text_to_video", SEARCH_MEASURES[measure])
        return on, Answer(on.name, path)
    on = replace(on, tasks=(Task(data, LIKE.get(data, data)),))
    return on, Answer(on.name, ("classification", data, "pretrained", MEASURES[measure]))


LIKE = {"kinetics600": "kinetics400", "moments": "kinetics400"}  # the same recipe
SEARCH_MEASURES = {"r10": "recall_at_10", "median_rank": "median_rank"}


@dataclass
class _Building:
    """A study while it is put together; shared runs are added once."""

    number: int
    scale: Scale
    runs: dict[str, StudyRun] = field(default_factory=dict)
    answers: dict[tuple[int, str], Answer] = field(default_factory=dict)

    def add(self, run: StudyRun) -> StudyRun:
        self.runs.setdefault(run.name, run)
        return run

    def ask(
        self, row: int, column: str, run: StudyRun, *, of: str | None = None, kind: str = "svm"
    ) -> None:
        """Let the cell (row, column) show the measure `of` of the run."""
        self.add(run)
        on, answer = _answer(run, of or column, self.scale, kind)
        if on is not None:
            self.add(on)
        self.answers[row, column] = answer

    def known(self, column: str) -> bool:
        """Whether this scale has an answer for a column of the paper."""
        return column in STAND_INS if self.scale.name == "demo" else True

    def done(self) -> Study:
        return Study(self.number, tuple(self.runs.values()), self.answers)


def _from_scratch(answer: Answer) -> Answer:
    path = tuple("scratch" if part == "pretrained" else part for part in answer.path)
    return replace(answer, path=path)


def _comparison(
    number: int, rows: Mapping[str, str], columns: tuple[str, ...], scratch: str | None = None
) -> Callable[[Scale], Study]:
    """A table whose rows are models: `rows` maps each row to a model."""

    def build(scale: Scale) -> Study:
        made, places = _Building(number, scale), _rows(number)
        for row, model in rows.items():
            if scale.name == "demo" and model in SIZES_ONLY.get(number, ()):
                continue
            for column in filter(made.known, columns):
                made.ask(places[row], column, _model(scale, model))
        if scratch is not None:
            model = "BBS" if number == IMAGES else "MBS"
            for column in filter(made.known, [c for c in columns if c in SCRATCH_COLUMNS]):
                made.ask(places[scratch], column, _model(scale, model))
                cell = places[scratch], column
                made.answers[cell] = _from_scratch(made.answers[cell])
                run = made.runs[made.answers[cell].run]
                made.runs[run.name] = replace(run, inits=("pretrained", "scratch"))
        return made.done()

    return build


IMAGES = 3
SIZES_ONLY = {1: ("BBS", "LBS")}  # rows that differ only in size; scaled down, there is one size
SCRATCH_COLUMNS = ("k400_top1", "k400_top5", "top1", "top5")


def _table_5(scale: Scale) -> Study:
    made = _Building(5, scale)
    for row, place in _rows(5).items():
        for column, rate in DROP_RATES.items():
            made.ask(place, column, _dropping(scale, rate), of=row)
    return made.done()


def _dropping(scale: Scale, rate: float) -> StudyRun:
    return pretraining(scale, dropping(rate), {"pretrain.drop_rate": rate})


def _table_6(scale: Scale) -> Study:
    """One experiment with a task for each cell, from the weights of one pre-training."""
    made = _Building(6, scale)
    start = made.add(_model(scale, "MBS"))
    like, data = ("action", None) if scale.name == "demo" else ("kinetics400", "kinetics400")
    tasks: dict[str, Task] = {}
    for name, row in _rows(6).items():
        clip, measure = name.split()
        frames, size = (int(part) for part in clip.split("x")[:2])
        for column, rate in DROP_RATES.items():
            if _table(6).rows[row].values[_table(6).columns.index(column)] is None:
                continue
            task = f"{frames}x{size}-drop-{100 * rate:.0f}"
            tasks[task] = Task(
                task,
                like,
                {
                    "frames": scale.frames(frames),
                    "frame_size": scale.size(size),
                    "drop_rate": rate,
                    "augmentation": scale.crop(size),
                },
            )
            path = ("classification", task, "pretrained", "top_1")
            made.answers[row, column] = Answer(
                "fine-tuning", path if measure == "top1" else ("gflops", task)
            )
    made.add(StudyRun("fine-tuning", scale.settings if data is None else {}, start=start.name,
                 data=data, tasks=tuple(tasks.values())))  # fmt: skip
    return made.done()


def _table_8(scale: Scale) -> Study:
    made, places = _Building(8, scale), _rows(8)
    for row, model, kind in (
        ("VATT-Medium + SVM", "MBS", "svm"),
        ("VATT-Medium + LRC", "MBS", "low_rank"),
        ("VATT-MA-Medium + LRC", "MA", "low_rank"),
    ):
        for column in _table(8).columns:
            made.ask(places[row], column, _model(scale, model), kind=kind)
    return made.done()


def _table_9(scale: Scale) -> Study:
    made, table = _Building(9, scale), _table(9)
    for place, row in enumerate(table.rows):
        clip, patch = str(row.values[0]), str(row.values[1])
        frames, size = (int(part) for part in clip.split("x")[:2])
        settings = {
            "model.video.frames": scale.frames(frames),
            "model.video.frame_size": scale.size(size),
            "model.video.patch": [int(part) for part in patch.split("x")],
        }
        for key, value in scale.crop(size).items():
            settings[f"pretrain.augmentation.{key}"] = value
        name = BASE if (clip, patch) == ("32x224x224", "4x16x16") else f"{clip}-{patch}"
        run = pretraining(scale, name, {} if name == BASE else settings)
        for column in table.columns[2:]:
            made.ask(place, column, run)
    return made.done()


def _table_10(scale: Scale) -> Study:
    made, table = _Building(10, scale), _table(10)
    for place, row in enumerate(table.rows):
        kind, patch = str(row.values[0]), str(row.values[1])
        settings: dict[str, Any] = {}
        if kind == "spectrogram":
            settings = {
                "model.audio.input": kind,
                "model.audio.samples": MEL_FRAMES[scale.name],
                "model.audio.patch": [int(part) for part in patch.split("x")],
                "model.audio.mel_bins": 80,
            }
        elif patch != "128":
            settings = {"model.audio.patch": int(patch)}
        run = pretraining(scale, f"{kind}-{patch}" if settings else BASE, settings)
        for column in table.columns[2:]:
            made.ask(place, column, run)
    return made.done()


BUILDERS: dict[int, Callable[[Scale], Study]] = {
    1: _comparison(
        1,
        {"VATT-Base": "BBS", "VATT-Medium": "MBS", "VATT-Large": "LBS", "VATT-MA-Medium": "MA"},
        ("k400_top1", "k400_top5", "k600_top1", "k600_top5", "mit_top1", "mit_top5"),
        scratch="VATT from scratch (text)",
    ),
    2: _comparison(2, {"VATT-Base": "BBS", "VATT-MA-Medium": "MA"}, ("mean_ap", "auc", "d_prime")),
    3: _comparison(3, {"VATT-Base": "BBS"}, ("top1", "top5"), scratch="VATT-Base from scratch"),
    4: _comparison(
        4,
        {"VATT-MBS": "MBS", "VATT-MA-Medium": "MA"},
        ("youcook2_r10", "youcook2_median_rank", "msrvtt_r10", "msrvtt_median_rank"),
    ),
    5: _table_5,
    6: _table_6,
    7: lambda scale: Study(7, (), {}),  # sizes: nothing to run
    8: _table_8,
    9: _table_9,
    10: _table_10,
}


def study(number: int, scale: Scale) -> Study:
    """The runs of a table and the answers of its cells; shared runs have one name in all tables."""
    return BUILDERS[number](scale)


def studies(scale: Scale) -> tuple[Study, ...]:
    """All tables, in the paper's order."""
    return tuple(study(number, scale) for number in sorted(BUILDERS))
