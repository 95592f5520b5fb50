"""Where each of our weights is in a released checkpoint.

A layout maps our name to the released keys behind it, without their common root and ending: one
key, or three that are joined (queries, keys and values are one layer here).
"""

from typing import Literal

Input = Literal["video", "audio", "spectrogram"]
Layout = dict[str, tuple[str, ...]]

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
