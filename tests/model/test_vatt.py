"""What the assembled model promises, in both recipes and both backbones."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.small import small_inputs, small_params, spectrogram_params
from vatt import checkpoint
from vatt.errors import SettingsError
from vatt.losses import pretraining_loss
from vatt.model.patches import draw_kept
from vatt.model.vatt import VATT, Classifier

MODALITIES = ("video", "audio", "text")
KINDS = list(itertools.product(["paper", "release"], ["specific", "agnostic"]))


def build(recipe="paper", backbone="specific", **changes):
    torch.manual_seed(0)
    return checkpoint.build(small_params(recipe=recipe, backbone=backbone, **changes)).eval()


@pytest.mark.parametrize(("recipe", "backbone"), KINDS)
def test_embeddings_are_unit_vectors_of_the_common_spaces(recipe, backbone):
    out = build(recipe, backbone)(*small_inputs())
    width = 14 if (recipe, backbone) == ("release", "agnostic") else 12
    shapes = {
        "video_va": (3, 8),
        "audio_va": (3, 8),
        "video_vt": (3, 6),
        "text_vt": (3, 2, 6),
        "video_features": (3, width),
        "audio_features": (3, width),
        "text_features": (3, 2, width),
    }
    for name, shape in shapes.items():
        assert getattr(out, name).shape == shape
        assert getattr(out, name).dtype == torch.float32
    for name in ("video_va", "audio_va", "video_vt", "text_vt"):
        norms = getattr(out, name).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


@given(
    kind=st.sampled_from(KINDS),
    calls=st.permutations(["video", "audio", "text"]).flatmap(
        lambda order: st.lists(st.booleans(), min_size=2, max_size=2).map(
            lambda cuts: [list(part) for part in split_where(order, cuts)]
        )
    ),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_any_order_and_choice_of_modalities_gives_the_same(kind, calls, seed):
    model = build(*kind)
    inputs = dict(zip(MODALITIES, small_inputs(seed=seed), strict=True))
    together = model(**inputs)
    seen = set()
    for names in calls:  # one call after another, each with some of them in some order
        out = model(**{name: inputs[name] for name in names})
        assert {name.split("_")[0] for name in out.named()} == set(names)
        for name, value in out.named().items():
            seen.add(name)
            torch.testing.assert_close(value, getattr(together, name))
    assert seen == together.named().keys() and len(seen) == 7


def split_where(order, cuts):
    """Parts of a list of three, cut after its first and second entry where `cuts` says so."""
    places = [0, *(place for place, cut in enumerate(cuts, start=1) if cut), len(order)]
    return [order[start:stop] for start, stop in itertools.pairwise(places)]


@given(
    kind=st.sampled_from(KINDS),
    words=st.integers(1, 6),
    pads=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_padding_text_changes_nothing(kind, words, pads, seed):
    model = build(*kind)
    text = small_inputs(seed=seed)[2][..., :words]
    if kind == ("release", "agnostic"):  # it has learned positions, as many as words
        pads = min(pads, 6 - words)
    padded = torch.nn.functional.pad(text, (0, pads))
    ours, theirs = model(text=padded), model(text=text)
    # Pads alone differ: all scores are equally low, so that AGG hears each of them.
    valid = (text != 0).any(-1)
    torch.testing.assert_close(ours.text_vt[valid], theirs.text_vt[valid])
    torch.testing.assert_close(ours.text_features[valid], theirs.text_features[valid])


def test_more_words_than_learned_positions_are_refused():
    model = build("release", "agnostic")
    with pytest.raises(SettingsError, match="words are 7; allowed are 1 to 6"):
        model(text=torch.ones(1, 2, 7, dtype=torch.long))


@pytest.mark.parametrize(("recipe", "backbone"), KINDS)
def test_text_of_pads_alone_gives_a_finite_vector(recipe, backbone):
    out = build(recipe, backbone)(text=torch.zeros(1, 2, 6, dtype=torch.long))
    assert out.text_vt.isfinite().all()


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**16), step=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_drop_token_0_equals_none(kind, seed, step):
    model = build(*kind)
    video, audio, _ = small_inputs(seed=seed)
    kept = {
        f"kept_{name}": draw_kept(number, 0.0, seed=seed, step=step, samples=[0, 1, 2])
        for name, number in (
            ("video", model.token_counts["video"]),
            ("audio", model.token_counts["audio"]),
        )
    }
    dropped, whole = model(video, audio, **kept), model(video, audio)
    for name in ("video_va", "audio_va", "video_vt", "video_features", "audio_features"):
        torch.testing.assert_close(getattr(dropped, name), getattr(whole, name))


def test_a_dropped_token_does_not_matter():
    model = build()
    video, _, _ = small_inputs()
    kept = torch.tensor([[0, 3, 5]]).expand(3, -1)
    changed = video.clone()
    changed[:, :2, :16, 16:] += 1.0  # voxel 1 in (t, h, w) order
    torch.testing.assert_close(
        model(video=changed, kept_video=kept).video_va, model(video=video, kept_video=kept).video_va
    )
    assert not torch.allclose(model(video=changed).video_va, model(video=video).video_va)


@given(seed=st.integers(0, 2**16), clips=st.integers(1, 4), kept=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_agnostic_equals_specific_with_weights_tied_by_hand(seed, clips, kept):
    agnostic, specific = build(backbone="agnostic"), build(backbone="specific")
    specific.load_state_dict(agnostic.state_dict())  # each tower gets the shared encoder's weights
    assert specific.video.encoder is not specific.audio.encoder
    inputs, places = small_inputs(clips, seed=seed), torch.arange(kept).expand(clips, -1)
    left, right = (model(*inputs, kept_video=places) for model in (agnostic, specific))
    assert left.named().keys() == right.named().keys()
    for name, value in left.named().items():
        torch.testing.assert_close(value, getattr(right, name))


def test_agnostic_towers_share_one_encoder():
    model = build(backbone="agnostic")
    assert model.video.encoder is model.audio.encoder is model.text.encoder
    once = sum(parameter.numel() for parameter in model.parameters())
    encoder = sum(parameter.numel() for parameter in model.video.encoder.parameters())
    assert sum(value.numel() for value in model.state_dict().values()) > once + 2 * encoder


@given(
    frames=st.integers(1, 7),
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    samples=st.integers(1, 150),
    recipe=st.sampled_from(["paper", "release"]),
)
@settings(max_examples=25, deadline=None)
def test_any_size_of_input_is_embedded(frames, height, width, samples, recipe):
    model = build(recipe)
    out = model(torch.rand(1, frames, height, width, 3), torch.rand(1, samples))
    assert out.video_va.isfinite().all() and out.audio_va.isfinite().all()


def test_a_partial_patch_is_filled_with_zeros():
    model = build()
    video, audio, _ = small_inputs()
    cropped, shortened = video[:, :3, :30, :20], audio[:, :50]
    filled, silent = torch.zeros_like(video), torch.zeros_like(audio)
    filled[:, :3, :30, :20], silent[:, :50] = cropped, shortened
    torch.testing.assert_close(model(video=cropped).video_va, model(video=filled).video_va)
    torch.testing.assert_close(model(audio=shortened).audio_va, model(audio=silent).audio_va)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"video": torch.rand(2, 4, 32, 32)}, r"4 dimensions, \(2, 4, 32, 32\); allowed are 5"),
        ({"video": torch.rand(2, 4, 32, 32, 4)}, "dimension 4, channels, is 4; allowed is 3"),
        ({"video": torch.rand(2, 0, 32, 32, 3)}, "dimension 1, frames, is 0; allowed is 1 or more"),
        ({"audio": torch.rand(2, 64, 1)}, r"3 dimensions, \(2, 64, 1\); allowed are 2"),
        ({"audio": torch.rand(2, 0)}, "dimension 1, samples, is 0; allowed is 1 or more"),
        ({"text": torch.ones(2, 6).long()}, r"2 dimensions, \(2, 6\); allowed are 3"),
        ({"text": ["pour the sauce"]}, "is a list; allowed is a tensor"),
        ({"text": torch.ones(2, 2, 6)}, "holds float32; allowed are word ids"),
        ({"video": torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8)}, "uint8; allowed are floats"),
    ],
)
def test_an_impossible_input_says_what_came_and_what_is_allowed(inputs, message):
    with pytest.raises(SettingsError, match=message):
        build()(**inputs)


def test_a_model_of_the_release_is_never_built_as_the_papers_by_mistake():
    params = small_params(recipe="release")
    with pytest.raises(SettingsError, match="recipe is release") as error:
        VATT(params)
    assert "vatt.checkpoint.build" in error.value.hint
    with pytest.raises(SettingsError, match="recipe is release"):
        Classifier(params, modality="video", num_classes=2, head_dropout=0.0)


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_a_spectrogram_model_takes_frames_and_mel_bins(recipe):
    model = checkpoint.build(spectrogram_params(recipe=recipe)).eval()
    assert model.token_counts["audio"] == 8
    assert model(audio=torch.rand(2, 32, 20)).audio_va.shape == (2, 8)
    assert model(audio=torch.rand(2, 50, 18)).audio_va.shape == (2, 8)
    biases = [name for name, _ in model.audio.encoder.named_parameters() if "qkv.bias" in name]
    assert bool(biases) == (recipe == "paper")


def test_spectrogram_positions_are_correct_unless_the_weights_say_otherwise():
    def order(scrambled):
        changes = {"release": {"word_dim": 10, "post_dim": 14, "scrambled_spectrogram": scrambled}}
        model = checkpoint.build(spectrogram_params(recipe="release", **changes))
        positions = model.audio.embed.positions
        positions.norm = torch.nn.Identity()
        with torch.no_grad():
            positions.temporal[:] = torch.arange(2.0)[:, None]
            positions.spectral[:] = 10 * torch.arange(4.0)[:, None]
        return positions((2, 4))[:, 0].tolist()

    assert order(False) == [0, 10, 20, 30, 1, 11, 21, 31]
    assert order(True) == [0, 1, 10, 11, 20, 21, 30, 31]


def test_batch_norm_of_texts_sees_valid_ones_only():
    model = build().train()
    features = model.encode(*small_inputs())
    has_text = torch.tensor([[True, True], [False, False], [True, False]])
    before = model.heads.text_to_vt.norm.running_mean.clone()
    whole = model.project(features, {"text": has_text}).text_vt
    valid_only = model.heads.text_to_vt(features["text"][has_text])
    torch.testing.assert_close(whole[has_text], torch.nn.functional.normalize(valid_only, dim=-1))
    after = model.heads.text_to_vt.norm.running_mean.clone()
    assert not torch.equal(before, after)
    nothing = model.project(features, {"text": torch.zeros_like(has_text)}).text_vt
    assert torch.equal(model.heads.text_to_vt.norm.running_mean, after)
    assert nothing.isfinite().all()


@pytest.mark.parametrize(("recipe", "backbone"), KINDS)
def test_a_batch_without_a_valid_clip_trains_nothing_and_breaks_nothing(recipe, backbone):
    model = build(recipe, backbone).train()
    inputs = small_inputs()
    nobody = torch.zeros(3, dtype=torch.bool)
    has_text = torch.zeros(3, 2, dtype=torch.bool)
    losses = pretraining_loss(
        model.project(model.encode(*inputs), {"text": has_text}),
        {"video": nobody, "audio": nobody, "text": has_text},
        temperature=0.07,
        mil_nce_weight=1.0,
    )
    losses.total.backward()
    assert losses.total.item() == 0
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize(("recipe", "backbone"), KINDS)
def test_one_batch_can_be_learnt(recipe, backbone):
    model = build(recipe, backbone, dropout=0.0).train()
    video, audio, text = small_inputs(6)
    text[-1] = text[-1].clamp(min=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    everyone = torch.ones(6, dtype=torch.bool)
    history = []
    for _ in range(40):
        has_text = (text != 0).any(-1)
        losses = pretraining_loss(
            model.project(model.encode(video, audio, text), {"text": has_text}),
            {"video": everyone, "audio": everyone, "text": has_text},
            temperature=0.07,
            mil_nce_weight=1.0,
        )
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(losses.total.item())
    assert history[-1] < 0.2 * history[0]


def test_under_bf16_autocast_answers_are_fp32():
    with torch.autocast("cpu", torch.bfloat16):
        out = build()(*small_inputs())
    exact = build()(*small_inputs())
    assert out.video_va.dtype == out.text_features.dtype == torch.float32
    torch.testing.assert_close(out.video_va, exact.video_va, rtol=0.1, atol=0.05)
