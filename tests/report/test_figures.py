"""Which pictures the report has, from made-up arrays with known answers."""

import re

import numpy as np

from vatt.report.figures import (
    _input_cosines,
    confusions,
    expert_shares,
    node_activations,
    similarity_densities,
    space_maps,
)
from vatt.report.inputs import Inputs


def insides(width=6):
    generator = np.random.default_rng(0)
    clips = np.asarray([f"clip-{i}" for i in range(5)])
    return {
        "input/video": generator.normal(size=(5, 6)),
        "input/video/clip_ids": clips,
        "input/text": generator.normal(size=(4, width)),
        "input/text/clip_ids": clips[[4, 2, 1, 0]],
        "nodes/video": np.asarray([[0.0, 0.2, 0.1], [0.4, 0.0, 0.2]]),
        "nodes/text": np.asarray([[0.3, 0.0, 0.1], [0.1, 0.2, 0.0]]),
    }


def test_input_cosines_pair_each_clip_with_itself():
    arrays = insides()
    table = _input_cosines(arrays, "text")
    shared = ["clip-0", "clip-1", "clip-2", "clip-4"]
    for i, one in enumerate(shared):
        for j, other in enumerate(shared):
            text = arrays["input/text"][list(arrays["input/text/clip_ids"]).index(one)]
            video = arrays["input/video"][int(other[-1])]
            cosine = text @ video / np.linalg.norm(text) / np.linalg.norm(video)
            assert abs(table[i, j] - cosine) < 1e-12


def test_tokens_of_different_widths_have_no_cosine():
    assert _input_cosines(insides(width=4), "text") is None
    titles = [p.title for p in similarity_densities(Inputs(arrays={"insides": insides()}))]
    assert titles == ["Text and video, input space"]


def test_nodes_of_a_shared_encoder_have_one_order_and_those_of_separate_encoders_their_own():
    arrays = {"insides": insides()}
    shared = node_activations(Inputs(arrays=arrays, model={"model": {"backbone": "agnostic"}}))
    own = node_activations(Inputs(arrays=arrays, model={"model": {"backbone": "specific"}}))
    assert [p.title for p in shared] == ["MLP nodes, video", "MLP nodes, text"]
    assert "by activation on video" in shared[1].svg
    assert "by activation<" in own[1].svg
    cells = [re.findall(r' d="([^"]*)"', picture.svg) for picture in (*shared, *own)]
    assert cells[0] == cells[2]  # the chart of video is the same in both orders
    assert cells[1] != cells[3]
    assert node_activations(Inputs()) == []


def test_two_modalities_are_shown_before_and_after_the_encoder():
    generator = np.random.default_rng(0)
    clips = np.asarray([f"clip-{i}" for i in range(9)])
    inner = {f"input/{name}": generator.normal(size=(9, 6)) for name in ("video", "text")}
    inner |= {f"input/{name}/clip_ids": clips for name in ("video", "text")}
    features = {f"va/{name}": generator.normal(size=(9, 4)) for name in ("video", "audio")}
    found = space_maps(Inputs(arrays={"insides": inner, "features": features}), clips=8)
    titles = [picture.title for picture in found]
    assert titles == ["Picture and words, input space", "Picture and sound, output space"]
    assert [picture.svg.count("<circle") for picture in found] == [16, 16]
    assert [name for _, name in found[1].legend] == ["picture", "sound"]


def test_pairs_of_queries_that_share_a_clip_are_partners():
    own = np.array([0, 0, 1, 2])
    table = np.where(own[:, None] == np.arange(3), 0.9, 0.1)
    arrays = {"similarities": {"text_to_video": table, "text_to_video/own": own}}
    (picture,) = similarity_densities(Inputs(arrays=arrays))
    assert "same clip mean 0.90, different clips mean 0.10" in picture.alt


def test_of_many_classes_the_worst_are_shown_and_the_rest_together():
    counts = np.diag(np.full(40, 9))
    counts[3, 5], counts[7, 3], counts[20, 39] = 6, 5, 4
    arrays = {"confusion": counts, "classes": np.array([f"class {i}" for i in range(40)])}
    (picture,) = confusions(Inputs(arrays={"predictions-many-pretrained": arrays}))
    assert picture.svg.count("<rect") == 17 * 17
    assert "class 7 predicted as class 3: 5 (36 %)" in picture.svg
    assert f"of {counts.sum()} clips" in picture.alt
    assert "The 16 of 40 classes" in picture.caption


def test_experts_have_a_chart_for_each_block_and_say_their_shares():
    shares = {"video": [[0.5, 0.5, 0.0]] * 2, "text": [[0.0, 0.25, 0.75]] * 2}
    metrics = {"evaluate": {"experts": {"pretrained": {"shares": shares}}}}
    pictures = expert_shares(Inputs(metrics=metrics))
    assert [one.title for one in pictures] == ["Experts, block 1 of 2", "Experts, block 2 of 2"]
    assert "text 0 %, 25 %, 75 %" in pictures[0].alt
    assert pictures[0].svg.count('class="cell"') == 6
    many = {"video": [[1.0]] * 12}
    metrics = {"evaluate": {"experts": {"pretrained": {"shares": many}}}}
    titles = [one.title for one in expert_shares(Inputs(metrics=metrics))]
    assert len(titles) == 6 and titles[-1] == "Experts, block 12 of 12"
    assert expert_shares(Inputs()) == []
