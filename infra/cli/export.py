"""`longtake export`: a fine-tuned model in the layout of another tool."""

import sys
from pathlib import Path

import click

from longtake.datasets.errors import UserError
from longtake.infra.cli import media


@click.command()
@click.argument("model")
@click.option(
    "--format",
    "layout",
    required=True,
    type=click.Choice(["diffusers", "peft", "comfyui"]),
    help="diffusers: a whole pipeline; peft, comfyui: the adapter of a training with `lora`.",
)
@click.option("--to", required=True, metavar="FOLDER", help="A new folder.")
@click.option(
    "--base",
    metavar="PIPELINE",
    help="The pipeline whose other parts come with it: a folder, or a registered one. [default: what it was trained from]",
)
@click.option(
    "--link",
    is_flag=True,
    help="Hard-link the other parts' weights: no space, but who rewrites one changes the base too.",
)
def export(model: str, layout: str, to: str, base: str | None, link: bool) -> None:
    """Write MODEL, fine-tuned from another library's, as diffusers, PEFT or ComfyUI load it, into a new folder.

    MODEL is in the registry (models:/wan-ft@champion) or, for --format diffusers, a model folder. Models of this project's
    own families have a layout of their own: `longtake models pull` gives their folder.

    \b
      diffusers   a pipeline folder with the merged weights: WanPipeline.from_pretrained(FOLDER)
      peft        adapter_model.safetensors with adapter_config.json: PeftModel.from_pretrained(transformer, FOLDER); and
                  pytorch_lora_weights.safetensors: pipeline.load_lora_weights(FOLDER)
      comfyui     comfyui_lora.safetensors, by the names of the model's authors: copy it to models/loras

    Adapters are written in fp32, with their alpha in the weights: strength 1 is what was trained. Of two experts, each has
    an adapter of its own: load_lora_weights(FOLDER, load_into_transformer_2=True) is that of the low-noise one.

    \b
    Examples:
      longtake export models:/wan-ft@champion --format diffusers --to wan-ft
      longtake export models:/wan-ft@champion --format comfyui --to lora
      longtake export models:/low@champion --format diffusers --base high-ft --to both     # of two experts
    """
    media.check_registry(model)
    if layout != "diffusers" and (base or link):
        raise UserError(f"{'--base' if base else '--link'}: an adapter has no other parts; leave it out")
    from longtake.training.foreign import export as out

    out.check_free(Path(to))
    found = out.found(model)
    if layout == "diffusers":
        from tqdm import tqdm

        plan = out.planned(found, base)
        with tqdm(desc="export", total=plan.size, unit="B", unit_scale=True, mininterval=_interval()) as bar:
            out.write_pipeline(plan, Path(to), link, bar.update)
    else:
        out.write_adapter(found, "peft" if layout == "peft" else "comfyui", Path(to))
    click.echo(to)


def _interval() -> float:
    """Seconds between lines of progress."""
    return 0.2 if sys.stderr.isatty() else 15.0
