"""The complete evaluation over real shards: all numbers, valid JSON, the same twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.project import (
    both,
    make_project,
    measure,
    save_checkpoints,
    settings,
    tiny_model,
)
from tests.training.tiny import SIZE
from vatt import checkpoint
from vatt.config import ModelParams
from vatt.data.loading.batches import labels_of
from vatt.errors import DataError, SettingsError
from vatt.evaluation import passes, retrieval
from vatt.evaluation.classification import Checkpoints, Predictions, choose
from vatt.evaluation.evaluate import (
    SUMMARY,
    EvaluationRequest,
    costs,
    encode,
    headline,
    recall_curve,
    save_results,
    summary,
)
from vatt.evaluation.evaluate import measure as measure_outputs
from vatt.flops import audio_flops
from vatt.model.vatt import VATT, Classifier


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


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
    assert metrics["classification"]["audio"].keys() == {"modality", "views", "scratch"}
    assert metrics["searches"]["text_to_video"]["pool"] == 12
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
        "probe absent": "label 'species' has 0 values in the train split; 2 are needed"
    }


def test_an_untrained_checkpoint_is_no_better_than_the_untrained_encoder(measured):
    difference = measured[0]["probes"]["digit"]["svm"]["difference"]
    assert difference["low"] <= 0 <= difference["high"]


def test_the_same_twice_with_any_number_of_workers(project, measured):
    for workers in (1, 3):
        assert_equal(measure(project, workers=workers), measured)


def assert_equal(found, expected):
    assert json.dumps(found[0]) == json.dumps(expected[0])
    assert found[1].examples == expected[1].examples
    assert found[1].arrays.keys() == expected[1].arrays.keys()
    for name, arrays in found[1].arrays.items():
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, expected[1].arrays[name][key])


def test_a_second_evaluation_computes_nothing_and_finds_the_same(
    project, measured, tmp_path, monkeypatch
):
    assert_equal(measure(project, cache=tmp_path), measured)
    assert len(list(tmp_path.glob("*.npz"))) == 6  # two encoders twice, insides, one classifier

    def never(*_args, **_named):
        raise AssertionError("a batch was made")

    monkeypatch.setattr(passes, "eval_batches", never)
    assert_equal(measure(project, cache=tmp_path), measured)


def test_other_weights_or_clips_are_not_taken_from_the_cache(project, tmp_path):
    measure(project, cache=tmp_path)
    model = tiny_model(settings())
    torch.manual_seed(1)
    words = project / "shards" / "vocabulary.txt"
    checkpoint.save(VATT(model), model, tmp_path / "other", vocabulary=words)
    before = len(list(tmp_path.glob("*.npz")))
    measure(project, cache=tmp_path, checkpoints=Checkpoints(tmp_path / "other"))
    assert len(list(tmp_path.glob("*.npz"))) == before + 3  # not the untrained encoder's


def test_a_checkpoint_without_words_is_measured_by_sound_alone_and_says_so(project, tmp_path):
    model = tiny_model(settings())
    checkpoint.save(VATT(model), model, tmp_path / "wordless")
    folders = {"pretrained": tmp_path / "wordless", "finetuned": tmp_path / "none"}
    paths = settings().paths.model_copy(update=folders)
    metrics, evidence = measure(project, checkpoints=choose(paths, settings().finetune))
    assert metrics["retrieval"]["pretrained"].keys() == {"audio_to_video", "video_to_audio"}
    assert "import it with --vocab" in metrics["skipped"]["text"]
    assert metrics["probes"].keys() == {"digit"}
    assert metrics["classification"] == {}
    assert evidence.examples == []


def test_a_classifier_that_numbers_its_classes_is_measured_alone(project, tmp_path):
    """As an imported one does: the numbers stand for the labels in the alphabet's order."""
    names = sorted(labels_of(project / "shards", "motion"))
    model = tiny_model(settings())
    torch.manual_seed(0)
    whole = Classifier(model, modality="audio", num_classes=len(names), head_dropout=0.0)
    found = []
    for classes in (names, [str(place) for place in range(len(names))]):
        folder = tmp_path / f"given-{len(found)}"
        told = {"classifier": {"modality": "audio", "classes": classes}}
        checkpoint.save(whole, model, folder, extra=told)
        paths = settings().paths.model_copy(update={"pretrained": folder})
        metrics, _ = measure(project, checkpoints=choose(paths, settings().finetune))
        assert metrics["retrieval"] == metrics["probes"] == {}
        found.append(metrics["classification"]["audio"]["pretrained"])
    assert found[0] == found[1]
    assert found[0]["top_1"]["n"] == 12


