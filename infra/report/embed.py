"""Files inside the page, as data URIs."""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from longtake.datasets import storage

_TYPES = {"svg": "image/svg+xml", "jpg": "image/jpeg", "png": "image/png", "mp4": "video/mp4", "ogg": "audio/ogg"}


def data_uri(kind: str, data: bytes) -> str:
    """The data as a URI; `kind` is the suffix of such files."""
    return f"data:{_TYPES[kind]};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Pictures:
    """The folder with copies of the page's pictures."""

    folder: Path

    def add(self, name: str, data: bytes) -> str:
        """Write a picture under a safe form of its name, and return it as a data URI."""
        storage.write(str(self.folder / re.sub(r"[^\w.-]+", "_", name)), data)
        return data_uri(name.rsplit(".", 1)[1], data)
