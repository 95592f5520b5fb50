"""Everything the run left -> one self-contained HTML page and the same in Markdown."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vatt.config import ModelParams, PathsParams, ReportParams, SizeParams
from vatt.files import atomic_write
from vatt.model.flops import Convention, multimodal_flops
from vatt.report.figures import (
    confusions,
    feature_maps,
    learning_curves,
    node_activations,
    similarity_densities,
)
from vatt.report.inputs import STAGES, Inputs, read_inputs
from vatt.report.published import published_sections
from vatt.report.results import key_figures, result_tables, scales
from vatt.report.studies import backbone_table, drop_token_pictures
from vatt.report.tables import percent

CONVENTIONS: tuple[Convention, ...] = ("true", "paper")
UNITS = ((3600.0, "h"), (60.0, "min"))


@dataclass(frozen=True, slots=True)
class StageLine:
    """One line of "what was run"."""

    name: str
    state: str  # done, failed, killed, running, or not run
    seconds: float | None
    run_id: str
    facts: tuple[tuple[str, str], ...]  # from the stage's metrics file


def write_report(paths: PathsParams, params: ReportParams) -> None:
    """Write report.html and report.md from whatever the other stages left."""
    inputs = read_inputs(paths)
    context = _context(inputs, params)
    for template, name in (("page.html.j2", "report.html"), ("page.md.j2", "report.md")):
        text = render(template, context)
        with atomic_write(paths.report / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def render(template: str, context: dict[str, Any]) -> str:
    """Fill a template; in HTML every value is escaped, in Markdown through its `md` filter."""
    environment = Environment(
        loader=PackageLoader("vatt.report", "."),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": markdown, "duration": duration, "percent": percent}
    environment.globals["style"] = Markup(
        Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    )
    return environment.get_template(template).render(context)


def _context(inputs: Inputs, params: ReportParams) -> dict[str, Any]:
    return {
        "title": params.title,
        "inputs": inputs,
        "stages": stage_lines(inputs),
        "model": model_facts(inputs),
        "figures": key_figures(inputs),
        "scales": scales(inputs),
        "tables": result_tables(inputs),
        "sections": published_sections(inputs),
        "backbones": backbone_table(inputs),
        "drop_token": drop_token_pictures(inputs),
        "curves": learning_curves(inputs),
        "maps": feature_maps(inputs, clips=params.tsne_clips),
        "densities": similarity_densities(inputs),
        "nodes": node_activations(inputs),
        "confusions": confusions(inputs),
    }


def stage_lines(inputs: Inputs) -> tuple[StageLine, ...]:
    """The stages in their order, fine-tuning runs one by one; those not run say so."""
    lines = []
    for stage in STAGES:
        names = sorted(
            name
            for name in {*inputs.metrics, *inputs.runs}
            if name == stage or name.startswith(f"{stage}-")
        )
        lines += [_stage_line(name, inputs) for name in names or [stage]]
    return tuple(lines)


def _stage_line(name: str, inputs: Inputs) -> StageLine:
    run = inputs.runs.get(name, {})
    seconds, status = run.get("seconds"), str(run.get("status") or "")
    if status in ("FAILED", "KILLED", "RUNNING"):
        state = status.lower()
    else:
        state = "done" if name in inputs.metrics else "not run"
    return StageLine(
        name=name,
        state=state,
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        run_id=str(run.get("run_id") or ""),
        facts=() if name == "evaluate" else tuple(_facts(inputs.metrics.get(name, {}))),
    )


def _facts(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The plain values of a metrics file, nested ones by their path."""
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _facts(value, f"{name} ")
        elif isinstance(value, int | float | str):
            yield name, _fact(value)


def model_facts(inputs: Inputs) -> tuple[tuple[str, str], ...]:
    """What the pre-trained checkpoint is, in words, with its cost by formula."""
    if inputs.model is None:
        return ()
    model = ModelParams.model_validate(inputs.model["model"])
    video, audio, text = model.video, model.audio, model.text
    gflops = {
        convention: f"{multimodal_flops(model, convention=convention) / 1e9:.2f} GFLOPs"
        for convention in CONVENTIONS
    }
    return (
        ("backbone", f"modality-{model.backbone}"),
        ("video", f"{_size(video.size)}, {video.frames} frames of {video.frame_size} pixels"),
        ("video patch", "×".join(map(str, video.patch))),
        ("audio", f"{_size(audio.size)}, {audio.samples:,} samples ({audio.input})"),
        ("audio patch", str(audio.patch)),
        ("text", f"{_size(text.size)}, {text.words} words of {text.vocabulary:,}"),
        ("common spaces", f"{model.va_dim} (video–audio), {model.vt_dim} (video–text)"),
        ("one clip, both products of attention", gflops["true"]),
        ("one clip, as the paper counts", gflops["paper"]),
    )


def _size(size: str | SizeParams) -> str:
    return size if isinstance(size, str) else f"{size.depth} layers, {size.dim} wide"


def _fact(value: float | str) -> str:
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for size, unit in UNITS:
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def markdown(text: object) -> str:
    """Text that Markdown and the HTML inside it take literally, on one line."""
    plain = " ".join(str(text).split())
    escaped = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#!~])", r"\\\1", escaped)
