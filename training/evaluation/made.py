"""What models make for an evaluation: reconstructed, generated, filled and retrieved frames, each made once and kept."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training.engines import device
from longtake.training.evaluation import asking
from longtake.training.evaluation import clips as heldout
from longtake.training.evaluation import videos as files
from longtake.training.evaluation.clips import Heldout, Part, changing, frames_needed, listing, ticks
from longtake.training.evaluation.material import Clip, Filled, Generated, Retrieved
from longtake.training.evaluation.networks import Brought
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Aspect, Networks, Suite, Videos
from longtake.training.metrics.classifier import Classifier
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.perceptual import Perceptual
from longtake.training.models.common.codec import reconstruct_video
from longtake.training.models.generator import (
    Gap,
    Generator,
    Infiller,
    Request,
    Retriever,
    Settings,
    check_requests,
    plain,
    with_changes,
)
from longtake.training.pictures import ImageEncoder

Frames = Iterable[np.ndarray]
# the setting of the suite that says how long clips must be
_LENGTHS: Mapping[Aspect, str] = {
    "reconstructs": "suite.clips.frames", "generates": "suite.clips.frames", "runs": "suite.clips.frames",
    "fills": "suite.gaps.frames", "retrieves": "suite.seconds",
}  # fmt: skip
_ENOUGH = 0.9  # share of the suite's seconds that a memory must hold at least [assumption]


class Made:
    """The material of a dataset and a suite (see `Material`), which keeps what models make in `home`.

    The suite gets the dataset's frame rate where it has none. Raises UserError: no such dataset or view; no held-out clips.
    """

    def __init__(self, dataset: str, view: str | None, suite: Suite, networks: Networks, home: Path) -> None:
        self._heldout = Heldout(dataset, view)
        self.fps, self.size = float(suite.clips.fps or self._heldout.fps), suite.clips.size
        self.suite = suite.model_copy(update={"clips": suite.clips.model_copy(update={"fps": self.fps})})
        self.home, self.brought = home, Brought(networks, self.suite.clips)
        self._door: tuple[str, str, Any] = ("", "", None)
        self._shown: dict[str, dict[str, Any]] = {}  # by folder
        self._notes: dict[str, None] = {}
        gap = suite.gaps.frames + 2 * suite.gaps.context
        self._frames: dict[Aspect, int] = {  # of the clips that models of each aspect are shown
            "reconstructs": suite.clips.frames,
            "generates": suite.clips.frames,
            "fills": gap,
            "retrieves": max(1, round(suite.seconds * self.fps)),
            "runs": suite.clips.frames,
        }
        self._parts: dict[tuple[int, bool], list[Part]] = {}

    # held-out clips

    def parts(self, aspect: Aspect) -> list[Part]:
        """The clips for what models of an aspect do. UserError where there is none."""
        frames, clips = self._frames[aspect], self.suite.clips
        join = aspect == "retrieves"  # a memory reaches back over clips, as in training
        if (frames, join) not in self._parts:
            chosen = self._heldout.chosen(frames / self.fps, clips.size, clips.most, self.suite.seed, join)
            self._parts[frames, join] = chosen
        if not self._parts[frames, join]:
            height, width = self.size
            raise UserError(
                f"dataset: {self._heldout.dataset}: no held-out clip has {frames} frames of {height}x{width} at"
                f" {self.fps:g} a second: {self._heldout.longest(join)}; lower suite.clips.size or {_LENGTHS[aspect]}"
            )
        return self._parts[frames, join]

    def conditions(self, aspect: Aspect) -> dict[str, Any]:
        """What the figures of models of an aspect are measured on."""
        parts = self.parts(aspect)
        return {
            "dataset": heldout.where(self._heldout.dataset),
            "view": self._heldout.view_digest[:12],
            "split": heldout.SPLIT,
            "listing": listing(parts, [self._caption(part, self._frames[aspect]) for part in parts])[:12],
            "clips": len(parts),
            "sources": len({part.source for part in parts}),
            "frames": self._frames[aspect],
            "fps": self.fps,
            "size": list(self.size),
            "seed": self.suite.seed,
        }

    def clips(self) -> Iterator[Clip]:
        """The held-out clips."""
        for part in self.parts("reconstructs"):
            yield self._clip(part, self.suite.clips.frames)

    def _clip(self, part: Part, count: int) -> Clip:
        frames = self._heldout.frames(part, count, self.fps, self.size)
        video = files.tensor_of(frames, device())
        return Clip(part.source, part.key, video, self.fps, self._caption(part, count))

    def _caption(self, part: Part, count: int) -> str | None:
        return self._heldout.caption(part, count / self.fps)

    # what models make

    def reconstructed(self, subject: Subject) -> Iterator[tuple[Clip, Tensor]]:
        """Held-out clips and their reconstructions."""
        for part in self.parts("reconstructs"):
            clip = self._clip(part, self.suite.clips.frames)
            made = self._kept(
                subject, {"reconstruct": self._asked(part, "reconstructs")}, self.fps,
                partial(self._reconstruct, subject, clip), {"key": clip.key, "aspect": "reconstructs"},
            )  # fmt: skip
            yield clip, files.tensor_of(made.frames(), device())

    def _reconstruct(self, subject: Subject, clip: Clip, folder: Path) -> Iterator[np.ndarray]:
        source = clip.video[0].permute(1, 2, 3, 0).cpu().numpy()
        with asking.refusing(subject.uri):
            for _, copies in reconstruct_video(subject.module, source):
                yield from copies

    def generated(self, subject: Subject, videos: Videos) -> Iterator[Generated]:
        """Videos of a generator, one for each prompt and seed."""
        generator = self.generator(subject)
        settings = asking.settings_of(generator, self.suite.settings)
        length = videos.frames or max(1, round((videos.seconds or 0) * self.fps))
        wanted = asking.wanted(generator, videos.seeds, self.suite.prompts, self._captions())
        if self.suite.prompts and "prompt" not in generator.accepts:
            self._notes["takes no prompts; its videos are of as many seeds"] = None
        rate = generator.fps
        with asking.refusing(subject.uri):
            check_requests(generator, [each.request for each in wanted], settings)
            frames = generator.frames_of_seconds(frames_needed(length, self.fps, rate) / rate, rate)
            joints = [math.ceil(joint * self.fps / rate - 1e-6) for joint in generator.joints(frames, settings)]
        for each in wanted:
            seed, scene = each.request.seed, each.request.story[0][1]
            key = f"{length}f{'' if each.prompt is None else f'-p{each.prompt:03d}'}-s{seed}"
            asked = {
                "generate": list(scene),
                "seed": seed,
                "frames": frames,
                "settings": plain(settings, generator.accepts),
            }
            facts = {"key": key, "aspect": "generates", "seed": seed, "prompt": each.words, "class": each.class_name}
            make = partial(self._generate, subject, generator, each.request, frames, settings)
            made = self._kept(subject, asked, rate, make, facts)
            yield Generated(
                each.words or key, key, seed, each.words, length, partial(self._read, made, length),
                [joint for joint in joints if joint < length], changing(length, self.fps, rate),
                math.nan if (took := made.facts["seconds"]) is None else took,
                self._place(made),
            )  # fmt: skip

    def _generate(
        self, subject: Subject, generator: Generator, request: Request, frames: int, settings: Settings, folder: Path
    ) -> Iterator[np.ndarray]:
        with asking.refusing(subject.uri):
            for chunk in generator.videos([request], frames, settings, folder=str(folder)):
                yield from chunk[0]

    def _captions(self) -> Iterator[str | None]:
        return (self._caption(part, self._frames["generates"]) for part in self.parts("generates"))

    def filled(self, subject: Subject) -> Iterator[Filled]:
        """Gaps in the middle of held-out clips, filled; each clip comes once for each draw."""
        infiller = self.infiller(subject)
        with asking.refusing(subject.uri):
            settings = with_changes(infiller.settings, asking.known(self.suite.settings, infiller.settings))
        context, gap = self.suite.gaps.context, self.suite.gaps.frames
        beside, inside = asking.gap_at(self.suite.gaps, self.fps, infiller)
        own = changing(self._frames["fills"], self.fps, infiller.fps, context)
        common = {"beside": beside, "inside": inside, "settings": asking.plain(settings)}
        for part in self.parts("fills"):
            clip = self._clip(part, self._frames["fills"])
            prompt = clip.caption if infiller.takes_prompts else None
            for seed in range(self.suite.seed, self.suite.seed + self.suite.gaps.draws):
                asked = common | {"fill": self._asked(part, "fills"), "prompt": prompt, "seed": seed}
                facts = {"key": clip.key, "aspect": "fills", "prompt": prompt, "seed": seed}
                make = partial(self._fill, subject, infiller, part, prompt, seed, settings)
                made = self._kept(subject, asked, infiller.fps, make, facts)
                yield Filled(clip, context, torch.cat(list(self._read(made, gap)), 2), own)

    def _fill(
        self,
        subject: Subject,
        infiller: Infiller,
        part: Part,
        prompt: str | None,
        seed: int,
        settings: Any,
        folder: Path,
    ) -> Iterator[np.ndarray]:
        beside, inside = asking.gap_at(self.suite.gaps, self.fps, infiller)
        after = max(0.0, self.suite.gaps.context / self.fps - beside / infiller.fps)
        frames = self._heldout.frames(part, 2 * beside + inside, infiller.fps, infiller.size, after)
        shown = np.stack(list(frames))
        gap = Gap(shown[:beside], shown[beside + inside :], inside, prompt)
        with asking.refusing(subject.uri):
            if prompt is not None:
                infiller.check_prompts([prompt])
            yield from next(infiller.fill([gap], seed, settings))

    def retrieved(self, subject: Subject) -> Iterator[Retrieved]:
        """Frames of held-out clips, retrieved from a model's memory of them."""
        retriever = self.retriever(subject)
        settings = replace(retriever.settings, **asking.known(self.suite.settings, retriever.settings))
        count = frames_needed(self._frames["retrieves"], self.fps, retriever.fps)
        if not (holds := retriever.holds(count)):
            raise UserError(
                f"{subject.uri}: {self.suite.seconds:g} s are too few for a memory; raise the suite's seconds"
            )
        if holds < _ENOUGH * count and retriever.holds(2 * count) == holds:
            raise UserError(
                f"{subject.uri}: its memory holds {holds / retriever.fps:.3g} s, and does not compare with others of"
                f" {self.suite.seconds:g}; lower the suite's seconds"
            )
        if holds < count:
            self._notes[f"{holds} of {count} frames are retrieved, those that fill its memory's latents"] = None
        common = {"frames": holds, "seed": self.suite.seed, "settings": asking.plain(settings)}
        for part in self.parts("retrieves"):
            # both come of one retrieval
            found = cache(partial(self._retrieve, subject, retriever, part, holds, settings))
            videos = []
            for number, name in enumerate(("made", "bound")):
                asked = common | {"retrieve": self._asked(part, "retrieves"), "part": name}
                facts = {"key": part.key, "aspect": "retrieves", "part": name}
                make = partial(_one_of, found, number)
                videos.append(self._kept(subject, asked, retriever.fps, make, facts))
            frames = sum(tick < videos[0].facts["frames"] for tick in self._ticks(retriever.fps))
            clip = self._clip(part, frames)
            made, bound = (torch.cat(list(self._read(each, frames)), 2) for each in videos)
            yield Retrieved(clip, clip.video, made, bound)

    def _ticks(self, rate: float) -> list[int]:
        return ticks(self._frames["retrieves"], self.fps, rate)

    def _retrieve(
        self, subject: Subject, retriever: Retriever, part: Part, count: int, settings: Settings
    ) -> tuple[np.ndarray, np.ndarray]:
        shown = np.stack(list(self._heldout.frames(part, count, retriever.fps, retriever.size)))
        with asking.refusing(subject.uri):
            return retriever.recall(shown, count - 1, self.suite.seed, settings)

    # the doors of a model, one model at a time

    def generator(self, subject: Subject) -> Generator:
        """Raises UserError where the model cannot be used here, such as without its text encoder."""
        made: Generator = self._opened(subject, "generator")
        return made

    def infiller(self, subject: Subject) -> Infiller:
        made: Infiller = self._opened(subject, "infiller")
        return made

    def retriever(self, subject: Subject) -> Retriever:
        made: Retriever = self._opened(subject, "retriever")
        return made

    def close(self) -> None:
        """Forget a model's door, with all that it holds on the device."""
        self._door = ("", "", None)
        torch.cuda.empty_cache()

    def _opened(self, subject: Subject, name: Literal["generator", "infiller", "retriever"]) -> Any:
        if self._door[:2] != (subject.digest, name):
            make = getattr(subject.kind, name)
            self._door = (
                subject.digest,
                name,
                make(subject.pinned, subject.module, subject.facts, None, torch.float32),
            )
        self._note(self._door[2])
        return self._door[2]

    def _note(self, door: Generator | Infiller | Retriever) -> None:
        """Say where a model's videos are not of the suite's rate or size."""
        if abs(door.fps - self.fps) > 1e-6:
            self._notes[f"{door.fps:g} frames a second, sampled at the suite's {self.fps:g}"] = None
        if tuple(door.size) != tuple(self.size):
            ours, theirs = (f"{size[0]}x{size[1]}" for size in (self.size, door.size))
            self._notes[f"frames of {theirs}, scaled and cropped to the suite's {ours}"] = None

    # networks

    def features(self, name: Literal["features", "debiased"] = "features") -> FeatureNetwork:
        network: FeatureNetwork = getattr(self.brought, name)
        return network

    def classifier(self) -> Classifier:
        return self.brought.classifier

    def perceptual(self) -> Perceptual:
        return self.brought.perceptual

    def embedder(self) -> ImageEncoder:
        return self.brought.embedder

    def folder(self, name: Literal["dual"]) -> str:
        folder: str = getattr(self.brought, name)
        return folder

    # the disk

    def told(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The videos that were given since this was last asked, with `key`, `file` and what was asked for; and notes."""
        told = list(self._shown.values()), list(self._notes)
        self._shown, self._notes = {}, {}
        return told

    def _asked(self, part: Part, aspect: Aspect) -> list[Any]:
        return [*part.content, self._frames[aspect], self.fps, list(self.size)]

    def _kept(
        self,
        subject: Subject,
        asked: Mapping[str, Any],
        fps: float,
        make: Callable[[Path], Iterator[np.ndarray]],
        facts: Mapping[str, Any],
    ) -> files.Kept:
        """What a model has made when it was asked so before; else it is made now."""
        folder = self.home / subject.digest[:12] / files.key_of(asked)
        found, parts = files.find(folder), folder / "parts"
        if found is None:
            went_on = parts.exists()
            torch.manual_seed(self.suite.seed)
            found = files.keep(folder, make(parts), fps, {"asked": asked, **facts}, timed=not went_on)
        # also where a process was killed before it did
        files.forget(parts)
        self._shown[str(folder)] = {**facts, "file": self._place(found)}
        return found

    def _place(self, kept: files.Kept) -> str:
        return str((kept.folder / files.SHOWN).relative_to(self.home.parent))

    def _read(self, kept: files.Kept, length: int, chunk: int = 16) -> Iterator[Tensor]:
        """The first frames of a video at the suite's rate and size."""
        frames = files.at(kept.frames(), length, self.fps, kept.fps)
        for part in files.chunks_of(frames, chunk, device()):
            yield files.fitted(part, self.size)


def _one_of(found: Callable[[], tuple[np.ndarray, np.ndarray]], number: int, folder: Path) -> Iterator[np.ndarray]:
    yield from found()[number]
