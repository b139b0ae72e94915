"""Make a Hugging Face folder of a policy.pt: `python to_hugging_face.py MODEL REVISION POLICY.pt FOLDER`.

Runs under the training interpreter. The weights stay the float32 that the checkpoint holds.
"""

import sys

import torch
import transformers


def main(model: str, revision: str, checkpoint: str, folder: str) -> None:
    # Not the dtype of the model's files: in bfloat16 what training changed would be rounded away.
    policy = transformers.AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=torch.float32)
    policy.load_state_dict(torch.load(checkpoint, map_location="cpu", mmap=True)["state"])
    policy.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model, revision=revision).save_pretrained(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
