"""A data set by its name: every recipe to the paper's number, every set to valid settings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.data.corpus import HZ, demo_params, make_clip, write_media
from tests.data.sharding.test_images import write_image
from tests.test_architecture import ROOT
from tests.test_stages import new_project, sets, vattctl
from vatt.checkpoint import save
from vatt.config import LISTS, load_params
from vatt.errors import DataError, SettingsError
from vatt.model.vatt import VATT
from vattctl import sets as data_sets
from vattctl.cli import cli
from vattctl.experiments import write_experiment
from vattctl.sets import SetRequest, modality_of, plan

PAPER = load_params(ROOT / "presets" / "paper.yaml")
KINETICS = "label,youtube_id,time_start,time_end,split\nrun,abcdefghijk,1,11,train\n"
LISTED = {  # the fewest lines that each reader takes for its set
    "audioset": {"eval_segments.csv": "abcdefghijk, 30.000, 40.000, \"/m/09x0r\"\n"},
    "esc50": {"esc50.csv": "filename,fold,category\na.wav,1,dog\n"},
    "hmdb51": {"run_test_split1.txt": "a.avi 1\n"},
    "imagenet": {"imagenet_synsets.txt": "n01440764\nn01443537\n"},
    "kinetics400": {"train.csv": KINETICS},
    "kinetics600": {"train.csv": KINETICS},
    "kinetics700": {"train.csv": KINETICS},
    "moments": {"trainingSet.csv": "run/a.mp4,run,3,0\n", "validationSet.csv": ""},
    "msrvtt": {"msrvtt_test.csv": "video_id,sentence\nvideo1,a car\n"},
    "ucf101": {f"{s}list0{k}.txt": f"Run/{s}.avi\n" for s in ("train", "test") for k in (1, 2, 3)},
    "vggsound": {"test.csv": "abcdefghijk_000030.mp4,dog\n"},
    "youcook2": {"validation_youcook.csv": "end,start,task,text,video_id\n9,1,2,a,abcdefghijk\n"},
}  # fmt: skip


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A project with a small checkpoint of its own shape."""
    home = tmp_path / "project"
    home.mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        (home / name).write_bytes((ROOT / name).read_bytes())
    (home / "presets").symlink_to(ROOT / "presets")
    monkeypatch.chdir(home)
    checkpoint(home / "runs/checkpoints/pretrained")
    return home


def checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    params = demo_params().model
    save(VATT(params), params, folder)
    return folder


def wanted(name: str, home: Path, **more) -> SetRequest:
    return SetRequest(
        name=name,
        start=home / "runs/checkpoints/pretrained",
        location=more.pop("location", home / "media"),
        annotations=home / "annotations",
        experiment=more.pop("experiment", name),
        **more,
    )


def files_of(name: str, home: Path) -> None:
    for file, text in LISTED[name].items():
        path = home / "annotations" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (home / "media").mkdir(exist_ok=True)
    if name == "imagenet":
        write_image(home / "media" / "train" / "n01440764" / "a.JPEG", (9, 9, 9))


def test_every_official_list_but_the_one_for_pre_training_is_a_set(inside):
    assert set(data_sets.names()) == {*LISTS, *data_sets.OWN} - {"howto100m"}
    assert set(LISTED) == set(LISTS) - {"howto100m"}


