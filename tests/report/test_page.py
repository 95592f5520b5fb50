"""The report: self-contained, escaped, complete, and honest about what was not run."""

import json
import os
import re
from html.parser import HTMLParser

import pytest

from tests.report.made_up import HOSTILE, REPORT, evaluation, leave_run, metric, paths, write
from vatt.data.clips.manifest import manifest_hash
from vatt.errors import DataError
from vatt.report.inputs import THUMBNAIL_BYTES, Inputs, Origin, read_inputs
from vatt.report.page import compute_facts, duration, markdown, stage_lines, write_report
from vatt.report.results import classification_protocol, probe_protocol, retrieval_protocol

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
    assert "no significant difference: the interval contains 0" in html
    assert re.search(r'class="unsure">\+0\.7\s*points', html)


@pytest.mark.parametrize(
    "name", ["metrics/evaluate.json", "evaluation/similarities.npz", "download.ledger.jsonl"]
)
def test_a_damaged_file_is_named(tmp_path, name):
    place = paths(tmp_path)
    leave_run(place)
    [file] = [path for path in tmp_path.rglob("*") if path.as_posix().endswith(name)]
    os.truncate(file, file.stat().st_size // 2 + 1)
    with pytest.raises(DataError, match=rf"{file.name}.* is damaged"):
        read_inputs(place)


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


ODD = {
    "markup": "<img src=x onerror=alert(1)><b>\"'&amp;</script>",
    "markdown": "[x](javascript:alert(1)) | `code` **bold** # ~~no~~ $a$ \\ <!--\n| new | row |",
    "long": "w" * 5000,
    "right to left": "שלום \u202egnp.exe\u202c עולם",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈 café ﷽",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_labels_captions_and_reasons_break_neither_page(odd, tmp_path):
    place = paths(tmp_path)
    leave_run(place, label=odd, sentence=odd)
    write_report(place, REPORT.model_copy(update={"title": odd}))
    html = (place.report / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "iframe", "img"} & {tag for tag, _ in page.tags}
    handlers = [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    assert handlers == []
    assert all(link.startswith(("#", "data:image/webp;base64,")) for link in page.links)
    assert max(map(len, re.findall(r"“(.*?)”", html))) <= 4 * 300  # escaped
    assert "unicode-bidi: isolate" in html
    text = (place.report / "report.md").read_text(encoding="utf-8")
    assert "\u202e" not in text
    assert "<img" not in text
    assert re.search(r"(?<!\\)\]\(javascript", text) is None
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_retrieved_clips_play_inside_the_page(tmp_path):
    place = paths(tmp_path)
    leave_run(place)
    (place.evaluation / "c2.webp").write_bytes(b"RIFF made-up WEBP")
    write_report(place, REPORT)
    html = (place.report / "report.html").read_text(encoding="utf-8")
    pictures = [attributes for tag, attributes in Page(html).tags if tag == "img"]
    assert len(pictures) == 2  # the clip itself and the one hit, which is it
    assert {one["src"] for one in pictures} == {"data:image/webp;base64,UklGRiBtYWRlLXVwIFdFQlA="}
    assert all(one["alt"] for one in pictures)


def test_thumbnails_stop_where_the_page_would_grow_too_large(tmp_path):
    place = paths(tmp_path)
    place.evaluation.mkdir(parents=True)
    for name in "abc":
        (place.evaluation / f"{name}.webp").write_bytes(b"x" * (THUMBNAIL_BYTES // 2))
    assert read_inputs(place).thumbnails.keys() == {"a", "b"}


def test_compute_energy_and_cost_are_shown_where_they_are_known():
    runs = {
        "pretrain": {"seconds": 7200, "device": "H100", "devices": 4, "kwh": 5.5},
        "evaluate": {"seconds": 1800, "device": "H100", "devices": 4},
    }
    known = dict(compute_facts(Inputs(runs=runs), 2.5))
    assert known["hours of a H100"] == "10"
    assert known["energy"] == "5.5 kWh (pretrain)"
    assert known["cost"] == "25.00 at 2.5 per hour"
    bare = {"pretrain": {"seconds": 3600, "device": "CPU core", "devices": 2}}
    unknown = dict(compute_facts(Inputs(runs=bare), None))
    assert unknown["hours of a CPU core"] == "2"
    assert unknown["energy"] == "no device measures it"
    assert unknown["cost"].startswith("unknown")
    assert compute_facts(Inputs(), 2.5) == ()


def test_found_clips_stand_next_to_the_official_number(tmp_path):
    place = paths(tmp_path)
    leave_run(place)
    file = place.metrics / "download.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "official": {"test": 1000}}))
    write_report(place, REPORT)
    html = (place.report / "report.html").read_text(encoding="utf-8")
    assert "100 of 1,000" in html
    assert "samples cut from them, in the shards</dt><dd>300<" in html  # two clips are listed


def test_the_protocol_of_each_table_is_told_in_words():
    told = {
        "windows": 4, "fps": 12.5, "caption_queries": "each", "low_rank_steps": 50_000,
        "resamples": 1000,
    }  # fmt: skip
    search = {"pool": 1000, "queries": 20_000, "captions_per_clip": 20.0}
    folds = {"value": 0.8, "low": 0.7, "high": 0.9, "n": 2000, "folds": 5, "deviation": 0.01}
    content = {
        "protocol": told,
        "searches": {"text_to_video": search},
        "probes": {"esc50": {"svm": {"pretrained": folds}}},
        "classification": {"kinetics400": {"views": [4, 3]}},
    }
    inputs = Inputs(metrics={"evaluate": content})
    retrieval = retrieval_protocol(inputs)
    for words in (
        "1,000 test clips",
        "20 captions per clip",
        "each a separate query",
        "4 windows",
        "12.5",
    ):
        assert words in retrieval
    probe = probe_protocol(inputs)
    for words in ("C = UV", "50,000 steps", "tested on 4 windows", "standard deviation"):
        assert words in probe
    assert "4 windows × 3 crops" in classification_protocol(inputs)


def test_a_checkpoint_without_words_says_why_there_is_no_text(tmp_path):
    place = paths(tmp_path)
    leave_run(place)
    file = place.metrics / "evaluate.json"
    content = json.loads(file.read_text())
    for direction in ("text_to_video", "video_to_text"):
        del content["retrieval"]["pretrained"][direction]
    content["skipped"] = {"text": "the checkpoint has no vocabulary.txt"}
    file.write_text(json.dumps(content))
    write_report(place, REPORT)
    html = (place.report / "report.html").read_text(encoding="utf-8")
    assert html.count("the checkpoint has no vocabulary.txt") == 2


def origin(*tunings: str) -> Origin:
    settings = {"seed": 3, "data": {"base_urls": ["https://me:secret@host/x"]}}
    return Origin(seed=3, commit="0123456789ab", settings=settings, tunings=tunings)


def page(place) -> str:
    write_report(place, REPORT, origin("action-pretrained"))
    return (place.report / "report.html").read_text()


def test_date_commit_seed_and_all_settings_are_on_the_page(tmp_path):
    place = paths(tmp_path)
    leave_run(place)
    write(place.runs / "pretrain.json", {"status": "FINISHED", "ended": "2026-01-02T03:04:05"})
    html = page(place)
    for key, value in (("date", "2026-01-02"), ("commit", "0123456789ab"), ("seed", "3")):
        assert f"<dt>{key}</dt><dd>{value}</dd>" in html
    assert html.index("<dt>seed</dt>") < html.index('class="cards"')
    assert "base_urls:" in html and "secret" not in html


def test_an_evaluation_without_labels_says_so(tmp_path):
    place = paths(tmp_path)
    leave_run(place)
    write(place.metrics / "evaluate.json", evaluation() | {"probes": {}, "classification": {}})
    html = page(place)
    cards = html[html.index('class="cards"') : html.index("</header>")]
    assert cards.count("no clip has a label to compare by") == 2
    assert "evaluate has not been run" not in html


def test_fine_tunings_of_earlier_settings_are_left_out(tmp_path):
    place = paths(tmp_path)
    leave_run(place)
    write(place.metrics / "finetune-old-pretrained.json", {"loss": 1.0})
    for name in ("old-pretrained", "action-pretrained"):
        write(place.finetuned / name / "history.json", [{"step": 0, "loss": 2.0}])
    html = page(place)
    assert "finetune-old-pretrained" not in html
    assert "Fine-tuning: action" in html and "Fine-tuning: old" not in html


def test_numbers_of_too_few_clips_are_named_and_not_shown_as_results(tmp_path):
    place = paths(tmp_path)
    leave_run(place)
    few = evaluation()
    for direction in few["retrieval"]["pretrained"].values():
        for measure in direction.values():
            measure["n"] = 6
    few["retrieval"]["pretrained"]["text_to_video"]["recall_at_10"]["value"] = 1.0
    write(place.metrics / "evaluate.json", few)
    html = page(place)
    cards = html[html.index('class="cards"') : html.index("</header>")]
    assert cards.count("too few clips") == 2
    assert "6 clips searched; 50 or more are needed" in cards
    assert "100.0" not in cards
    assert "Not shown, because 6 test clips are too few" in html
    assert '<td class="unsure">100.0' in html and '<td class="ours">100.0' not in html
    assert "6 clips searched; 50" in (place.report / "report.md").read_text()


def test_probes_and_classifiers_that_were_tested_on_too_few_clips_are_muted_in_every_table(
    tmp_path,
):
    place = paths(tmp_path)
    leave_run(place)
    few = evaluation()
    for run in (few["probes"]["digit"]["svm"], few["classification"]["action"]):
        for one in (run["pretrained"].get("top_1", run["pretrained"]), run["difference"]):
            one["n"] = 6
    write(place.metrics / "evaluate.json", few)
    html = page(place)
    for shown in ("55.2", "44.5", "+21.5", "+16.2"):
        assert f'<td class="unsure">{shown}' in html and f'<td class="ours">{shown}' not in html
    assert html.count("30 or more clips are needed") >= 2
    assert "top-1; better" not in html.partition("Fine-tuned accuracy")[2].partition("sound")[0]
    assert '<td class="ours">71.1' in html  # enough clips


def test_a_task_that_became_worse_is_called_worse_whatever_the_first_one_is(tmp_path):
    place = paths(tmp_path)
    leave_run(place)
    worse = evaluation()
    worse["classification"]["sound"]["difference"] = metric(-0.1, -0.15, -0.05, 0.0)
    write(place.metrics / "evaluate.json", worse)
    assert "action +16.2, sound −10.0 (significantly worse)" in page(place)


def test_the_runs_own_curves_come_before_the_published_tables(html):
    assert html.index('<section id="figures">') < html.index('<section id="paper">')
