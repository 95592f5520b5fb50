"""Every command: its help, examples, JSON, exit codes; completion in real shells."""

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from tests.data.corpus import write_media
from tests.test_architecture import ROOT
from tests.test_sets import checkpoint
from vatt.config import load_params
from vattctl import pipeline
from vattctl.cli import SECTIONS, cli
from vattctl.params import CheckpointFolder

READING = {  # they change nothing, so they have no --dry-run
    "status", "logs", "ui", "compare", "runs", "ledger", "plan", "embed", "verify",
    "config show", "config validate", "doctor",
}  # fmt: skip
WITHOUT_JSON = {"ui": "it serves a page", "completion": "it prints a script"}
NOT_RUN = {  # the first words of an example: why it is not run here
    "vattctl ui": "it serves until Ctrl-C; tests/test_cli.py starts servers",
    "vattctl finetune kinetics400": "needs the official lists; tests/test_sets.py plans each set",
    "vattctl finetune ucf101": "as kinetics400",
    "vattctl finetune audioset": "as kinetics400",
    "vattctl finetune msrvtt": "as kinetics400",
    "vattctl import": "needs released weights; tests/release converts a checkpoint",
    "vattctl plan  ": "runs a trial of seconds; tests/test_planning.py does",
    "vattctl plan --json": "as `vattctl plan`",
    "vattctl compare": "needs two evaluations; tests/test_cli.py compares two",
    "vattctl runs": "needs runs in MLflow; tests/tracking makes some",
    "vattctl ledger": "needs a download; tests/test_cli.py makes one",
    "vattctl logs": "needs a stage that has run; tests/test_dvc.py runs one",
    "vattctl embed": "needs trained weights; tests/test_search.py makes them",
    "vattctl verify": "takes minutes; tests/test_verify.py calls each part",
    "vattctl doctor": "looks at the machine; tests/test_doctor.py runs it",
    "vattctl push": "needs a server; tests/test_export.py pushes to a folder",
    "vattctl pull": "as push",
    "vattctl table  ": "plans a hundred runs; tests/test_tables.py does",
    "vattctl table": "as `vattctl table`",
    "vattctl preprocess --executor ray": "needs a Ray cluster; tests/data/test_executor.py",
    "vattctl init --update": "needs a project made by init; tests/test_project.py",
    "vattctl pretrain --size large": "the model of the paper: planned in tests/test_planning.py",
    "vattctl status": "needs DVC; tests/test_stages.py runs it",
}


def walk(command: click.Command, *words: str) -> Iterator[tuple[str, click.Command]]:
    """The commands that do something, by their words."""
    inner = cli.load() if command is cli else getattr(command, "commands", None)
    if inner is None:
        yield " ".join(words), command
    for name, one in (inner or {}).items():
        yield from walk(one, *words, name)


COMMANDS = dict(walk(cli))


def options(command: click.Command) -> set[str]:
    return {word for parameter in command.params for word in getattr(parameter, "opts", [])}


def examples(command: click.Command) -> list[str]:
    text = f"{command.help or ''}\n{command.epilog or ''}"
    return re.findall(r"^ *(vattctl .*)$", text, re.MULTILINE)


