"""A rank's part of a step on 8 GPUs, on the backend `fake`, which sends nothing and waits for nobody."""

import statistics
from typing import Any

import torch
import torch.distributed as dist
from bench_data import Shape
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpu_check import models
from gpu_check.figures import Report, Setup, host_seconds, seconds
from gpu_check.parts import step

RANKS, TURNS = 8, 5


def prepare(setup: Setup, shape: Shape) -> Any:
    """FSDPTrainer's policy as it shards it, with --bf16."""
    made = models.trainer(setup, None, "FSDPTrainer", model={"block_name": "LlamaDecoderLayer"})
    made.mesh = init_device_mesh(setup.device, (RANKS,))
    made.from_rank0_options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    rounding = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    made.policy = made.shard(models.llama(shape, setup, torch.float32), mp_policy=rounding).train()
    return made


def run(setup: Setup, report: Report) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    shape, length = step.shape_of(setup), setup.size(512, 64)
    made = prepare(setup, shape)
    found = {}
    for pairs, microbatches in ((1, 4), (4, 1)):
        batch = models.sequences(shape, setup, 2 * pairs, length)

        def work(batch: dict[str, torch.Tensor] = batch, count: int = microbatches) -> None:
            for _ in range(count):
                models.backward(models.forward(made, batch) / count)

        work()
        found[pairs] = statistics.median(seconds(setup, work) for _ in range(TURNS))
        report.figure(f"passes, {pairs} pairs x {microbatches}, ms", 1000 * found[pairs])
    report.figure("step of 1 pair x 4 by 4 pairs x 1", found[1] / found[4])
    report.figure("clipping, ms", 1000 * seconds(setup, made.clip_gradient))
    report.text("the trainer's own way", "foreach" if made.steps_at_once() else "one by one")
    took = {}
    for foreach in (False, True):
        optimizer = models.upstream("utils").make_optimizer(
            "RMSprop", list(made.policy.parameters()), 0.0, foreach=foreach
        )
        optimizer.step()
        took[foreach] = statistics.median(host_seconds(setup, optimizer.step) for _ in range(TURNS))
        whole = statistics.median(seconds(setup, optimizer.step) for _ in range(TURNS))
        how = "foreach" if foreach else "one by one"
        report.figure(f"optimizer, {how}, ms", 1000 * whole, f"of the host {1000 * took[foreach]:.1f}")
    report.figure("optimizer, one by one by foreach, the host's time", took[False] / took[True])
    dist.destroy_process_group()
