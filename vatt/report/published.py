"""The paper's tables, each with our line: measured, computed by formula, or not run.

A published column gets our number only if a task or probe with the name of that data set was run.
Results of the same protocol on another corpus are in a separate table, scaled down.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vatt.config import AudioParams, ModelParams, SizeParams, TextParams, VideoParams
from vatt.flops import multimodal_flops, video_flops
from vatt.paper import PaperTable, paper_tables
from vatt.report.inputs import Inputs
from vatt.report.results import PROBES, directions, searched_kind
from vatt.report.studies import row_name, study_table
from vatt.report.tables import (
    NOT_RUN,
    Cell,
    Table,
    TableRow,
    chance_cell,
    main_measure,
    metric_cell,
    plain_cell,
    published_cells,
    rank_cell,
)

# Where evaluate.json has the number of a published column, by the name of a task or probe.
MEASURED = {
    "k400_top1": ("classification", "kinetics400", "pretrained", "top_1"),
    "k400_top5": ("classification", "kinetics400", "pretrained", "top_5"),
    "k600_top1": ("classification", "kinetics600", "pretrained", "top_1"),
    "k600_top5": ("classification", "kinetics600", "pretrained", "top_5"),
    "mit_top1": ("classification", "moments", "pretrained", "top_1"),
    "mit_top5": ("classification", "moments", "pretrained", "top_5"),
    "mean_ap": ("classification", "audioset", "pretrained", "mean_ap"),
    "auc": ("classification", "audioset", "pretrained", "auc"),
    "d_prime": ("classification", "audioset", "pretrained", "d_prime"),
    "top1": ("classification", "imagenet", "pretrained", "top_1"),
    "top5": ("classification", "imagenet", "pretrained", "top_5"),
    "ucf101": ("probes", "ucf101", "svm", "pretrained"),
    "hmdb51": ("probes", "hmdb51", "svm", "pretrained"),
    "esc50": ("probes", "esc50", "svm", "pretrained"),
}
WHY = {
    1: "needs Kinetics-400, Kinetics-600 and Moments in Time",
    2: "needs AudioSet's evaluation clips",
    3: "needs ImageNet",
    4: "needs YouCook2 and MSR-VTT",
    5: "needs four pre-trainings and HMDB51, UCF101, ESC-50, YouCook2, MSR-VTT",
    6: "needs Kinetics-400",
    7: "",
    8: "needs UCF101, HMDB51 and ESC-50",
    9: "needs six pre-trainings and five downstream data sets",
    10: "needs five pre-trainings and five downstream data sets",
}
SIZES_TABLE = 7
VIEWS = 12  # 4 clips x 3 crops
DROP_RATES = (0.75, 0.5, 0.25, 0.0)  # columns of tables 5 and 6
PATCH = (4, 16, 16)
HEAD_DIM = 64
PATCH_VALUES = 4 * 16 * 16 * 3
GRID = (8, 14, 14)  # of a 32x224x224 clip


@dataclass(frozen=True, slots=True)
class PaperSection:
    """A published table with our line, and its scaled-down form on this run's own corpus."""

    number: int
    published: Table
    scaled_down: Table | None
    has_ours: bool  # measured on the data set of the paper


def published_sections(inputs: Inputs) -> tuple[PaperSection, ...]:
    """One section for each table of the paper, in its order."""
    return tuple(_section(table, inputs) for table in paper_tables())


def _section(table: PaperTable, inputs: Inputs) -> PaperSection:
    rows = [
        TableRow(row_name(row.name), published_cells(row.values), "published") for row in table.rows
    ]
    ours = _measured_row(table, inputs)
    computed = FORMULAS[table.number](table) if table.number in FORMULAS else []
    # Table 7 lists sizes: it has nothing to measure.
    lines = [*rows, *computed] if table.number == SIZES_TABLE else [*rows, *computed, ours]
    published = Table(
        title=f"Table {table.number}. {table.caption}",
        headings=("", *table.headings),
        rows=tuple(lines),
        remark=table.note,
    )
    scaled_down = study_table(table.number, inputs)
    if scaled_down is None and table.number in SCALED_DOWN:
        scaled_down = SCALED_DOWN[table.number](inputs)
    return PaperSection(table.number, published, scaled_down, has_ours=ours.kind == "ours")


def _measured_row(table: PaperTable, inputs: Inputs) -> TableRow:
    metrics = [
        inputs.lookup(*MEASURED[column]) if column in MEASURED else None for column in table.columns
    ]
    why = WHY[table.number]
    if any(metric is not None for metric in metrics):
        cells = [
            (plain_cell if column == "d_prime" else metric_cell)(metric)
            for column, metric in zip(table.columns, metrics, strict=True)
        ]
        return TableRow("this run", tuple(cells), "ours")
    return TableRow("this run", tuple(Cell(NOT_RUN, "not_run") for _ in metrics), "not_run", why)


# --- by formula -----------------------------------------------------------------------------------


def _video(size: Any, frames: int = 32, frame_size: int = 224) -> VideoParams:
    return VideoParams(size=size, frames=frames, frame_size=frame_size, patch=PATCH)


def _formula_row(name: str, values: list[float | None], *, digits: int = 2) -> TableRow:
    cells = tuple(
        Cell("–", "none") if value is None else Cell(f"{value:.{digits}f}", "computed")
        for value in values
    )
    return TableRow(name, cells, "computed", "by our formula, not measured")


