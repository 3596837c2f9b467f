"""The version of the package, stated once: pyproject.toml reads it here."""

VERSION = "0.1.0"
