"""What a training tells of its speed and cost, against numbers worked out by hand."""

import pytest
import torch

from tests.training import tiny
from vatt.training import telemetry
from vatt.training.telemetry import Meter, Work, pretraining_work


def test_the_work_of_a_step_is_three_forward_passes_over_the_kept_tokens():
    params = tiny.pretrain_params(batch_size=10, drop_rate=0.5, text_candidates=2)
    work = pretraining_work(tiny.model_params(), params)
    # video 2 x 2 x 2 patches, audio 8, half of each kept; two texts of four words
    assert work.tokens == 10 * (4 + 4 + 2 * 4)

    def tower(tokens, patch_values):
        dense = 4 * 16 * 16 + 2 * 16 * 32  # of one token: q, k, v, out and the MLP
        return (
            2 * tokens * patch_values * 16 + 2 * (tokens + 1) * dense + 4 * 16 * (tokens + 1) ** 2
        )

    heads = 2 * (16 * 12 + 12 * 12 + 12 * 8 + 16 * 12 + 16 * 8)
    forward = tower(4, 2 * 8 * 8 * 3) + tower(4, 16) + 2 * tower(4, 0) + heads
    assert work.flops == pytest.approx(10 * 3 * forward)


def test_a_reading_counts_the_steps_since_the_last_and_not_what_was_apart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(telemetry, "peak_flops", lambda precision: 50.0)
    meter = Meter(Work(samples=8, tokens=80, flops=100.0, precision="fp32"))
    for _ in range(4):
        with meter.waiting():
            now[0] += 1
        now[0] += 3
        meter.steps += 1
    with meter.apart():
        now[0] += 1000
    numbers = meter.read()
    assert numbers["samples_per_second"] == 2 and numbers["tokens_per_second"] == 20
    assert numbers["tflops_per_second"] == 25e-12 and numbers["mfu"] == 0.5
    assert numbers["data_wait_share"] == 0.25
    now[0] += 2
    meter.steps += 1
    assert meter.read()["samples_per_second"] == 4


def test_energy_is_what_the_processors_counter_gained_also_across_its_end(monkeypatch, tmp_path):
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core")):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name)
        (tmp_path / zone / "energy_uj").write_text("9000000")
        (tmp_path / zone / "max_energy_range_uj").write_text("10000000")
    monkeypatch.setattr(telemetry, "RAPL", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    joules = telemetry.energy_counter()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("9500000")
    assert joules() == 0.5
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1500000")  # it began again
    assert joules() == 2.0


def test_nobody_counts_energy_where_there_is_no_counter(monkeypatch, tmp_path):
    monkeypatch.setattr(telemetry, "RAPL", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert telemetry.energy_counter()() is None


def test_a_peak_is_measured_without_drawing_a_random_number():
    before = torch.get_rng_state()
    assert telemetry.measured_flops("fp32") > 1e9
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "memory", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("Tesla T4", 14.6, "t4"),
        ("Some GPU of tomorrow", 500, None),
    ],
)
def test_gpus_are_known_by_their_drivers_names(name, memory, known):
    found = telemetry.named_like(name, memory)
    assert (found.name if found else None) == known
