"""A stand-in for the dashboard of a Ray cluster: its jobs do nothing but say what a test makes them say."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

TOKEN = "f00dfeed" * 4


def node(**resources: float) -> dict[str, Any]:
    return {"node_id": "1", "state": "ALIVE", "labels": {"zone": "eu"}, "resources_total": resources}


class Dashboard:
    """Serves on a free port of this machine, in a thread, until `close`."""

    def __init__(self) -> None:
        self.version = "2.60.0"
        self.token: str | None = None
        self.nodes = [node(CPU=4.0, memory=8e9)]
        self.jobs: dict[str, dict[str, Any]] = {}
        self.posted: list[dict[str, Any]] = []
        self.packages: dict[str, bytes] = {}
        self.logs: dict[str, str] = {}
        self.cuts: list[int] = []  # characters after which the next connections to a log break
        self.connections = 0
        self.endless = False  # the log goes on
        self.starting = 0  # submissions to answer as a head that has just been started
        self.lose_race: dict[str, Any] | None = None  # the job that another submission has started first
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()

    def job(self, name: str, status: str, **more: Any) -> None:
        base = {"type": "SUBMISSION", "submission_id": name, "entrypoint": "x", "status": status}
        self.jobs[name] = base | {"start_time": len(self.jobs) + 1} | more

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 26)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/v0/nodes", self._nodes)
        app.router.add_get("/api/packages/{protocol}/{name}", self._package)
        app.router.add_put("/api/packages/{protocol}/{name}", self._upload)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{job}", self._info)
        app.router.add_get("/api/jobs/{job}/logs", self._log)
        app.router.add_get("/api/jobs/{job}/logs/tail", self._tail)
        app.router.add_post("/api/jobs/{job}/stop", self._stop)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    @web.middleware
    async def _guard(self, request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> Any:
        if self.token:
            given = request.headers.get("Authorization")
            if given is None:
                return web.Response(status=401, text="Unauthorized: Missing authentication token")
            if given != f"Bearer {self.token}":
                return web.Response(status=403, text="Forbidden: Invalid authentication token")
        return await handler(request)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self.version, "ray_commit": "", "session_name": ""})

    async def _nodes(self, _: web.Request) -> web.Response:
        return web.json_response({"result": True, "msg": "", "data": {"result": {"result": self.nodes}}})

    async def _package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _upload(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        given = json.loads(await request.text())
        name = given["submission_id"]
        if self.starting:
            self.starting -= 1
            return web.Response(status=500, text="No available agent to submit job, please try again later.")
        if self.lose_race is not None:
            self.job(name, **self.lose_race)
        if name in self.jobs:
            return web.Response(
                status=500, text=f"Traceback\nValueError: Job with submission_id {name} already exists."
            )
        self.posted.append(given)
        self.job(name, "SUCCEEDED", driver_exit_code=0)
        return web.json_response({"job_id": name, "submission_id": name})

    async def _info(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["job"])
        return web.json_response(job) if job else web.Response(status=404, text="Job does not exist")

    async def _log(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": self.logs.get(request.match_info["job"], "")})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        self.connections += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        text = self.logs.get(request.match_info["job"], "")
        if self.cuts:
            await socket.send_str(text[: self.cuts.pop(0)])
            assert request.transport
            request.transport.abort()
            return socket
        for line in text.splitlines(keepends=True):
            await socket.send_str(line)
        while self.endless:
            await asyncio.sleep(0.1)
        return socket

    async def _stop(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["job"]]["status"] = "STOPPED"
        return web.json_response({"stopped": True})
