"""A checkpoint: weights, and the settings that build the model they belong to.

A folder with model.safetensors, config.json and, where known, vocabulary.txt. The paper's model or
the released one is chosen here, by `model.recipe`, and nowhere else.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from vatt.config import ModelParams, Params, Peak, PositiveFloat, PositiveInt, Rate
from vatt.errors import DataError
from vatt.files import atomic_folder
from vatt.model.patches import fit_tables
from vatt.model.transformer import Tower
from vatt.model.vatt import (
    VATT,
    Classifier,
    ClassifierInput,
    paper_towers,
    tower_of,
)
from vatt.release.model import release_parts, release_towers

WEIGHTS, CONFIG, VOCABULARY = "model.safetensors", "config.json", "vocabulary.txt"
VERSION: Literal[1] = 1
CONFIG_BYTES = 16 * 10**6
MOST_TOKENS = 2**16  # of a clip: the paper's models have 1,568 at most
# How much larger than its file a model may be: weights may be stored in 16 bits, and position
# tables may grow.
GROWTH, SLACK = 3, 256 * 10**6


class _DrawsNothing(TorchFunctionMode):
    """Leaves new weights as they are: without memory, torch would import its compiler to draw."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__module__", None) == init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Models that are built in the body have shapes, but no memory for their weights."""
    with torch.device("meta"), _DrawsNothing():
        yield


def build(params: ModelParams) -> VATT:
    """The model that the settings describe, newly initialised."""
    return VATT(params, release_parts(params) if params.recipe == "release" else None)


def build_classifier(
    params: ModelParams, *, modality: ClassifierInput, num_classes: int, head_dropout: float
) -> Classifier:
    """A tower of that model and a linear layer, newly initialised."""
    towers = release_towers if params.recipe == "release" else paper_towers
    return Classifier(
        params,
        towers(params)[tower_of(modality)],
        modality=modality,
        num_classes=num_classes,
        head_dropout=head_dropout,
    )


@cache
def feature_dims(params: ModelParams) -> dict[str, int]:
    """The width of each sense's features."""
    with without_memory():
        model = build(params)
    towers = ((name, model.get_submodule(name)) for name in model.senses)
    return {name: tower.width for name, tower in towers if isinstance(tower, Tower)}


