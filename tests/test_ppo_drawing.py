"""Quicker draws have the probabilities of the model's."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_as_often_as_their_probabilities_say(temperature):
    from scipy.stats import chisquare

    from cai.training.ppo.drawing import Draw

    torch.manual_seed(0)
    scores, rows = torch.tensor([0.0, 1.0, -1.0, 2.0]), 20_000
    left = Draw(temperature)(torch.zeros(rows, 3), scores.repeat(rows, 1))
    assert (left.isfinite().sum(dim=1) == 1).all()
    counts = left.argmax(dim=1).bincount(minlength=4)
    assert chisquare(counts, (scores.double() / temperature).softmax(0) * rows).pvalue > 0.001


def test_what_is_impossible_is_never_drawn():
    from cai.training.ppo.drawing import Draw

    scores = torch.full((5_000, 3), -float("inf"))
    scores[:, 1] = 0.0
    assert (Draw(1.0)(torch.zeros(5_000, 3), scores).argmax(dim=1) == 1).all()


def test_probabilities_that_are_not_numbers_end_it():
    from cai.errors import EngineError
    from cai.training.ppo.drawing import Draw

    with pytest.raises(EngineError, match="not numbers"):
        Draw(1.0)(torch.zeros(1, 3), torch.tensor([[0.0, float("nan")]]))


@pytest.mark.parametrize(
    ("more", "of_model", "quick"),
    [
        ({}, {}, True),
        ({"temperature": 0.7}, {"temperature": 0.2, "top_k": 50}, True),
        ({"top_k": 5}, {}, False),
        ({"top_k": None}, {}, False),
        ({"top_p": 0.9}, {}, False),
        ({"min_p": 0.1}, {}, False),
        ({"typical_p": 0.3}, {}, False),
        ({"num_beams": 2}, {}, False),
        ({}, {"min_p": 0.1}, False),
        ({}, {"typical_p": 0.3}, False),
    ],
)
def test_draws_that_are_told_more_than_a_temperature_are_left_alone(more, of_model, quick, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, GenerationConfig

    from cai.training.ppo import drawing

    asked = []
    usual = drawing.Draw.__call__
    monkeypatch.setattr(drawing.Draw, "__call__", lambda *given: asked.append(given[0].temperature) or usual(*given))
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path))
    model.generation_config.update(**of_model)
    told = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 3, "pad_token_id": 0}
    trainer = SimpleNamespace(generation_config=GenerationConfig(**{**told, **more}), temperature=1.0)
    before, ids = trainer.generation_config, torch.randint(5, 200, (4, 6))
    with suppress(KeyError), drawing.drawing(trainer, model):
        written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=trainer.generation_config)
        raise KeyError
    assert len(set(map(tuple, written[:, 6:].tolist()))) > 1  # drawn, not the likeliest
    assert set(asked) == ({more.get("temperature", 1.0)} if quick else set())
    assert trainer.generation_config is before
    assert "generate" not in vars(model)


def test_rows_are_what_was_drawn_where_they_are_the_same_but_for_padding():
    from cai.training.ppo.drawing import Drawn

    ids, mask = torch.tensor([[0, 5, 6, 7, 8], [4, 5, 6, 9, 9]]), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    drawn = Drawn(ids, torch.zeros(2, 3), None)
    assert drawn.holds(ids, mask, 3)
    assert drawn.holds(ids[:, :4], mask[:, :4], 2), "the rest was cut off"
    padded = ids * mask + 3 * (1 - mask)
    assert drawn.holds(padded, mask, 3)
    for row, column in mask.nonzero().tolist():
        other = ids.clone()
        other[row, column] += 1
        assert not drawn.holds(other, mask, 3)
    assert not drawn.holds(ids, mask, 2)
    assert not drawn.holds(ids[:1], mask[:1], 3)
    assert not drawn.holds(ids[[0, 1, 1]], mask[[0, 1, 1]], 3)


def test_a_model_of_peft_is_the_reference_with_no_adapters_or_those_of_that_name(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from cai.training.online.merging import is_reference

    plain = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path))
    assert not is_reference(plain)
    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(plain, config)
    model.add_adapter("ref", config)
    assert not is_reference(model)
    with model.disable_adapter():
        assert is_reference(model)
    model.set_adapter("ref")
    assert is_reference(model)


@pytest.fixture
def write(tmp_path):
    """Lets a tiny model write answers to prompts of 9, 7 and 8 tokens that begin with the same six, or with others: what
    `generate` gives, what is kept of it, and what the trunk's passes were told."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    from cai.training.ppo.drawing import drawing

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path), dtype=torch.float32)
    torch.manual_seed(0)
    begun, own = torch.randint(5, 200, (6,)), torch.randint(5, 200, (3, 9))
    told = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 4, "pad_token_id": 0}
    trainer = SimpleNamespace(generation_config=GenerationConfig(**told, cache_implementation="static"), temperature=1.0)

    def answer(alike: bool = True):
        ids, mask = own.clone(), torch.ones(3, 9, dtype=torch.long)
        for row, padding in enumerate([0, 2, 1]):
            mask[row, :padding] = 0
            ids[row, :padding] = 0
            ids[row, padding : padding + 6] = begun + (0 if alike else row)
            ids[row, padding + 6] = row + 5  # there they part
        widths = []
        handle = model.base_model.register_forward_pre_hook(
            lambda _, __, named: widths.append(tuple(named["input_ids"].shape)), with_kwargs=True
        )
        torch.manual_seed(1)
        with drawing(trainer, model, keep=True, with_states=True) as drawn:
            found = model.generate(input_ids=ids, attention_mask=mask, generation_config=trainer.generation_config)
        handle.remove()
        return SimpleNamespace(found=found, kept=drawn, widths=widths, ids=ids, mask=mask, model=model)

    return answer


