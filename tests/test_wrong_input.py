"""Input that is wrong in ways nobody thinks of: names that mean something to others, rows of another type."""

from pathlib import Path

import pytest
from conftest import Ambersafe


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "x" * 300])
@pytest.mark.parametrize(
    "given",
    [
        ("sft", "--recipe"), ("sft", "--model"), ("sft", "--data"), ("sft", "--dir"), ("dpo", "--archive"),
        ("status", "--dir"), ("status", "--python"), ("data", "--data"), ("evaluate", "o/m", "--pairs"),
        ("evaluate", "o/m", "--dir"), ("sample", "o/m", "--prompts"), ("plot", "r", "--out"), ("report", "--out"),
        ("export", "r", "--out"), ("prefetch", "--recipe"), ("recipes",), ("sft", "local_run_dir"),
    ],
)  # fmt: skip
def test_a_path_that_the_system_cannot_look_at_is_a_wrong_one_and_no_defect(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path, given: tuple[str, ...], path: str
) -> None:
    *words, last = given
    more = [f"{last}={path}", "--model", tmp_path] if last == "local_run_dir" else [last, path]
    done = ambersafe(*words, *more, env={"HF_HUB_OFFLINE": "0" if "prefetch" in given else "1"})
    assert done.returncode == 64, done.stderr
    assert path in done.stderr
    assert "defect" not in done.stderr
