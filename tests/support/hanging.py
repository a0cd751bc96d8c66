"""Parts of a script of parts, of which one hangs; processes of their own import it by its name."""

import subprocess
import time
from pathlib import Path
from typing import Any


def work(names: tuple[str, ...], folder: Path, tiny: bool, connection: Any) -> None:
    """A "good" part has a result. Others hang, beside two processes, of which one leads a group of its own.

    The folder gets a file for each of those, named by its number.
    """
    connection.send({})
    for name in names:
        if name == "good":
            connection.send({"of": name})
            continue
        for own_group in (False, True):
            child = subprocess.Popen(["sleep", "600"], start_new_session=own_group)
            (folder / str(child.pid)).touch()
        time.sleep(600)
