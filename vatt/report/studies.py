"""The results of the tables' runs, below each published row; DropToken's trade-off.

For one seed, the interval comes from a bootstrap over clips. For three seeds, the table shows their
mean with the 95 % interval of Student's t over the seeds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vatt.beyond import Arm, Beyond, Figure, Measure, beyond
from vatt.paper import DATASETS, PaperTable, heading, paper_tables
from vatt.report.figures import Picture, lines
from vatt.report.inputs import Inputs
from vatt.report.tables import (
    NOT_RUN,
    Cell,
    Table,
    TableRow,
    difference_cell,
    metric_cell,
    number,
    published_cells,
    rank_cell,
)
from vatt.studies import (
    AGNOSTIC,
    BASE,
    DROP_RATES,
    FACTOR,
    SCALES,
    SEEDS,
    STAND_INS,
    STUDIES,
    Answer,
    Study,
    dropping,
    study,
)

Metric = dict[str, Any]
STUDENT_T = {2: 12.706, 3: 4.303}  # 97.5 % of Student's t, by the number of seeds
COMPARED = ("ucf101", "hmdb51", "esc50", "youcook2_r10", "msrvtt_r10", "k400_top1", "mean_ap")
REMARK = (
    f"Scaled down: frame sizes and numbers of frames are those of the paper divided by {FACTOR}, "
    "rounded to pixels and down to complete patches. Patches are not scaled (4x16x16 stays), a "
    "clip has 6,400 samples of sound, the model is the tiny one, and the corpus is that of the "
    "demo. Compare rows with each other, not with the published numbers. Intervals: for one seed "
    "over the test clips, for three seeds Student's t over the seeds."
)


def over_seeds(metrics: Sequence[Metric]) -> Metric:
    """The mean of several seeds with the interval of Student's t; one seed stays as it is."""
    if len(metrics) == 1:
        return dict(metrics[0])
    values = [metric["value"] for metric in metrics]
    mean = statistics.fmean(values)
    half = STUDENT_T[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return {**metrics[0], "value": mean, "low": mean - half, "high": mean + half}


def measured(inputs: Inputs, answer: Answer) -> tuple[Any, int]:
    """The measured value of a cell, and from how many seeds; None if it has not been run."""
    found = [_look(runs.get(name), answer.path) for runs, name in _seeds(inputs, answer.run)]
    there = [value for value in found if value is not None]
    if not there or isinstance(there[0], int | float):
        return (there or [None])[0], 1  # operations are the same for every seed
    return over_seeds(there if len(there) == len(SEEDS) else there[:1]), (
        len(there) if len(there) == len(SEEDS) else 1
    )


def _seeds(inputs: Inputs, run: str) -> list[tuple[Mapping[str, Any], str]]:
    runs = inputs.metrics.get(STUDIES, {}).get("runs", {})
    return [(runs, run if seed == SEEDS[0] else f"{run}-seed-{seed}") for seed in SEEDS]


def _look(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def study_table(number: int, inputs: Inputs) -> Table | None:
    """A published table with our scaled-down rows below its rows; None without any run."""
    scale = SCALES.get(inputs.metrics.get(STUDIES, {}).get("scale", ""))
    if scale is None:
        return None
    table = next(table for table in paper_tables() if table.number == number)
    wanted = study(number, scale)
    if not any(measured(inputs, answer)[0] is not None for answer in wanted.answers.values()):
        return None
    rows = []
    for place, row in enumerate(table.rows):
        if any(cell[0] == place for cell in wanted.answers):
            rows.append(
                TableRow(row_name(row.name), published_cells(row.values), "published", starts=True)
            )
            rows.append(_ours(place, table, wanted, inputs))
    return Table(
        title="Scaled down, row by row",
        headings=("", *(_heading(table, column) for column in table.columns)),
        rows=tuple(rows),
        remark=REMARK,
    )


def row_name(name: str) -> str:
    """A published row's name in words: `youcook2_r10` -> `YouCook2 R@10`."""
    if "_" in name or name in DATASETS:
        return heading(name)
    return number(name.replace(" top1", " top-1").replace("gflops", "GFLOPs"))


def _heading(table: PaperTable, column: str) -> str:
    name = table.headings[table.columns.index(column)]
    return f"{name}: {STAND_INS[column][0]}" if column in STAND_INS else name


def _ours(place: int, table: PaperTable, wanted: Study, inputs: Inputs) -> TableRow:
    cells, seeds = [], set()
    for column in table.columns:
        answer = wanted.answers.get((place, column))
        if answer is None:
            cells.append(Cell("–", "none"))
            continue
        value, counted = measured(inputs, answer)
        cells.append(_cell(value, answer))
        if value is not None:
            seeds.add(counted)
    row = table.rows[place].name
    stand_in = f"{STAND_INS[row][0]}, " if row in STAND_INS else ""
    note = f"mean of {len(SEEDS)} seeds" if len(SEEDS) in seeds else "one seed"
    if len(seeds) > 1:
        note += ", one seed where the others have not been run"
    if all(cell.kind in ("none", "not_run") for cell in cells):
        return TableRow("scaled down", tuple(cells), "not_run", "vattctl table runs it")
    return TableRow("scaled down", tuple(cells), "ours", stand_in + note)


def _cell(value: Any, answer: Answer) -> Cell:
    if value is None:
        return Cell(NOT_RUN, "not_run")
    if isinstance(value, int | float):
        return Cell(f"{value:.3f}", "computed")
    if answer.path[-1] == "median_rank":
        return rank_cell(value)
    return metric_cell({**value, "low": max(value["low"], 0), "high": min(value["high"], 1)})


# --- specific against agnostic, and DropToken -----------------------------------------------------


def backbone_table(inputs: Inputs) -> Table | None:
    """Specific against agnostic: each measure, and the difference paired by seed."""
    rows = []
    for column in COMPARED:
        words, path = STAND_INS[column]
        pairs = [
            (_look(runs.get(one), path), _look(runs.get(other), path))
            for (runs, one), (_, other) in zip(
                _seeds(inputs, BASE), _seeds(inputs, AGNOSTIC), strict=True
            )
        ]
        both = [(one, other) for one, other in pairs if one is not None and other is not None]
        both = both if len(both) == len(SEEDS) else both[:1]
        if not both:
            continue
        ours, others = (over_seeds([pair[side] for pair in both]) for side in (0, 1))
        cells = [metric_cell(ours), metric_cell(others)]
        if len(both) > 1:
            each = [{"value": one["value"] - other["value"]} for one, other in both]
            cells.append(difference_cell(over_seeds(each)))
        else:
            cells.append(Cell("–", "none", "needs three seeds"))
        note = f"mean of {len(both)} seeds" if len(both) > 1 else "one seed"
        rows.append(TableRow(words, tuple(cells), "ours", note))
    if not rows:
        return None
    return Table(
        title="Modality-specific against modality-agnostic",
        headings=("", "specific", "agnostic", "difference"),
        rows=tuple(rows),
        remark="The same steps on the same clips: three towers against one shared encoder of the "
        "same size. The difference is specific minus agnostic, paired by seed.",
    )


def drop_token_rows(inputs: Inputs) -> list[dict[str, float]]:
    """DropToken's measures by rate, for `dvc plots`; empty before `vattctl table 5`."""
    columns = {
        "text_to_video": STAND_INS["youcook2_r10"][1],
        "video_to_text": STAND_INS["msrvtt_r10"][1],
        "accuracy": STAND_INS["k400_top1"][1],
        "gflops": STAND_INS["multimodal_gflops"][1],
    }
    rows = []
    for rate in DROP_RATES.values():
        run = dropping(rate)
        found = {name: measured(inputs, Answer(run, path))[0] for name, path in columns.items()}
        values = {
            name: one["value"] if isinstance(one, dict) else one for name, one in found.items()
        }
        if None not in values.values():
            rows.append({"drop_rate": rate, **values})
    return rows


def drop_token_pictures(inputs: Inputs) -> list[Picture]:
    """DropToken's accuracy against the operations of a clip, and against time."""
    names = {rate: dropping(rate) for rate in DROP_RATES.values()}
    runs = inputs.metrics.get(STUDIES, {}).get("runs", {})
    if not all(name in runs for name in names.values()):
        return []
    measures = {STAND_INS[column][0]: STAND_INS[column][1] for column in COMPARED[:4]}
    curves = {
        words: [measured(inputs, Answer(name, path))[0] for name in names.values()]
        for words, path in measures.items()
    }
    shown = {words: [100 * one["value"] for one in found] for words, found in curves.items()
             if None not in found}  # fmt: skip
    places = {
        "GFLOPs of a clip": [runs[name]["gflops"]["pretrain"] for name in names.values()],
        "seconds of its steps": [runs[name]["training_seconds"] for name in names.values()],
    }
    return [
        lines(
            f"DropToken while pre-training: accuracy against {axis.partition(' of')[0]}",
            [(words, xs, ys) for words, ys in shown.items()],
            x_label=axis,
            y_label="%",
            caption="The numbers above the points are the share of dropped tokens. Time is "
            "that of the median speed.",
            points=[f"{100 * rate:.0f} %" for rate in names],
        )
        for axis, xs in places.items()
        if shown and None not in xs
    ]


# --- beyond the paper -----------------------------------------------------------------------------


def beyond_table(study: Beyond, inputs: Inputs) -> Table | None:
    """A study: each arm, and below it what it adds to its control; None without any run."""
    controls = {arm.words: arm for arm in study.arms}
    rows: list[TableRow] = []
    for arm in study.arms:
        found = _results(inputs, arm)
        if not found:
            continue
        note = f"mean of {len(found)} seeds" if len(found) > 1 else "one seed"
        cells = tuple(_mean_cell(found, measure) for measure in study.measures)
        rows.append(TableRow(arm.words, cells, "ours", note, starts=True))
        if arm.control is not None:
            others = _results(inputs, controls[arm.control])
            differences = tuple(_difference(found, others, measure) for measure in study.measures)
            rows.append(TableRow(f"minus {arm.control}", differences, "text", "paired by seed"))
    if not rows:
        return None
    return Table(
        title=study.title,
        headings=("", *(measure.words for measure in study.measures)),
        rows=tuple(rows),
        remark=f"{study.question} Each run has the tiny model and the steps of the scaled-down "
        f"tables. Intervals: Student's t over {len(SEEDS)} seeds, 95 %. A difference is grey where "
        "its interval holds 0; of costs, the ratio is given.",
    )


def beyond_sections(inputs: Inputs) -> list[tuple[Table, list[Picture]]]:
    """Every study of which something has been run, with the figures whose arms have all run."""
    found = []
    for one in beyond().values():
        table = beyond_table(one, inputs)
        if table is not None:
            drawn = [beyond_picture(figure, one, inputs) for figure in one.figures]
            found.append((table, [picture for picture in drawn if picture is not None]))
    return found


def beyond_picture(figure: Figure, study: Beyond, inputs: Inputs) -> Picture | None:
    """A figure of a study: the means over the seeds; None while an arm has not been run."""
    arms = {arm.words: arm for arm in study.arms}
    series: list[tuple[str, list[float], list[float]]] = []
    for curve in figure.curves:
        found = [_results(inputs, arms[name]) for name in curve.arms]
        ys = [_mean(results, curve.measure) for results in found]
        xs = (
            [_mean(results, figure.x) for results in found]
            if isinstance(figure.x, Measure)
            else list(figure.x)
        )
        if any(map(math.isnan, (*xs, *ys))):
            return None
        series.append((curve.words, xs, [100 * y for y in ys]))
    seeds = min(len(_results(inputs, arms[name])) for c in figure.curves for name in c.arms)
    measures = {curve.measure.words for curve in figure.curves}
    return lines(
        figure.title,
        series,
        x_label=figure.x_label,
        y_label=f"{measures.pop()}, %" if len(measures) == 1 else "%",
        caption=f"Mean of {seeds} seeds." if seeds > 1 else "One seed.",
        points=figure.points,
    )


def _mean(results: Sequence[Mapping[str, Any]], measure: Measure) -> float:
    """The mean over the seeds; NaN where a run is missing or lacks the measure."""
    values = [_look(result, measure.path) for result in results]
    numbers = [value["value"] if isinstance(value, dict) else value for value in values]
    return math.nan if not numbers or None in numbers else statistics.fmean(numbers)


def _results(inputs: Inputs, arm: Arm) -> list[Mapping[str, Any]]:
    """What the runs of an arm have measured, seed by seed; only the first until all are there."""
    found = [runs.get(name) for runs, name in _seeds(inputs, arm.run.name)]
    return [one for one in (found if None not in found else found[:1]) if one is not None]


def _mean_cell(results: Sequence[Mapping[str, Any]], measure: Measure) -> Cell:
    values = [_look(result, measure.path) for result in results]
    if None in values:
        return Cell("–", "none")  # a model without it
    if measure.kind == "number":
        return Cell(f"{statistics.fmean(values):.3g}", "computed")
    mean = over_seeds(values)
    return metric_cell({**mean, "low": max(mean["low"], 0), "high": min(mean["high"], 1)})


def _difference(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], measure: Measure
) -> Cell:
    """Ours minus theirs, pair by pair; of costs the ratio."""
    pairs = [
        (_look(one, measure.path), _look(other, measure.path))
        for one, other in zip(ours, theirs, strict=False)
    ]
    if any(None in pair for pair in pairs):
        return Cell("–", "none")
    if measure.kind == "number" and pairs:
        ratio = statistics.fmean(one / other for one, other in pairs)
        return Cell(f"× {ratio:.2f}", "computed")
    if len(pairs) < len(SEEDS):
        return Cell("–", "none", f"needs {len(SEEDS)} seeds")
    return difference_cell(
        over_seeds([{"value": one["value"] - other["value"]} for one, other in pairs])
    )
