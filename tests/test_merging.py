"""Merged for a while, adapters say what they say apart, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.test_adapters import adapted, two_at_once

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def rows(dtype=torch.float64):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).to(dtype)


def quick(dtype=torch.float64, **settings):
    from cai.training.adapters import quicken

    model = adapted(dtype, **settings)
    quicken(model)
    return model


def without_dropping():
    model = quick(lora_dropout=0.5)
    for one in model.modules():
        if isinstance(one, nn.Dropout):
            one.p = 0.0
    return model.train()


def in_some_layers():
    """Others have those of another name."""
    from cai.training.adapters import quicken

    model = adapted(target_modules=["2"])
    model.add_adapter("other", peft.LoraConfig(target_modules=["0", "2"]))
    quicken(model)
    return model


def one_of_another_kind():
    model = quick()
    model.base_model.model[2].lora_A["default"].register_forward_hook(lambda *_: None)
    return model


QUICK = {
    "plain": quick,
    "scaled": lambda: quick(use_rslora=True),
    "a dropout of 0": without_dropping,
    "in some layers": in_some_layers,
    "float32 on bfloat16": lambda: quick(torch.bfloat16),
    "bfloat16": lambda: quick(torch.bfloat16).bfloat16(),
}
LEFT = {
    "PEFT's": adapted,
    "DoRA": lambda: quick(use_dora=True),
    "two at once": lambda: two_at_once()[0],
    "one of another kind": one_of_another_kind,
}


@pytest.fixture
def by_peft(monkeypatch):
    """The layers that PEFT merged."""
    found, usual = [], peft.tuners.lora.Linear.merge
    monkeypatch.setattr(
        peft.tuners.lora.Linear, "merge", lambda one, *more, **named: found.append(one) or usual(one, *more, **named)
    )
    return found


def of(model):
    """Its layers, those of them whose adapters are in use, and what they have at their bottom."""
    layers = [one for one in model.modules() if isinstance(one, peft.tuners.lora.Linear)]
    return layers, [one for one in layers if set(one.active_adapters) & set(one.lora_A)]


@pytest.mark.parametrize("name", [*QUICK, *LEFT])
def test_merged_they_say_what_they_say_apart(name, by_peft):
    from cai.training.online.merging import merged

    model = {**QUICK, **LEFT}[name]()
    x = rows(
        model.base_model.model[0].base_layer.weight.dtype if hasattr(model.base_model.model[0], "base_layer") else torch.float64
    )
    off = 0.05 if x.dtype == torch.bfloat16 else 1e-6
    layers, used = of(model)
    before, apart = [one.base_layer.weight for one in layers], model(x)
    data = [one.data for one in before]
    copies = [one.clone() for one in data]
    with merged(model):
        assert [one for one in layers if one.merged] == used
        assert not any(torch.equal(one.base_layer.weight, copies[layers.index(one)]) for one in used)
        assert name in LEFT or all(map(torch.equal, data, copies)), "nothing is written to"
        torch.testing.assert_close(model(x), apart, atol=off, rtol=off)
    assert not any(one.merged or one.merged_adapters for one in layers)
    assert all(one.base_layer.weight is was for one, was in zip(layers, before, strict=True))
    assert all(map(torch.equal, before, copies))
    assert torch.equal(model(x), apart)
    assert len(by_peft) == (len(layers) if name in LEFT else 0)


@pytest.mark.parametrize("name", ["plain", "PEFT's"])
def test_they_are_apart_again_after_an_error(name):
    from cai.training.online.merging import merged

    model, x = {**QUICK, **LEFT}[name](), rows()
    apart = model(x)
    with pytest.raises(ZeroDivisionError), merged(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), apart)


def test_they_are_apart_again_where_one_cannot_be_merged(monkeypatch):
    from cai.training.online.merging import merged

    model, x = quick(), rows()
    apart, last = model(x), of(model)[0][-1]
    last.lora_A["default"].weight = nn.Parameter(torch.zeros(1, 7, dtype=x.dtype))
    with pytest.raises(RuntimeError), merged(model):
        pass
    first = of(model)[0][0]
    assert not first.merged
    assert not last.merged
    assert apart.shape == (4, 5)
    torch.testing.assert_close(first(x), quick().base_model.model[0](x))


@pytest.mark.parametrize("name", ["plain", "PEFT's"])
def test_disabled_while_merged_the_model_is_the_one_under_them(name):
    from cai.training.online.merging import merged

    model, x = {**QUICK, **LEFT}[name](), rows()
    apart = model(x)
    with model.disable_adapter():
        under = model(x)
    with merged(model):
        with model.disable_adapter():
            torch.testing.assert_close(model(x), under)
        torch.testing.assert_close(model(x), apart)
    assert torch.equal(model(x), apart)
    assert not any(getattr(one, "merged", False) for one in model.modules())


def test_a_layer_that_shares_its_weights_is_merged_alone():
    from cai.training.online.merging import merged

    model, x = quick(), rows()
    first = of(model)[0][0]
    tied = nn.Linear(6, 8, dtype=x.dtype)
    tied.weight = first.base_layer.weight
    apart, says = model(x), tied(x)
    with merged(model):
        assert torch.equal(tied(x), says)
        torch.testing.assert_close(model(x), apart)
    assert tied.weight is first.base_layer.weight


def test_a_merged_layer_asks_nothing_of_peft(monkeypatch):
    from cai.training.online.merging import merged

    model, x = quick(), rows()
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", lambda *_: pytest.fail("PEFT was asked"))
    with merged(model):
        model(x)
