"""No password or token of an address reaches anything that is written or printed."""

import logging
import subprocess
import sys

import pytest
import yaml

from tests.test_stages import environment, new_project
from vatt.errors import DataError, redact, redact_logs

PASSWORD = "S3CR3T"
ADDRESSES = [
    "http://me:{}@proxy.example:3128",
    "https://{}@host.example/a",
    "postgresql+psycopg2://me:{}@db/mlflow",
    "s3://id:{}@bucket/shards",
    "http://me:a@b{}@host/x",
    "http://me:a/b{}@host/x",
    "https://host/a.mp4?token={}",
    "https://host/a?x=1&X-Amz-Signature={}&y=2",
    "https://host/a?sig={}#t=1,2",
    "https://host/a?AWSAccessKeyId=1&Signature={}",
    "https://host/{{id}}.mp4?api_key={}",
    "https://host/a;password={}",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_shown_without_its_secret(address):
    for text in ("cannot reach {}: refused", "'{}'", '["{}", "http://b"]', "({})"):
        shown = redact(text.format(address.format(PASSWORD)))
        assert PASSWORD not in shown and "***" in shown
        assert shown.startswith(text.partition("{")[0])


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8080/a@b.mp4",
        "http://host:8080",
        "https://www.youtube.com/watch?v=abc_-123&t=1",
        "what? k=1 and a@b",
        "10.0.0.1 is a private address: data.allow_private_hosts",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_an_error_holds_no_password():
    error = DataError(f"http://a:{PASSWORD}@b fails", hint=f"see http://b/?key={PASSWORD}")
    assert PASSWORD not in f"{error} {error.problem} {error.hint} {error.args} {error!r}"


def test_a_log_line_holds_no_password(caplog):
    factory = logging.getLogRecordFactory()
    try:
        redact_logs()
        redact_logs()
        logging.getLogger("some.library").warning("to %s: %d", f"http://a:{PASSWORD}@b", 3)
    finally:
        logging.setLogRecordFactory(factory)
    assert caplog.messages == ["to http://***@b: 3"]


def test_passwords_in_all_settings_reach_no_output(tmp_path):
    project = new_project(tmp_path / "project")
    params = yaml.safe_load((project / "params.yaml").read_text())
    (project / "list.csv").write_text(
        f"url\nhttp://me:{PASSWORD}@127.0.0.1:1/a.mp4?token={PASSWORD}\n"
        f"http://me:{PASSWORD}@host.invalid:1/b.mp4\n"
    )
    (project / "proxy").write_text(f"http://me:{PASSWORD}@127.0.0.1:1")
    params["data"] |= {
        "source": "urls", "location": "list.csv", "min_clips": 1, "min_share": 0.0,
        "base_urls": [f"http://me:{PASSWORD}@127.0.0.1:1/x?q={PASSWORD}"],
    }  # fmt: skip
    params["machine"] |= {"proxy": "proxy", "shards_url": f"s3://me:{PASSWORD}@bucket/x"}
    names = ("list.csv", "proxy", "params.yaml", params["paths"]["manifest"])
    inputs = {project / name for name in names}  # the manifest names the addresses themselves

    def run(*command: str) -> str:
        (project / "params.yaml").write_text(yaml.safe_dump(params))
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=project,
            env=environment() | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stdout + done.stderr
        assert PASSWORD not in said, command
        return said

    assert "nothing could be fetched" in run("stages.download")
    assert "base_urls" in run("vattctl.cli", "config", "show")
    assert "base_urls" in run("vattctl.cli", "config", "show", "--json")
    assert '"listed": 2' in run("vattctl.cli", "ledger", "--json")
    params["machine"]["mlflow_uri"] = f"http://me:{PASSWORD}@127.0.0.1:1/?token={PASSWORD}"
    assert "machine.mlflow_uri" in run("stages.download")
    params["data"]["source"] = f"http://me:{PASSWORD}@host"
    assert "data.source" in run("vattctl.cli", "config", "validate")
    written = [path for path in project.rglob("*") if path.is_file() and ".git/" not in str(path)]
    assert any(path.name == "mlflow.db" for path in written)
    leaks = [path for path in written if PASSWORD.encode() in path.read_bytes()]
    assert [path for path in leaks if path not in inputs] == []
