"""Commands about data: footage, dataset ls | sources | show | alike | captions | verify | diff | compact | index | report."""

from typing import Any

import click

from longtake.datasets.masking import shown, shown_within
from longtake.infra.cli.alike import alike
from longtake.infra.worlds import WORLDS

_DIFF_LINES, _MAKERS = 20, 4
_PICTURES = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}  # by their first bytes


@click.command()
@click.argument("folder")
@click.option("--count", default=12, show_default=True, help="Number of videos.")
@click.option("--seconds", type=float, help="Length of each; 12 by default. Worlds have options of their own.")
@click.option("--seed", default=0, show_default=True, help="The same seed makes the same footage.")
@click.option("--world", metavar="NAME", help=f"Videos made for one question: {', '.join(sorted(WORLDS))}.")
@click.option("--heldout", type=float, help="Share of a world's videos of held-out combinations; 0.2 by default.")
@click.option(
    "--option", "changes", multiple=True, metavar="KEY=VALUE", help="An option of the world; may be repeated."
)
def footage(
    folder: str,
    count: int,
    seconds: float | None,
    seed: int,
    world: str | None,
    heldout: float | None,
    changes: tuple[str, ...],
) -> None:
    """Make test footage in FOLDER, with its ground truth.

    The videos have moving objects and cameras, cuts, fades and stills. Those of a world show one thing that can be judged,
    and combinations of what they show are held out; `shard` puts those into `val`, for a val_fraction from 0.02 to 0.5.
    """
    from longtake.datasets.errors import UserError
    from longtake.infra.cli.evaluate import folder_of

    folder_of("FOLDER", folder)
    if world is None:
        from longtake.infra.footage import generate

        if heldout is not None or changes:
            raise UserError(f"{'--heldout' if heldout is not None else '--option'}: is of worlds; add --world NAME")
        paths = generate(folder, count, seed, 12.0 if seconds is None else seconds)
    else:
        from longtake.infra.worlds import load, write

        if seconds is not None:
            raise UserError("--seconds: worlds have options of their own; use --option KEY=VALUE")
        options = write.options_of(world, load(write.known(world)), _options(changes))
        paths = write.generate(folder, world, count, seed, 0.2 if heldout is None else heldout, **options)
    click.echo(f"{len(paths)} videos in {folder}, their ground truth in *.truth.json, captions in captions.jsonl")


def _options(changes: tuple[str, ...]) -> dict[str, Any]:
    """The options of KEY=VALUE, values as in JSON, or texts."""
    import json

    from longtake.datasets.errors import UserError

    options: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"--option {change}: write KEY=VALUE")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options


@click.group()
def dataset() -> None:
    """Inspect and check a dataset. DATASET is a folder or any fsspec URL with a dataset.json."""


dataset.add_command(alike)


@dataset.command()
@click.argument("url")
def ls(url: str) -> None:
    """The sources, clips, shards, sound, captions and scores of DATASET; the account always adds up."""
    from longtake.datasets import audio, captions, index, score_columns

    description = index.describe(url)
    totals = index.summary(url)
    clip = description["clip"]
    clips = f"clips of short side {clip['short_side']} at {clip['fps']:g} fps"
    click.echo(f"{shown(url)}: format {description['format']}, {description.get('kind') or clips}")
    rejected = ", ".join(f"{n} {reason}" for reason, n in totals["rejected_by_reason"].items())
    click.echo(
        f"sources  {totals['sources']} = {totals['sources_good']} good + {totals['sources_rejected']} rejected"
        + (f" ({rejected})" if rejected else "")
    )
    click.echo(
        f"clips    {totals['clips']} ({totals['clip_seconds']:.1f} s); {totals['clips_dropped_short']} pieces were too short"
    )
    click.echo(f"shards   {totals['shards']} ({totals['tar_bytes'] / 1e6:.1f} MB)")
    if sound := audio.count(url):
        click.echo(f"sound    {sound.with_sound} of {sound.clips} clips have sound")
    for column in captions.columns_of(url):
        click.echo(f"captions {_captioned(captions.overview(url, column))}: {column}")
    for column in score_columns.columns_of(url):
        # a line for all fields of as many clips
        counts = score_columns.counts(url, column)
        for count in sorted(set(counts.values()), reverse=True):
            names = ", ".join(name for name, clips in counts.items() if clips == count)
            click.echo(f"scores   {names} of {count} of {totals['clips']} clips: {column}")


