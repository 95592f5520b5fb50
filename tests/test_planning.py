"""vattctl plan, and what pretrain says before it starts."""

import json
from dataclasses import replace

import pytest

from tests.test_architecture import ROOT
from tests.test_cli import project, settings, vattctl  # noqa: F401 - a fixture
from vatt.config import load_params
from vatt.data.clips.ledger import Entry, write_ledger
from vatt.data.clips.samples import INDEX, IndexRow, check_clips, write_index
from vatt.data.clips.storage import Storage
from vatt.errors import DataError
from vatt.files import inside
from vatt.process import FOLDER
from vattctl.dvc import STAGES
from vattctl.params import edit
from vattctl.planning import plan_run


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
    huge = ("pretrain", "--size", "base", "--set", "pretrain.batch_size=8192")
    done = vattctl(project, *huge, "--dry-run")
    assert done.returncode == 2
    assert "try --set machine.micro_batch_size=" in done.stderr and "--force" in done.stderr
    assert "params.yaml:" not in done.stderr  # nothing was changed yet
    forced = vattctl(project, *huge, "--force", "--", "--hostfile", "nowhere")
    assert "nowhere does not exist" in forced.stderr  # the next check refuses it
    assert "are needed" not in forced.stderr


def test_only_a_pretraining_that_may_take_hours_is_tried_for_a_forecast(project):  # noqa: F811
    with inside(project):
        FOLDER.mkdir()
        short = plan_run(edit({}), ("pretrain",))
        assert (short[-1].seconds, short[-1].source) == (None, "within an hour")
        assert not (FOLDER / "trial.json").exists()
        long = plan_run(edit({("pretrain", "steps"): 1000}), ("pretrain",))
        assert long[-1].source == "forecast" and (FOLDER / "trial.json").exists()


def test_a_missing_hostfile_is_refused_before_anything_is_written(project):  # noqa: F811
    before = settings(project)
    done = vattctl(project, "pretrain", "--", "--hostfile", "nowhere")
    assert done.returncode == 2 and "nowhere does not exist" in done.stderr
    assert settings(project) == before


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("command", "batch", "said"),
    [
        ("pretrain", 64, "pretrain.batch_size 64 is not divisible by 3 processes"),
        ("repro", 63, "finetune.tasks.action.batch_size 32 is not divisible by 3 processes"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_before_anything_runs(
    project, command, batch, said, dry  # noqa: F811
):  # fmt: skip
    before = settings(project)
    wanted = (f"pretrain.batch_size={batch}", "machine.processes=3")
    done = vattctl(project, command, *(word for one in wanted for word in ("--set", one)), *dry)
    assert done.returncode == 2 and said in done.stderr and "Running stage" not in done.stderr
    assert settings(project) == before


def row(number, split, **labels):
    return IndexRow(
        f"key{number}", f"clip{number}", f"m{number}", split, "0.tar", labels,
        (0, 1), (0, 1), (0, 1), 10, 8, 8, 100,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("train", {})] * 5, ["0 clips of the test split"]),
        ([("train", {}), ("test", {}), ("test", {})], ["1 clips of the train split"]),
        (
            [("train", {"a": "x"}), ("train", {"a": "x"}), ("test", {"a": "x"}), ("test", {})],
            ["task t: 1 values of label 'a' in the train split"],
        ),
        (
            [("train", {"a": "x"}), ("train", {"a": "y"}), ("test", {}), ("test", {})],
            ["task t: no test clip with label 'a'"],
        ),
        ([("train", {"a": "x"}), ("train", {"a": "y"}), ("test", {"a": "x"}), ("test", {})], []),
    ],
)
def test_what_later_stages_lack_is_refused_before_the_pretraining(tmp_path, rows, words):
    params = load_params(ROOT / "params.yaml")
    task = params.finetune.tasks["action"].model_copy(update={"label": "a"})
    params = params.model_copy(
        update={
            "paths": params.paths.model_copy(update={"shards": tmp_path}),
            "finetune": params.finetune.model_copy(update={"run": ("t",), "tasks": {"t": task}}),
        }
    )
    shown = [row(number, split, **labels) for number, (split, labels) in enumerate(rows)]
    write_index(tmp_path / INDEX, shown, storage=Storage(10, 100, "h264", "flac"))
    if not words:
        check_clips(params, STAGES)
        return
    with pytest.raises(DataError) as error:
        check_clips(params, STAGES)
    assert error.value.exit_code == 3
    assert all(word in str(error.value) for word in words)
    assert "data.test_share" in str(error.value)


@pytest.mark.parametrize(
    ("sound", "spoken", "words"),
    [
        (False, (), "no train clip has a picture with sound or captions"),
        (False, (0, 1, 2, 3), ""),
        (True, (), "text will not be learned; add captions, or set pretrain.mil_nce_weight: 0"),
        (True, (0, 1), "no test clip has captions: retrieval by text will not be measured"),
        (True, (0, 2), ""),
    ],
)
def test_captions_that_are_missing_are_named_before_the_pretraining(
    tmp_path, caplog, sound, spoken, words
):
    params = load_params(ROOT / "params.yaml")
    paths = {"shards": tmp_path, "preprocess_ledger": tmp_path / "ledger.jsonl"}
    none = params.finetune.model_copy(update={"run": ()})
    params = params.model_copy(
        update={"paths": params.paths.model_copy(update=paths), "finetune": none}
    )
    rows = [row(k, split) for k, split in enumerate(("train", "train", "test", "test"))]
    rows = rows if sound else [replace(one, audio=None) for one in rows]
    write_index(tmp_path / INDEX, rows, storage=Storage(10, 100, "h264", "flac"))
    write_ledger(
        tmp_path / "ledger.jsonl",
        [Entry(f"clip{k}", "ok", "preprocess", has=("text",) * (k in spoken)) for k in range(4)],
    )
    if words.startswith("no train"):
        with pytest.raises(DataError, match=words):
            check_clips(params, STAGES)
        return
    check_clips(params, STAGES)
    assert words in caplog.text and bool(caplog.text) == bool(words)
