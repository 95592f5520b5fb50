"""The wheel carries presets and pipeline: copies of the clone's, made when it is built."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = ("presets", "docs", "dvc.yaml", ".dvc/config", ".dvc/plots", ".dvcignore", ".gitignore")
LEFT_OUT = shutil.ignore_patterns("images", "*.py", "__pycache__")  # of docs


class BuildWithProject(build_py):
    """Adds vattctl/shipped/, which vattctl/project.py reads where there is no clone."""

    def run(self) -> None:
        """Copy the packages, then what a project is made from."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "vattctl" / "shipped"
        shutil.rmtree(target, ignore_errors=True)
        for name in SHIPPED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target / name, ignore=LEFT_OUT)
            elif (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target / name)


setup(cmdclass={"build_py": BuildWithProject})