def test_what_prompts_begin_with_is_computed_once_to_the_same_answers(write, monkeypatch):
    whole = write()
    assert whole.widths == [(3, 9), (3, 1), (3, 1), (3, 1)]
    monkeypatch.setattr("cai.training.ppo.sharing._WORTH", 1)
    shared = write()
    assert shared.widths == [(1, 6), (3, 3), (3, 1), (3, 1), (3, 1)]
    assert torch.equal(shared.found, whole.found)
    assert torch.equal(shared.found[:, :9], shared.ids)
    torch.testing.assert_close(shared.kept, whole.kept, atol=1e-4, rtol=1e-4)
    (drawn,) = shared.kept
    counted = torch.cat([shared.mask, torch.ones(3, 4, dtype=torch.long)], dim=1)
    assert drawn.holds(shared.found, counted, 4)


def test_prompts_are_computed_whole_where_the_beginning_differs_or_its_cache_would(write, monkeypatch):
    from transformers import GenerationConfig

    from cai.training.ppo import drawing

    monkeypatch.setattr("cai.training.ppo.sharing._WORTH", 1)
    assert write(alike=False).widths[0] == (3, 9)
    one = write()
    told = {"max_new_tokens": 4, "cache_implementation": "static"}

    def arranged(**more: object) -> dict[str, object]:
        return drawing._arranged(one.model, one.ids, one.mask, {"generation_config": GenerationConfig(**told), **more})

    assert "past_key_values" in arranged()
    assert "past_key_values" not in arranged(token_type_ids=one.mask)
    for key, value in {"max_new_tokens": None, "cache_implementation": None, "use_cache": False}.items():
        found = arranged(generation_config=GenerationConfig(**{**told, key: value}))
        assert "past_key_values" not in found, key
        assert found["input_ids"] is one.ids
        assert found["attention_mask"] is one.mask
    for key, value in {"cache_implementation": "static", "use_cache": False}.items():
        monkeypatch.setattr(one.model.generation_config, key, value)
        assert "past_key_values" not in arranged(), key
        monkeypatch.undo()
        monkeypatch.setattr("cai.training.ppo.sharing._WORTH", 1)
