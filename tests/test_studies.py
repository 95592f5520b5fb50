"""The paper's tables as runs: every cell has one, shared runs are one, and settings are valid."""

from pathlib import Path

import pytest

from vatt.beyond import Beyond, beyond
from vatt.config import known_keys, load_params
from vatt.paper import paper_tables
from vatt.studies import (
    BASE,
    DEMO,
    FACTOR,
    PAPER,
    SEEDED,
    SEEDS,
    StudyRun,
    studies,
    study,
    with_seed,
)

TABLES = {table.number: table for table in paper_tables()}
OURS = {
    1: 5,
    2: 2,
    3: 2,
    4: 2,
    5: 6,
    6: 6,
    7: 0,
    8: 3,
    9: 6,
    10: 5,
}  # rows of the paper's own model


@pytest.mark.parametrize("number", range(1, 11))
def test_at_the_paper_s_size_every_row_of_its_own_models_is_answered(number: int) -> None:
    found = study(number, PAPER)
    rows = {row for row, _ in found.answers}
    assert len(rows) == OURS[number]
    for (row, column), answer in found.answers.items():
        assert column in TABLES[number].columns
        assert answer.run in {run.name for run in found.runs}
        published = TABLES[number].rows[row].values[TABLES[number].columns.index(column)]
        assert published is None or isinstance(published, int | float)


@pytest.mark.parametrize("scale", [DEMO, PAPER], ids=lambda scale: scale.name)
def test_a_run_that_tables_share_is_the_same_in_each(scale) -> None:
    known = {}
    for one in studies(scale):
        for run in one.runs:
            before = known.setdefault(run.name, run)
            assert (before.settings, before.start, before.data, before.tasks) == (
                run.settings,
                run.start,
                run.data,
                run.tasks,
            )
            assert run.start is None or run.start in known  # weights come first


def test_scaled_down_the_tables_need_fifteen_runs_of_which_fourteen_pre_train() -> None:
    runs = {run.name: run for one in studies(DEMO) for run in one.runs}
    assert len(runs) == 15
    assert [name for name, run in runs.items() if run.start is not None] == ["fine-tuning"]
    assert set(SEEDED) <= runs.keys()


def test_frames_and_sizes_are_the_paper_s_by_one_factor_and_patches_as_they_are() -> None:
    runs = {run.name: run.settings for run in study(9, DEMO).runs}
    for name, settings in runs.items():
        if name != BASE:
            frames, size = (int(part) for part in name.split("-")[0].split("x")[:2])
            assert abs(settings["model.video.frame_size"] - size / FACTOR) <= 0.5
            assert 0 <= frames / FACTOR - settings["model.video.frames"] < 4  # a patch's depth
            patch = [int(part) for part in name.split("-")[1].split("x")]
            assert settings["model.video.patch"] == patch
    tasks = {task.name: task.settings for task in study(6, DEMO).runs[-1].tasks}
    assert len(tasks) == 6  # the cells that the paper reports
    assert tasks["32x320-drop-75"] == {
        "frames": 8,
        "frame_size": 91,
        "drop_rate": 0.75,
        "augmentation": {"crop_area": [1.0, 1.0]},  # of 72 pixels, enlarged
    }


def test_the_scaled_down_base_is_the_model_of_the_demo() -> None:
    demo = load_params(Path(__file__).parents[1] / "presets" / "demo.yaml")
    assert (DEMO.frames(32), DEMO.size(224)) == (
        demo.model.video.frames,
        demo.model.video.frame_size,
    )
    assert tuple(DEMO.crop(224)["crop_area"]) == demo.pretrain.augmentation.crop_area


def test_table_5_reads_its_columns_as_runs() -> None:
    answers = study(5, DEMO).answers
    place = [row.name for row in TABLES[5].rows].index("ucf101")
    runs = [answers[place, column].run for column in TABLES[5].columns]
    assert runs == ["drop-75", BASE, "drop-25", "drop-0"]


def test_another_seed_is_another_run_from_that_seed_s_weights() -> None:
    tuned = study(6, DEMO).runs[-1]
    assert with_seed(tuned, 0) == tuned
    other = with_seed(tuned, 2)
    assert (other.name, other.start, other.settings["seed"]) == (
        "fine-tuning-seed-2",
        "base-seed-2",
        2,
    )


@pytest.mark.parametrize("one", beyond().values(), ids=lambda one: one.name)
def test_a_study_beyond_the_paper_has_controls_and_its_runs_come_in_order(one: Beyond) -> None:
    names = [arm.words for arm in one.arms]
    assert len(set(names)) == len(names)
    for arm in one.arms:
        assert arm.control is None or (arm.control in names and arm.control != arm.words)
    assert any(arm.control for arm in one.arms)
    known: set[str | None] = {None}
    for run in one.runs():
        assert run.start in known
        assert run.bringer in known | {run.name}
        known.add(run.name)
    assert known >= {with_seed(arm.run, seed).name for arm in one.arms for seed in SEEDS}


def test_a_run_that_studies_and_tables_share_is_the_same_in_each() -> None:
    tables = {run.name: run for one in studies(DEMO) for run in one.runs}
    runs = tables | {run.name: run for one in tables.values() for run in _with_seeds(one)}
    for one in beyond().values():
        for run in one.runs():
            assert runs.setdefault(run.name, run) == run


def _with_seeds(run: StudyRun) -> list[StudyRun]:
    return [with_seed(run, seed) for seed in SEEDS]


def test_arms_of_a_study_differ_from_their_control_in_settings_that_exist() -> None:
    keys = {key for one in beyond().values() for arm in one.arms for key in arm.run.settings}
    for key in keys:
        if not key.startswith("evaluate.probes."):
            assert key.rpartition(".")[2] in known_keys(tuple(key.split(".")[:-1])), key
    for one in beyond().values():
        runs = {arm.words: arm.run for arm in one.arms}
        for arm in one.arms:
            assert arm.control is None or arm.run.settings != runs[arm.control].settings
