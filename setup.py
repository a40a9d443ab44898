"""Everything is declared in pyproject.toml; this file is where native extensions are built."""

from setuptools import setup

setup()
