"""The run folder: whose it is, which run it holds, and that nothing in it is ever half written or lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cai.errors import ConfigError, StoreError
from cai.store import Call, Quarantined, RunFolder, would_lose, write_whole
from tests.runs import environment
from tests.test_database import uncommittable

ONE = {"seed": 0, "policy": "a"}
OTHER = {"seed": 1, "policy": "a"}
CALL = Call(b"key", "policy", 1, 1, b"x")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "run-folder"


def filled(out: Path) -> Path:
    with RunFolder(out, ONE) as folder:
        folder.database.add_calls([CALL])
        folder.write_text("README.md", "card")
        with folder.new_data() as data:
            (data / "file").write_text("rows")
    return out


def files(out: Path) -> set[str]:
    return {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}


# --- which run it holds


def test_the_same_run_continues(out):
    with RunFolder(filled(out), dict(ONE)) as folder:
        assert folder.database.count_calls() == 1
    assert files(out) == {
        "README.md", "data/file", "run/journal.sqlite", "run/identity.json", "run/lock", "run/owner"
    }  # fmt: skip


def test_another_run_is_refused_and_every_changed_key_is_named(out):
    before = filled(out).joinpath("run/identity.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        RunFolder(out, {"seed": 1, "judge": "b"})
    message = str(caught.value)
    assert "seed: 0 there, 1 now" in message
    assert "judge: None there, 'b' now" in message
    assert "policy: 'a' there, None now" in message
    assert all(way in message for way in ("another -o", "--update", "--fresh"))
    assert out.joinpath("run/identity.json").read_bytes() == before
    RunFolder(out, ONE).close()


def test_update_keeps_the_calls_and_is_then_the_run_that_is_there(out):
    with RunFolder(filled(out), OTHER, "update") as folder:
        assert folder.database.count_calls() == 1
    RunFolder(out, OTHER).close()
    with pytest.raises(ConfigError):
        RunFolder(out, ONE)


def test_fresh_deletes_all_that_is_ours_and_nothing_else(out):
    filled(out)
    (out / "notes.txt").write_text("mine")
    with RunFolder(out, OTHER, "fresh") as folder:
        assert folder.database.count_calls() == 0
    assert files(out) == {"notes.txt", "run/journal.sqlite", "run/identity.json", "run/lock", "run/owner"}


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\xff", '{"seed": 0}}'])
def test_a_damaged_identity_can_be_updated_or_started_over(out, content):
    (filled(out) / "run/identity.json").write_text(content, encoding="latin-1")
    with pytest.raises(StoreError, match=r"identity\.json: damaged: .*--update keeps the finished calls, --fresh starts over"):
        RunFolder(out, ONE)
    with RunFolder(out, ONE, "update") as folder:
        assert folder.database.count_calls() == 1
    RunFolder(out, ONE).close()


@pytest.mark.parametrize("mode", ["continue", "update"])
def test_where_the_journal_is_gone_nothing_is_paid_for_again_unasked(out, mode):
    (filled(out) / "run/journal.sqlite").unlink()
    with pytest.raises(StoreError, match=r"journal\.sqlite is gone.*put it back, or start over with --fresh"):
        RunFolder(out, ONE, mode)
    assert not (out / "run/journal.sqlite").exists()
    RunFolder(out, ONE, "fresh").close()


def test_a_damaged_journal_can_be_started_over(out):
    (filled(out) / "run/journal.sqlite").write_bytes(b"damaged" * 1000)
    with pytest.raises(StoreError, match="start over with --fresh"):
        RunFolder(out, ONE)
    with RunFolder(out, ONE, "fresh") as folder:
        assert folder.database.count_calls() == 0


def test_a_run_that_died_before_it_had_an_identity_goes_on(out):
    (filled(out) / "run/identity.json").unlink()
    with RunFolder(out, OTHER) as folder:
        assert folder.database.count_calls() == 1


# --- whose folder it is


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"file is a file; -o names a folder"):
        RunFolder(tmp_path / "file", ONE)
    with pytest.raises(StoreError, match="cannot be written: Not a directory"):
        RunFolder(tmp_path / "file" / "below", ONE)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("mode", ["continue", "update", "fresh"])
@pytest.mark.parametrize("name", ["README.md", "data/train.csv", "manifest.json", "recipe.yaml", "run/main.py", "run"])
def test_a_folder_with_files_of_our_names_that_are_not_ours_is_left_alone(tmp_path, name, mode):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(
        ConfigError, match=rf"holds {name.split('/')[0]}, but no run of cai; nothing was touched; use another -o"
    ):
        RunFolder(tmp_path, ONE, mode)
    assert files(tmp_path) == {name}
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("mode", ["continue", "update", "fresh"])
def test_a_folder_with_other_files_is_no_run_folder(tmp_path, mode):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt, but no run of cai; nothing was touched; use another -o"):
        RunFolder(tmp_path, ONE, mode)
    assert files(tmp_path) == {"notes.txt"}


def test_hidden_files_and_what_is_put_beside_a_run_do_no_harm(tmp_path):
    (tmp_path / ".gitignore").write_text("mine")
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path, ONE).close()
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path, ONE).close()
    assert {".gitignore", "notes.txt"} <= files(tmp_path)


def test_a_folder_that_cannot_be_written_says_so():
    with pytest.raises(StoreError, match=r"/proc/cai/run: cannot be written: .*; mend that, then the same command continues"):
        RunFolder(Path("/proc/cai/run"), ONE)


# --- who writes it


def test_only_one_writes_at_a_time(out):
    with RunFolder(out, ONE), pytest.raises(StoreError, match=rf"a live run \(process {os.getpid()}\) is writing here"):
        RunFolder(out, ONE)
    RunFolder(out, ONE).close()


@pytest.mark.parametrize("mode", ["update", "fresh"])
def test_nobody_deletes_what_another_writes(out, mode):
    with RunFolder(filled(out), ONE) as folder:
        with pytest.raises(StoreError, match="a live run"):
            RunFolder(out, OTHER, mode)
        assert folder.database.count_calls() == 1


def test_a_lock_that_a_killed_process_left_is_no_obstacle(out):
    code = (
        "import os, sys; from pathlib import Path; from cai.store import RunFolder\n"
        f"folder = RunFolder(Path(sys.argv[1]), {ONE}); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, out], env=environment(), check=False).returncode == -9
    assert (out / "run" / "lock").exists()
    RunFolder(out, ONE).close()


def test_a_refused_run_gives_the_lock_back(out):
    filled(out)
    for _ in range(2):
        with pytest.raises(ConfigError, match="holds another run"):
            RunFolder(out, OTHER)


def test_what_failed_first_is_told_though_closing_fails_too(out):
    with pytest.raises(ConfigError), RunFolder(out, ONE) as folder:  # noqa: PT012
        uncommittable(folder.database)
        raise ConfigError("first")
    RunFolder(out, ONE).close()


# --- what is written


def test_a_json_file_comes_back_and_a_damaged_one_is_named(out):
    with RunFolder(out, ONE) as folder:
        assert folder.read_json("manifest.json") is None
        folder.write_json("manifest.json", {"ä": "漢 \ud800"})
        assert folder.read_json("manifest.json") == {"ä": "漢 \ud800"}
        (out / "manifest.json").write_text('{"a": ')
        with pytest.raises(StoreError, match=r"manifest\.json: damaged: not valid JSON"):
            folder.read_json("manifest.json")


def test_a_file_is_written_whole_or_not_at_all(out):
    with RunFolder(filled(out), ONE) as folder:
        (out / "README.md.part").mkdir()
        with pytest.raises(StoreError, match=r"README\.md: cannot be written: Is a directory"):
            folder.write_text("README.md", "new")
        assert (out / "README.md").read_text() == "card"


@pytest.mark.parametrize(
    ("error", "seen"),
    [(OSError(28, "No space left"), StoreError), (KeyboardInterrupt(), KeyboardInterrupt), (ValueError(), ValueError)],
)
def test_new_data_takes_the_place_of_the_old_only_when_it_is_whole(out, error, seen):
    def write_half() -> None:
        with folder.new_data() as data:
            (data / "file").write_text("half")
            raise error

    with RunFolder(filled(out), ONE) as folder:
        with pytest.raises(seen):
            write_half()
        assert (out / "data/file").read_text() == "rows"
        assert not (out / "run/data.part").exists(), "it would take up what space there is"
        with folder.new_data() as data:
            (data / "other").write_text("new")
    assert {name for name in files(out) if name.startswith("data")} == {"data/other"}


def test_what_a_killed_run_left_half_written_is_swept_away(out):
    (filled(out) / "run/data.part/sft").mkdir(parents=True)
    (out / "run/data.part/sft/old").write_text("half")
    with RunFolder(out, ONE) as folder, folder.new_data() as data:
        (data / "file").write_text("new")
    assert {name for name in files(out) if "data" in name} == {"data/file"}


def test_the_quarantine_is_written_to_read_and_counted(out):
    with RunFolder(out, ONE) as folder:
        assert folder.write_quarantine() == {}
        assert not (out / "run/quarantine.jsonl").exists()
        for position, reason in enumerate(("a", "b", "a")):
            folder.database.quarantine(Quarantined(position, f"file:{position}", None, reason, "why", "{row\x00}"))
        assert folder.write_quarantine() == {"a": 2, "b": 1}
        lines = (out / "run/quarantine.jsonl").read_text().splitlines()
        assert json.loads(lines[1]) == {
            "position": 1, "origin": "file:1", "prompt_id": None, "reason": "b", "detail": "why", "row": "{row\x00}"
        }  # fmt: skip
        folder.database.begin_pass()
        assert folder.write_quarantine() == {}
    assert not [name for name in files(out) if "quarantine" in name]


# --- what would be lost


def test_what_starting_over_would_lose_is_told_in_words(out):
    assert would_lose(out) is None
    RunFolder(out, ONE).close()
    assert would_lose(out) is None
    assert would_lose(filled(out)) == "1 finished calls"
    (out / "run/journal.sqlite").write_bytes(b"damaged" * 1000)
    assert would_lose(out) == "a journal that cannot be read"
    (out / "run/journal.sqlite").unlink()
    assert would_lose(out) == "a dataset"


def test_it_can_be_told_while_a_run_is_live(out):
    with RunFolder(out, ONE) as folder:
        folder.database.add_calls([CALL])
        with folder.database.transaction():
            assert would_lose(out) == "1 finished calls"


def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
    def fill(self: Path, text: str, **_: object) -> int:
        self.write_bytes(text.encode()[:2])
        raise OSError(28, "No space left on device")

    (tmp_path / "page.html").write_text("before")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fill)
        with pytest.raises(StoreError, match=r"page.html: cannot be written: No space left"):
            write_whole(tmp_path / "page.html", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "before"
