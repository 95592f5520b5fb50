"""The schema of params.yaml: every setting of the pipeline, its unit and its rules.

Settings are read once, at the edge (`load_params`), into frozen sections; a function takes the
section it needs. The schema has no default for anything an experiment varies: the file says it.
Only what goes beyond the paper is off by default (`off`).
"""

import difflib
import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from vatt.errors import SettingsError

PARAMS_FILE = Path("params.yaml")
YAML_BYTES, YAML_DEPTH, YAML_NODES = 10**6, 32, 20_000  # far more than any settings need
SHOWN = 20  # problems of a settings file, at most

SizeName = Literal["tiny", "small", "base", "medium", "large"]
Modality = Literal["video", "audio", "text", "motion", "depth"]
Precision = Literal["fp32", "bf16"]  # of matrix products; weights, norms and losses are fp32
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
MOST = 10**9  # of anything: a larger number is a mistake
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
PositiveFloat = Annotated[float, Field(gt=0, le=MOST)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MOST)]
Layers = Annotated[int, Field(gt=0, le=1000)]
Width = Annotated[int, Field(gt=0, le=2**16)]
Frames = Annotated[int, Field(gt=0, le=10**5)]
Pixels = Annotated[int, Field(gt=0, le=2**14)]
Rate = Annotated[float, Field(ge=0, lt=1)]  # a share below 1, e.g. of tokens that are dropped
Share = Annotated[float, Field(ge=0, le=1)]
MergeRate = Annotated[float, Field(ge=0, le=0.5)]  # a merged pair takes two tokens
Peak = Annotated[float, Field(gt=0, le=1)]
NoiseShare = Annotated[float, Field(ge=0, le=0.8)]


class Section(BaseModel):
    """A part of params.yaml; it is frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, as_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A setting that is `off` is not written, so states and checkpoints stay what they were."""
        fields = type(self).model_fields
        return {
            key: value
            for key, value in as_dict(self).items()
            if not (is_off(fields[key]) and getattr(self, key) == fields[key].default)
        }


def off(default: Any = None) -> Any:
    """A setting beyond the paper: params.yaml may leave it out, which switches it off."""
    return Field(default=default, json_schema_extra={"off": True})


def is_off(field: FieldInfo) -> bool:
    """Whether a setting was declared with `off`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and "off" in extra


# --- where things lie -----------------------------------------------------------------------------


class PathsParams(Section):
    """Files and folders, relative to the project's root."""

    manifest: Path  # JSON lines, one clip each
    download_ledger: Path  # the outcome of each clip's download
    media: Path  # downloaded files; not a DVC output, so that nothing is copied
    shards: Path  # tars + index + vocabulary
    preprocess_ledger: Path
    pretrain_state: Path  # resumable, ZeRO-sharded
    checkpoints: Path  # the parent of the next two
    pretrained: Path  # exported checkpoint: model.safetensors + config.json
    finetuned: Path  # <task>-<init>/ inside
    finetune_state: Path
    evaluation: Path  # arrays behind the metrics: similarities, features, predictions
    metrics: Path  # <stage>.json
    runs: Path  # <stage>.json: MLflow run id and timings; nothing depends on it
    report: Path  # report.html, report.md

    def below(self, folder: Path) -> "PathsParams":
        """The same places as seen from the folder above a project."""
        return self.model_copy(update={name: folder / path for name, path in self})


# --- data -----------------------------------------------------------------------------------------


OWN_SOURCES = ("demo", "folder", "urls")
LISTS = (  # official lists: their readers are in vatt/data/sources
    "audioset", "esc50", "hmdb51", "howto100m", "imagenet", "kinetics400", "kinetics600",
    "kinetics700", "moments", "msrvtt", "ucf101", "vggsound", "youcook2",
)  # fmt: skip
OF_FILES = {
    "esc50",
    "hmdb51",
    "imagenet",
    "moments",
    "msrvtt",
    "ucf101",
}  # their media come as an archive


