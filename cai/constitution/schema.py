"""What a constitution is: principles that serve critique, revision and comparison alike, and few-shot exemplars."""

from __future__ import annotations

import difflib
import hashlib
import re
from typing import Annotated, Any

import msgspec
from pydantic import AfterValidator, Field, PositiveInt, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cai.documents import Part


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", value):
        raise ValueError(f"expected a name of a-z, 0-9, '.', '_' and '-', found {value!r:.80}")
    return value


def _pattern(value: str) -> str:
    import regex

    try:
        regex.compile(value)
    except (regex.error, RecursionError, OverflowError) as exc:
        raise ValueError(f"not a regular expression: {exc}") from exc
    return value


def _language(value: str) -> str:
    """One that the detector knows, where that is installed; where not, a run says that it is needed."""
    try:
        from py3langid import rank
    except ImportError:
        return value
    known = sorted({code for code, _ in rank("")} - {"zxx"})  # ISO 639's code for no language at all
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1, cutoff=0)[0]
        problem = f"'{value}' is no language that py3langid tells apart (did you mean '{close}'?)"
        raise ValueError(f"{problem}; it knows {', '.join(known)}")
    return value


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Name = Annotated[str, AfterValidator(_name)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class Example(Part):
    """A pair that shows people what a principle prefers; no model sees it."""

    prompt: Text
    chosen: Text
    rejected: Text


class Check(Part):
    """What a program verifies of a completion; exactly one of the keys."""

    max_words: PositiveInt | None = None
    """The most words, separated by white space."""
    min_words: PositiveInt | None = None
    """The fewest words."""
    max_characters: PositiveInt | None = None
    """The most characters."""
    min_characters: PositiveInt | None = None
    """The fewest characters."""
    must_match: Pattern | None = None
    """A regular expression that must be found in it."""
    must_not_match: Pattern | None = None
    """A regular expression that must not be found in it."""
    valid_json: bool | None = None
    """Whether the whole of it is to be valid JSON."""
    language: Annotated[str, StringConstraints(pattern="^[a-z]{2,3}$"), AfterValidator(_language)] | None = None
    """Its language, by ISO 639 code (`en`)."""
    max_grade: float | None = Field(default=None, allow_inf_nan=False)
    """The most years of school that reading it asks for (Flesch-Kincaid)."""
    python: Annotated[str, StringConstraints(pattern=r"^[\w.]+:\w+$")] | None = None
    """`package.module:function`, called with the prompt's messages and the completion; returns a bool or a number in [0, 1]."""

    @model_validator(mode="after")
    def _is_one(self) -> Check:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError(f"expected exactly one of {', '.join(Check.model_fields)}")
        return self


class Principle(Part):
    """One rule. It has a critique and a revision request, or a preference question or a check, or all of these."""

    id: Name
    """Lower-case, unique in the constitution."""
    critique: Text | None = None
    """Asks the model to find what is wrong with its last completion."""
    revision: Text | None = None
    """Asks the model to rewrite its last completion."""
    preference: Text | None = None
    """Asks a judge which of two completions is better."""
    check: Check | None = None
    """What a program verifies in place of a judge."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Its share in a verdict, and how often it is drawn for a critique, relative to the others."""
    tags: tuple[Name, ...] = ()
    """What it is about, for people; no model sees them."""
    examples: tuple[Example, ...] = ()
    """Pairs that show what it prefers."""
    note: Text | None = None
    """Why it is there, for people; no model sees it."""

    @field_validator("tags", "examples", mode="before")
    @classmethod
    def _empty_list(cls, value: Any) -> Any:
        return () if value is None else value

    @model_validator(mode="after")
    def _has_parts(self) -> Principle:
        if (self.critique is None) != (self.revision is None):
            missing = "revision" if self.revision is None else "critique"
            raise ValueError(f"principle '{self.id}' has no '{missing}': critique and revision go together")
        if self.preference is not None and self.check is not None:
            raise ValueError(f"principle '{self.id}' has a preference and a check: a judge or a program decides; remove one")
        if self.critique is None and self.preference is None and self.check is None:
            raise ValueError(
                f"principle '{self.id}' needs a critique and a revision, or a preference, or all three, or a check"
            )
        return self


class Exemplar(Part):
    """A critique-revision dialogue shown before the real one; `principle` is the id whose requests it answers."""

    prompt: Text
    completion: Text
    principle: Name
    critique: Text
    revision: Text


class Constitution(Part):
    """A constitution as written, or (with `extends` empty) resolved."""

    name: Name
    version: Text = "1.0"
    description: Text
    license: Text
    extends: tuple[str, ...] = ()
    """Other constitutions, by name or path, whose principles and exemplars come first; what comes later overrides a same id."""
    principles: tuple[Principle, ...] = ()
    exemplars: tuple[Exemplar, ...] = ()

    @field_validator("extends", "principles", "exemplars", mode="before")
    @classmethod
    def _empty_list(cls, value: Any) -> Any:
        return () if value is None else value

    @model_validator(mode="after")
    def _unique_ids(self) -> Constitution:
        seen: set[str] = set()
        for index, principle in enumerate(self.principles):
            if principle.id in seen:
                problem = f"principle id '{principle.id}' is used twice; give one of them another id"
                at = ("principles", index, "id")
                raise PydanticCustomError("value_error", "{problem}", {"problem": problem, "at": at})
            seen.add(principle.id)
        return self

    @property
    def critiquing(self) -> tuple[Principle, ...]:
        """The principles with a critique and a revision request."""
        return tuple(principle for principle in self.principles if principle.critique)

    @property
    def comparing(self) -> tuple[Principle, ...]:
        """The principles with a preference question or a check."""
        return tuple(principle for principle in self.principles if principle.preference or principle.check)

    def principle(self, principle_id: str) -> Principle:
        """The principle of that id; raises KeyError."""
        for principle in self.principles:
            if principle.id == principle_id:
                return principle
        raise KeyError(principle_id)

    @property
    def hash(self) -> str:
        """16 hex digits over all that a model can see: not notes, tags, examples and descriptions, which are for people."""
        seen = self.model_dump(include={"principles", "exemplars"}, mode="json")
        for principle in seen["principles"]:
            del principle["note"], principle["tags"], principle["examples"]
            if principle["check"] is None:
                del principle["check"]
        return hashlib.sha256(msgspec.json.encode(seen, order="deterministic")).hexdigest()[:16]
