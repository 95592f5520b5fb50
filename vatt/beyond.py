"""The studies that go beyond the paper: arms that differ in one setting, and their controls.

Each arm is pre-trained with three seeds on the demo corpus, at the size of the scaled-down tables.
An arm is compared with its control pair by pair: both see the same seed, so the same clips and the
same first weights. docs/beyond.md says what each setting does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vatt.studies import (
    BASE,
    DEMO,
    SEEDS,
    STAND_INS,
    StudyRun,
    dropping,
    pretraining,
    with_seed,
)

Path = tuple[str, ...]
Kind = Literal["share", "number"]


@dataclass(frozen=True, slots=True)
class Measure:
    """A column: its heading, and where the results of a run have it."""

    words: str
    path: Path
    kind: Kind = "share"


@dataclass(frozen=True, slots=True)
class Arm:
    """A row: a run, with each seed. `control` names the arm that it is compared with."""

    words: str
    run: StudyRun
    control: str | None = None


@dataclass(frozen=True, slots=True)
class Beyond:
    """A study: its question, its arms, and what is measured of each."""

    name: str
    title: str
    question: str
    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]

    def runs(self) -> tuple[StudyRun, ...]:
        """All runs, seed by seed; each comes after the run whose clips or weights it uses."""
        found: dict[str, StudyRun] = {}
        for seed in SEEDS:
            # The base first: it brings the clips of its seed.
            for run in (_run(BASE), *(arm.run for arm in self.arms)):
                found.setdefault(with_seed(run, seed).name, with_seed(run, seed))
        return tuple(found.values())


TEXT_TO_VIDEO = Measure("text to video, R@10", STAND_INS["youcook2_r10"][1])
DIGIT = Measure("digit, probe on video", STAND_INS["ucf101"][1])
ACTION = Measure("who does what, probe on video", STAND_INS["hmdb51"][1])
RHYTHM = Measure("rhythm, probe on sound", STAND_INS["esc50"][1])
GFLOPS = Measure("GFLOPs of a clip", ("gflops", "pretrain"), "number")
SECONDS = Measure("seconds of training", ("training_seconds",), "number")


def _run(name: str, settings: Mapping[str, Any] | None = None) -> StudyRun:
    """A pre-training at the scale of the demo's tables, which share their runs with the studies."""
    return pretraining(DEMO, name, settings)


# --- fewer tokens ---------------------------------------------------------------------------------

RATES = (0.875, 0.75, 0.5)
MERGE_RATES = (0.05, 0.1, 0.2, 0.3)


def _tokens() -> Beyond:
    arms = []
    for rate in RATES:
        words = f"{100 * rate:g} % dropped"
        random = _run(dropping(rate), {"pretrain.drop_rate": rate})
        content = {"pretrain.drop_rate": rate, "pretrain.drop_by": "content"}
        arms += [
            Arm(f"{words} at random", random),
            Arm(
                f"{words} by content",
                _run(f"content-{100 * rate:.0f}", content),
                control=f"{words} at random",
            ),
        ]
    return Beyond(
        "tokens",
        "Fewer tokens: dropped by content",
        "At equal numbers of tokens, operations and steps: does it help to keep what moves and "
        "sounds, instead of what chance keeps?",
        tuple(arms),
        (TEXT_TO_VIDEO, DIGIT, ACTION, RHYTHM, GFLOPS, SECONDS),
    )


def _merging() -> Beyond:
    none = f"{BASE}, nothing merged"
    arms = [Arm(none, _run(BASE))]
    for rate in MERGE_RATES:
        settings = {"evaluate.merge_rate": rate}
        run = StudyRun(f"merge-{100 * rate:.0f}", {**DEMO.settings, **settings}, start=BASE)
        arms.append(Arm(f"{100 * rate:g} % merged in each block", run, control=none))
    return Beyond(
        "merging",
        "Fewer tokens: merged in a trained model",
        "What does a model lose, and what is saved, when similar tokens are merged at inference, "
        "without training for it?",
        tuple(arms),
        (
            *(TEXT_TO_VIDEO, DIGIT, ACTION, RHYTHM),
            Measure("GFLOPs, video", ("gflops", "evaluate", "video"), "number"),
            Measure("seconds, video", ("cost", "video"), "number"),
        ),
    )


BUILDERS = (_tokens, _merging)


def beyond() -> dict[str, Beyond]:
    """All studies by name, in the order of docs/beyond.md."""
    return {study.name: study for study in (build() for build in BUILDERS)}


# What `vattctl table` calls a study, where one name runs two of them.
NAMES = {"tokens": ("tokens", "merging")}


def named(name: str) -> tuple[Beyond, ...]:
    """The studies behind a name on the command line."""
    known = beyond()
    return tuple(known[one] for one in NAMES.get(name, (name,)))
