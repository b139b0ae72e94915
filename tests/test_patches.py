"""The series as it lies in the repository."""

import re
import runpy
from pathlib import Path

import pytest
from conftest import ROOT

from ambersafe_cli import launch, patches, stages
from ambersafe_cli.errors import PatchError
from ambersafe_cli.patches import normal_diff, read_patch, read_series


def test_series_lists_every_patch_and_no_other() -> None:
    series = read_series()
    assert [patch.name for patch in series] == sorted(path.name for path in patches.FOLDER.glob("*.patch"))
    assert series[0].name == "0001-Add-the-saferlhf-dataset.patch"


def test_every_patch_says_what_it_does_to_the_numbers() -> None:
    for patch in read_series():
        header = patch.path.read_text().partition("\ndiff --git ")[0]
        assert "\nNumbers: " in header, patch.name


def test_every_patch_and_each_of_its_keys_is_in_the_readme_of_the_series() -> None:
    rows = [line for line in (patches.FOLDER / "README.md").read_text().splitlines() if line.startswith("| `00")]
    series = read_series()
    assert len(rows) == len(series)
    for patch, line in zip(series, rows, strict=True):
        assert patch.name.startswith(line[3:].partition("`")[0].rstrip("…")), patch.name
        assert re.findall(r"`([a-z_.]+)`", line.rpartition(" | ")[2]) == list(patch.config_keys)


def test_patches_that_the_launcher_asks_for_by_name_are_in_the_series() -> None:
    subjects = [patch.subject for patch in read_series()]
    assert launch.TORCHRUN_PATCH in subjects
    assert stages.RESUME_PATCH in subjects
    assert subjects[0] == stages.SAFERLHF_PATCH


def test_each_key_that_a_patch_adds_is_declared_in_its_header() -> None:
    for patch in read_series():
        added = []
        for part in patch.diff.split("\n+++ b/")[1:]:
            path = part.partition("\n")[0]
            group = (
                "" if path == "config/config.yaml" else f"{path.split('/')[1]}." if path.startswith("config/") else None
            )
            keys = re.findall(r"^\+([a-z_]+):", part, flags=re.MULTILINE)
            added += [group + key for key in keys if group is not None]
        assert sorted(added) == sorted(patch.config_keys), patch.name


def test_first_patch_is_what_the_exporter_makes_of_saferlhf_py() -> None:
    """Without upstream at hand: every line of the source, and nothing else but the branch, is added by the patch."""
    source = (ROOT / "src/ambersafe_cli/saferlhf.py").read_text()
    added = [
        line[1:] for line in read_series()[0].diff.splitlines() if line.startswith("+") and not line.startswith("+++")
    ]
    code = source[source.index("SAFERLHF = ") :].splitlines()
    start = added.index(code[0])
    assert added[start : start + len(code)] == code
    assert [line for line in added[start + len(code) :] if line] == [
        "    \"\"\"Load the given dataset by name. Supported by default are 'shp', 'hh', 'se', and 'saferlhf'.\"\"\"",
        "    elif name == 'saferlhf':",
        "        data = get_saferlhf(split, silent=silent, cache_dir=cache_dir)",
    ]
    assert all(line.startswith(("import ", "from ")) for line in added[:start])


def test_exporter_refuses_a_file_that_it_does_not_know() -> None:
    exporter = runpy.run_path(str(ROOT / "scripts/export-patches"))
    with pytest.raises(SystemExit, match="0 places like"):
        exporter["insert_saferlhf"]("import os\n", "import os\n\nX = 1\n")


def test_normal_diff_forgets_where_a_change_is_and_nothing_else() -> None:
    one = "From x\n\ndiff --git a/f b/f\nindex 1..2 100644\n--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@ def g\n-a\n+b\n"
    moved = one.replace("index 1..2", "index 3..4").replace("@@ -1,2 +1,2 @@ def g", "@@ -9,2 +8,2 @@ def h")
    assert normal_diff(one) == normal_diff(moved)
    assert normal_diff(one) != normal_diff(one.replace("+b", "+ b"))


def test_a_subject_over_two_lines_is_one(tmp_path: Path) -> None:
    path = tmp_path / "x.patch"
    path.write_text(
        "Subject: [PATCH] Join what\n belongs\n\nWhy.\nConfig-key: a.b\n\ndiff --git a/f b/f\n+Config-key: no\n"
    )
    patch = read_patch(path, "0" * 40)
    assert patch.subject == "Join what belongs"
    assert patch.config_keys == ("a.b",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "cannot read the patch series"),
        ({"series": "0001-a.patch\n"}, "a file name and a commit id"),
        ({"series": "0001-a.patch 00\n"}, "cannot read the patch"),
        ({"series": "0001-a.patch 00\n", "0001-a.patch": "nothing"}, "not a patch made by git format-patch"),
    ],
)
def test_a_broken_series_is_an_error_that_names_the_file(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(PatchError, match=message) as raised:
        read_series(tmp_path)
    assert str(tmp_path) in raised.value.message
