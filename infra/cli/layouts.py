"""`longtake dataset export | import`: views in the layouts of other tools, and theirs as manifests."""

import click

from longtake.datasets.masking import shown
from longtake.infra.cli.dataset import dataset
from longtake.pipeline.layouts import LAYOUTS

_LAYOUT = click.option("--layout", required=True, type=click.Choice(list(LAYOUTS)), help="See below.")


@dataset.command("export")
@click.argument("url")
@_LAYOUT
@click.option("--to", required=True, metavar="FOLDER", help="A new folder, or one that a stopped export has begun.")
@click.option("--view", metavar="URL", help="Only the clips that a view keeps (views/NAME.parquet).")
@click.option("--captions", metavar="COLUMN", help="caption-DIGEST, where the dataset has several.")
@click.option(
    "--scores",
    multiple=True,
    metavar="RECORD",
    help="What a `score` or `cluster` stage has made, or all; may be repeated. None without it.",
)
def export_layout(
    url: str, layout: str, to: str, view: str | None, captions: str | None, scores: tuple[str, ...]
) -> None:
    """Write the clips of DATASET for another tool, with their captions, labels and scores.

    Clips are copied as they are, not coded again. A stopped export goes on with the same command.

    \b
      webdataset    SPLIT-SHARD.tar with KEY.mp4, KEY.json and KEY.txt, a caption
      huggingface   SPLIT/SHARD/ with KEY.mp4 and metadata.jsonl: load_dataset("videofolder", data_dir=FOLDER)
      lance         clips.lance, a row a clip, its mp4 a blob; scores as scores.NAME.FIELD, vectors too
      lerobot       LeRobot v3.0: a clip is an episode of one camera, its captions are tasks; of one size and frame rate
    """
    from longtake.infra.browse.columns import shown as columns_of
    from longtake.pipeline.layouts import chosen

    columns = columns_of(url, scores) if scores else None
    for note in columns.notes if columns else ():
        click.echo(f"note: {shown(note)}", err=True)
    counts = chosen.write(chosen.choose(url, view, captions, columns.columns if columns else None), layout, to)
    click.echo(f"{counts['clips']} clips of {counts['shards']} shards in {shown(to)}")


@dataset.command("import")
@click.argument("folder")
@_LAYOUT
@click.option("--to", required=True, metavar="MANIFEST", help="A file that ends in .jsonl.")
def import_layout(folder: str, layout: str, to: str) -> None:
    """Write a manifest of the videos in FOLDER, with their captions and labels, for the sources of a `shard` stage.

    \b
      webdataset    tars below FOLDER; their videos are unpacked to MANIFEST-videos/
      huggingface   videos with metadata.jsonl or metadata.csv, as `videofolder` has them; they stay where they are
      lance         Lance datasets below FOLDER with a column of videos; these are unpacked to MANIFEST-videos/
      lerobot       LeRobot v3.0; a video of several episodes is cut, without coding again, to MANIFEST-videos/
    """
    from longtake.pipeline.layouts import chosen

    count = chosen.write_manifest(folder, layout, to)
    click.echo(f"{count} videos in {shown(to)}; name it in the `sources` of a `shard` stage")
