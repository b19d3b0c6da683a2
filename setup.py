"""Takes the version from version.py without importing the package. Everything else stands in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup

setup(version=runpy.run_path(str(Path(__file__).parent / "megatron_scalemoe" / "version.py"))["__version__"])
