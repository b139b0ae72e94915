"""How much memory a process of a run needs, moment by moment, by arithmetic on the shapes of the model's tensors.

What matters is the peak, and not everything is there at once. So a step is looked at where memory can be at its most,
and the parts that are there are added up for each of these moments:

- the reference's log-probabilities are taken (DPO with cache_reference): two models, no gradient, no optimizer;
- an evaluation: no gradient and no activations, but as many sequences at once as eval_batch_size says;
- the forward pass ends: autocast's copies of the weights, all activations that are kept, and logits. Without
  checkpointing what comes next needs more, as the backward pass needs the copies too;
- the backward pass begins: all activations that are kept, logits, and what the loss makes of them. Gradients are
  there only if the batch is cut into microbatches, as those of the ones before; the optimizer's state has been there
  since the end of the first step;
- it is in the last layer: the logits are gone, and the layer's own gradients have come, with checkpointing its
  activations too;
- the backward pass ends: all gradients, and the activations of one layer;
- the optimizer's step: what it computes with, and no activations.

Activations are what autograd keeps of a layer of LLaMA for a token, as its saved tensors say (transformers 5.23, sdpa
attention), in numbers of the type that is computed in: 6 times the hidden size (two norms: input, normalized, output),
4 times that of the attention (q, k, v and its output, with k and v as wide as q), and 4 times the inner size. Norms
take their input in float32, so in 16 bits it is 8 times the hidden size in place of 6; and 14 times under autocast with
float32 weights, which leaves all between layers in float32 and casts it for each matrix. A frozen layer keeps less: of
a norm its input in float32, and its output only for the adapters that read it. The attention's mask is left out, which
takes 1 % of that in a model of 7 billion parameters. Other architectures keep about as much.

Sizes of quantized weights and optimizer states are bitsandbytes' (0.50): NF4 has half a byte a number, a byte for each
block of 64 (its largest, quantized itself), and for each 256 of those a float32; LLM.int8 a byte a number and a float32
a row. States of 8 bits have a byte a number and a float32 for each block of 256; a tensor of fewer than 4096 numbers
has those of 32 bits. What a step of torch.optim makes besides is one or two of the largest tensor, as the patch 0044
has it take one after the other; FSDPTrainer on GPUs takes all at once, for one more number a trained parameter.

No key-value cache is counted: the patch 0047 has none built where nothing is generated.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ambersafe_cli import checkpoints

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
"""Bytes of a number of a dtype."""

_STATES = {"RMSprop": 1, "SGD": 0, "Adam": 2, "AdamW": 2, "Adagrad": 1, "PagedAdamW": 2}
"""Numbers that an optimizer keeps a parameter, with upstream's settings (no momentum)."""

_IN_8_BITS = ("AdamW8bit", "PagedAdamW8bit")
_SMALL = 4096
"""Tensors of fewer numbers keep bitsandbytes' states of 32 bits."""
_PAGED = 100_000
"""The states of tensors with as many numbers can leave the GPU with a paged optimizer."""
_LOGPS_NUMBERS = 2**24
"""How many logits LogpsOfLabels of the patch 0028 takes at a time."""

EMBEDDING = re.compile(r"embed_tokens|embed_in|wte|word_embeddings")
OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_READ_ALIKE = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "mlp", "up": "mlp"}
"""Matrices of LLaMA that have the same input."""
_BLOCK = re.compile(r"\.\d+\.|^h\.\d+\.")


@dataclass(frozen=True)
class Part:
    """A part of the memory that a process needs: its name, its size in bytes, and the arithmetic behind it."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Moment:
    """What is in memory at one time of a run, in parts."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Lengths:
    """Of sequences, in tokens, prompt, response and EOS: the longest one, and the longest response of all."""

    longest: int
    response: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: in numbers, `attention` being what o_proj takes; `tensors` are the sizes of all of its tensors,
    `linears` the shapes of those that are matrices of its layers, by name, and `outside` of all other matrices."""

    hidden: int
    layers: int
    inner: int
    attention: int
    vocabulary: int
    is_tied: bool
    tensors: tuple[int, ...]
    linears: Mapping[str, tuple[int, int]]
    outside: Mapping[str, tuple[int, int]]

    @property
    def parameters(self) -> int:
        return sum(self.tensors)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def computing(self) -> int:
        """Numbers that each token is multiplied with: those of the layers' matrices and the output layer."""
        return sum(math.prod(shape) for shape in self.linears.values()) + self.embedding

    @property
    def block(self) -> int:
        """Numbers of a layer."""
        without = self.embedding * (1 if self.is_tied else 2)
        return max(self.parameters - without, 0) // max(self.layers, 1)


