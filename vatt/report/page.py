"""The files of a run -> one self-contained HTML page, and the same in Markdown."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vatt.config import ModelParams, PathsParams, ReportParams, SizeParams
from vatt.errors import redact
from vatt.files import atomic_write
from vatt.flops import (
    Convention,
    expert_weights,
    multimodal_flops,
    num_signal_tokens,
    signals_of,
)
from vatt.report.figures import (
    confusions,
    expert_shares,
    feature_maps,
    learning_curves,
    node_activations,
    similarity_densities,
    space_maps,
)
from vatt.report.inputs import STAGES, Inputs, Origin, read_inputs
from vatt.report.published import published_sections
from vatt.report.results import key_figures, result_tables, scales
from vatt.report.studies import (
    backbone_table,
    beyond_sections,
    drop_token_pictures,
    drop_token_rows,
)
from vatt.report.tables import percent

CONVENTIONS: tuple[Convention, ...] = ("true", "paper")
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")  # would reverse the text that follows
UNITS = ((3600.0, "h"), (60.0, "min"))


@dataclass(frozen=True, slots=True)
class StageLine:
    """One line of the table of stages."""

    name: str
    state: str  # done, failed, killed, running, or not run
    seconds: float | None
    run_id: str
    devices: str  # what it ran on
    facts: tuple[tuple[str, str], ...]  # from the stage's metrics file


def write_report(paths: PathsParams, params: ReportParams, origin: Origin | None = None) -> None:
    """Write report.html and report.md from the files that the other stages wrote.

    drop_token.json is for `dvc plots`, which reads no folder of experiments.
    """
    inputs = read_inputs(paths, origin)
    context = _context(inputs, params)
    for template, name in (("page.html.j2", "report.html"), ("page.md.j2", "report.md")):
        text = render(template, context)
        with atomic_write(paths.report / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    with atomic_write(paths.report / "drop_token.json") as temporary:
        temporary.write_text(json.dumps(drop_token_rows(inputs), indent=1) + "\n", encoding="utf-8")


def model_card(paths: PathsParams, params: ReportParams) -> str:
    """Data, attrition, metrics with intervals, and cost of a project's run, for a model card."""
    inputs = read_inputs(paths)
    context = {
        "inputs": inputs,
        "stages": stage_lines(inputs),
        "model": model_facts(inputs),
        "compute": compute_facts(inputs, params.device_hour_price),
        "tables": result_tables(inputs) if inputs.evaluation else (),
    }
    return render("card.md.j2", context)


def render(template: str, context: dict[str, Any]) -> str:
    """Fill a template; in HTML every value is escaped, in Markdown through its `md` filter."""
    environment = Environment(
        loader=PackageLoader("vatt.report", "."),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "md": markdown,
        "duration": duration,
        "percent": percent,
        "short": short,
    }
    environment.globals["style"] = Markup(
        Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    )
    return environment.get_template(template).render(context)


def _context(inputs: Inputs, params: ReportParams) -> dict[str, Any]:
    return {
        "title": params.title,
        "inputs": inputs,
        "about": about_facts(inputs),
        "settings": settings_text(inputs),
        "stages": stage_lines(inputs),
        "model": model_facts(inputs),
        "compute": compute_facts(inputs, params.device_hour_price),
        "figures": key_figures(inputs),
        "scales": scales(inputs),
        "tables": result_tables(inputs),
        "sections": published_sections(inputs),
        "backbones": backbone_table(inputs),
        "drop_token": drop_token_pictures(inputs),
        "beyond": beyond_sections(inputs),
        "curves": learning_curves(inputs),
        "maps": feature_maps(inputs, clips=params.tsne_clips),
        "spaces": space_maps(inputs, clips=params.tsne_clips),
        "densities": similarity_densities(inputs),
        "nodes": node_activations(inputs),
        "confusions": confusions(inputs),
        "experts": expert_shares(inputs),
        "specialisation": specialisation_words(inputs),
    }


