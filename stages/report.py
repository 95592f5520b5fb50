"""Stage report: metrics, arrays and the published numbers -> one HTML page, one Markdown file."""

from vatt.config import load_params
from vatt.process import run_stage
from vatt.provenance import listed_hash, stage_hash
from vatt.report.page import write_report
from vatt.tracking import mlflow


def main() -> None:
    """Write the report from all that has been run."""
    params = load_params()
    made_from, data = stage_hash("report", params), listed_hash(params.paths.metrics)
    with mlflow.run("report", params, stage_hash=made_from, data_hash=data) as run:
        write_report(params.paths, params.report)
        run.artifact(params.paths.report / "report.html")
        run.artifact(params.paths.report / "report.md")


if __name__ == "__main__":
    run_stage("report", main)
