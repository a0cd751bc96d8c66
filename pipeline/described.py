"""Captions of clips as curation sees them: rules on their words, clips that say the same, likeness to a prompt."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from isal import isal_zlib
from tqdm import tqdm

from longtake.datasets import captions as records
from longtake.datasets import compact, index, schema, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.text import Stored, read_text, stored, unpacked

_THREADS = 16  # that read states at once
_RANGE = 32 << 20  # bytes of states that are read at once
_TEXT = schema.CAPTION_INDEX.field("captions").type.value_type
# the texts of a large dataset are more than the 2 GiB that an array of plain strings holds
_CAPTIONS = pa.list_(pa.struct([f.with_type(pa.large_string()) if f.name == "text" else f for f in _TEXT]))


def captions_of(dataset: str, uri: str, clips: pa.Table) -> pa.Array:
    """The captions of N clips, a list of schema.CAPTION for each; null where a clip has none.

    Args:
        dataset: URL of the dataset.
        uri: of what a `caption` stage has made.
        clips: rows of its index with `split` and `row`, the number of a clip in its split.

    Raises:
        UserError: there are no captions at `uri`, or they are of another dataset.
        Failure: the column lacks clips of the dataset.
    """
    # brings torch, without which views by rules on scores are made
    from longtake.datasets.loader.split import open_columns

    record = records.read_captions(uri)
    _check_dataset("captions", uri, record.dataset, dataset)
    lists, offsets, total = [], {}, 0
    for split in schema.SPLITS:
        base, _ = compact.open_split(dataset, split)
        column = open_columns(base, {"caption": record.column}, None)[0].columns["caption"]
        lists += [column.of(n)["captions"].combine_chunks().cast(_CAPTIONS) for n in range(len(column.shards))]
        offsets[split], total = total, total + int(base.counts.sum())
    starts = np.where(np.asarray(pc.equal(clips["split"], "val")), offsets["val"], offsets["train"])
    everything = pa.concat_arrays(lists) if lists else pa.nulls(0, _CAPTIONS)
    return everything.take(pa.array(starts + clips["row"].to_numpy()))


def _check_dataset(field: str, uri: str, theirs: str, dataset: str) -> None:
    if theirs != storage.absolute(dataset):
        raise UserError(f"{field}: {uri} are of the dataset {theirs}, not of {dataset}")


def broken(
    captions: pa.Array, min_words: int, languages: Sequence[str], match: str | None, avoid: str | None
) -> Iterator[tuple[str, np.ndarray]]:
    """For each rule on captions its reason and (N,) bool, the clips that break it. A clip without captions breaks none.

    Of the captions of a clip one at least must have the words, the language and the match, and none what is to be avoided.
    """
    clip, texts = _flat(captions, "text")
    has = np.asarray(captions.is_valid())

    def lack(passes: Any) -> np.ndarray:
        some = np.zeros(len(captions), bool)
        some[clip[np.asarray(pc.fill_null(passes, False))]] = True
        return has & ~some

    if min_words:
        yield (
            f"caption: fewer than {min_words} words",
            lack(pc.greater_equal(pc.count_substring_regex(texts, r"\S+"), min_words)),
        )
    if languages:
        _, spoken = _flat(captions, "language")
        yield f"caption: not in {', '.join(languages)}", lack(pc.is_in(spoken, pa.array(languages)))
    if match:
        yield f"caption: without {match}", lack(pc.match_substring_regex(texts, match))
    if avoid:
        wrong = np.zeros(len(captions), bool)
        wrong[clip[np.asarray(pc.match_substring_regex(texts, avoid))]] = True
        yield f"caption: with {avoid}", wrong


def sayings(captions: pa.Array) -> pa.ChunkedArray:
    """All that is said of each clip, as one text to compare: without case, order and spaces; null where nothing is."""
    clip, texts = _flat(captions, "text")
    plain = pc.utf8_trim_whitespace(pc.utf8_lower(pc.replace_substring_regex(texts, r"\s+", " "))).to_pylist()
    said: list[set[str] | None] = [set() if has else None for has in captions.is_valid().to_pylist()]
    for number, text in zip(clip.tolist(), plain, strict=True):
        said[number].add(text)
    return pa.chunked_array([pa.array([None if s is None else "\n".join(sorted(s)) for s in said], pa.large_string())])


def likeness(dataset: str, uri: str, clips: pa.Table, prompt: str, key: str) -> np.ndarray:
    """The cosine of a prompt to the most similar caption of each clip, (N,) float32; NaN where a clip has none.

    Both are the mean of their tokens' states, by the encoder of the column of texts.

    Args:
        uri: of what a `cache_text` stage has made.
        clips: as in `captions_of`.
        key: the config's key, for the progress bar and errors.

    Raises:
        UserError: there are no texts at `uri`, they are of another dataset, their encoder is not there any more, or the prompt
            has more tokens than it takes.
        Failure: the column lacks clips, or is damaged.
    """
    from longtake.datasets.loader.split import open_columns

    record = read_text(uri)
    _check_dataset("text", uri, record.dataset, dataset)
    # through the public door: the pipeline does not import training
    longtake: Any = importlib.import_module("longtake")
    encoder = longtake.text_encoder(**record.config().model_dump())
    if encoder.digest != record.encoder["digest"]:
        name = record.encoder["encoder"]
        raise UserError(f"{key}: {name} is another encoder than {uri} is of; run its `cache_text` stage again")
    if (count := encoder.count([prompt])[0]) > encoder.limit:
        raise UserError(f"{key}: {prompt[:40]!r} has {count} tokens, and {encoder.limit} fit; shorten it")
    query = _unit(encoder.encode([prompt])[0].float().mean(0).numpy())

    values = {}
    with tqdm(desc=key, total=len(clips), unit="clip") as bar, ThreadPoolExecutor(_THREADS) as pool:
        for split in schema.SPLITS:
            base, _ = compact.open_split(dataset, split)
            open_columns(base, {"text": record.column}, None)  # checks that no clip is without a row
            parts = []
            for number in range(len(base.shards)):
                shard = index.read_shard(dataset, split, f"{base.name(number)}.{record.column}")
                parts_of_tar = _ranges(stored(dataset, shard))
                cosines = {sha: c for found in pool.map(partial(_cosines, query), parts_of_tar) for sha, c in found}
                rows = shard.table["texts"].to_pylist()
                parts += [max((cosines[text["sha"]] for text in row or ()), default=np.nan) for row in rows]
                bar.update(len(rows))
            values[split] = np.array(parts, np.float32)
    rows = zip(clips["split"].to_pylist(), clips["row"].to_pylist(), strict=True)
    return np.array([values[split][row] for split, row in rows], np.float32)


def _ranges(places: Mapping[str, Stored]) -> list[list[tuple[str, Stored]]]:
    """The texts of a tar with their places, in groups that lie together and are read at once."""
    groups: list[list[tuple[str, Stored]]] = []
    for sha, place in sorted(places.items(), key=lambda item: item[1].offset):
        if not groups or place.offset + place.size - groups[-1][0][1].offset > _RANGE:
            groups.append([])
        groups[-1].append((sha, place))
    return groups


def _cosines(query: np.ndarray, texts: Sequence[tuple[str, Stored]]) -> list[tuple[str, float]]:
    """The sha of each text, and its cosine to the query. Raises Failure where the states of one are damaged."""
    (_, first), (_, last) = texts[0], texts[-1]
    data = memoryview(storage.read_range(first.tar, first.offset, last.offset + last.size - first.offset))
    return [
        (sha, _cosine(query, data[place.offset - first.offset :][: place.size], sha, place)) for sha, place in texts
    ]


def _cosine(query: np.ndarray, data: memoryview, sha: str, place: Stored) -> float:
    if len(data) != place.size or isal_zlib.crc32(data) != place.crc32:
        raise Failure(f"{place.tar}: {sha} is damaged; run `longtake dataset verify`")
    bits = unpacked(data, place.tokens).astype(np.uint32) << 16  # bfloat16 is the upper half of float32
    return float(query @ _unit(bits.view(np.float32).mean(0)))


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _flat(captions: pa.Array, field: str) -> tuple[np.ndarray, Any]:
    """For each caption of N clips the number of its clip, and one of its fields."""
    return np.asarray(pc.list_parent_indices(captions)), pc.struct_field(pc.list_flatten(captions), field)
