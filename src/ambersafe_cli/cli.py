"""The commands: each reads its flags and calls the room that does the work. Nothing heavy is imported at the top."""

import enum
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ambersafe_cli.errors import AmberSafeError, UsageError
from ambersafe_cli.files import expand

app = typer.Typer(
    help="Safety-tune a language model with DPO, by patching and launching its reference implementation.",
    epilog="The way through: ambersafe setup, ambersafe sft, ambersafe dpo --beta 0.1. To try it: ambersafe demo.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Loss(enum.StrEnum):
    dpo = "dpo"
    ipo = "ipo"


class StageName(enum.StrEnum):
    sft = "sft"
    dpo = "dpo"


class Template(enum.StrEnum):
    none = "none"
    hh = "hh"
    chat = "chat"


class Quantize(enum.StrEnum):
    bits4 = "4bit"
    bits8 = "8bit"


class Dtype(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_PATH: dict[str, Any] = {"parser": expand, "metavar": "<path>"}

Clone = Annotated[
    Path, typer.Option("--dir", envvar="AMBERSAFE_UPSTREAM_DIR", help="The folder of the clone of upstream.", **_PATH)
]
Repo = Annotated[str | None, typer.Option(help="Another URL, or a local path, to clone upstream from.")]
Python = Annotated[
    str, typer.Option(envvar="AMBERSAFE_PYTHON", help="The interpreter that runs train.py.", show_default="this one")
]
OtherPython = Annotated[
    str | None, typer.Option("--python", envvar="AMBERSAFE_PYTHON", help="Another interpreter to run train.py.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe's name, or the path of a YAML file.")]
Model = Annotated[str | None, typer.Option(help="The model to train: a name on the hub, or a folder.")]
ModelRevision = Annotated[str | None, typer.Option(help="Its branch, tag or commit on the hub.")]
Data = Annotated[
    str | None,
    typer.Option(help="Preference rows: a file (jsonl, json, parquet, csv), a folder, or a dataset on the hub."),
]
DataRevision = Annotated[
    str | None, typer.Option(help="Their branch, tag or commit on the hub. AmberSafe's own is v0.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Examples (SFT) or pairs (DPO) an optimizer step.")]
GradAccum = Annotated[int | None, typer.Option(min=1, help="Microbatches that a batch is cut into.")]
LearningRate = Annotated[float | None, typer.Option("--lr", min=0, help="Learning rate.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Times through the data.")]
_RECIPES = "the recipe's"
_TEMPLATE = "The form of a prompt: none, hh (Human and Assistant), or chat (the tokenizer's own)."
PromptTemplate = Annotated[
    Template | None, typer.Option("--template", help=_TEMPLATE, show_default="the recipe's, none")
]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and response together.")]
Trainer = Annotated[str | None, typer.Option(help="FSDPTrainer or BasicTrainer.")]
ExpName = Annotated[str | None, typer.Option(help="The run's name: the beginning of its folder's.")]
Seed = Annotated[int | None, typer.Option(help="Orders the data if seed_data is set, as in the recipe best.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; the weights stay float32.")]
Attn = Annotated[
    str | None,
    typer.Option(help="How attention is computed: sdpa, flash_attention_2, eager.", show_default="sdpa, if it can be"),
]
Checkpointing = Annotated[
    bool, typer.Option("--activation-checkpointing", help="Compute activations twice instead of keeping them.")
]
Lora = Annotated[
    bool, typer.Option("--lora", help="Train an adapter (LoRA); the weights stay as they are, with --bf16 in bfloat16.")
]
LoraRank = Annotated[int | None, typer.Option(min=1, help="Its rank.", show_default="the recipe's, 16")]
LoraAlpha = Annotated[
    float | None,
    typer.Option(min=0, help="Its outputs are multiplied by alpha / rank.", show_default="the recipe's, 32"),
]
LoraDropout = Annotated[
    float | None, typer.Option(min=0, max=1, help="Dropout of its inputs.", show_default="the recipe's, 0")
]
LoraTargets = Annotated[
    str | None,
    typer.Option(help="Which layers have one: all-linear, or how they end: q_proj,v_proj.", show_default="all-linear"),
]
QuantizeTo = Annotated[
    Quantize | None, typer.Option("--quantize", help="Keep the frozen weights in 4bit (QLoRA) or 8bit; needs --lora.")
]
Auto = Annotated[bool, typer.Option("--auto", help="Take the best way that fits this machine's GPUs; see plan.")]
Optimizer = Annotated[
    str | None,
    typer.Option(help="One of torch.optim, or AdamW8bit, PagedAdamW, PagedAdamW8bit.", show_default="the recipe's"),
]
Wandb = Annotated[bool | None, typer.Option(help="Log to Weights & Biases.", show_default="off")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write event files into RUN/tensorboard.")]
Nproc = Annotated[
    int | None, typer.Option(min=1, help="Processes, each on a GPU of its own or on the CPU.", show_default="one a GPU")
]
Nnodes = Annotated[int | None, typer.Option(min=1, help="Machines; start the command on each.", show_default="1")]
NodeRank = Annotated[int | None, typer.Option(min=0, help="The number of this machine; 0 has log and checkpoints.")]
Rendezvous = Annotated[str | None, typer.Option(help="HOST:PORT of machine 0, where all of them meet.")]
MaxRestarts = Annotated[
    int, typer.Option(min=0, help="How often to start again, from the newest checkpoint, when a process has died.")
]
RdzvTimeout = Annotated[int, typer.Option(min=1, help="Seconds for which machines wait for one another.")]
Slurm = Annotated[bool, typer.Option("--slurm", help="Queue the run in Slurm; --dry-run prints the batch script.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Machines that Slurm is asked for.", show_default="1")]
GpusPerNode = Annotated[int | None, typer.Option(min=1, help="GPUs on each of them, each with a process.")]
Partition = Annotated[str | None, typer.Option(help="Slurm's partition.")]
Time = Annotated[str | None, typer.Option(help="Slurm's time limit; near it the run saves, and is queued again.")]
Account = Annotated[str | None, typer.Option(help="Slurm's account.")]
Sbatch = Annotated[list[str] | None, typer.Option(help="Another option of sbatch, such as --sbatch=--qos=high.")]
Keep = Annotated[
    str | None, typer.Option(help="How many of the newest step-N to keep, or all.", show_default="the recipe's, 2")
]
KeepBest = Annotated[
    str | None, typer.Option(help="And the best by this metric: loss/eval or rewards_eval/accuracies.")
]
SaveEvery = Annotated[
    str | None, typer.Option(help="Save between evaluations too: every 5000 examples, or 30m (minutes).")
]
NoPreflight = Annotated[bool, typer.Option("--no-preflight", help="Start without looking first.")]
AllowModified = Annotated[bool, typer.Option("--allow-modified", help="Go on with a clone that was edited.")]
Detach = Annotated[bool, typer.Option("--detach", help="Run in the background; closing the terminal does not end it.")]
Plain = Annotated[bool, typer.Option("--plain", help="Print upstream's lines as they are, also on a terminal.")]
AllowChanged = Annotated[
    bool, typer.Option("--allow-modified", help="Go on although clone, rows or archive are not what they were.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command, start nothing.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Anything else of upstream's config, as Hydra takes it."),
]
_RUN = "The name of a run, or as much of its beginning as no other has, or its folder."
Run = Annotated[str | None, typer.Argument(help=_RUN, show_default="the newest that has not finished")]
_WEIGHTS = "A run (or its step-N, or a policy.pt), a model's folder, or its name on the hub."
RunsTemplate = Annotated[
    Template | None, typer.Option("--template", help="The form of a prompt.", show_default="the run's, else none")
]
RunsClone = Annotated[
    Path | None,
    typer.Option("--dir", help="The clone of upstream that reads the data.", show_default="the run's own", **_PATH),
]
OfModel = Annotated[
    str | None, typer.Option("--model", help="Of a policy.pt that lies in no run's folder: what model it is of.")
]
DEFAULT_CLONE = Path("direct-preference-optimization")


def _show_version(wanted: bool) -> None:
    if wanted:
        from ambersafe_cli import __version__, display

        display.write(f"ambersafe-cli {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error. May stand anywhere.")] = False,
) -> None:
    pass


@app.command()
def setup(
    folder: Clone = DEFAULT_CLONE,
    repo: Repo = None,
    commit: Annotated[str | None, typer.Option(help="Another commit, branch or tag.", show_default="pinned")] = None,
    minimal: Annotated[bool, typer.Option("--minimal", help="Apply only the patch that adds saferlhf.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Move what is in the way aside, and go on.")] = False,
) -> None:
    """Clone upstream at the pinned commit and apply the patches. Run again, it finishes what was interrupted."""
    from ambersafe_cli import reports

    reports.setup(folder.absolute(), repo, commit, minimal, force)


check = typer.Typer()
app.add_typer(check, name="check")


@check.callback()
def check_options(as_json: Json = False) -> None:
    """Look at everything that can be known before a stage starts, and show what it will do."""


def _stage(name: Literal["sft", "dpo"], ctx: typer.Context) -> int:
    """Run a stage, or only check it where it stands behind `check`."""
    from ambersafe_cli import requests, stages

    request = requests.read(name, ctx.params)
    if ctx.parent and ctx.parent.info_name == "check":
        stages.check(request, ctx.parent.params["as_json"])
        return 0
    return stages.run(request)


@check.command()
@app.command()
def sft(
    ctx: typer.Context,
    recipe: RecipeName = "ambersafe",
    model: Model = None,
    model_revision: ModelRevision = None,
    data: Data = None,
    data_revision: DataRevision = None,
    batch_size: BatchSize = None,
    grad_accum: GradAccum = None,
    lr: LearningRate = None,
    epochs: Epochs = None,
    max_length: MaxLength = None,
    template: PromptTemplate = None,
    trainer: Trainer = None,
    exp_name: ExpName = None,
    seed: Seed = None,
    bf16: Bf16 = False,
    attn: Attn = None,
    activation_checkpointing: Checkpointing = False,
    lora: Lora = False,
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    lora_dropout: LoraDropout = None,
    lora_targets: LoraTargets = None,
    quantize: QuantizeTo = None,
    optimizer: Optimizer = None,
    auto: Auto = False,
    wandb: Wandb = None,
    tensorboard: Tensorboard = False,
    nproc: Nproc = None,
    nnodes: Nnodes = None,
    node_rank: NodeRank = None,
    rdzv_endpoint: Rendezvous = None,
    max_restarts: MaxRestarts = 0,
    rdzv_timeout: RdzvTimeout = 600,
    slurm: Slurm = False,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    sbatch: Sbatch = None,
    keep: Keep = None,
    keep_best: KeepBest = None,
    save_every: SaveEvery = None,
    folder: Clone = DEFAULT_CLONE,
    python: Python = sys.executable,
    no_preflight: NoPreflight = False,
    allow_modified: AllowModified = False,
    detach: Detach = False,
    plain: Plain = False,
    dry_run: DryRun = False,
    overrides: Overrides = None,
) -> int:
    """Fine-tune on the chosen responses: the first stage."""
    return _stage("sft", ctx)


@check.command()
@app.command()
def dpo(
    ctx: typer.Context,
    beta: Annotated[
        float | None, typer.Option(min=0, help="Temperature of the DPO loss.", show_default="the recipe's, 0.1")
    ] = None,
    archive: Annotated[
        Path | None,
        typer.Option(
            help="The policy.pt to start from.", show_default="the newest finished SFT run of this model", **_PATH
        ),
    ] = None,
    loss: Annotated[Loss | None, typer.Option(help="Which loss.", show_default="the recipe's, dpo")] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(min=0, max=0.5, help="Share of pairs taken to be flipped (conservative DPO).")
    ] = None,
    recipe: RecipeName = "ambersafe",
    model: Model = None,
    model_revision: ModelRevision = None,
    data: Data = None,
    data_revision: DataRevision = None,
    batch_size: BatchSize = None,
    grad_accum: GradAccum = None,
    lr: LearningRate = None,
    epochs: Epochs = None,
    max_length: MaxLength = None,
    template: PromptTemplate = None,
    trainer: Trainer = None,
    exp_name: ExpName = None,
    seed: Seed = None,
    bf16: Bf16 = False,
    attn: Attn = None,
    activation_checkpointing: Checkpointing = False,
    lora: Lora = False,
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    lora_dropout: LoraDropout = None,
    lora_targets: LoraTargets = None,
    quantize: QuantizeTo = None,
    optimizer: Optimizer = None,
    auto: Auto = False,
    wandb: Wandb = None,
    tensorboard: Tensorboard = False,
    nproc: Nproc = None,
    nnodes: Nnodes = None,
    node_rank: NodeRank = None,
    rdzv_endpoint: Rendezvous = None,
    max_restarts: MaxRestarts = 0,
    rdzv_timeout: RdzvTimeout = 600,
    slurm: Slurm = False,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    sbatch: Sbatch = None,
    keep: Keep = None,
    keep_best: KeepBest = None,
    save_every: SaveEvery = None,
    folder: Clone = DEFAULT_CLONE,
    python: Python = sys.executable,
    no_preflight: NoPreflight = False,
    allow_modified: AllowModified = False,
    detach: Detach = False,
    plain: Plain = False,
    dry_run: DryRun = False,
    overrides: Overrides = None,
) -> int:
    """Train on preference pairs, from an SFT checkpoint: the second stage."""
    return _stage("dpo", ctx)


