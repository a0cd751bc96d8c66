"""The server's socket and its process: on the loopback alone, ended by Ctrl-C."""

import errno
import os
import socket
import sys
import webbrowser
from typing import Any

from longtake.datasets.errors import Failure, UserError

HOST = "127.0.0.1"
_FLIGHT = 256  # requests at once
_LINGER = 2  # seconds that answers have once it is asked to stop


def listening(port: int) -> socket.socket:
    """A socket that listens on the loopback; port 0 takes any that is free. Raises UserError: the port is taken or not ours."""
    # asyncio turns off the waiting for acknowledgements, 40 ms an answer, only where a socket says that it is of TCP
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    # a port whose last connections are just closing is free
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(128)
    except OSError as e:
        listener.close()
        if e.errno in (errno.EADDRINUSE, errno.EACCES):
            why = "is in use" if e.errno == errno.EADDRINUSE else "is for the system alone"
            raise UserError(f"--port: {port} {why}; choose another, or leave it out") from e
        raise Failure(f"{HOST}:{port}: cannot listen there ({e.strerror})") from e
    return listener


def server_of(application: Any) -> Any:
    """A uvicorn server of an application, without a log: its lines would have the token."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            application,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="error",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_FLIGHT,
            timeout_graceful_shutdown=_LINGER,
        )
    )


def open_page(address: str) -> bool:
    """Show an address in the user's browser; False where there is none with windows."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False  # what would open is a browser in this terminal
    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False