def _captioned(overview: Any) -> str:
    """How many clips have captions, and who made most of them."""
    from longtake.datasets import storage

    most = overview.makers.most_common(_MAKERS)
    makers = ", ".join(f"{count} by {shown(storage.printable(maker))}" for maker, count in most)
    if (rest := overview.makers.total() - sum(count for _, count in most)) > 0:
        makers += f", {rest} by {len(overview.makers) - len(most)} others"
    return f"of {overview.clips - overview.without} of {overview.clips} clips" + (f" ({makers})" if makers else "")


@dataset.command("captions")
@click.argument("url")
@click.option("--column", metavar="NAME", help="caption-DIGEST, where the dataset has several.")
@click.option("--most", default=20, show_default=True, type=click.IntRange(1), help="Words and sources to list.")
def captions_of(url: str, column: str | None, most: int) -> None:
    """The captions of DATASET in numbers: who made them, which clips have none and why, the most common words.

    Of the sources those are listed that have the most clips without captions.
    """
    from longtake.datasets import captions, index, storage
    from longtake.datasets.errors import UserError

    index.describe(url)
    columns = captions.columns_of(url)
    if not columns:
        raise UserError(f"{url}: has no captions; run a `caption` stage")
    if column is None and len(columns) > 1:
        raise UserError(f"{url}: has {', '.join(columns)}; choose one by --column")
    found = captions.overview(url, column or columns[0])
    click.echo(f"captions {_captioned(found)}")
    for reason, count in found.reasons.most_common():
        click.echo(f"without  {count} {reason}")
    worst = sorted(found.sources.items(), key=lambda pair: (-pair[1][1], pair[0]))
    for uri, (clips, without) in worst[:most]:
        if without:
            click.echo(shown(f"source   {without / clips:.0%} without, {without} of {clips}: {storage.printable(uri)}"))
    for word, count in sorted(found.words.items(), key=lambda pair: (-pair[1], pair[0]))[:most]:
        click.echo(f"word     {count} {word}")


@dataset.command()
@click.argument("url")
@click.option("--rejected", is_flag=True, help="Only sources without clips.")
def sources(url: str, rejected: bool) -> None:
    """A line for each source of DATASET: status, clips, reason, URI."""
    from longtake.datasets import index, storage

    index.describe(url)
    for row in index.read_sources(url).to_pylist():
        if not (rejected and row["status"] == "good"):
            facts = [row["status"], str(row["clips"]), row["reason"] or "-", row["uri"], row["detail"] or ""]
            click.echo(shown("\t".join(storage.printable(fact) for fact in facts).rstrip()))


