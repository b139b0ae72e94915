"""What breaks, or takes memory and time, on a GPU, as far as it can be seen without one."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import interpreter, load, numbers, only_run, run_ambersafe
from test_lora import given, train, weights  # noqa: F401, fixture
from test_real_upstream import TINY, mend, model, rows  # noqa: F401, fixtures
from test_speed import ask

pytestmark = pytest.mark.slow

SETTINGS = ("model=blank_model", "datasets=[saferlhf]", "wandb.enabled=false", *TINY)


def by_hand(clone: Path, work: Path, model: Path, rows: Path, *overrides: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    """train.py as somebody types it, who knows nothing of the launcher and its checks."""
    (work / "run").mkdir(parents=True, exist_ok=True)
    command = [interpreter(), str(clone / "train.py"), *SETTINGS, f"model.name_or_path={model}", *overrides]
    command += ["exp_name=by_hand", f"local_run_dir={work / 'run'}", f"hydra.run.dir={work / 'run/hydra'}"]
    environment = {**os.environ, "SAFERLHF_DATASET": str(rows)}
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)


# --- adapters ---


def test_an_adapter_on_the_output_layer_learns_with_fsdp_and_the_cache_of_the_reference(
    given: tuple[object, ...],  # noqa: F811
    tmp_path: Path,
) -> None:
    """FSDP leaves its root gathered behind the pass that fills the cache: other tensors in its parameters' places."""
    flags = ("--lora", "--lora-rank", "4", "--lora-targets", "lm_head,embed_tokens,q_proj", "--lr", "1e-2")
    train(tmp_path, "sft", *given, "--exp-name", "sft")
    archive = ("--archive", only_run(tmp_path, "sft"))
    for name, ranks in (("one", ()), ("sharded", ("--trainer", "FSDPTrainer", "--nproc", "1"))):
        train(tmp_path, "dpo", *given, *archive, *flags, *ranks, "--exp-name", name)
    one, sharded = (weights(only_run(tmp_path, name) / "LATEST") for name in ("one", "sharded"))
    assert one.keys() == sharded.keys()
    for name, weight in sharded.items():
        if "lora_B" in name or "lora_embedding_A" in name:  # which begin at 0
            assert float(weight.abs().max()) > 0, name
        assert float((weight - one[name]).abs().max()) <= 1e-3 * float(one[name].abs().max()), name


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_samples_are_drawn_where_an_adapter_and_its_weights_have_other_dtypes(
    given: tuple[object, ...],  # noqa: F811
    tmp_path: Path,
    stage: str,
) -> None:
    settings = [text for text in given if "sample_during_eval" not in str(text)]
    archive: tuple[object, ...] = ()
    if stage == "dpo":
        train(tmp_path, "sft", *given, "--exp-name", "first")
        archive = ("--archive", only_run(tmp_path, "first"))
    sampling = ("sample_during_eval=true", "n_eval_model_samples=8", "cache_reference=false", "n_epochs=1")
    train(tmp_path, stage, *settings, *archive, "--lora", "--bf16", *sampling, "--exp-name", "sampled")
    log = (only_run(tmp_path, "sampled") / "train.log").read_text()
    assert len(re.findall(r'^  ".+",?$', log, re.MULTILINE)) >= 8, "the samples are printed as a JSON list"


def test_the_state_of_a_paged_optimizer_comes_to_the_gpu_tensor_by_tensor(patched: Path, model: Path) -> None:  # noqa: F811
    """The device `meta` stands in for the GPU."""
    found = ask(
        patched,
        model,
        """
import bitsandbytes, omegaconf
def parameters(device):
    return [torch.nn.Parameter(torch.randn(64, 512, device=device)) for _ in range(5)]
saved = bitsandbytes.optim.PagedAdamW8bit(own := parameters("cpu"), lr=1e-3)
for each in own:
    each.grad = torch.ones_like(each)
saved.step()
policy = torch.nn.ParameterList(parameters("meta"))
optimizer = bitsandbytes.optim.PagedAdamW8bit(list(policy), lr=1e-3)
waiting = []
buffer_of = optimizer.get_state_buffer
def spied(weight, **options):
    values = [state[name] for state in optimizer.state.values() for name in ("state1", "state2")]
    waiting.append(sum(value.device.type == "cpu" for value in values))
    return buffer_of(weight, **options)
optimizer.get_state_buffer = spied
mine = trainer()
mine.policy, mine.optimizer = policy, optimizer
mine.load_optimizer_state(saved.state_dict())
left = {value.device.type for state in optimizer.state.values() for value in state.values() if hasattr(value, "device")}
print(json.dumps([waiting, sorted(left)]))
""",
    )
    assert found == [list(range(10, 0, -1)), ["meta"]]


