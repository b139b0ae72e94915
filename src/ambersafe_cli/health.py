"""What looks wrong in a run's curves, in plain words, and what usually helps.

A rule compares means of parts of the run, and speaks only of differences that are far larger than their standard error:
the noise of small batches does not fire it, and it does not matter whether a record is a step or the mean of several.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ambersafe_cli import metrics, parts

FEWEST = 16
"""Training records below which nothing but a loss that is no number is said."""

_MOST = 1024
"""Values of a metric that rules look at; of more, the means of neighbours."""

_HUGE = 1e100
"""Above this a value is as good as infinite, and its square no float; NaN is not below it either."""

_COLUMNS = (
    "loss/train",
    "grad_norm",
    *(f"rewards_train/{each}" for each in ("accuracies", "margins", "chosen", "rejected")),
)


@dataclass(frozen=True)
class Advice:
    """What is seen in a run; a note is expected and harmless. `rule` is its short name, `mend` what usually helps."""

    level: Literal["warning", "note"]
    rule: str
    what: str
    mend: str


@dataclass(frozen=True)
class Seen:
    """What the rules look at."""

    stage: str
    train: Sequence[metrics.Record]
    evals: Sequence[metrics.Record]  # those with a loss
    planned: int | None
    columns: Mapping[str, list[float]]

    def column(self, name: str) -> list[float]:
        """The values of a training metric that are numbers, in order; none where they are too few to say anything."""
        found = self.columns[name]
        return found if len(found) >= FEWEST else []

    @property
    def examples(self) -> int:
        return self.train[-1].examples

    @property
    def is_far_enough(self) -> bool:
        """Whether a third of the run is done; where its length is not known, three times a warm-up of 150 steps."""
        if self.planned:
            return self.examples >= self.planned / 3
        return max(self.train[-1].values.get("counters/updates", 0), len(self.train)) >= 450


def look(
    stage: str, train: Sequence[metrics.Record], evals: Sequence[metrics.Record], planned_examples: int | None
) -> tuple[Advice, ...]:
    """What looks wrong, warnings first, in a run of `stage` (sft or dpo) as far as it has come.

    `train` are its training records in order, each a step or the mean of neighbouring ones; `planned_examples` how many
    examples it will train on, if that is known. Raises nothing, whatever the values are.
    """
    if broken := _not_finite(train, evals):
        return (broken,)  # what came before it does not matter any more
    if len(train) < FEWEST:
        return ()
    evaluated = [each for each in evals if "loss/eval" in each.values]
    columns = {name: _numbers(train, name) for name in _COLUMNS}
    seen = Seen(stage, train, evaluated, planned_examples, columns)
    rules = _EVERY_STAGE + (_DPO if stage == "dpo" else ())
    found = [advice for rule in rules for advice in rule(seen)]
    rules_found = {advice.rule for advice in found}
    kept = [advice for advice in found if not rules_found & _SAID_BY.get(advice.rule, set())]
    return tuple(sorted(kept, key=lambda advice: advice.level == "note"))


# --- rules for every stage ---


def _not_finite(train: Sequence[metrics.Record], evals: Sequence[metrics.Record]) -> Advice | None:
    for each in sorted((*train, *evals), key=lambda record: record.examples):
        for name in ("loss/train", "loss/eval"):
            if not math.isfinite(each.values.get(name, 0)):
                return Advice(
                    "warning",
                    "loss-not-finite",
                    f"The {name} after {each.examples} examples is not a finite number.",
                    "Start again with a lower --lr, and model.reference_dtype=float32 if that is float16; weights from "
                    "here on are of no use.",
                )
    return None


def _loss_rises(seen: Seen) -> Iterator[Advice]:
    mend = "Usually the learning rate is too high: give a lower --lr, or a longer warm-up, warmup_steps=."
    losses = seen.column("loss/train")
    if losses:
        best, last = parts.best_and_last(losses, lowest=True)
        if parts.is_above(last, best, by=0.1 * abs(best.mean)):
            what = f"The training loss was {best.mean:.4g} and has risen to {last.mean:.4g}."
            yield Advice("warning", "loss-rising", what, mend)
            return
    if losses and len(seen.evals) > 1:
        first, now = seen.evals[0].values["loss/eval"], seen.evals[-1].values["loss/eval"]
        level = parts.part(losses[-max(3, len(losses) // 4) :])
        # The training loss has to be above it too, or the run over-fits.
        if now > 1.1 * first > 0 and level.mean > 1.1 * first:
            what = f"The held-out loss was {first:.4g} before training and is {now:.4g} now, the training loss "
            yield Advice("warning", "loss-rising", f"{what}{level.mean:.4g}.", mend)


def _gradients_explode(seen: Seen) -> Iterator[Advice]:
    # Medians: a single batch with a wrong label has a large gradient in a healthy run. Against the run's own past: the
    # norm is taken before clipping, and lies above the clip of 10 in healthy runs.
    norms = seen.column("grad_norm")
    if not norms:
        return
    recent = statistics.median(norms[-max(3, len(norms) // 8) :])
    begun = statistics.median(norms[: max(3, len(norms) // 16)])
    calm = min(begun, *(statistics.median(piece) for piece in parts.pieces(norms, 8)[:2]))
    # Not only above its lowest: of pairs that were learnt at once it is next to nothing.
    if recent > 5 * calm and recent > 2 * begun > 0:
        yield Advice(
            "warning",
            "gradients-exploding",
            f"The gradient norm was {calm:.3g} and is {recent:.3g}, before clipping.",
            "Give a lower --lr, or a longer warm-up, warmup_steps=; a larger --batch-size makes steps steadier.",
        )


def _nothing_moves(seen: Seen) -> Iterator[Advice]:
    if not seen.is_far_enough:
        return
    mend = "Give a higher --lr; warmup_steps= should be a small part of the run, and weights in bfloat16 "
    mend += "(model.policy_dtype) lose small updates."
    if seen.stage == "dpo":
        losses = seen.column("loss/train")
        rewards = [seen.column(f"rewards_train/{each}") for each in ("chosen", "rejected")]
        if not losses or not all(rewards):
            return
        size = max(abs(value) for column in rewards for value in column[-len(column) // 4 :])
        if size < 0.003 and abs(losses[-1] - losses[0]) <= 0.003 * abs(losses[0]):
            what = (
                f"The loss is {losses[-1]:.4g} as at the start, and no reward is above {size:.2g}: nothing is learnt."
            )
            yield Advice("warning", "nothing-moves", what, mend)
    elif len(seen.evals) > 1:
        first, now = seen.evals[0].values["loss/eval"], seen.evals[-1].values["loss/eval"]
        if seen.evals[-1].examples > seen.examples / 4 and abs(now - first) < 0.001 * abs(first):
            what = f"The held-out loss was {first:.5g} before training and is {now:.5g}: nothing is learnt."
            yield Advice("warning", "nothing-moves", what, mend)


def _over_fits(seen: Seen) -> Iterator[Advice]:
    losses = [each.values["loss/eval"] for each in seen.evals]
    if len(losses) < 3:
        return
    first, now, best = losses[0], losses[-1], min(losses)
    rise = now - best
    if rise > max(0.1 * abs(best), 0.25 * (first - best)) and losses[-2] > best:
        at = seen.evals[losses.index(best)].examples
        # Of DPO the held-out loss may rise while the held-out accuracy does too (alignment-handbook, issue 38).
        keep = "--keep-best loss/eval"
        if seen.stage == "dpo":
            keep = "--keep-best rewards_eval/accuracies, which may still rise,"
        yield Advice(
            "warning",
            "held-out-loss-rising",
            f"The held-out loss was {best:.4g} after {at} examples and is {now:.4g} now.",
            "Where the training loss still falls, the data is learnt by heart: fewer --epochs, a lower --lr or more "
            f"data; {keep} keeps the best checkpoint.",
        )


# --- rules for DPO ---


def _accuracy_at_chance(seen: Seen) -> Iterator[Advice]:
    values = seen.column("rewards_train/accuracies")
    if not values or not seen.is_far_enough:
        return
    recent = values[len(values) // 2 :]
    pairs = max(1, seen.examples * len(recent) // len(values))
    mean, error = parts.part(recent)
    # Pairs are drawn, if not more: a few equal means by chance are not a proof.
    error = max(error, 0.5 / math.sqrt(pairs))
    if mean + 2 * error < 0.6:
        yield Advice(
            "warning",
            "accuracy-at-chance",
            f"The reward accuracy is {mean:.2f} over the last {pairs} pairs, where guessing gives 0.5.",
            "Look with `ambersafe data` whether the right responses are marked as safe; then try a higher --lr, and "
            "start from an SFT run on the same data. Weights in bfloat16 (model.policy_dtype) lose small updates.",
        )


def _margins_fall(seen: Seen) -> Iterator[Advice]:
    margins = seen.column("rewards_train/margins")
    if not margins:
        return
    best, last = parts.best_and_last(margins, lowest=False)
    before = max(best.mean, 0)
    if parts.is_above(best, last, by=max(0.3 * abs(best.mean), 0.02)):
        yield Advice(
            "warning",
            "margins-falling",
            f"The reward margin was {before:.3g} and has fallen to {last.mean:.3g}.",
            "Usually the learning rate is too high: give a lower --lr or a higher --beta; if it fell below 0, look "
            "with `ambersafe data` whether safe and unsafe are swapped.",
        )


def _rewards_fall(seen: Seen) -> Iterator[Advice]:
    columns = {each: seen.column(f"rewards_train/{each}") for each in ("chosen", "rejected", "margins")}
    if not all(columns.values()) or not seen.is_far_enough:
        return
    chosen, rejected, margin = (parts.best_and_last(values, lowest=False)[1] for values in columns.values())
    if not all(each.mean < -max(parts.SURE * each.error, 0.05) for each in (chosen, rejected)):
        return
    figures = f"chosen {chosen.mean:.3g}, rejected {rejected.mean:.3g}, margin {margin.mean:.3g}"
    if margin.mean < max(2 * margin.error, 0.1 * abs(chosen.mean)):
        yield Advice(
            "warning",
            "likelihood-falling",
            f"Both rewards fall and the margin does not grow ({figures}): all responses become less likely.",
            "Give a lower --lr or a higher --beta, look at the labels with `ambersafe data`, and start from an SFT run "
            "on the same data.",
        )
    else:
        yield Advice(
            "note",
            "rewards-falling-together",
            f"The rewards of chosen and rejected responses both fall, and the margin grows ({figures}).",
            "This is expected after SFT on the chosen responses (upstream issue 32): only the margin is trained. If "
            "samples get worse, a higher --beta or a lower --lr keeps the model closer to the SFT model.",
        )


def _held_out_accuracy_is_low(seen: Seen) -> Iterator[Advice]:
    name = "rewards_eval/accuracies"
    evals = [each for each in seen.evals if each.examples and math.isfinite(each.values.get(name, math.nan))]
    if not evals:
        return
    held_out = evals[-1].values[name]
    # What was trained on just before that evaluation.
    before = [each for each in seen.train if each.examples <= evals[-1].examples]
    values = _numbers(before, "rewards_train/accuracies")
    if len(values) < FEWEST:
        return
    training = parts.part(values[-max(3, len(values) // 4) :])
    if training.mean - held_out > 0.2 + 2 * training.error:
        yield Advice(
            "warning",
            "held-out-accuracy-low",
            f"The reward accuracy is {training.mean:.2f} on training pairs and {held_out:.2f} on held-out ones.",
            "Pairs are learnt by heart: fewer --epochs, a lower --lr or more data, and --keep-best "
            "rewards_eval/accuracies; look with `ambersafe data` whether both splits are labelled alike.",
        )


def _nothing_left_to_learn(seen: Seen) -> Iterator[Advice]:
    losses, accuracies = seen.column("loss/train"), seen.column("rewards_train/accuracies")
    margins = seen.column("rewards_train/margins")
    if not (losses and accuracies and margins):
        return
    quarter = max(3, len(losses) // 4)
    loss, accuracy = statistics.fmean(losses[-quarter:]), statistics.fmean(accuracies[-quarter:])
    if 0 <= loss < 0.02 and accuracy > 0.995:
        yield Advice(
            "note",
            "nothing-left-to-learn",
            f"Every pair is told apart (accuracy {accuracy:.3g}, loss {loss:.2g}, margin "
            f"{statistics.fmean(margins[-quarter:]):.3g}): little is left to learn from these pairs.",
            "Fewer --epochs are enough; a higher --beta keeps the model closer to the SFT model.",
        )


Rule = Callable[[Seen], Iterator[Advice]]
_EVERY_STAGE: tuple[Rule, ...] = (_loss_rises, _gradients_explode, _nothing_moves, _over_fits)
_DPO: tuple[Rule, ...] = (
    _accuracy_at_chance,
    _margins_fall,
    _rewards_fall,
    _held_out_accuracy_is_low,
    _nothing_left_to_learn,
)
# A rule is left out where one of these says the same with its reason.
_SAID_BY = {"accuracy-at-chance": {"nothing-moves"}, "held-out-loss-rising": {"loss-rising"}}


# --- numbers ---


def _numbers(records: Sequence[metrics.Record], name: str) -> list[float]:
    """The values that are numbers; of very many, the means of neighbours, which take less time and say the same."""
    found = [value for each in records if abs(value := each.values.get(name, math.nan)) < _HUGE]
    width = -(-len(found) // _MOST)
    if width <= 1:
        return found
    return [sum(part) / len(part) for part in (found[at : at + width] for at in range(0, len(found), width))]
