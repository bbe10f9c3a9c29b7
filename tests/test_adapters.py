"""Layers with adapters compute what PEFT's do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def asked(monkeypatch):
    """How often the quick product was asked."""
    from cai.training.adapters import LoraProduct

    found, usual = [], LoraProduct.apply
    monkeypatch.setattr(LoraProduct, "apply", lambda *given: found.append(given) or usual(*given))
    return found


def adapted(dtype=torch.float64, bias: bool = True, **settings):
    """Two layers, of which the first one's input needs no gradient, with adapters that say something."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 5, bias=bias)).to(dtype)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["0", "2"]} | settings
    model = peft.get_peft_model(base, peft.LoraConfig(**settings), autocast_adapter_dtype=dtype == torch.bfloat16)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    return model


def passed(model, dtype=torch.float64):
    """What it says of some rows, and the gradients of all that is trained."""
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    model.zero_grad()
    torch.manual_seed(2)
    out = model(x)
    if out.requires_grad:
        out.float().sin().sum().backward()
    return out.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def both(model, dtype=torch.float64):
    """Before and after the layers are made quick."""
    from cai.training.adapters import quicken

    usual = passed(model, dtype)
    quicken(model)
    return usual, passed(model, dtype)


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"use_rslora": True}, {"lora_alpha": 3}, {"lora_dropout": 0.5}])
def test_they_say_what_peft_says_with_the_same_gradients(settings, asked):
    model = adapted(**settings).train("lora_dropout" not in settings)
    usual, quick = both(model)
    assert len(asked) == 2
    assert len(quick[1]) == 4
    torch.testing.assert_close(quick, usual)


def test_gradients_are_those_of_finite_differences():
    from cai.training.adapters import LoraProduct

    shapes = ((4, 6), (5, 6), (5,), (3, 6), (5, 3))
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=place not in (1, 2)) for place, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda *given: LoraProduct.apply(*given, 1.7), parts)


def test_autocast_computes_in_its_dtype_and_gradients_are_of_that_of_the_adapters(asked):
    model = adapted(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        usual, quick = both(model, torch.float32)
    assert len(asked) == 2
    assert {given[0].dtype for given in asked} == {quick[0].dtype} == {torch.bfloat16}
    assert {one.dtype for one in quick[1].values()} == {torch.float32}
    torch.testing.assert_close(quick, usual, atol=0.1, rtol=0.05)


def other_dtype():
    return adapted(torch.bfloat16), torch.bfloat16


def two_at_once():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    model.double().base_model.set_adapter(["default", "other"])
    return model, torch.float64


def trained_too():
    model = adapted()
    model.base_model.model[0].base_layer.weight.requires_grad_(True)
    model.base_model.model[2].base_layer.weight.requires_grad_(True)
    return model, torch.float64


def merged_in():
    model = adapted()
    model.merge_adapter()
    return model, torch.float64


def watched():
    model = adapted()
    model.base_model.model[0].lora_A.default.register_forward_hook(lambda *_: None)
    model.base_model.model[2].base_layer.register_forward_pre_hook(lambda *_: None)
    return model, torch.float64


def computed_otherwise():
    model = adapted()
    for layer in (model.base_model.model[0].base_layer, model.base_model.model[2].lora_A.default):
        layer.forward = lambda x, layer=layer: nn.functional.linear(x, 2 * layer.weight)
    return model, torch.float64


def watched_back():
    model = adapted()
    for layer in (model.base_model.model[0].lora_B.default, model.base_model.model[2].lora_B.default):
        layer.register_full_backward_hook(lambda *_: None)
    return model, torch.float64


class Noise(nn.Module):
    """A dropout of its own kind."""

    def forward(self, x):
        return 2 * x


def other_dropout():
    model = adapted()
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        layer.lora_dropout["default"] = Noise()
    return model, torch.float64


LEFT = {
    "layers that are computed otherwise": computed_otherwise,
    "layers that are watched on the way back": watched_back,
    "a dropout of another kind": other_dropout,
    "layers that are watched": watched,
    "adapters in another dtype": other_dtype,
    "two adapters": two_at_once,
    "a layer that is trained": trained_too,
    "merged": merged_in,
    "dropout": lambda: (adapted(lora_dropout=0.5).train(), torch.float64),
    "DoRA": lambda: (adapted(use_dora=True), torch.float64),
    "a bias": lambda: (adapted(lora_bias=True), torch.float64),
}


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_what_is_more_than_two_matrices_is_left_to_peft(make, asked):
    model, dtype = make()
    usual, quick = both(model, dtype)
    assert asked == []
    torch.testing.assert_close(quick, usual)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,), (3, 2, 6)])
def test_rows_may_be_none_or_of_any_shape(shape, asked):
    from cai.training.adapters import quicken

    model = adapted()
    x = torch.randn(*shape, dtype=torch.float64)
    x = x.transpose(0, 1) if len(shape) == 3 else x
    usual = model(x)
    quicken(model)
    torch.testing.assert_close(model(x), usual)
    assert asked


def test_adapters_that_are_not_trained_take_no_gradients():
    from cai.training.adapters import quicken

    model = adapted().requires_grad_(False)
    quicken(model)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(one.grad is None for one in model.parameters())


def test_disabled_adapters_are_the_model_under_them(asked):
    model = adapted()
    usual, quick = both(model)
    asked.clear()
    x = torch.randn(3, 6, dtype=torch.float64)
    with model.disable_adapter():
        alone = model(x)
    assert asked == []
    first, _, last = model.base_model.model
    torch.testing.assert_close(alone, last.base_layer(first.base_layer(x).tanh()))
    assert not torch.allclose(alone, model(x))
    torch.testing.assert_close(quick, usual)


def test_layers_that_are_no_plain_ones_stay_what_they_were():
    from peft.tuners.lora import Embedding, Linear

    from cai.training.adapters import QuickLora, quicken

    model = peft.get_peft_model(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5)), peft.LoraConfig(target_modules=["0", "1"]))
    quicken(model)
    quicken(model)
    assert [type(one) for one in model.base_model.model] == [Embedding, QuickLora]
    assert isinstance(model.base_model.model[1], Linear)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_stages_train_by_them_on_a_cpu(stage, tmp_path, asked):
    from cai.training.running import train
    from tests.stages import dialogue, make_settings, pair, write_rows
    from tests.tiny_model import make_tiny_model

    tiny, row = make_tiny_model(tmp_path / "tiny"), dialogue if stage == "sft" else pair
    rows = write_rows(tmp_path / "rows.jsonl", [row(number) for number in range(8)])
    train(stage, make_settings(stage, tiny, rows, lora={"rank": 2}), tmp_path / "out")
    assert len(asked) >= 2 * 7 * 2, "each layer in each of two steps"
