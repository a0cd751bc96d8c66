"""What this code makes, as digests: of every tar of a folder of videos, and of the weights of seeded tiny trainings.

    python -P tests/benchmarks/fingerprints.py WORKSPACE --videos FOOTAGE > before.json

Run it at two commits on the same machine: a change that is to change nothing gives the same output. An autoencoder with a
GAN, a prior of pixels, and both stages of a memory are trained, each at ZeRO 0 to 3, by one process.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

TINY = {"steps": 12, "batch": 4, "ema_half_lives": [4], "precision": "fp32"}
MEMORY = {"preset": "memory_dit_tiny", "rates": ["4x4x1"], "branches": "high"}


def recipe(workspace: Path, videos: str) -> dict:
    """All that is made, as a recipe."""
    stages: dict = {
        "shards": {
            "kind": "shard",
            "sources": [videos],
            "clip": {"short_side": 64, "fps": 12, "max_seconds": 10},
            "val_fraction": 0.25,
        },
    }
    for stage in range(4):
        common = TINY | {"dataset": "shards", "zero_stage": stage}
        stages[f"vae{stage}"] = common | {
            "kind": "pretrain_vae", "name": f"vae{stage}", "model": {"preset": "pv_vae_tiny"}, "frames": 9,
            "sizes": [[64, 64]], "lambda_gan": 0.5, "gan_start": 3, "gan_warmup": 3, "eval_clips": 2, "eval_long": 0,
            "discriminator": {"preset": "patchgan", "width": 16},
        }  # fmt: skip
        stages[f"latte{stage}"] = common | {
            "kind": "finetune_latte", "name": f"latte{stage}", "model": {"preset": "latte_tiny"}, "frames": 5,
            "size": [64, 64], "eval_clips": 2, "eval_videos": 1, "sample_steps": 2,
        }  # fmt: skip
        if not stage:
            stages["latents"] = {"kind": "cache_latents", "dataset": "shards", "encoder": "vae0"}
        memory = common | {"latents": "latents", "model": MEMORY, "frames": 9, "history_seconds": 2, "eval_clips": 2}
        memory |= {"sample_steps": 2}
        stages[f"memory{stage}"] = memory | {"kind": "pretrain_memory", "name": f"memory{stage}"}
        stages[f"prior{stage}"] = memory | {
            "kind": "finetune_memory_prior", "name": f"prior{stage}", "eval_videos": 1, "eval_segments": 1,
        }  # fmt: skip
    return {"name": "fingerprints", "workspace": str(workspace), "stages": stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--videos", required=True)
    given = parser.parse_args()
    workspace = given.workspace.absolute()
    workspace.mkdir(parents=True, exist_ok=True)
    path = workspace / "fingerprints.yaml"
    path.write_text(yaml.safe_dump(recipe(workspace, str(Path(given.videos).absolute())), sort_keys=False))
    command = [str(Path(sys.executable).with_name("longtake")), "run", str(path)]
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})

    made = {}
    for tar in sorted(workspace.glob("shards/*/*/*.tar")):
        made["/".join(tar.parts[-2:])] = hashlib.sha256(tar.read_bytes()).hexdigest()
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{workspace}/mlflow.db"
    import mlflow

    for model in sorted(mlflow.MlflowClient().search_registered_models(), key=lambda m: m.name):
        version = mlflow.MlflowClient().search_model_versions(f"name = '{model.name}'")[0]
        made[f"models:/{model.name}"] = version.tags["sha256"]
    print(json.dumps(made, indent=2))


if __name__ == "__main__":
    main()
