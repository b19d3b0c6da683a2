"""The package's version, read by setup.py without importing anything else."""

__version__ = "0.1.0.dev0"
# Of the files that we write: what reads them refuses any other.
SCHEMA_VERSION = 1
