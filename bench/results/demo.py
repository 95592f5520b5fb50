"""docs/results.md on the demo corpus, and the README's table: from what demos and tables left.

    for seed in 0 1 2: a project of its own, `vattctl demo --set seed=N`; in one of them
    `make tables tables-seeds`; then
    python bench/results/demo.py PROJECT0 PROJECT1 PROJECT2 --tables PROJECT0 --write

Without --write it prints. Between the marks of the two files nothing is written by hand; the tables
stay as they are without --tables.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vatt.config import load_params
from vatt.paper import paper_tables
from vatt.report.inputs import Inputs
from vatt.report.studies import backbone_table, study_table
from vatt.report.tables import Table

ROOT = Path(__file__).parents[2]
DEMO, TABLES = "demo", "tables"  # marks in the files: <!-- demo: begin --> ... <!-- demo: end -->
TASKS = {
    "action": "action task: who does what (digit and motion, 80 classes)",
    "audio": "audio task: motion from its rhythm",
    "image": "image task: digit from one frame",
}
Results = dict[str, Any]
Place = Callable[[str], tuple[str, ...]]  # pretrained, untrained or scratch -> path


def percent(values: Sequence[float | None]) -> str:
    """One number for each seed."""
    return " / ".join("–" if value is None else f"{100 * value:.1f}" for value in values)


def look(results: Results, *path: str) -> Any:
    value: Any = results
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def row(
    name: str,
    seeds: Sequence[Results],
    path: Place,
    sides: tuple[str, str],
) -> str:
    """A line of the table in the README: a measure on both sides, and its chance level."""
    ours, theirs = ([look(results, *path(side), "value") for results in seeds] for side in sides)
    chance = look(seeds[0], *path(sides[0]), "chance")
    return f"| {name} | {percent(ours)} | {percent(theirs)} | {100 * chance:.1f} |"


def readme(seeds: Sequence[Results], labels: dict[str, int | None]) -> list[str]:
    """Pre-trained against untrained or from scratch, a number for each seed."""

    def found(direction: str, measure: str) -> Place:
        return lambda side: ("retrieval", side, direction, measure)

    def probe(name: str) -> Place:
        return lambda side: ("probes", name, "svm", side)

    def task(name: str) -> Place:
        return lambda side: ("classification", name, side, "top_1")

    encoders, starts = ("pretrained", "untrained"), ("pretrained", "scratch")
    pool = look(seeds[0], "retrieval", "pretrained", "text_to_video", "recall_at_10", "n")
    lines = ["| | pre-trained | untrained or from scratch | chance |", "|---|---|---|---|"]
    for name, path in (
        (f"text to video, R@10, pool of {pool}", found("text_to_video", "recall_at_10")),
        (
            "text to video, digit and motion both right at rank 1",
            found("text_to_video", "class_at_1"),
        ),
        ("video to audio, R@10", found("video_to_audio", "recall_at_10")),
        ("digit, linear probe (SVM) on frozen video features", probe("digit")),
        ("rhythm, linear probe (SVM) on frozen audio features", probe("rhythm")),
    ):
        lines.append(row(name, seeds, path, encoders))
    for name, words in TASKS.items():
        lines.append(row(f"{words}, {labels[name]} labels", seeds, task(name), starts))
    return lines


def differences(seeds: Sequence[Results], numbers: Sequence[int]) -> list[str]:
    """Fine-tuning from pre-trained weights minus from scratch, with intervals, for each seed."""
    head = " | ".join(f"seed {number}" for number in numbers)
    lines = [f"| | {head} |", "|---" * (len(seeds) + 1) + "|"]
    for name, words in TASKS.items():
        cells = []
        for results in seeds:
            one = look(results, "classification", name, "difference")
            low, high = 100 * one["low"], 100 * one["high"]
            cells.append(f"{100 * one['value']:+.1f} ({low:+.1f} to {high:+.1f})")
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def markdown(table: Table) -> list[str]:
    """A table of the report."""
    lines = ["| " + " | ".join(table.headings) + " |", "|---" * len(table.headings) + "|"]
    for line in table.rows:
        cells = [
            f"{cell.text} ({cell.detail})" if cell.detail else cell.text for cell in line.cells
        ]
        head = f"{line.head} ({line.note})" if line.note else line.head
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return lines


def tables(project: Path) -> list[str]:
    """The paper's tables, scaled down; those that have been run."""
    file = project / "reports/metrics/studies.json"
    inputs = Inputs(metrics={"studies": json.loads(file.read_text(encoding="utf-8"))})
    lines: list[str] = []
    remark = ""
    for published in paper_tables():
        found = study_table(published.number, inputs)
        if found is not None:
            title = f"### Table {published.number}, scaled down: {published.caption}"
            lines += [title, "", *markdown(found), ""]
            remark = found.remark
    compared = backbone_table(inputs)
    if compared is not None:
        lines += [f"### {compared.title}", "", *markdown(compared), "", compared.remark, ""]
    return [remark, "", *lines]


def replaced(file: Path, mark: str, lines: Sequence[str]) -> str:
    """The file with these lines between the marks of a part."""
    first, last = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, begin, rest = file.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    assert begin and end, f"{file} has no marks of {mark}"
    return f"{before}{first}\n" + "\n".join(lines) + f"\n{last}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("projects", nargs="+", type=Path)
    parser.add_argument("--tables", type=Path, help="the project whose tables were run")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    seeds = [
        json.loads((project / "reports/metrics/evaluate.json").read_text(encoding="utf-8"))
        for project in chosen.projects
    ]
    params = [load_params(project / "params.yaml") for project in chosen.projects]
    labels = {name: task.train_labels for name, task in params[0].finetune.tasks.items()}
    numbers = [one.seed for one in params]
    short = readme(seeds, labels)
    whole = [
        f"Per cent; seed {' / '.join(map(str, numbers))}:",
        "",
        *short,
        "",
        "What pre-training adds to fine-tuning, in points, with the 95 % interval of the paired",
        "difference over the test clips:",
        "",
        *differences(seeds, numbers),
    ]
    results = ROOT / "docs/results.md"
    parts = [(ROOT / "README.md", DEMO, short), (results, DEMO, whole)]
    if chosen.tables:
        parts.append((results, TABLES, tables(chosen.tables)))
    for file, mark, lines in parts:
        if chosen.write:
            file.write_text(replaced(file, mark, lines), encoding="utf-8")
        else:
            print("\n".join([f"== {file.name}", *lines]))


if __name__ == "__main__":
    main()