@app.command()
def pipeline(
    ctx: typer.Context,
    beta: Annotated[
        float | None, typer.Option(min=0, help="Temperature of the DPO loss.", show_default="the recipe's, 0.1")
    ] = None,
    loss: Annotated[Loss | None, typer.Option(help="Which loss in DPO.", show_default="the recipe's, dpo")] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(min=0, max=0.5, help="Share of pairs taken to be flipped (conservative DPO).")
    ] = None,
    recipe: RecipeName = "ambersafe",
    model: Model = None,
    model_revision: ModelRevision = None,
    data: Data = None,
    data_revision: DataRevision = None,
    max_length: MaxLength = None,
    template: PromptTemplate = None,
    trainer: Trainer = None,
    seed: Seed = None,
    bf16: Bf16 = False,
    attn: Attn = None,
    activation_checkpointing: Checkpointing = False,
    lora: Lora = False,
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    lora_dropout: LoraDropout = None,
    lora_targets: LoraTargets = None,
    quantize: QuantizeTo = None,
    optimizer: Optimizer = None,
    wandb: Wandb = None,
    tensorboard: Tensorboard = False,
    nproc: Nproc = None,
    max_restarts: MaxRestarts = 0,
    slurm: Slurm = False,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    sbatch: Sbatch = None,
    keep: Keep = None,
    save_every: SaveEvery = None,
    folder: Clone = DEFAULT_CLONE,
    python: Python = sys.executable,
    no_preflight: NoPreflight = False,
    allow_modified: AllowModified = False,
    plain: Plain = False,
    dry_run: DryRun = False,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Of upstream's config; sft.KEY=VALUE is for SFT alone, dpo. for DPO."),
    ] = None,
) -> int:
    """SFT, and then DPO from it: right here, or queued in Slurm."""
    from ambersafe_cli import pipeline

    return pipeline.run(ctx.params)