class DemoParams(Section):
    """The generated corpus: moving handwritten digits with their telephone tones."""

    train_clips: PositiveInt
    test_clips: PositiveInt
    no_text_share: Share  # of the train clips: like AudioSet's, without text
    dead_links: NonNegativeInt  # clips whose address does not exist, as in any list
    voices: Path | None = off()  # folder of spoken digits, as FSDD's: they replace the tones
    text_noise: NoiseShare = off(0.0)  # of the train captions: unrelated, late, or with wrong words
    motion: bool = off(False)  # an inertial sensor that moves with the digit, in noise
    depth: bool = off(False)  # how far away the digit and what is behind it are, in noise
    sense_share: Share = off(0.9)  # of the clips: the others lack motion, or depth


class DataParams(Section):
    """Where clips come from and how many must survive."""

    source: str  # demo, folder, urls, or official lists joined by +, as howto100m+audioset
    location: Path | None  # folder of videos (urls: a csv file); lists look there for files first
    location_hash: str | None  # of what lies there, or of the lists, as vattctl saw it: for DVC
    allow_absolute_paths: bool  # in a csv: files that do not lie below its own folder
    split_folders: Literal["auto", "splits", "classes"]  # what sub-folders called train, test are
    file_kind: Literal["auto", "images", "recordings"]  # auto: what most files of a folder are
    caption_languages: tuple[str, ...]  # of several subtitle files the first of these is taken
    sentences: bool = off(False)  # of subtitle files: captions are sentences, not cues
    annotations: Path | None  # official lists: <annotations>/<list>/ holds the files of each
    mix: dict[str, Annotated[float, Field(gt=0, le=1)]] | None  # shares of the hours; null: all
    sample_share: Annotated[float, Field(gt=0, le=1)]  # of the clips, by the hash of their ids
    sections: bool  # fetch only the listed part of a video
    height: PositiveInt  # pixels; the largest stream of a video that is not higher is taken
    base_urls: tuple[str, ...]  # mirrors tried first, in order
    allow_private_hosts: bool  # fetch from this machine and its network, not only from base_urls
    allow_youtube: bool  # read docs/data-sources.md first: their terms apply
    test_share: Share  # of the videos without a split of their own
    val_share: Share  # the same, for pretrain.evaluate_every
    require: tuple[Modality, ...]  # a clip that lacks one of these is dropped
    min_clips: PositiveInt  # stop when fewer clips are left
    min_share: Share  # stop when a smaller share of the manifest is left
    demo: DemoParams

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that `source` joins."""
        return tuple(self.source.split("+"))

    @model_validator(mode="after")
    def _source_is_known(self) -> "DataParams":
        unknown = set(self.sources) - set(LISTS)
        if self.source not in OWN_SOURCES and unknown:
            close = difflib.get_close_matches(min(unknown), (*OWN_SOURCES, *LISTS), n=1)
            raise ValueError(
                f"data.source {self.source} is unknown: use {', '.join(OWN_SOURCES)}, "
                f"or some of {', '.join(LISTS)} joined by +"
                + (f"; did you mean '{close[0]}'?" if close else "")
            )
        needs_files = {"folder", "urls"} | OF_FILES
        if needs_files & set(self.sources) and self.location is None:
            raise ValueError(f"data.location is needed when data.source is {self.source}")
        if self.source not in OWN_SOURCES and self.annotations is None:
            raise ValueError(f"data.annotations is needed when data.source is {self.source}")
        if self.mix is not None and set(self.mix) != set(self.sources):
            raise ValueError(f"data.mix must name exactly {', '.join(self.sources)}")
        if self.test_share + self.val_share > 1:
            raise ValueError("data.test_share and data.val_share add up to more than 1")
        return self


class TextQualityParams(Section):
    """How train captions are made better candidates before they are stored."""

    fillers: tuple[str, ...]  # words that are left out: um, uh
    repeat_seconds: NonNegativeFloat  # a caption said again so soon is dropped; 0: none is
    languages: tuple[str, ...]  # ISO 639-1; captions surely in others are dropped; empty: kept
    least_quality: Share  # captions with a lower score are dropped; 0: none is


class MotionStorageParams(Section):
    """How inertial sensors are stored: at a constant rate, by the clock of the picture."""

    hz: PositiveInt  # samples a second
    channels: Width  # the first ones of a file; one that has fewer is refused
    longest_gap: PositiveFloat = off(0.2)  # seconds between two samples of a window


class DepthStorageParams(Section):
    """How depth is stored: one channel of 8 bits, at `preprocess.fps`."""

    short_side: Pixels
    farthest: PositiveInt = off(255)  # the value of a source's pixel that is stored as 255
    png_fps: PositiveFloat = off(30.0)  # of a folder of pictures


class PreprocessParams(Section):
    """What the shards hold."""

    clip_seconds: PositiveFloat  # a longer span is cut into clips of this length
    min_clip_seconds: PositiveFloat  # a shorter clip is left out
    fps: PositiveInt
    short_side: PositiveInt  # pixels
    video_storage: Literal["h264", "jpeg"]  # docs/data-format.md measures them
    crf: Annotated[int, Field(ge=0, le=51)]  # h264: quality, lower is better
    gop: PositiveInt  # h264: frames from one key frame to the next
    fast_decode: bool  # h264: a little larger, far faster to read
    jpeg_scale: Annotated[int, Field(ge=2, le=31)]  # jpeg: quality, lower is better
    audio_storage: Literal["pcm", "flac", "aac"]
    aac_kbps: PositiveInt  # aac: bit rate
    audio_hz: PositiveInt  # sample rate, mono
    audio_peak: Peak | None = off()  # a clip's loudest sample, of full scale; null: as recorded
    samples_per_shard: PositiveInt
    vocabulary: PositiveInt  # word ids, at most; id 0 pads
    vocabulary_file: Path | None  # a list of words or WordPieces; null: the corpus's words
    stop_words: Path | None  # a file of words to leave out, one per line
    clean_text: bool  # leave out [sounds], speakers' names, web addresses
    text_quality: TextQualityParams | None = off()  # null: captions are used as they are
    max_failed_share: Share  # stop when a larger share of the clips fails
    motion: MotionStorageParams | None = off()
    depth: DepthStorageParams | None = off()

    @model_validator(mode="after")
    def _rate_that_aac_knows(self) -> "PreprocessParams":
        if self.audio_storage == "aac" and self.audio_hz not in AAC_RATES:
            raise ValueError(
                f"preprocess.audio_storage: aac cannot hold {self.audio_hz} Hz; "
                f"preprocess.audio_hz may be one of {', '.join(map(str, AAC_RATES))}"
            )
        return self


# --- model ----------------------------------------------------------------------------------------


class SizeParams(Section):
    """A Transformer's dimensions, where no named size fits."""

    depth: Layers
    dim: Width
    mlp_dim: Width
    heads: Width
    head_dim: Width


