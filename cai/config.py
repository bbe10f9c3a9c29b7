"""The recipe: everything that a run is told, as frozen data that can be printed, saved and read back.

constitution: harmless
seed: 0
prompts: {source: red-team, limit: 24}
policy: {model: smollm2-135m}
judge: {model: null, method: choice, principles: 4}
generation: {candidates: 1, rounds: 2, max_tokens: 256}
dataset: {test_fraction: 0.1}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cai.documents import Document, Part, Text, dump, parse_scalar
from cai.errors import ConfigError
from cai.recipes import generate_document
from cai.servers import BudgetConfig, ServerConfig, model_problem, without_userinfo


class PromptsConfig(Part):
    """Where prompts come from."""

    source: Text = "red-team"
    """A built-in set (`red-team`, `benign`), a file, a `datasets` folder, a Hub dataset id, or `-` for standard input."""
    limit: int | None = Field(default=None, gt=0, le=10**12)
    """Use only the first so many rows; those that are no prompts count too."""
    column: Text | None = None
    """The column that holds the prompt; by default the first of the usual names that is there."""
    split: Text = "train"
    """The split of a Hub dataset or a `datasets` folder."""
    revision: Text | None = None
    """The revision of a Hub dataset (branch, tag or commit)."""
    subset: Text | None = None
    """The configuration of a Hub dataset."""
    data_dir: Text | None = None
    """The folder of a Hub dataset that is read (of `Anthropic/hh-rlhf`: `helpful-base`)."""


class VllmConfig(Part):
    """How vLLM runs a model in process (`vllm:MODEL`)."""

    adapter: Text | None = None
    """The folder of a LoRA adapter that is put on the model."""
    args: dict[str, Any] = Field(default={})
    """Arguments of vLLM's engine under its own names: `{tensor_parallel_size: 2, gpu_memory_utilization: 0.45}`."""


class ModelConfig(Part):
    """A model and how to run it."""

    model: Text = "smollm2-135m"
    """An alias (`smollm2-135m`), a folder, a Hub id (each also as `vllm:MODEL`), the URL of a server
    (`http://127.0.0.1:8000/v1`), or `scripted:FILE.py:FUNCTION`."""
    revision: Text | None = None
    """The Hub revision (branch, tag or commit)."""
    device: Text | None = None
    """`cpu`, `cuda`, `cuda:1`, `mps`; by default the best there is. Not for vLLM, which takes what it was built for."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the machine computes in it, else float32."""
    batch_size: PositiveInt = 64
    """The most requests that are generated together (vLLM: `vllm.args.max_num_seqs`)."""
    batch_tokens: PositiveInt = 32768
    """The most tokens (prompts and what is generated, with padding) that one batch may hold; bounds memory. vLLM has limits
    of its own."""
    exact: bool = False
    """Compute each request alone, in float32 unless `dtype` says otherwise: the same whatever else runs, and slower."""
    server: ServerConfig = ServerConfig()
    """How to ask it, where the model is the URL of a server."""
    vllm: VllmConfig = VllmConfig()
    """How vLLM runs it in process."""

    @model_validator(mode="after")
    def _server_of_a_url(self) -> ModelConfig:
        if problem := model_problem(self.model, self.server):
            raise _wrong(*problem)
        return self


Method = Literal["choice", "reasoning", "likelihood", "score", "text", "checks", "reward-model", "panel"]
RATING = ("likelihood", "score", "checks", "reward-model")
"""The methods that rate each completion by itself."""


class PanelMember(Part):
    """One judge of a panel; what it does not say is as the panel's own section says."""

    name: Text
    """What its verdicts are called."""
    model: Text | None = None
    """Its model; null: the panel's."""
    revision: Text | None = None
    """The Hub revision of its model."""
    server: ServerConfig | None = None
    """How to ask its model, where that is the URL of a server; null: as the panel's."""
    method: Method = "choice"
    """As `judge.method`, but no panel."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Its share in the verdict, relative to the others."""
    calibration: Text | None = None
    """As `judge.calibration`, of this member alone."""

    @model_validator(mode="after")
    def _revision_of_a_model(self) -> PanelMember:
        if self.revision is not None and self.model is None:
            raise _wrong(
                "revision", "names the revision of the member's own model, which is not set; set it, or judge.revision"
            )
        return self


