"""The results on this run's corpus: key figures, charts with intervals, tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vatt.report.inputs import Inputs
from vatt.report.tables import (
    Cell,
    CellKind,
    Table,
    TableRow,
    chance_cell,
    difference_cell,
    main_measure,
    metric_cell,
    percent,
    plain_cell,
    rank_cell,
    signed,
    too_few,
    verdict,
    with_few,
)

Metric = dict[str, Any]

DIRECTIONS = {
    "text_to_video": "text\u00a0→\u00a0video",
    "video_to_text": "video\u00a0→\u00a0text",
    "audio_to_video": "audio\u00a0→\u00a0video",
    "video_to_audio": "video\u00a0→\u00a0audio",
}
MEASURES = {
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "recall_at_10": "R@10",
    "class_at_1": "class@1",
}
PROBES = {"svm": "linear SVM", "low_rank": "low-rank classifier"}
WHY = "evaluate has not been run"
NO_LABELS = "no clip has a label to compare by"


def directions(inputs: Inputs) -> dict[str, str]:
    """The directions of the paper's senses in words, then those of others that were measured."""
    found = inputs.lookup("retrieval", "pretrained") or {}
    more = [name for name in found if name not in DIRECTIONS and not name.endswith("_averaged")]
    return DIRECTIONS | {name: _words(name) for name in more}


def _words(direction: str) -> str:
    """A direction in words; only video was trained together with every other sense."""
    senses = direction.split("_to_")
    apart = "" if "video" in senses else " (not trained together)"
    return "\u00a0→\u00a0".join(senses) + apart


@dataclass(frozen=True, slots=True)
class Figure:
    """A number on a card at the top of the page; without a value it has not been run."""

    label: str
    value: str | None
    context: str
    sure: bool = True  # whether the interval excludes chance, or a difference of 0
    few: bool = False  # whether there is a number, of too few clips to mean anything


@dataclass(frozen=True, slots=True)
class Mark:
    """A value on a scale from 0 to 1, with its interval."""

    label: str
    ours: Metric
    baseline: Metric | None  # untrained or from scratch


@dataclass(frozen=True, slots=True)
class ScaleChart:
    """Values under each other on one scale from 0 to 100 %."""

    title: str
    ours: str
    baseline: str
    marks: tuple[Mark, ...]
    left_out: str = ""  # what has too few clips


def key_figures(inputs: Inputs) -> tuple[Figure, ...]:
    """The four numbers that show whether pre-training has learned anything."""
    return (
        _recall_figure(inputs, "text_to_video"),
        _recall_figure(inputs, "video_to_audio"),
        _difference_figure(
            inputs,
            "Linear probe of frozen features",
            "above the untrained encoder",
            "probes",
            "svm",
        ),
        _difference_figure(inputs, "Fine-tuning", "above training from scratch", "classification"),
    )


def _recall_figure(inputs: Inputs, direction: str) -> Figure:
    label = f"{DIRECTIONS[direction].capitalize()}, R@10"
    metric = inputs.lookup("retrieval", "pretrained", direction, "recall_at_10")
    if metric is None:
        return Figure(label, None, WHY)
    if (needed := too_few(metric, searched=True)) is not None:
        return Figure(label, None, few_words(metric, needed, "searched"), few=True)
    times = metric["value"] / metric["chance"]
    context = f"{times:.1f} × chance ({percent(metric['chance'])}), {metric['n']} clips searched"
    return Figure(label, percent(metric["value"]), context, sure=metric["low"] > metric["chance"])


def _differences(inputs: Inputs, section: str, *path: str) -> dict[str, Metric]:
    """The difference of each task that has one, largest first."""
    tasks = inputs.lookup(section) or {}
    found = {name: inputs.lookup(section, name, *path, "difference") for name in tasks}
    measured = {name: metric for name, metric in found.items() if metric is not None}
    return dict(sorted(measured.items(), key=lambda task: -task[1]["value"]))


def _difference_figure(inputs: Inputs, label: str, against: str, *path: str) -> Figure:
    """The largest difference, marked as the best of all, with each of them below it."""
    tasks = _differences(inputs, *path)
    if not tasks:
        return Figure(label, None, _why_no(inputs, path[0]))
    first = next(iter(tasks.values()))
    if (needed := too_few(first)) is not None:
        return Figure(label, None, few_words(first, needed, "tested"), few=True)
    if len(tasks) > 1:
        label += f", best of {len(tasks)} tasks"
    each = ", ".join(
        f"{name} {signed(100 * metric['value'])}{VERDICTS[verdict(metric).partition(':')[0]]}"
        for name, metric in tasks.items()
    )
    context = f"points {against}: {each}"
    return Figure(label, signed(100 * first["value"]), context, sure=first["low"] > 0)