@dataset.command()
@click.argument("url")
@click.argument("key")
@click.option("--save", metavar="FOLDER", help="Write the members there, the video with its sound, to play them.")
def show(url: str, key: str, save: str | None) -> None:
    """The index row, JSON, sound, captions and scores of one sample of DATASET, and the place of its bytes."""
    import json
    from pathlib import Path

    import pyarrow.compute as pc
    from isal import isal_zlib

    from longtake.datasets import audio, captions, clip, compact, index, later, schema, score_columns, storage
    from longtake.datasets.errors import Failure, UserError
    from longtake.datasets.shard import described

    def member(split: str, name: str, offset: int, size: int, crc32: int) -> bytes:
        tar = storage.join(url, split, f"{name}.tar")
        try:
            data = storage.read_range(tar, offset, size)
        except FileNotFoundError as e:
            raise Failure(f"{tar}: is missing; run `longtake dataset verify`") from e
        if len(data) != size or crc32 != isal_zlib.crc32(data):
            raise Failure(f"{tar}: {key} is damaged; run `longtake dataset verify`")
        return data

    def column_row(split: str, shard: str, column: str) -> dict[str, Any]:
        name = f"{shard}.{column}"
        if name not in index.shard_names(url, split, column):
            return {}
        table = index.read_shard(url, split, name).table
        return next(iter(table.filter(pc.equal(table["key"], key)).to_pylist()), {})

    def place_of(row: dict[str, Any]) -> tuple[int, int, int]:
        return row["offset"], row["size"], row["crc32"]

    index.describe(url)
    for split in schema.SPLITS:
        table = compact.table(url, split)
        for row in table.filter(pc.equal(table["key"], key)).to_pylist():
            place = row["json_offset"], row["json_size"], row["json_crc32"]
            text = member(split, row["shard"], *place) if row["json_size"] else b""
            facts = later.sample(described(text), later.of_clips(url, split, row["shard"]), row["source"])
            texts, sound = captions.of_key(url, split, row["shard"], key), column_row(split, row["shard"], audio.COLUMN)
            about = {"tar": storage.join(url, split, f"{row['shard']}.tar"), "json": facts}
            about |= ({"audio": sound} if sound else {}) | ({"captions": texts} if texts else {})
            if values := score_columns.of_key(url, split, row["shard"], key):
                about["scores"] = {column: _in_short(fields) for column, fields in values.items()}
            click.echo(json.dumps(shown_within(row | about), indent=2))
            if save is None:
                return
            folder = Path(save)
            with storage.failing_clearly(save):
                folder.mkdir(parents=True, exist_ok=True)
                mp4 = member(split, row["shard"], row["mp4_offset"], row["mp4_size"], row["mp4_crc32"])
                ending = next((ending for start, ending in _PICTURES.items() if mp4.startswith(start)), "mp4")
                (folder / f"{key}.{ending}").write_bytes(mp4)
                (folder / f"{key}.json").write_text(json.dumps(facts))
            if sound and sound["has_audio"]:
                heard = member(split, f"{row['shard']}.{audio.COLUMN}", *place_of(sound))
                (folder / f"{key}.{audio.ENDING}").write_bytes(heard)
                samples = audio.decode(heard, 0, sound["samples"], sound["channels"], key)
                clip.write_with_sound(folder / f"{key}.mp4", mp4, samples, sound["rate"])
            if diff := column_row(split, row["shard"], "frame_diff"):
                packed = member(split, f"{row['shard']}.frame_diff", *place_of(diff))
                # twice as large, since H.264 needs even sides
                difference = clip.unpack_array(packed, f"{key} (frame_diff)").repeat(2, 1).repeat(2, 2)
                clip.write(folder / f"{key}.frame_diff.mp4", difference, round(row["fps"]))
            click.echo(f"saved in {folder}", err=True)
            return
    raise UserError(f"{url}: no sample {key}; `longtake dataset sources` lists the sources that keys begin with")


def _in_short(values: dict[str, Any]) -> dict[str, Any]:
    """Values of a clip, of a vector only its shape."""
    import numpy as np

    shapes = {name: np.shape(value) for name, value in values.items() if isinstance(value, list)}
    return values | {name: f"{' x '.join(map(str, shape))} numbers" for name, shape in shapes.items()}


@dataset.command()
@click.argument("url")
@click.option("--threads", default=8, show_default=True, type=click.IntRange(1), help="Tars read at once.")
def verify(url: str, threads: int) -> None:
    """Hash all of DATASET again and compare it with its indexes, sources and plan.

    Each problem is a line with its remedy. Exit code 1 if there is any.
    """
    from tqdm import tqdm

    from longtake.datasets import index
    from longtake.datasets import verify as check
    from longtake.datasets.errors import Failure

    index.describe(url)
    problems = 0
    with tqdm(desc="verify", total=check.tar_bytes(url), unit="B", unit_scale=True) as bar:
        for problem in check.verify(url, threads, bar.update):
            problems += 1
            bar.write(shown(problem))
    tars = len(check.tars(url))
    if problems:
        raise Failure(f"{url}: {problems} problem{'s' if problems > 1 else ''} in {tars} tars")
    click.echo(f"{shown(url)}: {tars} tars are what their indexes say, and all counts add up")


