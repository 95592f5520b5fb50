"""Does pre-training on the generated corpus of the demo help on real sound? Prints a table.

    python bench/real_audio.py --fsdd DIR --esc10 DIR --from DIR... --seeds 0 1 2
    python bench/real_audio.py --fsdd DIR --from runs/checkpoints/pretrained --seeds 0

It runs in a project's folder and measures on the data sets whose folder is given, or on those of
--of. DIR of --fsdd contains recordings/<digit>_<speaker>_<take>.wav (Free Spoken Digit Dataset);
DIR of --esc10 contains audio/ and meta/esc50.csv in the layout of ESC-50. Each --from is a
checkpoint; the seeds use them in turn. All training uses the way for one's own data: a csv, then
`vattctl finetune csv`. Experiments have the name of the data set and the seed, after --prefix.

The baseline is a log-mel spectrogram of the same 0.8 s window with logistic regression, whose
regularisation is chosen on the train clips.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vatt.config import load_params
from vatt.data.clips.manifest import Clip, path_in_folder
from vatt.data.loading.batches import balanced
from vatt.data.sources.urls import read_urls
from vatt.metrics import Metric, measured
from vatt.senses.audio import STEP_SECONDS, log_mel

HZ, WINDOW, BINS = 8000, 6400, 40
FOLDS = 4  # of the choice of a strength; no class has fewer train clips
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TEST_TAKES = 5  # of a speaker and digit: the official test
FEW = 100  # labels, ten for each digit
PARTS = 3  # of ESC-10's fold 4: a class has recordings of three sources at least
RESAMPLES = 1000
MACHINE = {"machine.threads": 1, "machine.workers": 0}  # such a small model is not faster with more
SETS = {"fsdd": (600, None), "fsdd-few": (200, FEW), "esc10": (0, None)}  # steps, labels
TITLES = {
    "fsdd": "FSDD, 2,700 labels",
    "fsdd-few": f"FSDD, {FEW} labels",
    "esc10": "ESC-10, fold 4 in thirds",
}
Row = tuple[str, str, list[Metric]]


def main() -> None:
    """List, train, measure, print."""
    given = parsed()
    work = given.work.absolute()
    starts = [given.starts[n % len(given.starts)].absolute() for n in range(len(given.seeds))]
    runs = list(zip(starts, given.seeds, strict=True))
    rows: list[Row] = []
    for name in given.of:
        prefix = f"{given.prefix}{name}"
        if name == "esc10":
            parts = sounds(given.esc10, work / "esc10")
            found = [probed(parts, prefix, *one) for one in runs]
            base = pooled([baseline(part, None) for part in parts])
        else:
            digits = spoken_digits(given.fsdd, work / "fsdd")
            task = task_of(name, given.learning_rate)
            found = [tuned(digits, prefix, *one, settings=task) for one in runs]
            base = baseline(digits, SETS[name][1])
        rows += table(TITLES[name], found, base)
    show(rows, given.seeds)


def parsed() -> argparse.Namespace:
    """The options; a data set without a folder is an error that names the option."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--fsdd", type=Path)
    options.add_argument("--esc10", type=Path)
    options.add_argument("--from", dest="starts", type=Path, nargs="+", required=True)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--work", type=Path, default=Path("data/real-audio"))
    options.add_argument("--prefix", default="", help="of the names of the experiments")
    options.add_argument("--learning-rate", type=float, default=3e-4, help="of fine-tuning")
    options.add_argument("--of", nargs="+", choices=SETS, help="default: all with a folder")
    given = options.parse_args()
    has = {name: getattr(given, name.partition("-")[0]) is not None for name in SETS}
    given.of = given.of or [name for name in SETS if has[name]]
    lacking = [name.partition("-")[0] for name in given.of if not has[name]]
    if lacking or not given.of:
        options.error(f"--{lacking[0] if lacking else 'fsdd'} DIR is needed")
    return given


# --- lists ----------------------------------------------------------------------------------------


