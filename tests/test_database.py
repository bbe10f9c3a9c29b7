"""The run's SQLite file: what is kept, what a pass counts, and what is said where the disk or the file fails."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.errors import StoreError
from cai.store import Call, Database, Quarantined, RoleUsage
from cai.types import Message, Prompt, Record
from tests.records import HOSTILE, completion


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "journal.sqlite")
    yield database
    database.close()


def prompt(prompt_id: str, text: str = "q", category: str | None = None) -> Prompt:
    return Prompt(prompt_id, (Message("user", text),), category)


def record(prompt: Prompt, answer: str = "a") -> Record:
    return Record(prompt, (completion(answer),), (), ())


def call(number: int, size: int = 2) -> Call:
    return Call(number.to_bytes(16), "policy" if number % 2 else "judge", number, 1, b"x" * size)


def claim(database, position, prompt, given=()):
    return database.claim([(position, prompt, given)])[0]


# --- calls


def test_calls_are_found_again_by_their_keys(database):
    database.add_calls([call(1)])
    database.add_calls([call(2), call(3)])
    assert database.call_results([call(1).key, call(3).key, call(4).key]) == {call(1).key: b"xx", call(3).key: b"xx"}
    assert database.count_calls() == 3
    assert database.usage() == {"judge": RoleUsage(1, 2, 1), "policy": RoleUsage(2, 4, 2)}


def test_a_call_is_on_disk_as_soon_as_it_is_kept(database):
    database.add_calls([call(1)])
    with sqlite3.connect(database.path) as other:
        assert other.execute("SELECT COUNT(*) FROM calls").fetchone() == (1,)
    other.close()


def test_several_calls_are_kept_together_or_not_at_all(database):
    with pytest.raises(StoreError, match="NOT NULL"):
        database.add_calls([call(1), call(2), call(3)._replace(role=None)])
    assert database.count_calls() == 0
    database.add_calls([call(4)])
    assert database.count_calls() == 1


def test_a_write_that_fails_takes_no_claim_with_it(database):
    database.begin_pass()
    for position, name in enumerate("abc"):
        claim(database, position, prompt(name))
    with pytest.raises(MemoryError), database.transaction():  # noqa: PT012
        database._db.execute("DELETE FROM prompts")
        raise MemoryError
    for name in "abc":
        database.add_record(record(prompt(name)))
    assert [one.prompt.id for one in database.records()] == ["a", "b", "c"]


def test_writes_inside_a_transaction_are_kept_with_it_or_not_at_all(database):
    with pytest.raises(ValueError, match="late"), database.transaction():  # noqa: PT012
        database.add_calls([call(1)])
        database.quarantine(Quarantined(0, "f", None, "r", "d", "r"))
        raise ValueError("late")
    assert (database.count_calls(), list(database.quarantined())) == (0, [])
    with database.transaction():
        database.add_calls([call(1)])
        with pytest.raises(StoreError, match="NOT NULL"):
            database.add_calls([call(2), call(3)._replace(role=None)])
        with sqlite3.connect(database.path) as other:
            assert other.execute("SELECT COUNT(*) FROM calls").fetchone() == (0,), "not before the whole is done"
        other.close()
    assert list(database.call_results([call(1).key, call(2).key])) == [call(1).key]
    assert not database._db.in_transaction


@given(st.sets(st.binary(min_size=1, max_size=16), min_size=1, max_size=300), st.data())
def test_any_set_of_keys_can_be_asked_for(keys, data):
    database = Database(Path(":memory:"))
    kept = data.draw(st.sets(st.sampled_from(sorted(keys))))
    database.add_calls([Call(key, "policy", 1, 1, key) for key in kept])
    assert database.call_results(list(keys)) == {key: key for key in kept}
    database.close()


# --- a pass over the prompts


def test_rows_that_are_claimed_together_are_told_apart_as_if_one_by_one(database):
    database.begin_pass()
    claim(database, 0, prompt("a"))
    database.add_record(record(prompt("a")))
    database.begin_pass()
    rows = [("b",), ("a",), ("b",), ("a", "another text"), ("c",)]
    claims = database.claim([(position, prompt(*row), ()) for position, row in enumerate(rows, 5)])
    assert claims == ["new", "kept", "duplicate", "taken", "new"]
    assert database.claim([]) == []


def test_a_prompt_is_new_then_kept_and_in_one_pass_a_duplicate_or_its_id_taken(database):
    database.begin_pass()
    assert claim(database, 0, prompt("a")) == "new"
    assert claim(database, 1, prompt("a")) == "duplicate"
    assert claim(database, 2, prompt("a", "another text")) == "taken"
    database.add_record(record(prompt("a")))
    assert claim(database, 3, prompt("a")) == "duplicate"
    database.begin_pass()
    assert claim(database, 0, prompt("a")) == "kept"


@pytest.mark.parametrize("changed", [prompt("a", "another text"), prompt("a", category="new")])
def test_a_record_counts_only_for_the_very_prompt_that_it_was_made_from(database, changed):
    database.begin_pass()
    claim(database, 0, prompt("a"))
    database.add_record(record(prompt("a"), "old"))
    database.begin_pass()
    assert claim(database, 0, changed) == "new"
    assert list(database.records()) == [], "the old record is not that of the changed prompt, should this one fail"
    database.add_record(record(changed, "new"))
    assert [one.candidates[0].text for one in database.records()] == ["new"]


def test_a_text_in_two_categories_is_one_prompt(database):
    database.begin_pass()
    assert claim(database, 0, prompt("a", category="x")) == "new"
    assert claim(database, 1, prompt("a", category="y")) == "duplicate"


def test_records_come_in_the_order_of_the_prompts_of_this_pass_and_only_these(database):
    prompts = [prompt(name) for name in "abcd"]
    for one in prompts:
        database.add_record(record(one))
    database.begin_pass()
    for position, name in enumerate("dba"):
        claim(database, position, prompt(name))
    assert [one.prompt.id for one in database.records()] == ["d", "b", "a"]


def test_records_can_be_read_while_others_are_written(database):
    database.begin_pass()
    for position in range(50):
        claim(database, position, prompt(str(position)))
        database.add_record(record(prompt(str(position))))
    reading = database.records()
    assert next(reading).prompt.id == "0"
    database.add_calls([call(1), call(2)])
    assert sum(1 for _ in reading) == 49


def test_forgetting_records_keeps_the_calls(database):
    database.add_calls([call(1)])
    database.begin_pass()
    claim(database, 0, prompt("a"))
    database.add_record(record(prompt("a")))
    database.forget_records()
    assert (list(database.records()), database.count_calls()) == ([], 1)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_kept_to_the_letter(database, text):
    database.begin_pass()
    one = record(prompt(text, text, text), text)
    claim(database, 0, one.prompt)
    database.add_record(one)
    row = Quarantined(1, text, text, text, text, text)
    database.quarantine(row)
    assert list(database.records()) == [one]
    assert list(database.quarantined()) == [row]


def test_the_quarantine_is_that_of_this_pass_in_the_order_of_the_rows(database):
    for position in (2, 0, 1):
        database.quarantine(Quarantined(position, "file", None, "reason", "detail", "row"))
    assert [row.position for row in database.quarantined()] == [0, 1, 2]
    database.begin_pass()
    assert list(database.quarantined()) == []


# --- the file


def test_all_is_there_when_it_is_opened_again_and_the_folder_holds_one_file(tmp_path):
    database = Database(tmp_path / "journal.sqlite")
    database.add_calls([call(1)])
    database.close()
    assert [file.name for file in tmp_path.iterdir()] == ["journal.sqlite"]
    database = Database(tmp_path / "journal.sqlite")
    assert database.count_calls() == 1
    database.close()


def test_a_full_disk_says_so_and_loses_nothing(database):
    database.add_calls([call(number) for number in range(10)])
    pages = database._db.execute("PRAGMA page_count").fetchone()[0]
    database._db.execute(f"PRAGMA max_page_count={pages + 2}")
    big = 1 << 20
    for attempt in (
        lambda: database.add_calls([call(11, big)]),
        lambda: database.add_calls([call(12), call(13, big)]),
        lambda: database.add_record(record(prompt("a"), "a" * big)),
        lambda: database.quarantine(Quarantined(0, "f", None, "r", "d", "r" * big)),
    ):
        with pytest.raises(StoreError, match=r"journal\.sqlite: .*full; free some space, then the same command continues"):
            attempt()
    assert database.count_calls() == 10
    database._db.execute("PRAGMA max_page_count=1000000")
    database.add_calls([call(12), call(13, big)])
    assert database.count_calls() == 12


def test_a_commit_that_fails_leaves_no_transaction_open(database):
    database._db.execute("PRAGMA foreign_keys=ON")
    database._db.execute("CREATE TABLE child (a INTEGER REFERENCES prompts (position) DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(StoreError), database.transaction():
        database._db.execute("INSERT INTO child VALUES (5)")
    assert not database._db.in_transaction
    database.add_calls([call(1), call(2)])


def uncommittable(database: Database) -> sqlite3.Connection:
    """The connection, with a claim pending that cannot be committed."""
    database._db.execute("PRAGMA foreign_keys=ON")
    database._db.execute("CREATE TABLE child (a INTEGER REFERENCES prompts (position) DEFERRABLE INITIALLY DEFERRED)")
    claim(database, 0, prompt("a"))
    database._db.execute("INSERT INTO child VALUES (5)")
    return database._db


def test_closing_closes_also_where_what_is_pending_cannot_be_kept(tmp_path):
    database = Database(tmp_path / "journal.sqlite")
    connection = uncommittable(database)
    with pytest.raises(StoreError, match="FOREIGN KEY"):
        database.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


@pytest.mark.parametrize(
    "content", [b"not a database, but a text that is long enough to be taken for one" * 20, b"SQLite format 3\0"]
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, content):
    path = tmp_path / "journal.sqlite"
    path.write_bytes(content * 100)
    with pytest.raises(StoreError, match=r"journal\.sqlite: .*damaged: put a copy of it back, or start over with --fresh"):
        Database(path)
    assert path.read_bytes() == content * 100


def test_damage_inside_the_file_is_named_too(tmp_path):
    path = tmp_path / "journal.sqlite"
    database = Database(path)
    database.add_calls([call(number, 3000) for number in range(100)])
    database.close()
    content = bytearray(path.read_bytes())
    content[4096 * 3 :] = b"\xff" * (len(content) - 4096 * 3)
    path.write_bytes(content)
    database = Database(path)
    with pytest.raises(StoreError, match="damaged"):
        database.usage()
    database.close()


def test_another_format_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "journal.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version=99")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"another version of cai \(format 99\)"):
        Database(path)
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_made_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="unable to open"):
        Database(tmp_path / "missing" / "journal.sqlite")


# --- completions that are given


def test_a_record_counts_only_for_the_completions_that_were_given_with_its_prompt(database):
    one = prompt("a")
    database.begin_pass()
    assert claim(database, 0, one, ("x", "y")) == "new"
    database.add_record(record(one), ("x", "y"))
    for completions, there in ((("x", "y"), "kept"), (("y", "x"), "new"), (("x", "z"), "new"), ((), "new")):
        database.begin_pass()
        assert claim(database, 0, one, completions) == there
        assert len(list(database.records())) == (there == "kept")


def test_a_pair_read_twice_is_a_duplicate_and_other_completions_make_another_pair(database):
    database.begin_pass()
    assert claim(database, 0, prompt("a"), ("x", "y")) == "new"
    assert claim(database, 1, prompt("a"), ("x", "y")) == "duplicate"
    assert claim(database, 2, prompt("a"), ("x", "z")) == "taken"
    assert claim(database, 3, prompt("a")) == "taken"
