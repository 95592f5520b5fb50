"""Which released model a checkpoint holds, and where each of our weights is in it.

Its settings are read from names and shapes of weights. A layout maps our name to the released keys
behind it, without their common root and ending: one key, or three that are joined (queries, keys
and values are one layer here).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from vatt.config import (
    AudioParams,
    ModelParams,
    ReleaseParams,
    SizeName,
    SizeParams,
    TextParams,
    VideoParams,
)
from vatt.errors import DataError, SettingsError
from vatt.model.transformer import SIZES
from vatt.model.vatt import ClassifierInput

Input = Literal["video", "audio", "spectrogram"]
Layout = dict[str, tuple[str, ...]]

Shape = tuple[int, ...]

ROOT = "model/layer_with_weights-0/"
ENDING = "/.ATTRIBUTES/VARIABLE_VALUE"
SLOT = "/.OPTIMIZER_SLOT/"
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
COUNTERS = ("optimizer/", "save_counter/", "global_step/", "step/")

PRETRAINED = "_base_layer/"
FINE_TUNED = "_base/"
HEADS = "_head_layer/_bridge_heads/0/"
SHARED = PRETRAINED + "unified_backbone/unified_transformer/"
TOWERS = {
    "video": PRETRAINED + "vid_backbone/_base/",
    "audio": PRETRAINED + "aud_backbone/_base/",
    "text": PRETRAINED + "txt_backbone/",
}
PATCHES: dict[Input, str] = {
    "video": "voxel_to_patch",
    "audio": "wave_to_patch",
    "spectrogram": "spectrum_to_patch",
}
AXES = {
    "video": ("temporal", "vertical", "horizontal"),
    "audio": ("temporal",),
    "spectrogram": ("temporal", "spectral"),
    "text": ("temporal",),
}
SHORT = {"video": "vid", "audio": "aud", "text": "txt"}
_AXIS_KEYS = {"spectral": "spectoral"}  # as the release spells it

_NORM = {"weight": "gamma", "bias": "beta"}
_DENSE = {"weight": "kernel", "bias": "bias"}

_BLOCK = {  # ours: (released, what its weight and bias are called there)
    "attention_norm": ("layer_norm", _NORM),
    "attention.out": ("mha/o", _DENSE),
    "mlp_norm": ("feed_forward/layer_norm", _NORM),
    "mlp.hidden": ("feed_forward/mlp/wi", _DENSE),
    "mlp.out": ("feed_forward/mlp/wo", _DENSE),
}
_TEXT_BLOCK = _BLOCK | {
    "attention_norm": ("self_attention/layer_norm", {"weight": "weight"}),
    "attention.out": ("self_attention/attention/o", _DENSE),
}
_HEAD_PARTS = {
    "video_to_va.0.linear": ("vid_to_hid", _DENSE),
    "video_to_va.0.norm": ("hid_to_va/pre_bn", _NORM),
    "video_to_va.2.linear": ("hid_to_va/dense", _DENSE),
    "video_to_va.2.norm": ("hid_to_va/bn", _NORM),
    "audio_to_va.linear": ("aud_to_va", _DENSE),
    "va_to_vt.1.linear": ("va_to_vat/dense", _DENSE),
    "va_to_vt.1.norm": ("va_to_vat/bn", _NORM),
    "text_to_vt.linear": ("txt_to_vat", _DENSE),
}
_STATISTICS = {"running_mean": "moving_mean", "running_var": "moving_variance"}

HEAD_DIM = 64  # of every released model
DROPOUT = 0.1  # of every released model, too
ONLY = "the only encoder"  # in `heads`: whichever encoder there is
WORDS = 16  # the specific model has no table that says it
_PLACEHOLDER_SIZE: SizeName = "tiny"  # of the towers that a fine-tuned model does not have


@dataclass(frozen=True, slots=True)
class ReleasedModel:
    """A checkpoint's model; the last two are for fine-tuned ones."""

    description: str
    params: ModelParams
    layout: Layout
    modality: ClassifierInput | None = None
    num_classes: int | None = None


