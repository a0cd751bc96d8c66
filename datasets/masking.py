"""What of an address may be printed, logged and kept."""

import re

# the second: a password with a slash in it, which is no port
_LOGIN = re.compile(r"""://(?:[^/@\s"']+|[^/@\s"':]+:(?!\d+[/?#])[^@\s"']+)@""")
_SECRET = re.compile(
    r"""(?i)(?<=[?&;])([\w.-]*(?:password|passwd|pwd|secret|token|signature|credential|api_?key|accesskeyid)[\w.-]*|sig)=[^&\s"']+"""
)


def shown(text: str) -> str:
    """A URL, or a text with URLs, as it may be printed and kept: without passwords and signatures."""
    return _SECRET.sub(r"\1=***", _LOGIN.sub("://***@", text))
