"""DPO with soft labels: TRL's loss where every label is 1, naive reference code elsewhere, and right gradients."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch.nn.functional import logsigmoid
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer

from cai.errors import ConfigError
from cai.training.arguments import LOSSES, check_arguments, make_arguments
from cai.training.data import load_data
from cai.training.loading import load_policy, load_tokenizer
from cai.training.losses import SOFTENED, soften_dpo
from cai.training.stage import Parts, build_trainer
from tests.stages import make_settings, pair, write_rows
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
BETA = 0.3
LABELS = [0.5, 0.62, 0.9, 1.0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def rows(tmp_path):
    return lambda labels: write_rows(tmp_path / "pairs.jsonl", [pair(n, label) for n, label in enumerate(labels)])


def make_trainer(settings, folder, moved=0.05):
    """The stage's trainer with a policy that has moved away from its reference, each weight by about so much."""
    arguments = make_arguments("dpo", settings, folder)
    trainer = build_trainer("dpo", Parts(settings, load_data("dpo", settings), load_tokenizer(settings), arguments))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(moved * torch.randn(parameter.shape, generator=generator))
    return trainer


def dpo(tiny, data, trl=None, **keys):
    batch = {"per_device_train_batch_size": 4, "beta": BETA}
    return make_settings("dpo", tiny, data, trl=batch | (trl or {}), **keys)


def loss_of(trainer):
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    return trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))


def naive_ahead(policy, reference, trainer, per_token):
    """How far each pair's chosen completion is ahead, from plain forward passes over one dialogue after the other."""
    tokenizer, ahead, labels = trainer.processing_class, [], []
    for row in trainer.train_dataset:
        ratios = []
        for name in ("chosen", "rejected"):
            start = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))
            ids = torch.tensor([tokenizer.apply_chat_template(row["prompt"] + row[name], return_dict=False)])
            logps = [model(ids).logits[0, :-1].log_softmax(-1) for model in (policy, reference)]
            chosen = [one.gather(-1, ids[0, 1:, None])[start - 1 :, 0] for one in logps]
            ratio = chosen[0].sum() - chosen[1].sum()
            ratios.append(ratio / len(chosen[0]) if per_token else ratio)
        ahead.append(ratios[0] - ratios[1])
        labels.append(row["chosen_probability"])
    return torch.stack(ahead), torch.tensor(labels)


def naive_loss(kind, x):
    match kind:
        case "sigmoid" | "sigmoid_norm":
            return -logsigmoid(BETA * x)
        case "hinge":
            return torch.relu(1 - BETA * x)
        case "ipo":
            return (x - 1 / (2 * BETA)) ** 2


def naive(kinds, weights, policy, reference, trainer):
    total = torch.zeros(())
    for kind, weight in zip(kinds, weights, strict=True):
        x, p = naive_ahead(policy, reference, trainer, kind in ("ipo", "sigmoid_norm"))
        total = total + weight * (p * naive_loss(kind, x) + (1 - p) * naive_loss(kind, -x)).mean()
    return total


@pytest.mark.parametrize("kind", SOFTENED)
def test_where_every_label_is_1_it_is_the_loss_of_trl(tiny, rows, tmp_path, kind):
    data, trl = rows([1.0] * 4), {"loss_type": [kind]}
    soft = loss_of(make_trainer(dpo(tiny, data, trl), tmp_path))
    hard = loss_of(make_trainer(dpo(tiny, data, trl, soft_labels=False), tmp_path))
    assert abs(soft.item() - hard.item()) < 1e-6
    assert abs(hard.item()) > 1e-3


@pytest.mark.parametrize(
    ("where", "kinds", "weights"),
    [
        *(("model", [kind], [1.0]) for kind in SOFTENED),
        *((where, ["sigmoid", "ipo", "hinge"], [0.5, 0.25, 2.0]) for where in ("model", "precomputed", "adapters")),
    ],
)
def test_soft_labels_agree_with_naive_code(tiny, rows, tmp_path, where, kinds, weights):
    trl = {"loss_type": kinds, "loss_weights": weights, "precompute_ref_log_probs": where == "precomputed"}
    settings = dpo(tiny, rows(LABELS), trl, **({"lora": {"rank": 4}} if where == "adapters" else {}))
    trainer = make_trainer(settings, tmp_path)
    assert (trainer.ref_model is not None) == (where == "model")
    with torch.no_grad():
        found = loss_of(trainer)
        expected = naive(kinds, weights, trainer.model, load_policy(settings), trainer)
    assert found.item() == pytest.approx(expected.item(), rel=2e-5, abs=1e-5)