@dataclass(frozen=True, slots=True)
class KeyShapes:
    """The shapes of the released weights (keys without root and ending), and the --heads given."""

    shapes: Mapping[str, Shape]
    heads: Mapping[str, int]

    def of(self, key: str, rank: int) -> Shape:
        """The shape of a weight that has `rank` axes."""
        shape = self.shapes.get(key)
        if shape is None or len(shape) != rank:
            found = "is missing" if shape is None else f"has the shape {list(shape)}"
            raise DataError(
                f"{ROOT}{key} {found}; the model cannot be recognised without it",
                hint="is this a complete checkpoint of VATT?",
            )
        return shape

    def depth(self, layers: str) -> int:
        """How many layers there are under a key that ends in `layers/`."""
        pattern = re.compile(re.escape(layers) + r"(\d{1,4})/")
        found = {int(match[1]) for key in self.shapes if (match := pattern.match(key))}
        if found != set(range(len(found))) or not found:
            raise DataError(f"{ROOT}{layers} has the layers {sorted(found)[:20]}")
        return len(found)

    def size(self, tower: str, layers: str, query: str, hidden: str) -> SizeName | SizeParams:
        """An encoder's dimensions, by name where it is one of the named sizes."""
        dim, inner = self.of(f"{layers}0/{query}/kernel", 2)
        mlp_dim = self.of(f"{layers}0/{hidden}/kernel", 2)[1]
        heads = self._heads(tower) or _default_heads(tower, inner)
        if inner % heads:
            raise SettingsError(f"--heads {tower}={heads} does not divide {inner}, its inner width")
        size = SizeParams(
            depth=self.depth(layers),
            dim=dim,
            mlp_dim=mlp_dim,
            heads=heads,
            head_dim=inner // heads,
        )
        return next((name for name, known in SIZES.items() if known == size), size)

    def _heads(self, tower: str) -> int | None:
        if _has(self.shapes, SHARED):  # one encoder, whichever tower --heads names
            return next(iter(self.heads.values()), None)
        return self.heads.get(tower, self.heads.get(ONLY))

    def encoder_size(self, tower: str, root: str) -> SizeName | SizeParams:
        """An encoder of patches."""
        return self.size(tower, f"{root}tx/layers/", "mha/q", "feed_forward/mlp/wi")

    def video(self, size: SizeName | SizeParams, kernel: str, positions: str) -> VideoParams:
        """The video input that the tables were made for."""
        t, h, w = self.of(f"{kernel}/kernel", 5)[:3]
        frames, rows, columns = (
            self.of(f"{positions}{axis}_position_embeddings/embeddings", 2)[0] * step
            for axis, step in zip(AXES["video"], (t, h, w), strict=True)
        )
        frame_size = rows if rows == columns else (rows, columns)
        return VideoParams(size=size, frames=frames, frame_size=frame_size, patch=(t, h, w))

    def waveform(self, size: SizeName | SizeParams, kernel: str, positions: str) -> AudioParams:
        """The waveform that the table was made for."""
        patch = self.of(f"{kernel}/kernel", 3)[0]
        steps = self.of(f"{positions}temporal_position_embeddings/embeddings", 2)[0]
        return AudioParams(
            size=size, input="waveform", samples=steps * patch, patch=patch, mel_bins=None
        )

    def spectrogram(self, size: SizeName | SizeParams, kernel: str, positions: str) -> AudioParams:
        """The spectrogram that the tables were made for."""
        t, f = self.of(f"{kernel}/kernel", 4)[:2]
        steps = self.of(f"{positions}temporal_position_embeddings/embeddings", 2)[0]
        bands = self.of(f"{positions}spectoral_position_embeddings/embeddings", 2)[0]
        return AudioParams(
            size=size, input="spectrogram", samples=steps * t, patch=(t, f), mel_bins=bands * f
        )