def _table_1(_: PaperTable) -> list[TableRow]:
    return [
        _formula_row(
            f"VATT-{size.capitalize()}, TFLOPs",
            [None] * 6
            + [VIEWS * video_flops(_video(size, frame_size=320), convention="paper") / 1e12],
        )
        for size in ("base", "medium", "large")
    ]


def _table_5(_: PaperTable) -> list[TableRow]:
    model = ModelParams(
        recipe="paper",
        backbone="specific",
        video=_video("medium"),
        audio=AudioParams(size="base", input="waveform", samples=153_600, patch=128, mel_bins=None),
        text=TextParams(size="small", words=16, vocabulary=65_536),
        va_dim=512,
        vt_dim=256,
        dropout=0.1,
    )
    flops: list[float | None] = [
        multimodal_flops(model, drop_rate=rate, training=True, convention="paper") / 1e9
        for rate in DROP_RATES
    ]
    return [_formula_row("multimodal GFLOPs", flops)]


def _table_6(_: PaperTable) -> list[TableRow]:
    rows = []
    for frames, size in ((32, 224), (64, 224), (32, 320)):
        flops: list[float | None] = [
            video_flops(
                _video("medium", frames, size),
                drop_rate=rate,
                training=rate > 0,
                convention="paper",
            )
            / 1e9
            for rate in DROP_RATES
        ]
        rows.append(_formula_row(f"{frames}×{size}×{size} GFLOPs", flops))
    return rows


def _table_7(table: PaperTable) -> list[TableRow]:
    rows = []
    for published in table.rows:
        depth, dim, mlp_dim, heads = (int(str(value)) for value in published.values[:4])
        size = SizeParams(depth=depth, dim=dim, mlp_dim=mlp_dim, heads=heads, head_dim=HEAD_DIM)
        parameters = Cell(f"{video_classifier_parameters(size) / 1e6:.1f}", "computed")
        cells = (*(Cell(str(value), "computed") for value in published.values[:4]), parameters)
        rows.append(
            TableRow(
                published.name, cells, "computed", "video tower with a head of 600 classes, counted"
            )
        )
    return rows


def video_classifier_parameters(size: SizeParams, *, classes: int = 600) -> int:
    """Weights of a video tower for 32x224x224 and its linear head, as the paper counts them."""
    inner = size.heads * size.head_dim
    patches = PATCH_VALUES * size.dim + size.dim
    positions = sum(GRID) * size.dim + 2 * size.dim
    attention = 4 * size.dim * inner + 3 * inner + size.dim
    mlp = 2 * size.dim * size.mlp_dim + size.mlp_dim + size.dim
    layers = size.depth * (attention + mlp + 4 * size.dim)
    agg_token_and_last_norm = 3 * size.dim
    head = size.dim * classes + classes
    return patches + positions + layers + agg_token_and_last_norm + head


FORMULAS: dict[int, Callable[[PaperTable], list[TableRow]]] = {
    1: _table_1,
    5: _table_5,
    6: _table_6,
    7: _table_7,
}


# --- scaled down, on this run's own corpus --------------------------------------------------------


def _fine_tuned(modality: str) -> Callable[[Inputs], Table | None]:
    def table(inputs: Inputs) -> Table | None:
        rows = [
            TableRow(
                name,
                (
                    metric_cell(main_measure(runs.get("pretrained"))),
                    metric_cell(main_measure(runs.get("scratch")), "baseline"),
                    chance_cell(main_measure(runs.get("pretrained") or runs.get("scratch"))),
                ),
                "ours",
            )
            for name, runs in (inputs.lookup("classification") or {}).items()
            if runs.get("modality") == modality
        ]
        headings = ("Task", "pre-trained, top-1 or mAP", "from scratch", "chance")
        return _scaled_down(headings, rows)

    return table


def _retrieval(inputs: Inputs) -> Table | None:
    found = inputs.lookup("retrieval", "pretrained") or {}
    rows = [
        TableRow(
            name,
            (
                metric_cell(found[direction]["recall_at_10"], searched_kind(found[direction])),
                rank_cell(found[direction]["median_rank"], searched_kind(found[direction])),
                chance_cell(found[direction]["recall_at_10"]),
                Cell(str(found[direction]["recall_at_10"]["n"]), "text"),
            ),
            "ours",
        )
        for direction, name in directions(inputs).items()
        if direction in found
    ]
    return _scaled_down(("Direction", "R@10", "median rank", "chance R@10", "clips searched"), rows)


def _probes(inputs: Inputs) -> Table | None:
    rows = [
        TableRow(
            f"{name}, {PROBES.get(kind, kind)}",
            (
                metric_cell(run.get("pretrained")),
                metric_cell(run.get("untrained"), "baseline"),
                chance_cell(run.get("pretrained")),
            ),
            "ours",
        )
        for name, kinds in (inputs.lookup("probes") or {}).items()
        for kind, run in kinds.items()
    ]
    return _scaled_down(("Probe", "pre-trained", "untrained", "chance"), rows)


def _scaled_down(headings: tuple[str, ...], rows: list[TableRow]) -> Table | None:
    if not rows:
        return None
    return Table(
        title="The same protocol, scaled down: this run on its own corpus",
        headings=headings,
        rows=tuple(rows),
        remark="The corpus, the classes and the size of the model differ: "
        "not to be compared with the published numbers.",
    )


SCALED_DOWN: dict[int, Callable[[Inputs], Table | None]] = {
    1: _fine_tuned("video"),
    2: _fine_tuned("audio"),
    3: _fine_tuned("image"),
    4: _retrieval,
    8: _probes,
}
