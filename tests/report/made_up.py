"""A made-up run: the files that stages leave, with known numbers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vatt.config import PathsParams, ReportParams, load_params
from vatt.data.clips.manifest import Clip, describe_manifest, write_manifest

DEMO = load_params(Path(__file__).parents[2] / "presets" / "demo.yaml")
REPORT = ReportParams(title="A made-up run", tsne_clips=12, device_hour_price=None)
HOSTILE = "<script>alert('x')</script>|`*"


def metric(value, low, high, chance=0.1, n=100):
    return {"value": value, "low": low, "high": high, "chance": chance, "n": n}


def paths(folder: Path) -> PathsParams:
    """The demo's paths, below another folder."""
    plain = DEMO.paths.model_dump()
    return PathsParams.model_validate({name: folder / path for name, path in plain.items()})


def direction() -> dict[str, Any]:
    return {
        "recall_at_1": metric(0.131, 0.09, 0.18, 0.004, 256),
        "recall_at_5": metric(0.42, 0.36, 0.48, 0.02, 256),
        "recall_at_10": metric(0.684, 0.62, 0.74, 0.039, 256),
        "median_rank": metric(6.0, 5.0, 7.5, 128.5, 256),
        "class_at_1": metric(0.41, 0.35, 0.47, 0.0125, 256),
    }


def evaluation() -> dict[str, Any]:
    names = ("text_to_video", "video_to_text", "audio_to_video", "video_to_audio")
    return {
        "clips": {"train": 200, "test": 100},
        "retrieval": {
            "pretrained": {name: direction() for name in names},
            "untrained": {name: direction() for name in names},
        },
        "probes": {
            "digit": {
                "svm": {
                    "pretrained": metric(0.552, 0.50, 0.60),
                    "untrained": metric(0.337, 0.29, 0.38),
                    "difference": metric(0.215, 0.16, 0.27, 0.0),
                }
            }
        },
        "classification": {
            "action": {
                "modality": "video",
                "pretrained": {"top_1": metric(0.445, 0.4, 0.49)},
                "scratch": {"top_1": metric(0.283, 0.24, 0.33)},
                "difference": metric(0.162, 0.11, 0.21, 0.0),
            },
            "sound": {
                "modality": "audio",
                "pretrained": {"top_1": metric(0.711, 0.67, 0.75)},
                "scratch": {"top_1": metric(0.704, 0.66, 0.74)},
                "difference": metric(0.007, -0.02, 0.034, 0.0),
            },
        },
        "skipped": {},
    }


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def leave_run(place: PathsParams, *, label: str = "seven", sentence: str = "a seven rises") -> None:
    """Write everything that a finished pipeline leaves."""
    write(place.metrics / "download.json", {"clips": {"ok": 2, "not-found": 1}})
    write(place.metrics / "pretrain.json", {"step": 700, "loss": 3.25})
    write(place.metrics / "evaluate.json", evaluation())
    write(
        place.runs / "pretrain.json", {"run_id": "a" * 32, "seconds": 241.5, "status": "FINISHED"}
    )
    write(place.runs / "finetune-action-scratch.json", {"seconds": 3.0, "status": "KILLED"})
    history = [{"step": step, "nce": 4.0 - step / 10, "mil_nce": 5.0} for step in range(10)]
    write(place.pretrained / "history.json", history)
    config = {"version": 1, "model": DEMO.model.model_dump(mode="json")}
    write(place.pretrained / "config.json", config)
    clips = [
        Clip(f"c{i}", "demo", f"demo:{i}", 0.0, None, split, {"digit": label}, (), None)
        for i, split in enumerate(("train", "train", "test"))
    ]
    write_manifest(place.manifest, clips)
    corpus = {"corpus": asdict(describe_manifest(place.manifest))}
    place.metrics.mkdir(parents=True, exist_ok=True)
    (place.metrics / "download.json").write_text(json.dumps(corpus))
    states = [("c0", "ok", ""), ("c1", "not-found", sentence), ("c2", "ok", "")]
    place.download_ledger.write_text(
        "".join(
            json.dumps({"clip_id": clip, "state": state, "stage": "download", "reason": reason})
            + "\n"
            for clip, state, reason in states
        )
    )
    leave_arrays(place, label=label, sentence=sentence)


def leave_arrays(place: PathsParams, *, label: str, sentence: str) -> None:
    generator = np.random.default_rng(0)
    place.evaluation.mkdir(parents=True)
    np.savez(
        place.evaluation / "features.npz",
        **{
            "clip_ids": np.array([f"c{i}" for i in range(12)]),
            "labels/digit": np.array([label, "two", "three"] * 4),
            "pretrained/video": generator.normal(size=(12, 4)).astype(np.float32),
        },
    )
    similarities = generator.normal(size=(12, 12)).astype(np.float32)
    np.savez(place.evaluation / "similarities.npz", text_to_video=similarities)
    insides = {f"nodes/{name}": generator.random((3, 100)) for name in ("video", "text")}
    clips = np.asarray([f"clip-{i}" for i in range(12)])
    for name in ("video", "text"):
        insides[f"input/{name}"] = generator.normal(size=(12, 16)).astype(np.float32)
        insides[f"input/{name}/clip_ids"] = clips if name == "video" else clips[::-1]
    np.savez(place.evaluation / "insides.npz", **insides)
    np.savez(
        place.evaluation / "predictions-action-pretrained.npz",
        classes=np.array([label, "two"]),
        confusion=np.array([[3, 1], [0, 4]]),
    )
    example = {
        "clip_id": "c2",
        "sentences": [sentence],
        "shown": label,
        "rank": 1,
        "pool": 12,
        "hits": [{"clip_id": "c2", "shown": label, "own": True}],
    }
    write(place.evaluation / "examples.json", [example])
