"""A judge's verdicts, corrected by what people preferred: its scale, its sign, its weights and its bias for an order.

A calibration is a small YAML file that `cai judge calibrate` fits on labelled pairs and that a run applies:

    method: choice
    judge: HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f...
    constitution: harmless@3f0c9b1d2e4a5f67
    settings: {layout: principle-last, exemplars: 0, ..., prompts: 5be01f3c9a7d2e64}
    pairs: 400
    kind: weights
    temperature: 0.62
    sign: 1
    principles:
      no-harm: {prior: 0.81, weight: 1.10}
      honest: {prior: -0.20, weight: 0.51}
    cross_validated:
      before: {accuracy: [0.55, 0.51, 0.59], log_loss: [0.74, 0.70, 0.78]}
      after: {accuracy: [0.61, 0.57, 0.65], log_loss: [0.65, 0.63, 0.67]}

Of principle k, the difference d of a reading (first - second) is the judge's signal s plus, where the first completion was
shown first, its prior b for that place (Zheng et al. 2024, "Large language models are not robust multiple choice
selectors", arXiv 2309.03882): d_0 = s + b, d_1 = s - b. The evidence x is the mean of d over the orders, in which b cancels.
The calibrated verdict is a logistic model of it (Platt 1999, "Probabilistic outputs for support vector machines"):

    logit p = sum over k of weight_k * x_k * (principles of the calibration / principles of the verdict)

where the last factor makes up for principles that were not drawn. There is no intercept, so that p(a, b) + p(b, a) = 1. Of
kind `scale`, the weights are the constitution's, divided by one temperature (Guo et al. 2017, "On calibration of modern
neural networks", arXiv 1706.04599), and turned where the sign is -1: a small judge can be anti-correlated with people
(RLCD, Yang et al. 2023, arXiv 2307.12950, measured an agreement of 0.44). Of kind `weights`, each principle has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from pydantic import Field, PositiveInt, ValidationError, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import PydanticCustomError

from cai.config import JudgeConfig
from cai.constitution import Constitution, Principle
from cai.documents import Document, Part, Text, dump
from cai.errors import ConfigError, VerdictError
from cai.judging.base import Judge, Named, leaning, probability
from cai.judging.checks import python_hashes
from cai.store import content_hash
from cai.types import Messages, PrincipleVerdict, Source, Verdict

Number = Annotated[float, Field(allow_inf_nan=False)]
Range = tuple[Number, Number, Number]
"""An estimate with its 95 % interval: mean, low, high."""
_AGAIN = "run `cai judge calibrate` again"
_ELSEWHERE = {"model", "revision", "server", "vllm", "method", "principles", "calibration", "members", "allow_python"}
"""Keys of a judge's section that other keys of a calibration hold, or that change no reading of a principle."""
_LARGEST = 1e100
"""The largest difference that is believed: beyond it, squares and sums of many overflow."""


class PrincipleCalibration(Part):
    """What was found of one principle."""

    prior: Number
    """How much the judge's difference leans to the completion that is shown first."""
    weight: Number
    """What a difference of 1 adds to the verdict's logit where all principles are present; negative: turned."""


class Quality(Part):
    """How well verdicts agree with people."""

    accuracy: Range
    """The share of pairs in which the judge prefers what people chose; a tie counts half."""
    log_loss: Range
    """The mean of -log p(chosen), in nats; a judge that always says 0.5 has 0.693."""


class CrossValidated(Part):
    """Measured on pairs of prompts that the calibration was not fitted on."""

    before: Quality
    """Of the verdicts as the judge gave them."""
    after: Quality
    """Of the calibrated verdicts."""


