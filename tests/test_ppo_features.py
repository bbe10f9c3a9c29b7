"""Hidden states before completions: padding is not computed, what prompts begin with is once, and nothing else changes."""

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


@pytest.fixture(autouse=True)
def attention(monkeypatch):
    """That which PPO uses on a CPU."""
    from transformers import AttentionInterface

    from cai.cpu import _attend

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", _attend)


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
    (features * torch.linspace(0, 1, features.size(-1))).sum().backward()
    return features.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()


@pytest.fixture
def whole(monkeypatch):
    """What a pass of whole rows says."""
    from cai.training.ppo import features

    def ask(*given):
        with monkeypatch.context() as patched:
            patched.setattr(features, "_may_pack", lambda trunk: False)
            return passed(*given)

    return ask


@pytest.mark.parametrize("attends", ["row by row", "by the mask", "by the mask, dropping next to nothing"])
@pytest.mark.parametrize("shared", [0, 1, 6])
def test_packed_rows_say_what_whole_ones_say_and_have_the_same_gradients(shared, attends, model, widths, whole, monkeypatch):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    ids, mask = batch(shared)
    wanted = whole(model, ids, mask)
    if attends == "by the mask":
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    for layer in model.train(attends.endswith("nothing")).model.layers:
        layer.self_attn.attention_dropout = 1e-12
    torch.testing.assert_close(passed(model, ids, mask), wanted, atol=2e-4, rtol=1e-4)
    own = int(mask.sum()) - 3 * (shared + 1)
    assert widths == [(3, 13), (1, shared + own)]


def test_packed_rows_drop_attention_as_others_do(model):
    for layer in model.train().model.layers:
        layer.self_attn.attention_dropout = 0.9
    dropped, _ = passed(model, *batch())
    assert (dropped - passed(model.eval(), *batch())[0]).abs().max() > 0.1


def test_a_layer_that_narrows_its_mask_is_heard(model, whole):
    def see_itself_alone(_module, given, named):
        mask = named["attention_mask"]
        return given, named | {"attention_mask": mask & torch.eye(mask.size(-1), dtype=torch.bool)}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(see_itself_alone, with_kwargs=True)
    ids, mask = batch()
    torch.testing.assert_close(passed(model, ids, mask), whole(model, ids, mask), atol=2e-4, rtol=1e-4)


def test_a_mask_of_a_very_long_row_is_not_made(model, widths, whole, monkeypatch):
    monkeypatch.setattr("cai.training.ppo.features._AT_ONCE", 12)
    passed(model, *batch())
    assert widths == [(3, 13)]