def write_list(folder: Path, rows: list[dict[str, str]], *, name: str) -> Path:
    """A csv next to the files, in the format of `vattctl finetune csv`."""
    path = folder / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def spoken_digits(source: Path, folder: Path) -> Path:
    """The official split: takes 0 to 4 of each speaker and digit are for testing."""
    shutil.copytree(source / "recordings", folder / "recordings", dirs_exist_ok=True)
    rows = []
    for path in sorted((folder / "recordings").glob("*.wav")):
        digit, _, take = path.stem.split("_")
        split = "test" if int(take) < TEST_TAKES else "train"
        rows.append({"path": f"recordings/{path.name}", "label": digit, "split": split})
    assert Counter(row["split"] for row in rows) == {"train": 2700, "test": 300}
    return write_list(folder, rows, name="digits")


def sounds(source: Path, folder: Path) -> list[Path]:
    """The 80 clips of fold 4, each third tested once; no recording is in two of them."""
    shutil.copytree(source / "audio", folder / "audio", dirs_exist_ok=True)
    with (source / "meta" / "esc50.csv").open(newline="", encoding="utf-8") as file:
        clips = [row for row in csv.DictReader(file) if row["fold"] == "4"]
    sizes = Counter((row["category"], row["src_file"]) for row in clips)
    filled: Counter[tuple[str, int]] = Counter()
    part_of = {}
    for (category, recording), size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        part = min(range(PARTS), key=lambda number: filled[category, number])
        filled[category, part] += size
        part_of[recording] = part
    lists = []
    for part in range(PARTS):
        rows = [
            {"path": f"audio/{row['filename']}", "label": row["category"],
             "split": "test" if part_of[row["src_file"]] == part else "train"}
            for row in clips
        ]  # fmt: skip
        lists.append(write_list(folder, rows, name=f"third-{part + 1}"))
    return lists


# --- ours -----------------------------------------------------------------------------------------


