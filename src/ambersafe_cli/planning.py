"""`ambersafe plan`: which ways of training a model fit a card, how large their batches can be, and how long they take.

A way is full fine-tuning, LoRA, or QLoRA. For each the largest microbatch that fits is looked for, without activation
checkpointing if there is one, else with it. Memory is memory.py's, the cards are those of cards.py.

Time is the operations of training by the rate of the card. A forward pass has 2 for each number of the model's matrices
and each token, and its attention 2 x layers x width x length / 2 x 2 for each token (PaLM, appendix B,
https://arxiv.org/abs/2204.02311, halved as a token sees those before it only). The backward pass has twice as many, and
with LoRA once as many for matrices: gradients of frozen weights are not made. Checkpointing adds a forward pass, and so
does the reference model in DPO, in every epoch, or once if its log-probabilities are kept.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ambersafe_cli import asking, cards, checkpoints, data_findings, display, environment, hub, memory
from ambersafe_cli import recipe as recipes
from ambersafe_cli.adapter_findings import LEAST_RATES
from ambersafe_cli.errors import DataError, UsageError
from ambersafe_cli.launch import needs_basic_trainer, policy_dtype
from ambersafe_cli.overrides import Value, assign
from ambersafe_cli.plans import count_steps, in_gigabytes

CUDA_BYTES = 1_000_000_000
"""What CUDA's context and libraries take of a GPU, about."""
FRAGMENTS = 0.05
"""The part of a GPU's memory that PyTorch's allocator cannot use, as it lies between blocks: an assumption."""
UTILISATION = 0.4
"""The part of a card's peak rate that training reaches: an assumption."""
ASSUMED_EXAMPLES = 100_000

RATES = {"sft": 1e-4, "dpo": 5e-6}
"""Learning rates of an adapter where a recipe has one for all weights; their source is in ambersafe-lora.yaml."""

# Of upstream's config, what a stage need not say. `ambersafe plan` needs no clone.
_UPSTREAMS: Mapping[str, Value] = {
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "eval_batch_size": 16,
    "eval_every": 20_000,
    "n_epochs": 1,
    "max_length": 512,
    "max_prompt_length": 256,
    "lr": 5e-7,
    "optimizer": "RMSprop",
    "trainer": "BasicTrainer",
    "activation_checkpointing": False,
    "lora": False,
    "lora_rank": 16,
    "quantize": None,
    "mixed_precision": None,
    "model.policy_dtype": "float32",
    "model.reference_dtype": "float16",
}
_FLAGS = {
    "optimizer": "--optimizer",
    "quantize": "--quantize",
    "lr": "--lr",
    "gradient_accumulation_steps": "--grad-accum",
    "trainer": "--trainer",
}
_SWITCHES = {"lora": "--lora", "activation_checkpointing": "--activation-checkpointing"}


@dataclass(frozen=True)
class Request:
    """What `ambersafe plan` was asked; `rate` in units of 10^12 operations a second, None if none was measured."""

    recipe: str
    flags: recipes.Flags
    stages: tuple[recipes.StageName, ...]
    gpu: str
    gpus: int
    rate: float | None
    overrides: tuple[str, ...]
    python: str
    as_json: bool


@dataclass(frozen=True)
class Way:
    """A way of training, and the settings that make it."""

    name: str
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Data:
    """What is trained on: how many examples, their sequences' length in tokens on average, the longest, and in words
    where that is known from."""

    examples: int
    mean: float
    lengths: memory.Lengths
    said: str


@dataclass(frozen=True)
class Fit:
    """How a way of training lies in memory: sequences of a microbatch of a GPU, SFT's examples or DPO's pairs.

    `values` are the settings that differ from the stage's own, `most` the moment that needs most of the `usable` bytes.
    """

    way: str
    values: Mapping[str, Value]
    microbatch: int
    checkpointing: bool
    most: memory.Moment
    usable: int

    @property
    def spare(self) -> int:
        """Bytes that are left; below 0, those that it lacks."""
        return self.usable - self.most.bytes


