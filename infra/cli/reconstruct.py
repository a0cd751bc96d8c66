"""`longtake reconstruct`: a video through an autoencoder."""

import click

from longtake.datasets.errors import UserError
from longtake.infra.cli import media


@click.command()
@click.argument("model")
@click.argument("video")
@click.option("--out", required=True, metavar="FILE.mp4", help="Where to write.")
@click.option(
    "--visible",
    type=int,
    metavar="N",
    help="The encoder sees the first N frames, 1 + 4n (LTX: 1 + 8n); the others are predicted.",
)
@click.option("--side-by-side", is_flag=True, help="The source on the left, its reconstruction on the right.")
@click.option(
    "--fps",
    type=media.FPS,
    metavar="F",
    help="Frame rate of the file. [default: the video's]",
)
@media.tile_option
@media.precision_option
def reconstruct(
    model: str,
    video: str,
    out: str,
    visible: int | None,
    side_by_side: bool,
    fps: float | None,
    tile: int | None,
    precision: str,
) -> None:
    """Reconstruct VIDEO, of any length, with MODEL, an autoencoder.

    MODEL is in the registry (models:/pv-vae@champion), a model folder, or a folder of diffusers with a VAE. Frames are
    cropped to multiples of its stride, such as 16 pixels, around their middle. The output has no sound. An image is a
    video of one frame.

    \b
    Examples:
      longtake reconstruct models:/pv-vae@champion in.mp4 --out out.mp4 --side-by-side
      longtake reconstruct models:/pv-vae@champion in.mp4 --visible 9 --out predicted.mp4
    """
    media.check_output(out)
    media.check_exists(video)
    media.check_apart(out, [video])
    with media.memory_errors("set --tile 256"):
        import numpy as np
        import torch

        from longtake.training.models.common.codec import load_codec, reconstruct_video
        from longtake.training.models.common.video import video_file

        vae = load_codec(media.check_registry(model))
        vae = vae.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"), media.dtype(precision))
        source, rate, count = media.frames_of(video, vae.config.spatial_stride)
        with media.progress("reconstruct", count or None, "frame") as bar:
            try:
                with video_file(out, fps or rate) as write:
                    for original, copy in reconstruct_video(vae, source, visible, tile):
                        write(np.concatenate([original, copy], axis=2) if side_by_side else copy)
                        bar.update(len(copy))
            except UserError:
                raise
            except ValueError as e:
                raise UserError(f"{video}: {e}") from e
    click.echo(out)
