"""A captioner in this process: an image-text model of `transformers` from a local folder, a batch of clips at a time.

Nothing is downloaded, no code of the folder is run, and weights are read from safetensors alone. The same folder and
settings give the same captions on the same kind of machine. What it gives up: an answer of no use is not asked for again,
since it would be the same.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.shard import sha256_of
from longtake.pipeline import column as columns
from longtake.pipeline.captioner import frames, reply
from longtake.pipeline.captioner.reply import Answer, Bad

_REMEDY = "give the folder of an image-text model in the layout of `transformers`, with safetensors"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Showing:
    """What a model is shown, and how."""

    folder: str
    prompt: str
    frames: int
    side: int  # pixels
    max_characters: int
    answer_tokens: int
    settings: Mapping[str, Any]
    batch: int


def digest_of(folder: str) -> str:
    """A digest of the files of a model folder.

    Raises:
        UserError: there is no such model, or `transformers` is not installed.
    """
    root = Path(folder)
    if not (root / "config.json").is_file():
        raise UserError(f"model: {folder}: no model here (no config.json); {_REMEDY}, or name an `endpoint`")
    if not any(root.glob("*.safetensors")):
        raise UserError(f"model: {folder}: has no weights in safetensors; {_REMEDY}")
    if find_spec("transformers") is None:
        raise UserError("model: needs the package transformers; run `pip install 'longtake[text]'`")
    digest = hashlib.sha256()
    for path in _files(root):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def stamp_of(folder: str) -> str:
    """A digest of the names, sizes and times of a model's files: changes when they are written anew."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _files(Path(folder))]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _files(root: Path) -> list[Path]:
    """The files that make a model: those beside config.json, without other formats of its weights."""
    endings = (".json", ".jinja", ".txt", ".model", ".safetensors")
    return sorted(path for path in root.glob("*") if path.suffix in endings and path.is_file())


class Model:
    """Raises Failure where the folder has no image-text model that follows instructions."""

    def __init__(self, showing: Showing, device: str) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._showing = showing
        only = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._processor: Any = AutoProcessor.from_pretrained(showing.folder, **only)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                showing.folder,
                use_safetensors=True,
                dtype=torch.bfloat16 if device == "cuda" else torch.float32,
                **only,
            )
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise Failure(f"{showing.folder}: {' '.join(str(e).split())[:300]}; {_REMEDY}") from e
        if not getattr(self._processor, "chat_template", None):
            raise Failure(f"{showing.folder}: has no chat template, and so takes no prompt; {_REMEDY}")
        # answers follow the prompts, which end together
        self._processor.tokenizer.padding_side = "left"
        self._model = model.eval().requires_grad_(False).to(device)

    def answers(self, clips: Sequence[Row], tar: str) -> Iterator[Answer | None]:
        """An answer for each clip. Raises Failure: a clip is damaged, or a batch does not fit into memory."""
        import torch

        for start in range(0, len(clips), self._showing.batch):
            rows = clips[start : start + self._showing.batch]
            try:
                texts = self._generate(rows, tar)
            except torch.OutOfMemoryError as e:
                raise Failure(
                    f"{tar}: {len(rows)} clips from {rows[0]['key']} on do not fit into the GPU's memory; lower `run.batch`"
                ) from e
            for row, text in zip(rows, texts, strict=True):
                yield self._answer(row, text)
            yield None

    def _generate(self, rows: Sequence[Row], tar: str) -> list[str | None]:
        """The model's answers about clips; None for one that was cut."""
        import torch

        shown = [self._pictures(row, tar) for row in rows]
        talks = [
            [{"role": "user", "content": [*[{"type": "image"}] * len(pictures), {"type": "text", "text": text}]}]
            for row, pictures in zip(rows, shown, strict=True)
            for text in (reply.prompt_of(self._showing.prompt, row, len(pictures)),)
        ]
        prompts = self._processor.apply_chat_template(talks, add_generation_prompt=True, tokenize=False)
        begin = self._processor.tokenizer.bos_token
        inputs = self._processor(
            text=prompts,
            images=shown,
            padding=True,
            return_tensors="pt",
            # templates have them already
            add_special_tokens=not (begin and prompts[0].startswith(begin)),
        ).to(self._model.device, dtype=self._model.dtype)
        most = self._showing.answer_tokens
        with torch.inference_mode():
            out = self._model.generate(
                **inputs, **{"do_sample": False, "max_new_tokens": most, **self._showing.settings}
            )
        made = out[:, inputs["input_ids"].shape[1] :]
        ends = self._model.generation_config.eos_token_id
        ends = torch.tensor([ends] if isinstance(ends, int) else list(ends or ()), device=made.device)
        whole = torch.isin(made, ends).any(1).tolist()
        texts = self._processor.batch_decode(made, skip_special_tokens=True)
        return [text if end or made.shape[1] < most else None for text, end in zip(texts, whole, strict=True)]

    def _pictures(self, row: Row, tar: str) -> list[Any]:
        from PIL import Image

        mp4, name = columns.clip_bytes(tar, row), f"{tar}: {row['key']}.mp4"
        return [
            Image.fromarray(frame) for frame in frames.seen(mp4, row, self._showing.frames, self._showing.side, name)
        ]

    def _answer(self, row: Row, text: str | None) -> Answer:
        try:
            if text is None:
                raise Bad(f"the answer has more than answer_tokens {self._showing.answer_tokens}")
            return Answer(row["key"], row["sha256"], reply.checked(text, self._showing.max_characters))
        except Bad as e:
            return Answer(row["key"], row["sha256"], None, f"bad_answer: {storage.printable(str(e))}")