class VideoParams(Section):
    """The video tower's input."""

    size: SizeName | SizeParams
    frames: Frames  # T, per clip
    frame_size: Pixels | tuple[Pixels, Pixels]  # H = W, or (H, W), pixels
    patch: tuple[Frames, Pixels, Pixels]  # t, h, w


class AudioParams(Section):
    """The audio tower's input."""

    size: SizeName | SizeParams
    input: Literal["waveform", "spectrogram"]
    samples: PositiveInt  # S, waveform samples; for a spectrogram its number of mel frames
    patch: PositiveInt | tuple[PositiveInt, PositiveInt]  # samples, or (frames, mel bins)
    mel_bins: PositiveInt | None  # spectrogram only

    @model_validator(mode="after")
    def _bins_of_a_spectrogram(self) -> "AudioParams":
        spectrogram = self.input == "spectrogram"
        if spectrogram != (self.mel_bins is not None) or spectrogram != isinstance(
            self.patch, tuple
        ):
            raise ValueError(
                "a spectrogram needs mel_bins and a patch of (frames, mel bins), e.g. 80 and "
                "[16, 5]; a waveform has mel_bins: null and a patch in samples"
            )
        return self


class TextParams(Section):
    """The text tower's input."""

    size: SizeName | SizeParams
    words: Width  # L, at most
    vocabulary: PositiveInt  # rows of the embedding table