def recognise(shapes: Mapping[str, Shape], heads: Mapping[str, int]) -> ReleasedModel:
    """The model of these weights; `heads` overrides the number of heads of a tower."""
    known = KeyShapes(shapes, heads)
    try:
        if _has(shapes, SHARED):
            return _agnostic(known)
        if _has(shapes, PRETRAINED):
            return _specific(known)
        for kind, patch in PATCHES.items():
            if _has(shapes, FINE_TUNED + patch):
                return _classifier(known, kind)
    except ValidationError as error:
        raise DataError(f"no model has weights of these shapes: {error}") from None
    raise DataError(
        f"this is not a checkpoint of VATT: not one of its {len(shapes)} weights has a known name, "
        f"such as {ROOT}{FINE_TUNED}...",
        hint="the published ones are listed in docs/released-weights.md",
    )


def _specific(known: KeyShapes) -> ReleasedModel:
    video, audio, text = TOWERS.values()
    _towers_exist(known.heads, TOWERS)
    layers = f"{text}base_lm/layers/"
    text_size = known.size("text", layers, "self_attention/attention/q", "feed_forward/mlp/wi")
    table = known.of(f"{text}embedding/embeddings", 2)
    params = ModelParams(
        recipe="release",
        backbone="specific",
        video=known.video(
            known.encoder_size("video", video),
            f"{video}voxel_to_patch",
            f"{video}pos_embedding_lookup/",
        ),
        audio=known.waveform(
            known.encoder_size("audio", audio),
            f"{audio}wave_to_patch",
            f"{audio}pos_embedding_lookup/",
        ),
        text=TextParams(size=text_size, words=WORDS, vocabulary=table[0]),
        va_dim=known.of(f"{HEADS}aud_to_va/kernel", 2)[1],
        vt_dim=known.of(f"{HEADS}txt_to_vat/kernel", 2)[1],
        dropout=DROPOUT,
        release=ReleaseParams(word_dim=table[1]),
    )
    depths = {
        "video": known.depth(f"{video}tx/layers/"),
        "audio": known.depth(f"{audio}tx/layers/"),
        "text": known.depth(layers),
    }
    return ReleasedModel("pre-trained, modality-specific", params, specific_layout(depths))


def _agnostic(known: KeyShapes) -> ReleasedModel:
    root, positions = SHARED, f"{SHARED}pos_embedding_lookup/"
    _towers_exist(known.heads, TOWERS, one_encoder=True)
    size = known.encoder_size("video", root)
    table = known.of(f"{root}raw_to_embeddings/text/embeddings", 2)
    words = known.of(f"{positions}text/temporal_position_embeddings/embeddings", 2)[0]
    params = ModelParams(
        recipe="release",
        backbone="agnostic",
        video=known.video(size, f"{root}raw_to_embeddings/video", f"{positions}video/"),
        audio=known.waveform(size, f"{root}raw_to_embeddings/audio", f"{positions}audio/"),
        text=TextParams(size=size, words=words, vocabulary=table[0]),
        va_dim=known.of(f"{HEADS}aud_to_va/kernel", 2)[1],
        vt_dim=known.of(f"{HEADS}txt_to_vat/kernel", 2)[1],
        dropout=DROPOUT,
        release=ReleaseParams(
            word_dim=table[1], post_dim=known.of(f"{root}post_proj/video/kernel", 2)[1]
        ),
    )
    layout = agnostic_layout(known.depth(f"{root}tx/layers/"))
    return ReleasedModel("pre-trained, modality-agnostic", params, layout)


