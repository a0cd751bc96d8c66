"""Conditions of generation, and how training hides them for guidance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.datasets.tokens import NO_SOUND

NO_CLASS = -1  # the id of a sample without a class


@dataclass(frozen=True, eq=False)
class Condition:
    """The conditions of the B samples of a batch. A field of None is empty for all of them.

    classes   ids `(B,)` int64; -1 is no class
    text      states of the tokens of texts, `(B, N, D)`
    mask      `(B, N)` bool, which rows of `text` a sample sees; or `(B, T, N)`, which of them each of its T frames (latents)
              sees, as in a storyboard. A sample or frame that sees none has no text
    chances   `(B, 4)` in 0..1, numbers of each sample's own, by which training hides its class, text and sound: a sample
              loses the same whatever ranks and passes share its batch
    audio     tokens of the sound of each frame (latent), `(B, T, n)` int64; -1 is no sound
    pooled    a vector of each text beside its states, `(B, D)`, for a model that takes such; of no text any
    """

    classes: Tensor | None = None
    text: Tensor | None = None
    mask: Tensor | None = None
    chances: Tensor | None = None
    audio: Tensor | None = None
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.text is None) != (self.mask is None):
            raise ValueError("text and mask: give both or none")
        if self.text is None or self.mask is None:
            return
        shape = self.mask.shape
        if self.text.ndim != 3 or len(shape) not in (2, 3) or (shape[0], shape[-1]) != self.text.shape[:2]:
            raise ValueError(
                f"mask has shape {tuple(shape)}; a text of {tuple(self.text.shape)} needs (B, N) or (B, T, N)"
            )

    @property
    def asks_for_class(self) -> bool:
        """Whether any sample has a class."""
        return self.classes is not None and bool((self.classes != NO_CLASS).any())

    @property
    def asks_for_text(self) -> bool:
        """Whether any sample has a text."""
        return self.mask is not None and bool(self.mask.any())

    @property
    def asks_for_audio(self) -> bool:
        """Whether any sample has a sound."""
        return self.audio is not None and bool((self.audio != NO_SOUND).any())

    @property
    def asks(self) -> bool:
        """Whether any sample has a class, a text or a sound: if not, guidance has no effect."""
        return self.asks_for_class or self.asks_for_text or self.asks_for_audio

    @property
    def null(self) -> Condition:
        """The same batch without any class, text or sound."""
        return self.hidden(torch.tensor(True))

    def hidden(self, which: Tensor) -> Condition:
        """The same batch with the samples where `which`, bool `(B,)` or `()`, is true made unconditional."""
        classes, mask, audio = self.classes, self.mask, self.audio
        if classes is not None:
            classes = torch.where(which.to(classes.device), NO_CLASS, classes)
        if mask is not None:
            mask = mask & ~which.to(mask.device).reshape(-1, *[1] * (mask.ndim - 1))
        if audio is not None:
            audio = torch.where(which.to(audio.device).reshape(-1, 1, 1), NO_SOUND, audio)
        return replace(self, classes=classes, mask=mask, audio=audio)

    def expand(self, count: int) -> Condition:
        """The condition of one sample, repeated for `count` samples."""
        parts = (self.classes, self.text, self.mask, self.chances, self.audio, self.pooled)
        return Condition(*(None if part is None else part.expand(count, *part.shape[1:]) for part in parts))

    def record(self) -> list[int] | dict[str, Any]:
        """The condition as plain data, for comparison: the classes, with a digest of the texts. Sounds are not in it."""
        classes = [] if self.classes is None else self.classes.tolist()
        if self.text is None or self.mask is None:
            return classes
        mask = self.mask.cpu()
        seen = mask if mask.ndim == 2 else mask.any(1)
        # without the columns at the end that nobody sees: how far a batch is padded says nothing
        length = int(seen.any(0).nonzero().max()) + 1 if seen.any() else 0
        words = torch.where(seen[..., None], self.text.cpu().float(), 0.0)[:, :length]
        digest = hashlib.sha256(words.contiguous().numpy().tobytes())
        digest.update(mask[..., :length].contiguous().numpy().tobytes())
        return {"classes": classes, "text": digest.hexdigest()}

    def join(self, other: Condition) -> Condition:
        """The samples of this condition followed by those of `other`, which has the same fields."""
        classes = audio = pooled = None
        if self.pooled is not None and other.pooled is not None:
            pooled = torch.cat([self.pooled, other.pooled])
        if self.classes is not None and other.classes is not None:
            classes = torch.cat([self.classes, other.classes])
        if self.audio is not None and other.audio is not None:
            audio = torch.cat([self.audio, other.audio])
        text, mask = _joined_texts(self, other)
        return Condition(classes, text, mask, audio=audio, pooled=pooled)


def _joined_texts(one: Condition, other: Condition) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The texts and masks of both, padded to one length and, where either is by frame, by frame."""
    if one.text is None or one.mask is None or other.text is None or other.mask is None:
        return None, None
    length = max(one.text.shape[1], other.text.shape[1])
    texts = [F.pad(text, (0, 0, 0, length - text.shape[1])) for text in (one.text, other.text)]
    masks = [F.pad(mask, (0, length - mask.shape[-1])) for mask in (one.mask, other.mask)]
    frames = [mask.shape[1] for mask in masks if mask.ndim == 3]
    if frames:
        masks = [mask if mask.ndim == 3 else mask[:, None].expand(-1, frames[0], -1) for mask in masks]
    return torch.cat(texts), torch.cat(masks)