@pytest.mark.parametrize("name", sorted(LISTED))
def test_a_set_becomes_two_projects_with_valid_settings(inside, name):
    files_of(name, inside)
    made = plan(wanted(name, inside), load_params(), {})
    write_experiment(made.clips)
    write_experiment(made.work)
    clips = load_params(inside / "sets" / name / "params.yaml")
    work = load_params(inside / "experiments" / name / "params.yaml")
    assert clips.data.source == name and clips.data.location_hash
    assert clips.data.annotations == inside / "annotations"
    assert clips.preprocess.audio_hz >= 8000
    assert work.paths.shards == Path(f"../../sets/{name}/data/shards")
    assert (inside / "experiments" / name / work.paths.pretrained / "config.json").exists()
    tasks = work.finetune.tasks
    if made.trains:
        assert work.finetune.run == (name,) and set(tasks) == {name}
        assert (tasks[name].fps or 0) <= clips.preprocess.fps
        assert (tasks[name].audio_hz or 0) <= clips.preprocess.audio_hz
        assert work.evaluate.fps <= clips.preprocess.fps
    else:
        assert name in ("msrvtt", "youcook2") and not tasks
    assert work.report.title == f"VATT on {name}"
    folds = {"ucf101": ("fold1", "fold2", "fold3"), "esc50": ("fold",)}
    folds["hmdb51"] = folds["ucf101"]
    assert {probe.folds for probe in work.evaluate.probes.values()} <= {folds.get(name, ())}
    assert (name in work.evaluate.probes) == (name in folds)


@pytest.mark.parametrize(
    ("recipe", "task"), [("video", "kinetics400"), ("audio", "audioset"), ("image", "imagenet")]
)
def test_recipes_are_those_of_the_paper_preset(inside, recipe, task):
    own = data_sets._read(data_sets.RECIPES / f"{recipe}.yaml")["task"]
    assert own == PAPER.finetune.tasks[task].model_dump(mode="json")


def test_the_numbers_of_the_paper(inside):
    """Section 4.2 and appendix A.2, row by row."""
    video, audio, image = (
        data_sets._read(data_sets.RECIPES / f"{name}.yaml") for name in ("video", "audio", "image")
    )
    stored, task = video["preprocess"], video["task"]
    assert stored["fps"] / task["fps"] == 2 and task["frames"] / task["fps"] == 2.56
    assert (task["frame_size"], task["test_clips"], task["test_crops"]) == (320, 4, 3)
    assert (task["batch_size"], task["steps"], task["label_smoothing"]) == (64, 100_000, 0.1)
    assert task["drop_rate"] == 0 and task["optimizer"]["name"] == "sgd"
    assert (task["optimizer"]["learning_rate"], task["optimizer"]["warmup_steps"]) == (0.005, 2500)
    task = audio["task"]
    assert (
        task["audio_samples"] / task["audio_hz"] == 6.4
        and audio["preprocess"]["audio_hz"] == 24_000
    )
    assert (task["batch_size"], task["steps"], task["mixup"]) == (1024, 50_000, 5.0)
    assert task["loss"] == "balanced_sigmoid"
    assert (task["optimizer"]["learning_rate"], task["optimizer"]["warmup_steps"]) == (0.2, 5000)
    task = image["task"]
    assert (task["modality"], task["frame_size"], task["batch_size"]) == ("image", 384, 512)
    assert task["steps"] == round(50 * 1_281_167 / 512) and task["label_smoothing"] == 0.1
    assert task["optimizer"]["learning_rate"] == 0.08
    for one in (video, audio, image):
        how = one["task"]["optimizer"]
        assert (how["schedule"], how["final_learning_rate"]) == ("half_cosine", 0.0)


# --- one's own data -------------------------------------------------------------------------------


