from setuptools import setup

setup()  # all of it is in pyproject.toml
