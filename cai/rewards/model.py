"""A reward model as everything after its training uses it: dialogues in, rewards and what they are made of out.

    model = RewardModel.load("models/reward")
    scores = model.score([[{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "..."}]])
    scores.reward[0], scores.objectives[0], scores.members[0]

It is one network or an ensemble, each with one output or one for each objective, as a folder of `cai train reward` holds them;
a sequence classifier with one output from anywhere else counts as it is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from cai.config import ModelConfig
from cai.documents import Document
from cai.errors import ConfigError, ContextLengthError, EngineError
from cai.models import locate
from cai.rewards.combining import Scores, combine
from cai.rewards.dialogues import Dialogue, DialogueTokenizer, completion_length
from cai.rewards.heads import make_exact
from cai.rewards.spec import SPEC, MemberSpec, RewardSpec
from cai.weights import best_device, context_length, context_of_place, loading, pretrained, resolve_dtype

if TYPE_CHECKING:
    from cai.intervals import Numbers

Encoded = Sequence[list[int]]
"""A dialogue as tokens for each member."""
_Base = tuple[str, str | None]
"""The name and revision of a model that adapters change."""
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class _Member:
    """A network, or a base with the name of the adapters to switch on."""

    network: Any
    tokenizer: DialogueTokenizer
    adapter: str | None = None

    def rewards(self, batch: list[list[int]]) -> torch.Tensor:
        """The outputs for dialogues of tokens: dialogues x objectives, float32."""
        if self.adapter is not None:
            self.network.set_adapter(self.adapter)
        width, padding = max(map(len, batch)), self.network.config.get_text_config().pad_token_id
        ids = torch.tensor([[*tokens, *[padding] * (width - len(tokens))] for tokens in batch])
        mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in batch])
        device = self.network.device
        with torch.inference_mode():
            outputs = self.network(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        found: torch.Tensor = outputs.logits.float().cpu()
        return found


@dataclass
class RewardModel:
    """Scores whole dialogues. Its tokenizers are its own: a dialogue is a list of {role, content}."""

    spec: RewardSpec
    name: str
    members: list[_Member] = field(repr=False)
    batch_tokens: int = _BATCH_TOKENS
    """Of one batch, padding and all."""

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None, device: str | None = None, dtype: str = "auto") -> Self:
        """The reward model in a folder of `cai train reward`, or any sequence classifier with one output (folder or Hub id).

        Raises `ConfigError` for what is none, `EngineError` for weights that do not load.
        """
        folder = Path(os.path.expanduser(path))
        if (folder / SPEC).is_file():
            return cls.open(Document.read(folder / SPEC).validate(RewardSpec), folder, device, dtype)
        place = locate(str(path), revision)
        plain = RewardSpec(members=(MemberSpec(folder=place.source, revision=place.revision, mean=(0.0,), deviation=(1.0,)),))
        return cls.open(plain, Path(), device, dtype)

    @classmethod
    def open(cls, spec: RewardSpec, folder: Path, device: str | None = None, dtype: str = "auto") -> Self:
        """The reward model that `spec` tells of, its members below `folder`."""
        options = ModelConfig.model_validate({"device": device, "dtype": dtype})
        bases: dict[_Base, _Member] = {}
        outputs = len(spec.objectives)
        members = [_load(one, f"member-{n}", folder, outputs, options, bases) for n, one in enumerate(spec.members)]
        return cls(spec, str(folder if folder.name else spec.members[0].folder), members)

    def outputs(self, dialogues: Sequence[Dialogue], told: Callable[[int], object] | None = None) -> tuple[Numbers, Numbers]:
        """What the networks say, not normalised (dialogues x members x objectives), and the tokens of each dialogue.

        `told` is called with the number of dialogues after each batch of each member. Raises `ContextLengthError` for a
        dialogue that is too long, `RequestError` for one that the chat template refuses, `EngineError` where a network fails.
        """
        several = len(dialogues) > 1
        rows = [self.encode(one, f"dialogue {place}: " if several else "") for place, one in enumerate(dialogues)]
        found = self.compute(rows, told)
        self._check_numbers(found)
        return found, np.array([len(row[0]) for row in rows])

    def score(self, dialogues: Sequence[Dialogue], told: Callable[[int], object] | None = None) -> Scores:
        """The rewards. Raises as `outputs` does."""
        found, tokens = self.outputs(dialogues, told)
        return combine(self.spec, found, np.array([completion_length(one) for one in dialogues]), tokens)

    def encode(self, dialogue: Dialogue, where: str = "") -> Encoded:
        """The dialogue for each member. Raises `RequestError`, beginning with `where`, for one that cannot be scored."""
        by_tokenizer = {id(one.tokenizer): one.tokenizer for one in self.members}
        tokens = {key: tokenizer.encode(dialogue) for key, tokenizer in by_tokenizer.items()}
        row = [tokens[id(one.tokenizer)] for one in self.members]
        for member, own in zip(self.members, row, strict=True):
            limit = context_length(member.network.config)
            if limit is not None and len(own) > limit:
                raise ContextLengthError(
                    f"{where}{len(own):,} tokens, but the context of reward model '{self.name}' is {limit:,}; leave it out, "
                    "shorten it, or use a reward model with a longer context"
                )
        return row

    def compute(self, rows: Sequence[Encoded], told: Callable[[int], object] | None = None) -> Numbers:
        """What the networks say: dialogues x members x objectives. Raises `EngineError` where one fails."""
        found = np.empty((len(rows), len(self.members), len(self.spec.objectives)))
        for place, member in enumerate(self.members):
            own = [row[place] for row in rows]
            for batch in _batches(own, self.batch_tokens):
                found[batch, place] = self._run(member, [own[index] for index in batch])
                if told:
                    told(len(batch))
        return found

    def _check_numbers(self, found: Numbers) -> None:
        if not np.isfinite(found).all():
            place = int(np.argwhere(~np.isfinite(found))[0][0])
            raise EngineError(
                f"reward model '{self.name}': the reward of dialogue {place} is not a finite number; use dtype float32"
            )

    def _run(self, member: _Member, batch: list[list[int]]) -> Numbers:
        try:
            found: Numbers = member.rewards(batch).numpy()
        except (RuntimeError, MemoryError) as exc:
            raise EngineError(f"reward model '{self.name}' failed: {exc}") from exc
        return found


def _batches(rows: list[list[int]], most: int) -> list[list[int]]:
    """The places of all rows, those of like length together, the longest first, so that memory runs out at once or never."""
    batches: list[list[int]] = []
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
        if not batches or (len(batches[-1]) + 1) * len(rows[batches[-1][0]]) > most:
            batches.append([])
        batches[-1].append(place)
    return batches


def check_reward_model(path: str | Path) -> None:
    """Raises `ConfigError` for what is no reward model; reads no weights."""
    folder = Path(os.path.expanduser(path))
    if (folder / SPEC).is_file():
        Document.read(folder / SPEC).validate(RewardSpec)
        return
    place = locate(str(path), rewards=True)
    if place.is_gguf:
        raise ConfigError(_no_reward(str(path)))
    with loading(f"the configuration of '{path}'"):
        config = AutoConfig.from_pretrained(place.source, revision=place.revision)
    if config.architectures and not any(one.endswith("ForSequenceClassification") for one in config.architectures):
        raise ConfigError(_no_reward(str(path)))
    if config.num_labels != 1:
        raise ConfigError(_not_so_many(str(path), config.num_labels, 1))


def reward_context(path: str | Path) -> int | None:
    """The most tokens that every network of a reward model takes; None where that is not known. Raises as `RewardModel.load`
    does; reads no weights."""
    folder = Path(os.path.expanduser(path))
    if (folder / SPEC).is_file():
        members = Document.read(folder / SPEC).validate(RewardSpec).members
        places = {(one.base, one.revision) if one.base else (str(folder / one.folder), None) for one in members}
        found = [locate(*place) for place in places]
    else:
        found = [locate(str(path), rewards=True)]
    with loading(f"the configuration of '{path}'"):
        known = [length for place in found if (length := context_of_place(place)) is not None]
    return min(known, default=None)


def first_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a reward model's first network. Raises as `RewardModel.load` does."""
    folder, revision = Path(os.path.expanduser(path)), None
    if (folder / SPEC).is_file():
        source = str(folder / Document.read(folder / SPEC).validate(RewardSpec).members[0].folder)
    else:
        source, revision = pretrained(locate(str(path), rewards=True))
    with loading(f"the tokenizer of reward model '{path}'"):
        return AutoTokenizer.from_pretrained(source, revision=revision)