# --- memory ---


@pytest.mark.parametrize("alone", [True, False])
def test_no_pass_that_does_not_generate_builds_a_key_value_cache(patched: Path, model: Path, alone: bool) -> None:  # noqa: F811
    built = ask(
        patched,
        model,
        f"""
from transformers import cache_utils
built = []
make = cache_utils.DynamicCache.__init__
cache_utils.DynamicCache.__init__ = lambda self, *a, **k: (built.append(1), make(self, *a, **k))[1]
model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
given = batch(4, ("chosen",))
own = [given[f"chosen_{{k}}"] for k in ("input_ids", "attention_mask", "labels")]
for train in (True, False):
    trainer(response_logits_only={alone}).get_logps(model.train(train), *own)
passes = len(built)
model.generate(own[0], attention_mask=own[1], max_new_tokens=1)
print(json.dumps([passes, len(built) - passes]))
""",
    )
    assert built == [0, 1]


def test_no_weight_of_a_reference_model_can_be_trained(patched: Path, model: Path) -> None:  # noqa: F811
    """Of one that can be, autocast keeps a copy in its own dtype."""
    found = ask(
        patched,
        model,
        """
from omegaconf import OmegaConf
config = OmegaConf.create(dict(
    attn_implementation=None, quantize=None, trainer="BasicTrainer", offload_reference=False, cache_reference=False,
    model=dict(name_or_path=model_folder, revision=None, reference_dtype="float32", archive=None)))
model = utils.build_reference_model(config)
print(json.dumps(sum(p.requires_grad for p in model.parameters())))
""",
    )
    assert found == 0


def test_the_reference_model_of_a_run_without_the_cache_is_frozen_too(
    given: tuple[object, ...],  # noqa: F811
    patched: Path,
    tmp_path: Path,
) -> None:
    clone = shutil.copytree(patched, tmp_path / "clone")
    said = "print('to be trained:', sum(p.requires_grad for p in reference_model.parameters()), flush=True)\n        "
    mend(clone / "trainers.py", "        self.policy = policy\n", f"        {said}self.policy = policy\n")
    train(tmp_path, "sft", *given, "--exp-name", "sft")
    flags = ("--dir", clone, "--allow-modified", "--archive", only_run(tmp_path, "sft"), "cache_reference=false")
    train(tmp_path, "dpo", *given[2:], *flags, "n_epochs=null", "n_examples=16", "--exp-name", "dpo")
    assert "to be trained: 0\n" in (only_run(tmp_path, "dpo") / "train.log").read_text()


def test_the_optimizer_steps_at_once_only_where_a_rank_has_a_part_of_the_weights_on_a_gpu(
    patched: Path,
    model: Path,  # noqa: F811
) -> None:
    found = ask(
        patched,
        model,
        """
def foreach(kind, device):
    made = object.__new__(getattr(trainers, kind))
    made.device = torch.device(device)
    optimizer = utils.make_optimizer("RMSprop", [torch.nn.Parameter(torch.zeros(2))], 1.0, foreach=made.steps_at_once())
    return optimizer.param_groups[0]["foreach"]
print(json.dumps([foreach(kind, device) for kind in ("BasicTrainer", "FSDPTrainer") for device in ("cpu", "cuda")]))
""",
    )
    assert found == [False, False, False, True]


def test_all_sharded_tensors_at_once_take_the_step_that_each_takes_alone(patched: Path, model: Path) -> None:  # noqa: F811
    assert ask(
        patched,
        model,
        """
import os, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(utils.get_open_port()), RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo")
for name in ("RMSprop", "AdamW", "Adam", "SGD", "Adagrad"):
    found = []
    for foreach in (False, True):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        fully_shard(layers)
        optimizer = utils.make_optimizer(name, list(layers.parameters()), 1e-2, foreach=foreach)
        for _ in range(3):
            layers(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.full_tensor() for p in layers.parameters()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
print(json.dumps(True))
""",
    )


