"""Whether the URLs of one model have the same model: a replica with other weights would mix two in one dataset."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cai.engines.http import Client
from cai.engines.probe import models_in, weights_of
from cai.errors import ConfigError, EngineError
from cai.servers import ServerConfig

_PATIENCE = 15.0
"""Seconds that a replica has to say what it is; one that is not up is not asked."""
Models = dict[str, str]
"""What each of a server's models stands for, by the model's name."""


async def check_replicas(urls: Sequence[str], config: ServerConfig, section: str, name: str) -> None:
    """Ask each URL that is up for its models. Raises `ConfigError` where `name` is not the same everywhere."""
    if len(urls) < 2:
        return
    told = zip(urls, await asyncio.gather(*(_models(url, config, section) for url in urls)), strict=True)
    listed = [(url, models) for url, models in told if models]
    first, there = next(((url, models) for url, models in listed if name in models), ("", {}))
    for url, models in listed if first else ():
        if name not in models:
            raise ConfigError(f"{first} has the model '{name}', and {url} has not: {', '.join(models)}; {_advice(section)}")
        if models[name] and there[name] and models[name] != there[name]:
            raise ConfigError(
                f"the model '{name}' is '{there[name]}' at {first}, and '{models[name]}' at {url}; {_advice(section)}"
            )


def _advice(section: str) -> str:
    return f"serve the same model at all URLs, or leave one out of {section}.replicas"


async def _models(url: str, config: ServerConfig, section: str) -> Models:
    """Empty where a server is not up, or does not list its models."""
    client = Client([url], config, section)
    try:
        async with asyncio.timeout(_PATIENCE):
            status, said = await client.exchange("/v1/models")
    except (EngineError, TimeoutError):
        return {}
    finally:
        await client.close()
    return {name: weights_of(one) for name, one in models_in(status, said).items()}
