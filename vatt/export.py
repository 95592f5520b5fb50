"""A checkpoint for others: as safetensors, ONNX or a Hugging Face folder, and at an address."""

import ast
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vatt import checkpoint
from vatt.errors import DataError, MachineError, SettingsError, VattError
from vatt.files import atomic_folder, lock
from vatt.model.vatt import VATT, Classifier
from vatt.progress import Progress

TOLERANCE = 1e-4  # of the largest value of an output
_TRACED_CLIPS, _COMPARED_CLIPS = 2, (1, 3)
_ROOT, _CODE = Path(__file__).parent, "vatt.release.modeling_vatt"
_AUTO = {
    "video": "AutoModelForVideoClassification",
    "audio": "AutoModelForAudioClassification",
    "image": "AutoModelForImageClassification",
}
_PIPELINES = {
    "video": "video-classification",
    "audio": "audio-classification",
    "image": "image-classification",
}
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


def export_huggingface(
    folder: Path, out: Path, *, run: str = "", licence: str | None = None
) -> list[Comparison]:
    """A folder that transformers' AutoModel loads: config, weights, input settings, code, card.

    `run` is the part of the card that describes the run (Markdown).
    """
    config, model = checkpoint.load_config(folder), checkpoint.load(folder)
    classes = config.get("classifier", {}).get("classes")
    task = config.get("classifier")
    extended = {
        **config,
        "model_type": "vatt-classifier" if task else "vatt",
        "architectures": ["VattForClassification" if task else "VattModel"],
        "auto_map": _auto_map(task["modality"] if task else None),
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
        (temporary / "README.md").write_text(_card(extended, run, licence), encoding="utf-8")
        _copy_vocabulary(folder, temporary)
        _copy_code(temporary)
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


FORMS: dict[str, Callable[..., list[Comparison]]] = {
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


def _auto_map(modality: str | None) -> dict[str, str]:
    """For config.json: which class each Auto class builds; `modality` is that of a classifier."""
    if modality is None:
        found = {"AutoConfig": "VattConfig", "AutoModel": "VattModel"}
    else:
        found = {"AutoConfig": "VattClassifierConfig"}
        found |= dict.fromkeys(("AutoModel", _AUTO[modality]), "VattForClassification")
    return {auto: f"{_flat_name(_CODE)}.{name}" for auto, name in found.items()}


SENSES = "vatt.senses"
OF_A_SENSE = {"section", "tokens"}  # what a model asks of one; the rest would need vattctl's data


def _copy_code(folder: Path) -> None:
    """Write AutoModel's classes, and what they need of our modules, as files of a folder."""
    sources: dict[str, str] = {}
    names: dict[str, set[str]] = {_CODE: set()}  # imported from each module
    waiting = [_CODE]
    while waiting:
        module = waiting.pop()
        sources[module] = _source(module, names[module])
        for node in ast.walk(ast.parse(sources[module])):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vatt."):
                continue
            known = names.get(node.module or "")
            more = {alias.name for alias in node.names}
            if known is None or not more <= known:
                names[node.module or ""] = more | (known or set())
                waiting.append(node.module or "")
    for module, source in sources.items():
        (folder / f"{_flat_name(module)}.py").write_text(_flattened(source), encoding="utf-8")


def _source(module: str, names: set[str]) -> str:
    """The code of a module; of the senses, only what these names need."""
    path = _ROOT.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    return _part_of(source, names) if module.startswith(SENSES) else source


def _part_of(source: str, names: set[str]) -> str:
    """The definitions of these names, and of all that they use; classes without other methods."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            node.body = [
                part for part in node.body if getattr(part, "name", "") in ("", *OF_A_SENSE)
            ]
    needed, before = set(names), set[str]()
    while needed != before:
        before = set(needed)
        own = [node for node in tree.body if needed & _defines(node)]
        needed |= {part.id for node in own for part in ast.walk(node) if isinstance(part, ast.Name)}
    kept = [f'"""{ast.get_docstring(tree)}"""\n']
    for node in tree.body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            node.names = [one for one in node.names if (one.asname or one.name) in needed]
        if needed & _defines(node):
            kept.append(ast.unparse(node))
    return "\n".join(kept) + "\n"


def _defines(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.ImportFrom | ast.Import):
        return {one.asname or one.name for one in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _flat_name(module: str) -> str:
    """`vatt.model.patches` -> `model_patches`: transformers takes files of one folder only."""
    return module.removeprefix("vatt.").replace(".", "_")


def _flattened(source: str) -> str:
    """The same code with relative imports."""
    return re.sub(
        r"^(\s*from )(vatt\.[\w.]+)(?= import )",
        lambda found: f"{found[1]}.{_flat_name(found[2])}",
        source,
        flags=re.MULTILINE,
    )


def _card(config: dict[str, Any], run: str, licence: str | None) -> str:
    model, task = config["model"], config.get("classifier")
    source = config.get("source", {}).get("prefix")
    if task:
        what = f"a classifier of {task['modality']} into {len(task['classes'])} classes"
        example = "logits = model(inputs).logits  # model.config.id2label names the classes"
    else:
        what = "embeddings of video, audio and text in common spaces"
        example = "out = model(video=..., audio=..., text=...)\nout.video_vt @ out.text_vt[:, 0].T"
    header = {
        "library_name": "transformers",
        "tags": ["vatt", "video", "audio", "text"],
        **({"license": licence} if licence else {}),
        **({"pipeline_tag": _PIPELINES[task["modality"]]} if task else {}),
    }
    converted = f"Converted from `{source}`; `config.json` holds the hashes of its files.\n"
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# VATT

Video-Audio-Text Transformer (arXiv 2104.11178): {what}.
Recipe `{model["recipe"]}`, backbone `{model["backbone"]}`, {config["num_parameters"]:,} parameters.
{converted if source else ""}
```python
from transformers import AutoModel

model = AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True)
{example}
```

Video is (clips, frames, height, width, 3) and audio (clips, samples), floats in [-1, 1]; text is
(clips, candidates, words), word ids, 0 for a pad. Sizes are in `preprocessor_config.json`. The code
needs torch, einops, pydantic, pyyaml and safetensors. `vatt.load("path/to/this/folder")` gives the
same model where vattctl is installed.

{run}
## Licence

{f"`{licence}`." if licence else "None was stated for these weights."} The code is Apache-2.0.
Training clips keep the licences of their owners.
"""


# --- at an address --------------------------------------------------------------------------------

CHECKSUMS = "checksums.json"  # the sha256 of each file; empty while they are being pushed
CACHE = Path("~/.cache/vatt")  # VATT_CACHE names another one
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs"}
log = logging.getLogger(__name__)


def push(folder: Path, address: str, *, progress: Progress | None = None) -> dict[str, str]:
    """Copy a checkpoint or an exported folder to an address; returns the sha256 of each file.

    A reader never gets a mixture: until the last file is there, `pull` says that it is unfinished.
    Raises MachineError when the place cannot be written.
    """
    checkpoint.load_config(folder)
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS)
    sums = {file.name: _sha256(file) for file in files}
    with _place(address) as (filesystem, root):
        if _remote_sums(filesystem, root, address) == sums:
            return sums
        filesystem.makedirs(root, exist_ok=True)
        filesystem.pipe_file(f"{root}/{CHECKSUMS}", _written({}))
        for done, file in enumerate(files, start=1):
            filesystem.put_file(str(file), f"{root}/{file.name}")
            if progress:
                progress(done, len(files))
        filesystem.pipe_file(f"{root}/{CHECKSUMS}", _written(sums))
    return sums


def pull(address: str, out: Path, *, progress: Progress | None = None) -> dict[str, str]:
    """Copy what `push` wrote to a local folder, complete or not at all; checks every sha256.

    Also takes a folder that somebody else put there, such as a model on a hub: then only its
    weights, settings and words are copied, and the result is empty because nothing was checked.
    """
    with _place(address) as (filesystem, root), atomic_folder(out) as temporary:
        sums = _remote_sums(filesystem, root, address)
        if sums == {}:
            raise DataError(f"{address}: its last push has not ended", hint="push it again")
        names = list(sums or ())
        if sums is None:
            known = (checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.VOCABULARY)
            names = [name for name in known if filesystem.exists(f"{root}/{name}")]
        for done, name in enumerate(names, start=1):
            filesystem.get_file(f"{root}/{name}", str(temporary / name))
            if sums is not None and _sha256(temporary / name) != sums[name]:
                raise DataError(
                    f"{address}/{name} is not the file that was pushed: its sha256 differs",
                    hint="run it again; if it stays, push the checkpoint again",
                )
            if progress:
                progress(done, len(names))
        checkpoint.load_config(temporary)
        (temporary / CHECKSUMS).write_bytes(_written(sums or {}))
    return sums or {}


def local_copy(address: str) -> Path:
    """The folder of an address in the cache; pulled when it is new there or has changed."""
    base = Path(os.environ.get("VATT_CACHE") or CACHE).expanduser()
    out = base / hashlib.sha256(address.encode()).hexdigest()[:16]
    try:
        with _place(address) as (filesystem, root):
            there = _remote_sums(filesystem, root, address)
    except MachineError as error:
        if not out.exists():
            raise
        log.warning("%s; the copy of an earlier time is used: %s", error.problem, out)
        return out
    if not out.exists() or there not in (None, _read_sums((out / CHECKSUMS).read_bytes(), address)):
        with lock(base / f"{out.name}.lock", busy=f"busy: another process fetches {address}"):
            pull(address, out)
    return out


@contextmanager
def _place(address: str) -> Iterator[tuple[Any, str]]:
    """The file system and the path of an address; its errors as ours."""
    import fsspec
    from aiohttp import ClientError

    protocol = address.partition("://")[0]
    if "::" in address:
        raise SettingsError(f"{address} is a chain of addresses", hint="give one address")
    try:
        filesystem, root = fsspec.core.url_to_fs(address.rstrip("/"))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        hint = f"pip install {package}" if package else "see fsspec's documentation"
        raise MachineError(f"{address}: {error}", hint=hint) from None
    except ValueError as error:
        raise SettingsError(
            f"{address}: {error}", hint="s3://, gs://, hf://, https://, ..."
        ) from None
    try:
        yield filesystem, root
    except FileNotFoundError as error:
        raise DataError(f"{address} has no checkpoint: {error}", hint="check the address") from None
    except (OSError, ClientError, NotImplementedError) as error:
        raise MachineError(
            f"{address} cannot be used: {error!r}",
            hint="check the network, and that you may read or write there",
        ) from None


def _remote_sums(filesystem: Any, root: str, address: str) -> dict[str, str] | None:
    """What checksums.json says there; None where there is no such file."""
    try:  # a file system may say of a host that is away that a file does not exist there
        content = filesystem.cat_file(f"{root}/{CHECKSUMS}")
    except FileNotFoundError:
        return None
    return _read_sums(content, address)


def _read_sums(content: bytes, address: str) -> dict[str, str]:
    try:
        sums = json.loads(content)["sha256"]
        if not all(_NAME.fullmatch(name) and isinstance(sums[name], str) for name in sums):
            raise ValueError("a name in it is not that of a file")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{address}/{CHECKSUMS} cannot be read: {error}", hint="push the checkpoint again"
        ) from None
    return dict(sums)


def _written(sums: dict[str, str]) -> bytes:
    return json.dumps({"version": 1, "sha256": sums}, indent=2).encode() + b"\n"


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