VERDICTS = {
    "better": "",
    "worse": " (significantly worse)",
    "no significant difference": " (no significant difference)",
}


def _why_no(inputs: Inputs, section: str) -> str:
    """Why a section of the evaluation has no difference between two runs."""
    if not inputs.evaluation:
        return WHY
    return "no pair of runs to compare" if inputs.lookup(section) else NO_LABELS


def few_words(metric: Metric, needed: int, done: str) -> str:
    """Why a number is not shown as a result."""
    return f"{metric['n']} clips {done}; {needed} or more are needed to say anything"


def _why(inputs: Inputs, direction: str) -> str:
    """Why there are no numbers for a direction of retrieval."""
    if not inputs.evaluation:
        return WHY
    if not inputs.lookup("retrieval", "pretrained"):
        return "no encoder has been evaluated"
    words: str | None = inputs.lookup("skipped", "text") if "text" in direction else None
    return words or "no test clip has both modalities"


def scales(inputs: Inputs) -> tuple[ScaleChart, ...]:
    """Charts of what was measured; a chart without values is left out."""
    found = [
        _scale(
            "Zero-shot retrieval",
            ("pre-trained", "untrained"),
            _retrieval_marks(inputs),
            searched=True,
        ),
        _scale(
            "Linear probe on frozen features",
            ("pre-trained encoder", "untrained encoder"),
            _probe_marks(inputs),
        ),
        _scale(
            "Fine-tuning, top-1 accuracy",
            ("from the pre-trained weights", "from scratch"),
            _classification_marks(inputs),
        ),
    ]
    return tuple(scale for scale in found if scale.marks or scale.left_out)


def _scale(
    title: str, names: tuple[str, str], marks: list[Mark], *, searched: bool = False
) -> ScaleChart:
    """A chart of the marks with enough clips; the others are named below it."""
    few = {
        mark.label: needed for mark in marks if (needed := too_few(mark.ours, searched=searched))
    }
    left_out = ""
    if few:
        clips = max(mark.ours["n"] for mark in marks if mark.label in few)
        names_out = ", ".join(few)
        left_out = (
            f"Not shown, because {clips} test clips are too few to say anything "
            f"({max(few.values())} or more are needed): {names_out}."
        )
    shown = tuple(mark for mark in marks if mark.label not in few)
    return ScaleChart(title, *names, marks=shown, left_out=left_out)


def _retrieval_marks(inputs: Inputs) -> list[Mark]:
    marks = []
    for direction, name in directions(inputs).items():
        for measure in ("recall_at_10", "class_at_1"):
            ours = inputs.lookup("retrieval", "pretrained", direction, measure)
            if ours is not None:
                untrained = inputs.lookup("retrieval", "untrained", direction, measure)
                marks.append(Mark(f"{name}, {MEASURES[measure]}", ours, untrained))
    return marks


def _probe_marks(inputs: Inputs) -> list[Mark]:
    return [
        Mark(f"{name}, {PROBES.get(kind, kind)}", run["pretrained"], run.get("untrained"))
        for name, kinds in (inputs.lookup("probes") or {}).items()
        for kind, run in kinds.items()
        if "pretrained" in run
    ]


def _classification_marks(inputs: Inputs) -> list[Mark]:
    return [
        Mark(name, mark, main_measure(runs.get("scratch")))
        for name, runs in (inputs.lookup("classification") or {}).items()
        if (mark := main_measure(runs.get("pretrained")))
    ]


def result_tables(inputs: Inputs) -> tuple[Table, ...]:
    """Every number of evaluate.json, with its interval, chance and baseline."""
    return (_retrieval_table(inputs), _probe_table(inputs), _classification_table(inputs))


def _retrieval_table(inputs: Inputs) -> Table:
    rows = [
        row
        for direction, name in directions(inputs).items()
        for row in _direction_rows(inputs, direction, name)
    ]
    return Table(
        title="Zero-shot retrieval",
        headings=("Direction", *MEASURES.values(), "median rank"),
        rows=tuple(rows),
        remark=retrieval_protocol(inputs),
    )