def shape_of(model: checkpoints.Shapes) -> Shape:
    """The sizes of a model, by the names and shapes of its tensors."""
    tables = [shape for name, shape in model.items() if EMBEDDING.search(name) and len(shape) == 2]
    hidden = max((shape[1] for shape in tables), default=0)
    linears = {
        name: (shape[0], shape[1])
        for name, shape in model.items()
        if len(shape) == 2 and _BLOCK.search(name) and not EMBEDDING.search(name)
    }
    return Shape(
        hidden=hidden,
        layers=len({match[0] for name in model if (match := _BLOCK.search(name))}),
        inner=max((max(shape) for name, shape in linears.items() if "mlp" in name), default=4 * hidden),
        attention=max((shape[1] for name, shape in linears.items() if "self_attn.o_proj" in name), default=hidden),
        vocabulary=max((shape[0] for shape in tables), default=0),
        is_tied=not any(OUTPUT.search(name) for name in model),
        tensors=tuple(math.prod(shape) for shape in model.values()),
        linears=linears,
        outside={n: (s[0], s[1]) for n, s in model.items() if len(s) == 2 and n not in linears},
    )


def targets(shape: Shape, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The matrices that get an adapter, by lora_targets."""
    wanted = config.get("lora_targets", "all-linear")
    if not isinstance(wanted, list | tuple):
        return dict(shape.linears)
    return {
        name: size
        for name, size in {**shape.linears, **shape.outside}.items()
        if any(f".{name.removesuffix('.weight')}".endswith(f".{each}") for each in wanted)
    }


def trained(shape: Shape, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The sizes of the tensors that are trained, in numbers: with lora two for each target, else all."""
    if not config.get("lora"):
        return shape.tensors
    rank = int(config.get("lora_rank", 16))
    return tuple(rank * side for sides in targets(shape, config).values() for side in sides)


def quantized(sides: tuple[int, int], bits: str) -> int:
    """Bytes of a matrix that bitsandbytes keeps in `4bit` or `8bit`, without its tables of some hundred bytes."""
    numbers = math.prod(sides)
    if bits == "8bit":
        return numbers + 4 * sides[0]
    blocks = -(-numbers // 64)
    return -(-numbers // 2) + blocks + 4 * -(-blocks // 256)


def frozen_bytes(shape: Shape, config: Mapping[str, Any]) -> int:
    """Bytes of the weights under an adapter; only layers' matrices are quantized, not the output layer."""
    wide, bits = _bytes(config["model.policy_dtype"]), config.get("quantize")
    if not bits:
        return shape.parameters * wide
    rest = shape.parameters - sum(math.prod(sides) for sides in shape.linears.values())
    return rest * wide + sum(quantized(sides, str(bits)) for sides in shape.linears.values())


def state_bytes(optimizer: str, tensors: Sequence[int], wide: int = 4) -> int:
    """Bytes of an optimizer's state for trained tensors of these sizes, whose numbers have `wide` bytes."""
    if optimizer in _IN_8_BITS:
        return sum(2 * (4 * n if n < _SMALL else n + 4 * -(-n // 256)) for n in tensors)
    return _STATES.get(optimizer, 2) * wide * sum(tensors)


def checkpoint_bytes(stage: str, config: Mapping[str, Any], shape: Shape) -> int:
    """Bytes of a checkpoint, weights and optimizer; in DPO an adapter holds that of SFT as well, taken to be alike."""
    tensors, wide = trained(shape, config), _trained_bytes(config)
    both = 2 if config.get("lora") and stage == "dpo" else 1
    return both * wide * sum(tensors) + state_bytes(str(config["optimizer"]), tensors, wide)


_EVALUATES = "it evaluates"
_TAKES_LOGPS = "the reference model's log-probabilities are taken"
WITHOUT_GRADIENT = (_EVALUATES, _TAKES_LOGPS)
"""The names of the moments in which nothing is trained, and eval_batch_size counts."""


def peak(moments: Sequence[Moment]) -> Moment:
    """The one that needs most."""
    return max(moments, key=lambda moment: moment.bytes)


def moments(
    stage: str, config: Mapping[str, Any], shape: Shape, lengths: Lengths, shards: int, on_gpu: bool = True
) -> tuple[Moment, ...]:
    """What a process needs, of `shards` that share the weights, at each time when it could need most.

    `config` has upstream's keys; keys that an older clone's config lacks count as off.
    """
    job = _Job(stage, config, shape, lengths, shards, on_gpu)
    fixed, state, gradients = tuple(job.weights()), tuple(job.state()), tuple(job.gradients())
    reference, layer = tuple(job.reference(shards)), tuple(job.gathered())
    training = fixed + reference + state + layer
    found = []
    if stage == "dpo" and config.get("cache_reference") and not config.get("lora"):
        model = _part("reference model", job.reference_bytes, shape.parameters, shards)
        found.append(Moment(_TAKES_LOGPS, (*fixed, model, *job.evaluating())))
    found.append(Moment(_EVALUATES, (*fixed, *reference, *state, *layer, *job.evaluating())))
    before = gradients if job.microbatches > 1 else ()
    kept, logits = job.activations(in_a_layer=False), tuple(job.logits())
    forward = (*training, *before, *job.casts(), kept)
    found.append(Moment("the forward pass ends", (*forward, logits[0])))
    # What is computed again is cast again, layer by layer.
    again = bool(config.get("activation_checkpointing"))
    output, block = (shape.embedding, shape.block) if again else (None, None)
    found.append(Moment("the backward pass begins", (*training, *before, *job.casts(output), kept, *logits)))
    in_layer = (*training, *before, *job.casts(block), job.activations(), *job.of_a_layer())
    found.append(Moment("the backward pass is in the last layer", in_layer))
    found.append(Moment("the backward pass ends", (*training, *gradients, *job.ending())))
    found.append(Moment("the optimizer steps", (*fixed, *reference, *state, *gradients, *job.stepping())))
    return tuple(found)


def _bytes(dtype: Any) -> int:
    return BYTES.get(str(dtype), 4)


def _trained_bytes(config: Mapping[str, Any]) -> int:
    return 4 if config.get("lora") else _bytes(config["model.policy_dtype"])


def _part(name: str, each: int, numbers: int, shards: int = 1) -> Part:
    over = f" / {shards} processes" if shards > 1 else ""
    return Part(name, numbers * each // shards, f"{numbers:,} x {each} bytes{over}")


@dataclass(frozen=True)
class _Job:
    """The parts of one process, from its settings."""

    stage: str
    config: Mapping[str, Any]
    shape: Shape
    lengths: Lengths
    shards: int
    on_gpu: bool

    @property
    def lora(self) -> bool:
        return bool(self.config.get("lora"))

    @property
    def is_fsdp(self) -> bool:
        return "FSDP" in str(self.config["trainer"])

    @property
    def mixed(self) -> Any:
        return self.config.get("mixed_precision")

    @property
    def autocast(self) -> bool:
        return bool(self.mixed) and not self.is_fsdp

    @property
    def wide(self) -> int:
        """Bytes of a weight of the policy as it is loaded."""
        return _bytes(self.config["model.policy_dtype"])

    @property
    def compute(self) -> int:
        """Bytes of a number that is computed with."""
        fsdp = self.config.get("model.fsdp_policy_mp") if self.is_fsdp else None
        return _bytes(self.mixed or fsdp or self.config["model.policy_dtype"])

    @property
    def stream(self) -> int:
        """Bytes of a number that flows from layer to layer: autocast leaves it in the type of the weights."""
        return self.wide if self.autocast else self.compute

    @property
    def reference_bytes(self) -> int:
        return BYTES.get(str(self.config.get("model.reference_dtype")), 2)

    @property
    def microbatches(self) -> int:
        return int(self.config["gradient_accumulation_steps"])

    @property
    def sequences(self) -> int:
        """Sequences of a microbatch of a process."""
        of_stage = 2 if self.stage == "dpo" else 1
        return int(self.config["batch_size"]) // (self.microbatches * self.shards) * of_stage

    @property
    def tokens(self) -> int:
        return self.sequences * self.lengths.longest

    def weights(self) -> Iterator[Part]:
        if not self.lora:
            yield _part("weights", self.wide, self.shape.parameters, self.shards)
            return
        bits, size = self.config.get("quantize"), frozen_bytes(self.shape, self.config)
        each = f"in {bits}" if bits else f"x {self.wide} bytes"
        over = f" / {self.shards} processes" if self.shards > 1 else ""
        yield Part("weights, frozen", size // self.shards, f"{self.shape.parameters:,} {each}{over}")
        numbers = sum(trained(self.shape, self.config))
        both = 2 if self.stage == "dpo" else 1
        yield Part("adapter", both * 4 * numbers // self.shards, f"{both} x {numbers:,} x 4 bytes{over}")

    def gradients(self) -> Iterator[Part]:
        numbers = sum(trained(self.shape, self.config))
        yield _part("gradients", _trained_bytes(self.config), numbers, self.shards)

    def state(self) -> Iterator[Part]:
        name, tensors = str(self.config["optimizer"]), trained(self.shape, self.config)
        size = state_bytes(name, tensors, _trained_bytes(self.config)) // self.shards
        if name.startswith("Paged") and self.on_gpu:
            held = state_bytes(name, [n for n in tensors if n < _PAGED])
            yield Part(name, held, f"{size:,} bytes, of which {size - held:,} can go to the machine's memory")
        elif size:
            yield Part(name, size, f"of {sum(tensors):,} numbers" + (f" / {self.shards}" if self.shards > 1 else ""))

    def reference(self, shards: int) -> Iterator[Part]:
        """While the policy trains."""
        if self.stage != "dpo" or self.config.get("cache_reference") or self.lora:
            return
        if self.config.get("offload_reference") and self.on_gpu:
            largest = max(self.shape.tensors)
            yield Part("reference model", largest * self.reference_bytes, "its largest tensor, the others offloaded")
        else:
            yield _part("reference model", self.reference_bytes, self.shape.parameters, shards)

    def casts(self, of: int | None = None) -> Iterator[Part]:
        """Autocast's copies of matrices in another type: of all of them, or of so many numbers."""
        if not self.autocast:
            return
        numbers = 0 if self.wide == self.compute else self.shape.computing
        if self.config.get("quantize"):
            numbers = self.shape.embedding if numbers else 0
        numbers += sum(trained(self.shape, self.config)) if self.lora else 0
        yield _part(f"weights in {self.mixed}", self.compute, numbers if of is None else min(of, numbers))

    def gathered(self) -> Iterator[Part]:
        """What FSDP gathers: the root, the layer that computes and the next one, and a gradient before it is shared."""
        if not self.is_fsdp or (self.shards == 1 and self.compute == 4):
            return
        root = self.shape.embedding * (1 if self.shape.is_tied else 2) + self.shape.hidden
        wide = self.compute
        size = (root + 2 * self.shape.block) * wide
        if not self.lora:
            size += max(root, self.shape.block) * (wide + (4 if wide != 4 else 0))
        yield Part("gathered layers", size, f"the root's {root:,} and 2 x {self.shape.block:,}, and a gradient")

    def kept_of_a_layer(self) -> int:
        """Bytes that autograd keeps of a layer, a token."""
        s = self.shape
        if not self.lora:
            hiddens = 6 if self.compute == 4 else 14 if self.stream == 4 else 8
            return (hiddens * s.hidden + 4 * s.attention + 4 * s.inner) * self.compute
        kept = 2 * 4 * s.hidden + (4 * s.attention + 3 * s.inner) * self.compute
        return kept + self._kept_for_adapters()

    def _kept_for_adapters(self) -> int:
        """Bytes of a layer, a token: inputs of adapters that nothing else keeps, once or, where they have to be cast,
        once for each adapter; and what is between its two matrices."""
        into = self.compute if self.autocast or self.is_fsdp else 4
        rank, dropout = int(self.config.get("lora_rank", 16)), self.config.get("lora_dropout")
        readers: dict[str, list[int]] = {}
        for name, (_, side) in targets(self.shape, self.config).items():
            block = _BLOCK.search(name)
            if block and int(re.sub(r"\D", "", block[0])) == 0:  # of the first layer, the others are alike
                kind = re.search(r"(?:^|\.)([qkv]|gate|up|o|down)_proj", name)
                of = kind[1] if kind else name
                readers.setdefault(_READ_ALIKE.get(of, of), []).append(side)
        total = 0
        for group, sides in readers.items():
            # Attention and the product of gate and up compute in the policy's type, norms in that of the stream.
            source = self.compute if group in ("o", "down") else self.stream
            if source != into:
                total += sum(sides) * into
            elif group != "o":  # which attention keeps as its own output
                total += sides[0] * into
            total += len(sides) * rank * into + (sum(sides) * (into + 1) if dropout else 0)
        return total

    def activations(self, in_a_layer: bool = True) -> Part:
        """What is kept of a microbatch: with checkpointing the input of each layer, and of the layer that the backward
        pass is in all the rest, which it has computed again."""
        s, how = self.shape, f"{self.sequences} sequences x {self.lengths.longest} tokens"
        layer = self.kept_of_a_layer()
        if self.config.get("activation_checkpointing"):
            kept = s.layers * s.hidden * self.stream + (layer if in_a_layer else 0)
            of_one = f" + {layer:,} of one" if in_a_layer else ""
            kept_how = f"({s.layers} layers x {s.hidden} x {self.stream}{of_one})"
        else:
            kept, kept_how = s.layers * layer, f"{s.layers} layers x {layer:,}"
        return Part("activations", self.tokens * kept, f"{how} x {kept_how} bytes")

    def logits(self) -> Iterator[Part]:
        """With what is computed from them and, where it is trained, the gradient of the layer that makes them."""
        s = self.shape
        gradient = 0 if self.lora or self.is_fsdp else s.embedding * (self.wide + (2 if self.autocast else 0))
        if self.config.get("response_logits_only"):
            # The gradient is written over them.
            tokens = self.sequences * self.lengths.response
            numbers = tokens * s.vocabulary
            how = f"{self.sequences} responses x {self.lengths.response} tokens at most"
            yield Part("logits", numbers * self.compute, f"{how} x {s.vocabulary:,} x {self.compute} bytes")
            at_once = self._at_once(numbers, is_backward=True)
        else:
            # What upstream's loss holds at once: log-softmax in float32, its gradient, and that of the logits.
            yield Part("logits", 12 * self.tokens * s.vocabulary, f"{self.tokens:,} tokens x {s.vocabulary:,} x 3 x 4")
            at_once = 0
        yield Part("working memory", max(at_once, gradient), "what the loss and the output layer compute with")

    def _at_once(self, logits: int, is_backward: bool = False) -> int:
        """Bytes of the float32 copies that LogpsOfLabels makes of some logits at a time; in the backward pass those of
        the last ones are still there."""
        copies = (1 if self.compute == 4 else 2) + (is_backward and logits > _LOGPS_NUMBERS)
        return copies * 4 * min(_LOGPS_NUMBERS, logits)

    def _transient(self) -> int:
        """Bytes of a layer's backward pass: gradients of two of the inner size, of what flows, and of a matrix."""
        s = self.shape
        of_tokens = self.tokens * (2 * s.inner * self.compute + s.hidden * self.stream)
        return of_tokens + self._matrix()

    def _matrix(self) -> int:
        """Bytes of the largest matrix of a layer as it is made for computing: dequantized, or its gradient."""
        largest = max(map(math.prod, self.shape.linears.values()), default=0)
        if self.config.get("quantize"):
            return largest * self.compute
        return 0 if self.lora else largest * self.wide

    def of_a_layer(self) -> Iterator[Part]:
        yield Part("working memory", self._transient(), "gradients of one layer's activations and of a matrix")

    def ending(self) -> Iterator[Part]:
        layer = self.tokens * self.kept_of_a_layer()
        yield Part("activations", layer, f"{self.tokens:,} tokens x {self.kept_of_a_layer():,} bytes of one layer")
        embedding = 0 if self.lora or self.microbatches == 1 else self.shape.embedding * self.wide
        size = max(self._transient(), embedding)
        yield Part("working memory", size, "gradients of one layer's activations, or of the embedding")

    def stepping(self) -> Iterator[Part]:
        name, tensors, wide = str(self.config["optimizer"]), trained(self.shape, self.config), 4
        if name in _IN_8_BITS or name in ("PagedAdamW", "SGD"):
            return
        if self.is_fsdp and self.on_gpu:
            yield Part("working memory", sum(tensors) * wide // self.shards, f"{name}'s of all tensors at once")
            return
        roots = 1 if name == "RMSprop" else 2
        yield Part("working memory", roots * max(tensors, default=0) * wide // self.shards, f"{name}'s of one tensor")

    def evaluating(self) -> Iterator[Part]:
        """A forward pass without gradients, of as many sequences as an evaluation takes at once."""
        of_stage = 2 if self.stage == "dpo" else 1
        sequences = max(int(self.config.get("eval_batch_size", 16)) // self.shards * of_stage, 1)
        s, tokens = self.shape, sequences * self.lengths.longest
        yield from self.casts()
        if self.config.get("response_logits_only"):
            numbers = sequences * self.lengths.response * s.vocabulary
            logits = numbers * self.compute + self._at_once(numbers)
        else:
            logits = tokens * s.vocabulary * (8 + (self.compute if self.compute != 4 else 0))
        # The base's, the adapter's, that times its scaling, and the sum, beside the gate.
        inner = (5 if self.lora else 3) * s.inner
        layer = tokens * (max(inner, 6 * s.attention) * self.compute + s.hidden * (self.compute + self.stream))
        size = max(logits, layer + (self._matrix() if self.lora else 0))
        yield Part("logits and a layer", size, f"{sequences} sequences x {self.lengths.longest} tokens at most")
