"""A stage's end: code, one message, no traceback without --debug."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_architecture import ROOT

SCRIPT = """
import errno, os
from vatt.errors import DataError
from vatt.process import run_stage
def main():
    {body}
run_stage("sample", main)
"""


def end(
    tmp_path: Path, body: str, **more: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={**os.environ, **more},
    )
    file = tmp_path / ".vattctl" / "outcome.json"
    return done, json.loads(file.read_text()) if file.exists() else {}


def test_success_leaves_no_outcome(tmp_path: Path) -> None:
    done, outcome = end(tmp_path, "pass")
    assert (done.returncode, outcome) == (0, {})


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("raise DataError('no clip left', hint='look there')", 3, "no clip left\n  -> look there"),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', 'data/x')",
            4,
            "disk is full: data/x",
        ),
        ("raise OSError(errno.EIO, 'Input/output error', 'data/x')", 4, "Input/output error: dat"),
        ("raise OSError(errno.EBUSY, 'Device busy', 'data/x')", 4, "Device busy: data/x"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise RuntimeError('oh')", 101, "RuntimeError: oh"),
    ],
)
def test_code_and_message(tmp_path: Path, body: str, code: int, words: str) -> None:
    done, outcome = end(tmp_path, body)
    assert done.returncode == code
    assert outcome["code"] == code
    assert words in str(outcome["message"])
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback_in_a_file_or_shows_it(tmp_path: Path) -> None:
    end(tmp_path, "raise RuntimeError('oh')")
    assert "RuntimeError: oh" in (tmp_path / ".vattctl" / "traceback.txt").read_text()
    done, _ = end(tmp_path, "raise RuntimeError('oh')", VATTCTL_DEBUG="1")
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("chain", ["", " from None", " from error"])
def test_a_stop_that_a_library_reports_as_its_failure_is_a_stop(tmp_path: Path, chain: str) -> None:
    body = f"""
    try:
        os.kill(os.getpid(), 15)
    except Exception as error:
        raise RuntimeError("no such database"){chain}
    """
    done, outcome = end(tmp_path, body)
    assert done.returncode == outcome["code"] == 75
    assert "continues where it stopped" in str(outcome["message"])


CHANGE = """
    from pathlib import Path
    file = Path('params.yaml')
    file.write_text(file.read_text().replace({old!r}, {new!r}))
    {leave}"""


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("  min_clips: 100", "  min_clips: 101", 2),
        ("  min_clips: 100", "  min_clips:   100 # no other value", 0),
        ("  bootstrap: 1000", "  bootstrap: 1001", 0),  # of another stage
    ],
)
@pytest.mark.parametrize("leave", ["", "raise SystemExit(0)"])  # as where processes were launched
def test_settings_that_change_while_a_stage_runs_are_reported(
    old: str, new: str, code: int, leave: str, tmp_path: Path
) -> None:
    text = (ROOT / "params.yaml").read_text()
    assert text.count(old) == 1
    (tmp_path / "params.yaml").write_text(text)
    stages = {"sample": {"cmd": "true", "params": ["seed", "data"]}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    done, outcome = end(tmp_path, CHANGE.format(old=old, new=new, leave=leave))
    assert done.returncode == code, done.stderr
    assert ("data.min_clips" in str(outcome.get("message"))) == bool(code)
