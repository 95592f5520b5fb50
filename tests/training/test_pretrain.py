"""The pre-training loop: what it reports, when it refuses, what it resumes from."""

import itertools
import logging

import pytest
import torch

from tests.training import tiny
from vatt.data.loading.batches import model_inputs
from vatt.errors import VattError
from vatt.losses import paper_form, pretraining_loss, release_form
from vatt.model.patches import draw_kept
from vatt.senses import ANCHOR
from vatt.training import loop
from vatt.training.pretrain import Pretraining, Visible, fingerprint, pretrain, pretraining_inputs

CLOCKS = {
    "samples_per_second",
    "tokens_per_second",
    "tflops_per_second",
    "mfu",
    "data_wait_share",
    "peak_memory_gb",
}


def run(folder, *, batches_from=tiny.batches_from, seed=0, **changes):
    reporter = tiny.Recorder()
    training = tiny.training(folder, reporter, batches_from, seed=seed)
    model = tiny.make_model(tiny.model_params())
    weights = pretrain(model, tiny.pretrain_params(**changes), training)
    return reporter.rows, weights


def test_every_report_has_losses_rate_norm_and_speed(tmp_path):
    rows, _ = run(tmp_path, report_every=4)
    assert [step for step, _ in rows] == [4, 6]
    expected = {"loss", "nce", "mil_nce", "learning_rate", "gradient_norm"} | CLOCKS
    for _, metrics in rows:
        assert metrics.keys() == expected
        assert metrics["loss"] == pytest.approx(metrics["nce"] + metrics["mil_nce"], rel=1e-6)
    assert 0 <= rows[0][1]["data_wait_share"] <= 1


WEIGHTING = {"kind": "weight", "least": 0.5, "warmup_steps": 3}


def test_candidates_are_weighted_after_the_warm_up_and_not_before(tmp_path):
    plain, _ = run(tmp_path / "plain")
    rows, _ = run(tmp_path / "weighted", text_weighting=WEIGHTING)
    agreements, dropped = ([row[name] for _, row in rows] for name in
                           ("text_agreement", "text_dropped_share"))  # fmt: skip
    assert dropped[:3] == [0, 0, 0] and all(0 < share < 1 for share in dropped[3:])
    assert all(0 < value < 1 for value in agreements)
    losses, weighted = ([row["loss"] for _, row in some] for some in (plain, rows))
    assert weighted[:3] == losses[:3] and weighted[3] != losses[3]


def test_a_training_stopped_in_the_warm_up_goes_on_with_the_same_weights(tmp_path):
    _, whole = run(tmp_path / "whole", text_weighting=WEIGHTING)
    with pytest.raises(VattError):  # after the state of step 2
        run(
            tmp_path / "cut",
            text_weighting=WEIGHTING,
            batches_from=lambda first: itertools.islice(tiny.batches_from(0), 3),
        )
    rows, again = run(tmp_path / "cut", text_weighting=WEIGHTING)
    assert rows[0][0] == 3
    assert tiny.hash_of(again) == tiny.hash_of(whole)


def test_one_batch_is_learned_by_heart(tmp_path):
    rows, _ = run(
        tmp_path, steps=60, drop_rate=0, batches_from=lambda _: itertools.repeat(tiny.make_batch(0))
    )
    assert rows[-1][1]["loss"] < 0.25 * rows[0][1]["loss"]


def test_weights_come_out_under_the_model_s_own_names(tmp_path):
    _, weights = run(tmp_path)
    tiny.make_model(tiny.model_params(), seed=1).load_state_dict(weights)


