"""Files appear whole or not at all; one writer at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from vatt.errors import MachineError
from vatt.files import atomic_folder, atomic_write, lock


def test_a_file_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with atomic_write(target) as path:
        path.write_text("half")
        assert not target.exists()
    assert target.read_text() == "half"


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write() -> None:
        with atomic_write(target) as path:
            path.write_text("new")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("x")
    with atomic_folder(target) as folder:
        (folder / "fresh").write_text("y")
    assert [p.name for p in target.iterdir()] == ["fresh"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_second_writer_is_refused_and_a_dead_one_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    holder = (
        "import sys, pathlib, time; from vatt.files import lock\n"
        f"with lock(pathlib.Path({str(path)!r})):\n print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(MachineError, match="another process"), lock(path):
            pass
        process.kill()
        process.wait()
    with lock(path):
        assert path.exists()


def test_files_in_a_folder_may_be_read_by_whoever_may_enter_it(tmp_path):
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "weights").write_bytes(b"w")
        (temporary / "weights").chmod(0o600)
    entered = (tmp_path / "out").stat().st_mode
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == entered & 0o666
