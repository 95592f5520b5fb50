"""Images are clips of one frame: by content, through download, shards and batches."""

import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.data.corpus import TEST_DATA, demo_params, needs_data, write_media
from tests.data.sharding.test_shards import write
from tests.data.sources.test_official_lists import place
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.media import probe
from vatt.data.clips.samples import read_index
from vatt.data.fetching.download import download
from vatt.data.loading.batches import Sampling, eval_batches
from vatt.data.loading.reader import ShardIndex
from vatt.data.sources.choice import READERS, listed
from vatt.data.sources.folder import scan
from vatt.data.sources.imagenet import read_classes, read_real, read_val
from vatt.data.sources.official import CLASSES, COUNTS
from vatt.errors import DataError

FILES = Path(TEST_DATA or "/nowhere") / "annotations" / "ImageNet"
CODECS = {".jpg": ("mjpeg", "yuvj420p"), ".png": ("png", "rgb24"), ".bmp": ("bmp", "bgr24")}
COLOURS = {"n01440764": (200, 40, 40), "n01443537": (40, 60, 210)}
SYNSETS = "n01440764 : tench, Tinca tinca\nn01443537 : goldfish, Carassius auratus\n"


def write_image(path: Path, colour: tuple[int, int, int], *, size=(60, 90), form="") -> None:
    """A plain image, its upper half black."""
    codec, pixels = CODECS[form or path.suffix.lower().replace("jpeg", "jpg")]
    content = np.zeros((*size, 3), np.uint8)
    content[size[0] // 2 :] = colour
    encoder = av.CodecContext.create(codec, "w")
    encoder.height, encoder.width, encoder.pix_fmt = *size, pixels
    encoder.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(content, format="rgb24").reformat(
        format=pixels, dst_color_range=2 if codec == "mjpeg" else None
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(bytes(p) for p in [*encoder.encode(frame), *encoder.encode(None)]))


def still(params) -> Sampling:
    task = params.finetune.tasks["image"]
    return Sampling.for_task(params.model, task.model_copy(update={"frame_size": 24}))


def through(root: Path, params, clips, **preprocess) -> None:
    """Clips -> shards, as the stages do it."""
    states = download(
        clips, params.data, params.machine, media=root / "media", ledger=root / "d.jsonl"
    )
    assert states["ok"] == len(clips), read_ledger(root / "d.jsonl")
    write(root, clips, read_ledger(root / "d.jsonl"), params=params, **preprocess)


@pytest.mark.parametrize("name", ["a.jpg", "b.png", "c.bmp", "d %03d.jpeg"])
@pytest.mark.parametrize("fps", [1, 10])
def test_an_image_of_any_form_is_one_second_of_one_picture(tmp_path, name, fps):
    write_image(tmp_path / "images" / "x" / name, (200, 40, 40))
    media = probe(tmp_path / "images" / "x" / name)
    assert (media.num_frames, media.seconds, media.audio) == (1, 1.0, None)
    params = demo_params(source="folder", location=tmp_path / "images")
    through(tmp_path, params, scan(tmp_path / "images", params.data).clips, fps=fps)
    [row] = read_index(tmp_path / "shards" / "index.jsonl")[1]
    assert row.num_frames == fps and (row.height, row.width) == (32, 48) and row.audio is None
    index = ShardIndex.load(tmp_path / "shards", split="train")
    [batch] = eval_batches(index, still(params), batch_size=1)
    frames = batch.video[0].numpy().astype(int)
    assert (frames == frames[:1]).all()
    assert np.abs(frames[0, 20, 12] - (200, 40, 40)).max() < 12 and frames[0, 3].max() < 12


def test_an_image_by_another_name_is_known_by_its_content(tmp_path):
    """ImageNet holds a PNG that is called JPEG."""
    write_image(tmp_path / "x.JPEG", (1, 200, 1), form=".png")
    assert probe(tmp_path / "x.JPEG").image == "png_pipe"


def test_a_broken_image_ends_in_the_ledger(tmp_path):
    write_image(tmp_path / "images" / "a.png", (9, 99, 199))
    whole = (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "b.png").write_bytes(whole[:20])
    params = demo_params(source="folder", location=tmp_path / "images", require=("video",))
    clips = scan(tmp_path / "images", params.data).clips
    through(tmp_path, params, clips)
    states = {clip.url: read_ledger(tmp_path / "ledger.jsonl")[clip.clip_id] for clip in clips}
    assert states["folder:a.png"].state == "ok"
    assert states["folder:b.png"].state in ("corrupt", "no-video")


def test_beside_videos_images_are_thumbnails(tmp_path):
    write_image(tmp_path / "cats" / "a.jpg", (9, 9, 9))
    assert [clip.url for clip in scan(tmp_path, demo_params().data).clips] == ["folder:cats/a.jpg"]
    write_media(tmp_path / "cats" / "a.mp4")
    found = scan(tmp_path, demo_params().data)
    assert [clip.url for clip in found.clips] == ["folder:cats/a.mp4"]
    assert found.ignored == {".jpg files": 1}


def write_gif(path: Path, num_pictures: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="gif") as container:
        stream = container.add_stream("gif", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "rgb8"
        for number in range(num_pictures):
            pixels = np.full((32, 48, 3), 80 + 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def test_a_gif_of_one_picture_is_an_image_and_of_several_a_video(tmp_path):
    for count in (1, 2, 12):
        write_gif(tmp_path / "gifs" / f"{count}.gif", count)
    (tmp_path / "gifs" / "torn.gif").write_bytes((tmp_path / "gifs" / "1.gif").read_bytes()[:40])
    still, *moving = [probe(tmp_path / "gifs" / f"{count}.gif") for count in (1, 2, 12)]
    assert (still.image, still.seconds, still.num_frames) == ("gif_pipe", 1.0, 1)
    assert [(media.image, media.num_frames) for media in moving] == [(None, 2), (None, 12)]
    params = demo_params(source="folder", location=tmp_path / "gifs", require=("video",))
    clips = scan(tmp_path / "gifs", params.data).clips
    through(tmp_path, params, clips, fps=1)
    known = read_ledger(tmp_path / "ledger.jsonl")
    states = {clip.url: known[clip.clip_id].state for clip in clips}
    assert states["folder:1.gif"] == states["folder:12.gif"] == "ok"
    assert states["folder:2.gif"] == "too-short" and states["folder:torn.gif"] != "ok"


# --- ImageNet -------------------------------------------------------------------------------------


def images(root: Path, layout: str) -> Path:
    """Two classes of three train images each and four val images, as archives leave them."""
    train, val = {
        "plain": ("train", "val"),
        "kaggle": ("ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/val"),
        "archives": ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
    }[layout]
    for synset, colour in COLOURS.items():
        for number in range(3):
            write_image(root / train / synset / f"{synset}_{number}.JPEG", colour)
    for number in range(1, 5):
        colour = list(COLOURS.values())[number % 2]
        write_image(root / val / f"ILSVRC2012_val_{number:08d}.JPEG", colour)
    return root


TOLD = ["n01443537", "n01440764", "n01443537", "n01440764"]


def ground_truth(kind: str) -> dict[str, str]:
    if kind == "LOC_val_solution.csv":
        rows = [f"ILSVRC2012_val_{n:08d},{s} 1 2 3 4 " for n, s in enumerate(TOLD, start=1)]
        return {kind: "ImageId,PredictionString\n" + "\n".join(rows[::-1]) + "\n"}
    if kind == "ILSVRC2012_validation_ground_truth.txt":
        return {kind: "".join(f"{490 if s == 'n01440764' else 361}\n" for s in TOLD)}
    return {kind: "\n".join(TOLD) + "\n"}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("plain", "LOC_val_solution.csv"),
        ("kaggle", "imagenet_2012_validation_synset_labels.txt"),
        ("archives", "ILSVRC2012_validation_ground_truth.txt"),
    ],
)
def test_imagenet_s_layouts_and_val_labels(tmp_path, layout, kind):
    location = images(tmp_path / "images", layout)
    lists = place(
        tmp_path / "lists" / "imagenet",
        {"LOC_synset_mapping.txt": SYNSETS, "imagenet_real_labels.json": "[[1], [0, 1], [], [0]]"}
        | ground_truth(kind),
    )
    if kind.startswith("ILSVRC2012"):
        from scipy.io import savemat

        rows = np.array(
            [(490, "n01440764"), (361, "n01443537")],
            dtype=[("ILSVRC2012_ID", object), ("WNID", object)],
        )
        savemat(lists / "meta.mat", {"synsets": rows})
    params = demo_params(
        source="imagenet", annotations=tmp_path / "lists", location=location, min_clips=1
    )
    clips = list(listed(params.data, 0))
    assert Counter(clip.split for clip in clips) == {"train": 6, "test": 4}
    told = {clip.url[-13:]: clip.labels for clip in clips if clip.split == "test"}
    assert told["00000001.JPEG"] == {"class": "n01443537 goldfish", "real": "n01443537 goldfish"}
    assert told["00000002.JPEG"]["real"] == "n01440764 tench|n01443537 goldfish"
    assert told["00000003.JPEG"] == {"class": "n01443537 goldfish"}
    through(tmp_path, params, clips, fps=1, video_storage="jpeg", jpeg_scale=2)
    for split in ("train", "test"):
        index = ShardIndex.load(tmp_path / "shards", split=split)
        for batch in eval_batches(index, still(params), batch_size=8):
            for label, shown in zip(batch.labels["class"], batch.video, strict=True):
                wanted = COLOURS[label.split()[0]]
                assert np.abs(shown[0, 20, 12].numpy().astype(int) - wanted).max() < 12


def test_imagenet_s_val_in_folders_needs_no_labels(tmp_path):
    location = images(tmp_path / "images", "plain")
    for number, synset in enumerate(TOLD, start=1):
        flat = location / "val" / f"ILSVRC2012_val_{number:08d}.JPEG"
        (location / "val" / synset).mkdir(exist_ok=True)
        shutil.move(flat, location / "val" / synset / flat.name)
    lists = place(tmp_path / "lists", {"imagenet_synsets.txt": "n01440764\nn01443537\n"})
    data = demo_params(source="imagenet", annotations=tmp_path, location=location).data
    labels = {clip.url[-13:-5]: clip.labels["class"] for clip in READERS["imagenet"](lists, data)}
    assert [labels[f"{n:08d}"] for n in range(1, 5)] == TOLD
    count = len(list(READERS["imagenet"](lists, data)))
    for folder in (location / "train").iterdir():  # as in Tiny ImageNet
        folder.rename(location / "images")
        folder.mkdir()
        (location / "images").rename(folder / "images")
    assert len(list(READERS["imagenet"](lists, data))) == count > len(TOLD)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not one of LOC_synset_mapping.txt"),
        ({"imagenet_synsets.txt": "n01440764\nx\n"}, "synsets.txt:2: 'x' is not a synset"),
        ({"LOC_synset_mapping.txt": SYNSETS}, "is flat, and no file"),
        (
            {"LOC_synset_mapping.txt": SYNSETS.splitlines()[0] + "\n"},
            "n01443537 does not have the name of a class",
        ),
        (
            {
                "LOC_synset_mapping.txt": SYNSETS,
                "LOC_val_solution.csv": "ImageId,PredictionString\nx,y\n",
            },
            "LOC_val_solution.csv:2: 'x' is not a val image",
        ),
        (
            {"LOC_synset_mapping.txt": SYNSETS, "ILSVRC2012_validation_ground_truth.txt": "1\n"},
            "meta.mat is missing",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_or_broken_is_named(tmp_path, files, message):
    location = images(tmp_path / "images", "plain")
    data = demo_params(source="imagenet", annotations=tmp_path, location=location).data
    with pytest.raises(DataError) as caught:
        list(READERS["imagenet"](place(tmp_path / "lists", files), data))
    assert message in str(caught.value) and caught.value.hint


@needs_data
def test_imagenet_s_own_files_load_whole():
    classes = read_classes(FILES)
    assert len(classes) == CLASSES["imagenet"][1] and classes["n02123045"] == "n02123045 tabby"
    assert list(classes) == (FILES / "imagenet_synsets.txt").read_text().split()
    real = read_real(FILES, classes)
    assert len(real) == COUNTS["imagenet"]["test"]
    assert sum(not labels for labels in real) == 3163  # images that show none of the thousand
    assert len({name for labels in real for name in labels.split("|")} - {""}) == 1000
    assert read_val(FILES) is None
