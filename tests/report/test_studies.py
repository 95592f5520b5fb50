"""The scaled-down tables: each number below its published row, intervals over clips or seeds."""

import pytest
from scipy import stats

from tests.report.made_up import metric
from vatt.beyond import beyond
from vatt.report.inputs import Inputs
from vatt.report.studies import (
    STUDENT_T,
    backbone_table,
    beyond_sections,
    beyond_table,
    drop_token_pictures,
    over_seeds,
    study_table,
)
from vatt.studies import SEEDED


def run(value: float) -> dict:
    """What a run measured, every share the same."""
    one = metric(value, value - 0.05, value + 0.05)
    found = {"recall_at_10": one, "median_rank": metric(9, 7, 12, chance=128)}
    probe = {"svm": {"pretrained": one}, "low_rank": {"pretrained": one}}
    task = {"pretrained": {"top_1": one, "top_5": one}, "scratch": {"top_1": one}}
    return {
        "gflops": {"pretrain": value},
        "training_seconds": 100 * value,
        "retrieval": {
            "pretrained": dict.fromkeys(("text_to_video", "video_to_text", "audio_to_video"), found)
        },
        "probes": {"digit": probe, "action": probe, "rhythm": probe},
        "classification": {"action": task, "audio": task, "image": task},
    }


def inputs(**runs: dict) -> Inputs:
    named = {name.replace("_", "-"): content for name, content in runs.items()}
    return Inputs(metrics={"studies": {"version": 1, "scale": "demo", "runs": named}})


def test_the_interval_over_seeds_is_student_s() -> None:
    values = [0.5, 0.6, 0.8]
    found = over_seeds([metric(value, 0, 1) for value in values])
    low, high = stats.t.interval(0.95, df=2, loc=sum(values) / 3, scale=stats.sem(values))
    assert (found["value"], found["low"]) == pytest.approx((sum(values) / 3, low), abs=1e-4)
    assert found["high"] == pytest.approx(high, abs=1e-4)
    for seeds, quantile in STUDENT_T.items():
        assert quantile == pytest.approx(stats.t.ppf(0.975, seeds - 1), abs=1e-3)


def test_without_runs_there_is_no_table() -> None:
    assert all(study_table(number, Inputs()) is None for number in range(1, 11))
    assert study_table(9, inputs(drop_75=run(0.5))) is None  # no run of table 9
    assert backbone_table(Inputs()) is None


def test_each_published_row_has_ours_under_it_and_what_has_not_run_says_so() -> None:
    found = study_table(5, inputs(base=run(0.4), drop_0=run(0.6)))
    assert found is not None
    assert [row.head for row in found.rows[2:4]] == ["HMDB51", "scaled down"]
    published, ours = found.rows[2:4]
    assert [cell.text for cell in published.cells] == ["62.5", "64.8", "65.6", "66.4"]
    assert [cell.text for cell in ours.cells] == [
        "not run",
        "40.0\u00a0%",
        "not run",
        "60.0\u00a0%",
    ]
    assert ours.cells[1].detail
    assert "one seed" in ours.note


def test_three_seeds_become_a_mean_and_two_do_not() -> None:
    seeds = {"base": run(0.4), "base_seed_1": run(0.5), "base_seed_2": run(0.6)}
    whole = study_table(4, inputs(**seeds))
    assert whole is not None
    assert whole.rows[1].cells[2].text == "50.0\u00a0%"
    assert "3 seeds" in whole.rows[1].note
    del seeds["base_seed_2"]
    part = study_table(4, inputs(**seeds))
    assert part is not None
    assert part.rows[1].cells[2].text == "40.0\u00a0%"


def test_the_difference_of_backbones_is_paired_by_seed() -> None:
    # each agnostic seed lies 10 points below its specific one: the pairs differ by nothing
    runs = {}
    for seed, value in (("", 0.4), ("_seed_1", 0.6), ("_seed_2", 0.8)):
        runs[f"base{seed}"], runs[f"agnostic{seed}"] = run(value), run(value - 0.1)
    found = backbone_table(inputs(**runs))
    assert found is not None
    specific, agnostic, difference = found.rows[0].cells
    assert (specific.text, agnostic.text) == ("60.0\u00a0%", "50.0\u00a0%")
    assert difference.text.startswith("+10.0")
    assert difference.detail == "+10.0 to +10.0"


