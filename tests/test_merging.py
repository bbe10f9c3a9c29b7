"""Merged for a while, adapters say what they say apart, and leave no trace."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def some(dtype=torch.float64):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).to(dtype)


def made(quick: bool = True, dtype=torch.float64, **settings):
    from cai.training.adapters import quicken
    from tests.test_adapters import adapted

    model = adapted(dtype, **settings).eval()
    if quick:
        quicken(model)
    return model


def several():
    model = made(quick=False)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    from cai.training.adapters import quicken

    quicken(model.double())
    return model


MODELS = {
    "quick": (made, torch.float64),
    "with scales": (lambda: made(use_rslora=True), torch.float64),
    "PEFT's": (lambda: made(quick=False), torch.float64),
    "DoRA": (lambda: made(use_dora=True), torch.float64),
    "several": (several, torch.float64),
    "float32 on bfloat16": (lambda: made(dtype=torch.bfloat16), torch.bfloat16),
}


@pytest.fixture
def by_peft(monkeypatch):
    """How often PEFT was asked to merge a layer."""
    found, usual = [], peft.tuners.lora.Linear.merge
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda *given, **named: found.append(given) or usual(*given, **named))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_merged_they_say_what_they_say_apart(name, by_peft):
    from cai.training.online.merging import merged

    make, dtype = MODELS[name]
    model, x = make(), some(dtype)
    layers = [one for one in model.modules() if isinstance(one, peft.tuners.lora.Linear)]
    weights = [one.base_layer.weight for one in layers]
    before, apart = [(one.data_ptr(), one.detach().clone()) for one in weights], model(x)
    with merged(model):
        assert all(one.merged for one in layers)
        assert not any(torch.equal(one, was) for one, (_, was) in zip(weights, before, strict=True))
        again = model(x)
        alone = layers[0](x)
        assert torch.equal(alone, layers[0].base_layer(x)), "a merged layer is one product"
    off = 0.05 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(again, apart, atol=off, rtol=off)
    assert not any(one.merged or one.merged_adapters for one in layers)
    for one, (place, was) in zip(weights, before, strict=True):
        assert torch.equal(one, was)
        assert one.data_ptr() == place or by_peft, "nothing was written to"
    assert torch.equal(model(x), apart)
    assert len(by_peft) == (0 if name in ("quick", "with scales") else len(layers))


@pytest.mark.parametrize("name", MODELS)
def test_they_are_apart_again_after_an_error(name):
    from cai.training.online.merging import merged

    make, dtype = MODELS[name]
    model, x = make(), some(dtype)
    apart = model(x)
    with pytest.raises(ZeroDivisionError), merged(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), apart)


@pytest.mark.parametrize("name", ["quick", "PEFT's"])
def test_disabled_while_merged_the_model_is_the_one_under_them(name):
    from cai.training.online.merging import merged

    model, x = MODELS[name][0](), some()
    apart = model(x)
    with model.disable_adapter():
        under = model(x)
    with merged(model):
        with model.disable_adapter():
            torch.testing.assert_close(model(x), under)
        torch.testing.assert_close(model(x), apart)
    assert torch.equal(model(x), apart)
    assert not any(getattr(one, "merged", False) for one in model.modules())
