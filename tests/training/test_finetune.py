"""Fine-tuning: it learns, resumes, starts from the right weights, and refuses what cannot be."""

import itertools

import pytest
import torch

from tests.training import tiny
from vatt.checkpoint import save
from vatt.config import FinetuneTaskParams
from vatt.errors import DataError, SettingsError
from vatt.training.finetune import (
    Finetuning,
    finetune,
    finetuning_inputs,
    hash_of_weights,
    load_backbone,
    start,
)

CLASSES = ["0", "1", "2"]


def task(**changes):
    settings = tiny.DEMO.finetune.tasks["action"].model_dump()
    optimizer = settings["optimizer"] | {"learning_rate": 3e-3, "warmup_steps": 2}
    base = {
        "label": "digit",
        "batch_size": tiny.BATCH_SIZE,
        "steps": 12,
        "precision": "fp32",
        "head_dropout": 0.0,
        "label_smoothing": 0.0,
        "save_every": 5,
        "report_every": 1,
        "optimizer": optimizer,
    }
    return FinetuneTaskParams.model_validate(settings | base | changes)


def run(model, params, folder, batches_from):
    reporter = tiny.Recorder()
    training = tiny.training(folder, reporter, batches_from)
    weights = finetune(model, params, training, classes=CLASSES)
    assert reporter.exported == [weights]
    return [metrics for _, metrics in reporter.rows], weights


@pytest.mark.parametrize("loss", ["softmax", "balanced_sigmoid"])
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_one_batch_is_learned_by_heart(tmp_path, modality, loss):
    params = task(modality=modality, loss=loss, steps=60)
    losses, _ = run(
        tiny.make_classifier(modality),
        params,
        tmp_path,
        lambda first: itertools.repeat(tiny.make_batch(0)),
    )
    assert losses[-1]["loss"] < 0.1 * losses[0]["loss"]
    assert losses[-1]["accuracy"] == 1


def test_what_comes_out_are_the_classifier_s_weights(tmp_path):
    model = tiny.make_classifier("video")
    _, weights = run(model, task(), tmp_path, tiny.batches_from)
    tiny.make_classifier("video", seed=1).load_state_dict(weights)
    assert (tmp_path / "done.json").exists()


def test_it_resumes_from_the_same_start_only(tmp_path, caplog):
    def broken_after(step):
        return itertools.islice(tiny.batches_from(0), step)

    with pytest.raises(DataError, match="before step 7"):
        run(tiny.make_classifier("video"), task(), tmp_path, lambda first: broken_after(7))
    calm_losses, calm = run(
        tiny.make_classifier("video"), task(), tmp_path / "calm", tiny.batches_from
    )
    losses, weights = run(tiny.make_classifier("video"), task(), tmp_path, tiny.batches_from)
    assert "resuming at step 5" in caplog.text
    assert tiny.hash_of(weights) == tiny.hash_of(calm)
    assert [row["loss"] for row in losses] == [row["loss"] for row in calm_losses[5:]]

    with pytest.raises(DataError):
        run(tiny.make_classifier("video"), task(), tmp_path / "b", lambda first: broken_after(7))
    losses, _ = run(
        tiny.make_classifier("video", seed=1), task(), tmp_path / "b", tiny.batches_from
    )
    assert len(losses) == 12
    assert "not resuming" in caplog.text and "start was" in caplog.text


@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
def test_the_backbone_starts_from_the_pretrained_tower(backbone):
    settings = tiny.model_params(backbone=backbone)
    vatt = tiny.make_model(settings, seed=5)
    for modality, tower in (("video", vatt.video), ("audio", vatt.audio)):
        model = tiny.make_classifier(modality, params=settings)
        head = model.head.weight.clone()
        load_backbone(model, vatt.state_dict())
        assert hash_of_weights(model.backbone) == hash_of_weights(tower)
        assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize("init", ["pretrained", "scratch"])
@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_a_task_of_more_frames_and_pixels_starts_from_resized_positions(tmp_path, recipe, init):
    settings = tiny.model_params().model_copy(update={"recipe": recipe})
    vatt = tiny.make_model(settings, seed=5)
    save(vatt, settings, tmp_path)
    video = task(frames=8, frame_size=24, drop_rate=0.5)
    model = start(video, classes=CLASSES, init=init, pretrained=tmp_path, seed=0)
    positions = model.backbone.embed.positions
    assert model.num_tokens == (8 // 2) * (24 // 8) ** 2
    for axis, size in (("temporal", 4), ("vertical", 3), ("horizontal", 3)):
        table, before = positions.get_parameter(axis), vatt.video.embed.positions
        assert table.shape[0] == size and table.requires_grad
        resized = before.resize(before.get_parameter(axis), size)
        assert torch.allclose(table, resized, atol=1e-6) == (init == "pretrained")
    image = task(modality="image", frames=None, frame_size=32)
    model = start(image, classes=CLASSES, init=init, pretrained=tmp_path, seed=0)
    assert model.num_tokens == (32 // 8) ** 2  # one voxel deep
    assert model(torch.zeros(2, 2, 32, 32, 3)).shape == (2, 3)


def test_mixed_targets_follow_the_mixed_inputs():
    params = task(modality="audio", mixup=5.0)
    batch = tiny.make_batch(0)
    plain, _, hard = finetuning_inputs(
        tiny.make_classifier("audio"),
        batch,
        4,
        params=task(modality="audio"),
        classes=CLASSES,
        seed=0,
    )
    mixed, _, soft = finetuning_inputs(
        tiny.make_classifier("audio"), batch, 4, params=params, classes=CLASSES, seed=0
    )
    share = (mixed[0] - plain[1]).norm() / (plain[0] - plain[1]).norm()
    torch.testing.assert_close(soft[0], share * hard[0] + (1 - share) * hard[1])


def test_micro_batches_and_dropped_tokens_give_the_same_loss():
    model, batch = tiny.make_classifier("video"), tiny.make_batch(0)
    params = task(drop_rate=0.5)
    inputs = finetuning_inputs(model, batch, 4, params=params, classes=CLASSES, seed=0)
    assert inputs[1].shape == (tiny.BATCH_SIZE, model.num_tokens // 2)
    whole = Finetuning(model, params)(*inputs)["loss"]
    parts = Finetuning(model, params, micro_batch_size=3)(*inputs)["loss"]
    torch.testing.assert_close(whole, parts)


def test_an_odd_batch_cannot_be_mixed(tmp_path):
    with pytest.raises(SettingsError, match="in pairs for mixup"):
        run(
            tiny.make_classifier("video"),
            task(batch_size=7, mixup=1.0),
            tmp_path,
            tiny.batches_from,
        )
