"""The command line: help, settings, errors by message and code. DVC runs are in test_stages.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from tests.evaluation.test_comparison import write as write_evaluation
from tests.test_architecture import ROOT
from tests.test_dvc import processes, wait_until
from vattctl.cli import cli
from vattctl.runs import _print_pipelines


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the project's settings and pipeline, and nothing made yet."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    return tmp_path


def vattctl(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vattctl.cli", "--project", str(project), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def settings(project: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = yaml.safe_load((project / "params.yaml").read_text())
    return found


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, vattctl.cli\n"
        "try: vattctl.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'deepspeed', 'pydantic', 'numpy', 'av', 'yaml', 'rich',\n"
        "         'psutil', 'vattctl.dvc'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert "pretrain" in done.stdout


def _commands(command: click.Command, *words: str) -> Iterator[tuple[str, ...]]:
    yield words
    commands = cli.load() if command is cli else getattr(command, "commands", {})
    for name, inner in commands.items():
        yield from _commands(inner, *words, name)


def test_help_of_every_command_works_outside_a_project(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for words in _commands(cli):
        cli.main(args=[*words, "--help"], prog_name="vattctl", standalone_mode=False)
        assert f"Usage: {' '.join(('vattctl', *words))} " in capsys.readouterr().out


def test_a_misspelt_command_is_answered_with_the_right_one(project: Path) -> None:
    done = vattctl(project, "pretrian")
    assert done.returncode == 2 and "Did you mean 'pretrain'?" in done.stderr


def test_set_keeps_comments_and_prints_the_change(project: Path) -> None:
    done = vattctl(project, "pretrain", "--set", "pretrain.steps=123", "--dry-run")
    assert "params.yaml would change: pretrain.steps: " in done.stdout
    assert "-> 123" in done.stdout
    assert settings(project) == settings(ROOT)  # a dry run writes nothing

    from vattctl.params import edit, parse_setting

    key, value = parse_setting("pretrain.steps=1234")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        edit({key: value}).write()
    before = (ROOT / "params.yaml").read_text().splitlines()
    after = (project / "params.yaml").read_text().splitlines()
    different = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(different) == 1
    assert different[0][1].strip() == "steps: 1234"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_params_file_that_was_cut_off_is_a_settings_error(project: Path, share: float) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text[: int(share * len(text))])
    done = vattctl(project, "pretrain", "--set", "pretrain.steps=9")
    assert done.returncode == 2 and "params.yaml" in done.stderr
    assert (project / "params.yaml").read_text() == text[: int(share * len(text))]


@pytest.mark.parametrize(
    ("size", "backbone", "sizes"),
    [
        ("large", "specific", ("large", "base", "small")),
        ("base", "specific", ("base", "base", "small")),
        ("small", "specific", ("small", "small", "small")),
        ("tiny", "specific", ("tiny", "tiny", "tiny")),
        ("medium", "agnostic", ("medium", "medium", "medium")),
    ],
)
def test_size_names_all_towers(size: str, backbone: str, sizes: tuple[str, ...]) -> None:
    from vattctl.params import size_settings

    assert tuple(size_settings(size, backbone).values()) == sizes


def test_unknown_key_names_file_key_and_remedy(project: Path) -> None:
    done = vattctl(project, "pretrain", "--set", "pretrain.stepz=5")
    assert done.returncode == 2
    assert "params.yaml has no key pretrain.stepz" in done.stderr
    assert "did you mean 'pretrain.steps'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_value_in_the_file_names_its_line(project: Path) -> None:
    file = project / "params.yaml"
    lines = file.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("dropout:"))
    lines[at] = "  dropout: much"
    file.write_text("\n".join(lines))
    done = vattctl(project, "config", "validate")
    assert done.returncode == 2
    assert f"params.yaml:{at + 1}: model.dropout" in done.stderr
    assert "'much'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_to_validate_is_looked_for_in_the_current_folder(project: Path) -> None:
    (project / "params.yaml").write_text("model: 7")
    done = vattctl(project, "config", "validate", "params.yaml")  # runs in the root of the clone
    assert done.returncode == 0, done.stderr
    assert vattctl(project, "config", "validate").returncode == 2


def test_a_value_that_breaks_a_rule_is_not_written(project: Path) -> None:
    before = (project / "params.yaml").read_text()
    done = vattctl(project, "pretrain", "--set", "pretrain.batch_size=0")
    assert done.returncode == 2
    assert "pretrain.batch_size" in done.stderr
    assert (project / "params.yaml").read_text() == before


def test_preset_keeps_edited_settings_aside(project: Path) -> None:
    (project / "params.yaml").write_text((project / "params.yaml").read_text() + "# mine\n")
    done = vattctl(project, "config", "use", "paper")
    assert done.returncode == 0
    assert (project / "params.yaml").read_bytes() == (ROOT / "presets" / "paper.yaml").read_bytes()
    assert (project / "params.yaml.bak").read_text().endswith("# mine\n")


def test_unknown_preset_suggests_one(project: Path) -> None:
    done = vattctl(project, "config", "use", "papr")
    assert done.returncode == 2
    assert "did you mean 'paper'?" in done.stderr


def test_config_show_prints_json(project: Path) -> None:
    done = vattctl(project, "config", "show", "model.video.patch", "--json")
    assert json.loads(done.stdout)["value"] == [4, 16, 16]


def test_outside_a_project_says_so(tmp_path: Path) -> None:
    done = vattctl(tmp_path, "status")
    assert done.returncode == 2
    assert "--project" in done.stderr


def test_paper_preset_is_the_paper(project: Path) -> None:
    """The numbers of arXiv 2104.11178, section 4 and appendix A."""
    from vatt.config import load_params

    params = load_params(ROOT / "presets" / "paper.yaml")
    pretrain, video, audio = params.pretrain, params.model.video, params.model.audio
    assert (pretrain.batch_size, pretrain.steps, pretrain.drop_rate) == (2048, 500_000, 0.5)
    assert (pretrain.optimizer.learning_rate, pretrain.optimizer.final_learning_rate) == (
        1e-4,
        5e-5,
    )
    assert (pretrain.optimizer.warmup_steps, pretrain.optimizer.schedule) == (
        10_000,
        "quarter_cosine",
    )
    assert (pretrain.temperature, pretrain.mil_nce_weight, pretrain.text_candidates) == (0.07, 1, 5)
    assert (video.frames, video.frame_size, video.patch) == (32, 224, (4, 16, 16))
    assert (audio.samples, audio.patch, params.preprocess.audio_hz) == (153_600, 128, 48_000)
    assert (params.model.text.words, params.model.text.vocabulary) == (16, 2**16)
    kinetics = params.finetune.tasks["kinetics400"]
    assert (kinetics.frames, kinetics.fps, kinetics.frame_size) == (32, 12.5, 320)
    assert (kinetics.batch_size, kinetics.steps, kinetics.test_clips, kinetics.test_crops) == (
        (64, 100_000, 4, 3)
    )
    audioset = params.finetune.tasks["audioset"]
    assert audioset.audio_samples == 6.4 * (audioset.audio_hz or 0)
    assert (audioset.mixup, audioset.loss, audioset.batch_size) == (5, "balanced_sigmoid", 1024)
    imagenet = params.finetune.tasks["imagenet"]
    assert (imagenet.frame_size, imagenet.batch_size) == (384, 512)
    assert imagenet.steps == round(50 * 1_281_167 / 512)


def test_two_evaluations_are_compared_in_the_terminal_and_as_json(project: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_evaluation(project / name, range(20), seed=seed)
    folders = [str(project / name) for name in ("a", "b")]
    shown = vattctl(project, "compare", *folders)
    assert shown.returncode == 0, shown.stderr
    assert "text to video, R@10" in shown.stdout
    assert "text_to_video.recall_at_10" in shown.stdout  # the name in MLflow and DVC
    assert "it/s" not in shown.stdout + shown.stderr  # no progress bar of MLflow
    rows = json.loads(vattctl(project, "compare", *folders, "--json").stdout)["rows"]
    assert {"name", "first", "second", "difference"} == rows[0].keys()
    unknown = vattctl(project, "compare", folders[0], "3f2a91")
    assert unknown.returncode == 3
    assert "no evaluate run begins with '3f2a91'" in unknown.stderr


def test_ledger_counts_the_clips_and_tells_a_clips_history(project: Path) -> None:
    from dataclasses import replace

    from tests.data.corpus import make_clip
    from vatt.data.clips.ledger import JOURNAL, Entry, Ledger
    from vatt.data.clips.manifest import manifest_hash, write_manifest

    done = vattctl(project, "ledger")
    assert done.returncode == 3 and "run `vattctl download`" in done.stderr
    clips = [replace(make_clip(number), source="audioset") for number in range(3)]
    write_manifest(project / "data" / "manifest.jsonl", clips)
    with Ledger(project / "data" / "media" / JOURNAL) as journal:
        journal.record(Entry("clip-000", "network", "download", "timed out"))
        journal.record(Entry("clip-000", "ok", "download", has=("video",)))
        journal.record(Entry("clip-001", "removed", "download"))
    found = json.loads(vattctl(project, "ledger", "--json").stdout)
    assert found["version"] == 1
    assert found["total"]["states"] == {"ok": 1, "removed": 1, "pending": 1}
    assert found["splits"][0]["official"] == 2063949 and found["splits"][0]["listed"] == 3
    assert found["hash"]["listed"] == manifest_hash(project / "data" / "manifest.jsonl")
    shown = vattctl(project, "ledger").stdout
    assert "33.3% kept; data.min_share requires 50%" in shown
    assert "audioset train: 1 of the official 2,063,949 are here" in shown
    assert found["official"][0]["kept"] == 1
    history = vattctl(project, "ledger", "clip-000").stdout.splitlines()
    assert ["timed out" in line for line in history] == [True, False]
    done = vattctl(project, "ledger", "nobody")
    assert done.returncode == 3 and "no ledger has clip nobody" in done.stderr


def test_retry_knows_the_states_and_does_nothing_without_clips(project: Path) -> None:
    done = vattctl(project, "download", "--retry", "gone")
    assert done.returncode == 2 and "no such state: gone" in done.stderr
    done = vattctl(project, "download", "--retry", "retryable")
    assert done.returncode == 0 and "0 clips will be tried again" in done.stderr
    done = vattctl(project, "download", "--retry", "missing")
    assert done.returncode == 0 and "0 files will be tried again" in done.stderr


SERVE = """
import subprocess, sys
from pathlib import Path
from vattctl.runs import serve
child = "import time; time.sleep(100)"
server = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
sys.exit(serve([sys.executable, "-c", server]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_of_a_server_outlives_vattctl(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wait_until(lambda: len(processes(tmp_path)) >= 4)  # vattctl, guard, server and its child
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    wait_until(lambda: processes(tmp_path) == [], seconds=10)
    assert number != signal.SIGINT or (process.returncode, errors) == (0, "")


def test_a_list_of_pipelines_shows_no_number_of_too_few_clips(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"run_id": "1" * 32, "name": "own", "status": "FINISHED", "began": "now", "changed": {}}
    measured = {"text_to_video.recall_at_10": 1.0, "video_to_audio.recall_at_10": 0.25}
    few = {"text_to_video.clips": 1, "video_to_audio.clips": 60}
    _print_pipelines([{**row, "metrics": measured | few}])
    shown = capsys.readouterr().out
    assert "too few clips" in shown and "25.0 %" in shown and "100.0 %" not in shown
