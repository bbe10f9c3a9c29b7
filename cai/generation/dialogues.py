"""What the policy is shown: the conversation alone, then the request for a critique, then the request for a revision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template

from cai.constitution import Constitution, Exemplar, Principle
from cai.types import Message, Messages

_FOLDER = Path(__file__).parent
_CRITIQUE = Template(_FOLDER.joinpath("critique.txt").read_text(encoding="utf-8"))
_REVISION = Template(_FOLDER.joinpath("revision.txt").read_text(encoding="utf-8"))


def few_shot(constitution: Constitution, exemplars: Sequence[Exemplar]) -> Messages:
    """The exemplars as dialogues in the very form of the real one."""
    turns: Messages = ()
    for exemplar in exemplars:
        principle = constitution.principle(exemplar.principle)
        opening = (Message("user", exemplar.prompt),)
        turns += critique_request(opening, exemplar.completion, principle)
        turns += revision_request(exemplar.critique, principle)
        turns += (Message("assistant", exemplar.revision),)
    return turns


def with_few_shot(exemplars: Messages, prompt: Messages) -> Messages:
    """The exemplars before the prompt, but after its system message, which has to stand first."""
    systems = 1 if prompt[0].role == "system" else 0
    return prompt[:systems] + exemplars + prompt[systems:]


def critique_request(prompt: Messages, completion: str, principle: Principle) -> Messages:
    """The dialogue that asks for a critique of `completion`."""
    request = _CRITIQUE.substitute(request=principle.critique).strip()
    return (*prompt, Message("assistant", completion), Message("user", request))


def revision_request(critique: str, principle: Principle) -> Messages:
    """The turns after the critique request that ask for the revision."""
    request = _REVISION.substitute(request=principle.revision).strip()
    return Message("assistant", critique), Message("user", request)
