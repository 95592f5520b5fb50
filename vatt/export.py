"""A checkpoint in forms that other software reads: safetensors, ONNX, a Hugging Face folder."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vatt import checkpoint
from vatt.errors import MachineError, VattError
from vatt.files import atomic_folder
from vatt.model.vatt import VATT, Classifier

TOLERANCE = 1e-4  # of the largest value of an output
_TRACED_CLIPS, _COMPARED_CLIPS = 2, (1, 3)
_OUTPUTS = {
    "video": ("video_va", "video_vt", "video_features"),
    "audio": ("audio_va", "audio_features"),
    "text": ("text_vt", "text_features"),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference of a graph's output from ours, as a share of the largest value."""

    graph: str
    output: str
    clips: int
    difference: float


def export_safetensors(folder: Path, out: Path) -> list[Comparison]:
    """Every weight by name in one file; the settings are in its metadata and in config.json."""
    config, model = checkpoint.load_config(folder), checkpoint.load(folder)
    with atomic_folder(out) as temporary:
        _write_weights(model, config, temporary)
        _write_config(config, temporary)
        _copy_vocabulary(folder, temporary)
    return []


def export_huggingface(folder: Path, out: Path) -> list[Comparison]:
    """The layout that a model repository has: config, weights, input settings, card."""
    config, model = checkpoint.load_config(folder), checkpoint.load(folder)
    kind = type(model).__name__
    classes = config.get("classifier", {}).get("classes")
    extended = {
        **config,
        "model_type": "vatt",
        "architectures": [kind],
        "dtype": "float32",
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
    }
    if classes:
        extended["id2label"] = {str(index): name for index, name in enumerate(classes)}
        extended["label2id"] = {name: index for index, name in enumerate(classes)}
    with atomic_folder(out) as temporary:
        _write_weights(model, config, temporary)
        _write_config(extended, temporary)
        inputs = {name: config["model"][name] for name in ("video", "audio", "text")}
        content = {"value_range": [-1.0, 1.0], **inputs}
        (temporary / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")
        (temporary / "README.md").write_text(_card(extended), encoding="utf-8")
        _copy_vocabulary(folder, temporary)
    return []


def export_onnx(folder: Path, out: Path) -> list[Comparison]:
    """A graph for each modality, run with onnxruntime and compared with ours.

    Any number of clips, or of texts (texts, words); the other sizes are those of the settings.
    """
    onnx, onnxruntime = _onnx_packages()
    config, model = checkpoint.load_config(folder), checkpoint.load(folder)
    comparisons = []
    with atomic_folder(out) as temporary:
        for name, part in _parts(model).items():
            path = temporary / f"{name}.onnx"
            inputs = _example(model, name, _TRACED_CLIPS, seed=0)
            _trace(part, inputs, path)
            onnx.checker.check_model(str(path))
            comparisons += _compare(onnxruntime, model, part, path)
        _write_config(config, temporary)
        _copy_vocabulary(folder, temporary)
    return comparisons


FORMS: dict[str, Callable[[Path, Path], list[Comparison]]] = {
    "safetensors": export_safetensors,
    "onnx": export_onnx,
    "huggingface-folder": export_huggingface,
}


class ExportGraph(nn.Module):
    """What a graph computes: one modality in, a tuple of tensors out."""

    def __init__(self, model: VATT | Classifier, modality: str) -> None:
        super().__init__()
        self.model, self.modality = model, modality
        is_classifier = isinstance(model, Classifier)
        self.outputs = ("logits",) if is_classifier else _OUTPUTS[modality]

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The values of `outputs`."""
        if isinstance(self.model, Classifier):
            return (self.model(inputs),)
        if self.modality == "text":  # (texts, words): it does not matter which clip a text is of
            answer = self.model(text=inputs[:, None])
            return tuple(getattr(answer, name)[:, 0] for name in self.outputs)
        answer = self.model(**{self.modality: inputs})
        return tuple(getattr(answer, name) for name in self.outputs)


def _parts(model: VATT | Classifier) -> dict[str, ExportGraph]:
    names = (model.modality,) if isinstance(model, Classifier) else tuple(_OUTPUTS)
    return {name: ExportGraph(model, name).eval() for name in names}


def _example(model: VATT | Classifier, modality: str, clips: int, *, seed: int) -> Tensor:
    """Random input of the sizes in the settings; the last text has pads only."""
    random, params = torch.Generator().manual_seed(seed), model.params
    if modality == "text":
        texts = (clips, params.text.words)
        text = torch.randint(1, max(2, params.text.vocabulary), texts, generator=random)
        text[-1] = 0
        return text
    if modality == "audio":
        bins = () if params.audio.mel_bins is None else (params.audio.mel_bins,)
        shape: tuple[int, ...] = (clips, params.audio.samples, *bins)
    else:
        size = params.video.frame_size
        height, width = (size, size) if isinstance(size, int) else size
        frames = params.video.patch[0] if modality == "image" else params.video.frames
        shape = (clips, frames, height, width, 3)
    return 2 * torch.rand(shape, generator=random) - 1


def _trace(part: ExportGraph, inputs: Tensor, path: Path) -> None:
    # AUTO: our operators choose by size, but every choice traces to the same graph.
    dynamic = {0: torch.export.Dim.AUTO}
    # A fused attention kernel would leave its memory layout in the trace, which the exporter's own
    # attention does not have.
    with _quiet(), sdpa_kernel(SDPBackend.MATH):
        # Strict: Python's len() of a tensor stays a size that may vary, instead of a number.
        program = torch.export.export(part, (inputs,), dynamic_shapes=(dynamic,), strict=True)
        torch.onnx.export(
            program,
            (),
            str(path),
            input_names=[part.modality],
            output_names=list(part.outputs),
            dynamo=True,
            verbose=False,
        )


def _compare(
    onnxruntime: Any, model: VATT | Classifier, part: ExportGraph, path: Path
) -> list[Comparison]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for clips in _COMPARED_CLIPS:
        inputs = _example(model, part.modality, clips, seed=clips)
        theirs = session.run(list(part.outputs), {part.modality: inputs.numpy()})
        with torch.no_grad():
            ours = part(inputs)
        for name, one, other in zip(part.outputs, ours, theirs, strict=True):
            difference = (one - torch.from_numpy(other)).abs().max() / one.abs().max()
            found.append(Comparison(path.name, name, clips, float(difference)))
    worst = max(found, key=lambda comparison: comparison.difference)
    if not worst.difference <= TOLERANCE:
        raise VattError(
            f"{worst.output} of {worst.graph} is {worst.difference:.2g} from ours, "
            f"more than {TOLERANCE:g} of its largest value",
            hint="nothing was written; try other versions of onnx and onnxruntime",
        )
    return found


def _onnx_packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise MachineError(
            f"{error.name} is not installed", hint="pip install 'vattctl[export]'"
        ) from None
    return onnx, onnxruntime


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's warnings of its own deprecations and of packages that we do not need."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_weights(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    aliases = checkpoint.shared_names(model)
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name not in aliases
    }
    metadata = {"format": "pt", "config": json.dumps(config)}
    save_file(tensors, folder / checkpoint.WEIGHTS, metadata=metadata)


def _write_config(config: dict[str, Any], folder: Path) -> None:
    text = json.dumps(config, indent=2) + "\n"
    (folder / checkpoint.CONFIG).write_text(text, encoding="utf-8")


def _copy_vocabulary(folder: Path, out: Path) -> None:
    vocabulary = folder / checkpoint.VOCABULARY
    if vocabulary.exists():
        shutil.copyfile(vocabulary, out / checkpoint.VOCABULARY)


def _card(config: dict[str, Any]) -> str:
    model, task = config["model"], config.get("classifier")
    what = (
        f"a classifier of {task['modality']} into {len(task['classes'])} classes"
        if task
        else "embeddings of video, audio and text in common spaces"
    )
    call = f"model({task['modality']})" if task else "model(video=..., audio=..., text=...)"
    source = config.get("source", {}).get("prefix")
    return f"""---
library_name: vatt
tags: [video, audio, text, vatt]
---
# VATT

Video-Audio-Text Transformer (arXiv 2104.11178): {what}.
Recipe `{model["recipe"]}`, backbone `{model["backbone"]}`, {config["num_parameters"]:,} parameters.
{f"Converted from `{source}`; `config.json` holds the hashes of its files." if source else ""}

```python
import vatt

model = vatt.load("path/to/this/folder")
out = {call}
```

Video is (clips, frames, height, width, 3) and audio (clips, samples), floats in [-1, 1]; text is
(clips, candidates, words), word ids, 0 for a pad. Sizes are in `preprocessor_config.json`.
"""
