"""Hidden states before completions: what prompts begin with is computed once, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 4


@pytest.fixture
def model(tmp_path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path), dtype=torch.float32)


@pytest.fixture
def widths(model):
    """How many tokens each pass of the trunk was of: (rows, columns)."""
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda _, __, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    return seen


def batch(shared: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 7, 9 and 8 tokens that begin with the same ones, and completions of 2, 4 and 3."""
    torch.manual_seed(0)
    ids, mask = torch.randint(5, 200, (3, 9 + LENGTH)), torch.ones(3, 9 + LENGTH, dtype=torch.long)
    beginning = ids[0, :shared].clone()
    for row, (padding, short) in enumerate([(2, 2), (0, 0), (1, 1)]):
        ids[row, padding : padding + shared] = beginning
        ids[row, padding + shared] = row + 5  # there they part
        mask[row, :padding] = 0
        mask[row, mask.size(1) - short :] = 0
    return ids * mask, mask


def passed(model, ids, mask, through=None) -> tuple[torch.Tensor, torch.Tensor]:
    """What counts of the features, and a gradient."""
    from cai.training.ppo.features import completion_features

    model.zero_grad()
    counted = mask[:, -LENGTH:].bool()
    features = completion_features(model.base_model, ids, mask, LENGTH, through)[counted]
    (features * torch.arange(features.size(-1))).sum().backward()
    return features.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()


@pytest.mark.parametrize("shared", [1, 6])
def test_what_prompts_begin_with_is_computed_once_to_the_same_features_and_gradients(shared, model, widths, monkeypatch):
    ids, mask = batch(shared)
    whole = passed(model, ids, mask)
    monkeypatch.setattr("cai.training.ppo.features._WORTH", 1)
    torch.testing.assert_close(passed(model, ids, mask), whole, atol=2e-4, rtol=1e-4)
    assert widths == [(3, 13), (1, shared), (3, 13 - shared)]


def test_features_are_those_of_each_row_by_itself(model, monkeypatch):
    monkeypatch.setattr("cai.training.ppo.features._WORTH", 1)
    ids, mask = batch()
    found, _ = passed(model, ids, mask)
    alone = [model.base_model(row[counts.bool()][None]).last_hidden_state[0] for row, counts in zip(ids, mask, strict=True)]
    ends = [int(counts[-LENGTH:].sum()) for counts in mask]
    torch.testing.assert_close(
        found, torch.cat([one[-end - 1 : -1] for one, end in zip(alone, ends, strict=True)]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("prompts", "shared"), [([[1, 2, 3], [1, 2, 3]], 2), ([[1, 2], [1, 2, 3]], 1), ([[1], [1, 2]], 0)])
def test_the_last_token_of_a_prompt_is_never_shared(prompts, shared):
    from cai.training.ppo.features import shared_length

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one + [7, 7] for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * (len(one) + 2) for one in prompts])
    assert shared_length(ids, mask, 2) == shared


def test_a_model_around_the_trunk_sees_one_whole_pass(model, widths, monkeypatch):
    monkeypatch.setattr("cai.training.ppo.features._WORTH", 1)
    ids, mask = batch()
    through = passed(model, ids, mask, model)
    assert widths == [(3, 13)]
    torch.testing.assert_close(passed(model, ids, mask), through, atol=2e-4, rtol=1e-4)
    assert not model.base_model._forward_hooks


def test_positions_count_from_the_first_token_of_each_prompt(monkeypatch):
    from transformers import GPT2Config, GPT2Model

    from cai.training.ppo.features import completion_features

    monkeypatch.setattr("cai.training.ppo.features._WORTH", 1)
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=200, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)).eval()
    (ids, mask), passes = batch(), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    shared = completion_features(model, ids, mask, LENGTH)
    assert len(passes) == 2
    monkeypatch.setattr("cai.training.ppo.features._WORTH", 10_000)
    whole = completion_features(model, ids, mask, LENGTH)
    for row, counts in enumerate(mask):
        end = int(counts[-LENGTH:].sum())
        alone = model(ids[row][counts.bool()][None]).last_hidden_state[0, -end - 1 : -1]
        torch.testing.assert_close(shared[row, :end], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(whole[row, :end], alone, atol=1e-4, rtol=1e-4)


def test_nothing_is_shared_where_something_is_dropped(model, widths, monkeypatch):
    monkeypatch.setattr("cai.training.ppo.features._WORTH", 1)
    model.train()
    passed(model, *batch())
    model.config.attention_dropout = 0.1
    passed(model, *batch())
    model.eval()
    passed(model, *batch())
    model.config.attention_dropout = 0.0
    model.train().config.update({"resid_pdrop": 0.1})  # some models have no module for it
    passed(model, *batch())
    assert [rows for rows, _ in widths] == [1, 3, 3, 1, 3, 3]


def test_nothing_is_shared_where_attention_goes_by_columns(monkeypatch):
    from transformers import GPTNeoConfig, GPTNeoModel

    from cai.training.ppo.features import completion_features

    monkeypatch.setattr("cai.training.ppo.features._WORTH", 1)
    config = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    model, seen = GPTNeoModel(GPTNeoConfig(vocab_size=200, window_size=4, **config)), []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    completion_features(model, *batch(), LENGTH)
    assert len(seen) == 1


def test_nothing_is_shared_where_layers_are_computed_again_or_forget(model, widths, monkeypatch):
    from transformers import MistralConfig, MistralModel

    from cai.training.ppo.features import completion_features

    monkeypatch.setattr("cai.training.ppo.features._WORTH", 1)
    ids, mask = batch()
    model.train().gradient_checkpointing_enable()
    passed(model, ids, mask)
    assert widths == [(3, 13)]
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sliding, seen = MistralModel(MistralConfig(vocab_size=200, num_key_value_heads=2, sliding_window=4, **config)), []
    sliding.register_forward_pre_hook(lambda *_: seen.append(1))
    completion_features(sliding, ids, mask, LENGTH)
    assert len(seen) == 1
