"""Rewards at step 0 of DPO in bfloat16, where policy and reference are one: how far rounding in batches of other shapes
takes them from 0."""

from typing import Any

import torch
from bench_data import Shape

from gpu_check import models
from gpu_check.figures import Report, Setup
from gpu_check.parts import step

BETA = 0.1


def batch_of(shape: Shape, setup: Setup, count: int) -> dict[str, torch.Tensor]:
    """Pairs whose responses have all kinds of lengths, padded, as upstream's batches are."""
    longest = setup.size(384, 48)
    made = models.pairs(shape, setup, count, longest)
    source = torch.Generator().manual_seed(1)
    for side in ("chosen", "rejected"):
        for row in range(count):
            length = int(torch.randint(longest // 4, longest, (1,), generator=source))
            made[f"{side}_attention_mask"][row, length:] = 0
            made[f"{side}_input_ids"][row, length:] = 0
            labels = made[f"{side}_labels"]
            labels[row] = -100
            labels[row, length // 4 : length] = made[f"{side}_input_ids"][row, length // 4 : length]
    return {name: value.cpu() for name, value in made.items()}


def logps(made: Any, setup: Setup, batch: dict[str, torch.Tensor], slices: int) -> torch.Tensor:
    """What the policy finds of the pairs in so many microbatches, as a step takes them. Shape: (pairs, 2)"""
    ordered, place = models.upstream("utils").sort_batch_by_length(batch)
    found = []
    with torch.no_grad():
        for index in range(slices):
            part = models.upstream("utils").slice_and_move_batch_for_device(
                ordered, index, slices, made.device, trim=True
            )
            found.append(torch.stack(made.concatenated_forward(made.policy, part), dim=1).cpu())
    return torch.cat(found)[place]


def run(setup: Setup, report: Report) -> None:
    shape = step.shape_of(setup)
    made = models.trainer(setup, models.llama(shape, setup, torch.float32).eval())
    made.reference_model = made.policy
    count = setup.size(32, 8)
    batch = batch_of(shape, setup, count)
    cached = torch.from_numpy(made.compute_reference_logps(batch, 4))
    for name, reference in (("other shapes", cached), ("same shapes", logps(made, setup, batch, 4))):
        rewards = BETA * (logps(made, setup, batch, 4) - reference).double()
        report.figure(f"{name}, mean's distance from 0", abs(float(rewards.mean())))
        report.figure(f"{name}, deviation", float(rewards.std()))
        report.figure(f"{name}, largest", float(rewards.abs().max()))
    report.figure("log-probability of a response, mean", float(cached.mean()), "nats")