def test_a_model_goes_to_one_gpu_and_one_that_does_not_fit_is_an_error(patched: Path, model: Path) -> None:  # noqa: F811
    found = ask(
        patched,
        model,
        """
from omegaconf import OmegaConf
torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 1
asked = []
def refuse(name, device_map=None, **options):
    asked.append(device_map)
    raise torch.OutOfMemoryError("CUDA out of memory.")
transformers.AutoModelForCausalLM.from_pretrained = refuse
config = OmegaConf.create(dict(
    attn_implementation=None, quantize=None, trainer="BasicTrainer", model=dict(name_or_path="M")))
said = []
for on_cpu in (False, True):
    try:
        utils.load_model(config, "main", "float32", on_cpu=on_cpu)
    except MemoryError as error:
        said.append("M in float32 does not fit the GPU" in str(error))
print(json.dumps([asked, said]))
""",
    )
    assert found == [[{"": "cuda:1"}, {"": "cpu"}], [True, True]]


# --- the process group ---


def test_nccl_gets_the_gpu_of_its_process_and_its_communicator_at_once(patched: Path, model: Path) -> None:  # noqa: F811
    joined = ask(
        patched,
        model,
        """
import os, torch.distributed as dist
import machines
os.environ.update(LOCAL_RANK="3", LOCAL_WORLD_SIZE="4", RANK="3", WORLD_SIZE="4", GROUP_RANK="0")
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")
os.environ.update(TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_USE_AGENT_STORE="True")
stores, joined, groups = [], [], []
class Store:
    def __init__(self, *address, timeout, **options):
        stores.append(timeout.total_seconds())
dist.TCPStore, dist.PrefixStore = Store, lambda prefix, store: store
machines.compare_machines, machines.watch_ranks = lambda *given: ["here"] * 4, lambda *given: None
torch.cuda.is_available, torch.cuda.set_device = lambda: True, lambda device: None
dist.init_process_group = lambda backend, **options: joined.append((backend, options))
dist.new_group = lambda **options: groups.append(options)
from types import SimpleNamespace
utils.join_torchrun_group(SimpleNamespace(stuck_after_seconds=600))
((backend, options),) = joined
print(json.dumps([backend, str(options["device_id"]), options["timeout"].total_seconds(), stores[0],
                  groups[0]["backend"], groups[0]["timeout"].total_seconds()]))
""",
    )
    assert joined == ["nccl", "cuda:3", 1800, 1800, "gloo", 6 * 3600]


def test_ranks_wait_for_one_that_reads_or_saves_longer_than_a_collective_may_take(
    given: tuple[object, ...],  # noqa: F811
    patched: Path,
    tmp_path: Path,
) -> None:
    clone = shutil.copytree(patched, tmp_path / "clone")
    mend(
        clone / "machines.py",
        "COLLECTIVE, PATIENCE = timedelta(minutes=30)",
        "COLLECTIVE, PATIENCE = timedelta(seconds=10)",
    )
    mend(
        clone / "trainers.py",
        "    def sync_directory(self, path: str):\n",
        "    def sync_directory(self, path: str):\n        time.sleep(6)\n",
    )
    mend(
        clone / "utils.py",
        "    disable_dropout(model)\n    return model\n",
        "    __import__('time').sleep(15 if rank == 0 else 0)\n    disable_dropout(model)\n    return model\n",
    )
    flags = ("--trainer", "FSDPTrainer", "--nproc", "2", "--allow-modified", "n_epochs=null", "n_examples=16")
    train(tmp_path, "sft", *given[2:], "--dir", clone, *flags, "do_final_eval=false", "--exp-name", "slow")
    assert load(only_run(tmp_path, "slow") / "LATEST" / "policy.pt")["step_idx"] == 16


def test_groups_within_and_across_machines_give_up_when_all_ranks_do(patched: Path, model: Path) -> None:  # noqa: F811
    """torch gives groups of a mesh a timeout of their own."""
    waits = ask(
        patched,
        model,
        """
import os, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import machines
os.environ["LOCAL_WORLD_SIZE"] = "2"
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
told = []
def tell(timeout, group):
    told.append((timeout.total_seconds(), dist.get_world_size(group)))
dist.distributed_c10d._set_pg_timeout = tell
from omegaconf import OmegaConf
config = OmegaConf.create(dict(hybrid_shard=True, model=dict(block_name="L", fsdp_policy_mp=None)))
def begin(self, policy, config, *rest):
    self.config, self.device, self.rank, self.mp_dtype = config, torch.device("cpu"), 0, None
trainers.BasicTrainer.__init__ = begin
trainers.FSDPTrainer.shard = lambda self, model, **options: model
trainers.FSDPTrainer(None, config, 0, "", None, 0, 4)
print(json.dumps([sorted(told), machines.COLLECTIVE.total_seconds()]))
""",
    )
    assert waits == [[[1800, 2], [1800, 2]], 1800]


