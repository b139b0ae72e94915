"""What run.json says of how a run came about, beyond what was asked for; and nothing in it that is a secret."""

import hashlib
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambersafe_cli import checkpoints
from ambersafe_cli.errors import UsageError
from ambersafe_cli.git_calls import look

if TYPE_CHECKING:
    from ambersafe_cli.environment import TrainingEnvironment
    from ambersafe_cli.findings import Finding
    from ambersafe_cli.recipe import Stage
    from ambersafe_cli.upstream import CloneState

VARIABLES = (
    "ACCELERATE_USE_CPU", "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE",
    "HF_HUB_OFFLINE", "HIP_VISIBLE_DEVICES", "LANG", "LC_ALL", "MKL_NUM_THREADS", "NCCL_ALGO", "NCCL_DEBUG",
    "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_PROTO", "NCCL_SOCKET_IFNAME", "NVIDIA_TF32_OVERRIDE",
    "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_PROC_BIND", "PYTHONHASHSEED", "PYTHONPATH",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "ROCR_VISIBLE_DEVICES", "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION",
    "SLURM_NNODES", "SLURM_NTASKS", "TOKENIZERS_PARALLELISM", "TORCHDYNAMO_DISABLE", "TORCH_CUDNN_SDPA_DEPRIORITIZED",
    "TORCH_CUDNN_V8_API_DISABLED", "TORCH_DISTRIBUTED_DEBUG", "TORCH_HOME", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_BLOCKING_WAIT", "TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "VIRTUAL_ENV", "WANDB_MODE",
    "WANDB_PROJECT", "XDG_CACHE_HOME",
)  # fmt: skip
"""The environment variables that a record may hold: none of them is a secret, nor an address that could hold one."""

NAMES_SHOWN = 50
"""How many changed files of the working folder's repository are named."""

GIT_TIMEOUT = 5
"""Seconds that git may take to say what the working folder is."""

_SECRET = re.compile(
    r"""://[^/\s:@]*:[^/\s@]+@           # a URL with a password
    | \bhf_[A-Za-z0-9]{20,}              # tokens of Hugging Face, GitHub, OpenAI and the like, AWS
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,} | \bsk-[\w-]{20,} | \bAKIA[A-Z0-9]{16}\b
    | \bglpat-[\w-]{20,} | \bxox[abeoprs]-[\w-]{10,}   # of GitLab, of Slack
    | ://[^/\s:@]{16,}@                  # a URL with a token for a name
    | [?&](private_|access_|auth_|api_)?(token|key)=[^&\s]{8,}
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY""",
    re.VERBOSE,
)
_NAME_OF_A_SECRET = re.compile(
    r"(^|_)(secret|password|passwd|passphrase|credentials?|(api|secret|access|private)_?key"
    r"|(auth|access|api|hf|hub|bearer|private)_?token)$|^token$|^key$",
    re.IGNORECASE,
)


def require_no_secret(settings: Iterable[tuple[str, object]]) -> None:
    """Raise UsageError for a setting, by its key, that looks like a secret: its value would be in run.json.

    The value itself is not repeated.
    """
    for key, value in settings:
        is_named_so = _NAME_OF_A_SECRET.search(key.rpartition(".")[2]) and isinstance(value, str) and value
        if is_named_so or _SECRET.search(str(value)):
            raise UsageError(
                f"{key} looks like a secret: it would be kept in the run's folder, and everyone could see it in the "
                "list of processes.",
                "Put it into the environment, e.g. HF_TOKEN or WANDB_API_KEY, or take the password out of the URL.",
            )


def require_no_secret_for_slurm(options: Sequence[str]) -> None:
    """The same of options for sbatch, which get into slurm.sh; `--export` may set variables by name."""
    words = [re.split(r"[=\s]+", option.lstrip("-"), maxsplit=1) for option in options]
    pairs = [(name, rest[0] if rest else "") for name, *rest in words]
    settings: list[tuple[str, object]] = [(f"--{name}", value) for name, value in pairs]
    for name, value in pairs:
        if name == "export":
            settings += [(key, text) for key, _, text in (each.partition("=") for each in value.split(","))]
    require_no_secret(settings)


def of_clone(clone: "CloneState", can_resume: bool) -> dict[str, Any]:
    """The clone, and each patch of the series by its file's SHA-256 and the commit that it makes."""
    return {
        "folder": str(clone.folder),
        "url": clone.url,
        "base": clone.base,
        "head": clone.head,
        "tree": clone.tree,
        "edited": list(clone.edited),
        "edits": clone.edits,
        "on_top": list(clone.foreign),
        "can_resume": can_resume,
        "patches": {p.patch.name: p.state for p in clone.patches},
        "series": [
            {
                "name": p.patch.name,
                "state": p.state,
                "commit": p.patch.commit,
                "sha256": hashlib.sha256(p.patch.path.read_bytes()).hexdigest(),
            }
            for p in clone.patches
        ],
    }


def of_python(environment: "TrainingEnvironment") -> dict[str, Any]:
    """The training interpreter, its packages and what its torch sees."""
    return {
        "path": environment.python,
        "version": environment.python_version,
        "packages": {**environment.versions, **environment.extras},
        "cuda": environment.cuda,
        "gpus": list(environment.gpus),
    }


def of_machine() -> dict[str, Any]:
    """The operating system, the kind of processor, and how many of them there are."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def of_data(stage: "Stage", looked: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where the rows come from, and what preflight counted: rows, prompts, pairs, fingerprints (or None)."""
    splits: Mapping[str, Any] = (looked or {}).get("splits") or {}
    counts = {name: {key: split[key] for key in ("rows", "prompts", "pairs")} for name, split in splits.items()}
    return {
        "name": stage.data,
        "revision": stage.data_revision,
        "commit": None,
        "counts": counts or None,
        "fingerprint": {name: split["fingerprint"] for name, split in splits.items()} or None,
    }


def of_findings(findings: "Sequence[Finding] | None") -> list[dict[str, str]] | None:
    """What preflight found, or None if it was left away."""
    return None if findings is None else [{"level": finding.level, "what": finding.what} for finding in findings]


def of_variables() -> dict[str, str]:
    """Those of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def of_checkpoint(path: object) -> str | None:
    """The fingerprint of a policy.pt, see checkpoints.py; None if there is none, or it cannot be read."""
    return checkpoints.fingerprint(Path(str(path))) if path else None


def of_working_folder(folder: Path) -> dict[str, Any] | None:
    """The commit and branch of the repository that a folder lies in, and its tracked files that were changed.

    None if it lies in none, or git cannot or may not say at once. Nothing that the repository names is run for it, and
    nothing is written.
    """
    how = ("--porcelain=v2", "--branch", "-z", "--untracked-files=no", "--ignore-submodules=all", "--no-renames")
    found = look(folder, GIT_TIMEOUT, "status", *how, "--no-ahead-behind")
    if found is None:
        return None
    said = found.decode(errors="backslashreplace")
    lines = said.split("\0")[:-1]
    head = {key: value for key, _, value in (line[2:].partition(" ") for line in lines if line[:2] == "# ")}
    # "1 XY sub mH mI mW hH hI path" of a changed file, "u XY sub m1 m2 m3 mW h1 h2 h3 path" of one that is unmerged.
    changed = [line.split(" ", 8 if line[0] == "1" else 10)[-1] for line in lines if line[0] in "1u"]
    commit, branch = head.get("branch.oid"), head.get("branch.head")
    return {
        "commit": None if commit == "(initial)" else commit,
        "branch": None if branch == "(detached)" else branch,
        "changed": len(changed),
        "changed_files": changed[:NAMES_SHOWN],
    }