def _no_reward(source: str) -> str:
    return (
        f"'{source}' is a language model, which gives no reward; name a folder of cai train reward, or a sequence classifier "
        "with one output"
    )


def _not_so_many(source: str, found: int, expected: int) -> str:
    return f"'{source}' has {found} outputs; expected {expected}, as a reward model has"


def _load(
    spec: MemberSpec, name: str, folder: Path, outputs: int, options: ModelConfig, bases: dict[_Base, _Member]
) -> _Member:
    """A member; adapters join the base of another one where that is the same."""
    source = str(folder / spec.folder)
    if spec.base is None:
        network = _classifier(source, spec.revision, None, options)
        if network.config.num_labels != outputs:
            raise ConfigError(_not_so_many(source, network.config.num_labels, outputs))
        return _Member(network, _tokenizer(network, source, spec.revision))
    if find_spec("peft") is None:
        raise ConfigError(f"reward model '{source}' is adapters, which need peft: pip install 'cai-toolkit[train]'")
    from peft import PeftModel

    with loading(f"the adapters of reward model '{source}'"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft, which asks transformers by an older name
        if first := bases.get((spec.base, spec.revision)):
            first.network.load_adapter(source, adapter_name=name)
            return _Member(first.network, first.tokenizer, name)
        base = _classifier(spec.base, spec.revision, outputs, options, spec.version)
        base.config.get_text_config().pad_token_id = None  # what pads is that of the adapters' tokenizer
        network = PeftModel.from_pretrained(base, source, adapter_name=name).eval().requires_grad_(False)
        member = bases[spec.base, spec.revision] = _Member(network.to(base.device), _tokenizer(base, source, None), name)
        return member


def _classifier(
    source: str, revision: str | None, outputs: int | None, options: ModelConfig, version: str | None = None
) -> Any:
    place = locate(source, revision)
    if version is not None and place.version != version:
        raise ConfigError(
            f"base '{source}': version {place.version} is here, and the adapters were trained on {version}; get that one "
            "back, or train them anew"
        )
    name, revision = pretrained(place)
    more = {} if outputs is None else {"num_labels": outputs}
    with loading(f"reward model '{source}'"):
        model: Any
        model, told = AutoModelForSequenceClassification.from_pretrained(
            name, revision=revision, dtype=resolve_dtype(options), output_loading_info=True, **more
        )
    if outputs is None and told["missing_keys"]:  # transformers makes up what is not there
        raise ConfigError(_no_reward(source))
    make_exact(model)
    return model.to(options.device or best_device()).eval().requires_grad_(False)


def _tokenizer(network: Any, source: str, revision: str | None) -> DialogueTokenizer:
    """The tokenizer beside the weights; a network that knows no padding takes the tokenizer's for it."""
    with loading(f"the tokenizer of reward model '{source}'"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if not tokenizer.chat_template:
        raise ConfigError(f"reward model '{source}' has no chat template; save a chat_template.jinja beside its tokenizer")
    config = network.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return DialogueTokenizer(tokenizer, source)
