"""What the README promises, held against the code."""

import re
import subprocess
import sys

from conftest import ROOT, run_ambersafe

from ambersafe_cli import errors

README = (ROOT / "README.md").read_text()


def test_help_in_the_readme_is_what_the_commands_say() -> None:
    checked = subprocess.run([sys.executable, ROOT / "scripts/render-help", "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_command_is_in_the_table() -> None:
    listed = run_ambersafe("--help", cwd=ROOT).stdout.partition("Commands:\n")[2]
    commands = set(re.findall(r"^  (\w+) ", listed, flags=re.MULTILINE)) - {"The", "To"}
    assert commands == set(re.findall(r"^\| `ambersafe (\w+)` \|", README, flags=re.MULTILINE))


def test_every_exit_status_is_listed_once_with_its_meaning() -> None:
    kinds: list[type[errors.AmberSafeError]] = [errors.AmberSafeError, *errors.AmberSafeError.__subclasses__()]
    statuses = [kind.exit_status for kind in kinds]
    assert len(set(statuses)) == len(statuses)
    assert min(statuses) >= 64
    listed = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README, flags=re.MULTILINE))
    assert listed == {str(kind.exit_status): kind.kind for kind in kinds}


def test_the_two_commands_stand_at_the_top() -> None:
    top = README.partition("\n## ")[0]
    for script in ("scripts/quickstart", "scripts/test"):
        assert script in top
        assert (ROOT / script).stat().st_mode & 0o111


def test_links_to_files_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
