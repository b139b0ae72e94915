"""Write a policy.pt as a Hugging Face folder, all but its card; answering.py tells how it is asked.

Runs under the training interpreter. The request: `checkpoint`; `model` and `tokenizer`, each a folder or a name on the
hub, with `revision` and `tokenizer_revision`; `folder`, which is there and empty; `dtype`, or null for that of each
tensor; `shard_bytes`, how large a file of weights may get; `buffers`, a pattern for names that are no weights; `merge`:
whether the adapter of a LoRA checkpoint is added to the model's weights, or else written as it is, as a folder that
peft loads; `base`, what that folder calls the model.
The answer: `dtype`, that of most weights; `tensors`, of each in the files its shape and dtype; `shapes`, of each weight
of the checkpoint; `left_out`, those that no file has; `renamed`, whether files have other names or layouts than the
checkpoint; `metrics` and `step_idx` as the checkpoint has them; `commit`, that of the model on the hub, if it is from
there.

The model is never built: tensors go from the mapped checkpoint to the files piece by piece. What is to be in the files
is asked of the model's class, on the meta device, which has shapes and no numbers. Only where an adapter is added to
the weights of the model as it was published, these are loaded, in the type that they were published in.
"""

import errno
import fnmatch
import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import huggingface_hub
import safetensors
import torch
import transformers
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

if TYPE_CHECKING:
    from ambersafe_cli.children import adapters
    from ambersafe_cli.children.answering import Problem, Progress, answer, innermost
else:
    import adapters
    from answering import Problem, Progress, answer, innermost

State = dict[str, torch.Tensor]

