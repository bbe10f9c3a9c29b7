"""What prompts begin with is computed by itself only where that says the same."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def shared(monkeypatch):
    """How many tokens of two prompts that begin with the same three a trunk computes once."""
    from cai.training.ppo import sharing

    monkeypatch.setattr(sharing, "_WORTH", 3)
    ids = torch.tensor([[5, 6, 7, 8, 9], [0, 5, 6, 7, 10]])
    return lambda trunk: sharing.sharable_length(trunk, ids, (ids > 0).long())


@pytest.fixture
def trunk(tmp_path):
    from transformers import AutoModel

    return AutoModel.from_pretrained(make_tiny_model(tmp_path)).train()


def test_a_plain_model_shares_where_enough_is_saved(shared, trunk, monkeypatch):
    assert shared(trunk) == 3
    monkeypatch.setattr("cai.training.ppo.sharing._WORTH", 4)
    assert shared(trunk) == 0


@pytest.mark.parametrize("by", ["a key", "another key", "a module"])
def test_nothing_is_shared_where_something_is_dropped(by, shared, trunk):
    if by == "a module":
        trunk.layers[0].add_module("drop", torch.nn.Dropout(0.1))
    else:  # some models have no module for it
        trunk.config.update({"attention_dropout" if by == "a key" else "resid_pdrop": 0.1})
    assert shared(trunk) == 0
    assert shared(trunk.eval()) == 3


def test_nothing_is_shared_where_layers_are_computed_again(shared, trunk):
    trunk.gradient_checkpointing_enable()
    assert shared(trunk) == 0


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_nothing_is_shared_where_positions_mean_another_thing_in_longer_rows(kind, shared, trunk):
    trunk.config.rope_parameters = {"rope_type": kind}
    assert shared(trunk) == 0


def test_nothing_is_shared_where_attention_goes_by_columns_or_forgets(shared):
    from transformers import GPTNeoConfig, GPTNeoModel, MistralConfig, MistralModel

    size = {"vocab_size": 200, "hidden_size": 16}
    layers = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    assert shared(GPTNeoModel(GPTNeoConfig(**size, **layers, window_size=4)).eval()) == 0
    layers = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert shared(MistralModel(MistralConfig(**size, **layers, sliding_window=4)).eval()) == 0
    assert shared(MistralModel(MistralConfig(**size, **layers, sliding_window=None)).eval()) == 3
