"""The report: self-contained, escaped, complete, and honest about what was not run."""

import re
from html.parser import HTMLParser

import pytest

from tests.report.made_up import HOSTILE, REPORT, leave_run, paths
from vatt.data.manifest import manifest_hash
from vatt.report.inputs import read_inputs
from vatt.report.page import duration, markdown, stage_lines, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Tags, attributes and texts; complains about what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = paths(tmp_path_factory.mktemp("run"))
    leave_run(place)
    write_report(place, REPORT)
    return place


@pytest.fixture(scope="module")
def html(place):
    return (place.report / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    place = paths(tmp_path_factory.mktemp("nothing"))
    write_report(place, REPORT)
    return place


def test_the_page_is_well_formed_and_needs_nothing_from_outside(html):
    page = Page(html)
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "iframe", "img"} & {tag for tag, _ in page.tags}
    assert "url(" not in html
    assert "@import" not in html
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link.removeprefix("#") for link in page.links} <= targets


def test_every_picture_says_in_words_what_it_shows(html):
    pictures = [attributes for tag, attributes in Page(html).tags if tag == "svg"]
    assert len(pictures) >= 4
    assert all(len(picture["aria-label"]) > 20 for picture in pictures)


def test_results_stand_with_interval_chance_and_baseline(html):
    for text in ("68.4\u00a0%", "62.0 – 74.0", "3.9\u00a0%", "33.7\u00a0%", "+21.5\u00a0points"):
        assert text in html


def test_a_difference_whose_interval_holds_zero_is_not_told_apart(html):
    assert "not told apart: the interval holds 0" in html
    assert re.search(r'class="unsure">\+0\.7\s*points', html)


def test_the_manifest_is_named_by_its_hash(place, html):
    assert manifest_hash(place.manifest) in html


def test_attrition_is_shown_by_state_and_reason(place, html):
    (loss,) = read_inputs(place).attrition
    assert loss.states == {"ok": 2, "not-found": 1}
    assert "a seven rises (1)" in html


def test_stages_tell_how_they_ended(place):
    states = {line.name: line.state for line in stage_lines(read_inputs(place))}
    assert states["pretrain"] == "done"
    assert states["finetune-action-scratch"] == "killed"
    assert states["preprocess"] == "not run"


def test_the_same_files_give_the_same_report(place, html, tmp_path):
    again = place.model_copy(update={"report": tmp_path})
    write_report(again, REPORT)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html


def test_nothing_run_is_said_everywhere_and_looks_like_no_result(nothing):
    html = (nothing.report / "report.html").read_text(encoding="utf-8")
    Page(html)
    assert 'class="ours"' not in html
    assert 'class="dot ' not in html
    assert "<svg" not in html
    assert html.count("not run") > 20
    cards = re.findall(r'<p class="value">(.*?)</p>', html)
    assert cards == ["not run"] * 4
    markdown_text = (nothing.report / "report.md").read_text(encoding="utf-8")
    assert markdown_text.count("*not run*") > 20


def test_hostile_labels_captions_and_reasons_stay_text(tmp_path):
    place = paths(tmp_path)
    leave_run(place, label=HOSTILE, sentence=HOSTILE)
    write_report(place, REPORT.model_copy(update={"title": HOSTILE}))
    html = (place.report / "report.html").read_text(encoding="utf-8")
    assert "script" not in {tag for tag, _ in Page(html).tags}
    assert "alert(" in html
    assert "Content-Security-Policy" in html
    text = (place.report / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert r"\|\`\*" in text


def test_markdown_tables_have_as_many_cells_in_every_line(place):
    text = (place.report / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert len(tables) >= 13
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_markdown_takes_text_literally():
    assert markdown("a|b *c* <d>\ne") == r"a\|b \*c\* &lt;d&gt; e"


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.2, "3 s"), (119.0, "119 s"), (150.0, "2.5 min"), (9000.0, "2.5 h")]
)
def test_durations_read_as_people_say_them(seconds, words):
    assert duration(seconds) == words
