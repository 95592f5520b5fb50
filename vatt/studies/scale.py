"""The paper's tables as runs: what each cell needs, at the paper's size and in small.

From one list follow both the runs of `vattctl table` and the rows of the report. In small, on the
demo corpus, one factor scales the clip: frames and frame sizes are the paper's divided by FACTOR,
sizes rounded to pixels (64 for 224, exactly), frames down to whole patches. Not scaled are:

- Patches: divided too, a clip would have the paper's 1,568 tokens, which two cores do not train in
  the seconds that a run may take. 4x16x16 stays 4x16x16; patches at the edges are padded.
- The waveform: a clip of the demo has 6,400 samples, and patches of 128 to 1,024 stay.

A clip of the demo has 10 frames: 16 (for the paper's 64) show it begun again. Of its 72 pixels a
smaller frame is cut out, a larger one is the whole enlarged, in training as in the test.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

FACTOR = 3.5
DEPTH, STORED = 4, 72  # frames of a patch; pixels of the demo's clips
SEEDS = (0, 1, 2)
DROP_RATES = {"drop_75": 0.75, "drop_50": 0.5, "drop_25": 0.25, "drop_0": 0.0}
STUDIES = "studies"  # the stem of the file that holds what the runs measured, among the metrics

Settings = Mapping[str, Any]  # `pretrain.drop_rate`: 0.75
ScaleName = Literal["demo", "paper"]


@dataclass(frozen=True, slots=True)
class Task:
    """A fine-tuning: the project's task `like`, with some of its settings changed."""

    name: str
    like: str
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """One experiment: a pre-training, or what is done with another run's weights."""

    name: str
    settings: Settings = field(default_factory=dict)
    start: str | None = None  # the run whose weights it takes; None: it pre-trains
    data: str | None = None  # the data set whose clips it uses; None: the project's
    tasks: tuple[Task, ...] = ()
    inits: tuple[str, ...] = ("pretrained",)
    seed: int | None = None  # None: the project's


@dataclass(frozen=True, slots=True)
class Answer:
    """Where a cell's number is found: a run, and a path in what it measured."""

    run: str
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Study:
    """A table: its runs, and the answer to each cell (row, column) that they give."""

    number: int
    runs: tuple[Run, ...]
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
        """How much of a frame is shown in training: in small as much as in the test."""
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
# Explorations were trained with batches of 512 (tables 5, 9 and 10).
PAPER = Scale("paper", {"pretrain.drop_rate": 0.5, "pretrain.batch_size": 512})
SCALES: dict[str, Scale] = {"demo": DEMO, "paper": PAPER}

# What stands for a column of the paper on the demo corpus: words for the report, and the path.
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


def with_seed(run: Run, seed: int) -> Run:
    """The same run with another seed, under a name of its own; the first seed is the project's."""
    if seed == SEEDS[0]:
        return run
    start = None if run.start is None else f"{run.start}-seed-{seed}"
    settings = {**run.settings, "seed": seed}
    return replace(run, name=f"{run.name}-seed-{seed}", start=start, settings=settings, seed=seed)
