"""`longtake browse`: a page to look through a dataset."""

import click

from longtake.datasets.masking import shown


@click.command()
@click.argument("url", metavar="DATASET")
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Where to listen; any free port without it.")
@click.option(
    "--view",
    "views",
    multiple=True,
    metavar="NAME",
    help="A view to show, by name or URL; may be repeated. All without it.",
)
@click.option(
    "--scores",
    multiple=True,
    metavar="RECORD",
    help="What a `score` or `cluster` stage has made, or all; all without it.",
)
@click.option(
    "--encoder", metavar="FOLDER", help="Where the encoder of a column is, to search by text, if not there still."
)
@click.option("--write", is_flag=True, help="Let the page save views beside the shards.")
@click.option("--no-open", is_flag=True, help="Print the address alone, and open no browser.")
def browse(
    url: str,
    port: int,
    views: tuple[str, ...],
    scores: tuple[str, ...],
    encoder: str | None,
    write: bool,
    no_open: bool,
) -> None:
    """Look through the clips of DATASET in the browser: play, filter, sort, compare views, and save a new one.

    The page is served by this command until Ctrl-C, from the shards as they are: nothing is copied, and without --write
    nothing is written. It answers this machine alone, and only to a browser that was given the address that is printed: its
    token is the key.

    \b
      longtake browse runs/mine/shards/1a2b3c4d5e6f        all clips, views and scores
      longtake browse DATASET --view chosen --view old     two views, to compare
      longtake browse DATASET --write                      with "save as view"

    On another machine, choose a port and take the same one at both ends of a tunnel:

    \b
      there  longtake browse DATASET --port 8642 --no-open
      here   ssh -N -L 8642:127.0.0.1:8642 there
             then open the address that is printed there

    Handles in a histogram are a view's rules. "Save as view" runs `curate` with them, and the page shows the lines that
    make the same view in a recipe.
    """
    import secrets
    from contextlib import suppress
    from dataclasses import replace

    from longtake.datasets.errors import UserError
    from longtake.infra.browse import columns, library, server

    try:
        from longtake.infra.browse.app import application
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("longtake"):
            raise
        raise UserError(f"browse: the package {e.name} is missing; run: pip install 'longtake[curation]'") from e

    with server.listening(port) as listener:
        books = library.load(url, views or None, scores or ("all",))
        if encoder is not None:
            books = replace(books, shown=columns.with_encoder(books.shown, encoder))
        for note in books.shown.notes:
            click.echo(f"note: {shown(note)}", err=True)
        port, token, ticket = listener.getsockname()[1], secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        guard = application(books, port, token, write)
        address = f"http://{server.HOST}:{port}/?token="
        click.echo(f"{books.clips} clips of {shown(url)}; Ctrl-C ends this")
        click.echo(f"{address}{token}")
        # others on this machine can see what a browser is started with: a ticket lets in once
        guard.tickets.add(ticket)
        if no_open or not server.open_page(f"{address}{ticket}"):
            guard.tickets.clear()
            if not no_open:
                click.echo("no browser here; open the address above", err=True)
        # a Ctrl-C that comes while it answers ends it without the exception
        with suppress(KeyboardInterrupt):
            server.server_of(guard).run(sockets=[listener])
        click.echo("closed")