class JudgeConfig(Part):
    """Who compares completions, and how."""

    model: Text | None = None
    """The judge's model; null: the policy's own."""
    revision: Text | None = None
    """The Hub revision of the judge's model."""
    server: ServerConfig | None = None
    """How to ask the judge's model, where that is the URL of a server; null: as the policy's at the same URL."""
    vllm: VllmConfig | None = None
    """How vLLM runs the judge's own model; null, and for models of a panel's members: with the policy's `args`."""
    method: Method = "choice"
    """`choice` (multiple choice by log-probability), `reasoning` (thoughts before the choice), `text` (a generated letter):
    both orders. `likelihood` (contrastive), `score` (1 to 10), `checks` (programs alone), `reward-model`: each completion
    alone. `panel`: several judges, its `members`."""
    principles: PositiveInt | Literal["all"] = 4
    """How many principles judge each pair, drawn anew for every pair (for every prompt, where a method or a member of the
    panel looks at one completion at a time); `all`: every one with a preference question or a check."""
    layout: Literal["principle-last", "principle-first"] = "principle-last"
    """Where `choice` puts the principle: last, so that all principles share one long beginning, or before the completions."""
    exemplars: int = Field(default=0, ge=0)
    """How many of the constitution's exemplars `choice` shows first, as answered questions."""
    samples: PositiveInt = 1
    """How many thoughts (`reasoning`) or answers (`text`) are sampled for each principle and order, and averaged."""
    temperature: float = Field(default=0.7, ge=0, le=5)
    """Of sampling thoughts and answers; 0 is greedy."""
    max_tokens: PositiveInt = 160
    """The most tokens of one thought."""
    clamp: tuple[float, float] = (0.4, 0.6)
    """The lowest and highest probability that `reasoning` may give; [0, 1] clamps nothing."""
    length: Literal["mean", "sum"] = "mean"
    """Whether `likelihood` is averaged or summed over the tokens of a completion."""
    allow_python: bool = False
    """Whether checks may call Python functions that the constitution names."""
    calibration: Text | None = None
    """A file that `cai judge calibrate` wrote; corrects position prior, sign, sharpness and the weights of the principles."""
    members: tuple[PanelMember, ...] = ()
    """The judges of a `panel`."""

    @model_validator(mode="after")
    def _revision_of_a_model(self) -> JudgeConfig:
        if self.revision is not None and self.model is None:
            raise _wrong("revision", "names the revision of judge.model, which is not set; set it, or policy.revision")
        if self.vllm is not None and self.model is None:
            raise _wrong("vllm", "is for judge.model, which is not set; set it, or policy.vllm")
        return self

    @model_validator(mode="after")
    def _server_of_a_url(self) -> JudgeConfig:
        asked = [(self.model, self.server), *((one.model or self.model, one.server) for one in self.members)]
        for index, (model, server) in enumerate(asked):
            if model is not None and (problem := model_problem(model, server or ServerConfig())):
                raise _wrong(problem[0] if index == 0 else f"members.{index - 1}.{problem[0]}", problem[1])
        return self

    @model_validator(mode="after")
    def _clamp_is_a_range(self) -> JudgeConfig:
        low, high = self.clamp
        if not 0 <= low < 0.5 < high <= 1:
            raise _wrong("clamp", f"expected [low, high] with 0 <= low < 0.5 < high <= 1, found [{low}, {high}]")
        return self

    @model_validator(mode="after")
    def _panel_has_members(self) -> JudgeConfig:
        names = [member.name for member in self.members]
        if self.method != "panel" and names:
            raise _wrong("members", "only a panel has members; set judge.method to panel")
        if self.method == "panel" and (len(names) < 2 or len(set(names)) < len(names)):
            raise _wrong("members", "a panel needs two members or more, with different names")
        if self.method == "panel" and self.calibration:
            raise _wrong("calibration", "a calibration is of one judge; give its members theirs: judge.members[].calibration")
        if any(member.method == "panel" for member in self.members):
            raise _wrong("members", "a member of a panel cannot be a panel")
        return self

    def member(self, member: PanelMember) -> JudgeConfig:
        """A member's own judge section."""
        kept = {"method": member.method, "calibration": member.calibration, "members": ()}
        whose = member if member.model else self
        own = {"model": whose.model, "revision": whose.revision, "server": member.server or whose.server}
        return self.model_copy(update={**kept, **own, "vllm": None if member.model else self.vllm})