EXAMPLES = [line for command in (cli, *COMMANDS.values()) for line in examples(command)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the files that the examples name, and a project in it."""
    home = tmp_path_factory.mktemp("home")
    project = home / "project"
    project.mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, project)
    shutil.copy(ROOT / "presets/demo.yaml", project / "params.yaml.bak")
    for kind in ("cats", "dogs"):
        for number in range(5):
            for folder in ("videos", "my-classes", "project/clips"):
                file = home / folder / kind / f"{number}.mp4"
                file.parent.mkdir(parents=True, exist_ok=True)
                write_media(file, seconds=1 + number / 10)
    rows = [f"clips/{kind}/{n}.mp4,{kind},{'test' if n == 4 else 'train'}"
            for kind in ("cats", "dogs") for n in range(5)]  # fmt: skip
    (project / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    (project / "hosts.txt").write_text("localhost slots=1\n")
    (project / "cookies.txt").write_text("# Netscape HTTP Cookie File\n")
    for place in ("runs/checkpoints/pretrained", "runs/mbs"):
        checkpoint(project / place)
    return home


@pytest.fixture
def project(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of that project, with that home."""
    copy = shutil.copytree(home / "project", tmp_path / "project", symlinks=True)
    (tmp_path / "videos").symlink_to(home / "videos")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SHELL", "/bin/bash")
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(copy)
    return Path(copy)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(
        cli, [str(Path(word).expanduser()) if word[:1] == "~" else word for word in arguments]
    )


def test_every_command_is_in_a_section_and_no_summary_is_cut() -> None:
    shown = CliRunner().invoke(cli, ["--help"], terminal_width=100).output
    for title in ("Run:", "Data:", "Results:", "Weights:", "Settings:"):
        assert f"\n{title}\n" in shown
    for name, command in cli.load().items():
        assert re.search(rf"^  {name} +\S", shown, re.MULTILINE)
        summary = next(known[name][1] for known in SECTIONS.values() if name in known)
        assert summary == command.get_short_help_str(200) and "..." not in summary


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_json_and_a_dry_run(name: str) -> None:
    command = COMMANDS[name]
    assert examples(command) or name == "ui"
    assert ("--json" in options(command)) != (name in WITHOUT_JSON)
    assert ("--dry-run" in options(command)) != (name in READING)
    assert {"-q", "-v", "--debug", "--project"} <= options(command)


def reason_not_to_run(line: str) -> str | None:
    found = [why for start, why in NOT_RUN.items() if f"{line}  ".startswith(start)]
    return found[0] if found else None


@pytest.mark.parametrize("line", dict.fromkeys(EXAMPLES))
def test_every_example_runs_or_says_why_it_is_not_run_here(line: str, project: Path) -> None:
    why = reason_not_to_run(line)
    if why is not None:
        pytest.skip(f"not run here: {why}")
    command = re.split(r" {2,}", line)[0]
    for part in re.split(r" && | > ", command):
        words = shlex.split(part)
        if words[:1] != ["vattctl"]:  # cd
            continue
        name = next((n for n in COMMANDS if " ".join(words[1:]).startswith(n)), "")
        is_work = "--dry-run" in options(COMMANDS[name]) and "--dry-run" not in words
        place = words.index("--") if "--" in words else len(words)
        words[place:place] = ["--dry-run"] if is_work and name != "completion" else []
        answer = run(*words[1:])
        assert answer.exit_code == 0, answer.output
        assert not {"VATTCTL_RUN_NAME", "VATT_LAST_STAGE"} & os.environ.keys()  # of that command


def test_no_reason_is_left_over() -> None:
    for start in NOT_RUN:
        assert any(f"{line}  ".startswith(start) for line in EXAMPLES) or start in (
            "vattctl runs", "vattctl ui",
        ), start  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("config show pretrain.steps", 0),
        ("config validate", 0),
        ("config set pretrain.steps=7 --dry-run", 0),
        ("config use paper --dry-run", 0),
        ("ingest ~/videos --dry-run", 0),
        ("ingest list.csv --dry-run", 0),
        ("repro --dry-run", 0),
        ("demo --dry-run", 0),
        ("pretrain --set pretrain.steps=7 --dry-run", 0),
        ("evaluate --from runs/mbs --dry-run", 0),
        ("finetune folder --data ~/my-classes --dry-run", 0),
        ("plan --device h100-80gb", 0),
        ("export runs/mbs --to onnx --out runs/onnx --dry-run", 0),
        ("search cats --in clips --dry-run", 0),
        ("pull file:///nowhere --out runs/x --dry-run", 0),
    ],
)
def test_json_is_one_object_with_a_version(arguments: str, code: int, project: Path) -> None:
    answer = run(*shlex.split(arguments), "--json")
    assert answer.exit_code == code, answer.output
    assert json.loads(answer.stdout)["version"] == 1


def test_invalid_settings_are_json_too(project: Path) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("batch_size: 64", "batch_size: none", 1))
    answer = run("config", "validate", "--json")
    assert answer.exit_code == 2
    found = json.loads(answer.stdout)
    assert found["valid"] is False and "batch_size" in found["problems"][0]