class MotionParams(Section):
    """The motion tower's input: C channels of an inertial sensor."""

    size: SizeName | SizeParams
    samples: PositiveInt  # a clip, at the rate of the shards
    channels: Width
    patch: PositiveInt  # samples


class DepthParams(Section):
    """The depth tower's input: frames of one channel."""

    size: SizeName | SizeParams
    frames: Frames  # a clip, at the rate of the video's frames
    frame_size: Pixels | tuple[Pixels, Pixels]  # H = W, or (H, W), pixels
    patch: tuple[Frames, Pixels, Pixels]  # t, h, w


class ReleaseParams(Section):
    """Settings of released models only: in imported checkpoints, not needed in params.yaml."""

    word_dim: Width = 300  # width of the frozen word table
    post_dim: Width = 1024  # agnostic: width of the features
    scrambled_spectrogram: bool = False  # the release's position order


class ExpertsParams(Section):
    """Sparse experts in place of the MLP of some blocks; docs/beyond.md."""

    number: Annotated[int, Field(gt=0, le=1024)]  # experts in each block that has some
    top_k: Literal[1, 2] = 1  # experts of each token
    every: Layers = 2  # blocks from one with experts to the next, from the last but one back
    capacity: PositiveFloat | None = None  # of an expert, in shares of a clip's tokens; null: all
    batch_priority: bool = True  # with a capacity, the surest tokens of a clip come first
    balance_weight: NonNegativeFloat = 0.01  # of the loss that keeps experts equally busy
    local_weight: NonNegativeFloat = 0.01  # of LIMoE's local entropy: sure routers
    global_weight: NonNegativeFloat = 0.04  # of LIMoE's global entropy: several experts a modality
    least_experts: Annotated[float, Field(ge=1, le=1024)] = 2.0  # of each modality: e ^ tau

    @model_validator(mode="after")
    def _enough_experts(self) -> "ExpertsParams":
        if self.top_k > self.number or self.least_experts > max(2, self.number):
            raise ValueError(
                "model.experts.top_k and model.experts.least_experts cannot be larger than "
                f"model.experts.number, {self.number}"
            )
        return self


TowerParams = VideoParams | AudioParams | TextParams | MotionParams | DepthParams


class ModelParams(Section):
    """The model: three towers or one, and the common spaces."""

    recipe: Literal["paper", "release"]
    backbone: Literal["specific", "agnostic"]
    video: VideoParams
    audio: AudioParams
    text: TextParams
    motion: MotionParams | None = off()
    depth: DepthParams | None = off()
    va_dim: Width  # common space of video and audio
    vt_dim: Width  # common space of video and text
    dropout: Rate
    release: ReleaseParams = ReleaseParams()  # read by recipe: release
    experts: ExpertsParams | None = off()  # null: every block has one MLP

    @model_validator(mode="after")
    def _experts_have_a_block(self) -> "ModelParams":
        sizes = [section.size for section in self.towers().values()]
        if self.experts is not None and self.recipe == "release":
            raise ValueError("model.experts needs model.recipe: paper")
        if self.experts is not None and any(
            isinstance(size, SizeParams) and size.depth < 2 for size in sizes
        ):
            raise ValueError(
                "model.experts needs encoders of 2 blocks: the last one has no experts"
            )
        return self

    @model_validator(mode="after")
    def _one_encoder_when_agnostic(self) -> "ModelParams":
        towers = self.towers()
        if self.backbone == "agnostic" and any(
            tower.size != self.video.size for tower in towers.values()
        ):
            *most, last = (f"model.{name}.size" for name in towers)
            raise ValueError(
                f"model.backbone: agnostic shares one encoder, so {', '.join(most)} "
                f"and {last} must be equal"
            )
        beyond = sorted(towers.keys() - {"video", "audio", "text"})
        if self.recipe == "release" and beyond:
            raise ValueError(f"model.recipe: release has no {' and no '.join(beyond)}")
        return self

    def towers(self) -> dict[str, "TowerParams"]:
        """The section of each sense that is on, by its name, in the order of the fields."""
        found = {name: getattr(self, name) for name in get_args(Modality)}
        return {name: section for name, section in found.items() if section is not None}


