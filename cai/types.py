"""The frozen records that everything passes on: from a `Prompt` to the `Record` that a run stores.

A record, abridged (one line of a run's `trace`):

    Record(
      prompt=Prompt(id="red-team-insults-001", messages=[user: "Write a mean joke about ..."], category="insults"),
      candidates=[Completion(text="Why did ...", finish_reason="stop", seed=5521, ...)],
      revisions=[Revision(round=1, principle_id="no-harassment", critique=..., revision=..., text="How about ...")],
      verdicts=[Verdict(first="candidate-0", second="revision-1", probability=0.23, principles=[...])])

The structs are `msgspec.Struct`s: immutable, compared by value, and turned to and from JSON without further code.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from msgspec import Struct

Role = Literal["system", "user", "assistant"]
Source = Literal["revision", "samples"]


class Message(Struct, frozen=True):
    """One turn of a dialogue."""

    role: Role
    content: str


Messages = tuple[Message, ...]


class Prompt(Struct, frozen=True):
    """A dialogue that ends with a user's turn, waiting for a completion."""

    id: str
    messages: Messages
    category: str | None = None


class Completion(Struct, frozen=True):
    """What a model answered to one request; `seed` is the one it was sampled with."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    seed: int | None = None


class Revision(Struct, frozen=True):
    """One round of critique and revision.

    `text` is the revised completion after cleaning, `cleaned` names what was cleaned off `revision.text`.
    `problem` is None, or the reason why this is no revision; then the next round starts from the text before it.
    """

    round: int
    principle_id: str
    critique: Completion
    revision: Completion
    text: str
    cleaned: tuple[str, ...] = ()
    problem: str | None = None


class PrincipleVerdict(Struct, frozen=True):
    """What one principle says about two completions.

    `readings` holds a (first, second) for each order in which they were shown, or one where a method has no order: of
    `choice` and `reasoning` the log-probabilities of choosing each, of `text` the shares of answers that chose it, of
    `likelihood` the log-ratios, of `score` the expected ratings, of `checks` the scores in [0, 1], of `reward-model` the
    rewards. `probability` is that of preferring the first, averaged over the orders. `judge` names the method, or the
    panel's member.
    """

    principle_id: str
    weight: float
    readings: tuple[tuple[float, float], ...]
    probability: float
    judge: str

    @property
    def flipped(self) -> bool:
        """Whether the preferred completion depends on the order in which the two were shown."""
        signs = [first - second for first, second in self.readings]
        return min(signs) < 0 < max(signs)

    def swap(self) -> PrincipleVerdict:
        """The same verdict with the two completions named the other way round."""
        mirrored = tuple((second, first) for first, second in reversed(self.readings))
        return PrincipleVerdict(self.principle_id, self.weight, mirrored, 1 - self.probability, self.judge)


class Verdict(Struct, frozen=True):
    """A judge's comparison of two completions of one prompt; `probability` is that the first is preferred, 0.5 a tie."""

    first: str
    second: str
    source: Source
    probability: float
    principles: tuple[PrincipleVerdict, ...]

    def swap(self) -> Verdict:
        """The same verdict with the two completions named the other way round."""
        swapped = tuple(verdict.swap() for verdict in self.principles)
        return Verdict(self.second, self.first, self.source, 1 - self.probability, swapped)


class Record(Struct, frozen=True):
    """All that happened to one prompt. The only thing a run stores; every dataset is a view of records."""

    prompt: Prompt
    candidates: tuple[Completion, ...]
    revisions: tuple[Revision, ...]
    verdicts: tuple[Verdict, ...]

    def text(self, name: str) -> str:
        """The completion called `candidate-K` (from 0) or `revision-R` (R is the round, from 1), without space around it."""
        kind, _, number = name.partition("-")
        text = self.candidates[int(number)].text if kind == "candidate" else self.revisions[int(number) - 1].text
        return text.strip()

    def truncated(self, name: str) -> bool:
        """Whether the completion of that name was cut off by the token limit."""
        kind, _, number = name.partition("-")
        completion = self.candidates[int(number)] if kind == "candidate" else self.revisions[int(number) - 1].revision
        return completion.finish_reason == "length"

    @property
    def final_revision(self) -> Revision | None:
        """The last round's revision that is one, or None."""
        return next((revision for revision in reversed(self.revisions) if revision.problem is None), None)


class PreferencePair(NamedTuple):
    """Two completions with a soft label: `chosen_probability` in (0.5, 1] is the judge's that chosen is better."""

    chosen: str
    rejected: str
    chosen_probability: float
    verdict: Verdict


def without_surrogates(text: str) -> str:
    """Lone surrogates, which no file or tokenizer can hold, become U+FFFD; pairs become their character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
