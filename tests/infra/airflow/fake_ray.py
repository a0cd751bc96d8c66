"""Ray's Jobs API as far as it is used, with faults on order."""

import json
import socket
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeRay:
    """Ray's Jobs API with faults: what stands in `faults` happens to the next requests, one each."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.faults: list[str] = []
        self.log = "one\ntwo\n"
        self.token = "secret-of-the-test"
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
                fake.requests.append((self.command, self.path, body))
                fault = fake.faults.pop(0) if fake.faults else ""
                if fault == "drop":
                    return self.hang_up()
                if fault.isdigit():
                    return self.say(int(fault), "Traceback\nsomething went wrong")
                if fault == "redirect":
                    self.send_response(302)
                    self.send_header("Location", f"{fake.address}/elsewhere")
                    self.end_headers()
                    return None
                if fault == "html":
                    return self.say(200, "<html>")
                if self.headers.get("Authorization") != f"Bearer {fake.token}":
                    return self.say(401, "Unauthorized")
                code, text = fake.handle(self.command, urllib.parse.unquote(self.path), body)
                return self.hang_up() if fault == "lose the answer" else self.say(code, text)

            do_GET = do_POST = answer

            def hang_up(self) -> None:
                self.connection.shutdown(socket.SHUT_RDWR)

            def say(self, code: int, text: str) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.address = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
        job = path.removeprefix("/api/jobs/").split("/")[0]
        if method == "POST" and not job:
            name = body["submission_id"]
            if name in self.jobs:
                return 500, f"Traceback\nValueError: Job with submission_id {name} already exists."
            self.jobs[name] = {"status": "RUNNING", "start_time": int(time.time() * 1000)}
            return 200, json.dumps({"submission_id": name})
        if job not in self.jobs:
            return 404, f"Job {job} does not exist"
        if path.endswith("/stop"):
            self.jobs[job]["status"] = "STOPPED"
            return 200, json.dumps({"stopped": True})
        if path.endswith("/logs"):
            return 200, json.dumps({"logs": self.log})
        return 200, json.dumps(self.jobs[job])