@app.command()
def resume(
    run: Run = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Another number of processes a machine.", show_default="as before")
    ] = None,
    nnodes: Annotated[
        int | None, typer.Option(min=1, help="Another number of machines.", show_default="as before")
    ] = None,
    node_rank: NodeRank = None,
    rdzv_endpoint: Rendezvous = None,
    max_restarts: Annotated[int | None, typer.Option(min=0, help="As in sft.", show_default="as before")] = None,
    python: OtherPython = None,
    allow_modified: AllowChanged = False,
    detach: Detach = False,
    plain: Plain = False,
) -> int:
    """Go on with a run that was stopped or killed, from its newest checkpoint."""
    from ambersafe_cli import resuming

    ranks = resuming.Ranks(nproc, nnodes, node_rank, rdzv_endpoint, max_restarts)
    return resuming.resume(run, python, allow_modified, detach, plain, ranks)


@app.command()
def watch(
    run: Annotated[str | None, typer.Argument(help=_RUN, show_default="the newest")] = None, plain: Plain = False
) -> None:
    """See a run as the terminal that started it does: from another one, from another node, or when it has ended."""
    from ambersafe_cli import watch

    watch.run(run, plain)


@app.command()
def stop(
    run: Annotated[str | None, typer.Argument(help=_RUN, show_default="the one that is running")] = None,
    now: Annotated[bool, typer.Option("--now", help="Kill it, without a checkpoint.")] = False,
) -> int:
    """Have a run save a checkpoint and end, also one in the background or on another node of a shared disk."""
    from ambersafe_cli import control

    return control.stop(run, now)


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(help=_RUN)],
    python: OtherPython = None,
    allow_modified: AllowChanged = False,
    plain: Plain = False,
    dry_run: DryRun = False,
) -> int:
    """Do a run again as its run.json says, after listing what is no longer as it was, and compare the metrics."""
    from ambersafe_cli import reproduce

    return reproduce.run(run, python, allow_modified, plain, dry_run)


