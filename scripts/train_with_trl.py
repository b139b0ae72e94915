"""Train with TRL at the settings of `scripts/bench train`: `python train_with_trl.py SETTINGS-as-JSON`.

Runs under an interpreter that has trl. Prints what the benchmark reads of train.py: "Creating trainer" when everything
is imported, and a line of `train stats` for each optimizer step.
"""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl


class SayEachStep(transformers.TrainerCallback):
    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        print(f"train stats after {state.global_step * self.batch_size} examples: {{}}", flush=True)


def load_rows(path: Path, stage: str) -> datasets.Dataset:
    """The texts as upstream's get_saferlhf has them. A space parts prompt and response, which TRL joins as texts."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        safe = 0 if row["is_response_0_safe"] else 1
        chosen, rejected = f" {row[f'response_{safe}']}", f" {row[f'response_{1 - safe}']}"
        found.append(
            {"prompt": row["prompt"]}
            | ({"completion": chosen} if stage == "sft" else {"chosen": chosen, "rejected": rejected})
        )
    return datasets.Dataset.from_list(found)


def main(given: dict[str, Any]) -> None:
    stage, batch_size = given["stage"], given["batch_size"]
    common = {
        "output_dir": given["output"],
        "per_device_train_batch_size": batch_size // given["microbatches"],
        "gradient_accumulation_steps": given["microbatches"],
        "num_train_epochs": given["epochs"] or 1,
        "max_length": 512,
        "learning_rate": given["lr"],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 150,
        "max_grad_norm": 10.0,
        "optim": "rmsprop",
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    print("Creating trainer", flush=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given["model"])
    model, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32) for _ in range(2)
    )
    data = load_rows(Path(given["rows"]), stage)
    say = [SayEachStep(batch_size)]
    if stage == "dpo":
        arguments = trl.DPOConfig(**common, beta=0.1, precompute_ref_log_probs=given["precompute"])
        trainer: Any = trl.DPOTrainer(
            model, reference, arguments, train_dataset=data, processing_class=tokenizer, callbacks=say
        )
    else:
        trainer = trl.SFTTrainer(
            model, trl.SFTConfig(**common), train_dataset=data, processing_class=tokenizer, callbacks=say
        )
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
