"""The whole evaluation over real shards: complete, JSON-ready, the same twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.corpus import demo_params
from tests.training.tiny import model_params
from vatt import checkpoint
from vatt.config import ModelParams, ProbeParams
from vatt.data.demo import make_demo
from vatt.data.ledger import Entry
from vatt.data.shards import write_shards
from vatt.errors import SettingsError
from vatt.evaluation import validation
from vatt.evaluation.evaluate import evaluate, flatten, save_results
from vatt.model.classifier import Classifier
from vatt.model.vatt import VATT

MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "circle", "shake")


def settings():
    params = demo_params()
    small = params.data.demo.model_copy(
        update={"train_clips": 24, "test_clips": 12, "dead_links": 0, "no_text_share": 0.0}
    )
    probes = {
        "digit": ProbeParams(modality="video", label="digit", train_labels=None),
        "absent": ProbeParams(modality="audio", label="species", train_labels=None),
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


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Shards of a tiny demo corpus, a checkpoint and one classifier, untrained all."""
    torch.set_num_threads(1)
    folder, params = tmp_path_factory.mktemp("project"), settings()
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
    model = tiny_model(params)
    torch.manual_seed(0)
    checkpoint.save(VATT(model), model, folder / "pretrained")
    checkpoint.save(
        Classifier(model, modality="audio", num_classes=len(MOTIONS), head_dropout=0.0),
        model,
        folder / "finetuned" / "audio-scratch",
        extra={"classifier": {"modality": "audio", "classes": MOTIONS}},
    )
    return folder


def measure(project: Path, *, cache: Path | None = None, workers: int = 0, progress=None):
    params = settings()
    return evaluate(
        params.evaluate,
        pretrained=project / "pretrained",
        finetuned=project / "finetuned",
        finetune=params.finetune,
        pretrain=params.pretrain,
        shards=project / "shards",
        cache=cache,
        machine=params.machine.model_copy(update={"workers": workers}),
        seed=0,
        progress=progress or (lambda done, total: None),
    )


@pytest.fixture(scope="module")
def measured(project):
    return measure(project)


def test_everything_that_was_trained_is_measured_and_nothing_else(measured):
    metrics, evidence = measured
    assert metrics["clips"] == {"train": 24, "test": 12}
    assert metrics["retrieval"]["pretrained"].keys() == metrics["retrieval"]["untrained"].keys()
    assert metrics["retrieval"]["pretrained"]["text_to_video"]["recall_at_10"]["n"] == 12
    assert metrics["probes"].keys() == {"digit"}
    assert metrics["probes"]["digit"].keys() == {"svm", "low_rank"}
    assert metrics["classification"].keys() == {"audio"}
    assert metrics["classification"]["audio"].keys() == {"modality", "scratch"}
    assert evidence.arrays.keys() == {
        "features",
        "similarities",
        "insides",
        "predictions-audio-scratch",
        "probe-digit-svm",
        "probe-digit-low_rank",
    }
    assert len(evidence.examples) == 9


def test_a_probe_without_its_label_says_why_it_is_absent(measured):
    assert measured[0]["skipped"] == {
        "probe absent": "0 values of label 'species' in the train split"
    }


def test_an_untrained_checkpoint_is_no_better_than_the_untrained_encoder(measured):
    difference = measured[0]["probes"]["digit"]["svm"]["difference"]
    assert difference["low"] <= 0 <= difference["high"]


def test_the_same_twice_with_any_number_of_workers_and_from_the_cache(project, measured, tmp_path):
    for _ in range(2):
        again, evidence = measure(project, cache=tmp_path, workers=2)
        assert json.dumps(again) == json.dumps(measured[0])
        for name, arrays in evidence.arrays.items():
            for key, array in arrays.items():
                np.testing.assert_array_equal(array, measured[1].arrays[name][key])
    assert len(list(tmp_path.glob("*.npz"))) == 4


def test_progress_ends_at_its_total(project):
    seen = []
    measure(project, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (24 + 12 + 12, 48)
    assert seen == sorted(seen)


def test_results_are_saved_as_json_and_plain_arrays(measured, tmp_path):
    metrics, evidence = measured
    save_results(metrics, evidence, file=tmp_path / "evaluate.json", folder=tmp_path / "arrays")
    assert json.loads((tmp_path / "evaluate.json").read_text()) == metrics
    with np.load(tmp_path / "arrays" / "features.npz", allow_pickle=False) as stored:
        assert stored["pretrained/video"].shape[0] == 12
    assert json.loads((tmp_path / "arrays" / "examples.json").read_text()) == evidence.examples


def test_flat_names_lead_to_values(measured):
    flat = flatten(measured[0])
    nested = measured[0]["retrieval"]["pretrained"]["text_to_video"]["recall_at_10"]["value"]
    assert flat["retrieval.pretrained.text_to_video.recall_at_10"] == nested
    assert not any(name.startswith(("clips", "skipped")) for name in flat)


def test_validation_measures_the_same_clips_each_time_and_draws_nothing(project, monkeypatch):
    params = settings()
    chosen = params.pretrain.model_copy(update={"evaluate_every": 2, "evaluate_clips": 8})
    model = tiny_model(params)
    monkeypatch.setattr(validation, "SPLIT", "test")
    measure = validation.validation(
        model, chosen, shards=project / "shards", machine=params.machine
    )
    weights = checkpoint.load(project / "pretrained").state_dict()
    before = torch.get_rng_state()
    found = measure(weights)
    assert measure(weights) == found
    assert torch.equal(before, torch.get_rng_state())
    assert found["val.audio_to_video.recall_at_10"] == 1.0  # eight clips are searched
    assert 1 <= found["val.text_to_video.median_rank"] <= 8
    assert found[validation.SCORE] == 1.0


def test_validation_without_clips_says_what_to_set(project):
    params = settings()
    chosen = params.pretrain.model_copy(update={"evaluate_every": 2})
    with pytest.raises(SettingsError, match=r"data\.val_share=0\.01"):
        validation.validation(
            tiny_model(params), chosen, shards=project / "shards", machine=params.machine
        )
