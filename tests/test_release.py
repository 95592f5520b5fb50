"""What a release is made of agrees: versions, pins and their hashes, licences, the audit."""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, metadata
from types import ModuleType

import pytest
import yaml

import vatt
from tests.test_architecture import ROOT

NOT_LOCKED = {"torch", "uv"}  # builds of torch differ by device; uv makes the lock
COPYLEFT = re.compile(r"GPL|MPL|Mozilla|EPL|Eclipse", re.IGNORECASE)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {plain(name): version for name, version in found}


def test_the_version_is_the_same_everywhere() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == vatt.__version__
    newest = re.search(r"^## \[?([\d.]+)", read("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == vatt.__version__


def test_the_lock_has_the_pins_of_the_constraints() -> None:
    constraints, locked = pins(read("constraints.txt")), pins(read("requirements.lock"))
    assert constraints.keys() - locked.keys() == NOT_LOCKED, "run `make lock`"
    different = {name for name in constraints if constraints[name] != locked.get(name)}
    assert different == NOT_LOCKED, "run `make lock`"


def test_every_package_of_the_lock_has_a_hash_and_no_address() -> None:
    text = read("requirements.lock")
    assert "://" not in text
    assert not re.search(r"^--", text, re.MULTILINE)
    for entry in re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in entry, entry.partition(" ")[0]


def test_every_dependency_is_pinned() -> None:
    pyproject = read("pyproject.toml")
    section = pyproject[pyproject.index("dependencies = [") : pyproject.index("[project.scripts]")]
    wanted = {plain(name) for name in re.findall(r"\"([A-Za-z][\w.-]*)(?:>=[\d.]+)?\"", section)}
    assert wanted - pins(read("constraints.txt")).keys() == set()
    assert "deepspeed" in wanted


def test_packages_with_a_copyleft_licence_are_in_the_notice() -> None:
    notice = read("NOTICE").lower()
    missing = []
    for name in pins(read("constraints.txt")):
        try:
            facts = metadata(name)
        except PackageNotFoundError:
            continue
        words = [str(facts.get("License-Expression", "")), str(facts.get("License", ""))[:60]]
        words += [line for line in facts.get_all("Classifier") or [] if line.startswith("License")]
        if COPYLEFT.search(" ".join(words)) and name not in plain(notice):
            missing.append(name)
    assert not missing
    assert "--enable-gpl" in notice


def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci/audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLEAN = {"name": "a", "version": "1", "vulns": []}
WEAK = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
SKIPPED = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([CLEAN], 0, "1 packages, nothing is known against them"),
        ([CLEAN, WEAK], 1, "b 2: CVE-1, fixed in 2.1"),
        ([CLEAN, SKIPPED], 4, "1 of 2 packages could not be checked, e.g. c"),
        ([], 4, "no package was checked"),
    ],
)
def test_an_audit_says_whether_it_could_look(packages: list, code: int, words: str) -> None:
    found, lines = audit().verdict({"dependencies": packages})
    assert found == code
    assert words in "\n".join(lines)


def test_a_weakness_counts_even_if_other_packages_were_not_checked() -> None:
    assert audit().verdict({"dependencies": [WEAK, SKIPPED]})[0] == 1
