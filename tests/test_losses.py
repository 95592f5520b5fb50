"""The losses equal naive loops over the paper's formula and the release's arrays."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model.golden import tensor
from vatt.losses import (
    agreement,
    mil_nce,
    nce,
    paper_form,
    pretraining_loss,
    release_form,
    symmetric_form,
    weights_of,
)
from vatt.model.vatt import Embeddings

TAU = 0.07


def unit(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1)


def naive(video: Tensor, texts: Tensor, valid: Tensor) -> Tensor:
    """The paper's loss (docs/model.md), term by term."""
    clips = [i for i in range(len(video)) if valid[i].any()]
    there = {i: [k for k in range(texts.shape[1]) if valid[i, k]] for i in clips}

    def e(i: int, j: int, k: int) -> Tensor:
        return torch.exp(video[i] @ texts[j, k] / TAU)

    losses = []
    for i in clips:
        positive = sum(e(i, i, k) for k in there[i])
        negatives = sum(e(i, j, k) for j in clips if j != i for k in there[j])
        negatives += sum(e(j, i, k) for j in clips if j != i for k in there[i])
        losses.append(torch.log(positive + negatives) - torch.log(positive))
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=video.dtype)


@given(
    seed=st.integers(0, 2**16),
    clips=st.integers(1, 6),
    candidates=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=25, deadline=None)
def test_mil_nce_equals_the_papers_formula(seed, clips, candidates, share):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(clips, candidates, generator=generator) < share
    video = unit(clips, 8, seed=seed)
    texts = unit(clips, candidates, 8, seed=seed + 1)
    torch.testing.assert_close(
        mil_nce(video, texts, TAU, valid=valid), naive(video, texts, valid), check_dtype=False
    )


@pytest.mark.parametrize("form", [paper_form, release_form, symmetric_form])
def test_blocks_give_the_plain_loss_and_its_gradients(form):
    valid = torch.rand(9, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    results = []
    for max_scores in (1, 60, 10**6):
        video, texts = unit(9, 8).requires_grad_(), unit(9, 3, 8, seed=1).requires_grad_()
        loss = mil_nce(video, texts, TAU, valid=valid, form=form, max_scores=max_scores)
        results.append((loss.detach(), *torch.autograd.grad(loss, (video, texts))))
    for other in results[:2]:
        for left, right in zip(other, results[2], strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("form", [paper_form, release_form, symmetric_form])
def test_without_a_valid_clip_loss_and_gradient_are_zero(form):
    video, texts = unit(4, 8).requires_grad_(), unit(4, 2, 8).requires_grad_()
    loss = mil_nce(video, texts, TAU, valid=torch.zeros(4, 2, dtype=torch.bool), form=form)
    loss.backward()
    assert loss.item() == 0
    assert not video.grad.any() and not texts.grad.any()


def test_a_single_clip_with_one_candidate_costs_nothing_in_the_paper_and_log_2_in_the_release():
    video, audio = unit(1, 8), unit(1, 8, seed=1)
    assert nce(video, audio, TAU).item() == pytest.approx(0, abs=1e-6)
    assert nce(video, audio, TAU, form=release_form).item() == pytest.approx(math.log(2))


def test_bf16_inputs_are_computed_in_fp32():
    video, texts = unit(6, 8).bfloat16(), unit(6, 3, 8, seed=1).bfloat16()
    loss = mil_nce(video, texts, TAU)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mil_nce(video.float(), texts.float(), TAU))


@given(
    seed=st.integers(0, 2**16),
    clips=st.integers(2, 7),
    form=st.sampled_from([paper_form, release_form, symmetric_form]),
    max_scores=st.sampled_from([1, 2**20]),
)
@settings(max_examples=25, deadline=None)
def test_permuting_clips_permutes_the_gradient(seed, clips, form, max_scores):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(clips, generator=generator)
    valid = torch.rand(clips, 3, generator=generator) < 0.7
    video, texts = unit(clips, 8, seed=seed), unit(clips, 3, 8, seed=seed + 1)

    def gradients(places: Tensor) -> tuple[Tensor, ...]:
        inputs = video[places].requires_grad_(), texts[places].requires_grad_()
        loss = mil_nce(*inputs, TAU, valid=valid[places], form=form, max_scores=max_scores)
        return torch.autograd.grad(loss, inputs)

    for straight, permuted in zip(gradients(torch.arange(clips)), gradients(order), strict=True):
        torch.testing.assert_close(straight[order], permuted)


@given(seed=st.integers(0, 2**16), clips=st.integers(1, 5), extra=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_candidates_and_clips_that_are_not_there_change_nothing(seed, clips, extra):
    video, texts = unit(clips + extra, 8, seed=seed), unit(clips + extra, 3, 8, seed=seed + 1)
    valid = torch.ones(clips + extra, 3, dtype=torch.bool)
    valid[clips:] = False
    valid[:, 2] = False
    torch.testing.assert_close(
        mil_nce(video, texts, TAU, valid=valid), mil_nce(video[:clips], texts[:clips, :2], TAU)
    )


def test_a_clip_lacking_a_modality_leaves_the_losses_that_need_it():
    embeddings = Embeddings(
        va={"video": unit(5, 8), "audio": unit(5, 8, seed=1)},
        vt={"video": unit(5, 6, seed=2), "text": unit(5, 2, 6, seed=3)},
    )
    has_video = torch.tensor([True, True, True, True, False])
    has_audio = torch.tensor([True, True, False, True, True])
    has_text = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1], [1, 1]]).bool()
    losses = pretraining_loss(
        embeddings,
        {"video": has_video, "audio": has_audio, "text": has_text},
        temperature=TAU,
        mil_nce_weight=0.5,
    )
    hears, reads = torch.tensor([0, 1, 3]), torch.tensor([0, 2, 3])
    va = nce(embeddings.video_va[hears], embeddings.audio_va[hears], TAU)
    vt = mil_nce(embeddings.video_vt[reads], embeddings.text_vt[reads], TAU, valid=has_text[reads])
    torch.testing.assert_close(losses.nce, va)
    torch.testing.assert_close(losses.mil_nce, vt)
    torch.testing.assert_close(losses.total, va + 0.5 * vt)