def of_batch(batch: Mapping[str, Any]) -> Condition:
    """The condition of a loader's batch: its labels, texts and tokens of sound, if it has them."""
    # on the CPU, where ids are checked without waiting for a GPU
    classes = batch["label"].cpu() if "label" in batch else None
    audio = batch["audio_tokens"].flatten(2) if "audio_tokens" in batch else None
    pooled = pooled_of(batch["pooled"], batch["pooled_mask"]) if "pooled" in batch else None
    return Condition(classes, batch.get("text"), batch.get("text_mask"), batch.get("chances"), audio, pooled)


def pooled_of(states: Tensor, mask: Tensor) -> Tensor:
    """CLIP's vector of each text `(B, D)`, the state of its end token, which is the last, of states `(B, N, D)`."""
    last = (mask.sum(1) - 1).clamp(min=0)
    return states[torch.arange(len(states), device=states.device), last]


def of_classes(ids: Iterable[int | None]) -> Condition:
    """The condition of samples with these class ids; None is no class."""
    return Condition(classes=torch.tensor([NO_CLASS if number is None else number for number in ids]))


class Hidden(NamedTuple):
    """Samples of a training batch that lose their class, their text, their sound, bool `(B,)`; None: none do."""

    classes: Tensor | None = None
    text: Tensor | None = None
    audio: Tensor | None = None


def draw_hidden(
    condition: Condition | None,
    x: Tensor,
    label_dropout: float,
    text_dropout: float,
    rng: torch.Generator | None,
    audio_dropout: float = 0.0,
) -> Hidden:
    """Draw what the samples of the batch `x` lose, each its class, its text and its sound with these probabilities.

    Where there are several, half of the rarest losses take all at once: guidance leads away from none of them, which
    independent draws would show too seldom. Samples without chances of their own are drawn for from `rng`, which is on the
    device of `x`.
    """
    condition = condition or Condition()
    own = () if condition.chances is None else condition.chances.to(x.device).unbind(1)
    chances = iter(own)

    def draw(probability: float) -> Tensor:
        chance = next(chances) if own else torch.rand(len(x), generator=rng, device=x.device)
        return chance < probability

    parts = (("classes", label_dropout), ("text", text_dropout), ("audio", audio_dropout))
    shares = {name: share for name, share in parts if share and getattr(condition, name) is not None}
    if len(shares) < 2:
        return Hidden(**{name: draw(share) for name, share in shares.items()})
    all_ = min(shares.values()) / 2
    together = draw(all_)
    return Hidden(**{name: together | draw((share - all_) / (1 - all_)) for name, share in shares.items()})


def class_vectors(
    table: nn.Embedding | None, condition: Condition | None, x: Tensor, hidden: Tensor | None = None
) -> Tensor | None:
    """Vectors `(B, D)` of a batch's classes; None for a model without classes.

    Args:
        table: a row for each class and, last, one for no class.
        condition: of the batch `x`; None is an empty one.
        hidden: bool `(B,)`, samples whose class is replaced by no class; None: none are.

    Raises:
        ValueError: an unknown class, or any class for a model without.
    """
    classes = (condition or Condition()).classes
    if table is None:
        if classes is not None:
            raise ValueError("classes: this model has none; leave them out")
        return None
    count = table.num_embeddings - 1
    if classes is None:
        classes = torch.full(x.shape[:1], NO_CLASS)
    if classes.shape != x.shape[:1]:
        raise ValueError(f"classes has shape {tuple(classes.shape)}; a batch of {x.shape[0]} needs one id each")
    check_classes(classes.tolist(), count)
    classes = classes.to(x.device, non_blocking=True)
    if hidden is not None:
        classes = torch.where(hidden, NO_CLASS, classes)
    vectors: Tensor = table(torch.where(classes == NO_CLASS, count, classes))
    return vectors


def check_classes(classes: Sequence[int], count: int) -> None:
    """Raise a ValueError that names the first id that is neither -1 (no class) nor one of 0..count-1."""
    for c in classes:
        if not NO_CLASS <= c < count:
            has = f"classes 0 to {count - 1}, and {NO_CLASS} for none" if count else "no classes"
            raise ValueError(f"class {c} is out of range; this model has {has}")