class GenerationConfig(Part):
    """Answers, critiques and revisions."""

    candidates: int = Field(default=1, gt=0, le=1000)
    """How many completions the policy samples for each prompt. The first one is critiqued and revised."""
    rounds: int = Field(default=2, ge=0)
    """Rounds of critique and revision, each under another principle."""
    pairs: Literal["revision", "samples", "both"] = "revision"
    """What is compared: the original with its revision, the candidates among themselves, or both."""
    comparisons: Literal["all", "tournament", "best-worst"] = "all"
    """Which of K candidates are compared: all with all; in a tournament, K - 1 times; or only the best with the worst, by a
    judge that rates each alone (`score`, `likelihood`, `reward-model`, `checks`)."""
    exemplars: int | None = Field(default=None, ge=0)
    """How many of the constitution's few-shot dialogues stand before each critique; null: all of them, 0: none."""
    max_tokens: PositiveInt = 256
    """The most tokens of one completion, critique or revision."""
    temperature: float = Field(default=0.7, ge=0, le=5)
    """Of sampling answers, critiques and revisions; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: the smallest set of tokens with this much probability."""
    concurrency: int = Field(default=128, gt=0, le=10_000)
    """Prompts in flight at once. Changes speed and memory, never a request."""

    @model_validator(mode="after")
    def _pairs_can_be_made(self) -> GenerationConfig:
        if self.pairs != "revision" and self.candidates < 2:
            problem = f"pairs of kind '{self.pairs}' compare candidates; set generation.candidates to 2 or more"
            raise _wrong("pairs", problem, "candidates")
        if self.pairs != "revision" and self.temperature == 0:
            problem = f"pairs of kind '{self.pairs}' compare candidates, equal at temperature 0; raise generation.temperature"
            raise _wrong("pairs", problem, "temperature")
        if self.pairs != "samples" and self.rounds < 1:
            problem = f"pairs of kind '{self.pairs}' compare revisions; set generation.rounds to 1 or more"
            raise _wrong("pairs", f"{problem}, or generation.pairs to samples and generation.candidates to 2 or more", "rounds")
        return self


class DatasetConfig(Part):
    """The views of the records that are written. Changing these makes no model call."""

    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    """The share of prompts, by hash of their text, whose rows go to the `test` split."""
    min_probability: float = Field(default=0.5, ge=0.5, lt=1)
    """Drop pairs whose `chosen_probability` is not above this; 0.5 drops only ties."""
    sft: Literal["final", "all", "best"] = "final"
    """What `sft` is made of: each prompt's `final` revision, `all` its revisions, or the `best` of its candidates, the one that
    the verdicts rank first."""
    ranking: Literal["none", "bradley-terry"] = "none"
    """`bradley-terry`: of candidates that were all compared, one pair, the best against the worst by strengths fitted to the
    verdicts; `none`: a pair for each verdict."""
    shard_rows: PositiveInt = 100_000
    """Rows in one Parquet file."""
    license: Text | None = None
    """The licence that the card names, as the Hub spells it (`cc-by-4.0`)."""


class RayConfig(Part):
    """Many machines: a Ray cluster whose workers hold the engines. Decides where a record is made, never what is in it."""

    address: Text | None = None
    """`local` (a cluster on this machine, for this run), `auto` or HOST:PORT (one that runs already, of which this machine is
    a node); null: no Ray."""
    workers: int = Field(default=1, gt=0, le=10_000)
    """How many workers; each has its own engines and `generation.concurrency` prompts in flight."""
    cpus_per_worker: float = Field(default=1.0, ge=0, le=10_000)
    """The CPUs that Ray sets aside for a worker; a fraction where it only asks servers."""
    gpus_per_worker: float = Field(default=0.0, ge=0, le=10_000)
    """The GPUs of a worker; a fraction shares one."""
    block_rows: int = Field(default=32, gt=0, le=100_000)
    """Prompts that go to a worker together; what is lost with a worker is at most what it makes of a few such blocks."""

    @field_validator("address")
    @classmethod
    def _of_a_node(cls, value: str | None) -> str | None:
        if value is None or re.fullmatch(r"local|auto|[\w.-]+:\d{1,5}|\[[\da-fA-F:.]+\]:\d{1,5}", value):
            return value
        more = "; run the command on a node of the cluster, or by `ray job submit`" if "://" in value else ""
        raise ValueError(f"expected local, auto or HOST:PORT{more}")