@dataset.command()
@click.argument("a")
@click.argument("b")
def diff(a: str, b: str) -> None:
    """The differences between the datasets A and B: clip settings, sources, clips, counts.

    Reads indexes only. Exit code 0 if they hold the same, 1 if not.
    """
    from longtake.datasets.diff import differences

    kinds = differences(a, b)
    for kind, lines in kinds.items():
        click.echo(f"{kind}: {len(lines)}")
        for line in lines[:_DIFF_LINES]:
            click.echo(f"  {shown(line)}")
        if len(lines) > _DIFF_LINES:
            click.echo(f"  and {len(lines) - _DIFF_LINES} more")
    if kinds:
        raise click.exceptions.Exit(1)
    click.echo("the same sources, the same clips")


@dataset.command()
@click.argument("url")
def compact(url: str) -> None:
    """Merge the many small indexes of DATASET and of its scores into one file a split each, so that it opens fast.

    The indexes stay as they are. Shards that are newer than the merged file are read from their own indexes.
    """
    from longtake.datasets import compact as folded
    from longtake.datasets import index, schema, score_columns

    index.describe(url)
    columns = score_columns.columns_of(url)
    for split in schema.SPLITS:
        click.echo(f"{split}: {folded.write(url, split)} shards")
        for column in columns:
            folded.write(url, split, column)
    for column in columns:
        click.echo(f"scores: {column}")


@dataset.command("index")
@click.argument("url")
@click.argument("tars", nargs=-1)
@click.option(
    "--val-fraction", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="Share of TARS for val."
)
@click.option("--threads", default=8, show_default=True, type=click.IntRange(1), help="Tars read at once.")
def index_images(url: str, tars: tuple[str, ...], val_fraction: float, threads: int) -> None:
    """Make a DATASET of plain WebDataset tars of images, for training alone or beside videos.

    The tars are in URL/train/ and URL/val/ and stay as they are. Each is read once, and an index is written beside it. TARS
    from elsewhere on this machine are linked into URL first. Run it again after adding tars: it reads only the new ones.

    \b
    A sample is all files of a tar with the same name up to the first dot:
      KEY.jpg | .jpeg | .png | .webp   the image
      KEY.json                         an object; its "label" is the label
      KEY.txt                          a caption: {"caption": ...} if there is no .json
      KEY.cls                          the label, in place of that of the .json

    Then `Loader(URL, frames=1, size=(64, 64))` reads it, and `Mixture` joins it with videos at a ratio. Unusable images are
    left out and counted; `longtake dataset sources URL --rejected` lists them. Exit code 1 if a tar is damaged.
    """
    from longtake.datasets import images
    from longtake.datasets.errors import Failure

    counts = images.adopt(url, tars, val_fraction, threads)
    for split, count in counts.items():
        left_out = ", ".join(f"{n} {reason}" for reason, n in count.left_out.items())
        click.echo(
            f"{split:<6} {count.images} images in {count.tars} tars, {count.new} of them new"
            f"; left out: {left_out or 'none'}" + (f"; odd: {count.odd}" if count.odd else "")
        )
    failed = [f"{tar}: {error}" for count in counts.values() for tar, error in count.failed.items()]
    for line in failed:
        click.echo(shown(line))
    if failed:
        raise Failure(
            f"{url}: {len(failed)} tar{'s' if len(failed) > 1 else ''} not indexed; replace or delete, then run again"
        )


@dataset.command()
@click.argument("url")
@click.option("--view", metavar="NAME", help="A view, by its name or URL, to tell kept clips from dropped ones.")
@click.option("--to", default="dataset-report", show_default=True, metavar="FOLDER", help="Where to write.")
def report(url: str, view: str | None, to: str) -> None:
    """Write report.html of DATASET: the account of its inputs, contact sheets, histograms.

    Prints the account; exit code 1 if it does not add up.
    """
    from pathlib import Path

    from longtake.datasets.errors import Failure
    from longtake.datasets.view import address
    from longtake.infra.report import build_of_dataset

    page, lines = build_of_dataset(Path(to), url, address(url, view) if view else None)
    for line in lines:
        click.echo(f"{line.total} {line.name} = " + " + ".join(f"{part.count} {part.name}" for part in line.parts))
    click.echo(page)
    if any(line.difference for line in lines):
        raise Failure(f"{url}: the account does not add up; run the `shard` stage again, then `curate`")
