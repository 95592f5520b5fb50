"""The studies that go beyond the paper: arms that differ in one setting, and their controls.

Each arm is pre-trained with three seeds on the demo corpus, at the size of the scaled-down tables.
An arm is compared with its control pair by pair: both see the same seed, so the same clips and the
same first weights. docs/beyond.md says what each setting does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vatt.studies import (
    AGNOSTIC,
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
class Curve:
    """A line of a figure: a measure of several arms."""

    words: str
    measure: Measure
    arms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """Curves over a measure, or over numbers of ours; `points` names the places of the arms."""

    title: str
    x: Measure | tuple[float, ...]
    x_label: str
    points: tuple[str, ...]
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True)
class Beyond:
    """A study: its question, its arms, and what is measured of each."""

    name: str
    title: str
    question: str
    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]
    figures: tuple[Figure, ...] = ()

    def runs(self) -> tuple[StudyRun, ...]:
        """All runs, seed by seed; each comes after the run whose clips or weights it uses."""
        found: dict[str, StudyRun] = {}
        for seed in SEEDS:
            # The base first: it brings the clips of its seed.
            for run in (_run(BASE), *(arm.run for arm in self.arms)):
                found.setdefault(with_seed(run, seed).name, with_seed(run, seed))
        return tuple(found.values())


RECALL = "recall_at_10"
AUDIO_TO_VIDEO = Measure(
    "sound to video, R@10", ("retrieval", "pretrained", "audio_to_video", RECALL)
)
TEXT_TO_VIDEO = Measure("text to video, R@10", STAND_INS["youcook2_r10"][1])
DIGIT = Measure("digit, probe on video", STAND_INS["ucf101"][1])
ACTION = Measure("who does what, probe on video", STAND_INS["hmdb51"][1])
RHYTHM = Measure("rhythm, probe on sound", STAND_INS["esc50"][1])
GFLOPS = Measure("GFLOPs of a clip", ("gflops", "pretrain"), "number")
SECONDS = Measure("seconds of training", ("training_seconds",), "number")
PROBES = "evaluate.probes"


def _run(name: str, settings: Mapping[str, Any] | None = None) -> StudyRun:
    """A pre-training at the scale of the demo's tables, which share their runs with the studies."""
    return pretraining(DEMO, name, settings)


def _retrieval(name: str, settings: Mapping[str, Any], corpus: str | None) -> StudyRun:
    """A pre-training that is measured by retrieval alone: no time is spent on probes."""
    run = _run(name, settings)
    kept = {key: value for key, value in run.settings.items() if not key.startswith(PROBES)}
    return replace(run, settings={**kept, PROBES: {}}, corpus=corpus)


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
        (TEXT_TO_VIDEO, AUDIO_TO_VIDEO, DIGIT, ACTION, RHYTHM, GFLOPS, SECONDS),
        tuple(
            Figure(
                f"Operations and {measure.words}",
                GFLOPS,
                GFLOPS.words,
                tuple(f"{100 * rate:g} %" for rate in RATES),
                tuple(
                    Curve(way, measure, tuple(f"{100 * rate:g} % dropped {way}" for rate in RATES))
                    for way in ("at random", "by content")
                ),
            )
            for measure in (TEXT_TO_VIDEO, AUDIO_TO_VIDEO, ACTION)
        ),
    )


def _merging() -> Beyond:
    none = f"{BASE}, nothing merged"
    arms = [Arm(none, _run(BASE))]
    gflops = Measure("GFLOPs, video", ("gflops", "evaluate", "video"), "number")
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
            *(TEXT_TO_VIDEO, AUDIO_TO_VIDEO, DIGIT, ACTION, RHYTHM, gflops),
            Measure("seconds, video", ("cost", "video"), "number"),
        ),
        (
            Figure(
                "Merged at inference, against operations",
                gflops,
                "GFLOPs of a clip's video",
                ("nothing", *(f"{100 * rate:g} %" for rate in MERGE_RATES)),
                tuple(
                    Curve(measure.words, measure, tuple(arm.words for arm in arms))
                    for measure in (TEXT_TO_VIDEO, DIGIT, ACTION)
                ),
            ),
        ),
    )


# --- text quality ---------------------------------------------------------------------------------

NOISES = (0.4, 0.8)
CLEAN = "clean captions"
PREPARED = {
    "preprocess.text_quality": {
        "fillers": [],
        "repeat_seconds": 0,
        "languages": [],
        "least_quality": 0.7,
    }
}
WEIGHTED = {"pretrain.text_weighting": {"kind": "drop", "least": 0.6, "warmup_steps": 60}}


