"""A value that is not finite stops a training; jumps of the loss are reported."""

import json
import random

import pytest

from vatt.errors import VattError
from vatt.training.loop import ENOUGH, SpikeWatch, check_finite


def test_a_number_that_is_none_is_named_with_its_step_and_clips(tmp_path):
    clips = [f"clip-{number}" for number in range(12)]
    check_finite({"loss": 1.0}, step=3, clip_ids=clips, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    numbers = {"loss": 1.0, "gradient_norm": float("inf")}
    with pytest.raises(VattError, match=r"step 3: gradient_norm = inf.*clip-0.* and 4 more in"):
        check_finite(numbers, step=3, clip_ids=clips, folder=tmp_path)
    told = json.loads((tmp_path / "not-finite.json").read_text())
    assert told == {"step": 3, "numbers": {"loss": "1.0", "gradient_norm": "inf"}, "clips": [clips]}


def test_a_spike_stands_eight_typical_deviations_above_the_median():
    watch = SpikeWatch()
    for loss in (4.0, 5.0, 6.0) * 20:
        watch.is_spike(loss)
    # of the last 64 losses: median 5, median distance from it 1
    assert watch.limit() == pytest.approx(5 + 8 * 1.4826)


def test_only_a_jump_is_a_spike():
    chance, watch = random.Random(0), SpikeWatch()
    falling = [8 * 0.99**step + chance.gauss(0, 0.05) for step in range(400)]
    assert not any(watch.is_spike(loss) for loss in falling)
    assert watch.is_spike(falling[-1] + 3)
    assert not watch.is_spike(falling[-1])


def test_few_or_flat_losses_make_no_spike():
    watch = SpikeWatch()
    assert not any(watch.is_spike(loss) for loss in [1.0] * (ENOUGH - 1) + [50.0])
    watch = SpikeWatch()
    assert not any(watch.is_spike(loss) for loss in [1.0] * ENOUGH + [1.1])