@app.command()
def runs(as_json: Json = False) -> None:
    """List the runs of this working folder, the newest last."""
    from ambersafe_cli import show

    show.table(as_json)


@app.command()
def show(
    run: Annotated[str | None, typer.Argument(help=_RUN, show_default="the newest")] = None, as_json: Json = False
) -> None:
    """Show a run: what was trained, from what, how it went, where its checkpoints are."""
    from ambersafe_cli import show

    show.run(run, as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help=_WEIGHTS)],
    reference: Annotated[
        str | None,
        typer.Option(help="What rewards are against.", show_default="in DPO the archive, in SFT the base model"),
    ] = None,
    data: Data = None,
    data_revision: DataRevision = None,
    split: Annotated[str, typer.Option(help="Which part of the rows.")] = "test",
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first so many pairs, in upstream's order.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs that are scored at a time.")] = 8,
    beta: Annotated[
        float | None, typer.Option(min=0, help="Temperature of the rewards.", show_default="the run's, else 0.1")
    ] = None,
    template: RunsTemplate = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Write what was found of each pair to a new file, as JSON Lines.", **_PATH)
    ] = None,
    of_model: OfModel = None,
    folder: RunsClone = None,
    python: Python = sys.executable,
    as_json: Json = False,
) -> None:
    """Count how often a model finds the safe response of a held-out pair the likelier one, with 95 % intervals."""
    from ambersafe_cli import evaluate

    evaluate.run(
        evaluate.Request(
            model, of_model, reference, data, data_revision, split, limit, batch_size, beta, template, pairs, as_json,
            folder, python,
        )
    )  # fmt: skip


