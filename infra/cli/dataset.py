"""Commands about data: footage, dataset ls | sources | show | verify."""

import click


@click.command()
@click.argument("folder")
@click.option("--count", default=12, show_default=True, help="Videos to make.")
@click.option("--seconds", default=12.0, show_default=True, help="Length of each.")
@click.option("--seed", default=0, show_default=True, help="The same seed makes the same footage.")
def footage(folder: str, count: int, seconds: float, seed: int) -> None:
    """Make test footage in FOLDER: moving objects and cameras, cuts, fades, stills, with the ground truth beside it."""
    from longtake.datasets.footage import generate

    paths = generate(folder, count, seed, seconds)
    click.echo(f"{len(paths)} videos in {folder}, their ground truth in *.truth.json")


@click.group()
def dataset() -> None:
    """Look at a dataset and check it. DATASET is a folder or any fsspec URL with a dataset.json."""


@dataset.command()
@click.argument("url")
def ls(url: str) -> None:
    """What DATASET holds: sources, clips, shards; the account always adds up."""
    from longtake.datasets import index

    described = index.describe(url)
    totals = index.summary(url)
    clip = described["clip"]
    click.echo(f"{url}: format {described['format']}, clips of short side {clip['short_side']} at {clip['fps']:g} fps")
    rejected = ", ".join(f"{n} {reason}" for reason, n in totals["rejected_by_reason"].items())
    click.echo(
        f"sources  {totals['sources']} = {totals['sources_good']} good + {totals['sources_rejected']} rejected"
        + (f" ({rejected})" if rejected else "")
    )
    click.echo(
        f"clips    {totals['clips']} ({totals['clip_seconds']:.1f} s); {totals['clips_dropped_short']} pieces were too short"
    )
    click.echo(f"shards   {totals['shards']} ({totals['tar_bytes'] / 1e6:.1f} MB)")


@dataset.command()
@click.argument("url")
@click.option("--rejected", is_flag=True, help="Only those that gave no clip.")
def sources(url: str, rejected: bool) -> None:
    """A line for each source of DATASET: status, clips, reason, URI."""
    from longtake.datasets import index

    index.describe(url)
    for row in index.read_sources(url).to_pylist():
        if not (rejected and row["status"] == "good"):
            click.echo(
                "\t".join(
                    [row["status"], str(row["clips"]), row["reason"] or "-", row["uri"], row["detail"] or ""]
                ).rstrip()
            )


@dataset.command()
@click.argument("url")
@click.argument("key")
def show(url: str, key: str) -> None:
    """The index row and JSON of one sample of DATASET, and where its bytes lie."""
    import json

    from longtake.datasets import index, schema, storage
    from longtake.datasets.errors import UserError

    index.describe(url)
    for split in schema.SPLITS:
        for row in index.read_all(url, split).to_pylist():
            if row["key"] == key:
                tar = storage.join(url, split, f"{row['shard']}.tar")
                click.echo(
                    json.dumps(
                        row
                        | {
                            "tar": tar,
                            "json": json.loads(storage.read_range(tar, row["json_offset"], row["json_size"])),
                        },
                        indent=2,
                    )
                )
                return
    raise UserError(f"{url}: no sample {key}; `longtake dataset sources` lists the sources that keys begin with")


@dataset.command()
@click.argument("url")
def verify(url: str) -> None:
    """Hash every tar of DATASET again and compare with its index; exit code 1 and a line for each that differs."""
    from tqdm import tqdm

    from longtake.datasets import index
    from longtake.datasets.errors import Failure
    from longtake.datasets.verify import problems, tars

    index.describe(url)
    names = tars(url)
    found = []
    for name in tqdm(names, "verify", unit="tar"):
        for problem in problems(url, name):
            found.append(problem)
            click.echo(problem)
    if found:
        raise Failure(f"{url}: {len(found)} problems in {len(names)} tars")
    click.echo(f"{url}: {len(names)} tars are what their indexes say")