def run(data: Path, name: str, start: Path, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Run an experiment by the usual command; returns its metrics."""
    command = [sys.executable, "-m", "vattctl.cli", "-q", "finetune", "csv", "--data", str(data)]
    command += ["--from", str(start), "--name", name, "--init", "pretrained", "--init", "scratch"]
    for key, value in {"seed": seed, **MACHINE, **settings}.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "NO_COLOR": "1"})
    folder = Path("experiments") / name
    metrics = load_params(folder / "params.yaml").paths.metrics / "evaluate.json"
    found: dict[str, Any] = json.loads((folder / metrics).read_text(encoding="utf-8"))
    return found


def task_of(name: str, learning_rate: float) -> dict[str, Any]:
    """The settings of fine-tuning and probes on the spoken digits."""
    steps, labels = SETS[name]
    task = {"steps": steps, "train_labels": labels, "optimizer.warmup_steps": steps // 10,
            "optimizer.learning_rate": learning_rate}  # fmt: skip
    settings: dict[str, Any] = {f"finetune.tasks.csv.{key}": value for key, value in task.items()}
    return {**settings, "evaluate.probes.csv.train_labels": labels}


def tuned(
    data: Path, name: str, start: Path, seed: int, *, settings: dict[str, Any]
) -> dict[str, Metric]:
    """Fine-tuning and probes on the spoken digits."""
    found = run(data, f"{name}-{seed}", start, seed, settings)
    answers = found["classification"]["csv"]
    return {
        "fine-tuned": answers["pretrained"]["top_1"],
        "trained from scratch": answers["scratch"]["top_1"],
        "difference of these two": answers["difference"],
        **probes_of(found),
    }


def probed(lists: list[Path], name: str, start: Path, seed: int) -> dict[str, Metric]:
    """Probes on the sounds; each third is tested once, so all 80 clips count."""
    found = [
        probes_of(run(part, f"{name}-{part.stem}-{seed}", start, seed, {"finetune.run": []}))
        for part in lists
    ]
    return {way: pooled([one[way] for one in found]) for way in found[0]}


def probes_of(found: dict[str, Any]) -> dict[str, Metric]:
    """Both classifiers on both encoders."""
    return {
        f"{text} on {encoder} features": found["probes"]["csv"][kind][encoder]
        for kind, text in (("svm", "SVM"), ("low_rank", "low-rank classifier"))
        for encoder in ("pretrained", "untrained")
    }


def pooled(metrics: list[Metric]) -> Metric:
    """Accuracies on parts that are tested once each -> the accuracy on all clips."""
    sizes = [int(one["n"] or 0) for one in metrics]
    rights = [round(float(one["value"] or 0) * n) for one, n in zip(metrics, sizes, strict=True)]
    hits = [np.arange(size) < right for right, size in zip(rights, sizes, strict=True)]
    chance = metrics[0]["chance"]
    return measured(np.concatenate(hits), chance=chance, resamples=RESAMPLES, seed=0)


# --- baseline -------------------------------------------------------------------------------------


def window(path: Path) -> np.ndarray:
    """The centre of a recording, at most WINDOW samples at HZ, float32 from -1 to 1."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=HZ)
    with av.open(str(path)) as container:
        parts = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    parts += resampler.resample(None)
    wave = np.concatenate([part.to_ndarray()[0] for part in parts])
    first = max(len(wave) - WINDOW, 0) // 2
    return np.asarray(wave[first : first + WINDOW] / np.float32(32768))


def features(list_file: Path) -> tuple[np.ndarray, list[Clip]]:
    """A flattened log-mel of the centre of each clip of the list."""
    clips = list(read_urls(list_file, load_params().data))
    frames = round(WINDOW / HZ / STEP_SECONDS)
    waves = (window(path_in_folder(clip.url, list_file)) for clip in clips)
    found = [log_mel(wave, hz=HZ, frames=frames, bins=BINS).ravel() for wave in waves]
    return np.stack(found), clips


def answers(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Results of a logistic regression; its regularisation is chosen on the train clips."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    strengths = {"logisticregression__C": STRENGTHS}
    search = GridSearchCV(model, strengths, cv=StratifiedKFold(FOLDS))
    return np.asarray(search.fit(x, y).predict(asked))


def baseline(list_file: Path, labels: int | None) -> Metric:
    """Results on the split of the list, with all labels or only those of fine-tuning."""
    x, clips = features(list_file)
    y = np.asarray([clip.labels["label"] for clip in clips])
    train = [place for place, clip in enumerate(clips) if clip.split == "train"]
    test = [place for place, clip in enumerate(clips) if clip.split == "test"]
    names = [clips[place].clip_id for place in train]
    train = [train[place] for place in balanced(names, y[train].tolist(), labels)]
    hits = answers(x[train], y[train], x[test]) == y[test]
    return measured(hits, chance=1 / len(set(y)), resamples=RESAMPLES, seed=0)


# --- the table ------------------------------------------------------------------------------------


def table(title: str, found: list[dict[str, Metric]], base: Metric) -> list[Row]:
    """The rows of a data set: each of our methods over the seeds, then the baseline."""
    rows: list[Row] = [(title, way, [one[way] for one in found]) for way in found[0]]
    return [*rows, (title, "log-mel + logistic regression", [base])]


def show(rows: list[Row], seeds: list[int]) -> None:
    """Markdown; per cent with the 95 % interval of each seed's bootstrap over the test clips."""
    print(f"| data | method | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |")
    print("|---|---|" + "---|" * (len(seeds) + 1))
    for data, way, values in rows:
        cells = [cell(value) for value in values]
        cells += [""] * (len(seeds) - len(cells))
        mean = np.mean([float(value["value"] or 0) for value in values])
        print(f"| {data} | {way} | {' | '.join(cells)} | {100 * mean:.1f} |")


def cell(metric: Metric) -> str:
    """A value in per cent and its interval."""
    value, low, high = (100 * float(metric[name] or 0) for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
