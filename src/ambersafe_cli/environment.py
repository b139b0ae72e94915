"""What the interpreter that runs train.py has, packages and GPUs: asked of a child that imports none of them."""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ambersafe_cli.errors import TrainingEnvironmentError
from ambersafe_cli.files import expand

# What upstream's train.py imports, and the distribution that brings it.
MODULES = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "wandb": "wandb",
    "bs4": "beautifulsoup4",
    "numpy": "numpy",
    "tqdm": "tqdm",
}
# What else decides about the numbers of a training; recorded, but not needed.
EXTRAS = (
    "tokenizers", "safetensors", "huggingface-hub", "pyarrow", "triton", "flash-attn", "xformers", "bitsandbytes",
    "peft", "deepspeed", "torchao", "nvidia-nccl-cu11", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu11",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
INSTALL_HINT = "Install them there: `pip install 'ambersafe-cli[train]'`, or name another interpreter with --python."

# Runs in the other interpreter, of any version, with the standard library alone. The first entry of sys.path is the
# working folder, where a folder called `wandb` would pass for a package; train.py does not see it either.
_WITHOUT_WORKING_FOLDER = "import sys; sys.path[:1] == [''] and sys.path.pop(0)\n"  # sys is built in
_PROBE = """
import importlib.metadata as metadata, importlib.util as util, json, re, sys
modules, versions, cuda = json.loads(sys.argv[1]), {}, None
extras = {}
for distribution in json.loads(sys.argv[2]):
    try:
        extras[distribution] = metadata.version(distribution)
    except (ImportError, ValueError):
        pass
for module, distribution in modules.items():
    try:
        versions[distribution] = metadata.version(distribution) if util.find_spec(module) else None
    except (ImportError, ValueError):
        versions[distribution] = None
spec = util.find_spec("torch")
if spec and spec.submodule_search_locations:
    with open(spec.submodule_search_locations[0] + "/version.py") as file:
        found = re.search(r"^(?:cuda|hip)\\b.*?= '([^']+)'", file.read(), re.MULTILINE)
    cuda = found and found.group(1)
json.dump({"python": sys.version.split()[0], "versions": versions, "extras": extras, "cuda": cuda}, sys.stdout)
"""


@dataclass(frozen=True)
class TrainingEnvironment:
    """An interpreter's path and version, the version of each package by distribution (None if it is missing), those of
    `EXTRAS` that are installed, the CUDA or ROCm version that its torch is built for (None: CPU only), and the names of
    the GPUs that torch will see. Where torch was asked, `gpu_bytes` is the memory of each in bytes, and `has_bfloat16`
    whether all of them compute in it."""

    python: str
    python_version: str
    versions: Mapping[str, str | None]
    extras: Mapping[str, str]
    cuda: str | None
    gpus: tuple[str, ...]
    gpu_bytes: tuple[int, ...] = ()
    has_bfloat16: bool = True

    @property
    def missing(self) -> list[str]:
        return [name for name, version in self.versions.items() if version is None]

    def require_packages(self) -> None:
        """Raise TrainingEnvironmentError if train.py could not even import what it needs."""
        if self.missing:
            raise TrainingEnvironmentError(f"{self.python} lacks {', '.join(self.missing)}.", INSTALL_HINT)


def settings_for_gpus() -> dict[str, str]:
    """What PyTorch reads from its environment on GPUs, as far as the user's own does not say it.

    cuDNN's attention, which PyTorch tries first on Hopper, plans each length that it has not seen: it comes last.
    The allocator's blocks can grow, so that batches of many lengths leave few holes between them.
    """
    found = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        found["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return {key: value for key, value in found.items() if key not in os.environ}


def probe(python: str, ask_torch: bool = False) -> TrainingEnvironment:
    """Ask an interpreter, a path or a name on PATH, what it has. Raises TrainingEnvironmentError if it cannot say.

    For the GPUs it asks the driver's own tool, which is quick, or torch, which knows better whether they can be used.
    """
    path = shutil.which(expand(python))
    if path is None:
        raise TrainingEnvironmentError(f"There is no interpreter {python}.", "--python takes the path of a Python.")
    path = str(Path(path).absolute())  # not resolved: a virtual environment's python is a link
    try:
        command = [path, "-c", _WITHOUT_WORKING_FOLDER + _PROBE, json.dumps(MODULES), json.dumps(EXTRAS)]
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
        )
        answer = json.loads(child.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise TrainingEnvironmentError(
            f"{path} does not work as a Python interpreter: {said}", "--python takes the path of a Python."
        ) from error
    gpus: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    has_bfloat16 = True
    if answer["cuda"] and ask_torch:
        gpus, sizes, has_bfloat16 = _torchs_gpus(path)
    elif answer["cuda"]:
        gpus = _visible_gpus()
    known = answer["python"], answer["versions"], answer["extras"], answer["cuda"]
    return TrainingEnvironment(path, *known, gpus, sizes, has_bfloat16)


_GPUS_OF_TORCH = """
import torch
for number in range(torch.cuda.device_count()):
    properties = torch.cuda.get_device_properties(number)
    print(properties.total_memory, properties.major, properties.name)
"""


def _torchs_gpus(python: str) -> tuple[tuple[str, ...], tuple[int, ...], bool]:
    """The names of the GPUs that torch itself can use, the memory of each in bytes, and whether all have bfloat16, as
    NVIDIA's have from compute capability 8.0 on.

    Takes the seconds that importing it takes.
    """
    command = [python, "-c", _WITHOUT_WORKING_FOLDER + _GPUS_OF_TORCH]
    child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if child.returncode:
        raise TrainingEnvironmentError(f"{python} cannot import torch: {child.stderr.strip()}", INSTALL_HINT)
    found = [line.split(" ", 2) for line in child.stdout.splitlines() if line]
    return (
        tuple(name for _, _, name in found),
        tuple(int(size) for size, _, _ in found),
        all(int(major) >= 8 for _, major, _ in found),
    )


def _visible_gpus() -> tuple[str, ...]:
    """The names of the GPUs that CUDA_VISIBLE_DEVICES leaves, as nvidia-smi or rocm-smi lists them."""
    names: list[str] = []
    for command, line in (
        (["nvidia-smi", "-L"], r"^GPU \d+: (.+?) \("),
        (["rocm-smi", "--showproductname"], r"Card Series:\s*(.+)"),
    ):
        if not names and shutil.which(command[0]):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                listed = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
                )
                names = re.findall(line, listed.stdout, flags=re.MULTILINE)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(names)
    # As CUDA reads it: up to the first index that is none. An entry may also be the id of a GPU or of a slice of one.
    chosen: list[str] = []
    for entry in filter(None, visible.split(",")):
        if re.fullmatch(r"-?\d+", entry.strip()):
            if not 0 <= int(entry) < len(names):
                break
            chosen.append(names[int(entry)])
        elif names:
            chosen.append(f"{names[0]} ({entry.strip()})" if "MIG" in entry else entry.strip())
    return tuple(chosen)
