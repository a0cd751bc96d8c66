"""An encoder of `transformers` from a local folder: T5 and UMT5, CLIP's text model, BERT, decoder-only language models.

Texts of a batch are padded to the longest, and the padding is masked and left out of the result. Decoder-only models get
the text in a template, whose tokens before the text are cut off the states (`crop`).
"""

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.datasets.networks import imported
from longtake.datasets.text import TextConfig
from longtake.training.text import prompts
from longtake.training.text.files import Files

_LENGTH = 512
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_UNUSED = ("pooler.", "text_projection.", "logit_scale", "lm_head.")  # weights that states do not come from
_ROWS = 1024  # of the table of embeddings that are looked at


def digest_of(config: TextConfig, files: Files) -> str:
    """The `digest` that the encoder of these files has, which takes `length` tokens, without its weights in memory.

    Raises:
        UserError: its config cannot be read.
    """
    transformers = _transformers()
    described = _loaded(config.encoder, transformers.AutoConfig.from_pretrained, files.model)
    loader = _loader(transformers, described)
    kind = loader if loader is transformers.CLIPTextModel else loader._model_mapping[type(described)]
    return prompts.digest(config, kind.__name__, files.digests())


class Pretrained:
    """The states of a layer for the tokens of a text."""

    def __init__(self, config: TextConfig, files: Files) -> None:
        """Raises UserError: it cannot be loaded, or a setting does not fit it."""
        transformers = _transformers()
        self._tokenizer = _loaded(config.encoder, transformers.AutoTokenizer.from_pretrained, files.tokenizer)
        self._model = _model(transformers, config, files)
        _check_embedding(self._model, config.encoder)
        self.limit = _limit(config, self._model, self._tokenizer)
        self._config = config.model_copy(update={"length": self.limit})
        self._fill = next((i for i in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id) if i is not None), 0)
        self._places = config.side == "left" and _takes_places(self._model)
        self.digest = prompts.digest(self._config, type(self._model).__name__, files.digests())
        prompts.check_crop(self._config, len(self._tokens([""])[0]))
        self.width = self.encode([""])[0].shape[1]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], device: str = "cpu") -> list[Tensor]:
        if not texts:
            return []
        crop = self._config.crop
        rows = self._tokens(texts, truncation=True, max_length=self.limit + crop)
        rows = [ids if len(ids) > crop else [*ids, self._fill] for ids in rows]
        ids, mask = _padded(rows, self._fill, self._config.side)
        options: dict[str, Any] = {}
        if self._places:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(device)
        if self._config.layer != -1:
            options["output_hidden_states"] = True
        out = self._model.to(device)(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
        states = out.last_hidden_state if self._config.layer == -1 else out.hidden_states[self._config.layer]
        states = states.to(torch.bfloat16).cpu()
        # cloned: a slice would keep the whole batch
        return [one[seen.bool()][crop:].clone() for one, seen in zip(states, mask, strict=True)]

    def count(self, texts: Sequence[str]) -> list[int]:
        return [max(1, len(ids) - self._config.crop) for ids in self._tokens(texts)]

    def describe(self) -> dict[str, Any]:
        return self._config.model_dump(mode="json")

    def _tokens(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        return list(self._tokenizer(prompts.prepared(self._config, texts), **options)["input_ids"])


def _padded(rows: Sequence[Sequence[int]], fill: int, side: str) -> tuple[Tensor, Tensor]:
    """(B, L) tokens and mask, both int64, of rows of several lengths."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask


def _transformers() -> Any:
    # before the first import: it is read only then
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers = imported("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _loaded(name: str, load: Any, *arguments: Any, **options: Any) -> Any:
    """What a `from_pretrained` gives, of local files alone. Raises UserError with the first line of its error."""
    refused = imported("huggingface_hub.errors").StrictDataclassError  # a value of a config
    errors = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, SafetensorError)
    try:
        return load(*arguments, local_files_only=True, trust_remote_code=False, **options)
    except (*errors, refused) as e:
        why = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise UserError(f"encoder: {name}: transformers cannot load it ({why}); save it again with this version") from e


def _model(transformers: Any, config: TextConfig, files: Files) -> nn.Module:
    """The model on the CPU, in evaluation mode; of an encoder-decoder the encoder alone, of CLIP the text model."""
    described = _loaded(config.encoder, transformers.AutoConfig.from_pretrained, files.model)
    loader = _loader(transformers, described)
    model, info = _loaded(
        config.encoder,
        loader.from_pretrained,
        files.model,
        use_safetensors=True,
        dtype=_DTYPES[config.precision],
        output_loading_info=True,
    )
    if absent := sorted(
        name for name in info["missing_keys"] if not name.removeprefix("text_model.").startswith(_UNUSED)
    ):
        raise UserError(f"encoder: {config.encoder}: its weights lack {absent[0]}; copy the whole model there")
    if loader is transformers.AutoModel and described.is_encoder_decoder:
        model = model.get_encoder()
    return model.eval().requires_grad_(False)


def _loader(transformers: Any, described: Any) -> Any:
    """The class that loads a model with this config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as ENCODERS

    if described.model_type in ("clip", "clip_text_model"):
        return transformers.CLIPTextModel
    return transformers.AutoModelForTextEncoding if described.model_type in ENCODERS else transformers.AutoModel


def _check_embedding(model: Any, name: str) -> None:
    """Raises UserError where the table of embeddings is all alike, as some versions of transformers have left UMT5's."""
    embedding = getattr(getattr(model, "encoder", None), "embed_tokens", None) or model.get_input_embeddings()
    weight = embedding.weight
    if not weight[:: max(1, len(weight) // _ROWS)].float().std() > 0:
        raise UserError(
            f"encoder: {name}: its table of embeddings is empty (all values alike); convert its weights again,"
            " or load them with another version of transformers"
        )


def _limit(config: TextConfig, model: Any, tokenizer: Any) -> int:
    """The tokens of a text that are kept. Raises UserError where the model takes fewer, or has no such layer."""
    text = model.config.get_text_config()
    layers = int(text.num_hidden_layers)
    if not 1 <= -config.layer <= layers + 1:
        raise UserError(f"layer: {config.layer}: {config.encoder} has {layers} layers; give -1 to {-layers - 1}")
    # relative positions have no end, whatever the tokenizer says
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return config.length or _LENGTH
    most = min(positions, tokenizer.model_max_length) - config.crop
    if (config.length or 1) > most:
        raise UserError(f"length: {config.length}: {config.encoder} takes {most} tokens of a text; lower it")
    return config.length or min(_LENGTH, most)


def _takes_places(model: Any) -> bool:
    """Whether the model can be told where each token stands; a model of pictures too finds it out by the mask."""
    return "position_ids" in inspect.signature(model.forward).parameters and not hasattr(model, "language_model")
