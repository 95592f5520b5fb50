"""A tiny project to evaluate: shards of the demo corpus, untrained checkpoints."""

from pathlib import Path

import torch

from tests.data.corpus import demo_params
from tests.training.tiny import model_params
from vatt import checkpoint
from vatt.config import ModelParams, ProbeParams
from vatt.data.clips.ledger import Entry
from vatt.data.sharding.shards import write_shards
from vatt.data.sources.demo import make_demo
from vatt.evaluation import evaluate
from vatt.evaluation.classification import Checkpoints
from vatt.evaluation.evaluate import EvaluationRequest, encode
from vatt.evaluation.features import ALONE
from vatt.model.vatt import VATT, Classifier

MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "circle", "shake")


def settings():
    params = demo_params()
    small = params.data.demo.model_copy(
        update={"train_clips": 24, "test_clips": 12, "dead_links": 0, "no_text_share": 0.0}
    )
    probes = {
        "digit": ProbeParams(modality="video", label="digit", train_labels=None, folds=()),
        "absent": ProbeParams(modality="audio", label="species", train_labels=None, folds=()),
    }
    return params.model_copy(
        update={
            "data": params.data.model_copy(update={"demo": small}),
            "evaluate": params.evaluate.model_copy(
                update={"probes": probes, "low_rank_steps": 5, "bootstrap": 20, "batch_size": 5}
            ),
        }
    )


def tiny_model(params) -> ModelParams:
    content = model_params().model_dump()
    content["text"]["vocabulary"] = params.model.text.vocabulary
    return ModelParams.model_validate(content)


def make_project(folder: Path) -> None:
    """Shards of a tiny demo corpus, a checkpoint and one classifier, untrained all."""
    torch.set_num_threads(1)
    params = settings()
    made = make_demo(
        folder / "made", params.data.demo, seed=0, workers=0, progress=lambda done, total: None
    )
    media = folder / "media"
    media.mkdir()
    for clip in made:
        (folder / "made" / clip.url.removeprefix("demo:")).rename(media / clip.media_name)
    entries = {
        clip.clip_id: Entry(clip.clip_id, "ok", "download", has=("video", "audio"), seconds=1.0)
        for clip in made
    }
    write_shards(
        made,
        entries,
        params.preprocess,
        params.data,
        machine=params.machine,
        media=media,
        folder=folder / "shards",
        ledger=folder / "ledger.jsonl",
        seed=0,
    )
    save_checkpoints(folder, tiny_model(params))


def save_checkpoints(folder: Path, model: ModelParams) -> None:
    """A model and an audio classifier, both untrained."""
    torch.manual_seed(0)
    words = folder / "shards" / "vocabulary.txt"
    checkpoint.save(VATT(model), model, folder / "pretrained", vocabulary=words)
    checkpoint.save(
        Classifier(model, modality="audio", num_classes=len(MOTIONS), head_dropout=0.0),
        model,
        folder / "finetuned" / "audio-scratch",
        extra={"classifier": {"modality": "audio", "classes": MOTIONS}},
    )


def both(project: Path) -> Checkpoints:
    audio = {("audio", "scratch"): project / "finetuned" / "audio-scratch"}
    return Checkpoints(project / "pretrained", audio)


def measure(
    project: Path,
    *,
    cache=None,
    workers=0,
    progress=None,
    checkpoints=None,
    evaluate_params=None,
    share=ALONE,
):
    params = settings()
    request = EvaluationRequest(
        evaluate_params or params.evaluate,
        checkpoints or both(project),
        params.finetune,
        project / "shards",
        params.machine.model_copy(update={"workers": workers}),
        seed=0,
    )
    quiet = progress or (lambda done, total: None)
    outputs = encode(request, cache=cache, progress=quiet, share=share)
    return None if outputs is None else evaluate.measure(outputs, request)