class Calibration(Part):
    """How to correct the verdicts of one judge under one constitution."""

    method: Text
    """The judge's method."""
    judge: Text
    """The fingerprint of the judge's engine."""
    constitution: Text
    """The constitution as name@hash."""
    settings: dict[Text, Any]
    """What else moves the judge's numbers: its section of the recipe, the method's prompts, the code of checks in Python."""
    pairs: PositiveInt
    """How many labelled pairs it was fitted on."""
    kind: Literal["scale", "weights"]
    """`scale`: one coefficient for all principles; `weights`: one for each."""
    temperature: float = Field(gt=0, allow_inf_nan=False)
    """What a principle's differences are divided by: 1 / the sum of the absolute weights."""
    sign: Literal[1, -1]
    """-1 where the judge as a whole prefers what people reject; also that of a principle whose weight is 0."""
    principles: dict[Text, PrincipleCalibration] = Field(min_length=1)
    """By the principle's id."""
    cross_validated: CrossValidated
    """What it is worth."""

    @field_validator("principles", mode="wrap")
    @classmethod
    def _tell_the_key(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Names the principle and the key, which stand where a document knows only fields."""
        try:
            return check(value)
        except ValidationError as exc:
            detail = exc.errors(include_url=False)[0]
            problem = "expected for each principle a section with the two numbers 'prior' and 'weight'"
            found = {"missing": "this key is required", "extra_forbidden": "unknown key"}.get(
                detail["type"], f"found {detail['input']!r:.80}"
            )
            at = {"problem": f"{found}; {problem}", "at": detail["loc"]}
            raise PydanticCustomError("value_error", "{problem}", at) from exc

    def to_yaml(self) -> str:
        """The file's content."""
        return dump(self.model_dump(mode="json"))


class LoadedCalibration(NamedTuple):
    """A calibration and the content of its file, which is read once: what is used is what was checked and named."""

    calibration: Calibration
    text: str

    @property
    def hash(self) -> str:
        """Of the content."""
        return content_hash(self.text)


def load_calibration(path: Path) -> LoadedCalibration:
    """A calibration from a file. Raises `ConfigError` naming file, line, key and fix."""
    if not path.exists():
        raise ConfigError(f"{path}: there is no such calibration; `cai judge calibrate PAIRS --save {path}` makes one")
    document = Document.read(path)
    return LoadedCalibration(document.validate(Calibration), document.text)


class JudgeIdentity(NamedTuple):
    """All that decides a judge's numbers; each is a key of a calibration, and described there."""

    method: str
    judge: str
    constitution: str
    settings: dict[str, Any]


def judge_identity(config: JudgeConfig, fingerprint: str, constitution: Constitution) -> JudgeIdentity:
    """Of the judge of this section, whose engine has that fingerprint."""
    settings = config.model_dump(mode="json", exclude=_ELSEWHERE)
    prompts = sorted(Path(__file__).parent.glob(f"{config.method}*.txt"))
    settings["prompts"] = content_hash("\0".join(file.read_text(encoding="utf-8") for file in prompts))
    settings |= python_hashes(constitution.comparing)
    return JudgeIdentity(config.method, fingerprint, f"{constitution.name}@{constitution.hash}", settings)


def check_fits(calibration: Calibration, judge: JudgeIdentity) -> None:
    """Raises `ConfigError` where the calibration was made for another judge, naming all that differs."""
    fitted = calibration.model_dump()
    pairs = {key: (fitted[key], now) for key, now in judge._asdict().items() if key != "settings"}
    for key in sorted({*calibration.settings, *judge.settings}):
        pairs[f"judge.{key}"] = calibration.settings.get(key), judge.settings.get(key)
    different = [f"{key}: fitted for {_shown(was)}, this is {_shown(now)}" for key, (was, now) in pairs.items() if was != now]
    if different:
        raise ConfigError(f"the calibration does not fit this judge: {'; '.join(different)}; {_AGAIN}")


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"'{value}'"


def evidence(verdict: Verdict) -> dict[str, float]:
    """For each principle's id the mean difference of its readings, from which a bias for an order cancels.

    Odd to the last digit in `Verdict.swap()`. Raises `ConfigError` where two members of a panel judged one principle, and
    `VerdictError` for a difference that is too large to calculate with.
    """
    found: dict[str, float] = {}
    for one in verdict.principles:
        if one.principle_id in found:
            raise ConfigError(f"principle '{one.principle_id}' has two verdicts; calibrate a panel's members one by one")
        differences = _differences(one)
        if not all(abs(difference) <= _LARGEST for difference in differences):
            raise VerdictError(
                f"principle '{one.principle_id}': the judge's readings {list(one.readings)!r:.200} differ by more than "
                f"{_LARGEST:g}, which cannot be calibrated"
            )
        found[one.principle_id] = math.fsum(differences) / len(differences)
    return found


def order_prior(one: PrincipleVerdict) -> float | None:
    """One pair's estimate of the bias for what is shown first, (d_0 - d_1) / 2; None where there are no two orders."""
    differences = _differences(one)
    return (differences[0] - differences[1]) / 2 if len(differences) == 2 else None


def _differences(one: PrincipleVerdict) -> list[float]:
    return [first - second for first, second in one.readings]


def apply(calibration: Calibration, verdict: Verdict) -> Verdict:
    """The calibrated verdict; readings and weights stay as they were.

    A principle's probability is the mean over its readings of sigmoid(c * direction / temperature). Of two readings, c is
    d_0 - b and d_1 + b; of a single one, which has no order, it is d. The direction is the sign of the principle's weight.

    It commutes with `Verdict.swap()` to the last digit. That turns the signs of the differences and their order, since it
    exchanges which of the two is "first shown first": d_0' = -d_1, d_1' = -d_0. So c_0' = -d_1 - b = -c_1 and
    c_1' = -c_0: all that is summed changes its sign and nothing else, the sigmoid less 0.5 and the rounding of
    `base.probability` are odd, and the prior is one number that does not change. Raises `ConfigError` for a principle that
    the calibration does not know. Without principles, which is an abstention, there is nothing to calibrate.
    """
    found = evidence(verdict)
    if not found:
        return verdict
    if unknown := sorted(found.keys() - calibration.principles.keys()):
        raise ConfigError(
            f"the calibration does not know principle '{unknown[0]}': no labelled pair was judged under it; "
            f"{_AGAIN}, with judge.principles: all"
        )
    logit = sum(calibration.principles[key].weight * one for key, one in found.items())
    logit *= len(calibration.principles) / len(found)
    principles = tuple(_calibrated(calibration, one) for one in verdict.principles)
    return msgspec.structs.replace(verdict, probability=probability(leaning(logit)), principles=principles)


def _calibrated(calibration: Calibration, one: PrincipleVerdict) -> PrincipleVerdict:
    known = calibration.principles[one.principle_id]
    scale = math.copysign(1, known.weight or calibration.sign) / calibration.temperature
    priors = (known.prior, -known.prior) if len(one.readings) == 2 else (0.0,)
    leanings = [leaning((d - prior) * scale) for d, prior in zip(_differences(one), priors, strict=True)]
    return msgspec.structs.replace(one, probability=probability(sum(leanings) / len(leanings)))


class CalibratedJudge:
    """A judge whose verdicts are calibrated."""

    def __init__(self, judge: Judge, calibration: Calibration) -> None:
        """The calibration must be one of this judge: see `check_fits`."""
        self._judge, self._calibration = judge, calibration

    async def compare(
        self, prompt: Messages, pair: tuple[Named, Named], principles: Sequence[Principle], source: Source, seed: int
    ) -> Verdict:
        """The judge's verdict, calibrated. Raises what the judge raises, and `ConfigError` for an unknown principle."""
        return apply(self._calibration, await self._judge.compare(prompt, pair, principles, source, seed))
