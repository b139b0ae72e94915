"""Run folders that upstream made without us: a config.yaml and a policy.pt, and no run.json."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ambersafe_cli import files
from ambersafe_cli.overrides import read_yaml

STATUS = "made by hand"
"""What is shown as the status of such a run: whether it came to its end is not known."""


def read(folder: Path) -> dict[str, Any] | None:
    """What upstream's config.yaml says of a run, as a record with the keys of run.json; what is not known is null.

    None if the folder holds no config.yaml of upstream's, or has a run.json.
    """
    values = config(folder)
    if not values.get("model.name_or_path") or not values.get("loss.name"):
        return None
    try:
        if (folder / "run.json").exists():
            return None
        changed = (folder / "config.yaml").stat().st_mtime
        started = datetime.datetime.fromtimestamp(changed, datetime.UTC).isoformat()
    except (OSError, ValueError):
        return None
    return {
        "stage": "sft" if values["loss.name"] == "sft" else "dpo",
        "status": STATUS,
        "started": started,
        "ended": None,
        "exit_status": None,
        "attempts": [],
        "model": {"name": str(values["model.name_or_path"]), "revision": values.get("model.revision"), "commit": None},
        "data": {"name": None, "revision": None, "commit": None, "datasets": values.get("datasets")},
        "archive": values.get("model.archive"),
        "recipe": {"source": "config.yaml"},
        "values": values,
        "overrides": [],
        "next_command": ["ambersafe", "export", str(folder)],
    }


def config(folder: Path) -> dict[str, Any]:
    """What the config.yaml in a run's folder says, whoever made the run, by upstream's keys; empty for nothing."""
    try:
        found = read_yaml(files.read_text(folder / "config.yaml", 1 << 20))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return dict(_flat(found)) if isinstance(found, dict) else {}


def _flat(config: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """The keys of nested mappings, joined by dots as in an override."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{before}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found
