"""Train with TRL's SFTTrainer or DPOTrainer as `bench_train.py` asks, in JSON, and print a line for each step.

    python scripts/bench_trl.py REQUEST

The request: `stage` (sft, dpo), `model` (a folder), `rows` (a jsonl file with the columns of PKU-SafeRLHF), `batch` and
`microbatches`, `lr`, `epochs`, `lora` (an adapter's rank, or null), `settings` (more of TRL's config). The lines are in
the form of upstream's.
"""

import json
import sys
from typing import Any

import datasets
import peft
import torch
import transformers
import trl

BEGINS = "training begins"


class PrintSteps(transformers.TrainerCallback):
    """Tell when training begins and when each optimizer step has ended."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(BEGINS, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"train stats after {state.global_step * self.batch} examples: {{}}", flush=True)


class DPOTrainer(trl.DPOTrainer):
    """TRL's, which also tells when it computes the reference model's log probabilities before training."""

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        print(BEGINS, flush=True)
        return super()._precompute_ref_logps(*args, **kwargs)


def to_trl(row: dict[str, Any], stage: str) -> dict[str, str]:
    """The columns that TRL wants, of a row with the columns of PKU-SafeRLHF."""
    first_is_safe = row["is_response_0_safe"]
    chosen = row["response_0"] if first_is_safe else row["response_1"]
    rejected = row["response_1"] if first_is_safe else row["response_0"]
    if stage == "sft":
        return {"prompt": row["prompt"], "completion": chosen}
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def main(request: dict[str, Any]) -> None:
    stage, batch, microbatches = request["stage"], request["batch"], request["microbatches"]
    settings = {
        "output_dir": "trl",
        "per_device_train_batch_size": batch // microbatches,
        "gradient_accumulation_steps": microbatches,
        "num_train_epochs": request["epochs"],
        "max_length": 512,
        "optim": "rmsprop",
        "learning_rate": request["lr"],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 150,
        "max_grad_norm": 10.0,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "fp16": False,
        "gradient_checkpointing": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    rows = datasets.load_dataset("json", data_files=request["rows"], split="train")
    rows = rows.map(to_trl, fn_kwargs={"stage": stage}, remove_columns=rows.column_names)
    model = transformers.AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"])
    common = {
        "model": model,
        "train_dataset": rows,
        "processing_class": tokenizer,
        "callbacks": [PrintSteps(batch)],
    }
    if rank := request["lora"]:
        common["peft_config"] = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    if stage == "sft":
        options = {"completion_only_loss": True, **settings, **request["settings"]}
        trainer: transformers.Trainer = trl.SFTTrainer(args=trl.SFTConfig(**options), **common)
    else:
        # Without `ref_model` it loads the reference model from where the policy came from, in the policy's dtype.
        options = {"beta": 0.1, "disable_dropout": True, **settings, **request["settings"]}
        trainer = DPOTrainer(args=trl.DPOConfig(**options), **common)
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