def test_a_loss_that_is_not_finite_names_step_and_clips_and_keeps_the_last_state(tmp_path):
    def poisoned(first_step):
        for step in itertools.count(first_step):
            batch = tiny.make_batch(step)
            if step == 5:
                batch.changes["video"][3] = float("nan")
            yield batch

    with pytest.raises(VattError, match=r"(?s)step 5.*loss = nan.*clip-5-3"):
        run(tmp_path, batches_from=poisoned)
    assert [folder.name for folder in sorted(tmp_path.glob("step-*"))][-1] == "step-00000004"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Read numbers a step late and take batches early, which a CPU has no need of."""
    monkeypatch.setitem(loop.READ_LATE, "cpu", 1)
    monkeypatch.setitem(loop.PREFETCH, "cpu", True)


def test_reading_late_and_fetching_early_changes_no_number(tmp_path, request):
    timings = dict.fromkeys(CLOCKS, 0.0)
    found = []
    for name in ("now", "late"):
        if name == "late":
            request.getfixturevalue("as_on_a_gpu")
        rows, weights = run(tmp_path / name, report_every=3, save_every=4)
        found.append(([(step, row | timings) for step, row in rows], tiny.hash_of(weights)))
    assert found[0] == found[1]


def test_read_late_a_loss_that_is_not_finite_stops_before_a_state_is_saved(tmp_path, as_on_a_gpu):
    def poisoned(first_step):
        for step in itertools.count(first_step):
            batch = tiny.make_batch(step)
            batch.changes["video"][3] = float("nan") if step >= 3 else batch.changes["video"][3]
            yield batch

    with pytest.raises(VattError, match=r"(?s)at step 3.*loss = nan.*clip-3-3"):
        run(tmp_path, batches_from=poisoned, report_every=100)
    assert [folder.name for folder in sorted(tmp_path.glob("step-*"))] == ["step-00000002"]


def test_changed_settings_start_anew_and_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(VattError):
        run(tmp_path, batches_from=lambda first: itertools.islice(tiny.batches_from(0), 3))
    rows, _ = run(tmp_path, temperature=0.2)
    assert rows[0][0] == 1
    assert "pretrain.temperature was 0.07 and is 0.2" in caplog.text


def test_settings_without_influence_on_the_weights_do_not_hinder_resuming(tmp_path):
    with pytest.raises(VattError):
        run(tmp_path, batches_from=lambda first: itertools.islice(tiny.batches_from(0), 3))
    rows, _ = run(tmp_path, save_every=5, keep_states=1, report_every=1)
    assert rows[0][0] == 3


def test_only_the_last_states_are_kept(tmp_path):
    run(tmp_path, steps=9, save_every=2, keep_states=2)
    assert [f.name for f in sorted(tmp_path.glob("step-*"))] == ["step-00000008", "step-00000009"]


def test_every_n_th_state_stays_for_good(tmp_path):
    run(tmp_path, steps=9, save_every=1, keep_states=2, keep_states_every=3)
    kept = [int(f.name.removeprefix("step-")) for f in sorted(tmp_path.glob("step-*"))]
    assert kept == [3, 6, 8, 9]


def test_the_fingerprint_has_every_setting_that_shapes_the_weights():
    model = tiny.model_params()

    def identity(seed=0, data="x", **changes):
        return fingerprint(tiny.pretrain_params(**changes), model, data_hash=data, seed=seed)

    base = identity()
    assert identity(save_every=7, report_every=3, keep_states=9, keep_states_every=9) == base
    for changed in (
        identity(seed=1),
        identity(data="y"),
        identity(steps=7),
        identity(optimizer={"clip_norm": None}),
    ):
        assert changed != base


def test_bf16_stays_close_to_fp32(tmp_path):
    exact, _ = run(tmp_path / "exact", steps=1)
    rough, _ = run(tmp_path / "rough", steps=1, precision="bf16")
    assert rough[0][1]["loss"] == pytest.approx(exact[0][1]["loss"], rel=0.05)
    assert torch.tensor(rough[0][1]["loss"]) != torch.tensor(exact[0][1]["loss"])


@pytest.mark.parametrize(
    ("recipe", "form", "alike"), [("paper", paper_form, False), ("release", release_form, True)]
)
def test_the_recipe_chooses_the_loss_and_how_tokens_are_dropped(recipe, form, alike):
    params = tiny.model_params().model_copy(update={"recipe": recipe})
    module = Pretraining(tiny.make_model(params), tiny.pretrain_params()).eval()
    batch = tiny.make_batch(0)
    inputs = pretraining_inputs(module.model, batch, 0, drop_rate=0.5, seed=0)
    (given,) = inputs
    assert given.kept.keys() == {"video", "audio"}
    for kept in given.kept.values():
        assert bool((kept == kept[0]).all()) is alike
    names = {f"kept_{name}": kept for name, kept in given.kept.items()}
    out = module.model(**model_inputs(batch), **names)
    wanted = pretraining_loss(
        out,
        batch.has(),
        temperature=0.07,
        mil_nce_weight=1.0,
        form=form,
    )
    torch.testing.assert_close(module(*inputs)["loss"], wanted.total)


@pytest.mark.parametrize("changes", [True, False])
@pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", [16, 12])  # patches of 8: whole ones, and a partial one
def test_colours_of_kept_patches_alone_are_those_of_whole_clips(size, rate, changes):
    settings = tiny.model_params()
    settings = settings.model_copy(
        update={"video": settings.video.model_copy(update={"frame_size": size})}
    )
    model, random = tiny.make_model(settings).eval(), torch.Generator().manual_seed(0)
    video = torch.randint(256, (3, 4, size, size, 3), dtype=torch.uint8, generator=random)
    colour = torch.tensor([[0.1, 1.2, 0.8, 0.1], [-0.1, 0.7, 1.3, -0.2], [0.0, 1.0, 1.0, 0.0]])
    kept = draw_kept(model.token_counts["video"], rate, seed=0, step=0, samples=range(3))
    own, embed = colour if changes else None, model.video.embed
    whole = ANCHOR.scaled(video, own)
    visible = Visible(embed)
    values = visible(video, own, kept, torch.float32)
    seen = visible.patches(values, video, kept)
    if size == 16:
        assert torch.equal(values, embed.cut(whole, kept).values)
    ours = model.encode(seen, kept_video=kept)["video"]
    assert torch.equal(ours, model.encode(whole, kept_video=kept)["video"])