# https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PIECE = 2**22
"""Numbers that are converted and written at a time: 16 MiB of float32."""

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "*.spm", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
TEXTS = (
    "Hello, world!",
    "  two  spaces,\n\n\ta tab, and a line feed\r\n ",
    "\n\nHuman: Is 1234567.89 a number?\n\nAssistant: Yes.",
    "naïve café, Übergröße, мир, שלום, 你好世界, 🙂👩‍🚀",
)
"""What a tokenizer is tried on."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def files_of(name: str, revision: str | None, patterns: tuple[str, ...], what: str) -> str:
    """The folder with these files of a model, in the user's cache if it is on the hub."""
    if os.path.isdir(name):
        require_own_files(name, set(patterns) - set(WEIGHTS))
        return name
    try:
        return str(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        raise Problem("model", f"Cannot get the {what} of {name}: {innermost(error)}") from error


def require_own_files(folder: str, patterns: Iterable[str]) -> None:
    """Raise Problem for a link in a model's folder to a file of another name elsewhere, such as a key of the user's:
    what these files hold gets into the export, which may be published. In the Hugging Face cache they are links into
    its `blobs`."""
    root = os.path.realpath(folder)
    of_cache = os.path.join(os.path.dirname(os.path.dirname(root)), "blobs")
    own = [root, of_cache] if os.path.basename(os.path.dirname(root)) == "snapshots" else [root]
    for place, _, files in os.walk(folder):
        for file in files:
            path = os.path.join(place, file)
            real = os.path.realpath(path)
            is_own = os.path.basename(real) == file or any(real.startswith(os.path.join(each, "")) for each in own)
            if not is_own and is_one_of(os.path.relpath(path, folder), patterns):
                raise Problem("model", f"{path} is a link to {real}, whose content would get into the export")


def empty_model(folder: str, name: str) -> Any:
    """The model as its config describes it, with shapes and no numbers."""
    kind: Any = transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return kind.from_config(config)
    except Exception as error:
        raise Problem("model", f"Cannot make a model of the config of {name}: {innermost(error)}") from error


def open_checkpoint(path: str) -> tuple[State, dict[str, Any]]:
    """The weights of a policy.pt, as a map of the file, and what else it holds."""
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state = saved.pop("state")
    except Exception as error:
        raise Problem("checkpoint", f"{path} cannot be read: {innermost(error)}") from error
    adapters.require_finite(state, path)
    return dict(state), dict(saved)


def published(name: str, revision: str | None) -> State:
    """The weights of a model as it was published, by the names in a checkpoint, in the type of its files."""
    kind: Any = transformers.AutoModelForCausalLM
    try:
        folder = files_of(name, revision, (*CONFIGS, *WEIGHTS), "weights")
        model, found = kind.from_pretrained(folder, dtype=dtype_of_files(folder), output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(f"{', '.join(sorted(found['missing_keys'])[:3])} missing")
    except (torch.OutOfMemoryError, MemoryError, Problem):
        raise
    except Exception as error:
        raise Problem("model", f"Cannot load the weights of {name}: {innermost(error)}") from error
    return dict(model.state_dict())


def dtype_of_files(folder: str) -> torch.dtype:
    """What weights can be loaded in without rounding any: the type that all of them are in, or float32."""
    kinds = set()
    for path in glob.glob(os.path.join(glob.escape(folder), "model*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(" ".join(kinds), torch.float32)


def merge(model: Any, state: State, folder: str, dtype: Any, progress: Progress) -> None:
    """Add an adapter to the weights of a state, each in float32, and keep the sums in a dtype.

    `model` has shapes alone; it gets the adapter. Raises ValueError for sums that the dtype does not have.
    """
    adapters.add(model, folder, torch.float32)
    layers = adapters.layers_of(model)
    for number, (name, _, delta) in enumerate(adapters.deltas(model)):
        progress("merging the adapter", number / len(layers))
        if f"{name}.weight" not in state:
            raise Problem("checkpoint", f"The weights below the adapter in {folder} lack {name}.weight.")
        state[f"{name}.weight"] = converted(f"{name}.weight", state[f"{name}.weight"].float() + delta, dtype)


def fit(model: Any, state: State, buffers: str) -> tuple[State, list[str], bool]:
    """The tensors for the files, by the names and in the layouts of published files; the names in the checkpoint that
    are left out; and whether names or layouts are others than there.

    Copies of tied weights are left out, and buffers that older versions of transformers kept. A checkpoint of an
    older version may have the names of files itself. Raises ValueError, with what is wrong, if it is another model's.
    """
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    inside = dict(model.state_dict())
    weights = {name: tensor for name, tensor in inside.items() if name not in tied}
    as_files = revert_weight_conversion(model, dict(weights))
    tied_in_files = revert_weight_conversion(model, {name: inside[name] for name in tied if name in inside})
    problems = list(misfits(state, weights, tied.keys(), buffers))
    if not problems:
        for name, source in tied.items():
            if name in state and source in state and not is_same(state[name], state[source]):
                raise ValueError(f"{name} and {source} differ, which the model ties")
        tensors = revert_weight_conversion(model, {name: state[name] for name in weights})
        renamed = {n: t.shape for n, t in as_files.items()} != {n: t.shape for n, t in weights.items()}
        return tensors, sorted(state.keys() - weights.keys()), renamed
    if not list(misfits(state, as_files, tied_in_files.keys(), buffers)):
        return {name: state[name] for name in as_files}, sorted(state.keys() - as_files.keys()), False
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise ValueError("; ".join(problems[:3]) + more)


def misfits(state: State, wanted: State, optional: Any, buffers: str) -> Iterator[str]:
    """Where a checkpoint does not hold the weights that are wanted, in words."""
    for name, tensor in wanted.items():
        if name not in state:
            yield f"{name} is missing"
        elif state[name].shape != tensor.shape:
            yield f"{name} is {as_text(state[name].shape)}, not {as_text(tensor.shape)}"
    for name in state:
        if name not in wanted and name not in optional and not re.search(buffers, name):
            yield f"{name} is not the model's"


def as_text(shape: torch.Size) -> str:
    return "x".join(map(str, shape))


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, without a look at the numbers if they lie in the same place."""
    return (one.data_ptr() == other.data_ptr() and one.stride() == other.stride()) or torch.equal(one, other)


def dtype_in_files(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype and tensor.is_floating_point() else tensor.dtype


def write_weights(folder: str, tensors: State, dtype: torch.dtype | None, shard_bytes: int, progress: Progress) -> None:
    """Write files of weights, and their index if there are several. Raises OSError, ValueError."""
    sizes = {name: torch.empty_like(t, dtype=dtype_in_files(t, dtype), device="meta") for name, t in tensors.items()}
    total = sum(size.nbytes for size in sizes.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(errno.ENOSPC, f"{total / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")
    split = huggingface_hub.split_torch_state_dict_into_shards(sizes, max_shard_size=shard_bytes)
    written = 0
    for file, names in split.filename_to_tensors.items():
        for count in write_file(os.path.join(folder, file), {name: tensors[name] for name in names}, dtype):
            written += count
            progress("writing the weights", written / max(total, 1))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(os.path.join(folder, "model.safetensors.index.json"), index)


def write_file(path: str, tensors: State, dtype: torch.dtype | None) -> Iterator[int]:
    """Write a safetensors file, and yield how many bytes are written as they are.

    safetensors' own save_file wants the tensors of a file in memory at once, in their new dtype.
    """
    # The largest numbers first, as save_file has it, so that each lies at a multiple of its size.
    parts = sorted(tensors.items(), key=lambda part: -dtype_in_files(part[1], dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in parts:
        kind = dtype_in_files(tensor, dtype)
        start, end = end, end + tensor.numel() * kind.itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in parts:
            flat: Any = tensor.detach().contiguous().reshape(-1)
            for piece in flat.split(PIECE):
                new = converted(name, piece, dtype_in_files(tensor, dtype))
                yield file.write(new.view(torch.uint8).numpy().data) if piece.numel() else 0


def converted(name: str, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same in another dtype. Raises ValueError if one of them is too large for it."""
    new = numbers.to(dtype)
    if new.dtype != numbers.dtype and not is_as_finite(new, numbers):
        raise ValueError(f"{name} holds numbers that are too large for {str(dtype).removeprefix('torch.')}")
    return new


def is_as_finite(converted: torch.Tensor, numbers: torch.Tensor) -> bool:
    """Whether no number has become infinite."""
    # A sum tells at once that all are finite: of one that is not, nothing finite can come.
    return bool(converted.sum(dtype=torch.float32).isfinite()) or converted.isfinite().equal(numbers.isfinite())


def write_json(path: str, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_configs(folder: str, source: str, model: Any, dtype: str) -> None:
    """The configs as the model has them, with the dtype of the files: what loads the model loads the folder.

    As transformers would write them, older programs could not read some settings, such as the rotary embedding's.
    """
    with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    for key in ("_name_or_path", "auto_map"):  # where it lay once, and code that is not in this folder
        config.pop(key, None)
    config |= {"architectures": [type(model).__name__], "dtype": dtype}
    if "torch_dtype" in config:  # the same, as it was called before transformers 4.56
        config["torch_dtype"] = dtype
    write_json(os.path.join(folder, "config.json"), config)
    generation = os.path.join(source, "generation_config.json")
    if os.path.isfile(generation):
        shutil.copyfile(generation, os.path.join(folder, "generation_config.json"))
    else:
        model.generation_config.save_pretrained(folder)


def write_tokenizer(folder: str, source: str, name: str) -> None:
    """The files of the tokenizer, byte for byte, if a tokenizer that is opened from them does the same.

    That of another model than the config's may be another class of tokenizer there: then transformers writes it.
    """
    kind: Any = transformers.AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(source)
        wanted = behaviour(tokenizer)
    except Exception as error:
        raise Problem("model", f"Cannot open the tokenizer of {name}: {innermost(error)}") from error
    copied = list(copy_files(source, folder, (*TOKENIZER, *tokenizer.vocab_files_names.values())))
    try:
        is_same_one = behaviour(kind.from_pretrained(folder)) == wanted
    except Exception:  # of whatever class was made of the files
        is_same_one = False
    if is_same_one:
        return
    for path in copied:
        os.unlink(path)
    tokenizer.save_pretrained(folder)
    if behaviour(kind.from_pretrained(folder)) != wanted:
        raise Problem("model", f"The tokenizer of {name} is another one when it has been saved and opened again.")


def is_one_of(path: str, patterns: Iterable[str]) -> bool:
    # fnmatch's * takes a slash too.
    return any(fnmatch.fnmatchcase(path, p) and path.count("/") == p.count("/") for p in patterns)


def copy_files(source: str, folder: str, patterns: tuple[str, ...]) -> Iterator[str]:
    """Copy the files of these names, and yield their new paths."""
    for place, _, files in os.walk(source):
        for file in files:
            path = os.path.relpath(os.path.join(place, file), source)
            if is_one_of(path, patterns):
                target = os.path.join(folder, path)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.copyfile(os.path.join(source, path), target)
                yield target


def behaviour(tokenizer: Any) -> list[Any]:
    """What a tokenizer does, by which two are compared."""
    ids = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in TEXTS for special in (False, True)]
    texts = [tokenizer.decode(each) for each in ids]
    return [ids, texts, len(tokenizer), tokenizer.chat_template, str(tokenizer.special_tokens_map)]


def require_loading(folder: str) -> None:
    """Raise RuntimeError if transformers, which is given the folder as users will, lacks a weight or has one left."""
    kind: Any = transformers.AutoModelForCausalLM
    _, found = kind.from_pretrained(folder, device_map="meta", output_loading_info=True)
    wrong = {key: sorted(map(str, names)) for key, names in found.items() if names}
    if wrong:
        raise RuntimeError(f"transformers does not load it: {json.dumps(wrong):.300}")


def main(request: Any, progress: Progress) -> dict[str, Any]:
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    name, folder = request["model"], request["folder"]
    progress("opening the model's config and tokenizer", 0.0)
    source = files_of(name, request["revision"], CONFIGS, "config")
    tokenizer = files_of(request["tokenizer"], request["tokenizer_revision"], ("config.json", *TOKENIZER), "tokenizer")
    commit = os.path.basename(source) if source != name else None
    state, saved = open_checkpoint(request["checkpoint"])
    adapter = saved.get("adapter")
    try:
        if adapter is not None and not request["merge"]:
            written = write_adapter(request, source, progress)
        else:
            written = write_model(request, source, state, adapter, progress)
        progress("writing the tokenizer", 1.0)
        write_tokenizer(folder, tokenizer, request["tokenizer"])
    except ValueError as error:
        raise Problem("usage", f"{error}.") from error
    except OSError as error:
        what = "The disk is full" if error.errno in _NO_ROOM else "It cannot be written"
        raise Problem("folder", f"{what}: {error.strerror}.") from error
    metrics = saved.get("metrics")
    return {
        **written,
        "step_idx": saved.get("step_idx"),
        "metrics": {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        if isinstance(metrics, dict)
        else {},
        "commit": commit,
    }


def write_model(
    request: Any, source: str, state: State, adapter: dict[str, Any] | None, progress: Progress
) -> dict[str, Any]:
    """Write weights and configs as transformers loads them, of a LoRA checkpoint with its adapter merged."""
    name, folder = request["model"], request["folder"]
    dtype = getattr(torch, request["dtype"] or "float32") if request["dtype"] or adapter else None
    if adapter is not None:
        progress("loading the weights below the adapter", 0.0)
        state = open_checkpoint(adapter["on"])[0] if adapter["on"] else published(name, request["revision"])
        merge(empty_model(source, name), state, os.path.dirname(request["checkpoint"]), dtype, progress)
    model = empty_model(source, name)
    try:
        tensors, left_out, renamed = fit(model, state, request["buffers"])
    except ValueError as error:
        raise Problem("checkpoint", f"{request['checkpoint']} holds no weights of {name}: {error}") from error
    most = most_common(tensors, dtype)
    write_weights(folder, tensors, dtype, request["shard_bytes"], progress)
    write_configs(folder, source, model, most)
    require_loading(folder)
    return {
        "dtype": most,
        "tensors": described(tensors, dtype),
        "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
        "left_out": left_out,
        "renamed": renamed,
    }


def write_adapter(request: Any, source: str, progress: Progress) -> dict[str, Any]:
    """Write the adapter of a LoRA checkpoint as peft loads it: its weights byte for byte, unless in another dtype."""
    folder, beside = request["folder"], os.path.dirname(request["checkpoint"])
    dtype = getattr(torch, request["dtype"]) if request["dtype"] else None
    adapters.add(empty_model(source, request["model"]), beside, torch.float32)  # or it is another model's
    path = os.path.join(beside, adapters.WEIGHTS)
    tensors: State = load_file(path)
    progress("writing the adapter", 0.5)
    if any(dtype_in_files(tensor, dtype) != tensor.dtype for tensor in tensors.values()):
        list(write_file(os.path.join(folder, adapters.WEIGHTS), tensors, dtype))
    else:
        shutil.copyfile(path, os.path.join(folder, adapters.WEIGHTS))
    with open(os.path.join(beside, adapters.CONFIG), encoding="utf-8") as file:
        config = json.load(file)
    commit = os.path.basename(source) if source != request["model"] else None
    own = {"base_model_name_or_path": request["base"], "revision": commit, "inference_mode": True}
    write_json(os.path.join(folder, adapters.CONFIG), {**config, **own})
    return {"dtype": most_common(tensors, dtype), "tensors": described(tensors, dtype)}


def most_common(tensors: State, dtype: torch.dtype | None) -> str:
    """The type of most numbers in the files."""
    kinds: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        kind = dtype_in_files(tensor, dtype)
        kinds[kind] = kinds.get(kind, 0) + tensor.numel() * kind.is_floating_point
    return str(max(kinds, key=lambda kind: kinds[kind])).removeprefix("torch.")


def described(tensors: State, dtype: torch.dtype | None) -> dict[str, Any]:
    """The shape and dtype of each tensor in the files."""
    return {name: [list(t.shape), DTYPES[dtype_in_files(t, dtype)]] for name, t in tensors.items()}


if __name__ == "__main__":
    answer(main)