@dataclass(frozen=True)
class Planned:
    """A stage, what it trains on, and how each way to train it lies in memory."""

    stage: recipes.Stage
    data: Data
    fits: tuple[Fit, ...]


@dataclass(frozen=True)
class Choice:
    """What --auto takes: the settings, and why, as a sentence."""

    values: Mapping[str, Value]
    reason: str


def usable(gpu_bytes: int) -> int:
    """What training can have of a GPU's memory."""
    return int(gpu_bytes * (1 - FRAGMENTS)) - CUDA_BYTES


def ways(stage: recipes.Stage, gpus: int, has_bfloat16: bool = True, is_sharded: bool | None = None) -> list[Way]:
    """The ways to train a stage on so many GPUs, the best one first, without those that its settings rule out.

    `is_sharded`: whether FSDPTrainer trains, as it does on several GPUs unless that is said otherwise.

    A flag or KEY=VALUE always wins. A recipe that trains an adapter has a learning rate for nothing else; one that is
    for all weights leaves an adapter where it was, so it gets another, and AdamW in place of upstream's RMSprop. FSDP
    shards neither quantized weights nor states of bitsandbytes' optimizers.
    """
    mixed: Mapping[str, Value] = {"mixed_precision": "bfloat16" if has_bfloat16 else None}
    is_sharded = gpus > 1 if is_sharded is None else is_sharded
    trainer: dict[str, Value] = {"trainer": "FSDPTrainer" if is_sharded else "BasicTrainer", **mixed}
    if is_sharded and needs_basic_trainer(stage.with_values({"quantize": None})):
        if _given(stage) & {"optimizer", "offload_reference"}:
            return []
        trainer |= {"optimizer": "AdamW", "offload_reference": False}
    full: Mapping[str, Value] = {"lora": False, "quantize": None, "model.policy_dtype": "float32", **trainer}
    frozen = "bfloat16" if has_bfloat16 else "float32"
    adapter: Mapping[str, Value] = {"lora": True, "quantize": None, "model.policy_dtype": frozen, **trainer}
    is_default = _setting(stage, "optimizer") == _UPSTREAMS["optimizer"]
    if float(_setting(stage, "lr")) < LEAST_RATES[stage.name]:  # one for all weights
        adapter = {**adapter, "lr": RATES[stage.name]}
    found = [Way("full", full)]
    found += [] if is_sharded else [Way("full, 8-bit", {**full, "optimizer": "AdamW8bit"})]
    found.append(Way("LoRA", {**adapter, **({"optimizer": "AdamW"} if is_default else {})}))
    if not is_sharded and has_bfloat16:
        paged: Mapping[str, Value] = {"optimizer": "PagedAdamW8bit"} if is_default else {}
        bits = stage.get("quantize") or "4bit"
        found.append(Way("QLoRA" if bits == "4bit" else "LoRA, 8bit", {**adapter, "quantize": bits, **paged}))
    if stage.get("lora"):
        found = [way for way in found if way.values["lora"]]
    given = {key: stage.get(key) for key in _given(stage)}
    decides = ("lora", "quantize", "trainer")
    kept = [
        Way(way.name, {**way.values, **{key: value for key, value in given.items() if key in way.values}})
        for way in found
        if all(given[key] == way.values[key] for key in decides if key in given)
    ]
    return kept if "optimizer" not in given else [way for way in kept if way.name != "full, 8-bit"]


def _given(stage: recipes.Stage) -> set[str]:
    """The keys that a flag or KEY=VALUE set."""
    return set(stage.explicit) | {override.key for override in stage.overrides}


def _setting(stage: recipes.Stage, key: str) -> Any:
    value = stage.get(key)
    return _UPSTREAMS.get(key) if value is None else value


