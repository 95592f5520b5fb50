"""The paper's tables: every published number stands, and ours never stands in for it."""

import pytest

from tests.report.made_up import evaluation, metric
from vatt.config import SizeParams
from vatt.paper import heading, paper_tables
from vatt.report.inputs import Inputs
from vatt.report.published import published_sections, video_classifier_parameters


def section(number, inputs):
    return next(part for part in published_sections(inputs) if part.number == number)


def shown(row):
    return [cell.text for cell in row.cells]


def test_there_are_ten_tables_and_every_row_fits_its_columns():
    tables = paper_tables()
    assert [table.number for table in tables] == list(range(1, 11))
    assert all(len(row.values) == len(table.columns) for table in tables for row in table.rows)


def test_some_published_numbers_by_hand():
    tables = {table.number: table for table in paper_tables()}
    large = next(row for row in tables[1].rows if row.name == "VATT-Large")
    assert large.values == (82.1, 95.5, 83.6, 96.6, 41.1, 67.7, 29.80)
    assert tables[2].rows[-1].values == (39.3, 97.0, 2.884)
    assert tables[10].rows[0].values[:3] == ("waveform", "128", 88.14)


def test_columns_read_as_words():
    assert heading("k400_top1") == "Kinetics-400 top-1"
    assert heading("msrvtt_median_rank") == "MSR-VTT median rank"
    assert heading("drop_75") == "75 % dropped"


def test_every_published_number_is_shown_as_it_was_printed():
    for table, part in zip(paper_tables(), published_sections(Inputs()), strict=True):
        for row, line in zip(table.rows, part.published.rows, strict=False):
            for value, cell in zip(row.values, line.cells, strict=True):
                expected = "–" if value is None else str(value).replace("x", "×")
                assert cell.text == expected or isinstance(value, str)
                assert cell.kind == ("none" if value is None else "published")


def test_without_a_run_every_measured_line_is_not_run_with_its_reason():
    for part in published_sections(Inputs()):
        ours = [row for row in part.published.rows if row.head == "this run"]
        assert part.scaled_down is None
        assert not part.has_ours
        if part.number != 7:  # sizes: nothing to measure
            assert len(ours) == 1
            assert ours[0].kind == "not_run"
            assert ours[0].note.startswith("needs ")
            assert set(shown(ours[0])) == {"not run"}


def test_results_on_another_corpus_never_stand_in_a_published_column():
    inputs = Inputs(metrics={"evaluate": evaluation()})
    for number in (1, 2, 4, 8):
        part = section(number, inputs)
        assert part.published.rows[-1].kind == "not_run"
        assert part.scaled_down is not None
        assert "not to be compared" in part.scaled_down.remark
    assert shown(section(1, inputs).scaled_down.rows[0])[0] == "44.5\u00a0%"
    assert [row.head for row in section(2, inputs).scaled_down.rows] == ["sound"]


def test_a_task_of_the_data_sets_name_fills_its_columns_and_leaves_the_others_not_run():
    content = evaluation()
    content["classification"]["kinetics400"] = {
        "modality": "video",
        "pretrained": {"top_1": metric(0.801, 0.79, 0.81), "top_5": metric(0.95, 0.94, 0.96)},
    }
    part = section(1, Inputs(metrics={"evaluate": content}))
    ours = part.published.rows[-1]
    assert part.has_ours
    assert shown(ours)[:3] == ["80.1\u00a0%", "95.0\u00a0%", "not run"]
    assert ours.cells[2].kind == "not_run"


def test_formulas_meet_the_published_figures():
    for number, tolerance in ((1, 0.002), (5, 0.001), (6, 0.001)):
        part = section(number, Inputs())
        lines = {row.head: row for row in part.published.rows if row.kind == "published"}
        for row in (row for row in part.published.rows if row.kind == "computed"):
            published = lines[row.head.removesuffix(", TFLOPs")]
            for ours, theirs in zip(row.cells, published.cells, strict=True):
                if ours.kind == "computed" and theirs.kind == "published":
                    assert float(ours.text) == pytest.approx(float(theirs.text), rel=tolerance)


@pytest.mark.parametrize(
    ("depth", "dim", "mlp_dim", "heads", "millions"),
    [(12, 768, 3072, 12, 87.907), (12, 1024, 4096, 16, 154.958), (24, 1024, 4096, 16, 306.113)],
)
def test_parameters_are_those_of_a_tower_with_a_600_class_head(
    depth, dim, mlp_dim, heads, millions
):
    # specification, section 4: the paper's Base, Medium and Large
    size = SizeParams(depth=depth, dim=dim, mlp_dim=mlp_dim, heads=heads, head_dim=64)
    assert video_classifier_parameters(size) / 1e6 == pytest.approx(millions, abs=5e-4)
