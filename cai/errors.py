"""One small tree of errors. Every message says what was wrong, where, what was expected, and what to do.

    CaiError
    ├── ConfigError (ValueError)         a recipe, a flag or an environment that cannot work     exit 2
    │   ├── ConstitutionError            a constitution file that does not validate
    │   └── CapabilityError              an engine lacks what the recipe asks of it
    ├── PromptSourceError (ValueError)   prompts that cannot be read, or none in them
    ├── RowError (ValueError)            one bad row: quarantined, the run goes on
    ├── RequestError (RuntimeError)      one model call that failed for good: its row is quarantined
    │   ├── ContextLengthError           the request does not fit into the model's context
    │   └── VerdictError                 a judge's answer that is no verdict; never counted as a tie
    ├── EngineError (RuntimeError)       the engine itself is unusable: the run stops, resumable
    ├── StoreError (OSError)             the run folder cannot be used or written
    └── Interrupted (RuntimeError)       the run was asked to stop                               exit 130
        └── BudgetError                  the run has spent its budget                            exit 1

Exit codes: 2 for a `ConfigError`, 130 for `Interrupted` but for a budget, 1 for everything else.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable


class CaiError(Exception):
    """Base of all errors that `cai` raises on purpose."""


class ConfigError(CaiError, ValueError):
    """A recipe, a flag or an environment that cannot work."""


class ConstitutionError(ConfigError):
    """A constitution that does not validate."""


class CapabilityError(ConfigError):
    """An engine lacks what the recipe asks of it."""


class PromptSourceError(CaiError, ValueError):
    """Prompts that cannot be read at all."""


class RowError(CaiError, ValueError):
    """One row that cannot become a prompt."""


class RequestError(CaiError, RuntimeError):
    """One model call that failed for good; `reason` is how the quarantine counts it."""

    reason = "request failed"


class ContextLengthError(RequestError):
    """A request that does not fit into the model's context."""

    reason = "too long for the context"


class VerdictError(RequestError):
    """A judge's answer that cannot be read as a verdict."""

    reason = "no verdict"


class EngineError(CaiError, RuntimeError):
    """The engine is unusable; no further request can succeed."""


class StoreError(CaiError, OSError):
    """The run folder cannot be used or written."""


class Interrupted(CaiError, RuntimeError):
    """The run was asked to stop before it was done."""


class BudgetError(Interrupted):
    """The run has spent what its recipe allows; it can go on with more."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def raised(exc: BaseException) -> str:
    """`Type: text` on one line, of what a user's own code has raised, whose text may itself raise."""
    text = " ".join(str(traceback.TracebackException.from_exception(exc, limit=0)).split())
    return f"{type(exc).__name__}: {text}"
