"""How to ask a model that a server has, and what that may cost: the sections `server` and `budget` of a recipe."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from cai.documents import Part, Text

_OURS = {"model", "messages", "prompt", "n", "stream"}
_CALL = re.compile(r"(/chat)?/completions/*$|/models/*$")
"""Paths of calls, which come below a base URL."""
_SECRET = re.compile(r"(x[-_])?api[-_]?key|authorization|(auth|access|bearer)?[-_]?token|secret|password", re.I)
"""Fields that hold a key."""
_USERINFO = re.compile(r"://[^/\s]*@")


class ServerConfig(Part):
    """How to ask a model that a server has; only `name`, `api`, `n` and `extra_body` change what is answered."""

    name: Text | None = None
    """The model's name at the server; null: the only one that it lists."""
    api: Literal["chat", "completions"] = "chat"
    """`chat`: the server applies its chat template; `completions`: a dialogue is sent as a plain text of `Human:` and
    `Assistant:`, for base models."""
    replicas: tuple[Text, ...] = ()
    """More base URLs at which the same model answers; requests go where the fewest are waiting."""
    key_env: Text = "OPENAI_API_KEY"
    """The environment variable that holds the key, where the server wants one."""
    key_file: Text | None = None
    """A file that holds the key, in place of the variable."""
    concurrency: int | None = Field(default=None, gt=0, le=10_000)
    """The most requests in flight at one URL; null: found while running, by what the server can bear."""
    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """No more requests are sent."""
    tokens_per_minute: int | None = Field(default=None, gt=0)
    """No more tokens are asked for, those of prompts and of completions together."""
    n: bool = False
    """Ask for completions of one prompt (`generation.candidates`, `judge.samples`) by one request with the API's `n` and the
    first one's seed, so that the prompt is paid for once; its tokens are counted with the first. What is asked for together
    depends on what the journal lacks, so a run that was stopped can sample other texts than one that was not. For a server
    that repeats itself under one seed, `extra_body: {seed: null}` leaves the seed out."""
    timeout: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Seconds that one attempt may take."""
    retries: int = Field(default=6, ge=0, le=1000)
    """How often a request that failed is sent again, where that can help."""
    give_up: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """Seconds that an overloaded or unreachable server is waited for, before the run stops; so it does where the server asks
    for a longer pause (`Retry-After`)."""
    batch: bool = False
    """Send calls through the server's batch API (`/v1/batches`), which hosted providers offer at a lower price within 24 hours.
    At least 10,000 prompts are worked on at once, whatever `generation.concurrency` says. A run can change to and fro; calls
    that a batch has under way are then made once more."""
    batch_wait: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Seconds without a new call after which those that are gathered become a batch."""
    batch_poll: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Seconds before a batch is first looked at; the pauses grow to the twelvefold."""
    extra_body: dict[str, Any] = {}  # noqa: RUF012
    """More fields of every request, such as `{chat_template_kwargs: {enable_thinking: false}}`; null takes a field out."""
    input_price: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """What a million prompt tokens cost, in the currency of `budget.money`, which needs this or the next; 0: nothing."""
    output_price: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """What a million generated tokens cost."""

    @field_validator("extra_body")
    @classmethod
    def _adds(cls, value: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(_OURS & value.keys()):
            raise ValueError(f"'{own[0]}' is not for extra_body; the engine sets it")
        if secret := next(filter(_SECRET.fullmatch, value), None):
            raise ValueError(
                f"'{secret}' is not for extra_body, which stands in recipe.yaml; give a key by key_env or key_file"
            )
        return value

    @field_validator("replicas")
    @classmethod
    def _urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if problem := url_problem(url):
                raise ValueError(problem)
        return value

    @model_validator(mode="after")
    def _batches_at_one_url(self) -> ServerConfig:
        if self.batch and self.replicas:
            raise ValueError("replicas are not used with batch: files and batches belong to one URL; remove one of them")
        return self


class BudgetConfig(Part):
    """What a run folder may cost, all its sessions together; a run that has spent it stops and can go on with more."""

    tokens: int | None = Field(default=None, gt=0)
    """Tokens of prompts and completions, of policy and judge."""
    money: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Money, by the prices of `policy.server` and `judge.server`; refused where one that works has none."""


def is_url(model: str) -> bool:
    """Whether a model's name is the address of a server."""
    return model.lower().startswith(("http:", "https:"))


def url_problem(url: str) -> str | None:
    """What is wrong with a server's base URL, without repeating it: it may hold a password."""
    try:
        parts = urlsplit(url)
        named = parts.hostname and (parts.port or True)
    except ValueError:
        named = False
    if not is_url(url) or not named:
        return "expected the base URL of a server, such as http://127.0.0.1:8000/v1"
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        return "a URL with a user or a password in it is refused; give the key by server.key_env or server.key_file"
    if call := _CALL.search(parts.path):
        return f"expected the base URL of a server, without '{call[0]}' at its end"
    if parts.query or parts.fragment:
        return "a URL with '?' or '#' is refused; give the key by server.key_env or server.key_file"
    return None


def model_problem(model: str, server: ServerConfig) -> tuple[str, str] | None:
    """What is wrong with a model's name and the server's settings beside it: the key, and the problem."""
    if is_url(model):
        problem = url_problem(model)
        return ("model", problem) if problem else None
    if server != ServerConfig():
        return "server", "these settings are for the URL of a server, and this model is none; remove them"
    return None


def without_userinfo(text: str) -> str:
    """A text in which the users and passwords of URLs are starred out."""
    return _USERINFO.sub("://***@", text)