def _classifier(known: KeyShapes, kind: Input) -> ReleasedModel:
    root = FINE_TUNED
    tower: ClassifierInput = "video" if kind == "video" else "audio"
    _towers_exist(known.heads, (tower,))
    size = known.encoder_size(tower, root)
    read = {"video": known.video, "audio": known.waveform, "spectrogram": known.spectrogram}[kind]
    found = read(size, root + PATCHES[kind], f"{root}pos_embedding_lookup/")
    is_agnostic = _has(known.shapes, f"{root}post_proj")
    other = size if is_agnostic else _PLACEHOLDER_SIZE
    params = ModelParams(
        recipe="release",
        backbone="agnostic" if is_agnostic else "specific",
        video=found
        if isinstance(found, VideoParams)
        else VideoParams(size=other, frames=4, frame_size=16, patch=(4, 16, 16)),
        audio=found
        if isinstance(found, AudioParams)
        else AudioParams(size=other, input="waveform", samples=128, patch=128, mel_bins=None),
        text=TextParams(size=other, words=WORDS, vocabulary=1),
        va_dim=1,
        vt_dim=1,
        dropout=DROPOUT,
        release=ReleaseParams(
            post_dim=known.of(f"{root}post_proj/kernel", 2)[1] if is_agnostic else 1024,
            scrambled_spectrogram=kind == "spectrogram",
        ),
    )
    return ReleasedModel(
        f"fine-tuned on {kind}" + (", modality-agnostic" if is_agnostic else ""),
        params,
        classifier_layout(kind, known.depth(f"{root}tx/layers/")),
        modality=tower,
        num_classes=known.of("_ops/cls/kernel", 2)[1],
    )


def _default_heads(tower: str, inner: int) -> int:
    if inner % HEAD_DIM:
        raise SettingsError(
            f"the {tower} encoder's inner width {inner} is not a multiple of {HEAD_DIM}, the width "
            "of "
            "a head in all released models",
            hint=f"give its number of heads: --heads {tower}=N",
        )
    return inner // HEAD_DIM


def _towers_exist(
    heads: Mapping[str, int], towers: Iterable[str], *, one_encoder: bool = False
) -> None:
    """Refuse --heads where it is not clear which encoder has how many."""
    allowed = tuple(towers)
    if ONLY in heads and len(allowed) > 1 and not one_encoder:
        raise SettingsError(
            "--heads gives one number to a checkpoint of several encoders",
            hint=f"name each: --heads {','.join(f'{name}=N' for name in allowed)}",
        )
    if one_encoder and len(set(heads.values())) > 1:
        raise SettingsError("--heads gives several numbers to a checkpoint of one shared encoder")
    for tower in heads:
        if tower not in (*allowed, ONLY):
            raise SettingsError(
                f"--heads names '{tower}'; the towers of this checkpoint are {', '.join(allowed)}"
            )


def _has(shapes: Mapping[str, Shape], start: str) -> bool:
    return any(key.startswith(start) for key in shapes)


# --- our names and the released ones -------------------------------------------------------------


def specific_layout(depths: dict[str, int]) -> Layout:
    """Pre-trained, one encoder a modality; `depths` are those of the encoders."""
    return (
        patch_tower("video.", TOWERS["video"], "video", depths["video"])
        | patch_tower("audio.", TOWERS["audio"], "audio", depths["audio"])
        | text_tower("text.", TOWERS["text"], depths["text"])
        | heads()
    )


def agnostic_layout(depth: int) -> Layout:
    """Pre-trained, one encoder for all."""
    layout = heads()
    for modality, short in SHORT.items():
        ours = f"{modality}."
        layout |= _positions(
            f"{ours}embed.positions.", f"{SHARED}pos_embedding_lookup/{modality}/", AXES[modality]
        )
        parts = {
            "embed.project": "raw_to_embeddings",
            "embed.lift.linear": "pre_proj",
            "post.linear": "post_proj",
        }
        layout |= _named(ours, SHARED, {o: (f"{t}/{modality}", _DENSE) for o, t in parts.items()})
        layout |= encoder(f"{ours}encoder.", f"{SHARED}tx/", depth)
        layout[f"{ours}agg_token"] = (f"{SHARED}{short}_agg_embedding",)
    layout["text.embed.table.weight"] = (f"{SHARED}raw_to_embeddings/text/embeddings",)
    return layout


