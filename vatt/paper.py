"""The published numbers: the paper's tables 1 to 10, as written in `paper_tables.yaml`."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TABLES_FILE = Path(__file__).with_name("paper_tables.yaml")

Value = float | int | str | None

DATASETS = {
    "k400": "Kinetics-400",
    "k600": "Kinetics-600",
    "mit": "Moments in Time",
    "ucf101": "UCF101",
    "hmdb51": "HMDB51",
    "esc50": "ESC-50",
    "youcook2": "YouCook2",
    "msrvtt": "MSR-VTT",
}
MEASURES = {
    "top1": "top-1",
    "top5": "top-5",
    "r10": "R@10",
    "median_rank": "median rank",
    "tflops": "TFLOPs",
    "gflops": "GFLOPs",
    "mean_ap": "mAP",
    "auc": "AUC",
    "d_prime": "d′",
    "pretraining_data": "pre-trained on",
    "batch": "batch",
    "epochs": "epochs",
    "drop_75": "75 % dropped",
    "drop_50": "50 % dropped",
    "drop_25": "25 % dropped",
    "drop_0": "none dropped",
    "layers": "layers",
    "hidden_size": "width",
    "mlp_size": "MLP",
    "heads": "heads",
    "params_millions": "parameters (M)",
    "frames": "frames",
    "patch": "patch",
    "input": "input",
}


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One line of a published table."""

    name: str
    values: tuple[Value, ...]  # None: not reported


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A published table; `columns` are keys, `headings` what a reader sees."""

    number: int
    key: str
    caption: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]

    @property
    def headings(self) -> tuple[str, ...]:
        """The columns in words: `k400_top1` -> `Kinetics-400 top-1`."""
        return tuple(heading(column) for column in self.columns)


def heading(column: str) -> str:
    """A column's key in words."""
    if column in MEASURES:
        return MEASURES[column]
    dataset, _, measure = column.partition("_")
    name = DATASETS.get(dataset, dataset)
    return f"{name} {MEASURES.get(measure, measure)}".strip()


@cache
def paper_tables(file: Path = TABLES_FILE) -> tuple[PaperTable, ...]:
    """The published tables in the paper's order."""
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    return tuple(_table(key, content) for key, content in raw.items() if key.startswith("table"))


def _table(key: str, content: dict[str, Any]) -> PaperTable:
    number = int(key.split("_")[0].removeprefix("table"))
    columns = tuple(content["columns"])
    rows = content["rows"]
    if isinstance(rows, list):  # ablations: a row is named by its settings, which are its columns
        parsed = tuple(PaperRow(name="VATT", values=tuple(row)) for row in rows)
    else:
        parsed = tuple(PaperRow(name=name, values=tuple(row)) for name, row in rows.items())
    parsed += tuple(_also(name, values, columns) for name, values in _extra_rows(number, content))
    return PaperTable(
        number=number,
        key=key,
        caption=content["caption"],
        note=content.get("note", ""),
        columns=columns,
        rows=parsed,
    )


def _extra_rows(number: int, content: dict[str, Any]) -> list[tuple[str, dict[str, Value]]]:
    """Numbers from the text of the paper, as extra rows of a table."""
    also = content.get("also", {})
    if number == 1:
        scratch = also["vatt_from_scratch_k400"]
        return [
            (
                "VATT from scratch (text)",
                {"k400_top1": scratch["top1"], "k400_top5": scratch["top5"]},
            )
        ]
    if number == 4:
        name = "VATT-MBS batch 8192, 6 epochs"
        return [("VATT-MBS (text)", {"batch": 8192, "epochs": 6, **also[name]})]
    return []


def _also(name: str, values: dict[str, Value], columns: tuple[str, ...]) -> PaperRow:
    return PaperRow(name=name, values=tuple(values.get(column) for column in columns))
