"""vattctl plan, and what pretrain says before it starts."""

import json

from tests.test_cli import project, settings, vattctl  # noqa: F401 - a fixture


def test_plan_for_a_named_gpu_is_json(project):  # noqa: F811
    done = vattctl(
        project, "plan", "--device", "rtx4090", "--price", "0.5", "--batch", "512", "--json"
    )
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["version"] == 1 and found["source"] == "formula"
    one = found["as_set"]
    parts = one["memory_bytes"]
    assert sum(value for name, value in parts.items() if name != "total") == parts["total"]
    assert one["cost"] == 0.5 * one["device_hours"]
    assert settings(project)["pretrain"]["batch_size"] == 64  # nothing was written


def test_plan_is_readable_and_ends_with_code_2_where_nothing_fits(project):  # noqa: F811
    asked = ("plan", "--device", "t4", "--size", "large", "--batch", "4096")
    done = vattctl(project, *asked)
    assert done.returncode == 2
    assert "too much" in done.stdout and "to use it: vattctl pretrain --set" in done.stdout
    assert "\x1b" not in done.stdout


def test_an_unknown_device_is_refused_with_the_known_ones(project):  # noqa: F811
    done = vattctl(project, "plan", "--device", "h1000")
    assert done.returncode == 2 and "known devices: " in done.stderr and "h100-80gb" in done.stderr


def test_pretrain_tells_its_memory_and_refuses_what_cannot_fit(project):  # noqa: F811
    done = vattctl(project, "pretrain", "--dry-run")
    assert "forecast: " in done.stderr and "for each process" in done.stderr
    huge = ("pretrain", "--size", "base", "--set", "pretrain.batch_size=8192", "--dry-run")
    done = vattctl(project, *huge)
    assert done.returncode == 2
    assert "try --set machine.micro_batch_size=" in done.stderr and "--force" in done.stderr
    assert "params.yaml:" not in done.stderr  # nothing was changed yet
    assert "are needed" not in vattctl(project, *huge, "--force").stderr