class Recipe(Part):
    """All of it."""

    constitution: Text = "harmless"
    """A built-in constitution's name or a path."""
    seed: int = 0
    """The run's seed; every draw is a hash of it, the prompt's id and the step."""
    policy: ModelConfig = ModelConfig()
    """The model that answers, criticises and revises."""
    judge: JudgeConfig = JudgeConfig()
    """The model that compares."""
    prompts: PromptsConfig = PromptsConfig()
    """What is answered."""
    generation: GenerationConfig = GenerationConfig()
    """How it is answered and revised."""
    dataset: DatasetConfig = DatasetConfig()
    """What is written of it."""
    budget: BudgetConfig = BudgetConfig()
    """What it may cost."""

    ray: RayConfig = RayConfig()
    """On which machines."""

    @field_validator("policy", "judge", "prompts", "generation", "dataset", "budget", "ray", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        generation, judge = self.generation, self.judge
        if judge.server and judge.model is None and (problem := model_problem(self.policy.model, judge.server)):
            raise _wrong("judge.server", problem[1])
        if generation.comparisons == "best-worst" and self.judge.method not in RATING:
            raise _wrong("generation.comparisons", f"best-worst needs a judge that rates each alone: {', '.join(RATING)}")
        if self.dataset.ranking != "none" and (generation.pairs == "revision" or generation.comparisons != "all"):
            needed = "generation.comparisons: all and generation.pairs: samples (or both)"
            raise _wrong("dataset.ranking", f"{self.dataset.ranking} ranks candidates that were all compared; set {needed}")
        if self.dataset.sft == "best" and generation.pairs == "revision":
            raise _wrong("dataset.sft", "best is of candidates that were compared; set generation.pairs: samples (or both)")
        return self

    def judge_model(self, judge: JudgeConfig) -> ModelConfig:
        """A judge as an engine's configuration: the policy's settings with the judge's model in its place."""
        if judge.model is None and judge.server is None:
            return self.policy
        model, revision = judge.model or self.policy.model, judge.revision if judge.model else self.policy.revision
        server = judge.server or (self.policy.server if model == self.policy.model else ServerConfig())
        shared = VllmConfig(args=self.policy.vllm.args) if model.startswith("vllm:") else VllmConfig()
        vllm = judge.vllm or (shared if judge.model else self.policy.vllm)
        return self.policy.model_copy(update={"model": model, "revision": revision, "server": server, "vllm": vllm})

    def to_yaml(self) -> str:
        """The resolved recipe, every key spelled out."""
        return dump(self.model_dump(mode="json"))


def _wrong(key: str, problem: str, beside: str | None = None) -> PydanticCustomError:
    """What is wrong with one key of a section, or with the one `beside` it, whichever was set last."""
    places = {"at": tuple(key.split(".")), "or_at": tuple((beside or key).split("."))}
    return PydanticCustomError("value_error", "{problem}", {"problem": problem, **places})


def load_recipe(path: str | Path | None, overrides: list[tuple[str, object, str]]) -> Recipe:
    """A recipe from a file or by built-in name (or the defaults) with flags on top.

    `overrides` are (dotted key, value, the flag they came from). Raises `ConfigError` naming file, line, key and fix.
    A constitution or prompts that the recipe names by a path are looked for beside the recipe first. Of a pipeline
    (`cai run`) it is the first stage.
    """
    document = Document("{}", "the command line") if path is None else generate_document(path)
    for dotted, value, source in overrides:
        document.override(dotted, value, source)
    return document.validate(Recipe)


def parse_set(assignment: str) -> tuple[str, object, str]:
    """`judge.principles=all` as an override."""
    key, equals, value = assignment.partition("=")
    shown = without_userinfo(assignment)
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {shown}: expected key=value, for example --set judge.principles=all")
    return key.strip(), parse_scalar(value), f"--set {shown}"