def test_the_reference_is_computed_before_where_all_weights_are_trained(tiny, rows, tmp_path):
    data = rows(LABELS)
    assert make_arguments("dpo", dpo(tiny, data), tmp_path).precompute_ref_log_probs
    assert make_arguments("kto", make_settings("kto", tiny, data), tmp_path).precompute_ref_log_probs
    assert not make_arguments("dpo", dpo(tiny, data, lora={}), tmp_path).precompute_ref_log_probs


@pytest.mark.parametrize("kind", SOFTENED)
def test_gradients_of_the_losses_agree_with_finite_differences(kind):
    ahead = torch.tensor([-4.0, -0.3, 0.2, 5.0], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(LABELS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: soften_dpo(kind, x, labels, BETA) + naive_loss(kind, x), ahead)


def test_the_gradient_of_the_policy_agrees_with_finite_differences(tiny, rows, tmp_path):
    trainer = make_trainer(dpo(tiny, rows(LABELS), {"loss_type": ["sigmoid", "ipo"]}), tmp_path)
    weight = trainer.model.model.layers[1].mlp.down_proj.weight
    loss_of(trainer).backward()
    direction = weight.grad / weight.grad.norm()
    step = 1e-2

    def moved(by):
        with torch.no_grad():
            weight.add_(by * direction)
            value = loss_of(trainer).item()
            weight.sub_(by * direction)
        return value

    slope = (moved(step) - moved(-step)) / (2 * step)
    assert slope == pytest.approx(weight.grad.norm().item(), rel=5e-3)
    assert slope > 1e-3


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_a_pair_that_could_be_either_way_pulls_neither_way(tiny, rows, tmp_path, kind):
    """At p = 1/2 the loss is least where the policy is at the reference: its gradient is 0 there, and nowhere else."""

    def pull(label, moved):
        trainer = make_trainer(dpo(tiny, rows([label] * 4), {"loss_type": [kind]}), tmp_path, moved)
        loss = loss_of(trainer)
        loss.backward()
        return loss.item(), trainer.model.model.layers[1].mlp.down_proj.weight.grad.norm().item()

    (least, none), (_, some), (more, back) = pull(0.5, 0.0), pull(0.9, 0.0), pull(0.5, 0.05)
    assert none < 1e-5 < 1e-3 < min(some, back)
    assert more > least + 1e-4
    assert least == pytest.approx(naive_loss(kind, torch.zeros(())).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("trl", "message"),
    [
        (
            {"loss_type": ["sigmoid", "aot"]},
            "trl.loss_type: soft labels are defined for .*, not for aot; set soft_labels: false",
        ),
        ({"f_divergence_type": "js_divergence"}, "trl.f_divergence_type: with soft labels only reverse_kl; set soft_labels"),
        ({"use_weighting": True}, "trl.use_weighting: with soft labels only False; set soft_labels: false"),
    ],
)
def test_what_soft_labels_are_not_defined_for_is_refused_before_anything_is_loaded(tiny, rows, tmp_path, trl, message):
    with pytest.raises(ConfigError, match=message):
        make_arguments("dpo", dpo(tiny, rows(LABELS), trl), tmp_path)


@pytest.mark.parametrize(
    ("stage", "named", "message"),
    [
        (
            "dpo",
            ["sigmoid", "simgoid"],
            r"trl.loss_type: no loss 'simgoid' \(did you mean 'sigmoid'\?\); expected sigmoid, hinge",
        ),
        ("dpo", "kto", r"trl.loss_type: no loss 'kto'; expected sigmoid, "),
        ("kto", "apo_zero", r"trl.loss_type: no loss 'apo_zero' \(did you mean 'apo_zero_unpaired'\?\)"),
        ("cpo", "simp", r"trl.loss_type: no loss 'simp' \(did you mean 'simpo'\?\)"),
    ],
)
def test_a_loss_that_no_trainer_knows_is_refused_when_settings_are_read(stage, named, message):
    with pytest.raises(ConfigError, match=message):
        check_arguments(stage, {"loss_type": named})


@pytest.mark.parametrize(("stage", "trainer"), [("dpo", DPOTrainer), ("kto", KTOTrainer), ("cpo", CPOTrainer)])
def test_the_losses_are_those_that_trl_computes(stage, trainer):
    computed = set(re.findall(r'loss_type == "(\w+)":\n', inspect.getsource(trainer))) - {"kto_pair"}  # refused by name
    assert computed | ({"alphapo"} if stage == "cpo" else set()) == set(LOSSES[stage])
    for one in LOSSES[stage]:
        check_arguments(stage, {"loss_type": one})
