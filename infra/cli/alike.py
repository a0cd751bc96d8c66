"""`longtake dataset alike`: the clips of a dataset that look most like a clip, a picture or a text."""

from typing import Any

import click

from longtake.datasets.masking import shown


@click.command()
@click.argument("url")
@click.argument("what", required=False)
@click.option("--text", metavar="WORDS", help="Find clips that look like what this says, in place of WHAT.")
@click.option("--column", metavar="NAME", help="score-NAME-DIGEST, where several columns have vectors.")
@click.option(
    "--encoder",
    metavar="FILE|FOLDER",
    help="Where the encoder of the column is. TorchScript, which is code and is run, is opened only if it is named here.",
)
@click.option("--count", default=10, show_default=True, type=click.IntRange(1, 100_000), help="Clips to list.")
@click.option(
    "--probes",
    type=click.IntRange(0),
    metavar="N",
    help="Clusters to search; 0: all clips, exactly. [default: 8 where a `cluster` stage has made some]",
)
def alike(
    url: str,
    what: str | None,
    text: str | None,
    column: str | None,
    encoder: str | None,
    count: int,
    probes: int | None,
) -> None:
    """The clips of DATASET that look most like WHAT: a clip's key, or a picture's file. The clip itself is left out.

    Each is a line: the cosine, the split, the key. The vectors are those of an `embedding` scorer. A picture or a text is
    encoded by the folder that the stage's record beside the dataset names, if that is on this machine, else by --encoder.

    \b
    Examples:
      longtake dataset alike DATASET 3f0a…-00002
      longtake dataset alike DATASET beach.jpg --count 50
      longtake dataset alike DATASET --text "a dog runs over grass"
    """
    import numpy as np

    from longtake.datasets import alike as search
    from longtake.datasets import index, storage
    from longtake.datasets.errors import UserError
    from longtake.pipeline import queries

    if (what is None) == (text is None):
        raise UserError("name one of a clip's key, a picture and --text WORDS")
    index.describe(url)
    made, field = _column(url, column)
    if encoder is not None and text is None and not storage.exists(str(what)):
        raise UserError(
            f"--encoder: {shown(str(what))} is no picture's file, so that nothing is to encode; leave it out"
        )
    keep = None
    if text is not None:
        vector = queries.of_text(made, text, encoder)
    elif what is not None and storage.exists(what):
        vector = queries.of_picture(made, field, what, encoder)
    else:
        row, vector = search.vector_of(url, made.column, field, str(what))
        keep = np.ones(sum(clips for *_, clips in search.shards(url)), bool)
        keep[row] = False
    clusters = search.clusters_of(url, made.column, field) if probes != 0 else None
    if probes and clusters is None:
        raise UserError(f"--probes: no clusters of {made.column} in {url}; run a `cluster` stage, or leave it out")
    found = (
        search.approximate(clusters, vector, count, probes or 8, keep)
        if clusters
        else search.exact(url, made.column, field, vector, count, keep)
    )
    for (split, key), cosine in zip(search.keys(url, found.rows), found.cosines.tolist(), strict=True):
        click.echo(shown(f"{cosine:.4f}\t{split}\t{key}"))


def _column(url: str, name: str | None) -> tuple[Any, str]:
    """The column to search, its only one if none is named, and the field of its vectors."""
    from longtake.datasets import alike as search
    from longtake.datasets import score_columns
    from longtake.datasets.errors import UserError
    from longtake.infra.browse import columns

    if name is None:
        made = [score_columns.described(url, column) for column in score_columns.columns_of(url)]
        names = [each.column for each in made if any(field.kind == "vector" for field in each.fields)]
        if len(names) != 1:
            several = f"has {', '.join(names)}; choose one by --column" if names else "has no vectors"
            raise UserError(f"{url}: {several}" + ("" if names else "; run a `score` stage with an `embedding`"))
        name = names[0]
    column = columns.recorded(url, name)
    return column, search.field_of(column).name