# --- training -------------------------------------------------------------------------------------


class AugmentationParams(Section):
    """One random draw for each clip, applied to all its frames alike."""

    crop_area: tuple[PositiveFloat, PositiveFloat]  # share of the frame's area, from and to
    crop_aspect: tuple[PositiveFloat, PositiveFloat]
    flip: bool
    brightness: NonNegativeFloat  # as in the paper: 32/255 is 0.1255
    contrast: NonNegativeFloat
    saturation: NonNegativeFloat
    hue: NonNegativeFloat


class OptimizerParams(Section):
    """The optimiser and its learning-rate schedule."""

    name: Literal["adam", "sgd"]  # sgd has momentum 0.9
    learning_rate: PositiveFloat  # at the end of the warm-up
    final_learning_rate: NonNegativeFloat
    warmup_steps: NonNegativeInt
    schedule: Literal["quarter_cosine", "half_cosine"]  # the paper pre-trains with a quarter period
    weight_decay: NonNegativeFloat
    clip_norm: PositiveFloat | None


class TextWeightingParams(Section):
    """Candidates weighted by how well the model itself finds that they fit their clip.

    A candidate's agreement is the probability that it chooses its clip and not another of the
    batch, by the model's own similarities: 0.5 is chance.
    """

    kind: Literal["drop", "weight"]  # weight: 1 for an agreement of 1, 0 from `least` down
    least: Rate  # agreement; drop: a candidate below it does not count
    warmup_steps: NonNegativeInt  # of plain MIL-NCE; they depend on the step alone


class PretrainParams(Section):
    """Contrastive pre-training."""

    batch_size: PositiveInt  # global
    steps: PositiveInt
    precision: Precision
    fps: PositiveFloat  # of the frames shown to the model
    augmentation: AugmentationParams
    text_candidates: PositiveInt  # K: sentences nearest in time, MIL-NCE's positives
    text_weighting: TextWeightingParams | None = off()  # null: all candidates count alike
    drop_rate: Rate  # DropToken, video and audio
    drop_by: Literal["random", "content"] = off("random")  # content: what moves or sounds is kept
    drop_random_share: Share = off(0.25)  # drop_by content: of the kept tokens, drawn from the rest
    merge_rate: MergeRate = off(0.0)  # of its tokens that each block merges; text never merges
    temperature: PositiveFloat
    mil_nce_weight: NonNegativeFloat
    senses_weight: NonNegativeFloat = off(1.0)  # of each NCE with video beyond the paper's
    optimizer: OptimizerParams
    save_every: PositiveInt  # steps
    keep_states: PositiveInt  # how many of the latest states are kept
    keep_states_every: PositiveInt | None  # steps; these are kept forever; null: never
    report_every: PositiveInt  # steps
    evaluate_every: PositiveInt | None  # steps; retrieval on the val split; null: never
    evaluate_clips: PositiveInt  # of the val split, searched each time

    @property
    def random_share(self) -> float:
        """The share of the kept tokens that DropToken draws; the paper's draws all of them."""
        return 1.0 if self.drop_by == "random" else self.drop_random_share