@app.command()
def sample(
    run: Annotated[str, typer.Argument(metavar="RUN", help=_WEIGHTS)],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A .txt of one prompt a line, a .jsonl, or - for stdin.", show_default="some held-out ones", **_PATH
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN|MODEL", help="Answers of these beside it.", show_default="what it was trained from"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random numbers at a temperature above 0.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered at a time.")] = 8,
    template: RunsTemplate = None,
    of_model: OfModel = None,
    folder: RunsClone = None,
    python: Python = sys.executable,
    as_json: Json = False,
) -> None:
    """Have a run and what it was trained from answer the same prompts, side by side."""
    from ambersafe_cli import sample

    sample.run(
        sample.Request(
            run, prompts, tuple(compare or ()), of_model, max_new_tokens, temperature, seed, batch_size, template,
            as_json, folder, python,
        )
    )  # fmt: skip


@app.command()
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help=_RUN)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .png or .svg, or a name without a suffix for both.",
            show_default="RUN/plots/STAGE.png and .svg",
            **_PATH,
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files into RUN/tensorboard in place of pictures.")
    ] = False,
) -> None:
    """Draw the curves of a run, or of several over one another."""
    from ambersafe_cli import plot

    plot.run(runs, out, tensorboard)


@app.command()
def report(
    run: Annotated[str | None, typer.Argument(help=_RUN, show_default="the newest")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default="RUN/report.html", **_PATH)
    ] = None,
) -> None:
    """Write one HTML page of a run and the SFT run it came from: what was run, curves, samples, provenance."""
    from ambersafe_cli import report

    report.run(run, out)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(metavar="RUN|policy.pt", help="A run, its step-N, or a policy.pt.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write.", show_default="hugging_face, in the run's folder", **_PATH),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of the weights. bfloat16 takes half the room, and may round away what small learning rates changed.",
            show_default="the checkpoint's, float32",
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a LoRA run: one model with the adapter in its weights, not the adapter.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="What a policy.pt outside of a run is of, or where a run's model is now: a folder, or ORG/NAME."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is in the folder, once the new one is whole.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload it to this repository on the hub as well.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="If there is none, make it a private one.")] = False,
    python: Python = sys.executable,
    as_json: Json = False,
) -> None:
    """Make a Hugging Face folder of a run's weights, or of its adapter, with a model card."""
    from ambersafe_cli import export

    named = dtype and str(dtype)
    export.run(export.Request(checkpoint, out, named, merge, model, force, push, private, python, as_json))