def test_train_py_tells_pytorch_what_many_lengths_need_unless_the_user_has_said_something(patched: Path) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_CUDNN_SDPA_DEPRIORITIZED")
    code = f"import sys, os, json; sys.path.insert(0, {str(patched)!r}); import train; "
    code += f"print(json.dumps([os.environ.get(name) for name in {names}]))"
    for users, wanted in (
        ({}, ["expandable_segments:True", None, "1"]),
        ({names[0]: "max_split_size_mb:512"}, ["max_split_size_mb:512", None, "1"]),
        ({names[1]: "max_split_size_mb:512"}, [None, "max_split_size_mb:512", "1"]),
        ({names[2]: "0"}, ["expandable_segments:True", None, "0"]),
    ):
        inherited = {key: value for key, value in os.environ.items() if key not in names}
        done = subprocess.run([sys.executable, "-c", code], env={**inherited, **users}, capture_output=True, text=True)
        assert json.loads(done.stdout) == wanted, done.stderr
        assert done.stderr == ""


# --- what is refused ---


def test_an_infinite_gradient_of_a_finite_loss_ends_the_run_before_the_step(
    given: tuple[object, ...],  # noqa: F811
    tmp_path: Path,
) -> None:
    """At the first step of DPO the loss is ln 2 whatever beta is, and its gradient beta times as large."""
    train(tmp_path, "sft", *given, "--exp-name", "sft")
    flags = ("--archive", only_run(tmp_path, "sft"), "--beta", "3e38", "--exp-name", "dpo", "do_first_eval=false")
    done = run_ambersafe("dpo", *given, *flags, cwd=tmp_path)
    assert done.returncode != 0
    assert "the gradient after 0 examples is not finite; the last checkpoint is None" in done.stderr
    run = only_run(tmp_path, "dpo")
    assert not numbers(run)
    assert not list(run.glob("**/policy.pt"))


def test_train_py_refuses_float16_and_microbatches_that_drop_examples(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    for overrides, said in (
        (("mixed_precision=float16",), "mixed_precision must be bfloat16 or null, not float16"),
        (("batch_size=10", "gradient_accumulation_steps=4"), "batch_size 10 in 4 microbatches"),
        (("batch_size=10", "gradient_accumulation_steps=4", "sort_by_length=true"), "examples would be dropped"),
    ):
        done = by_hand(patched, tmp_path, model, rows, *overrides)
        assert done.returncode != 0 and said in done.stderr, done.stderr
        assert not list(tmp_path.glob("**/policy.pt"))


def test_fsdp_by_hand_is_refused_with_a_command_that_trains(
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    few = ("trainer=FSDPTrainer", "n_epochs=null", "n_examples=16")
    done = by_hand(patched, tmp_path, model, rows, *few)
    assert done.returncode != 0
    command = re.findall(r"^ValueError: .* processes that torchrun starts: (.+)$", done.stderr, re.MULTILINE)[0]
    environment = {**os.environ, "SAFERLHF_DATASET": str(rows)}
    again = subprocess.run(shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "LATEST" / "policy.pt").is_file()


# --- the cache of the reference's log-probabilities ---


def test_log_probabilities_of_a_cpu_do_not_serve_a_gpu_nor_those_of_another_torch(patched: Path, model: Path) -> None:  # noqa: F811
    assert ask(
        patched,
        model,
        """
import os
from omegaconf import OmegaConf
os.environ.pop("NVIDIA_TF32_OVERRIDE", None)
def key():
    return utils.fingerprint_reference_model(OmegaConf.create(dict(
        attn_implementation=None, trainer="BasicTrainer", mixed_precision=None, lora=False, quantize=None,
        model=dict(name_or_path=model_folder, reference_dtype="float32", archive=None))))
found = [key(), key()]
torch.cuda.is_available = lambda: True
found += [key()]
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
found += [key()]
torch.backends.cuda.matmul.allow_tf32 = False
found += [key()]
torch.__version__ = "2.99.0"
found += [key()]
assert found[0] == found[1]
print(json.dumps(len(set(found)) == 5))
""",
    )
