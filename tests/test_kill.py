"""The demo's pre-training, all its steps on its real shards, through at least twenty SIGKILLs.

Settings are the demo's but for how often it saves and reports and its threads, which shape no
weight. VATT_KILL_SHARDS names the data folder of a project whose demo shards are made already;
VATT_KILL_LOG a file that gets the figures; VATT_KILL_STEPS makes a shorter training of it.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_stages import environment, new_project

KILLS = 20
STEPS = int(os.environ.get("VATT_KILL_STEPS", "450"))
OFTEN = {"steps": STEPS, "save_every": STEPS // 30, "report_every": 1}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the demo's shards, made by the demo's stages."""
    project = new_project(tmp_path_factory.mktemp("demo"))
    settings = yaml.safe_load((project / "presets" / "demo.yaml").read_text(encoding="utf-8"))
    settings["pretrain"] |= OFTEN
    settings["machine"]["threads"] = 1
    (project / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    if "VATT_KILL_SHARDS" in os.environ:
        shutil.copytree(os.environ["VATT_KILL_SHARDS"], project / "data")
        return project
    for stage in ("download", "preprocess"):
        subprocess.run(command(stage), cwd=project, env=environment(), check=True)
    return project


def command(stage: str) -> list[str]:
    return [sys.executable, "-m", f"stages.{stage}"]


def start(project: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command("pretrain"), cwd=project, env=environment())


def curve(project: Path) -> list[dict[str, Any]]:
    """The numbers of every step, as the checkpoint keeps them."""
    rows: list[dict[str, Any]] = json.loads(
        (project / "runs/checkpoints/pretrained/history.json").read_text(encoding="utf-8")
    )
    return rows


def weights_hash(project: Path) -> str:
    weights = project / "runs/checkpoints/pretrained/model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def kill_somewhere(project: Path, number: int, chance: random.Random) -> str | None:
    """Start and kill: while a state is written, in a step, or before the first one; where it was.

    None when the training ended before.
    """
    states = project / "runs/pretrain-state"
    history = states / "history.jsonl"
    lines = history.read_text().count("\n") if history.exists() else 0
    process = start(project)
    place = ("while a state is written", "in a step", "in a step", "anywhere")[number % 4]
    if place == "anywhere":  # the start takes seconds, too
        time.sleep(chance.uniform(0.5, 25))
    while place != "anywhere" and process.poll() is None:
        moved = history.exists() and history.read_text().count("\n") > lines
        if place == "in a step" and moved:
            time.sleep(chance.uniform(0, 4))
            break
        if place == "while a state is written" and list(states.glob(".step-*.tmp")) and moved:
            time.sleep(chance.uniform(0, 0.1))
            if not list(states.glob(".step-*.tmp")):
                place = "just after a state was written"
            break
        time.sleep(0.002)
    process.kill()
    return None if process.wait() == 0 else place


def test_the_demo_s_pretraining_through_twenty_kills(prepared: Path, tmp_path: Path) -> None:
    began = time.perf_counter()
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for project in (calm, killed):
        shutil.copytree(prepared, project, symlinks=True)
    assert start(calm).wait() == 0
    undisturbed = time.perf_counter() - began
    chance = random.Random(0)
    places = []
    while len(places) < KILLS:
        place = kill_somewhere(killed, len(places), chance)
        assert place is not None, f"it ended after {len(places)} kills"
        places.append(place)
    assert start(killed).wait() == 0
    figures = {
        "steps": len(curve(calm)),
        "kills": len(places),
        "places": {place: places.count(place) for place in sorted(set(places))},
        "sha256, undisturbed": weights_hash(calm),
        "sha256, killed": weights_hash(killed),
        "loss sequences equal": curve(killed) == curve(calm),
        "seconds, undisturbed": round(undisturbed),
        "seconds, killed": round(time.perf_counter() - began - undisturbed),
    }
    if "VATT_KILL_LOG" in os.environ:
        Path(os.environ["VATT_KILL_LOG"]).write_text(json.dumps(figures, indent=1) + "\n")
    assert figures["steps"] == STEPS
    assert curve(killed) == curve(calm)
    assert weights_hash(killed) == weights_hash(calm)
