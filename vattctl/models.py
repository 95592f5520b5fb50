"""Models in and out: import released checkpoints, export ours."""

import json
from pathlib import Path

import click


@click.command("import")
def import_command() -> None:
    """Convert a released TensorFlow checkpoint."""


@click.command("export")
def export_command() -> None:
    """Write a checkpoint in another form."""