def retrieval_protocol(inputs: Inputs) -> str:
    """The protocol of the retrieval in words."""
    search = inputs.lookup("searches", "text_to_video") or inputs.lookup(
        "searches", "audio_to_video"
    )
    protocol, sentences = inputs.lookup("protocol") or {}, []
    if search:
        sentences.append(f"Searched among {of_listed(search['pool'], inputs)} test clips.")
    if search and search["captions_per_clip"]:
        number = f"{search['captions_per_clip']:.3g} captions per clip"
        each = protocol.get("caption_queries") == "each"
        sentences.append(
            f"{number}, each a separate query; a video finds the clip of its nearest caption."
            if each
            else f"{number}, together one query."
        )
    if protocol:
        sentences.append(f"{windows(protocol)} {protocol['fps']:g} frames per second, centre crop.")
        sentences += computed(protocol)
    sentences.append(
        "Scores are cosines of mean embeddings; rows with “similarities averaged” average the "
        "cosines instead. Only the clip that the query belongs to is a hit; class@1: the nearest "
        "clip has the same class labels as the query."
    )
    return " ".join(sentences)


def computed(protocol: dict[str, Any]) -> list[str]:
    """How the encoders computed, where that is worth a sentence."""
    in_bf16, merged = protocol.get("precision") == "bf16", protocol.get("merge_rate", 0.0)
    sentences = ["Encoders in bf16."] if in_bf16 else []
    return sentences + ([f"Each block merges {merged:.1%} of its tokens."] if merged else [])


def windows(protocol: dict[str, Any]) -> str:
    """How many windows of a clip were encoded."""
    number = protocol["windows"]
    return "The centre of each clip." if number == 1 else f"{number} windows spread over each clip."


def of_listed(number: int, inputs: Inputs) -> str:
    """A number of test clips, out of those that the data set lists."""
    listed = inputs.listed("test")
    return f"{number:,} of {listed:,}" if listed and listed >= number else f"{number:,}"


def _direction_rows(inputs: Inputs, direction: str, name: str) -> list[TableRow]:
    ours = inputs.lookup("retrieval", "pretrained", direction)
    if ours is None:
        empty = tuple(metric_cell(None) for _ in (*MEASURES, "median_rank"))
        return [TableRow(name, empty, "not_run", _why(inputs, direction))]
    few, kind = too_few(ours["median_rank"], searched=True), searched_kind(ours)
    note = f"pre-trained; {few} or more clips are needed" if few else "pre-trained"
    rows = [TableRow(name, _retrieval_cells(ours, kind), "ours", note, starts=True)]
    averaged = inputs.lookup("retrieval", "pretrained", f"{direction}_similarities_averaged")
    if averaged is not None:
        cells = _retrieval_cells(averaged, kind)
        rows.append(TableRow(name, cells, "ours", "similarities averaged"))
    untrained = inputs.lookup("retrieval", "untrained", direction)
    if untrained is not None:
        cells = _retrieval_cells(untrained, kind="baseline")
        rows.append(TableRow(name, cells, "baseline", "untrained encoder"))
    chance = [chance_cell(ours.get(measure)) for measure in MEASURES]
    chance.append(chance_cell(ours["median_rank"], as_share=False))
    return [*rows, TableRow(name, tuple(chance), "chance", "chance")]


def searched_kind(direction: dict[str, Metric]) -> CellKind:
    """How the numbers of a direction are shown: muted where too few clips were searched."""
    return "unsure" if too_few(direction["median_rank"], searched=True) else "ours"


def _retrieval_cells(metrics: dict[str, Metric], kind: Any = "ours") -> tuple[Cell, ...]:
    shares = [
        metric_cell(metrics[measure], kind) if measure in metrics else Cell("–", "none")
        for measure in MEASURES
    ]
    return (*shares, rank_cell(metrics["median_rank"], kind))


def _probe_table(inputs: Inputs) -> Table:
    rows = [
        TableRow(
            name,
            (
                metric_cell(run["pretrained"]),
                metric_cell(run.get("untrained"), "baseline"),
                difference_cell(run.get("difference")),
                chance_cell(run.get("pretrained")),
                Cell(_num_clips(run["pretrained"], inputs), "text"),
            ),
            "ours",
            with_few(PROBES.get(kind, kind), run["pretrained"]),
        )
        for name, kinds in (inputs.lookup("probes") or {}).items()
        for kind, run in kinds.items()
        if "pretrained" in run
    ]
    headings = ("Probe", "pre-trained", "untrained", "difference", "chance", "clips")
    return Table(
        title="Linear probe on frozen features",
        headings=headings,
        rows=tuple(rows) or _nothing(headings, _skipped(inputs) or _why_no(inputs, "probes")),
        remark=probe_protocol(inputs),
    )