@app.command()
def data(
    data: Data = None,
    data_revision: DataRevision = None,
    recipe: RecipeName = "ambersafe",
    template: Annotated[
        Template | None, typer.Option(help="Show the first example in this form too, as training sees it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For the template chat: the model whose tokenizer has it.", show_default=_RECIPES)
    ] = None,
    model_revision: ModelRevision = None,
    python: Python = sys.executable,
    as_json: Json = False,
) -> None:
    """Count what preference data holds: rows, pairs, lengths."""
    from ambersafe_cli import prefetch, reports

    flags = prefetch.flags(model, model_revision, data, data_revision)
    reports.data(recipe, flags, template, python, as_json)


@app.command()
def prefetch(
    recipe: RecipeName = "ambersafe",
    model: Model = None,
    model_revision: ModelRevision = None,
    data: Data = None,
    data_revision: DataRevision = None,
    python: Python = sys.executable,
    as_json: Json = False,
    overrides: Overrides = None,
) -> None:
    """Fill the Hugging Face cache with what both stages read, for a node without a network."""
    from ambersafe_cli import prefetch

    prefetch.run(recipe, prefetch.flags(model, model_revision, data, data_revision), overrides or (), python, as_json)


@app.command()
def plan(
    gpu: Annotated[str, typer.Option(help="A card's name, such as RTX-4090, or the memory of one, such as 24GB.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    recipe: RecipeName = "ambersafe",
    model: Model = None,
    model_revision: ModelRevision = None,
    data: Data = None,
    data_revision: DataRevision = None,
    stage: Annotated[StageName | None, typer.Option(help="Which stage.", show_default="both")] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0, help="TFLOP/s that training reaches on it.", show_default="40 % of the data sheet's"),
    ] = None,
    python: Python = sys.executable,
    as_json: Json = False,
    overrides: Overrides = None,
) -> None:
    """Show which ways of training fit a GPU, in what memory and time, and the command for each."""
    from ambersafe_cli import planning, prefetch

    flags = prefetch.flags(model, model_revision, data, data_revision)
    stages: tuple[Literal["sft", "dpo"], ...] = ("sft", "dpo") if stage is None else (stage.value,)
    planning.run(planning.Request(recipe, flags, stages, gpu, gpus, rate, tuple(overrides or ()), python, as_json))


@app.command()
def status(folder: Clone = DEFAULT_CLONE, python: Python = sys.executable, as_json: Json = False) -> None:
    """Show the clone, its patches, and the training environment."""
    from ambersafe_cli import reports

    reports.status(folder.absolute(), python, as_json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one, as it stands in its file.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one."""
    from ambersafe_cli import reports

    reports.recipes(name, as_json)


@app.command()
def demo(
    folder: Clone = DEFAULT_CLONE, repo: Repo = None, python: Python = sys.executable, plain: Plain = False
) -> int:
    """Set up, and take a tiny model through both stages: a minute."""
    from ambersafe_cli import demo

    return demo.run(folder.absolute(), repo, python, plain)


def main() -> None:
    """The entry point: one clear message and an exit status of its own for everything that goes wrong."""
    # Python has no stream where one was closed (2>&-); and a C locale cannot spell every name.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115, open as long as the process
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    arguments = sys.argv[1:] or ["--help"]
    debug = "--debug" in arguments
    try:
        status = app([a for a in arguments if a != "--debug"], prog_name="ambersafe", standalone_mode=False)
    except AmberSafeError as error:
        failure = error
    except typer.TyperException as error:
        failure = UsageError(error.format_message(), "`ambersafe COMMAND --help` lists what it takes.")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        failure = AmberSafeError(
            f"{type(error).__name__}: {error}", "This is a defect of ambersafe: please report it with --debug's output."
        )
        failure.__cause__ = error
    else:
        sys.exit(status or 0)
    from ambersafe_cli import display

    if debug:
        display.say("".join(traceback.format_exception(failure)).rstrip())
    display.fail(failure)
    sys.exit(failure.exit_status)