def classes(root: Path, ending: str, layout: str = "{label}/{number}") -> Path:
    for label in ("cat", "dog"):
        for number in range(6):
            split = "test" if number == 0 else "train"
            path = root / (layout.format(label=label, number=number, split=split) + ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{label} {number}".encode())
    return root


@pytest.mark.parametrize(
    ("ending", "modality"), [(".jpg", "image"), (".wav", "audio"), (".mp4", "video")]
)
@pytest.mark.parametrize("layout", ["{label}/{number}", "{split}/{label}/{number}"])
def test_a_folder_for_each_class(inside, tmp_path, ending, modality, layout):
    folder = classes(tmp_path / "my-classes", ending, layout)
    made = plan(wanted("folder", inside, location=folder), load_params(), {})
    task = made.work.settings["finetune", "tasks"]["folder"]
    assert task["modality"] == modality and task["label"] == "class"
    assert task["steps"] >= 100 and task["optimizer"]["warmup_steps"] == task["steps"] // 10
    write_experiment(made.clips)
    write_experiment(made.work)
    clips = load_params(made.clips.folder / "params.yaml")
    assert clips.data.require == (("audio",) if modality == "audio" else ("video",))
    assert clips.data.location == folder
    # The project's own shape: its rates are those that the checkpoint was trained with.
    assert clips.preprocess.audio_hz == 8000
    assert clips.preprocess.fps == (1 if modality == "image" else 10)


@pytest.mark.parametrize("peak", [None, 0.5])
def test_sounds_are_as_loud_as_those_that_the_checkpoint_was_trained_with(inside, tmp_path, peak):
    folder = classes(tmp_path / "my-classes", ".wav")
    params = load_params()
    preprocess = params.preprocess.model_copy(update={"audio_peak": peak})
    params = params.model_copy(update={"preprocess": preprocess})
    made = plan(wanted("folder", inside, location=folder), params, {})
    assert made.clips.settings.get(("preprocess", "audio_peak")) == peak


def test_guesses_about_a_folder_are_announced_and_can_be_overridden(inside, tmp_path):
    folder = classes(tmp_path / "vehicles", ".jpg")
    (folder / "cat").rename(folder / "train")
    (folder / "dog" / "stray.mp4").write_bytes(b"x")

    def made(given, **more):
        return plan(wanted("folder", inside, location=folder, **more), load_params(), given)

    as_class = made({})
    assert as_class.work.settings["finetune", "tasks"]["folder"]["modality"] == "image"
    assert [key in note for key, note in zip(("file_kind", "split_folders"), as_class.notes,
                                             strict=True)] == [True, True]  # fmt: skip
    with pytest.raises(DataError, match="classes among"):
        made({("data", "split_folders"): "splits"})
    with pytest.raises(DataError, match="classes among"):
        made({}, modality="video")  # the one video
    with pytest.raises(SettingsError, match=r"data\.split_folders"):
        made({("data", "split_folders"): "sometimes"})
    write_experiment(as_class.clips)
    assert load_params(as_class.clips.folder / "params.yaml").data.file_kind == "auto"
    assert (as_class.clips.folder / "data" / "content-hashes.tsv").is_file()
    shutil.rmtree(as_class.clips.folder)
    made({}, dry_run=True)
    assert not as_class.clips.folder.exists()


def test_files_with_question_marks_are_what_their_endings_say():
    for url, kind in (("folder:why?.jpg", "image"), ("folder:a#b?c.wav", "audio"),
                      ("https://x/a.jpg?v=.mp4#t=1", "image")):  # fmt: skip
        assert modality_of([replace(make_clip(1), url=url)]) == kind


def test_the_column_label_may_be_written_in_capitals(inside, tmp_path):
    rows = [f"{n}.jpg,{'test' if n > 5 else 'train'},{n % 2}" for n in range(8)]
    (tmp_path / "list.csv").write_text("\n".join(["Path,Split,LABEL", *rows]))
    made = plan(wanted("csv", inside, location=tmp_path / "list.csv"), load_params(), {})
    assert made.work.settings["finetune", "tasks"]["csv"]["label"] == "LABEL"
    assert any("8 of 8 files of the list are not there" in note for note in made.notes)


def test_a_checkpoint_of_another_shape_takes_the_paper_s_rates(inside, tmp_path):
    params = demo_params().model
    video = params.video.model_copy(update={"frame_size": 32})
    params = params.model_copy(update={"video": video})
    save(VATT(params), params, tmp_path / "other")
    folder = classes(tmp_path / "my-classes", ".mp4")
    other = SetRequest("folder", tmp_path / "other", folder, inside / "annotations", "other")
    made = plan(other, load_params(), {})
    (note,) = made.notes
    assert "does not say what it was trained on: preprocess.fps is taken to be 25" in note
    assert not plan(other, load_params(), {("preprocess", "fps"): 25}).notes
    pictures = replace(other, location=classes(tmp_path / "pictures", ".jpg"))
    assert not plan(pictures, load_params(), {}).notes  # no rate plays a part
    assert made.clips.settings["preprocess", "fps"] == 25
    assert made.clips.settings["preprocess", "audio_hz"] == 48_000
    assert made.clips.settings["preprocess", "short_side"] == round(32 * 8 / 7)
    assert made.work.settings["finetune", "tasks"]["folder"]["fps"] == 12.5


def test_a_checkpoint_of_another_project_brings_the_form_of_its_clips(inside, tmp_path):
    params = demo_params().model  # of the shape of the project's own
    clips = {"fps": 5.0, "stored_fps": 15, "short_side": 90, "audio_hz": 16_000, "audio_peak": 0.5}
    save(VATT(params), params, tmp_path / "other", extra={"clips": clips})
    folder = classes(tmp_path / "my-classes", ".mp4")
    other = SetRequest("folder", tmp_path / "other", folder, inside / "annotations", "other")
    made = plan(other, load_params(), {})
    stored = {"fps": 15, "short_side": 90, "audio_hz": 16_000, "audio_peak": 0.5}
    assert {key: made.clips.settings["preprocess", key] for key in stored} == stored
    assert made.work.settings["finetune", "tasks"]["folder"]["fps"] == 5
    assert made.work.settings["evaluate", "fps"] == 5
    assert not made.notes
    made = plan(other, load_params(), {("preprocess", "audio_hz"): 8000})
    assert made.clips.settings["preprocess", "audio_hz"] == 8000


def test_settings_of_the_command_line_reach_into_the_task(inside, tmp_path):
    folder = classes(tmp_path / "x", ".wav")
    given = {("finetune", "tasks", "folder", "optimizer", "learning_rate"): 0.5, ("seed",): 3}
    made = plan(wanted("folder", inside, location=folder, drop_rate=0.25), load_params(), given)
    write_experiment(made.clips)
    write_experiment(made.work)
    work = load_params(made.work.folder / "params.yaml")
    assert work.finetune.tasks["folder"].optimizer.learning_rate == 0.5
    assert work.finetune.tasks["folder"].drop_rate == 0.25
    # Another seed needs no other shards.
    assert work.seed == 3 and load_params(made.clips.folder / "params.yaml").seed == 0
    with pytest.raises(SettingsError, match=r"did you mean 'finetune\.tasks\.folder\.steps'"):
        plan(wanted("folder", inside, location=folder), load_params(),
             {("finetune", "tasks", "folder", "step"): 1})  # fmt: skip


@pytest.mark.parametrize(
    ("name", "made", "message"),
    [
        ("kinetics40", {}, "did you mean 'kinetics400'"),
        ("kinetics400", {}, "should hold csv files of train, val and test from https"),
        ("folder", {"location": None}, "folder needs --data"),
        ("imagenet", {"location": None}, "imagenet needs --data"),
        ("folder", {}, "no video, sound or image in"),
    ],
)
def test_what_is_missing_is_said_with_its_remedy(inside, name, made, message):
    (inside / "media").mkdir()
    with pytest.raises((SettingsError, DataError)) as caught:
        plan(wanted(name, inside, **made), load_params(), {})
    assert message in str(caught.value) and caught.value.hint


def test_one_class_is_nothing_to_learn(inside, tmp_path):
    (tmp_path / "x" / "cat").mkdir(parents=True)
    (tmp_path / "x" / "cat" / "a.wav").write_bytes(b"x")
    with pytest.raises(DataError, match="a classifier needs two"):
        plan(wanted("folder", inside, location=tmp_path / "x"), load_params(), {})


def test_a_classifier_is_no_start(inside, tmp_path):
    (tmp_path / "c").mkdir()
    model = load_params().model.model_dump(mode="json")
    task = {"modality": "video", "classes": ["a", "b"]}
    config = {"version": 1, "model": model, "classifier": task}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    files_of("kinetics400", inside)
    given = SetRequest("kinetics400", tmp_path / "c", None, inside / "annotations", "x")
    with pytest.raises(DataError, match="holds a classifier"):
        plan(given, load_params(), {})
    given = SetRequest("kinetics400", tmp_path / "d", None, inside / "annotations", "x")
    with pytest.raises(DataError, match="vattctl import"):
        plan(given, load_params(), {})


# --- the command ----------------------------------------------------------------------------------


def test_a_dry_run_shows_everything_and_writes_nothing(inside, tmp_path):
    folder = classes(tmp_path / "my-classes", ".wav")
    before = sorted(inside.rglob("*"))
    answer = CliRunner().invoke(cli, ["finetune", "folder", "--data", str(folder), "--dry-run"])
    assert answer.exit_code == 0, answer.output
    for line in (
        "experiments/folder, from ",
        "finetune@folder-pretrained",
        "finetune.tasks.folder.modality: \"audio\"",
        f"data.location: \"{folder}\"",
    ):  # fmt: skip
        assert line in answer.output
    assert sorted(inside.rglob("*")) == before


def test_options_of_a_set_need_a_set(inside):
    answer = CliRunner().invoke(cli, ["finetune", "--data", "x"])
    assert isinstance(answer.exception, SettingsError) and "--data needs a SET" in str(
        answer.exception
    )


@pytest.mark.slow
def test_sounds_of_one_s_own_go_from_files_to_a_report(tmp_path):
    import wave

    import numpy as np

    home = new_project(tmp_path)
    checkpoint(home / "start")
    (home / "sounds").mkdir()
    rows = ["path,label,split"]
    for number in range(24):
        label, pitch = ("low", 300) if number % 2 else ("high", 1500)
        time = np.arange(HZ // 2) / HZ
        tone = np.sin(2 * np.pi * (pitch + 10 * number) * time) * 2e4
        with wave.open(str(home / "sounds" / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, HZ, 0, "NONE", ""))
            file.writeframes(tone.astype("<i2").tobytes())
        rows.append(f"{number}.wav,{label},{'test' if number < 8 else 'train'}")
    (home / "sounds" / "list.csv").write_text("\n".join(rows) + "\n")
    more = {"finetune.tasks.csv.steps": 20, "finetune.tasks.csv.optimizer.warmup_steps": 2,
            "finetune.tasks.csv.batch_size": 8, "evaluate.low_rank_steps": 50}  # fmt: skip
    command = ["finetune", "csv", "--data", "sounds/list.csv", "--from", "start"]
    command += ["--init", "pretrained", "--init", "scratch", "--name", "tones", *sets(more)]
    done = vattctl(home, *command)
    assert "next: vattctl --project experiments/tones" in done.stdout
    found = json.loads((home / "experiments/tones/reports/metrics/evaluate.json").read_text())
    for init in ("pretrained", "scratch"):
        assert found["classification"]["csv"][init]["top_1"]["n"] == 8
    assert found["probes"]["csv"]["svm"]["pretrained"]["n"] == 8
    assert (home / "experiments/tones/reports/report/report.html").stat().st_size > 10_000
    again = vattctl(home, *command)
    assert "Stage 'finetune@csv-scratch' didn't change" in again.stderr
    assert not (home / "experiments/tones/data").exists()  # the shards are the set's


# --- files of one's own as the clips of the project -----------------------------------------------


def own_videos(root: Path, *names: str, seconds: float = 1.0) -> Path:
    """One made video under several names; each copy is another file."""
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_media(file, seconds=seconds + number / 10)
    return root


def run_cli(*arguments: str) -> str:
    answer = CliRunner().invoke(cli, arguments)
    assert answer.exit_code == 0, answer.output
    return answer.output


CLASSES = [f"{kind}/{number}.mp4" for kind in ("cats", "dogs") for number in range(5)]


def test_ingest_takes_a_preset_for_own_videos_and_makes_tasks_of_their_labels(inside, tmp_path):
    folder = own_videos(tmp_path / "Vidéos", *CLASSES)
    output = run_cli("ingest", str(folder))
    params = load_params()
    assert (inside / "params.yaml").read_text().startswith("# Your own videos")
    assert params.report.title == "VATT on Vidéos" and "Vidéos" in output
    assert params.finetune.run == ("class", "class_sound") == tuple(params.finetune.tasks)
    assert {probe.label for probe in params.evaluate.probes.values()} == {"class"}
    assert set(params.evaluate.probes) == {"class", "class_sound"}
    assert params.preprocess.clip_seconds == 1.0 and params.pretrain.fps == 10  # files of a second
    assert params.pretrain.batch_size <= 8 and params.evaluate.retrieval_pool <= 4
    assert "too few to learn from" in output and "released weights" in output


def test_videos_without_labels_have_no_tasks_and_longer_ones_the_papers_window(inside, tmp_path):
    folder = own_videos(tmp_path / "videos", "a.mp4", "b.mp4", seconds=9)
    run_cli("ingest", str(folder))
    params = load_params()
    assert params.finetune.run == () and params.evaluate.probes == {}
    assert params.model.audio.samples == 3.2 * params.preprocess.audio_hz
    assert params.model.video.frames / params.pretrain.fps == 3.2


def test_the_labels_of_a_csv_become_tasks(inside, tmp_path):
    rows = [f"clip{n}.mp4,0,9,{'train' if n < 6 else 'test'},{n % 2}" for n in range(8)]
    own_videos(tmp_path, *(f"clip{n}.mp4" for n in range(8)))
    list_file = tmp_path / "list.csv"
    list_file.write_text("\n".join(["path,start,end,split,loud noise", *rows]))
    run_cli("ingest", str(list_file))
    params = load_params()
    assert (params.data.source, params.data.location) == ("urls", list_file)
    assert params.finetune.run == ("loud_noise",)
    assert params.finetune.tasks["loud_noise"].label == "loud noise"


def test_another_preset_keeps_own_data_and_demo_does_not(inside, tmp_path):
    folder = own_videos(tmp_path / "videos", *CLASSES)
    run_cli("ingest", str(folder))
    run_cli("config", "set", "machine.workers=1", "data.file_kind=recordings")
    assert "data as before" in run_cli("config", "use", "one-gpu")
    params = load_params()
    assert params.data.location == folder and params.data.file_kind == "recordings"
    assert params.model.video.size == "base" and params.machine.workers == 1
    assert params.data.min_clips <= 10 and params.pretrain.batch_size < 10
    assert params.finetune.tasks["class"].label == "class"
    run_cli("config", "use", "demo")
    assert (inside / "params.yaml").read_bytes() == (ROOT / "presets/demo.yaml").read_bytes()


def test_sizes_that_a_person_chose_stay(inside, tmp_path):
    folder = own_videos(tmp_path / "videos", *CLASSES)
    run_cli("config", "set", "model.va_dim=64")
    before = (inside / "params.yaml").read_text()
    run_cli("ingest", str(folder), "--dry-run")
    assert (inside / "params.yaml").read_text() == before
    run_cli("ingest", str(folder))
    params = load_params()
    assert params.model.va_dim == 64 and params.model.video.frame_size == 64
    assert params.data.location == folder


@pytest.mark.parametrize("preset", ["small", "one-gpu"])
def test_a_preset_for_own_videos_says_nothing_of_the_demo(preset):
    text = (ROOT / f"presets/{preset}.yaml").read_text().lower()
    for word in ("the demo", "digit", "rhythm", "motion"):
        assert word not in text