def test_numbered_classes_of_another_number_than_the_labels_are_refused(project):
    paths = settings().paths.model_copy(
        update={"pretrained": project / "finetuned" / "audio-scratch"}
    )
    chosen = choose(paths, settings().finetune)
    answers = Predictions(np.array(["a"]), np.array(["up"]), np.zeros((1, 3)), ("0", "1", "2"))
    with pytest.raises(DataError, match="numbers 3 classes, the clips have 2 labels"):
        chosen.named(answers, {"up", "down"})
    assert chosen.named(answers, {"up", "down|left"}).classes == ("down", "left", "up")


def test_a_given_classifier_needs_one_task_of_its_kind(project):
    finetune = settings().finetune.model_copy(update={"run": ("action", "image")})
    paths = settings().paths.model_copy(
        update={"pretrained": project / "finetuned" / "audio-scratch"}
    )
    with pytest.raises(
        SettingsError, match=r"is a classifier of audio, and finetune\.run has 0 tasks"
    ):
        choose(paths, finetune)


def test_without_any_checkpoint_it_says_how_to_give_one(tmp_path):
    update = dict.fromkeys(("pretrained", "finetuned"), tmp_path)
    with pytest.raises(DataError, match="no checkpoint") as error:
        choose(settings().paths.model_copy(update=update), settings().finetune)
    assert "--from FOLDER" in error.value.hint


def test_probes_learn_from_one_window_and_ask_several(project):
    four = settings().evaluate.model_copy(update={"clips": 4})
    metrics, _ = measure(
        project, checkpoints=Checkpoints(project / "pretrained"), evaluate_params=four
    )
    assert metrics["probes"]["digit"]["svm"]["pretrained"]["n"] == 12
    assert "audio_to_video_similarities_averaged" in metrics["retrieval"]["pretrained"]