@pytest.mark.parametrize("mask", ["all", "some", "none"])
@pytest.mark.parametrize(
    ("form", "name"), [(release_form, "asymmetric_nce"), (symmetric_form, "symmetric_nce")]
)
def test_the_releases_forms_equal_its_arrays(form, name, mask):
    inputs = {
        key: tensor("losses", f"in/{key}").clone().requires_grad_()
        for key in ("vid_toaud", "aud_tovid", "vid_totxt", "txt_tovid")
    }
    has_audio = tensor("losses", "label/audio_mask").bool()
    has_text = tensor("losses", f"label/text_mask_{mask}").bool()[:, None].expand(6, 3)
    units = {
        key: torch.nn.functional.normalize(value, dim=-1, eps=1e-6) for key, value in inputs.items()
    }
    va = nce(units["vid_toaud"], units["aud_tovid"], TAU, valid=has_audio, form=form)
    texts = units["txt_tovid"].unflatten(0, (6, 3))
    vt = mil_nce(units["vid_totxt"], texts, TAU, valid=has_text, form=form)
    found = f"loss/{name}/{mask}/"
    torch.testing.assert_close(va, tensor("losses", found + "vidaud_loss"))
    torch.testing.assert_close(vt, tensor("losses", found + "vidtxt_loss"))
    total = (va + vt) / 2
    torch.testing.assert_close(total, tensor("losses", found + "total"))
    total.backward()
    for key, value in inputs.items():
        torch.testing.assert_close(
            value.grad, tensor("losses", f"{found}grad_{key}"), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("mask", ["all", "some", "none"])
@pytest.mark.parametrize(
    ("form", "name"), [(release_form, "asymmetric_nce"), (symmetric_form, "symmetric_nce")]
)
def test_the_releases_means_per_replica_equal_its_arrays(form, name, mask):
    """Two replicas of three clips each, negatives from both; ours is the mean over all clips."""
    units = {
        key: torch.nn.functional.normalize(tensor("losses", f"in/{key}"), dim=-1)
        for key in ("vid_toaud", "aud_tovid", "vid_totxt", "txt_tovid")
    }
    masks = {"vidaud": "audio_mask", "vidtxt": f"text_mask_{mask}"}
    pairs = {
        "vidaud": (units["vid_toaud"], units["aud_tovid"][:, None]),
        "vidtxt": (units["vid_totxt"], units["txt_tovid"].unflatten(0, (6, 3))),
    }
    for pair, (video, texts) in pairs.items():
        has = tensor("losses", f"label/{masks[pair]}").bool()
        valid = has[:, None].expand(texts.shape[:2])
        row = torch.einsum("ie,jke->ijk", video, texts) / TAU
        column = torch.einsum("ike,je->ijk", texts, video) / TAU
        losses = torch.where(has, form(row, column, torch.arange(6), valid), 0.0)
        means = torch.stack(
            [losses[part].sum() / has[part].sum().clamp(min=1) for part in (slice(3), slice(3, 6))]
        )
        found = f"loss/{name}/{mask}/2replicas/per_replica_{pair}_loss"
        torch.testing.assert_close(means, tensor("losses", found), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            mil_nce(video, texts, TAU, valid=valid, form=form),
            losses.sum() / has.sum().clamp(min=1),
        )


# --- candidates weighted by agreement -------------------------------------------------------------


def drawn(clips: int, candidates: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Videos, texts, which texts exist, and weights of which some are 0 and some 1."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(clips, candidates, generator=generator) < 0.7
    weights = (2 * torch.rand(clips, candidates, generator=generator) - 0.5).clamp(0, 1).double()
    return unit(clips, 8, seed=seed), unit(clips, candidates, 8, seed=seed + 1), valid, weights


def naive_weighted(video: Tensor, texts: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
    """The weighted loss of docs/beyond.md, term by term."""
    clips = [i for i in range(len(video)) if valid[i].any()]
    there = {i: [k for k in range(texts.shape[1]) if valid[i, k]] for i in clips}

    def e(i: int, j: int, k: int) -> Tensor:
        return torch.exp(video[i] @ texts[j, k] / TAU)

    total, of_all = torch.zeros(()), 0.0
    for i in clips:
        best = max(float(weights[i, k]) for k in there[i])
        if best == 0:
            continue
        positive = sum(float(weights[i, k]) / best * e(i, i, k) for k in there[i])
        negatives = sum(e(i, j, k) for j in clips if j != i for k in there[j])
        negatives += sum(e(j, i, k) for j in clips if j != i for k in there[i])
        total = total + best * (torch.log(positive + negatives) - torch.log(positive))
        of_all += best
    return total / of_all if of_all else total


@given(seed=st.integers(0, 2**16), clips=st.integers(1, 6), candidates=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_weights_enter_the_positive_sum_and_the_mean_over_clips(seed, clips, candidates):
    video, texts, valid, weights = drawn(clips, candidates, seed)
    found = mil_nce(video, texts, TAU, valid=valid, weights=weights)
    wanted = naive_weighted(video, texts, valid, weights)
    torch.testing.assert_close(found, wanted, check_dtype=False)


@pytest.mark.parametrize("form", [paper_form, release_form, symmetric_form])
def test_equal_weights_change_no_bit(form):
    video, texts, valid, _ = drawn(6, 3, 0)
    plain = mil_nce(video, texts, TAU, valid=valid, form=form)
    ones = torch.ones(6, 3, dtype=torch.float64)
    assert torch.equal(mil_nce(video, texts, TAU, valid=valid, form=form, weights=ones), plain)
    half = mil_nce(video, texts, TAU, valid=valid, form=form, weights=ones / 2)
    torch.testing.assert_close(half, plain)


@pytest.mark.parametrize("form", [paper_form, release_form, symmetric_form])
def test_with_weights_blocks_give_the_plain_loss_and_its_gradients(form):
    video, texts, valid, weights = drawn(9, 3, 1)
    results = []
    for max_scores in (1, 60, 10**6):
        inputs = video.clone().requires_grad_(), texts.clone().requires_grad_()
        given = {"valid": valid, "weights": weights, "form": form, "max_scores": max_scores}
        loss = mil_nce(*inputs, TAU, **given)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for other in results[:2]:
        for left, right in zip(other, results[2], strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("form", [paper_form, release_form, symmetric_form])
def test_the_weighted_loss_has_the_gradient_of_small_moves(form):
    video, texts, valid, weights = drawn(4, 3, 3)
    inputs = video.requires_grad_(), texts.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, t: mil_nce(v, t, TAU, valid=valid, form=form, weights=weights), inputs
    )


@pytest.mark.parametrize("form", [paper_form, release_form, symmetric_form])
def test_where_every_candidate_is_dropped_loss_and_gradient_are_zero(form):
    video, texts = unit(4, 8).requires_grad_(), unit(4, 2, 8).requires_grad_()
    loss = mil_nce(video, texts, TAU, form=form, weights=torch.zeros(4, 2))
    loss.backward()
    assert loss.item() == 0
    assert not video.grad.any() and not texts.grad.any()


def test_a_dropped_candidate_moves_away_from_other_videos_and_not_towards_its_own():
    video, texts = torch.eye(3, 8).double(), unit(3, 2, 8, seed=1).requires_grad_()
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    (gradient,) = torch.autograd.grad(mil_nce(video, texts, TAU, weights=weights), texts)
    along = gradient @ video.T  # (3, 2, 3): the slope as a candidate moves to a video
    assert along[0, 1, 0] == 0 and (along[0, 1, 1:] > 0).all()
    assert along[0, 0, 0] < 0 and (along[0, 0, 1:] > 0).all()


@given(
    seed=st.integers(0, 2**16),
    clips=st.integers(1, 6),
    candidates=st.integers(1, 4),
    max_scores=st.sampled_from([1, 30, 2**20]),
)
@settings(max_examples=25, deadline=None)
def test_agreement_is_the_mean_probability_to_choose_the_own_clip(
    seed, clips, candidates, max_scores
):
    video, texts, valid, _ = drawn(clips, candidates, seed)
    found = agreement(video, texts, TAU, valid=valid, max_scores=max_scores)
    there = [j for j in range(clips) if valid[j].any()]
    for i in range(clips):
        for k in range(candidates):
            wins = [
                1 / (1 + math.exp(float((video[j] - video[i]) @ texts[i, k]) / TAU))
                for j in there
                if j != i
            ]
            wanted = (sum(wins) / len(wins) if wins else 1.0) if valid[i, k] else 0.0
            assert float(found[i, k]) == pytest.approx(wanted)


def test_agreement_is_half_where_nothing_is_known_and_needs_no_gradient():
    video, texts = unit(1, 8).expand(5, 8), unit(5, 3, 8).requires_grad_()
    found = agreement(video, texts, TAU, valid=torch.ones(5, 3, dtype=torch.bool))
    torch.testing.assert_close(found, torch.full((5, 3), 0.5), check_dtype=False)
    assert not found.requires_grad


def test_candidates_are_dropped_below_the_least_agreement_or_weighted_above_it():
    found = torch.tensor([[0.2, 0.5, 0.8, 1.0]])
    assert weights_of(found, kind="drop", least=0.8).tolist() == [[0, 0, 1, 1]]
    weighted = weights_of(found, kind="weight", least=0.5)
    torch.testing.assert_close(weighted, torch.tensor([[0, 0, 0.6, 1.0]]))


BATCH_OF_8192 = """
import re
from pathlib import Path
from tests.test_losses import TAU, mil_nce, unit
def peak():  # kB; unlike ru_maxrss, without that of the process which started this one
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
video, texts = unit(8192, 16).float(), unit(8192, 5, 16, seed=1).float()
video.requires_grad_()
before = peak()
mil_nce(video, texts, TAU).backward()
assert video.grad.isfinite().all()
print(peak() - before)
"""


@pytest.mark.slow
def test_a_global_batch_of_8192_with_5_texts_takes_bounded_memory():
    """The scores alone, held at once in both directions, would be 2.7 GB, and as much again.

    What is freed goes back to the system at once here: left alone, glibc's malloc may hold on to
    ten times what is in use.
    """
    at_once = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", BATCH_OF_8192]
    run = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=os.environ | at_once,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0 < int(run.stdout) < 300_000  # kB
