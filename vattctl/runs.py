"""What has run: status, the results in one table, and the MLflow page."""

import os
import subprocess
import sys
from pathlib import Path

import click

from vatt.errors import MachineError
from vattctl.params import enter_project


@click.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@click.pass_context
def ui(context: click.Context, port: int) -> None:
    """Open the MLflow page with all runs on 127.0.0.1 (Ctrl-C ends it)."""
    enter_project(context)
    from vatt.config import load_params
    from vatt.files import port_is_free
    from vatt.training.tracking_store import resolve_store

    if not port_is_free(port):
        raise MachineError(f"port {port} is in use", hint=f"vattctl ui --port {port + 1}")
    store = resolve_store(load_params().machine.mlflow_uri, Path.cwd())
    click.echo(f"http://127.0.0.1:{port}  (ready in some seconds; Ctrl-C ends it)")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--backend-store-uri",
        store,
        "--workers",
        "1",
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    try:
        code = subprocess.run(command, env=environment, check=False).returncode
    except KeyboardInterrupt:
        return
    if code not in (0, -2, 130):
        raise MachineError(f"the MLflow server ended with {code}", hint="its message is above")