def test_a_row_says_that_some_of_its_cells_have_only_one_seed() -> None:
    seeds = {"base": run(0.4), "base_seed_1": run(0.5), "base_seed_2": run(0.6)}
    found = study_table(5, inputs(**seeds, drop_0=run(0.6)))
    assert found is not None
    assert found.rows[3].cells[1].text == "50.0\u00a0%"
    assert found.rows[3].note.endswith(
        "mean of 3 seeds, one seed where the others have not been run"
    )


def test_drop_token_s_pictures_need_all_its_runs() -> None:
    runs = {name.replace("-", "_"): run(0.3 + place / 10) for place, name in enumerate(SEEDED)}
    pictures = drop_token_pictures(inputs(**runs))
    assert [picture.title.split()[-1] for picture in pictures] == ["GFLOPs", "seconds"]
    del runs["drop_25"]
    assert drop_token_pictures(inputs(**runs)) == []


def routed(value: float, share: float) -> dict:
    """What a run with experts measured."""
    one = metric(share, share - 0.1, share + 0.1)
    found = {"pretrained": {"specialisation": one}, "untrained": {"specialisation": one}}
    return run(value) | {"experts": found}


def test_an_arm_is_compared_with_its_control_pair_by_pair() -> None:
    dense, ours = [0.40, 0.50, 0.30], [0.45, 0.53, 0.36]
    runs = {
        f"{name}{seed}": made
        for number, seed in enumerate(("", "-seed-1", "-seed-2"))
        for name, made in (
            ("agnostic", run(dense[number])),
            ("experts", routed(ours[number], 0.2)),
        )
    }
    table = beyond_table(beyond()["experts"], inputs(**runs))
    assert [row.head for row in table.rows] == [
        "one dense encoder",
        "with experts",
        "minus one dense encoder",
    ]
    gains = [one - other for one, other in zip(ours, dense, strict=True)]
    low, high = stats.t.interval(0.95, df=2, loc=sum(gains) / 3, scale=stats.sem(gains))
    difference = table.rows[2].cells[0]
    assert difference.text == "+4.7\u00a0points"
    assert difference.detail == f"+{100 * low:.1f} to +{100 * high:.1f}"
    gflops = table.headings.index("GFLOPs of a clip") - 1
    ratio = sum(one / other for one, other in zip(ours, dense, strict=True)) / 3
    assert table.rows[2].cells[gflops].text == f"× {ratio:.2f}"
    last = [row.cells[-1].text for row in table.rows]  # a dense model has no experts
    assert last == ["–", "20.0\u00a0%", "–"]


def test_a_study_with_one_seed_says_so_and_compares_nothing() -> None:
    runs = {"agnostic": run(0.4), "experts": routed(0.5, 0.2), "experts-seed-1": routed(0.9, 0.2)}
    ((table, pictures),) = beyond_sections(inputs(**runs))
    assert pictures == []
    assert [row.note for row in table.rows] == ["one seed", "one seed", "paired by seed"]
    assert table.rows[1].cells[0].text == "50.0\u00a0%"
    assert table.rows[2].cells[0].detail == "needs 3 seeds"
    assert beyond_sections(inputs()) == []


def test_a_study_s_figures_need_all_its_arms() -> None:
    tokens = beyond()["tokens"]
    runs = {
        f"{arm.run.name}{seed}".replace("-", "_"): run(0.3 + place / 20)
        for seed in ("", "-seed-1", "-seed-2")
        for place, arm in enumerate(tokens.arms)
    }
    retrieval, _, action = next(
        drawn for table, drawn in beyond_sections(inputs(**runs)) if table.title == tokens.title
    )
    assert [name for _, name in retrieval.legend] == ["at random", "by content"]
    assert "at random from 30 to 50" in retrieval.alt and "by content from 35 to 55" in action.alt
    assert retrieval.caption == "Mean of 3 seeds."
    del runs["content_50"]
    found = beyond_sections(inputs(**runs))
    assert all(drawn == [] for table, drawn in found if table.title == tokens.title)


def test_every_figure_s_arms_are_those_of_its_study() -> None:
    for study in beyond().values():
        names = {arm.words for arm in study.arms}
        for figure in study.figures:
            assert all(set(curve.arms) <= names for curve in figure.curves)