def classifier_layout(kind: Input, depth: int) -> Layout:
    """Fine-tuned; that of an agnostic model also has the dense layers around the encoder."""
    layout = patch_tower("backbone.", FINE_TUNED, kind, depth)
    parts = {"embed.lift.linear": ("pre_proj", _DENSE), "post.linear": ("post_proj", _DENSE)}
    layout |= _named("backbone.", FINE_TUNED, parts)
    return layout | _named("", "_ops/", {"head": ("cls", _DENSE)})


def patch_tower(ours: str, theirs: str, kind: Input, depth: int) -> Layout:
    """A tower of video, waveform or spectrogram."""
    return {
        **_named(ours, theirs, {"embed.project": (PATCHES[kind], _DENSE)}),
        **_positions(f"{ours}embed.positions.", f"{theirs}pos_embedding_lookup/", AXES[kind]),
        **encoder(f"{ours}encoder.", f"{theirs}tx/", depth),
        f"{ours}agg_token": (f"{theirs}agg_embedding",),
    }


def text_tower(ours: str, theirs: str, depth: int) -> Layout:
    """The T5-style text tower."""
    layers = f"{theirs}base_lm/layers/"
    layout: Layout = {
        f"{ours}embed.table.weight": (f"{theirs}embedding/embeddings",),
        f"{ours}agg_token": (f"{theirs}agg_embedding",),
        f"{ours}lift.0.weight": (f"{theirs}pre_proj/kernel",),
        f"{ours}relative.table.weight": (
            f"{layers}0/self_attention/attention/relative_attention_bias/embeddings",
        ),
        f"{ours}encoder.norm.weight": (f"{theirs}base_lm/final_layer_norm/weight",),
    }
    for layer in range(depth):
        block, source = f"{ours}encoder.blocks.{layer}.", f"{layers}{layer}/"
        layout |= _named(block, source, _TEXT_BLOCK)
        layout |= _joined(f"{block}attention.qkv", f"{source}self_attention/attention/")
    return layout


def encoder(ours: str, theirs: str, depth: int) -> Layout:
    """The encoder of video, audio, or all modalities."""
    layout = _named(ours, theirs, {"norm": ("final_layer_norm", _NORM)})
    for layer in range(depth):
        block, source = f"{ours}blocks.{layer}.", f"{theirs}layers/{layer}/"
        layout |= _named(block, source, _BLOCK)
        layout |= _joined(f"{block}attention.qkv", f"{source}mha/")
    return layout


def heads() -> Layout:
    """The projections into the common spaces, with the statistics of their batch norms."""
    layout = _named("heads.", HEADS, _HEAD_PARTS)
    for name, (source, kind) in _HEAD_PARTS.items():
        if kind is _NORM:
            layout |= _named("heads.", HEADS, {name: (source, _STATISTICS)})
    return layout


def _positions(ours: str, theirs: str, axes: tuple[str, ...]) -> Layout:
    layout = _named(ours, theirs, {"norm": ("layernorm", _NORM)})
    for axis in axes:
        key = f"{theirs}{_AXIS_KEYS.get(axis, axis)}_position_embeddings/embeddings"
        layout[f"{ours}{axis}"] = (key,)
    return layout


def _named(ours: str, theirs: str, parts: dict[str, tuple[str, dict[str, str]]]) -> Layout:
    return {
        f"{ours}{name}.{leaf}": (f"{theirs}{source}/{key}",)
        for name, (source, leaves) in parts.items()
        for leaf, key in leaves.items()
    }


def _joined(ours: str, theirs: str) -> Layout:
    return {
        f"{ours}.{leaf}": tuple(f"{theirs}{part}/{key}" for part in "qkv")
        for leaf, key in _DENSE.items()
    }
