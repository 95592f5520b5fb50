"""`make audit`: pip-audit on requirements.lock, with a clear answer when it cannot run.

Exit codes: 0 nothing known, 1 a package has a known weakness, 4 the answer is not complete.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PIP_AUDIT = "pip-audit==2.10.1"
LOCK = Path(__file__).parents[1] / "requirements.lock"
FOUND, NOT_RUN = 1, 4


def verdict(report: dict[str, Any]) -> tuple[int, list[str]]:
    """The exit code and the lines to print for pip-audit's JSON report."""
    packages = report["dependencies"]
    unknown = [one["name"] for one in packages if "skip_reason" in one]
    weak = [one for one in packages if one.get("vulns")]
    lines = [
        f"{one['name']} {one['version']}: {found['id']}, "
        f"fixed in {', '.join(found['fix_versions']) or 'no version yet'}"
        for one in weak
        for found in one["vulns"]
    ]
    if unknown:
        lines.append(
            f"audit: {len(unknown)} of {len(packages)} packages could not be checked, "
            f"e.g. {unknown[0]}: is pypi.org reachable, or only a mirror?"
        )
    if weak:
        return FOUND, lines
    if unknown or not packages:
        return NOT_RUN, lines or ["audit: no package was checked"]
    return 0, [f"audit: {len(packages)} packages, nothing is known against them"]


def main(uv: str) -> int:
    """Run pip-audit in an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--disable-pip", "--require-hashes", "--requirement", str(LOCK)]
        command = [uv, "tool", "run", "--from", PIP_AUDIT, "pip-audit", *options]
        command += ["--format", "json", "--output", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not report.is_file() or not report.stat().st_size:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"audit: pip-audit could not run: {last}")
            return NOT_RUN
        code, lines = verdict(json.loads(report.read_text(encoding="utf-8")))
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