def specialisation_words(inputs: Inputs) -> str:
    """How different the experts of the modalities are, before and after training."""
    found = inputs.lookup("experts", "pretrained", "specialisation")
    before = inputs.lookup("experts", "untrained", "specialisation")
    if not found or not before:
        return ""
    words = [f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" for one in (found, before)]
    return f"{words[0]} after training, {words[1]} before it"


def about_facts(inputs: Inputs) -> tuple[tuple[str, str], ...]:
    """When, from which code and with which settings the results were made."""
    origin, corpus = inputs.origin, inputs.corpus
    facts = [("date", inputs.date)]
    if origin is not None:
        facts += [("commit", origin.commit or "no git commit"), ("seed", str(origin.seed))]
    if corpus is not None:
        splits = ", ".join(f"{count:,} {split}" for split, count in corpus.splits.items())
        facts.append(("clips", splits))
    if inputs.model is not None:
        model = ModelParams.model_validate(inputs.model["model"])
        sizes = [_size(tower.size) for tower in (model.video, model.audio, model.text)]
        facts.append(("model", f"{model.backbone}: {' / '.join(dict.fromkeys(sizes))}"))
    steps = inputs.metrics.get("pretrain", {}).get("step")
    facts.append(("pre-training", f"{steps:,} steps" if steps else ""))
    return tuple((name, value) for name, value in facts if value)


def settings_text(inputs: Inputs) -> str:
    """All settings, as in params.yaml."""
    if inputs.origin is None:
        return ""
    plain = yaml.safe_dump(dict(inputs.origin.settings), sort_keys=False, allow_unicode=True)
    return redact(plain, every_query=True)


def stage_lines(inputs: Inputs) -> tuple[StageLine, ...]:
    """The stages in order, each fine-tuning on its own line; a stage without a run says so."""
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
        devices=f"{run['devices']} × {run['device']}" if "device" in run else "",
        facts=() if name == "evaluate" else tuple(_facts(inputs.metrics.get(name, {}))),
    )


def compute_facts(inputs: Inputs, price: float | None) -> tuple[tuple[str, str], ...]:
    """Device hours of all stages by kind of device; energy and cost where they are known."""
    hours: dict[str, float] = {}
    for run in inputs.runs.values():
        if "device" in run and isinstance(run.get("seconds"), int | float):
            taken = run["seconds"] * run["devices"] / 3600
            hours[run["device"]] = hours.get(run["device"], 0.0) + taken
    if not hours:
        return ()
    metered = {name: run["kwh"] for name, run in inputs.runs.items() if "kwh" in run}
    names = ", ".join(sorted(metered))
    energy = f"{sum(metered.values()):.3g} kWh ({names})" if metered else "no device measures it"
    cost = f"{price * sum(hours.values()):,.2f} at {price:g} per hour" if price is not None else ""
    return (
        *((f"hours of a {device}", f"{taken:.3g}") for device, taken in sorted(hours.items())),
        ("energy", energy),
        ("cost", cost or "unknown: report.device_hour_price is not set"),
    )


def _facts(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values of a metrics file; nested ones are named by their path."""
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _facts(value, f"{name} ")
        elif isinstance(value, int | float | str):
            yield name, _fact(value)


def model_facts(inputs: Inputs) -> tuple[tuple[str, str], ...]:
    """The pre-trained model in words, with its operations by formula."""
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
        *(
            (name, f"{_size(part.size)}, {num_signal_tokens(name, part)} tokens")
            for name, part in signals_of(model).items()
            if name not in ("video", "audio")
        ),
        *expert_facts(model),
        ("common spaces", f"{model.va_dim} (video–audio), {model.vt_dim} (video–text)"),
        ("one clip, with both products of attention", gflops["true"]),
        ("one clip, as counted in the paper", gflops["paper"]),
    )


def expert_facts(model: ModelParams) -> tuple[tuple[str, str], ...]:
    """The experts and how many weights they have, where there are some."""
    if model.experts is None:
        return ()
    weights, active = expert_weights(model)
    chosen = f"{model.experts.top_k} of {model.experts.number} for each token"
    return (
        (
            "experts",
            f"{chosen}: {weights / 1e6:.1f} M weights, {active / 1e6:.1f} M of them active",
        ),
    )


def _size(size: str | SizeParams) -> str:
    return size if isinstance(size, str) else f"{size.depth} layers, {size.dim} wide"


def _fact(value: float | str) -> str:
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits: `48 s`, `3.3 min`, `2.1 h`."""
    for size, unit in UNITS:
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def markdown(text: object) -> str:
    """Text on one line, escaped so that Markdown and HTML show it as it is."""
    plain = " ".join(BIDI.sub("", str(text)).split())
    escaped = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#!~$])", r"\\\1", escaped)


def short(text: object, length: int) -> str:
    """At most `length` characters of a text that may be of any length."""
    whole = str(text)
    return whole if len(whole) <= length else f"{whole[: length - 1]}…"
