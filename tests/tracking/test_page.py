"""MLflow's page in a real browser, as a person uses it: list, sort, filter, compare, report."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_architecture import ROOT
from vatt.config import load_params, parse_params
from vatt.tracking import mlflow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]
RECALL = "text_to_video.recall_at_10"
RUNS = {  # name -> setting and recall
    "specific": ({}, 0.46),
    "agnostic": ({("model", "backbone"): "agnostic"}, 0.31),
    "undropped": ({("pretrain", "drop_rate"): 0.0}, 0.52),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Three pipelines in a project's store."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        raw = load_params().model_dump(mode="json")
        for name, (settings, recall) in RUNS.items():
            patch.setenv("VATTCTL_RUN_NAME", name)
            changed = json.loads(json.dumps(raw))
            for (section, key), value in settings.items():
                changed[section][key] = value
            params = parse_params(changed, source=Path("params.yaml"))
            with mlflow.run("pretrain", params, stage_hash=name) as run:
                run.log(1, {"loss": 3.0})
            with mlflow.run("evaluate", params, stage_hash=name) as run:
                run.log(0, {RECALL: recall, "probe-digit-svm.accuracy": 0.7})
            Path("report.html").write_text(f"<h1>Report of {name}</h1>", encoding="utf-8")
            with mlflow.run("report", params, stage_hash=name) as run:
                run.artifact(Path("report.html"))
    return folder


@pytest.fixture(scope="module")
def address(project):
    """What `vattctl ui` prints, once the page answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "vattctl.cli", "ui", "--port", str(port)],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    printed = server.stdout.readline().strip()
    deadline = time.monotonic() + 120
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)) != 0:
            assert server.poll() is None and time.monotonic() < deadline, printed
            time.sleep(0.2)
    yield printed
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=60) == 0


@pytest.fixture
def page(address):
    """The page that it leads to, with its runs shown."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1800, "height": 800})
        shown.set_default_timeout(60_000)
        shown.goto(address)
        shown.get_by_role("link", name="specific").wait_for()
        yield shown
        browser.close()


def names(page):
    """The names of the rows, from top to bottom, at one moment: rows come and go."""
    links = page.eval_on_selector_all(
        ".ag-row a[href*='/runs/']",
        "all => all.map(one => [one.innerText.trim(), one.getBoundingClientRect().y])",
    )
    return [name for name, _ in sorted(links, key=lambda link: link[1]) if name]


def wait_for(page, condition):
    for _ in range(100):
        if condition():
            return
        page.wait_for_timeout(200)
    raise AssertionError(names(page))


def test_the_address_leads_to_the_pipelines_with_their_columns(page):
    wait_for(page, lambda: names(page) == ["undropped", "agnostic", "specific"])  # newest first
    headings = page.locator("[role=columnheader]").all_inner_texts()
    for column in (RECALL, "probe-digit-svm.accuracy", "model.backbone", "Duration"):
        assert column in headings


def test_runs_are_sorted_by_a_metric(page):
    page.get_by_role("button", name="Sort: Created").click()
    page.get_by_placeholder("Search").last.fill(RECALL)
    page.get_by_role("menuitemcheckbox").filter(has_text=RECALL).first.click()

    def order():
        return [name for name in names(page) if name in RUNS]

    wait_for(page, lambda: order() == ["undropped", "specific", "agnostic"])


def test_runs_are_filtered_by_a_metric(page):
    box = page.locator("input[placeholder*='metrics.rmse']")
    box.fill(f"metrics.`{RECALL}` > 0.4 and tags.`vatt.stage` = 'pipeline'")
    box.press("Enter")
    wait_for(page, lambda: names(page) == ["undropped", "specific"])


def test_two_pipelines_are_compared(page):
    for name in ("undropped", "specific"):
        box = page.locator(".ag-row").filter(has_text=name).first.bounding_box()
        page.mouse.click(box["x"] + 16, box["y"] + box["height"] / 2)
    page.get_by_role("button", name="Compare").first.click()
    page.get_by_text("Comparing 2 Runs").first.wait_for()
    for shown in (RECALL, "0.52", "0.46", "pretrain.drop_rate"):
        page.get_by_text(shown).first.wait_for(state="attached")


def test_the_report_opens_in_the_page(page, project):
    run_id = json.loads((project / "reports/runs/report.json").read_text())["run_id"]
    base = page.url.partition("#")[0]
    page.goto(f"{base}#/experiments/1/runs/{run_id}/artifacts")
    page.get_by_text("report.html").first.click()
    heading = page.frame_locator("iframe").first.locator("h1")
    assert heading.inner_text() == "Report of undropped"