def _num_clips(metric: Metric, inputs: Inputs) -> str:
    """The clips that were tested; with folds, nearly all that the data set lists."""
    if "folds" not in metric:
        return of_listed(metric["n"], inputs)
    listed = sum(inputs.listed(split) or 0 for split in ("train", "val", "test"))
    known = f" of {listed:,}" if listed >= metric["n"] else ""
    return f"{metric['n']:,}{known}, {metric['folds']} splits"


def probe_protocol(inputs: Inputs) -> str:
    """The protocol of the probes in words."""
    protocol = inputs.lookup("protocol") or {}
    sentences = [
        "The same classifier on the same clips: on features of the pre-trained encoder, and of an "
        "encoder with its initial random weights. Features are standardised."
    ]
    if protocol:
        tested = windows(protocol)
        tested = "the centre of each test clip." if protocol["windows"] == 1 else tested.lower()
        sentences.append(f"Trained on the centre of each train clip, tested on {tested}")
        sentences.append(
            "SVM: linear; C is chosen on a fifth of the train clips; margins are averaged."
        )
    if protocol.get("low_rank_steps"):
        sentences.append(
            "Low-rank: C = UV with 128 components, of which 13 are drawn at each step; Adam "
            f"0.0005, batch 64, {protocol['low_rank_steps']:,} steps; probabilities are averaged."
        )
    if any("folds" in kind["pretrained"] for kind in _kinds(inputs)):
        sentences.append("With several official splits: their mean ± their standard deviation.")
    return " ".join(sentences)


def _kinds(inputs: Inputs) -> list[dict[str, Metric]]:
    probes = inputs.lookup("probes") or {}
    return [run for kinds in probes.values() for run in kinds.values() if "pretrained" in run]


def _classification_table(inputs: Inputs) -> Table:
    rows = []
    for name, runs in (inputs.lookup("classification") or {}).items():
        measures = sorted({key for run in ("pretrained", "scratch") for key in runs.get(run, {})})
        for measure in measures:
            rows.append(_classification_row(inputs, name, measure, runs))
    headings = ("Task", "pre-trained", "from scratch", "difference", "chance", "clips")
    return Table(
        title="Fine-tuned accuracy",
        headings=headings,
        rows=tuple(rows) or _nothing(headings, "no task has been fine-tuned and evaluated"),
        remark=classification_protocol(inputs),
    )


def classification_protocol(inputs: Inputs) -> str:
    """The protocol of the classifiers in words."""
    views = [
        f"{name}: {run['views'][0]} windows × {run['views'][1]} crops per clip."
        for name, run in (inputs.lookup("classification") or {}).items()
        if run.get("views")
    ]
    return " ".join(
        [
            *views,
            "Logits are averaged over the views of a clip. The difference is paired: both "
            "classifiers are tested on the same clips.",
        ]
    )


def _classification_row(inputs: Inputs, name: str, measure: str, runs: dict[str, Any]) -> TableRow:
    ours = runs.get("pretrained", {}).get(measure)
    scratch = runs.get("scratch", {}).get(measure)
    first = measure in ("top_1", "mean_ap")
    show = plain_cell if measure == "d_prime" else metric_cell
    difference = runs.get("difference")
    known = ours or scratch
    assert known is not None
    found = verdict(difference) if first and not too_few(known) else ""
    return TableRow(
        name,
        (
            show(ours),
            show(scratch, "baseline"),
            difference_cell(difference) if first else Cell("–", "none"),
            chance_cell(known, as_share=measure != "d_prime"),
            Cell(of_listed(known["n"], inputs), "text"),
        ),
        "ours",
        with_few("; ".join(filter(None, [measure.replace("_", "-"), found])), known),
    )


def _skipped(inputs: Inputs) -> str:
    """What the evaluation left out, and why."""
    skipped: dict[str, str] = inputs.lookup("skipped") or {}
    return "; ".join(f"{name}: {reason}" for name, reason in skipped.items())


def _nothing(headings: Sequence[str], why: str) -> tuple[TableRow, ...]:
    cells = tuple(metric_cell(None) for _ in headings[1:])
    return (TableRow("–", cells, "not_run", why),)
