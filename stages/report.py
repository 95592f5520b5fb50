"""Stage report: metrics, arrays and the published numbers -> one HTML page, one Markdown file."""

from vatt.config import load_params, plain
from vatt.process import run_stage
from vatt.report.inputs import Origin
from vatt.report.page import write_report
from vatt.tracking import mlflow
from vatt.tracking.provenance import git_commit, listed_hash, stage_hash


def main() -> None:
    """Write the report from all that has been run."""
    params = load_params()
    tuning = params.finetune
    shown = {
        "seed": params.seed, "data": params.data, "preprocess": params.preprocess,
        "model": params.model, "pretrain": params.pretrain, "finetune": tuning,
        "evaluate": params.evaluate, "report": params.report,
    }  # fmt: skip
    tunings = tuple(f"{task}-{init}" for task in tuning.run for init in tuning.init)
    origin = Origin(params.seed, git_commit(), plain(shown), tunings)
    made_from, data = stage_hash("report", params), listed_hash(params.paths.metrics)
    with mlflow.run("report", params, stage_hash=made_from, data_hash=data) as run:
        write_report(params.paths, params.report, origin)
        run.artifact(params.paths.report / "report.html")
        run.artifact(params.paths.report / "report.md")


if __name__ == "__main__":
    run_stage("report", main)
