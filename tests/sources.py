"""What the tests of prompt sources share: writing one, reading it, and the error that reading it raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cai.config import PromptsConfig
from cai.errors import PromptSourceError
from cai.prompts import Row, read_prompts


def read(source: Path | str, **options: Any) -> list[Row]:
    return list(read_prompts(PromptsConfig(source=str(source), **options)))


def texts(source: Path | str, **options: Any) -> list[str | None]:
    return [row.prompt.messages[-1].content if row.prompt else None for row in read(source, **options)]


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def source_error(source: Path | str, **options: Any) -> str:
    with pytest.raises(PromptSourceError) as caught:
        read(source, **options)
    return str(caught.value)