def config_of(stage: recipes.Stage, values: Mapping[str, Value]) -> dict[str, Any]:
    """Upstream's config as far as memory and time depend on it, with `values` over the stage's own, as launch.py fits
    it on GPUs: the reference model computes as the policy does, but where AmberSafe is reproduced."""
    config: dict[str, Any] = {**_UPSTREAMS, **stage.values}
    config |= {override.key: override.value for override in stage.overrides}
    config |= values
    trainer = str(config["trainer"])
    if config["mixed_precision"] and "model.reference_dtype" not in _given(stage):
        config["model.reference_dtype"] = config["mixed_precision"] if "FSDP" in trainer else "float32"
    elif not stage.get("model.reference_dtype") and stage.recipe != recipes.DEFAULT:
        config["model.reference_dtype"] = policy_dtype(config.get, trainer)
    return config


def fit(stage: recipes.Stage, way: Way, shape: memory.Shape, lengths: memory.Lengths, gpus: int, gpu_bytes: int) -> Fit:
    """The largest microbatch that a way can have, without checkpointing if there is one that fits, else with it.

    If none fits, the smallest one, whose `spare` is below 0. Raises UsageError for a batch that GPUs cannot share.
    """
    room, batch = usable(gpu_bytes), int(_setting(stage, "batch_size"))
    if batch % gpus:
        raise UsageError(
            f"batch_size {batch} cannot be divided over {gpus} GPUs.", "Add batch_size=… behind the flags."
        )
    given = _given(stage)
    sizes = [size for size in range(batch // gpus, 0, -1) if (batch // gpus) % size == 0]
    if "gradient_accumulation_steps" in given:
        sizes = [max(batch // gpus // int(_setting(stage, "gradient_accumulation_steps")), 1)]
    checkpointing = [False, True]
    if "activation_checkpointing" in given:
        checkpointing = [bool(stage.get("activation_checkpointing"))]
    found: Fit | None = None
    for again in checkpointing:
        for size in sizes:
            values: dict[str, Value] = {
                **way.values,
                "gradient_accumulation_steps": batch // gpus // size,
                "activation_checkpointing": again,
            }
            values |= _evaluation(stage, values, shape, lengths, gpus, room)
            moments = memory.moments(stage.name, config_of(stage, values), shape, lengths, gpus)
            found = Fit(way.name, values, size, again, memory.peak(moments), room)
            if found.spare >= 0:
                return found
    assert found  # noqa: S101, for mypy: there is always a size of 1
    return found


def _evaluation(
    stage: recipes.Stage,
    values: Mapping[str, Value],
    shape: memory.Shape,
    lengths: memory.Lengths,
    gpus: int,
    room: int,
) -> dict[str, Value]:
    """The largest eval_batch_size, up to the stage's own, with which what is not training fits, or the smallest."""
    own = int(_setting(stage, "eval_batch_size"))
    if "eval_batch_size" in _given(stage):
        return {}
    sizes = [size for size in range(own, 0, -1) if own % size == 0 and size % gpus == 0]
    sizes = sizes or [max(own // gpus, 1) * gpus]  # FSDPTrainer takes no other
    for size in sizes:
        config = config_of(stage, {**values, "eval_batch_size": size})
        moments = memory.moments(stage.name, config, shape, lengths, gpus)
        if all(moment.bytes <= room for moment in moments if moment.name in memory.WITHOUT_GRADIENT):
            break
    return {} if size == own else {"eval_batch_size": size}


def choose(
    stage: recipes.Stage,
    shapes: checkpoints.Shapes,
    lengths: memory.Lengths,
    gpus: int,
    gpu_bytes: int,
    has_bfloat16: bool = True,
    is_sharded: bool | None = None,
) -> Choice | None:
    """What --auto takes: the best way that fits so many GPUs of so many bytes each, None if none does.

    The order is full fine-tuning, LoRA and QLoRA, each without checkpointing before with it. `values` holds no key that
    a flag or KEY=VALUE set, and none that already has its value. Raises UsageError for a batch that GPUs cannot share.
    """
    shape, given, lacking = memory.shape_of(shapes), _given(stage), []
    for way in ways(stage, gpus, has_bfloat16, is_sharded):
        if way.name == "full, 8-bit":
            continue
        found = fit(stage, way, shape, lengths, gpus, gpu_bytes)
        if found.spare < 0:
            lacking.append(f"{way.name} lacks {in_gigabytes(-found.spare)}")
            continue
        values = {
            key: value for key, value in found.values.items() if key not in given and _setting(stage, key) != value
        }
        where = f"{gpus} x {in_gigabytes(gpu_bytes)}"
        how = f"microbatches of {found.microbatch}, {'with' if found.checkpointing else 'without'} checkpointing"
        rate = f", lr {values['lr']:g}" if "lr" in values else ""
        needs = f"{in_gigabytes(found.most.bytes)} of {in_gigabytes(found.usable)} usable on {where}"
        return Choice(values, f"{way.name}, {how}{rate}: {needs}{'; ' if lacking else ''}{', '.join(lacking)}.")
    return None


def automatic(
    stage: recipes.Stage, child: environment.TrainingEnvironment, processes: int | None, machines: int
) -> tuple[recipes.Stage, str]:
    """What --auto makes of a stage on this machine's GPUs, and on as many of each other machine: the stage and why.

    An archive says whether an adapter is trained on, and on which weights: those of all parameters are not quantized.
    Raises UsageError if there is no GPU or nothing fits them, HubError, DataError.
    """
    if not child.gpu_bytes:
        raise UsageError("--auto takes what fits the GPUs of this machine, and there is none.", ELSEWHERE)
    gpus = (processes or len(child.gpu_bytes)) * machines
    asked = stage
    if stage.get("model.archive"):
        adapter = checkpoints.adapter_of(Path(str(stage.get("model.archive"))))
        known: Mapping[str, Value] = {"lora": True, "quantize": adapter.quantize} if adapter else {"quantize": None}
        known = {key: value for key, value in known.items() if key not in _given(stage)}
        asked = replace(stage.with_values(known), explicit=stage.explicit | known.keys())
    lengths, room = read_data(stage, child.python).lengths, min(child.gpu_bytes)
    is_sharded = gpus > 1 or processes is not None or (_given(stage) >= {"trainer"} and "FSDP" in stage.trainer)
    if not ways(asked, gpus, child.has_bfloat16, is_sharded):
        raise UsageError(f"--auto knows no way to train on {gpus} GPUs that goes with these settings.", ELSEWHERE)
    choice = choose(asked, read_shapes(stage, child.python), lengths, gpus, room, child.has_bfloat16, is_sharded)
    if choice is None:
        size = f"{room / 2**30:.0f}GB"
        raise UsageError(
            f"Nothing fits {gpus} x {in_gigabytes(room)} in the way that is asked for.",
            f"`ambersafe plan --gpu {size} --gpus {gpus}` shows what each way lacks.",
        )
    return stage.with_values({**_changes(stage, asked), **choice.values}), choice.reason


def _changes(stage: recipes.Stage, other: recipes.Stage) -> dict[str, Value]:
    """The values of the other stage that this one does not have."""
    return {key: value for key, value in other.values.items() if stage.get(key) != value}


ELSEWHERE = "`ambersafe plan --gpu 24GB` shows what fits another one, with the command for it."


def seconds(stage: str, config: Mapping[str, Any], shape: memory.Shape, data: Data, gpus: int, rate: float) -> float:
    """How long a stage trains at `rate` operations a second of each GPU."""
    sequences = (2 if stage == "dpo" else 1) * data.examples
    epochs = _trained_on(config, data) / max(data.examples, 1)
    matrices, attention = 2 * shape.computing, 2 * shape.layers * shape.attention * data.mean
    forward = matrices + attention
    training = forward + 2 * attention + (1 if config.get("lora") else 2) * matrices
    training += forward if config["activation_checkpointing"] else 0
    total = epochs * training
    if stage == "dpo":
        total += forward * (1 if config.get("cache_reference") else epochs)
    return sequences * data.mean * total / (gpus * rate)


def _trained_on(config: Mapping[str, Any], data: Data) -> int:
    """How many examples are trained on in all, of data that make a batch at least."""
    limits = (config.get("n_epochs"), config.get("n_examples"))
    batch = int(config["batch_size"])
    return batch * count_steps(max(data.examples, batch), batch, *limits, bool(config.get("fill_last_batch")))


def disk_bytes(stage: str, config: Mapping[str, Any], shape: memory.Shape, data: Data) -> int:
    """Bytes of the checkpoints that are there at once: those that are kept, the one being written, and LATEST."""
    saves = _trained_on(config, data) // int(config["eval_every"])
    kept = saves if config.get("keep_checkpoints") is None else min(saves, int(config["keep_checkpoints"]) + 1)
    return memory.checkpoint_bytes(stage, config, shape) * (kept + 1 + (config.get("keep_best") is not None))


def words(stage: recipes.Stage, values: Mapping[str, Value]) -> list[str]:
    """The words of a command line that set these, those left away that the stage has anyway."""
    said: list[str] = []
    settings: list[str] = []
    is_cast = bool(values.get("lora")) and bool(values.get("mixed_precision"))  # then launch.py loads weights as --bf16
    for key, value in values.items():
        if _setting(stage, key) == value or (key == "model.policy_dtype" and is_cast and stage.get(key) is None):
            continue
        if key in _SWITCHES and value:
            said.append(_SWITCHES[key])
        elif key == "mixed_precision" and value == "bfloat16":
            said.append("--bf16")
        elif key in _FLAGS and value is not None:
            said += [_FLAGS[key], f"{value:g}" if isinstance(value, float) else str(value)]
        else:
            settings.append(assign(key, value))
    return [*said, *settings]


def command(stage: recipes.Stage, request: Request, found: Fit) -> str:
    """What to type for a way that fits."""
    flags: list[str] = [] if request.recipe == recipes.DEFAULT else ["--recipe", request.recipe]
    for flag, value in (
        ("--model", request.flags.values.get("model.name_or_path")),
        ("--model-revision", request.flags.values.get("model.revision")),
        ("--data", request.flags.data),
        ("--data-revision", request.flags.data_revision),
    ):
        flags += [flag, str(value)] if value is not None else []
    return shlex.join(["ambersafe", stage.name, *flags, *words(stage, found.values), *request.overrides])


def in_lines(command: str, width: int = 78) -> str:
    """A command for a shell in lines of so many columns, as far as its words allow, that can be pasted together."""
    parts: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and not word.startswith("-"):
            parts[-1] += f" {word}"  # a flag and its value stay together
        else:
            parts.append(word)
    lines = [" "]
    for part in parts:
        if len(lines[-1]) + 1 + len(part) > width - 2 and lines[-1].strip():
            lines.append("   ")
        lines[-1] += f" {part}"
    return " \\\n".join(lines)


def run(request: Request) -> None:
    """Show which ways fit. Raises AmberSafeError: UsageError if none does."""
    card, said = cards.find(request.gpu)
    if request.rate is not None and request.rate < LEAST_RATE:
        raise UsageError(f"No GPU trains at --rate {request.rate:g} TFLOP/s.", "Leave it away, or measure it.")
    chosen = recipes.load(request.recipe)
    stages = [recipes.resolve(name, chosen, request.flags, request.overrides) for name in request.stages]
    for stage in stages:
        _require_counts(stage)
    shape = memory.shape_of(read_shapes(stages[0], request.python))
    rate = request.rate * 1e12 if request.rate else card.rate * 1e12 * UTILISATION
    has_bfloat16 = card.bfloat16 is not None
    found: list[Planned] = []
    for stage in stages:
        data = read_data(stage, request.python)
        possible = ways(stage, request.gpus, has_bfloat16)
        fits = [fit(stage, way, shape, data.lengths, request.gpus, card.memory) for way in possible]
        found.append(Planned(stage, data, tuple(fits)))
    if request.as_json:
        display.write_json(_document(request, card, shape, rate, found))
    else:
        _show(request, card, said, shape, rate, found)
    _require_one(request, card, found)


LEAST_RATE = 0.01
_COUNTS = ("batch_size", "gradient_accumulation_steps", "eval_batch_size", "eval_every", "max_length")


def _require_counts(stage: recipes.Stage) -> None:
    for key in _COUNTS:
        value = _setting(stage, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{key} must be a whole number from 1 on, it is {value!r}.", f"Change {key}.")


def read_shapes(stage: recipes.Stage, python: str) -> checkpoints.Shapes:
    """The shapes of a model's tensors, by its weights where they are on this machine, else by its config.

    Raises HubError if there is neither, TrainingEnvironmentError.
    """
    if not stage.get("model.name_or_path"):
        raise UsageError(f"The name of {stage.model} on the hub is upstream's to say.", "Give --model ORG/NAME.")
    config = {key: stage.get(key) for key in ("model.name_or_path", "model.revision", hub.TOKENIZER_KEY)}
    source = hub.sources(config, "", None)[0]
    folder = hub.folder_of(source)
    if folder and not hub.lacking_weights(folder) and (shapes := checkpoints.model_shapes(folder)):
        return shapes
    request = {"model": source.name, "revision": source.revision}
    answer = asking.ask(python, "model_shapes.py", request, {}, "the model's shapes")
    return {name: tuple(sizes) for name, sizes in answer.items()}


def read_data(stage: recipes.Stage, python: str) -> Data:
    """How many examples there are and how long, by the rows if they and the tokenizer are on this machine, else
    ASSUMED_EXAMPLES of max_length tokens. Raises DataError for rows that cannot be read."""
    longest = int(_setting(stage, "max_length"))
    what = "pairs" if stage.name == "dpo" else "prompts"
    assumed = Data(
        ASSUMED_EXAMPLES,
        float(longest),
        memory.Lengths(longest, longest),
        f"{ASSUMED_EXAMPLES:,} {what} of {longest} tokens, assumed",
    )
    if not stage.data or stage.get("datasets") not in (["saferlhf"], None):
        return assumed
    config = {key: stage.get(key) for key in ("model.name_or_path", "model.revision", hub.TOKENIZER_KEY)}
    _, tokenizer, rows = hub.sources(config, stage.data, stage.data_revision)
    if hub.lacking(tokenizer) or hub.lacking(rows):
        return assumed
    child = environment.probe(python)
    if child.missing:
        return assumed
    answer = data_findings.look_at_data(stage, child, config_of(stage, {}), tokenizer)
    if "error" in answer:
        raise DataError(f"Cannot read {stage.data}: {answer['error']}", "`ambersafe data` tries again and says more.")
    train = answer["splits"]["train"]
    sampled = train["sampled"]
    if not sampled["examples"]:
        return assumed
    return Data(
        train["examples"],
        float(sampled["tokens_mean"]),
        memory.Lengths(sampled["tokens_longest"], sampled["response_longest"]),
        f"{train['examples']:,} {what} of {sampled['tokens_mean']} tokens, the longest {sampled['tokens_longest']}",
    )


_KINDS = {
    "weights": ("weights", "weights, frozen", "adapter", "reference model", "weights in bfloat16", "gathered layers"),
    "activations": ("activations",),
    "other": ("logits", "working memory", "logits and a layer"),
}


def _row(found: Fit) -> list[str]:
    """A way as a row: bytes in GB, by kind; what is of no other kind is gradients and the optimizer's state."""
    sums = {kind: sum(part.bytes for part in found.most.parts if part.name in names) for kind, names in _KINDS.items()}
    trained = found.most.bytes - sum(sums.values())
    numbers = (sums["weights"], trained, sums["activations"], sums["other"], found.most.bytes, found.spare)
    return [
        found.way,
        str(found.microbatch),
        "yes" if found.checkpointing else "no",
        *(f"{number / 1e9:.1f}" for number in numbers),
    ]


def _show(
    request: Request,
    card: cards.Card,
    said: str | None,
    shape: memory.Shape,
    rate: float,
    found: Sequence[Planned],
) -> None:
    model = found[0].stage.model
    room = usable(card.memory)
    how = "measured" if request.rate else f"{UTILISATION:.0%} of {card.rate:g}, assumed ({card.source})"
    reserve = f"{in_gigabytes(CUDA_BYTES)} for CUDA and {FRAGMENTS:.0%} for fragments off"
    facts = [
        ("model", f"{model}, {shape.parameters / 1e9:.2f} billion parameters"),
        ("cards", f"{request.gpus} x {said or card.name}"),
        ("memory", f"{in_gigabytes(card.memory)} each, {in_gigabytes(room)} usable: {reserve}"),
        ("speed", f"{rate / 1e12:.0f} TFLOP/s a card: {how}"),
    ]
    facts += [("data", f"{each.data.said} ({each.stage.name})") for each in found]
    if card.bfloat16 is None:
        facts.append(("note", "it has no bfloat16: without --bf16, and no QLoRA, which computes in it"))
    if request.gpus > 1:
        facts.append(("note", "QLoRA and optimizers of 8 bits train on one GPU, and are not among these"))
    display.write_facts(facts, indent=9)
    columns = ["way", "batch", "again", "weights", "trained", "acts", "other", "total", "spare"]
    for planned in found:
        stage, data = planned.stage, planned.data
        display.write_table(stage.name.upper(), columns, [_row(each) for each in planned.fits])
        for each in planned.fits:
            if each.spare < 0:
                continue
            config = config_of(stage, each.values)
            hours = seconds(stage.name, config, shape, data, request.gpus, rate) / 3600
            disk = in_gigabytes(disk_bytes(stage.name, config, shape, data))
            display.write(f"{each.way}: {hours:.1f} hours, {disk} on disk")
            display.write(in_lines(command(stage, request, each)))
    legend = "GB of a card, at the moment that needs most. batch: examples of a microbatch; again: with activation "
    display.write_facts(
        [("", f"{legend}checkpointing; trained: gradients and the optimizer's state. 8-bit: its state alone.")],
        indent=0,
    )


def _document(
    request: Request,
    card: cards.Card,
    shape: memory.Shape,
    rate: float,
    found: Sequence[Planned],
) -> dict[str, Any]:
    def of_way(planned: Planned, each: Fit) -> dict[str, Any]:
        stage, config = planned.stage, config_of(planned.stage, each.values)
        return {
            "way": each.way,
            "fits": each.spare >= 0,
            "spare_bytes": each.spare,
            "microbatch": each.microbatch,
            "activation_checkpointing": each.checkpointing,
            "values": dict(each.values),
            "memory": asdict(each.most),
            "memory_bytes": each.most.bytes,
            "seconds": round(seconds(stage.name, config, shape, planned.data, request.gpus, rate)),
            "disk_bytes": disk_bytes(stage.name, config, shape, planned.data),
            "command": command(stage, request, each),
        }

    stages = {
        planned.stage.name: {
            "data": asdict(planned.data),
            "ways": [of_way(planned, each) for each in planned.fits],
        }
        for planned in found
    }
    return {
        "model": found[0].stage.model,
        "parameters": shape.parameters,
        "card": asdict(card),
        "gpus": request.gpus,
        "usable_bytes": usable(card.memory),
        "rate": rate,
        "stages": stages,
    }


def _require_one(request: Request, card: cards.Card, found: Sequence[Planned]) -> None:
    """Raise UsageError if a stage has no way that fits."""
    for planned in found:
        stage, fits = planned.stage.name.upper(), planned.fits
        if any(each.spare >= 0 for each in fits):
            continue
        if not fits:
            raise UsageError(f"The settings leave no way to train {stage} on {request.gpus} x {card.name}.")
        least = max(fits, key=lambda each: each.spare)
        raise UsageError(
            f"Nothing fits for {stage}: {least.way} lacks {in_gigabytes(-least.spare)}, when {least.most.name}.",
            "A larger card, more of them (--gpus), a shorter max_length=… or a smaller model would help.",
        )