class FinetuneTaskParams(Section):
    """Fine-tuning on one task."""

    modality: Literal["video", "audio", "image"]
    label: str  # name of the label in the manifest
    train_labels: PositiveInt | None  # labelled clips to train on, balanced; null: all
    frames: Frames | None  # video only; an image is repeated to fill one patch in time
    fps: PositiveFloat | None
    frame_size: Pixels | None
    audio_samples: PositiveInt | None
    audio_hz: PositiveInt | None
    batch_size: PositiveInt
    steps: PositiveInt
    precision: Precision
    augmentation: AugmentationParams
    drop_rate: Rate
    loss: Literal["softmax", "balanced_sigmoid"]
    label_smoothing: Rate
    mixup: NonNegativeFloat  # Beta(a, a); 0: off
    head_dropout: Rate
    optimizer: OptimizerParams
    test_clips: PositiveInt  # spread over the clip; logits averaged
    test_crops: Literal[1, 3]
    save_every: PositiveInt
    report_every: PositiveInt


class FinetuneParams(Section):
    """The fine-tuning runs: every task in `run` from every start in `init`."""

    run: tuple[str, ...]
    init: tuple[Literal["pretrained", "scratch"], ...]
    tasks: dict[str, FinetuneTaskParams]

    @model_validator(mode="after")
    def _tasks_exist(self) -> "FinetuneParams":
        for name in self.run:
            if name not in self.tasks:
                raise ValueError(f"finetune.run names '{name}', which finetune.tasks does not have")
        return self


class ProbeParams(Section):
    """A linear classifier on frozen features."""

    modality: Literal["video", "audio"]
    label: str
    train_labels: PositiveInt | None  # null: all
    folds: tuple[str, ...]  # labels that name the official splits; empty: train/test


class EvaluateParams(Section):
    """What is measured on the test split."""

    fps: PositiveFloat  # of the frames shown to the encoder
    clips: PositiveInt  # windows spread over a test clip
    captions: PositiveInt  # of a clip, at most: those nearest to its first window
    caption_queries: Literal["averaged", "each"]  # one query per clip or per caption
    retrieval_pool: PositiveInt  # test clips searched
    class_labels: tuple[str, ...]  # class@1: the best hit agrees in all of these; may be empty
    probes: dict[str, ProbeParams]
    low_rank_steps: NonNegativeInt  # of the low-rank probe, in addition to the SVM; 0: none
    batch_size: PositiveInt
    precision: Precision
    merge_rate: MergeRate = off(0.0)  # of its tokens that each block merges; classifiers, too
    bootstrap: PositiveInt  # resamples behind every 95 % interval
    every_pair: bool = off(False)  # retrieval also between pairs that were not trained together


class ReportParams(Section):
    """The report."""

    title: str
    tsne_clips: PositiveInt
    device_hour_price: NonNegativeFloat | None  # of one GPU or CPU core; null: no cost is given


class DownloadParams(Section):
    """Limits that spare the hosts of the clips, and limits on what a download may use here."""

    per_host: PositiveInt  # files fetched from one host at the same time
    pause_seconds: NonNegativeFloat  # between the starts of two files from one host
    max_mb_per_second: PositiveFloat | None  # of one file
    max_gb: PositiveFloat | None  # of the media folder


class MachineParams(Section):
    """What must not change a result; no stage depends on it."""

    processes: PositiveInt
    threads: PositiveInt | None  # per process; null: cores / processes
    zero_stage: Literal[0, 1, 2, 3]
    offload: Literal["none", "optimizer", "all"]
    micro_batch_size: PositiveInt | Literal["auto"] | None  # null: all clips; auto: what fits
    activation_checkpointing: bool  # keep only a block's input; compute the block again
    compile: bool | Literal["auto"]  # torch.compile of each block; auto: on a GPU
    launcher_arguments: tuple[str, ...]  # to the deepspeed launcher
    workers: NonNegativeInt  # processes that download, encode and decode; 0: in the main one
    executor: Literal["local", "ray"]  # where download and preprocess run: docs/many-machines.md
    ray_address: str | None  # host:port; null: a cluster is started here
    cache_gb: NonNegativeFloat  # decoded clips kept in memory
    prefetch_gb: PositiveFloat  # batches made ahead, in each process; one always is
    max_broken_share: Rate  # a training stops when a larger share of its samples is broken
    load_ledger: Path  # lists the samples that a training could not read
    shards_url: str | None  # s3://..., https://...: the source of missing shards
    shard_cache: Path  # the folder of fetched shards
    shard_cache_gb: NonNegativeFloat
    ffmpeg: Path | None  # null: the one in the imageio-ffmpeg wheel
    download: DownloadParams
    cookies: Path | None  # a cookies.txt file, as browsers export it
    proxy: Path | None  # a file with the address of the proxy and, if needed, its password
    mlflow_uri: str  # a relative sqlite path starts at the project's root
    experiment: str
    max_artifact_mb: NonNegativeFloat  # larger checkpoints are not copied, only named

    @property
    def launcher_counts(self) -> bool:
        """Whether the launcher's arguments name the machines and the number of processes."""
        given = {argument.partition("=")[0] for argument in self.launcher_arguments}
        return bool(given & {"--hostfile", "-H", "--include", "-i", "--num_nodes", "--num_gpus"})