def test_a_dry_run_says_what_would_change_and_why_in_a_fresh_clone(project: Path) -> None:
    before = sorted(path for path in project.rglob("*"))
    answer = run("repro", "--set", "pretrain.steps=7", "--dry-run", "--json")
    found = json.loads(answer.stdout)
    assert found["changes"] == ["pretrain.steps: 450 -> 7"]
    assert found["stages"][0]["why"] == ["never run"] and len(found["stages"]) == 11
    assert sorted(path for path in project.rglob("*")) == before


LOCKED = """\
schema: '2.0'
stages:
  pretrain:
    cmd: python -m stages.pretrain
    params:
      params.yaml:
        seed: 0
        pretrain: {steps: 450, batch_size: 64}
"""


def test_a_dry_run_compares_settings_with_those_of_the_last_run(project: Path) -> None:
    (project / "dvc.lock").write_text(LOCKED)
    answer = run("pretrain", "--set", "pretrain.steps=7", "--dry-run", "--json")
    stages = {one["stage"]: one for one in json.loads(answer.stdout)["stages"]}
    assert "pretrain.steps: 450 -> 7" in stages["pretrain"]["why"]
    assert not any("batch_size" in reason for reason in stages["pretrain"]["why"])
    assert stages["download"]["why"] == ["never run"]
    assert stages["pretrain"]["source"] == "within an hour"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("nothing", 2, "No such command"),
        ("status --nothing", 2, "No such option"),
        ("pretrain --set pretrain.stepz=1 --dry-run", 2, "did you mean 'pretrain.steps'"),
        ("config set pretrain.steps", 2, "is not KEY=VALUE"),
        ("config set pretrain.steps=few", 2, "pretrain.steps"),
        ("config set data.demo.text_noisy=0.4", 2, "did you mean 'data.demo.text_noise'"),
        ("config set pretrain.text_weighting.kind=drop", 2, "text_weighting.least is missing"),
        ("config use smalll", 2, "did you mean 'small'?"),
        ("repro pretrian", 2, "no stage 'pretrian'"),
        ("logs pretrian", 2, "no stage 'pretrian'"),
        ("logs pretrain", 3, "no log of pretrain"),
        ("embed list.csv --checkpoint runs/nowhere", 2, "does not exist"),
        ("finetune --drop-rate 0.5", 2, "--drop-rate needs a SET"),
    ],
)
def test_exit_codes(arguments: str, code: int, words: str, project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vattctl.cli", *shlex.split(arguments)],
        cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_setting_that_is_off_can_be_set_though_the_file_lacks_it(project: Path) -> None:
    weighting = {"kind": "drop", "least": 0.6, "warmup_steps": 40}
    given = [f"pretrain.text_weighting.{key}={value}" for key, value in weighting.items()]
    answer = run("config", "set", "data.demo.text_noise=0.4", *given)
    assert answer.exit_code == 0, answer.output
    params = load_params(project / "params.yaml")
    assert params.data.demo.text_noise == 0.4
    assert params.pretrain.model_dump()["text_weighting"] == weighting
    answer = run("config", "set", "pretrain.text_weighting=null", "data.demo.text_noise=0.0")
    assert answer.exit_code == 0, answer.output
    assert load_params(project / "params.yaml") == load_params(ROOT / "presets" / "demo.yaml")


def test_a_setting_that_the_file_lacks_is_shown_with_its_default(project: Path) -> None:
    answer = run("config", "set", "data.demo.sense_share=0.5", "data.demo.motion=false")
    assert answer.output == "params.yaml: data.demo.sense_share: 0.9 -> 0.5\n"
    assert run("config", "show", "data.demo.sense_share").output == "0.5\n"
    assert run("config", "show", "evaluate.every_pair").output == "false\n"
    assert run("config", "show", "model.experts.top_kk").exit_code != 0


def test_help_with_a_command_is_that_commands_help(project: Path) -> None:
    assert run("help", "config", "set").output == run("config", "set", "--help").output
    assert run("help").output == run("--help").output


def test_after_a_run_on_videos_of_ones_own_the_search_is_next(project: Path) -> None:
    videos = project / "my videos"
    params = load_params()
    data = params.data.model_copy(update={"source": "folder", "location": videos})
    own = params.model_copy(update={"data": data})
    assert pipeline._search((), own) is None
    videos.mkdir()
    params.paths.pretrained.mkdir(parents=True, exist_ok=True)
    (params.paths.pretrained / "vocabulary.txt").write_text("<pad>\n<unk>\ncat\n")
    assert pipeline._search((), own) == f"vattctl search \"WORDS\" --in '{videos}'"
    assert pipeline._search((), params) is None and pipeline._search(("report",), own) is None


def test_every_page_that_a_message_names_is_in_the_documentation() -> None:
    named = {
        page
        for folder in ("vatt", "vattctl", "stages", "presets")
        for file in (ROOT / folder).rglob("*.[py]*")
        if file.suffix in (".py", ".yaml")
        for page in re.findall(r"docs/[\w-]+\.md", file.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    assert [page for page in sorted(named) if not (ROOT / page).is_file()] == []


def test_global_options_may_follow_the_command(project: Path) -> None:
    place = project.parent
    os.chdir(place)
    answer = run("config", "show", "pretrain.steps", "--project", str(project), "-q")
    assert answer.stdout == "450\n", answer.output


def test_the_variables_of_verbose_and_debug_end_with_their_command(project: Path) -> None:
    before = dict(os.environ)
    assert run("-v", "config", "show", "seed", "--debug").exit_code == 0
    assert dict(os.environ) == before


def test_a_dry_run_of_a_search_counts_the_files_and_writes_nothing(project: Path) -> None:
    def files() -> list[Path]:
        return sorted(path for path in project.rglob("*"))

    before = files()
    place = ["--in", "clips", "--dry-run"]
    assert "would index 10 files in runs/search/" in run("search", "cats", *place).stdout
    found = json.loads(run("search", "cats", *place, "--json").stdout)
    assert (found["files"], found["dry_run"]) == (10, True)
    assert files() == before


# --- completion, in real shells -------------------------------------------------------------------

SHELLS = {"bash": ["bash", "-i"], "zsh": ["zsh", "-i"], "fish": ["fish"]}
TYPED = {
    "vattctl pretr": "pretrain ",
    "vattctl pretrain --set pretrain.precis": "pretrain.precision=",
    "vattctl pretrain --set pretrain.precision=b": "bf16",
    "vattctl repro finetune@audio-s": "audio-scratch",
    "vattctl config use sm": "small",
    "vattctl config set data.demo.text_n": "data.demo.text_noise=",
    "vattctl finetune kinetics4": "kinetics400",
}
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\(B|[=>])|[\r\x08]")


def complete(shell: str, typed: str, place: Path, wanted: str) -> str:
    """What a real interactive shell shows after Tab."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(place)
        os.environ.update(
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            PYTHONPATH=str(ROOT), TERM="xterm", PS1="> ", COLUMNS="100",
        )  # fmt: skip
        os.execvp(SHELLS[shell][0], SHELLS[shell])
    seen = ""

    def read(seconds: float, until: str | None = None) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (until and until in seen):
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    seen += ESCAPES.sub("", os.read(terminal, 65536).decode(errors="replace"))
                except OSError:
                    return

    read(2.5)  # the prompt
    seen = ""
    os.write(terminal, f"{typed}\t".encode())
    read(15, until=wanted)
    os.kill(child, signal.SIGKILL)
    os.close(terminal)
    os.waitpid(child, 0)
    return seen


def test_the_tab_key_fetches_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no project: a look into its MLflow would fail
    context = click.Context(cli, resilient_parsing=True)
    folder = CheckpointFolder(path_type=Path).convert("runs:/3f2a91", None, context)
    assert folder == Path("runs:/3f2a91") and not any(tmp_path.iterdir())


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes_commands_settings_values_stages_presets_and_sets(
    shell: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):  # again changes nothing
        assert run("completion", shell, "--install").exit_code == 0
    lines = [line for file in tmp_path.glob(".*rc") for line in file.read_text().splitlines()]
    assert len(lines) == (0 if shell == "fish" else 1)
    for typed, wanted in TYPED.items():
        assert wanted in complete(shell, typed, project, wanted), typed
