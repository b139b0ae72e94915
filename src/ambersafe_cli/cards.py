"""GPU cards: their memory, and how fast their tensor cores are by the vendor's data sheet.

Memory is what the driver has of it (`nvidia-smi`), which is less than the name says where ECC takes some. Rates are
dense, without sparsity, of bfloat16 with sums in float32, as training computes: of GeForce cards half of what is
advertised for sums in 16 bits. What no data sheet says is not here.
"""

import re
from dataclasses import dataclass

from ambersafe_cli.errors import UsageError

MIB = 2**20


@dataclass(frozen=True)
class Card:
    """A card: its name, its memory in bytes as the driver reports it, and operations a second, in units of 10^12.

    `bfloat16` is None where the card has no tensor cores for it; `float32` is then what training without them has.
    """

    name: str
    memory: int
    bfloat16: float | None
    source: str
    float32: float | None = None

    @property
    def rate(self) -> float:
        """Operations a second, in units of 10^12, of the type that training computes in on it."""
        return self.bfloat16 or self.float32 or 0.0


_AMPERE = "NVIDIA Ampere GA102 GPU Architecture, V2.0"
CARDS = (
    Card("T4", 15360 * MIB, None, "NVIDIA T4 data sheet", float32=8.1),
    Card("V100-16GB", 16160 * MIB, None, "NVIDIA V100 data sheet", float32=15.7),
    Card("RTX-3090", 24576 * MIB, 71.0, _AMPERE),
    Card("L4", 23034 * MIB, 121.0, "NVIDIA L4 data sheet: 242 with sparsity"),
    Card("A10", 23028 * MIB, 125.0, "NVIDIA A10 data sheet"),
    Card("RTX-4090", 24564 * MIB, 165.2, "NVIDIA Ada GPU Architecture, V2.02"),
    Card("A100-40GB", 40960 * MIB, 312.0, "NVIDIA A100 data sheet"),
    Card("A40", 46068 * MIB, 149.7, "NVIDIA A40 data sheet"),
    Card("RTX-A6000", 49140 * MIB, 154.8, _AMPERE),
    Card("L40S", 46068 * MIB, 362.0, "NVIDIA L40S data sheet"),
    Card("A100-80GB", 81920 * MIB, 312.0, "NVIDIA A100 data sheet"),
    Card("H100", 81559 * MIB, 989.4, "NVIDIA H100 data sheet, SXM: 1979 with sparsity"),
    Card("H200", 143771 * MIB, 989.4, "NVIDIA H200 data sheet, SXM: 1979 with sparsity"),
)


def nominal(card: Card) -> int:
    """The GB that a card is sold with: those of its name, or those that its memory comes next to."""
    return min((16, 24, 40, 48, 80, 141), key=lambda size: abs(size * 2**30 - card.memory))


LEAST, MOST = 2, 1024
"""Sizes in GB between which a card is planned for."""


def find(text: str) -> tuple[Card, str | None]:
    """The card that --gpu names, and what is to be said of it.

    A size alone, such as 24GB, has the memory and the rate of the slowest card of that size, or of the nearest smaller
    one; one that is smaller than all has the rate of the slowest card with bfloat16. Raises UsageError, listing the
    cards, for what is neither.
    """
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?", text.strip(), re.IGNORECASE):
        return _of_size(float(size[1]))
    wanted = _plain(text)
    found = [card for card in CARDS if wanted in _names(card)]
    if found and re.search(r"\d", wanted):
        others = [card.name for card in found[1:]]  # of several, such as the A100's, the smallest
        return found[0], f"{found[0].name}; there is {', '.join(others)}, too" if others else None
    names = ", ".join(card.name for card in CARDS)
    raise UsageError(f"There is no card {text} in the list.", f"--gpu takes {names}, or a size, such as 24GB.")


def _names(card: Card) -> set[str]:
    """A card's name and parts of it that follow one another, with and without GB behind a size."""
    words = [_plain(word) for word in card.name.split("-")]
    parts = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    return parts | {part.removesuffix("gb") for part in parts}


def _plain(text: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", text.lower())


def _of_size(size: float) -> tuple[Card, str]:
    if not LEAST <= size <= MOST:
        raise UsageError(f"A GPU of {size:g} GB cannot be planned for.", f"--gpu takes {LEAST} to {MOST} GB.")
    nearest = max((nominal(card) for card in CARDS if nominal(card) <= size), default=None)
    alike = [card for card in CARDS if (nominal(card) == nearest if nearest else card.bfloat16)]
    slowest = min(alike, key=lambda card: card.rate)
    memory = min(card.memory for card in alike) if nearest == size else int(size * 2**30)
    of = f"card of {nearest} GB" if nearest else "card with bfloat16"
    said = f"{size:g} GB: the speed of {slowest.name}, the slowest {of} in the list"
    return Card(f"{size:g} GB", memory, slowest.bfloat16, slowest.source, slowest.float32), said