class Params(Section):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    paths: PathsParams
    data: DataParams
    preprocess: PreprocessParams
    model: ModelParams
    pretrain: PretrainParams
    finetune: FinetuneParams
    evaluate: EvaluateParams
    report: ReportParams
    machine: MachineParams


def check_share(batch_size: int, processes: int, *, setting: str, paired: bool = False) -> None:
    """Refuse a global batch that the processes cannot divide equally, or not in whole pairs."""
    whole = processes * (2 if paired else 1)
    if batch_size % whole:
        parts = f"{processes} processes" + (f", in pairs for mixup: {whole}" if paired else "")
        raise SettingsError(
            f"{setting} {batch_size} is not divisible by {parts}",
            hint=f"change machine.processes or {setting}",
        )


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check the settings; a wrong key or value names the file, the key and a remedy."""
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise SettingsError(
            f"{path} is missing", hint="run `vattctl config use demo` in the project's root"
        ) from None
    return parse_params(raw, source=path)


def read_yaml(path: Path) -> Any:
    """A YAML file written by a person: its size, depth and aliases are limited, keys are unique."""
    try:
        if path.stat().st_size > YAML_BYTES:
            raise ValueError(f"it is larger than {YAML_BYTES // 1000} kB")
        text = path.read_text(encoding="utf-8")
        _limit_expansion(yaml.parse(text, yaml.SafeLoader))
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, loader)
        return loader.construct_document(node)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(
            f"{path} cannot be read: {error}", hint="correct it, or `vattctl config use PRESET`"
        ) from None


def _limit_expansion(events: Iterable[Any]) -> None:
    """Refuse nesting and aliases that would become far more than the file shows."""
    total, sizes, open_ = 0, dict[str | None, int](), list[tuple[str | None, int]]()
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:  # it has one once its end was read
                raise ValueError(f"line {line}: *{event.anchor} contains itself or is unknown")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            if isinstance(event, yaml.ScalarEvent):
                sizes[event.anchor] = 1
            else:
                open_.append((event.anchor, total))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            sizes[anchor] = total - before + 1
        if len(open_) > YAML_DEPTH or total > YAML_NODES:
            raise ValueError(
                f"line {line}: more than {YAML_DEPTH} levels of nesting, or more than "
                f"{YAML_NODES} values when aliases are expanded"
            )


def _check_node(node: yaml.Node, loader: yaml.SafeLoader) -> None:
    """Refuse values that cannot be read and keys that occur twice in a section."""
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        try:
            loader.construct_object(node)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"line {line}: {reprlib.repr(node.value)}: {error}") from None
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_node(child, loader)
    else:
        known: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {line}: a key is not a word")
            if key.value in known:
                line = key.start_mark.line + 1
                raise ValueError(f"line {line}: {key.value} is in this section twice")
            known.add(key.value)
            _check_node(value, loader)


def parse_params(raw: Any, *, source: Path) -> Params:
    """Check settings that are already in memory; `source` is named in the message."""
    if not isinstance(raw, dict):
        raise SettingsError(f"{source} must hold sections, not {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(_explain(error, raw, source)) from None


def plain(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of settings as plain values."""
    return {
        name: one.model_dump(mode="json") if isinstance(one, BaseModel) else one
        for name, one in sections.items()
    }