def save(
    weights: nn.Module | dict[str, Tensor],
    params: ModelParams,
    folder: Path,
    *,
    extra: dict[str, Any] | None = None,
    vocabulary: Path | None = None,
) -> None:
    """Write the complete folder or nothing; `extra` is added to config.json.

    For a classifier `extra` holds {"classifier": {"modality": ..., "classes": [...]}}.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    config = {"version": VERSION, "model": params.model_dump(mode="json"), **(extra or {})}
    aliases = shared_names(from_config(config))
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name not in aliases
    }
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if vocabulary is not None:
            shutil.copyfile(vocabulary, temporary / VOCABULARY)


def load(folder: Path | str) -> VATT | Classifier:
    """The model of a folder, with its weights, in eval mode."""
    folder = Path(folder)
    model = from_config(load_config(folder))
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{folder / WEIGHTS} cannot be read: {error}", hint="make the checkpoint again"
        ) from None
    load_weights(model, state, source=folder)
    return model.eval()


def load_config(folder: Path | str) -> dict[str, Any]:
    """config.json of a folder."""
    path = Path(folder) / CONFIG
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"it is larger than {CONFIG_BYTES // 10**6} MB")
        config: dict[str, Any] = from_json(path.read_bytes())
        model = from_config(config, source=path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            hint="a checkpoint is a folder with model.safetensors and config.json",
        ) from None
    weights = Path(folder) / WEIGHTS
    if weights.exists():
        needed = sum(4 * tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        if needed > GROWTH * weights.stat().st_size + SLACK:
            raise DataError(
                f"{path} describes a model of {needed / 1e9:.1f} GB, but {weights} has "
                f"{weights.stat().st_size / 1e9:.3f} GB",
                hint="use the config.json that was written with these weights",
            )
    return config


class ClassifierConfig(BaseModel):
    """What config.json says of a classifier."""

    modality: ClassifierInput
    classes: Annotated[list[str], Field(min_length=1)]
    head_dropout: Rate = 0.0


class TrainClips(BaseModel):
    """The form of the clips of a pre-training; other files are brought to it."""

    model_config = ConfigDict(frozen=True)

    fps: PositiveFloat  # of the frames that the model saw
    stored_fps: PositiveInt
    short_side: PositiveInt  # pixels, as stored
    audio_hz: PositiveInt
    audio_peak: Peak | None = None

    @classmethod
    def of(cls, params: Params) -> Self:
        """As the settings say."""
        stored = params.preprocess
        return cls(
            fps=params.pretrain.fps,
            stored_fps=stored.fps,
            short_side=stored.short_side,
            audio_hz=stored.audio_hz,
            audio_peak=stored.audio_peak,
        )

    def into(self, params: Params) -> Params:
        """Settings of another project that cut and show files as these clips were."""
        stored = self.model_dump(include={"short_side", "audio_hz", "audio_peak"})
        stored["fps"] = self.stored_fps
        return params.model_copy(
            update={
                "preprocess": params.preprocess.model_copy(update=stored),
                "pretrain": params.pretrain.model_copy(update={"fps": self.fps}),
            }
        )


class CheckpointConfig(BaseModel):
    """config.json, as far as it is read here; there may be more in it."""

    version: Literal[1] = VERSION
    model: ModelParams
    classifier: ClassifierConfig | None = None
    clips: TrainClips | None = None


def trained_on(params: Params) -> dict[str, Any]:
    """What a pre-training with these settings adds to config.json."""
    return {"clips": TrainClips.of(params).model_dump()}


def train_clips(config: dict[str, Any]) -> TrainClips | None:
    """What a config.json says of the clips; nothing if the checkpoint was imported, or is older."""
    return CheckpointConfig.model_validate(config).clips


def from_config(config: dict[str, Any], *, source: Path | str = CONFIG) -> VATT | Classifier:
    """The model that a config.json describes, without memory for its weights."""
    try:
        described = CheckpointConfig.model_validate(config)
        params, task = described.model, described.classifier
        with without_memory():
            model = (
                build(params)
                if task is None
                else build_classifier(
                    params,
                    modality=task.modality,
                    num_classes=len(task.classes),
                    head_dropout=task.head_dropout,
                )
            )
        counts = model.token_counts if isinstance(model, VATT) else {"clip": model.num_tokens}
        for name, count in counts.items():
            if count > MOST_TOKENS:
                raise ValueError(f"{name} of {count:,} tokens, more than {MOST_TOKENS:,}")
        return model
    except ValidationError as error:
        problem = max(error.errors(), key=lambda one: len(one["loc"]))  # the most specific one
        place = ".".join(map(str, problem["loc"])) or "the file"
        raise DataError(
            f"{source} does not describe a model: {place}: {problem['msg']}",
            hint="make the checkpoint again",
        ) from None
    except (RuntimeError, ValueError, ArithmeticError) as error:  # sizes that do not fit together
        raise DataError(
            f"{source} describes a model that cannot be built: {error}",
            hint="make the checkpoint again",
        ) from None


def load_weights(
    model: nn.Module, state: dict[str, Tensor], *, source: Path | str = "the checkpoint"
) -> None:
    """Give a model its weights; position tables of other sizes are resized, the rest must fit."""
    state = dict(state)
    for alias, name in shared_names(model).items():
        if alias not in state and name in state:
            state[alias] = state[name]
    state = fit_tables(state, model)
    expected = model.state_dict()
    wrong = [
        f"{name}: {_form(state[name])} instead of {_form(tensor)}"
        for name, tensor in expected.items()
        if name in state and _form(state[name]) != _form(tensor)
    ]
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    if wrong or missing or unknown:
        raise DataError(
            f"the weights in {source} do not fit the model: missing {missing[:5]}, "
            f"unknown {unknown[:5]}, of another shape {wrong[:5]}",
            hint="use the settings that the weights were trained with",
        )
    model.load_state_dict(state, assign=any(tensor.is_meta for tensor in expected.values()))


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else " of whole numbers")


def shared_names(model: nn.Module) -> dict[str, str]:
    """Second names of shared weights (those of the agnostic encoder): second name -> first name."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases
