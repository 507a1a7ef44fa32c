"""Architectures: losses are their papers', folding changes nothing, L0 ends where asked for, planted directions are found."""

import pytest
import torch
from planted_data import plant
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

import oracles
from throughline.dictionaries.batch_topk import BatchTopK, keep_largest
from throughline.dictionaries.jumprelu import BANDWIDTH, JumpReLU, straight_through
from throughline.dictionaries.matryoshka import Matryoshka, prefixes
from throughline.dictionaries.relu import WARM_UP
from throughline.dictionaries.stack import Stack, StepLoss
from throughline.errors import InputError
from throughline.registry import ARCHITECTURES
from throughline.study import DictionaryOverride, DictionarySpec, TrainingSpec, parse_study
from throughline.training import Progress, train
from throughline.training.resampling import is_due
from throughline.training.sources import ArraySource
from throughline.training.sparsity import SparsityController

L, N, D, F, K = 2, 30, 8, 32, 3
SHAPE = (L, F, D)
PENALIZED = ("relu", "gated", "jumprelu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_stack(name: str, unit: bool = True) -> Stack:
    """All weights random, those of the architecture's own too (thresholds positive, as training keeps them)."""
    generator = seeded(1)
    W_enc, b_enc, W_dec, b_dec = (torch.randn(s, generator=generator) for s in (SHAPE, (L, F), SHAPE, (L, D)))
    extra = {}
    for key, tensor in ARCHITECTURES.load(name).extra(SHAPE).items():
        noise = 0.5 * torch.randn(L, F, generator=generator)
        value = 0.2 + noise.abs() if key == "threshold" else noise
        extra[key] = value.requires_grad_() if tensor.requires_grad else tensor.clone()
    W_dec = normalize(W_dec, dim=-1) if unit else W_dec
    return Stack(*(w.requires_grad_() for w in (W_enc, b_enc, W_dec, b_dec)), extra_LF=extra)


def random_activations() -> Tensor:
    return torch.randn(L, N, D, generator=seeded(2))


def loss_of(name: str, stack: Stack, x_LND: Tensor, dead_LF: Tensor | None = None, progress: float = 0.5) -> StepLoss:
    dead_LF = torch.zeros(L, F, dtype=torch.bool) if dead_LF is None else dead_LF
    penalty_L = torch.tensor([0.3, 2.0])
    return ARCHITECTURES.load(name).loss(stack, x_LND, dead_LF, progress, k=K, penalty_L=penalty_L)


def one_layer(stack: Stack, layer: int) -> dict[str, Tensor]:
    """Weights of one layer by name, as leaves of their own."""
    return {n: t[layer].detach().clone().requires_grad_(t.requires_grad) for n, t in stack.tensors().items()}


def assert_same_gradients(stack: Stack, layer: int, weights: dict[str, Tensor]) -> None:
    for name, tensor in stack.trained().items():
        assert tensor.grad is not None and weights[name].grad is not None, name
        torch.testing.assert_close(tensor.grad[layer], weights[name].grad, rtol=1e-4, atol=1e-6, msg=name)


# ---- contract


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_folded_features_are_those_of_training_in_raw_units(name):
    architecture = ARCHITECTURES.load(name)
    inference = ARCHITECTURES.load(architecture.inference)
    stack, raw_LND = random_stack(name), 5 * random_activations() + 2
    if name in ("batch_topk", "matryoshka"):
        stack.extra_LF["threshold"].fill_(0.7)
    options = architecture.options(k=K)
    spread_D = 1 + torch.rand(raw_LND.shape[2], generator=torch.Generator().manual_seed(5))
    for layer, scale in enumerate((0.02, 3.0)):
        mean_D, scale_D = raw_LND[layer].mean(0), scale / spread_D
        folded = stack.fold(layer, architecture, mean_D, scale_D, options, {})
        x_LND = ((raw_LND[layer] - mean_D) * scale_D).expand(L, -1, -1)
        weights = {"b_enc": stack.b_enc_LF[layer], **{n: t[layer] for n, t in stack.extra_LF.items()}}
        f_NF = inference.activate(stack.pre_activations(x_LND)[layer], options, weights).detach()
        expected_NF = f_NF * (stack.W_dec_LFD[layer].detach() / scale_D).norm(dim=1)
        found_NF = folded.encode(raw_LND[layer])
        assert folded.architecture == architecture.inference and 0 < (found_NF > 0).float().mean() < 1
        assert (found_NF - expected_NF).abs().max() < 1e-4 * expected_NF.abs().max()
        assert not any(t.requires_grad for t in (folded.W_enc, folded.b_enc, *folded.extra.values()))


@pytest.mark.parametrize("name", ARCHITECTURES.names())
@pytest.mark.parametrize("dead", [False, True])
def test_every_loss_is_finite_repeatable_and_reaches_all_that_is_trained(name, dead):
    stack, x_LND = random_stack(name), random_activations()
    dead_LF = (torch.arange(F) < 7).expand(L, F) & torch.tensor(dead)
    losses, gradients = [], []
    for _ in range(2):
        losses.append(loss_of(name, stack, x_LND, dead_LF))
        losses[-1].loss_L.sum().backward()
        gradients.append({n: t.grad.clone() for n, t in stack.trained().items() if t.grad is not None})
        for tensor in stack.parameters():
            tensor.grad = None
    assert losses[0].loss_L.isfinite().all() and losses[0].x_hat_LND.shape == (L, N, D)
    assert losses[0].fired_LF.shape == (L, F) and losses[0].fired_LF.max() <= N
    assert gradients[0].keys() == stack.trained().keys()
    for n, gradient in gradients[0].items():
        assert gradient.isfinite().all() and gradient.any(), n
        assert torch.equal(gradient, gradients[1][n]) and torch.equal(losses[0].loss_L, losses[1].loss_L)


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_layers_do_not_see_one_another(name):
    stack, x_LND = random_stack(name), random_activations()
    other_LND = torch.stack([x_LND[0], 3 * x_LND[1] + 1])
    assert torch.equal(loss_of(name, stack, x_LND).loss_L[0], loss_of(name, stack, other_LND).loss_L[0])


# ---- the papers' losses, written out


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
@pytest.mark.parametrize("dead", [False, True])
def test_batch_losses_are_the_dense_ones(name, dead):
    stack, x_LND = random_stack(name, unit=False), random_activations()
    dead_LF = (torch.arange(F) < 7).expand(L, F) & torch.tensor(dead)
    losses = loss_of(name, stack, x_LND, dead_LF)
    losses.loss_L.sum().backward()
    ends = [F] if name == "batch_topk" else [1, 3, 7, 15, F]
    for layer in range(L):
        w = one_layer(stack, layer)
        pre_NF = x_LND[layer] @ w["W_enc"].T + w["b_enc"]
        kept_NF = pre_NF >= pre_NF.detach().flatten().sort(descending=True).values[N * K - 1]
        f_NF = pre_NF * kept_NF
        errors = [x_LND[layer] - f_NF[:, :end] @ w["W_dec"][:end] - w["b_dec"] for end in ends]
        expected = sum(e.square().sum(1).mean() / D for e in errors) / len(ends)
        if dead:
            some = min(N, oracles.AUX_TOKENS)
            x_hat_ND = (x_LND[layer] - errors[-1])[:some].detach()
            four = (w["W_enc"].T, w["b_enc"], w["W_dec"], w["b_dec"])
            expected = expected + oracles.AUX_WEIGHT * oracles.aux_loss(
                x_LND[layer][:some], x_hat_ND, four, dead_LF[layer]
            )
        expected.backward()
        torch.testing.assert_close(losses.loss_L[layer], expected)
        torch.testing.assert_close(losses.smallest_L[layer], f_NF[f_NF > 0].min())
        assert losses.fired_LF[layer].tolist() == kept_NF.sum(0).tolist()
        assert_same_gradients(stack, layer, w)


@pytest.mark.parametrize("progress", [0.0, 0.05, 0.6])
def test_gated_loss_is_the_papers(progress):
    stack, x_LND = random_stack("gated", unit=False), random_activations()
    losses = loss_of("gated", stack, x_LND, progress=progress)
    losses.loss_L.sum().backward()
    for layer, penalty in enumerate((0.3, 2.0)):
        w, terms = one_layer(stack, layer), []
        for x_D in x_LND[layer]:
            gate_F = w["W_enc"] @ x_D + w["b_enc"]
            magnitude_F = (w["r_mag"].exp()[:, None] * w["W_enc"]) @ x_D + w["b_mag"]
            x_hat_D = ((gate_F > 0) * magnitude_F.relu()) @ w["W_dec"] + w["b_dec"]
            frozen_D = gate_F.relu() @ w["W_dec"].detach() + w["b_dec"].detach()
            sparse = (gate_F.relu() * w["W_dec"].norm(dim=1)).sum() * penalty * min(1, progress / 0.1)
            terms.append((x_D - x_hat_D).square().sum() + sparse + (x_D - frozen_D).square().sum())
        expected = torch.stack(terms).mean() / D
        expected.backward()
        torch.testing.assert_close(losses.loss_L[layer], expected)
        assert_same_gradients(stack, layer, w)


@pytest.mark.parametrize("progress", [0.0, 0.05, 0.6])
def test_jumprelu_loss_and_pseudo_gradients_are_the_papers(progress):
    stack, x_LND = random_stack("jumprelu", unit=False), random_activations()
    losses = loss_of("jumprelu", stack, x_LND, progress=progress)
    losses.loss_L.sum().backward()
    bandwidth = BANDWIDTH * D**0.5
    for layer, penalty in enumerate((0.3, 2.0)):
        w, x_ND = one_layer(stack, layer), x_LND[layer]
        penalty *= min(1, progress / 0.1)
        theta_F = w["threshold"].detach()
        pre_NF = x_ND @ w["W_enc"].T + w["b_enc"]
        open_NF = (pre_NF > theta_F).float()
        f_NF = pre_NF * open_NF
        f_NF.retain_grad()
        error = (x_ND - f_NF @ w["W_dec"] - w["b_dec"]).square().sum(1).mean() / D
        error.backward()
        torch.testing.assert_close(losses.loss_L[layer], error + penalty * open_NF.sum(1).mean() / D)
        assert f_NF.grad is not None
        window_NF = (((pre_NF - theta_F) / bandwidth).abs() < 0.5).float()
        by_error_F = (f_NF.grad * -(theta_F / bandwidth) * window_NF).sum(0)
        by_l0_F = -(penalty / D / N) * (window_NF / bandwidth).sum(0)
        w["threshold"].grad = by_error_F + by_l0_F
        assert window_NF.sum() > 10
        assert_same_gradients(stack, layer, w)


def test_straight_through_is_zero_with_a_slope():
    pre = torch.tensor([0.4, 0.55, 0.95, 1.1, 1.6], requires_grad=True)
    threshold = torch.ones(5, requires_grad=True)
    value = straight_through(pre, threshold, 1.0)
    value.sum().backward()
    assert not value.any() and pre.grad is None
    assert threshold.grad is not None and threshold.grad.tolist() == [0, -1, -1, -1, 0]


def test_thresholds_stay_at_zero_or_above():
    stack = random_stack("jumprelu")
    with torch.no_grad():
        stack.extra_LF["threshold"][0, :3] = -1.0
    JumpReLU.after_step_(stack, loss_of("jumprelu", stack, random_activations()).smallest_L, torch.zeros(L))
    threshold_LF = stack.extra_LF["threshold"]
    assert threshold_LF.min() == 0 and threshold_LF.requires_grad
    before_LF = threshold_LF.detach().clone()
    JumpReLU.after_step_(
        stack, loss_of("jumprelu", stack, random_activations()).smallest_L, torch.tensor([0.0, 1.1]).log1p()
    )
    torch.testing.assert_close(threshold_LF, before_LF * torch.tensor([[1.0], [2.1]]))


# ---- batch_topk and matryoshka


@pytest.mark.parametrize("k", [1, 3, 9])
def test_a_batch_keeps_k_per_token_on_average(k):
    pre_LNF = torch.randn(L, N, F, generator=seeded(4))
    f_LNF = keep_largest(pre_LNF, k)
    assert (f_LNF > 0).sum((1, 2)).tolist() == [N * k, N * k]
    assert (f_LNF > 0).sum(2).unique().numel() > 1  # not the same for every token
    for layer in range(L):
        active = f_LNF[layer] > 0
        assert torch.equal(f_LNF[layer][active], pre_LNF[layer][active])
        assert pre_LNF[layer][active].min() >= pre_LNF[layer][~active].max()
    assert not keep_largest(-pre_LNF.abs(), k).any()


def test_threshold_is_the_mean_of_the_smallest_kept():
    stack = random_stack("batch_topk")

    def see(smallest_L: list[float]) -> list[float]:
        BatchTopK.after_step_(stack, torch.tensor(smallest_L), torch.zeros(L))
        assert (stack.extra_LF["threshold"] == stack.extra_LF["threshold"][:, :1]).all()
        return stack.extra_LF["threshold"][:, 0].tolist()

    assert see([2.0, 5.0]) == [2.0, 5.0]
    assert see([4.0, torch.inf]) == [3.0, 5.0]  # a batch in which nothing was kept says nothing
    assert see([6.0, 6.0]) == [4.0, 5.5]
    for _ in range(97):
        see([4.0, 5.5])
    assert see([14.0, 5.5]) == pytest.approx([4.1, 5.5], abs=1e-3)
    assert see([4.1, 105.5]) == pytest.approx([4.1, 6.5], abs=1e-2)  # the weight of a batch falls to 1 % and no further


def test_prefixes_are_nested_halves():
    assert prefixes(512) == [16, 48, 112, 240, 512]
    assert prefixes(32) == [1, 3, 7, 15, 32]
    assert prefixes(3) == [1, 3] and prefixes(1) == [1]
    assert issubclass(Matryoshka, BatchTopK) and Matryoshka.after_step_ is BatchTopK.after_step_


# ---- the controller and what a study may ask for


def drive(controller: SparsityController, exponent: float, num_steps: int = 1000, lag: float = 0.02) -> Tensor:
    """L0 of a plant in which it follows 100 / lambda ** exponent late and noisily; what it is in the end."""
    log_l0_L, noise = torch.full_like(controller.penalty_L, 4.0), seeded(5)
    for step in range(num_steps):
        strength = min(1.0, step / num_steps / WARM_UP)
        wanted_L = 4.6 - exponent * (controller.penalty_L * max(strength, 1e-2)).log()
        log_l0_L = log_l0_L + lag * (wanted_L - log_l0_L)
        seen_L = log_l0_L.exp() * (1 + 0.05 * torch.randn(log_l0_L.shape, generator=noise))
        controller.update_(seen_L, step, num_steps, min(1.0, (1 - step / num_steps) / 0.8))
    return log_l0_L.exp()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_controller_brings_each_layer_to_its_target(exponent):
    controller = SparsityController.start(torch.tensor([5.0, 0.0, 5.0]), torch.tensor([32.0, 10.0, torch.nan]))
    l0_L = drive(controller, exponent)
    assert l0_L[:2].tolist() == pytest.approx([32, 10], rel=0.02)
    assert controller.penalty_L[2] == 5  # without a target it stays
    assert not controller.trim(899, 1000).any()
    off_L = (controller.log_l0_L[:2] - torch.tensor([32.0, 10.0]).log()).sign()
    assert controller.trim(900, 1000).sign().tolist() == [*off_L.tolist(), 0.0]
    assert set(controller.tensors()) == {"target_l0", "penalty", "log_l0"}


def test_controller_goes_on_from_its_tensors():
    first, second = (SparsityController.start(torch.ones(1), torch.tensor([8.0])) for _ in range(2))
    for step in range(200):
        first.update_(torch.tensor([20.0 - step / 20]), step, 300, 1.0)
        if step == 150:  # stopped and resumed
            second = SparsityController(*(t.clone() for t in (first.target_L, first.penalty_L, first.log_l0_L)))
        if step > 150:
            second.update_(torch.tensor([20.0 - step / 20]), step, 300, 1.0)
    assert torch.equal(first.penalty_L, second.penalty_L)


def test_what_a_specification_asks_for():
    assert DictionarySpec(k=7).l0 == 7 and DictionarySpec(k=7, target_l0=9).l0 == 9
    assert DictionarySpec(architecture="jumprelu", target_l0=9.5).l0 == 9.5
    assert DictionarySpec(architecture="relu").l0 is None
    assert DictionarySpec(architecture="gated", target_l0=4).l0 == 4
    study = {"name": "s", "models": ["zoo/gpt2"], "data": {"path": "zoo/arithmetic"}}
    with pytest.raises(InputError, match="batch_topk keeps a whole number of features, found target_l0 4.5"):
        parse_study(study | {"dictionary": {"architecture": "batch_topk", "target_l0": 4.5}})


def test_an_override_of_k_replaces_the_target():
    spec = DictionarySpec(target_l0=16)
    assert spec.overridden(DictionaryOverride(k=5)).l0 == 5
    assert spec.overridden(DictionaryOverride(architecture="relu", k=5)).l0 == 16  # which does not read k
    assert spec.overridden(DictionaryOverride(k=5, target_l0=6)).l0 == 6


def test_settings_that_are_not_read_are_known():
    assert DictionarySpec().ignored == [] and DictionarySpec(architecture="relu", l1=1.0, target_l0=5).ignored == []
    assert DictionarySpec(l1=1.0).ignored == ["l1"] and DictionarySpec(architecture="gated", k=3).ignored == ["k"]
    assert DictionarySpec(architecture="jumprelu", k=3, target_l0=5).ignored == ["k"]


def test_dead_features_are_resampled_early_enough_to_learn():
    for k in (None, 5):
        due = [step for step in range(1000) if is_due(step, 1000, k)]
        assert len(due) >= 5 and due[0] >= 100 and due[-1] <= 800 and due == sorted(set(due))


# ---- planted directions


def correlation(d_FD: Tensor, W_dec_FD: Tensor) -> float:
    cosine_FF = (d_FD @ W_dec_FD.T).abs().numpy()
    return float(cosine_FF[linear_sum_assignment(-cosine_FF)].mean())


@pytest.fixture(scope="module")
def planted():
    return plant("plain", 210_000, num_features=96, d_model=24, mean_l0=3.0)


@pytest.mark.parametrize("name", ARCHITECTURES.built_in)
def test_planted_directions_are_found_at_the_l0_asked_for(name, planted):
    train_ND, heldout_ND = planted.x_ND[:-10_000], planted.x_ND[-10_000:]
    reports: list[Progress] = []
    one = train(
        ArraySource(train_ND),
        {0: DictionarySpec(architecture=name, d_sae=96, target_l0=3)},
        TrainingSpec(tokens=len(train_ND), batch_tokens=256, seed=1),
        model="planted",
        num_layers=1,
        report=reports.append,
    ).own[0]
    f_NF = one.encode(heldout_ND)
    l0 = float((f_NF > 0).sum(1).float().mean())
    assert 2.5 < l0 <= 3 if name == "topk" else l0 == pytest.approx(3, rel=0.05)  # of the k, only positive ones count
    assert correlation(planted.d_FD, one.W_dec) >= (0.9 if name in ("topk", "batch_topk") else 0.75)
    assert reports[-1].fvu[0] < 0.6


@pytest.mark.parametrize("variant", ["plain", "hierarchical", "correlated"])
def test_planted_data_are_what_they_say(variant):
    data = plant(variant, 20_000, num_features=128, d_model=32, mean_l0=4.0)
    assert data.x_ND.shape == (20_000, 32) and float(data.rates_F.sum()) == pytest.approx(4.0, rel=0.06)
    torch.testing.assert_close(data.d_FD.norm(dim=1), torch.ones(128))
    again = plant(variant, 30_000, num_features=128, d_model=32, mean_l0=4.0)
    torch.testing.assert_close(again.x_ND[:20_000], data.x_ND)
    assert not torch.equal(plant(variant, 100, 1, num_features=128, d_model=32).d_FD, data.d_FD)