def test_features_are_those_of_each_row_by_itself(model):
    ids, mask = batch()
    found, _ = passed(model, ids, mask)
    alone = [model.base_model(row[counts.bool()][None]).last_hidden_state[0] for row, counts in zip(ids, mask, strict=True)]
    ends = [int(counts[-LENGTH:].sum()) for counts in mask]
    torch.testing.assert_close(
        found, torch.cat([one[-end - 1 : -1] for one, end in zip(alone, ends, strict=True)]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("counts", [[[1, 1, 1, 0, 0, 0]], [[1, 1, 1, 1, 1, 1]], [[0, 0, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]])
def test_rows_may_be_alone_and_completions_empty(counts, model):
    """Prompts of three columns and completions of none to three tokens."""
    from cai.training.ppo.features import completion_features

    mask = torch.tensor(counts)
    ids = torch.randint(5, 200, mask.shape) * mask
    found = completion_features(model.base_model, ids, mask, 3)
    assert found.shape == (len(ids), 3, 32)
    assert found.isfinite().all()
    counted = mask[:, -3:].bool()
    for states, row, is_token, real in zip(found, ids, mask.bool(), counted, strict=True):
        alone = model.base_model(row[is_token][None]).last_hidden_state[0]
        end = int(real.sum())
        torch.testing.assert_close(states[:end], alone[len(alone) - end - 1 : -1], atol=1e-4, rtol=1e-4)


def test_many_tokens_go_in_several_passes(model, widths, whole, monkeypatch):
    monkeypatch.setattr("cai.training.ppo.features._AT_ONCE", 26)
    ids, mask = batch()
    wanted = whole(model, ids, mask)
    torch.testing.assert_close(passed(model, ids, mask), wanted, atol=2e-4, rtol=1e-4)
    assert [rows for rows, _ in widths] == [3, 1, 1]


@pytest.mark.parametrize(("prompts", "shared"), [([[1, 2, 3], [1, 2, 3]], 2), ([[1, 2], [1, 2, 3]], 1), ([[1], [1, 2]], 0)])
def test_the_last_token_of_a_prompt_is_never_shared(prompts, shared):
    from cai.training.ppo.packing import shared_length

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one + [7, 7] for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * (len(one) + 2) for one in prompts])
    assert shared_length(ids, mask, 2) == shared


def test_a_model_around_the_trunk_sees_one_whole_pass(model, widths):
    ids, mask = batch()
    through = passed(model, ids, mask, model)
    assert widths == [(3, 13)]
    torch.testing.assert_close(passed(model, ids, mask), through, atol=2e-4, rtol=1e-4)
    assert not model.base_model._forward_hooks


def test_layers_that_are_computed_again_on_the_way_back_see_the_packing(model, widths, whole):
    ids, mask = batch()
    wanted = whole(model, ids, mask)
    model.train().gradient_checkpointing_enable()
    torch.testing.assert_close(passed(model, ids, mask), wanted, atol=2e-4, rtol=1e-4)
    assert widths[1][0] == 1


def test_positions_count_from_the_first_token_of_each_prompt(monkeypatch):
    from transformers import GPT2Config, GPT2Model

    from cai.training.ppo import features

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=200, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)).eval()
    (ids, mask), rows = batch(), []
    model.register_forward_pre_hook(lambda _, __, named: rows.append(len(named["input_ids"])), with_kwargs=True)
    packed = features.completion_features(model, ids, mask, LENGTH)
    monkeypatch.setattr(features, "_may_pack", lambda trunk: False)
    padded = features.completion_features(model, ids, mask, LENGTH)
    assert rows == [1, 3]
    for row, counts in enumerate(mask):
        end = int(counts[-LENGTH:].sum())
        alone = model(input_ids=ids[row][counts.bool()][None]).last_hidden_state[0, -end - 1 : -1]
        torch.testing.assert_close(packed[row, :end], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(padded[row, :end], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["by columns", "forgets", "eager", "both ways"])
def test_what_goes_otherwise_than_by_positions_and_a_causal_mask_sees_whole_rows(kind, model):
    from transformers import GPTNeoConfig, GPTNeoModel, MistralConfig, MistralModel

    from cai.training.ppo.features import completion_features

    trunk, seen = model.base_model, []
    size = {"vocab_size": 200, "hidden_size": 16}
    if kind == "by columns":
        layers = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
        trunk = GPTNeoModel(GPTNeoConfig(**size, **layers, window_size=4))
    elif kind == "forgets":
        layers = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        trunk = MistralModel(MistralConfig(**size, **layers, sliding_window=4))
    elif kind == "both ways":
        trunk.config.is_causal = False
    else:
        trunk.set_attn_implementation("eager")
    trunk.register_forward_pre_hook(lambda _, __, named: seen.append(len(named["input_ids"])), with_kwargs=True)
    completion_features(trunk, *batch(), LENGTH)
    assert seen == [3]


@pytest.mark.parametrize(("length", "grad", "rows"), [(100, False, 40), (100, True, 16), (300, False, 16), (5000, False, 16)])
def test_passes_that_keep_nothing_have_more_short_rows(length, grad, rows):
    from cai.training.ppo.features import rows_at_once

    with torch.set_grad_enabled(grad):
        assert rows_at_once(torch.ones(64, length, dtype=torch.long), 16) == rows
