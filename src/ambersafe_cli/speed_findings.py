"""What preflight says of the settings that make training fast: where they do not go with others or with the machine."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ambersafe_cli.findings import Finding

if TYPE_CHECKING:
    from ambersafe_cli.environment import TrainingEnvironment
    from ambersafe_cli.recipe import Stage

_ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention", "eager")


def of_speed(stage: "Stage", config: Mapping[str, Any], environment: "TrainingEnvironment") -> Iterator[Finding]:
    """Findings of a stage, by its config as train.py will see it."""
    if stage.name == "dpo" and config.get("cache_reference"):
        for needs_it, off in (
            (config["sample_during_eval"], "sample_during_eval=false"),
            ("TensorParallel" in str(config["trainer"]), "--trainer FSDPTrainer"),
        ):
            if needs_it:
                yield Finding(
                    "error",
                    "cache_reference frees the reference model, which would be needed all the time here.",
                    f"Add cache_reference=false behind the flags, or {off}.",
                )
    attention = config.get("attn_implementation")
    if attention and attention not in _ATTENTIONS and "/" not in str(attention):
        yield Finding(
            "error",
            f"There is no attention {attention}.",
            f"--attn takes {', '.join(_ATTENTIONS)}, as transformers has them.",
        )
    if attention != "flash_attention_2":
        return
    if "flash-attn" not in environment.extras:
        yield Finding(
            "error",
            f"{environment.python} lacks flash-attn, which --attn flash_attention_2 needs.",
            "`pip install flash-attn --no-build-isolation` there, or leave --attn away: sdpa needs no package.",
        )
    if not environment.gpus:
        yield Finding("error", "--attn flash_attention_2 needs a GPU, and there is none here.", "Leave --attn away.")
    dtypes = (config.get("mixed_precision"), config["model.fsdp_policy_mp"], config["model.policy_dtype"])
    is_whole = next(filter(None, dtypes)) == "float32"
    if stage.name == "dpo" and "FSDP" in str(config["trainer"]):
        is_whole = is_whole or config["model.reference_dtype"] == "float32"
    if is_whole:
        yield Finding("error", "--attn flash_attention_2 computes in 16 bits only.", "Add --bf16.")
