"""The version of vipd, as pyproject.toml states it."""

VERSION = "0.1.0"
