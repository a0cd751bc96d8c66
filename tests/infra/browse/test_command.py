"""The command: it prints an address that works, and ends by Ctrl-C; what cannot be is one line."""

import http.client
import re
import signal
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner

from longtake.infra.cli import browse as command
from longtake.infra.cli import cli, exit_code


def test_the_address_that_it_prints_works_until_ctrl_c(small):
    arguments = [sys.executable, "-m", "longtake.infra.cli", "browse", small, "--no-open"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().startswith("600 clips of ")
            port, path = re.fullmatch(
                r"http://127\.0\.0\.1:(\d+)(/\?token=\S{40,})\n", process.stdout.readline()
            ).groups()
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
            connection.request("GET", path)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (303, b"")
            connection.request(
                "GET", "/api/dataset", headers={"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}
            )
            assert b'"clips":600' in connection.getresponse().read()
            connection.request("GET", "/api/dataset")
            assert connection.getresponse().status == 403
            connection.close()
        finally:
            process.send_signal(signal.SIGINT)
        rest, wrong = process.communicate(timeout=30)
    assert (process.returncode, rest, wrong) == (0, "closed\n", "")


def told(*arguments, capsys):
    """The exit code and the line of a command that does not begin."""
    code = exit_code(lambda: cli(["browse", *map(str, arguments)], standalone_mode=False))
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def test_what_cannot_be_browsed_is_one_line(small, tmp_path, capsys):
    assert told(tmp_path, capsys=capsys) == (
        2,
        f"error: {tmp_path}: no dataset here (no dataset.json); name the folder that a `shard` stage wrote",
    )
    code, line = told(small, "--view", "clam", capsys=capsys)
    assert code == 2 and "no view clam; there are calm, sharp" in line
    code, line = told(small, "--scores", tmp_path, capsys=capsys)
    assert code == 2 and "no record of scores here" in line


def test_a_port_that_is_in_use_is_one_line(small, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert told(small, "--port", port, capsys=capsys) == (
            2,
            f"error: --port: {port} is in use; choose another, or leave it out",
        )


def test_a_missing_package_is_named_with_the_extra_that_has_it(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "longtake.infra.browse.app", None)
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.delitem(sys.modules, "longtake.infra.browse.app")
    for name in [name for name in sys.modules if name.startswith(("starlette.", "longtake.infra.browse.security"))]:
        monkeypatch.delitem(sys.modules, name)
    code, line = told(small, capsys=capsys)
    assert code == 2 and line.endswith("run: pip install 'longtake[curation]'")


@pytest.mark.parametrize("opens", [True, False])
def test_a_browser_gets_a_ticket_and_the_token_stays_here(small, monkeypatch, opens):
    from longtake.infra.browse import server

    seen, guards = [], []

    class Idle:
        def __init__(self, guard):
            guards.append(set(guard.tickets))

        def run(self, sockets):
            raise KeyboardInterrupt

    monkeypatch.setattr(server, "open_page", lambda address: seen.append(address) or opens)
    monkeypatch.setattr(server, "server_of", Idle)
    result = CliRunner().invoke(command.browse, [small])
    (address,) = seen
    token = address.rpartition("=")[2]
    assert token not in result.output
    assert guards == [{token} if opens else set()]
    assert ("no browser here" in result.stderr) == (not opens)


def test_without_a_screen_no_browser_of_the_terminal_is_started(monkeypatch):
    from longtake.infra.browse import server

    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(server.sys, "platform", "linux")
    monkeypatch.setattr(server.webbrowser, "open", lambda _: pytest.fail("opened"))
    assert not server.open_page("http://127.0.0.1")