def test_progress_ends_at_its_total(project):
    seen = []
    measure(project, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (24 + 12 + 12, 48)
    assert seen == sorted(seen)


def test_results_are_saved_as_json_and_plain_arrays(measured, tmp_path):
    metrics, evidence = measured
    save_results(metrics, evidence, file=tmp_path / "evaluate.json", folder=tmp_path / "arrays")
    assert json.loads((tmp_path / "evaluate.json").read_text()) == metrics
    assert json.loads((tmp_path / "summary.json").read_text()) == summary(metrics)
    shown = json.loads((tmp_path / "headline.json").read_text())
    assert 0 < len(shown) <= 3 and shown.items() <= summary(metrics).items()
    with np.load(tmp_path / "arrays" / "features.npz", allow_pickle=False) as stored:
        assert stored["pretrained/video"].shape[0] == 12
    assert json.loads((tmp_path / "arrays" / "examples.json").read_text()) == evidence.examples


def test_the_summary_has_few_values_by_the_names_that_compare_prints(measured):
    metrics = measured[0]
    found = summary(metrics)
    nested = metrics["retrieval"]["pretrained"]["text_to_video"]["recall_at_10"]["value"]
    assert found["text_to_video.recall_at_10"] == nested
    searched = metrics["retrieval"]["pretrained"]["text_to_video"]["recall_at_10"]["n"]
    assert found["text_to_video.clips"] == searched
    probes = {name for name in found if name.startswith("probe-")}
    assert probes == {
        f"probe-{name}-{kind}.accuracy"
        for name, kinds in metrics["probes"].items()
        for kind in kinds
    }
    many = {"top_1": {"value": 0.5}, "top_5": {"value": 0.9}}
    tasks = {f"task{number}": {"modality": "video", "pretrained": many} for number in range(50)}
    assert len(summary({**metrics, "classification": tasks})) == SUMMARY == 60
    assert (
        summary({"retrieval": {}, "classification": tasks, "probes": {}})["task7-pretrained.top_5"]
        == 0.9
    )


def test_the_headline_is_one_value_of_each_kind_and_short():
    values = {
        "text_to_video.recall_at_1": 0.1, "text_to_video.recall_at_10": 0.4,
        "video_to_audio.recall_at_10": 0.3, "action-scratch.top_1": 0.1,
        "action-pretrained.top_1": 0.2, "sound-pretrained.mean_ap": 0.2,
        "probe-digit-low_rank.accuracy": 0.6, "probe-digit-svm.accuracy": 0.7,
    }  # fmt: skip
    assert headline(values) == {
        "text_to_video.recall_at_10": 0.4, "action-pretrained.top_1": 0.2,
        "probe-digit-svm.accuracy": 0.7,
    }  # fmt: skip
    assert headline({}) == {}


def test_the_curve_of_retrieval_rises_and_passes_through_the_metrics(measured):
    metrics, evidence = measured
    one = {row["k"]: row["text_to_video"] for row in evidence.curve}
    assert list(one.values()) == sorted(one.values())
    known = metrics["retrieval"]["pretrained"]["text_to_video"]
    assert {k: one[k] for k in (1, 5, 10) if k in one} == pytest.approx(
        {k: known[f"recall_at_{k}"]["value"] for k in (1, 5, 10) if k in one}, abs=1e-5
    )
    assert recall_curve({}) == []


def test_validation_measures_the_same_clips_each_time_and_draws_nothing(project, monkeypatch):
    params = settings()
    chosen = params.pretrain.model_copy(update={"evaluate_every": 2, "evaluate_clips": 8})
    model = tiny_model(params)
    monkeypatch.setattr(retrieval, "SPLIT", "test")
    measure = retrieval.validation(model, chosen, shards=project / "shards", machine=params.machine)
    weights = checkpoint.load(project / "pretrained").state_dict()
    before = torch.get_rng_state()
    found = measure(weights)
    assert measure(weights) == found
    assert torch.equal(before, torch.get_rng_state())
    assert found["val.audio_to_video.recall_at_10"] == 1.0  # eight clips are searched
    assert 1 <= found["val.text_to_video.median_rank"] <= 8
    assert found[retrieval.SCORE] == 1.0


def test_validation_without_clips_says_what_to_set(project):
    params = settings()
    chosen = params.pretrain.model_copy(update={"evaluate_every": 2})
    with pytest.raises(SettingsError, match=r"data\.val_share=0\.01"):
        retrieval.validation(
            tiny_model(params), chosen, shards=project / "shards", machine=params.machine
        )


@pytest.fixture(scope="module")
def deeper(tmp_path_factory, project):
    """The same project with checkpoints of three layers, which can merge in two of them."""
    folder = tmp_path_factory.mktemp("deeper")
    (folder / "shards").symlink_to(project / "shards")
    size = {"size": {**SIZE, "depth": 3}}
    content = tiny_model(settings()).model_dump()
    model = ModelParams.model_validate(
        content | {name: content[name] | size for name in ("video", "audio", "text")}
    )
    save_checkpoints(folder, model)
    return folder, model


def test_merging_changes_answers_and_cost_and_a_rate_of_zero_changes_nothing(deeper, tmp_path):
    folder, model = deeper
    found = []
    for rate in (None, 0.0, 0.25):
        changes = {} if rate is None else {"merge_rate": rate}
        request = EvaluationRequest(
            settings().evaluate.model_copy(update=changes),
            both(folder),
            settings().finetune,
            folder / "shards",
            settings().machine.model_copy(update={"workers": 0}),
            seed=0,
        )
        outputs = encode(request, cache=tmp_path, progress=lambda done, total: None)
        metrics, evidence = measure_outputs(outputs, request)
        found.append((metrics, evidence.arrays, costs(metrics, outputs)))
    plain, zero, merged = found
    assert plain[0] == zero[0]
    audio = [arrays["predictions-audio-scratch"]["logits"] for _, arrays, _ in found]
    video = [arrays["features"]["pretrained/video"] for _, arrays, _ in found]
    assert np.array_equal(audio[0], audio[1]) and not np.allclose(audio[0], audio[2])
    assert np.array_equal(video[0], video[1]) and not np.allclose(video[0], video[2])
    names = {"cost.video", "cost.audio", "cost.audio-scratch"}
    assert {f"{name}.gflops" for name in names} | {f"{name}.seconds" for name in names} | {
        "cost.text.seconds"
    } == merged[2].keys()
    assert all(value > 0 for value in merged[2].values())
    assert zero[2].keys() == {f"{name}.gflops" for name in names}  # all came from the cache
    expected = audio_flops(model.audio, merge_rate=0.25, convention="true") / 1e9
    assert merged[2]["cost.audio.gflops"] == merged[2]["cost.audio-scratch.gflops"] == expected
    assert expected < plain[2]["cost.audio.gflops"]
