"""A run folder behind a URL: the same dataset as in a local one, and another machine continues from the last snapshot."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from cai.errors import ConfigError, StoreError
from cai.pipeline import generate, local_folder
from cai.store import Batch, Database, Mirror, is_remote, remote
from tests.runs import CALLS, command, data_bytes, kept_calls, log_lines, recipe, start, wait_until

PROMPTS = 4
RECIPE = recipe("logged", prompts={"limit": PROMPTS})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3. Skipped in CI: s3fs cannot be installed beside the pinned python-dateutil."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "s3":
        settings = {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "DEFAULT_REGION": "us-east-1"}
        for name, value in {**settings, "ENDPOINT_URL": request.getfixturevalue("s3")}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        bucket = uuid.uuid4().hex
        fsspec.filesystem("s3").mkdir(bucket)
        yield f"s3://{bucket}/run"
        return
    if request.param == "file":
        yield f"file://{tmp_path}/storage/run"
        return
    folder = f"memory://{uuid.uuid4().hex}"
    yield f"{folder}/run"
    fsspec.filesystem("memory").rm(folder, recursive=True)


def files(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    return {name.removeprefix(root).lstrip("/"): fs.cat_file(name) for name in fs.find(root)}


def edit(url: str, name: str, value: Any) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    if "s3" not in fs.protocol:
        fs.makedirs(f"{root}/run", exist_ok=True)
    fs.pipe_file(f"{root}/{name}", json.dumps(value).encode())


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "another machine"))
    monkeypatch.setattr(remote.platform, "node", lambda: "another")


def test_everything_is_at_the_url_and_as_in_a_local_folder(url, tmp_path, log):
    generate(RECIPE, tmp_path / "local")
    generate(RECIPE, url)
    there = files(url)
    assert {name: content for name, content in there.items() if name.startswith("data/")} == data_bytes(tmp_path / "local")
    [journal] = [name for name in there if name.startswith("run/journal-")]
    assert set(there) - {name for name in there if name.startswith("data/")} == {
        *("README.md", "manifest.json", "recipe.yaml", "constitution.yaml"),
        *("run/identity.json", "run/mirror.json", journal),
    }
    assert json.loads(there["manifest.json"])["status"] == "done"
    (tmp_path / "copy").write_bytes(there[journal])
    with closing(sqlite3.connect(tmp_path / "copy")) as db:
        assert db.execute("SELECT COUNT(*) FROM calls").fetchone() == (PROMPTS * CALLS,)


def test_another_machine_continues_and_pays_for_nothing_again(url, tmp_path, log, monkeypatch):
    generate(RECIPE, url)
    paid = len(log_lines(log))
    edit(url, "README.md.0a1b.part", "half of what a machine that died wrote")
    another_machine(monkeypatch, tmp_path)
    more = recipe("logged", prompts={"limit": PROMPTS + 1})
    generate(more, url)
    assert len(log_lines(log)) == paid + CALLS
    assert not list((tmp_path / "another machine").rglob("*.part"))
    assert not any(name.endswith(".part") for name in files(url))
    monkeypatch.undo()
    monkeypatch.setenv("CALLS_LOG", str(log))
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    done = generate(more, url)
    assert len(log_lines(log)) == paid + CALLS, "and the first one takes over what the other one made"
    assert done["dataset"]["records"] == PROMPTS + 1


def test_calls_that_only_the_local_copy_has_stay(url, tmp_path, log, monkeypatch):
    generate(RECIPE, url)
    local = local_folder(url)
    with monkeypatch.context() as context:
        another_machine(context, tmp_path)
        generate(recipe("logged", prompts={"limit": 1}), url)
    with closing(sqlite3.connect(local / "run" / "journal.sqlite")) as db, db:
        db.execute("INSERT INTO calls VALUES (x'00', 'policy', 1, 1, x'00')")
    generate(RECIPE, url)
    assert kept_calls(local) == PROMPTS * CALLS + 1


def test_a_local_copy_that_was_deleted_comes_from_the_url_again(url, log):
    generate(RECIPE, url)
    paid = len(log_lines(log))
    local = local_folder(url)
    shutil.rmtree(local)
    assert local.with_name(f"{local.name}.json").exists(), "what it had last seen there"
    assert generate(RECIPE, url)["dataset"]["records"] == PROMPTS
    assert len(log_lines(log)) == paid


def test_batches_that_only_the_local_copy_has_stay(url, tmp_path, log, monkeypatch):
    generate(RECIPE, url)
    local = local_folder(url)
    with monkeypatch.context() as context:
        another_machine(context, tmp_path)
        generate(recipe("logged", prompts={"limit": 1}), url)
    noted = Batch("name", "/v1/chat/completions", "batch_1", "created")
    database = Database(local / "run" / "journal.sqlite")
    database.add_batch(noted, ["one", "two"])
    database.close()
    generate(RECIPE, url)
    database = Database(local / "run" / "journal.sqlite")
    assert database.find_batches(["one", "two"]) == {"one": noted, "two": noted}
    database.close()


class Slow:
    """A file system on which a snapshot goes up for as long as nobody lets it."""

    def __init__(self, fs: Any) -> None:
        self._fs, self.begun, self.gate = fs, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def put_file(self, here: str, there: str) -> None:
        if "journal-" in there:
            self.begun.set()
            assert self.gate.wait(20)
        self._fs.put_file(here, there)


@pytest.fixture
def uploading(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Mirror, Slow, threading.Event]]:
    """A mirror whose snapshot is on its way, and whether its run is told to stop."""
    monkeypatch.setattr(remote, "EVERY", 0.05)
    mirror, stopped = Mirror(url, local_folder(url)), threading.Event()
    slow = mirror._fs = Slow(mirror._fs)
    with contextlib.suppress(StoreError), mirror.writing(True, stopped.set):
        mirror.local.joinpath("run").mkdir(parents=True)
        Database(mirror.local / "run" / "journal.sqlite").close()
        assert slow.begun.wait(20)
        yield mirror, slow, stopped
        slow.gate.set()


def test_while_a_snapshot_goes_up_the_writer_says_that_it_lives(url, uploading):
    _, slow, stopped = uploading
    began = time.time()
    wait_until(lambda: json.loads(files(url)["run/writer.json"] or "{}").get("time", 0) > began + 0.2)
    slow.gate.set()
    wait_until(lambda: "run/mirror.json" in files(url))
    assert not stopped.is_set()


def test_a_snapshot_that_ends_after_another_took_over_counts_for_nothing(url, uploading):
    _, slow, stopped = uploading
    there = {
        "run/writer.json": {"id": "x"},
        "run/mirror.json": {"journal": "journal-other.sqlite"},
        "run/journal-other.sqlite": 1,
    }
    for _ in range(20):  # the first may fall between its look and its own sign of life
        edit(url, "run/writer.json", there["run/writer.json"])
        time.sleep(0.02)
    for name, value in there.items():
        edit(url, name, value)
    slow.gate.set()
    assert stopped.wait(20)
    assert {name: json.loads(content) for name, content in files(url).items()} == there


def test_snapshots_go_there_while_the_run_works(tmp_path, log, monkeypatch):
    url = f"file://{tmp_path}/storage/run"
    monkeypatch.setattr(remote, "EVERY", 0.1)
    monkeypatch.setenv("SLOW", "0.05")
    process = start(
        *("generate", "--recipe", saved(tmp_path), "-o", url),
        code="from cai.store import remote; remote.EVERY = 0.1; from cai.cli.main import main; main()",
    )
    pointer = tmp_path / "storage" / "run" / "run" / "mirror.json"
    wait_until(lambda: pointer.exists() and kept_calls(local_folder(url)) > CALLS)
    time.sleep(0.3)
    process.kill()
    process.communicate()
    shutil.rmtree(tmp_path / "cache")
    before = len(log_lines(log))
    monkeypatch.setattr(remote.platform, "node", lambda: "another")
    time.sleep(0.3)
    slow = recipe("slow", prompts={"limit": PROMPTS})
    generate(slow, url)
    assert len(log_lines(log)) - before < PROMPTS * CALLS - CALLS, "most calls came from the snapshot"
    assert len(list(pointer.parent.glob("journal-*"))) == 1


def test_a_snapshot_does_not_write_again_what_is_there(tmp_path, log, monkeypatch):
    """Where each file that is written is a commit, that would be many."""
    put, times = LocalFileSystem.put_file, []

    def count(self: Any, here: str, there: str, *more: Any, **named: Any) -> Any:
        times.append(re.sub(r"\.\w+\.part$", "", there.rpartition("/")[2]))
        return put(self, here, there, *more, **named)

    monkeypatch.setattr(remote, "EVERY", 0.05)
    monkeypatch.setattr(LocalFileSystem, "put_file", count)
    monkeypatch.setenv("SLOW", "0.1")
    generate(recipe("slow", prompts={"limit": 3}), f"file://{tmp_path}/storage/run")
    assert sum(name.startswith("journal-") for name in times) > 1
    assert times.count("identity.json") <= 2, "by the first snapshot, and with the whole folder at the end"


@pytest.mark.parametrize("name", ["README.md", "manifest.json", "run/mirror.json", "run/identity.json"])
def test_a_write_that_is_cut_short_leaves_what_was_there(tmp_path, log, monkeypatch, name):
    put, storage = LocalFileSystem.put_file, tmp_path / "storage" / "run"

    def cut_short(self: Any, here: str, there: str, *more: Any, **named: Any) -> Any:
        if re.sub(r"\.\w+\.part$", "", there).endswith(name):
            Path(there).write_bytes(Path(here).read_bytes()[:3])
            raise OSError(5, "as where the process is killed")
        return put(self, here, there, *more, **named)

    generate(RECIPE, f"file://{storage}")
    there = (storage / name).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "put_file", cut_short)
        with pytest.raises(StoreError, match="cannot be written"):
            generate(RECIPE.model_copy(update={"seed": 1}), f"file://{storage}", "fresh")
    assert (storage / name).read_bytes() == there
    assert generate(RECIPE, f"file://{storage}", "fresh")["status"] == "done"
    assert not any(one.endswith(".part") for one in files(f"file://{storage}"))


def saved(folder: Path) -> Path:
    file = folder / "slow.yaml"
    file.write_text(recipe("slow", prompts={"limit": PROMPTS}).to_yaml())
    return file


def test_a_writer_that_lives_is_told_and_a_dead_one_is_not_waited_for_long(url, tmp_path, log, monkeypatch):
    edit(url, "run/writer.json", {"id": "x", "machine": "big-node", "process": 17, "time": time.time() - 7})
    with pytest.raises(StoreError, match=r"big-node \(process 17\) is writing there, last heard of 7 s ago; .* works in 173 s"):
        generate(RECIPE, url)
    assert not log.exists()
    edit(url, "run/writer.json", {"id": "x", "machine": "big-node", "process": 17, "time": time.time() - 200})
    assert generate(RECIPE, url)["status"] == "done"
    assert "run/writer.json" not in files(url)


def test_a_writer_that_is_replaced_stops_and_overwrites_nothing(url, log, monkeypatch):
    monkeypatch.setattr(remote, "EVERY", 0.05)
    monkeypatch.setenv("SLOW", "0.1")

    ended = threading.Event()

    def replace() -> None:
        fs, root = fsspec.core.url_to_fs(url)
        wait_until(lambda: fs.exists(f"{root}/run/mirror.json"))
        while not ended.wait(0.02):  # the first may fall between the run's look and its own sign of life
            edit(url, "run/writer.json", {"id": "x", "machine": "big-node", "process": 17, "time": time.time()})

    thread = threading.Thread(target=replace)
    thread.start()
    with pytest.raises(StoreError, match="another process writes there now; what was made since then is in "):
        generate(recipe("slow", prompts={"limit": 30}), url)
    ended.set()
    thread.join()
    assert json.loads(files(url)["run/writer.json"])["id"] == "x"
    assert "manifest.json" not in files(url)


def test_two_runs_on_one_machine_are_told_at_once(url, log):
    mirror = Mirror(url, local_folder(url))
    with (
        mirror.writing(False, lambda: None),
        pytest.raises(StoreError, match="a live run on this machine is writing there; wait"),
    ):
        generate(RECIPE, url)


def test_fresh_leaves_nothing_of_the_old_run(url, log):
    generate(recipe("logged", prompts={"limit": PROMPTS}, dataset={"shard_rows": 1}), url)
    old = files(url)
    generate(RECIPE, url, "fresh")
    assert len(files(url)) < len(old)
    assert len(log_lines(log)) == 2 * PROMPTS * CALLS


def test_storage_that_fails_at_the_end_leaves_all_here_and_the_same_command_uploads_it(url, log, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(Mirror, "_push_journal", broken)
        with pytest.raises(StoreError, match=r"cannot be written: OSError: no route; what .* is in .* the same command"):
            generate(RECIPE, url)
    paid = len(log_lines(log))
    assert generate(RECIPE, url)["status"] == "done"
    assert len(log_lines(log)) == paid
    assert "manifest.json" in files(url)


def broken(self: Mirror) -> None:
    raise OSError("no route")


def test_files_of_others_are_never_written_beside(url, log):
    edit(url, "thesis.json", {})
    with pytest.raises(ConfigError, match=r"holds thesis.json, but no run of cai; nothing was touched"):
        generate(RECIPE, url)
    assert set(files(url)) == {"thesis.json"}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("s3://key:secret@bucket/run", "the URL holds a password; give it by the environment"),
        ("gs://bucket/run", "gs:// needs a package that is not installed: pip install gcsfs"),
        ("nothing://bucket/run", "Protocol not known: nothing; expected s3://"),
        ("http://x/y", "http:// can only be read; expected s3://"),
        ("memory://", "expected a folder there, as in memory://bucket/folder"),
    ],
)
def test_a_url_that_cannot_be_is_refused_before_anything_happens(out, message, log):
    with pytest.raises(ConfigError) as caught:
        generate(RECIPE, out)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not log.exists()


def test_a_url_that_became_a_path_is_told():
    with pytest.raises(ConfigError, match="a URL does not survive in a Path"):
        is_remote(Path("s3://bucket/run"))


def test_the_command_writes_to_a_url_and_asks_before_it_deletes_what_is_there(tmp_path, log):
    url = f"file://{tmp_path}/storage/run"
    arguments = ("generate", "--recipe", saved(tmp_path), "-o", url)
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"all of it is also at {url}" in done.stdout
    shutil.rmtree(tmp_path / "cache")
    refused = command(*arguments, "--fresh")
    assert refused.returncode == 2
    assert f"--fresh would delete a run in {url}; add --yes" in refused.stderr
    assert command("judge", "label", saved(tmp_path), "-o", url).returncode == 2
