"""Hard cuts in labelled real footage: the share of those found that one sees, and of those that one sees, the found.

    python tests/benchmarks/bench_cuts.py FOLDER [--turns 1]

FOLDER has the files of `tests/pipeline/labels_cuts.json`, whose cuts were labelled by looking. They are cut as `shard` cuts
them at their own frame rate. The targets are a precision and a recall of 0.95. Nothing here is drawn or timed: all is
measured once, and each turn has the same figures.
"""

import argparse
import json
import sys
from pathlib import Path

import figures

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import labelled_cuts

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    figures.add_option(parser, turns=1)
    arguments = parser.parse_args()
    if missing := [name for name in labelled_cuts.LABELS if not (arguments.folder / name).is_file()]:
        figures.unable(
            f"{arguments.folder}: has no {missing[0]}, whose cuts are labelled, and lacks {len(missing)} in all"
        )
    hits, wanted, made = labelled_cuts.judged(arguments.folder, None)
    shares = {"precision": hits / made, "recall": hits / wanted}
    print(json.dumps({"cuts": wanted, "found": hits, "starts of shots": made} | shares))
    figures.write(arguments.figures, {name: [share] * arguments.turns for name, share in shares.items()})
