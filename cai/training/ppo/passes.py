"""What the policy and the value function say of each token of a rollout: in TRL's passes, in quicker ones on a CPU, or as the
policy writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from trl import GRPOTrainer

from cai.training.online.kept import KeepsRollout
from cai.training.online.left_out import LeavesOut
from cai.training.online.merging import base_of, is_reference, merged
from cai.training.ppo.critic import Critic, TrunkHead
from cai.training.ppo.drawing import Drawn, drawing
from cai.training.ppo.features import completion_features, drops, rows_at_once
from cai.training.ppo.logprobs import is_plain, token_logprobs


class Passed(NamedTuple):
    """What the policy and the value function said of a rollout: (B, T) each."""

    logps: Tensor
    values: Tensor


class PassingTrainer(KeepsRollout, LeavesOut, GRPOTrainer):
    """TRL's trainer with a value function, `value`. Of a head, each pass of the policy adds the values to `_watched`."""

    value: Critic | TrunkHead

    def __init__(self, *given: Any, **named: Any) -> None:
        self._watched: list[Tensor] = []
        self._drawn: list[Drawn] | None = None  # of the rollout that is being written
        super().__init__(*given, **named)
        # Kept, since to find them is to look at all layers.
        self._policy = self.accelerator.unwrap_model(self.model)
        self._base = base_of(self._policy)
        self._has_adapters = self._base is not self._policy
        self._reference = None if self.ref_model is None else base_of(self.accelerator.unwrap_model(self.ref_model))

    @property
    def _head(self) -> TrunkHead | None:
        """The value function, where it is a layer on what the policy's own passes leave."""
        return self.value if isinstance(self.value, TrunkHead) else None

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """That of products of matrices. Adapters need not cast what they read where autocast does; but where layers are
        computed again on the way back, which is outside of here, they have to do as there."""
        autocasts, again = self.accelerator.mixed_precision != "no", self._policy.is_gradient_checkpointing
        casts_twice = self._has_adapters and autocasts and not again
        with self.accelerator.autocast(), disable_input_dtype_casting(self._policy, active=casts_twice):
            yield

    def _critic_values(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """The critic's values of the state before each of the last `length` tokens."""
        with self._precision():
            return cast(Critic, self.value).values(ids, mask, length)

    def _get_per_token_logps_and_entropies(
        self, model: Any, ids: Tensor, mask: Tensor, length: int, *given: Any, **named: Any
    ) -> Any:
        """TRL's; on a CPU our own, or of a rollout what the policy said as it drew it."""
        if not named.get("compute_entropy") and self._has_drawn(model, ids, mask, length):
            return self._logps_drawn(ids, mask, length), None, None
        if (
            ids.device.type == "cpu"
            and is_plain(self._base_of(model))
            and not (self._entropy_bonus_enabled or self.aux_loss_enabled)
        ):
            return self._plain_logps(model, ids, mask, length, *given, **named)
        ask = super()._get_per_token_logps_and_entropies
        if self._head is None or model is self.ref_model:
            return ask(model, ids, mask, length, *given, **named)
        with self._head.watching(ids, length) as seen:
            found = ask(model, ids, mask, length, *given, **named)
        self._watched.append(torch.cat(seen))
        return found

    def _base_of(self, model: Any) -> Any:
        """The language model in what TRL passes around: the policy, wrapped or not, or a reference of its own."""
        return self._base if self._reference is None or model is not self.ref_model else self._reference

    def _plain_logps(
        self,
        model: Any,
        ids: Tensor,
        mask: Tensor,
        length: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """What TRL's pass says, for the completions' tokens alone: those of the prompt need no logits."""
        base, through = self._base_of(model), None if self._is_alone else model
        size = batch_size or len(ids)
        size = rows_at_once(ids, size) if through is None else size
        logps, entropies, values = [], [], []
        with self._precision():
            for part, attention in zip(ids.split(size), mask.split(size), strict=True):
                features = completion_features(base.base_model, part, attention, length, through)
                tokens, counted = part[:, -length:], attention[:, -length:]
                head = base.get_output_embeddings()
                logp, entropy = token_logprobs(features, head, tokens, counted, self.temperature, compute_entropy)
                logps.append(logp)
                entropies.append(entropy)
                if self._head is not None and model is not self.ref_model:
                    values.append(self._head.values(features, part))
        if values:
            self._watched.append(torch.cat(values))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    @property
    def _is_alone(self) -> bool:
        """Whether a pass of the trunk by itself is one of the model: nothing around it adds up gradients or begins prompts."""
        several = self.accelerator.num_processes > 1
        begins = self._has_adapters and self._policy.active_peft_config.is_prompt_learning
        return not (several or self.is_fsdp_enabled or self.is_deepspeed_enabled or begins)

    @property
    def _says_as_it_draws(self) -> bool:
        """Whether the policy says of tokens as it draws them what it says as it reads them, but for rounding. In bfloat16 it
        does not: SmolLM2's log-probabilities are off by 0.04 on average, and one in fifty by as much as is clipped."""
        is_precise = self.accelerator.mixed_precision == "no" and self._base.dtype == torch.float32
        return is_precise and self._is_alone and not drops(self._base)

    def _has_drawn(self, model: Any, ids: Tensor, mask: Tensor, length: int) -> bool:
        """Whether the rows of `ids` are what `model`, as it is now, has drawn for this rollout."""
        if torch.is_grad_enabled() or not self._drawn or self._drawn[1:] or model is self.ref_model or is_reference(model):
            return False
        return self._drawn[0].holds(ids, mask, length)

    def _logps_drawn(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """(B, `length`), 0 for padding."""
        assert self._drawn is not None
        (drawn,) = self._drawn
        if self._head is not None:
            assert drawn.states is not None
            self._watched.append(self._head.values(drawn.states[:, :length], ids))
        return drawn.logps[:, :length].masked_fill(mask[:, -length:] == 0, 0.0)

    def _generate_single_turn(self, *given: Any, **named: Any) -> Any:
        """TRL's. Where it is transformers on a CPU that writes: with adapters merged, which take as long as their layers there,
        with quicker draws, and what the policy says of those of a rollout is kept."""
        if self.use_vllm or self.use_transformers_continuous_batching or self.accelerator.device.type != "cpu":
            return super()._generate_single_turn(*given, **named)
        keep = self._drawn is not None and self._says_as_it_draws
        merging = merged(self._policy) if self._has_adapters else nullcontext()
        with drawing(self, self._policy, keep, with_states=self._head is not None) as drawn, merging:
            found = super()._generate_single_turn(*given, **named)
        if self._drawn is not None:
            self._drawn += drawn
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout, with the policy's `old_per_token_logps` and `values` of it, (B, T) each."""
        self._watched, self._drawn = [], []
        try:
            out = super()._generate_and_score_completions(inputs)
            logps, values = self._passed(out)
        finally:
            self._watched, self._drawn = [], None
        return {**out, "old_per_token_logps": logps, "values": values}

    def _passed(self, out: dict[str, Any]) -> Passed:
        """The policy's log-probabilities of a rollout, and the values, before anything is trained on it."""
        ids, attention = whole(out)
        length, logps = out["completion_ids"].size(1), out.get("old_per_token_logps")
        mode = "train" if self.model.training else "eval"
        size = getattr(self.args, f"per_device_{mode}_batch_size")
        watched = self._watched[0] if self._watched and logps is not None else None
        with torch.no_grad():
            if logps is None:
                logps = self._get_per_token_logps_and_entropies(self.model, ids, attention, length, batch_size=size)[0]
                watched = self._watched[-1] if self._watched else None
            if watched is None:
                with self.value.working():
                    rows = rows_at_once(ids, size)
                    parts = zip(ids.split(rows), attention.split(rows), strict=True)
                    watched = torch.cat([self._critic_values(*part, length) for part in parts])
        return Passed(logps, watched)


def whole(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Prompts with their completions: tokens, and what is no padding."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
