"""Models that are pulled from a registry: fetched once, checked, taken up again, there without the store."""

import hashlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.datasets.errors import Failure, UserError
from longtake.training import registry
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.registry import cache as pull
from longtake.training.registry import disk

DEAD = "http://127.0.0.1:9"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Proxy:
    """A server before the server, which counts what is fetched and breaks connections."""

    def __init__(self, behind: str) -> None:
        self.behind = behind
        self.fetched: list[tuple[str, str | None, int]] = []  # name of a file, the range asked for, bytes sent
        self.break_after: list[int] = []  # bytes, of the next fetches of weights
        self.ranges = True
        self.asked = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                proxy._pass_on(self)

            do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def _pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked += 1
        size = int(handler.headers.get("Content-Length") or 0)
        asked = handler.headers.get("Range") if self.ranges else None
        headers = {k: v for k, v in handler.headers.items() if k in ("Content-Type", "Accept")}
        headers |= {"Range": asked} if asked else {}
        request = urllib.request.Request(
            self.behind + handler.path, handler.rfile.read(size) or None, headers, method=handler.command
        )
        try:
            answer = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as e:
            answer = e
        body = answer.read()
        name = handler.path.partition("?")[0].rsplit("/", 1)[-1]
        handler.send_response(answer.status)
        for key in ("Content-Type", "Content-Range"):
            if answer.headers.get(key):
                handler.send_header(key, answer.headers[key])
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if name.endswith((".safetensors", "config.json", ".pkl")):
            if name.endswith(".safetensors") and self.break_after:
                body = body[: self.break_after.pop(0)]
            self.fetched.append((name, asked, len(body)))
        handler.wfile.write(body)
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def vae() -> PVVAE:
    torch.manual_seed(0)
    return PVVAE(config_from_preset("pv_vae_tiny")).eval()


def saved(vae: PVVAE, folder: Path, **facts: Any) -> Path:
    disk.save(folder, "pv_vae", vae.config.model_dump(mode="json"), vae.state_dict(), {"lineage": {}} | facts)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An MLflow server that serves its artifacts, and the folder where these lie."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(1200):
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", folder / "artifacts"
    finally:
        os.killpg(process.pid, 9)
        process.wait(30)


def use(uri: str | None) -> None:
    import mlflow

    mlflow.set_tracking_uri(uri)


