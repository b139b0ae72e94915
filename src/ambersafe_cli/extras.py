"""Packages that only some commands need, and that are installed by name."""

import importlib.util

from ambersafe_cli.errors import UsageError


def require(package: str, extra: str) -> None:
    """Raise UsageError, with what installs it, if a package of an extra is missing."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"This needs {package}, which is not installed.", f"pip install 'ambersafe-cli[{extra}]'")