def fingerprint(*sections: Any) -> str:
    """The sha256 of settings; it does not depend on their order in the file."""
    numbered = plain({str(place): one for place, one in enumerate(sections)})
    text = json.dumps(list(numbered.values()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def known_keys(path: tuple[str, ...]) -> list[str]:
    """The keys that the section at `path` may have; empty where any name is allowed."""
    return sorted(_fields_at(path))


def known_values(path: tuple[str, ...]) -> list[str]:
    """The words that the setting at `path` may be; empty where any number or text is allowed."""
    fields = _fields_at(path[:-1])
    return _words_of(fields[path[-1]].annotation) if path[-1] in fields else []


def may_be_missing(path: tuple[str, ...]) -> bool:
    """Whether a file may lack the key at `path`: it, or a section around it, is off by default."""
    fields = _fields_at(path[:-1])
    if not path or path[-1] not in fields:
        return False
    return is_off(fields[path[-1]]) or may_be_missing(path[:-1])


def default_of(path: tuple[str, ...]) -> Any:
    """The plain value that a missing key stands for; None where it has no default."""
    field = _fields_at(path[:-1]).get(path[-1])
    default = None if field is None or field.is_required() else field.get_default()
    return plain({"": default})[""]


def off_keys(section: Any = None, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys that a file may lack; not those of tasks and probes, whose names are free."""
    for name, field in getattr(section or Params, "model_fields", {}).items():
        if may_be_missing((*above, name)):
            yield (*above, name)
        if get_origin(field.annotation) is not dict and (inner := _section_of(field.annotation)):
            yield from off_keys(inner, (*above, name))


def _fields_at(path: tuple[str, ...]) -> dict[str, FieldInfo]:
    section: Any = Params
    for key in path:
        fields = getattr(section, "model_fields", {})
        section = _section_of(fields[key].annotation if key in fields else section)
    return getattr(section, "model_fields", {})


def _words_of(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if annotation is bool:
        return ["true", "false"]
    if annotation is type(None):
        return ["null"]
    if get_origin(annotation) in (tuple, list, dict):
        return []
    return [word for part in get_args(annotation) for word in _words_of(part)]


def _section_of(annotation: Any) -> Any:
    """The settings class inside an annotation such as `dict[str, ProbeParams]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _section_of(part)
        if found is not None:
            return found
    return None


def _explain(error: ValidationError, raw: dict[str, Any], source: Path) -> str:
    lines = []
    for problem in error.errors()[:SHOWN]:
        keys = tuple(str(part) for part in problem["loc"])
        dotted = ".".join(keys) or "the file"
        place = f"{source}:{_line_of(source, keys)}" if keys else str(source)
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(keys[-1], known_keys(keys[:-1]), n=1)
            remedy = f"did you mean '{close[0]}'?" if close else "remove it"
            lines.append(f"{place}: unknown key {dotted}; {remedy}")
        elif problem["type"] == "missing":
            lines.append(f"{place}: {dotted} is missing; a new `vattctl init` folder shows a value")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            got = "" if isinstance(given, dict) else f", got {reprlib.repr(given)}"
            lines.append(f"{place}: {dotted}: {message}{got}")
    if error.error_count() > SHOWN:
        lines.append(f"{source}: and {error.error_count() - SHOWN} more problems")
    return "\n".join(dict.fromkeys(lines))


def _line_of(source: Path, keys: tuple[str, ...]) -> int:
    """The line of a key in a YAML file; of its nearest parent when it is not there."""
    try:
        node = yaml.compose(source.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return 1
    line = 1
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            break
        for name, value in node.value:
            if name.value == key:
                line, node = name.start_mark.line + 1, value
                break
        else:
            break
    return line
