"""The transformer of TATS (arXiv 2204.03638): a GPT over [conditions, tokens of latent frames].

Conditions have ids of their own in front of the video's: the start, padding, classes, words and sound. Positions are learned
for each (frame, row, column) of a window, not for each place in the sequence: so a window slides, and the frames of a gap
between two anchors may be read in another order than they are shown in, [conditions, first, last, those between]. There
conditions and anchors see each other, and what is between them sees what is before it: what is predicted never sees itself,
through any number of blocks.

Not the paper's: its interpolation reads frames in order of time, with a mask, and counts the anchors in its loss; its head
has logits for the conditions' ids too; its conditions are padded by a token that has a meaning.

Ranks that share a window (`common/sequence.py`) have each a stretch of the sequence, one after the other, so that a causal
mask holds once attention has exchanged tokens for heads. What a cache continues is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.datasets.tokens import NO_SOUND
from longtake.training.models.common.condition import NO_CLASS, Condition, Hidden, check_classes, draw_hidden
from longtake.training.models.common.recompute import called, chosen
from longtake.training.models.common.sequence import SequenceGroup, Shares, own, shares_of, to_heads, to_tokens, whole
from longtake.training.models.common.text import TextAttention, TextIn, text_tokens
from longtake.training.models.tats.gpt_config import TATSConfig

_START, _PADDING, _CLASSES = 0, 1, 2  # the first ids


class Cache:
    """What the tokens so far of a batch of sequences leave for those that follow; of one pass, without gradients.

    length  tokens that it has room for, conditions included
    used    tokens so far
    seen    which of them are no padding, bool `(B, length)`; None: all
    text    tokens of a text and which are seen (see `TextIn`)
    """

    def __init__(self, length: int) -> None:
        self.length, self.used = length, 0
        self.seen: Tensor | None = None
        self.text: tuple[Tensor | None, Tensor | None] = (None, None)
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._texts: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extended(self, layer: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values `(B, heads, n, d)` of all tokens of a layer, of which these are the last."""
        if layer not in self._kept:
            shape = (*keys.shape[:2], self.length, keys.shape[3])
            self._kept[layer] = keys.new_empty(shape), keys.new_empty(shape)
        end = self.used + keys.shape[2]
        kept_keys, kept_values = self._kept[layer]
        kept_keys[:, :, self.used : end], kept_values[:, :, self.used : end] = keys, values
        return kept_keys[:, :, :end], kept_values[:, :, :end]

    def text_keys(self, layer: TextAttention, text: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of the text, which is the same for all tokens, in a layer."""
        if layer not in self._texts:
            self._texts[layer] = layer.keys(text)
        return self._texts[layer]


class Block(nn.Module):
    """Attention among tokens `(B, n, D)`, then to the text where the model has it, then an MLP.

    `shares` are of ranks with some of the tokens each; the mask is of all tokens.
    """

    def __init__(self, config: TATSConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.heads = config.heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.text = TextAttention(width, config.heads) if config.text_width else None
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        causal: bool,
        text: Tensor | None = None,
        text_seen: Tensor | None = None,
        cache: Cache | None = None,
        shares: Shares | None = None,
    ) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = cache.extended(self, key, value)
        if shares is not None:
            query, key, value = to_heads((query, key, value), shares)
        mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        if shares is not None:
            mixed = to_tokens(mixed, shares)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        if self.text is not None and text is not None:
            keys = cache.text_keys(self.text, text) if cache is not None else None
            x = x + self.text(x[:, None], text, text_seen, keys)[:, 0]
        return x + self.mlp(self.mlp_norm(x))


class TATS(nn.Module):
    """Logits of the tokens of a window, each given the conditions and the tokens before it in `config.order`."""

    places: Tensor
    sequence: SequenceGroup | None = None  # ranks that share a window

    def __init__(self, config: TATSConfig) -> None:
        super().__init__()
        self.config = config
        positions = config.conditions + config.shape[0] * config.cells
        self.token_in = nn.Embedding(config.condition_ids + config.codes, config.width)
        self.position_in = nn.Embedding(positions, config.width)
        self.text_in = TextIn(config) if config.text_width else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.codes, bias=False)
        self.register_buffer("places", _places(config), persistent=False)
        self._start_weights()

    def blocks(self) -> Iterator[Block]:
        """The parts that are compiled one by one."""
        yield from (block for block in self.layers if isinstance(block, Block))

    def forward(
        self,
        tokens: Tensor,
        condition: Condition | None = None,
        rng: torch.Generator | None = None,
        *,
        last: int,
        cache: Cache | None = None,
        targets: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Logits `(B, last, codes)` of the tokens that follow the last ones; or, given those, the loss of a training.

        Args:
            tokens: `(B, n)`, from the beginning of the sequence (see `TATSConfig.sequence`), or what follows the cache's.
            condition: of the batch; its text is states, or with `words` their ids, `(B, N, 1)`. None is an empty one.
                After the first call with a cache it has no effect.
            rng: draws what training hides.
            cache: takes part in inference only.
            targets: the tokens that follow `(B, last)`; returns the mean of their cross-entropy.
            chunk: of those tokens, logits there are at once; None: of all (see `chunked_loss`).

        Raises:
            ValueError: conditions that the model has not learned.
        """
        config, start = self.config, cache.used if cache else 0
        ids = tokens + config.condition_ids
        if start and cache is not None:
            seen, text = cache.seen, cache.text
        else:
            lost = self._lost(condition, tokens, rng)
            front = condition_tokens(config, condition, tokens, lost)
            ids = torch.cat([front, ids], dim=1)
            length = cache.length if cache is not None else ids.shape[1]
            padded = bool(config.words or config.audio_codes)
            seen = F.pad(front != _PADDING, (0, length - front.shape[1]), value=True) if padded else None
            words = None if config.words else condition
            text = text_tokens(self.text_in, words, tokens[:, None, :, None, None], lost.text)
            if cache is not None:
                cache.seen, cache.text = seen, text
        end = start + ids.shape[1]
        shares = shares_of(self.sequence, end) if cache is None else None
        x = self.token_in(own(ids, shares, 1)) + self.position_in(own(self.places[start:end], shares, 0))
        if config.mode == "interpolate":
            mask, causal = attended(start, end, config.conditions + config.given * config.cells, seen, x.device)
        else:
            mask, causal = attended(start, end, 0, seen, x.device)
        share = config.activation_checkpointing if self.training else 0.0
        for number, block in enumerate(self.blocks()):
            if cache is not None:
                # past what is compiled, which would be compiled anew as the cache grows
                x = block.forward(x, mask, causal, *text, cache)
            else:
                x = called(chosen(share, number, config.depth), block, x, mask, causal, *text, None, shares)
        if cache is not None:
            cache.used = end
        x = self.norm_out(whole(x, shares, 1)[:, -last:])
        if targets is not None:
            return chunked_loss(self.head, x.flatten(0, 1), targets.flatten(), chunk)
        logits: Tensor = self.head(x)
        return logits

    def _lost(self, condition: Condition | None, tokens: Tensor, rng: torch.Generator | None) -> Hidden:
        if not self.training:
            return Hidden()
        config = self.config
        return draw_hidden(condition, tokens, config.label_dropout, config.text_dropout, rng, config.audio_dropout)

    def _start_weights(self) -> None:
        """GPT's initial weights [paper]; positions begin at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.position_in.weight)
        for block in self.blocks():
            if block.text is not None:
                block.text.start()


def chunked_loss(head: nn.Module, hidden: Tensor, targets: Tensor, chunk: int | None) -> Tensor:
    """The mean cross-entropy, in fp32 at least, of the head's logits of `(N, D)`, given the tokens `(N,)`.

    Args:
        chunk: tokens whose logits there are at once: the backward pass makes them again, one chunk after the other.
    """

    def loss(part: Tensor, answers: Tensor, reduction: str) -> Tensor:
        logits = head(part)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), answers, reduction=reduction)

    if chunk is None or chunk >= len(hidden):
        return loss(hidden, targets, "mean")
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.stack([called(True, loss, *part, "sum") for part in parts]).sum() / len(hidden)


def _places(config: TATSConfig) -> Tensor:
    """The position of each place in the sequence: conditions, then the cells of the frames in their order."""
    cells = torch.arange(config.cells)
    frames = [config.conditions + frame * config.cells + cells for frame in config.order]
    return torch.cat([torch.arange(config.conditions), *frames])


def attended(
    start: int, end: int, prefix: int, seen: Tensor | None, device: torch.device
) -> tuple[Tensor | None, bool]:
    """What the tokens from `start` to `end` of a sequence attend to: a mask for SDPA, True where they do, and `is_causal`.

    Each sees those before it and itself, and all of the first `prefix`, where `seen` `(B, end or more)` does not hide them.
    """
    if seen is None:
        if end - start == 1 or end <= prefix:
            return None, False
        if start == prefix == 0:
            return None, True  # kernels are faster without a mask
    keys = torch.arange(end, device=device)
    mask = (keys <= keys[start:, None]) | (keys < prefix)
    return (mask, False) if seen is None else (mask & seen[:, None, None, :end], False)


def condition_tokens(config: TATSConfig, condition: Condition | None, tokens: Tensor, lost: Hidden) -> Tensor:
    """The ids `(B, config.conditions)` in front of a batch of tokens. Raises ValueError as `TATS.forward`."""
    condition, batch, device = condition or Condition(), len(tokens), tokens.device
    parts = [_class_ids(config, condition, tokens, lost.classes)]
    if config.words:
        parts.append(_padded_words(config, condition, batch, lost.text).to(device, non_blocking=True))
    if config.audio_codes:
        parts.append(_sound_ids(config, condition, batch, lost.audio).to(device))
    elif condition.audio is not None:
        raise ValueError("audio: this model takes none; leave it out")
    return torch.cat(parts, dim=1)


def _class_ids(config: TATSConfig, condition: Condition, tokens: Tensor, hidden: Tensor | None) -> Tensor:
    """The first token `(B, 1)`: the class, or the start where there is none."""
    classes, batch = condition.classes, len(tokens)
    if classes is None:
        return torch.full((batch, 1), _START, device=tokens.device)
    if not config.classes:
        raise ValueError("classes: this model has none; leave them out")
    if classes.shape != (batch,):
        raise ValueError(f"classes has shape {tuple(classes.shape)}; a batch of {batch} needs one id each")
    check_classes(classes.tolist(), config.classes)
    classes = classes.to(tokens.device, non_blocking=True)
    if hidden is not None:
        classes = torch.where(hidden, NO_CLASS, classes)
    return torch.where(classes == NO_CLASS, _START, classes + _CLASSES)[:, None]


def _padded_words(config: TATSConfig, condition: Condition, batch: int, hidden: Tensor | None) -> Tensor:
    """The words of a batch `(B, word_length)`, with padding behind them."""
    if condition.text is None or condition.mask is None:
        return torch.full((batch, config.word_length), _PADDING)
    shape = condition.text.shape
    if shape[0] != batch or shape[1] > config.word_length or shape[2] != 1:
        raise ValueError(
            f"words have shape {tuple(shape)}; this model needs ({batch}, up to {config.word_length} tokens, 1)"
        )
    mask = condition.mask if hidden is None else condition.mask & ~hidden.to(condition.mask.device)[:, None]
    ids = torch.where(mask, condition.text[..., 0].long() + _CLASSES + config.classes, _PADDING)
    return F.pad(ids, (0, config.word_length - shape[1]), value=_PADDING)


def _sound_ids(config: TATSConfig, condition: Condition, batch: int, hidden: Tensor | None) -> Tensor:
    """The sound of a batch's frames `(B, t n)`, with padding where there is none."""
    shape, audio = (batch, config.shape[0], config.audio_tokens), condition.audio
    if audio is None:
        return torch.full((batch, shape[1] * shape[2]), _PADDING)
    if audio.shape != shape:
        raise ValueError(f"audio has shape {tuple(audio.shape)}; this model needs {shape}")
    none = audio == NO_SOUND
    if hidden is not None:
        none = none | hidden.to(audio.device)[:, None, None]
    return torch.where(none, _PADDING, audio + _CLASSES + config.classes + config.words).flatten(1)