def _text() -> Beyond:
    arms = [Arm(CLEAN, _run(BASE))]
    for noise in NOISES:
        percent = f"{100 * noise:.0f}"
        plain, prepared = f"text-{percent}", f"text-{percent}-prepared"
        noisy = {"data.demo.text_noise": noise}
        control = f"{percent} % spoilt, plain"
        arms += [
            Arm(control, _retrieval(plain, noisy, plain), control=CLEAN),
            Arm(
                f"{percent} % spoilt, prepared",
                _retrieval(prepared, noisy | PREPARED, prepared),
                control=control,
            ),
            Arm(
                f"{percent} % spoilt, weighted",
                _retrieval(f"text-{percent}-weighted", noisy | WEIGHTED, plain),
                control=control,
            ),
            Arm(
                f"{percent} % spoilt, both",
                _retrieval(f"text-{percent}-both", noisy | PREPARED | WEIGHTED, prepared),
                control=control,
            ),
        ]
    video_to_text = Measure("video to text, R@10", STAND_INS["msrvtt_r10"][1])
    ways = ("plain", "prepared", "weighted", "both")
    return Beyond(
        "text",
        "Text quality: spoilt captions",
        "When captions of the train clips are beside the point, late or mistranscribed: what do "
        "preparation and weighting give back? Captions of the test clips are clean.",
        tuple(arms),
        (TEXT_TO_VIDEO, video_to_text, SECONDS),
        (
            Figure(
                "Retrieval against noise",
                (0.0, *(100 * noise for noise in NOISES)),
                "% of the captions spoilt",
                (),
                tuple(
                    Curve(
                        way,
                        TEXT_TO_VIDEO,
                        (CLEAN, *(f"{100 * noise:.0f} % spoilt, {way}" for noise in NOISES)),
                    )
                    for way in ways
                ),
            ),
        ),
    )


# --- more senses ----------------------------------------------------------------------------------

MOTION = {
    "data.demo.motion": True,
    "preprocess.motion": {"hz": 50, "channels": 6},
}
DEPTH = {
    "data.demo.depth": True,
    "preprocess.depth": {"short_side": 72},
}
MOTION_MODEL = {"model.motion": {"size": "tiny", "samples": 40, "channels": 6, "patch": 5}}
DEPTH_MODEL = {"model.depth": {"size": "tiny", "frames": 8, "frame_size": 64, "patch": [4, 16, 16]}}
PAIRS = {"evaluate.every_pair": True}


def _senses() -> Beyond:
    every, three = "senses-both", "video, sound and words"
    stored = MOTION | DEPTH | PAIRS
    return Beyond(
        "senses",
        "More senses: motion and depth",
        "Does another sense find its video, does motion find words that no loss has compared it "
        "with, and what becomes of the first three? By chance, R@10 is 10 divided by the pool.",
        (
            Arm(three, replace(_retrieval("senses-three", PAIRS, None), start=BASE)),
            Arm(
                "and motion and depth",
                _retrieval(every, stored | MOTION_MODEL | DEPTH_MODEL, every),
                control=three,
            ),
            Arm(
                "and motion",
                _retrieval("senses-motion", stored | MOTION_MODEL, every),
                control=three,
            ),
            Arm(
                "and depth",
                _retrieval("senses-depth", stored | DEPTH_MODEL, every),
                control=three,
            ),
        ),
        (
            TEXT_TO_VIDEO,
            AUDIO_TO_VIDEO,
            *(
                Measure(f"{one} to {other}, R@10", ("retrieval", "pretrained", pair, RECALL))
                for one, other, pair in (
                    ("motion", "video", "motion_to_video"),
                    ("depth", "video", "depth_to_video"),
                    ("words", "motion", "text_to_motion"),
                    ("motion", "words", "motion_to_text"),
                    ("words", "sound", "text_to_audio"),
                )
            ),
            SECONDS,
        ),
    )


# --- experts --------------------------------------------------------------------------------------

EXPERTS = {"model.backbone": "agnostic", "model.experts": {"number": 4}}
NO_ENTROPIES = {"number": 4, "local_weight": 0, "global_weight": 0}


def _experts() -> Beyond:
    dense = "one dense encoder"
    shared = {"model.backbone": "agnostic"}
    return Beyond(
        "experts",
        "Experts: one encoder for all senses",
        "At equal operations for each token: are four experts in every second block better than "
        "one dense encoder, and do modalities take different experts?",
        (
            Arm(dense, _run(AGNOSTIC, shared)),
            Arm("with experts", _run("experts", EXPERTS), control=dense),
            Arm(
                "with experts, without entropies",
                _run("experts-without-entropies", shared | {"model.experts": NO_ENTROPIES}),
                control=dense,
            ),
            Arm(
                "with experts of limited capacity",
                _run(
                    "experts-with-capacity",
                    shared | {"model.experts": {"number": 4, "capacity": 1.0}},
                ),
                control=dense,
            ),
            Arm("a tower for each modality", _run(BASE), control=dense),
        ),
        (
            *(TEXT_TO_VIDEO, AUDIO_TO_VIDEO, DIGIT, GFLOPS, SECONDS),
            Measure("specialisation", ("experts", "pretrained", "specialisation")),
            Measure("specialisation, untrained", ("experts", "untrained", "specialisation")),
        ),
    )


BUILDERS = (_text, _tokens, _merging, _senses, _experts)


def beyond() -> dict[str, Beyond]:
    """All studies by name, in the order of docs/beyond.md."""
    return {study.name: study for study in (build() for build in BUILDERS)}


# What `vattctl table` calls a study, where one name runs two of them.
NAMES = {"tokens": ("tokens", "merging")}


def named(name: str) -> tuple[Beyond, ...]:
    """The studies behind a name on the command line."""
    known = beyond()
    return tuple(known[one] for one in NAMES.get(name, (name,)))