@pytest.fixture(scope="module")
def registered(server: tuple[str, Path], vae: PVVAE, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of the server that has registered pv-vae, whose first version is its champion."""
    import mlflow

    use(server[0])
    client = mlflow.MlflowClient()
    run = client.create_run(client.create_experiment("pull")).info.run_id
    uri = registry.register(saved(vae, tmp_path_factory.mktemp("m") / "model"), "pv-vae", run)
    client.set_registered_model_alias("pv-vae", "champion", uri.rsplit("/", 1)[1])
    use(None)
    return str(run)


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of the test's own, and no store until it names one; nothing waits long."""
    monkeypatch.setenv("LONGTAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("longtake.datasets.storage.time.sleep", lambda seconds: None)
    use(None)
    yield
    use(None)


@pytest.fixture
def proxy(server: tuple[str, Path], registered: str) -> Iterator[Proxy]:
    made = Proxy(server[0])
    use(made.url)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def template(vae: PVVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database that has pv-vae@champion, its artifacts, and a copy of these."""
    import mlflow

    folder = tmp_path_factory.mktemp("template")
    use(f"sqlite:///{folder}/mlflow.db")
    client = mlflow.MlflowClient()
    run = client.create_run(client.create_experiment("e", f"{folder}/artifacts")).info.run_id
    registry.register(saved(vae, folder / "model"), "pv-vae", run)
    client.set_registered_model_alias("pv-vae", "champion", "1")
    use(None)
    shutil.copytree(folder / "artifacts", folder / "copy")
    return folder


@pytest.fixture
def local(template: Path, tmp_path: Path) -> Path:
    """pv-vae@champion in a database of the test's own and a folder; returns the model folder in it."""
    shutil.rmtree(template / "artifacts")
    shutil.copytree(template / "copy", template / "artifacts")
    shutil.copyfile(template / "mlflow.db", tmp_path / "mlflow.db")
    use(f"sqlite:///{tmp_path}/mlflow.db")
    return next((template / "artifacts").rglob("config.json")).parent


def whole(folder: Path) -> bool:
    content = json.loads((folder / "config.json").read_bytes())
    found = {p.name for p in folder.iterdir()}
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in content["sha256"]}
    return found == {"config.json", *content["sha256"]} and digests == content["sha256"]


def rewrite(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def entries(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "models"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


@pytest.mark.slow
def test_a_model_is_fetched_once_and_nothing_but_its_weights(proxy: Proxy, vae: PVVAE) -> None:
    folder = pull.pull("models:/pv-vae@champion")
    assert whole(folder)
    assert [name for name, _, _ in proxy.fetched] == ["config.json", "model.safetensors"]
    again = [pull.pull(f"models:/pv-vae{which}") for which in ("@champion", "@candidate", "/1", "/latest")]
    assert set(again) == {folder}
    loaded = registry.load("models:/pv-vae@champion").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in vae.state_dict().items())
    assert len([name for name, _, _ in proxy.fetched if name == "model.safetensors"]) == 1
    assert [name for name, _, _ in proxy.fetched].count("config.json") == 1


@pytest.mark.slow
def test_what_a_run_has_logged_is_pulled_too(proxy: Proxy, registered: str, tmp_path: Path) -> None:
    assert whole(pull.pull(f"runs:/{registered}/model"))
    with pytest.raises(UserError, match="not a longtake model"):
        pull.pull(f"runs:/{registered}/nothing")


@pytest.mark.slow
def test_a_broken_connection_goes_on_at_its_byte(proxy: Proxy) -> None:
    proxy.break_after = [1 << 20, 3 << 16]
    folder = pull.pull("models:/pv-vae@champion")
    assert whole(folder)
    size = (folder / "model.safetensors").stat().st_size
    sent = [(asked, count) for name, asked, count in proxy.fetched if name == "model.safetensors"]
    first = sent[0][1]
    assert sent[0] == (None, 1 << 20)
    assert [asked for asked, _ in sent[1:]] == [f"bytes={first}-", f"bytes={first + (3 << 16)}-"]
    assert sum(count for _, count in sent) == size, "no byte comes twice"


@pytest.mark.slow
def test_a_server_without_ranges_starts_the_file_again(proxy: Proxy) -> None:
    proxy.ranges = False
    proxy.break_after = [300_000, 100_000, 500_000]
    assert whole(pull.pull("models:/pv-vae@champion"))
    assert [count for name, _, count in proxy.fetched if name == "model.safetensors"][:3] == [300_000, 100_000, 500_000]


@pytest.mark.slow
def test_a_pull_that_gave_up_is_taken_up_again(proxy: Proxy, tmp_path: Path) -> None:
    proxy.break_after = [5 << 16] + [0] * 20
    with pytest.raises(Failure, match=r"model\.safetensors: .*gave up after 5 attempts") as e:
        pull.pull("models:/pv-vae@champion")
    one_line(e)
    (left,) = entries(tmp_path)
    assert left.endswith(".partial"), "no half model has the name of a whole one"
    proxy.break_after, proxy.fetched = [], []
    folder = pull.pull("models:/pv-vae@champion")
    assert whole(folder) and entries(tmp_path) == [folder.name]
    assert [asked for name, asked, _ in proxy.fetched if name == "model.safetensors"] == [f"bytes={5 << 16}-"]


def test_what_an_earlier_pull_has_left_wrong_comes_again(local: Path, tmp_path: Path) -> None:
    key = hashlib.sha256((local / "config.json").read_bytes()).hexdigest()
    partial = tmp_path / "cache" / "models" / f"{key}.partial"
    for junk in (b"x" * 1000, b"x" * 50_000_000):
        partial.mkdir(parents=True)
        (partial / "model.safetensors.part").write_bytes(junk)
        (partial / "model.safetensors").write_bytes(b"y")
        (partial / "other").write_bytes(b"z")
        folder = pull.pull("models:/pv-vae@champion")
        assert whole(folder)
        shutil.rmtree(tmp_path / "cache")


def test_weights_with_a_flipped_byte_are_refused_and_deleted(local: Path, tmp_path: Path) -> None:
    path = local / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Failure, match=r"model\.safetensors: its sha256 is .*damaged in the store") as e:
        registry.load("models:/pv-vae@champion")
    one_line(e)
    assert not list((tmp_path / "cache").rglob("model.safetensors*"))
    data[-1] ^= 1
    path.write_bytes(data)
    assert whole(pull.pull("models:/pv-vae@champion"))
    for wrong in (bytes(data) + b"x", bytes(data[:-1]), b""):
        shutil.rmtree(tmp_path / "cache")
        path.write_bytes(wrong)
        with pytest.raises(Failure, match=r"sha256"):
            pull.pull("models:/pv-vae@champion")


def test_other_weights_than_were_registered_are_not_fetched(local: Path, tmp_path: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    client.set_model_version_tag("pv-vae", "1", "sha256", "0" * 64)
    with pytest.raises(Failure, match=r"the version's tag sha256 says 000000000000\.\.\.") as e:
        pull.pull("models:/pv-vae@champion")
    one_line(e)
    client.delete_model_version_tag("pv-vae", "1", "sha256")
    with pytest.raises(Failure, match="tag sha256 is missing"):
        pull.pull("models:/pv-vae@champion")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("name", ["../../x", "model.pkl", "/etc/passwd", "artifacts/model.safetensors", "", ".."])
def test_a_config_that_names_other_files_than_weights_is_refused(local: Path, tmp_path: Path, name: str) -> None:
    (local / "model.pkl").write_bytes(b"")
    rewrite(local, sha256=json.loads((local / "config.json").read_text())["sha256"] | {name: "0" * 64})
    with pytest.raises(Failure, match=r"is no weights file of a model folder") as e:
        pull.pull("models:/pv-vae@champion")
    one_line(e)
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "config.json: damaged"),
        (b"", "config.json: damaged"),
        (b"[]", "not an object"),
        (b" " * (5 << 20), "larger than 4194304 bytes"),
        (b'{"model": "os.system"}', "unknown model 'os.system'"),
        (b'{"model": "pv_vae", "format": 2, "config": {}, "sha256": {}}', "needs the digest of each weights file"),
        (b'{"model": "pv_vae", "format": 2, "config": {}, "sha256": {"model.safetensors": 3}}', "needs the digest"),
    ],
)
def test_a_config_that_is_none_is_one_line(local: Path, tmp_path: Path, text: bytes, said: str) -> None:
    (local / "config.json").write_bytes(text)
    with pytest.raises((UserError, Failure), match=said) as e:
        pull.pull("models:/pv-vae@champion")
    assert "models:/pv-vae@champion" in one_line(e)
    assert entries(tmp_path) == []


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.slow
def test_a_pickled_model_is_neither_fetched_nor_opened(server: tuple[str, Path], proxy: Proxy, tmp_path: Path) -> None:
    import mlflow

    use(server[0])
    client = mlflow.MlflowClient()
    run = client.create_run("0").info.run_id
    (tmp_path / "sk").mkdir()
    (tmp_path / "sk" / "model.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (tmp_path / "sk" / "MLmodel").write_text("flavors: {python_function: {loader_module: mlflow.sklearn}}\n")
    client.log_artifacts(run, str(tmp_path / "sk"), "sk")
    client.create_registered_model("pickled")
    client.create_model_version("pickled", client.get_run(run).info.artifact_uri + "/sk", run)
    use(proxy.url)
    with pytest.raises(UserError, match=r"models:/pickled/1: not a longtake model \(no config\.json") as e:
        registry.load("models:/pickled/1")
    one_line(e)
    assert not proxy.fetched and not (tmp_path / "exploded").exists()


def test_a_pickle_beside_the_weights_or_in_their_place_is_never_opened(local: Path, tmp_path: Path) -> None:
    import mlflow

    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (local / "data.pkl").write_bytes(bomb)
    assert whole(pull.pull("models:/pv-vae@champion"))
    shutil.rmtree(tmp_path / "cache")
    sha256 = hashlib.sha256(bomb).hexdigest()
    (local / "model.safetensors").write_bytes(bomb)
    rewrite(local, sha256={"model.safetensors": sha256})
    mlflow.MlflowClient().set_model_version_tag("pv-vae", "1", "sha256", sha256)
    with pytest.raises(Failure, match="pv_vae"):
        registry.load("models:/pv-vae@champion")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_symbolic_link_in_the_store_is_not_followed(local: Path, tmp_path: Path, name: str) -> None:
    (local / name).rename(tmp_path / "elsewhere")
    (local / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises((UserError, Failure), match=r"is a symbolic link") as e:
        pull.pull("models:/pv-vae@champion")
    one_line(e)


def test_a_folder_of_the_store_that_is_a_link_is_not_followed(local: Path, tmp_path: Path) -> None:
    local.rename(tmp_path / "elsewhere")
    local.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        pull.pull("models:/pv-vae@champion")


def test_links_in_the_cache_are_not_written_through(local: Path, tmp_path: Path) -> None:
    key = hashlib.sha256((local / "config.json").read_bytes()).hexdigest()
    victim = tmp_path / "victim"
    victim.write_text("ten years of work")
    folder = tmp_path / "cache" / "models" / f"{key}.partial"
    folder.mkdir(parents=True)
    for name in ("model.safetensors.part", "config.json", "model.safetensors"):
        (folder / name).symlink_to(victim)
    assert whole(pull.pull("models:/pv-vae@champion"))
    assert victim.read_text() == "ten years of work"


def test_a_damaged_file_of_the_cache_comes_again(local: Path, tmp_path: Path) -> None:
    folder = pull.pull("models:/pv-vae@champion")
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes(b"\0" * 100)
        assert pull.pull("models:/pv-vae@champion") == folder and whole(folder)


def test_without_the_store_what_was_pulled_is_there(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pull.pull("models:/pv-vae@champion")
    monkeypatch.setenv("LONGTAKE_OFFLINE", "1")
    (tmp_path / "mlflow.db").unlink()
    capfd.readouterr()
    assert {pull.pull("models:/pv-vae@champion"), pull.pull("models:/pv-vae/1")} == {folder}
    assert len(registry.load("models:/pv-vae@champion").state_dict())
    assert capfd.readouterr().err == "" and not (tmp_path / "mlflow.db").exists()
    with pytest.raises(Failure, match=r"models:/pv-vae@other: LONGTAKE_OFFLINE is set, and it was never pulled") as e:
        pull.pull("models:/pv-vae@other")
    one_line(e)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(Failure, match=r"model\.safetensors: is damaged or gone; pull"):
        pull.pull("models:/pv-vae@champion")


@pytest.mark.slow
def test_a_server_that_is_down_is_said_and_the_last_pull_used(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pull.pull("models:/pv-vae@champion")
    capfd.readouterr()
    proxy.server.shutdown()
    proxy.server.server_close()
    assert pull.pull("models:/pv-vae@champion") == folder
    day = time.strftime("%Y-%m-%d", time.gmtime())
    said = f"tracking store {proxy.url} cannot be reached: using pv-vae version 1, pulled {day}"
    assert said in capfd.readouterr().err.splitlines()
    with pytest.raises(Failure, match="it was never pulled to") as e:
        pull.pull("models:/pv-vae/2")
    one_line(e)
    use(DEAD)
    with pytest.raises(Failure, match=r"127\.0\.0\.1.*never pulled"):
        pull.pull("models:/pv-vae@champion"), "another store's model of the same name is another model"


@pytest.mark.slow
def test_a_store_that_refuses_is_not_taken_for_one_that_is_down(proxy: Proxy) -> None:
    pull.pull("models:/pv-vae@champion")

    class Closed(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

    proxy.server.RequestHandlerClass = Closed
    with pytest.raises(Failure, match="403"):
        pull.pull("models:/pv-vae@champion")


def test_a_store_that_was_made_anew_is_not_taken_for_the_old_one(local: Path, vae: PVVAE, tmp_path: Path) -> None:
    import mlflow

    before = pull.pull("models:/pv-vae/1")
    client = mlflow.MlflowClient()
    client.delete_registered_model("pv-vae")
    run = client.create_run(client.get_experiment_by_name("e").experiment_id).info.run_id
    other = saved(vae, tmp_path / "other", classes=["dog"])
    assert registry.register(other, "pv-vae", run) == "models:/pv-vae/1"
    after = pull.pull("models:/pv-vae/1")
    assert after != before and disk.read_config(after)["classes"] == ["dog"]


def test_an_alias_that_has_moved_is_another_model_even_with_the_same_weights(
    local: Path, vae: PVVAE, tmp_path: Path
) -> None:
    import mlflow

    first = pull.pull("models:/pv-vae@champion")
    client = mlflow.MlflowClient()
    run = client.create_run(client.get_experiment_by_name("e").experiment_id).info.run_id
    uri = registry.register(saved(vae, tmp_path / "b", classes=["dog"]), "pv-vae", run)
    client.set_registered_model_alias("pv-vae", "champion", uri.rsplit("/", 1)[1])
    assert registry.load_with_facts("models:/pv-vae@champion")[1]["classes"] == ["dog"]
    assert pull.pull("models:/pv-vae/1") == first


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/nothing@champion", "no model 'nothing' is registered in .*; registered: pv-vae"),
        ("models:/pv-vae@other", r"versions: 1; aliases: candidate \(1\), champion \(1\)"),
        ("models:/pv-vae/7", "versions: 1; aliases: candidate"),
        ("models:/pv-vae", "models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/pv-vae/Production", "models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/@champion", "models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/nothing/latest", "no model 'nothing'"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(local: Path, uri: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as e:
        pull.pull(uri)
    assert uri in one_line(e)


def test_without_a_store_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"):
        pull.pull("models:/pv-vae@champion")
    assert not list(tmp_path.iterdir())


def test_passwords_of_a_store_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    use("http://me:secret@127.0.0.1:9")
    with pytest.raises(Failure, match=r"127\.0\.0\.1") as e:
        pull.pull("models:/pv-vae@champion")
    assert "secret" not in one_line(e) + "".join(capfd.readouterr())


def test_a_cache_that_cannot_be_written_is_one_line(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LONGTAKE_CACHE", str(tmp_path / "file"))
    with pytest.raises(Failure, match="set LONGTAKE_CACHE to another folder") as e:
        pull.pull("models:/pv-vae@champion")
    one_line(e)


def test_a_copy_is_whole_and_replaces_nothing(local: Path, tmp_path: Path) -> None:
    folder = pull.pull("models:/pv-vae@champion")
    pull.copy(folder, tmp_path / "a" / "b")
    assert whole(tmp_path / "a" / "b")
    pull.copy(folder, tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="is there already"):
        pull.copy(folder, tmp_path / "a" / "b")


@pytest.mark.slow
def test_two_processes_at_once_fetch_a_model_once(proxy: Proxy) -> None:
    script = (
        "import sys\nfrom longtake.training.registry import cache as pull\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        "print(pull.pull('models:/pv-vae@champion'))"
    )
    environment = os.environ | {"MLFLOW_TRACKING_URI": proxy.url}
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", "-c", script]
    processes = [subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        (folder,) = {process.communicate(timeout=100)[0].strip() for process in processes}
    finally:
        for process in processes:
            process.kill()
    assert whole(Path(folder))
    assert [name for name, _, _ in proxy.fetched].count("model.safetensors") == 1
