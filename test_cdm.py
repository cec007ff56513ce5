"""The paper as tests: exact classifiers stand where the network goes, so every answer is known.

Run with `pytest`: about a minute on two CPU cores, no network access. Read the two theorems first.
"""

import copy
import gzip
import hashlib
import math
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close

import cdm
import mnist
import toy_2d
from cdm import (CDM, DDM, Schedule, annealed_log_z, bits_per_dim, ddpm_schedule, elbo, given,
                 log_snr_schedule, ode_log_prob, ot_schedule, sample, uniform_schedule)

HERE = Path(__file__).parent
SCHEDULES = {"ddpm": ddpm_schedule(50), "uniform": uniform_schedule(50), "ot": ot_schedule(50),
             "log-SNR": log_snr_schedule(50, 8, -8)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)               # tiny tensors: a second thread costs more than it brings


class Mixture:
    """A Gaussian mixture: at level t a mixture again, of N(alpha m_k, alpha^2 S_k + sigma^2 I)."""

    def __init__(self, schedule, weights, means, covs):
        self.schedule, self.weights = schedule, torch.tensor(weights).double()
        self.means, self.covs = torch.tensor(means).double(), torch.tensor(covs).double()
        alpha, sigma = (v[:, None, None, None] for v in schedule)
        noised_covs = alpha ** 2 * self.covs + sigma ** 2 * torch.eye(2)
        self.noised = MultivariateNormal(alpha[..., 0] * self.means, noised_covs)       # (L, K), 2

    def parts(self, x):
        """log(w_k N_k(x)) at every level: (B, L, K)."""
        return self.weights.log() + self.noised.log_prob(x[:, None, None])

    def logits(self, x):
        return self.parts(x).logsumexp(2)

    def posterior_mean(self, x, t):
        """E[x_0 | x_t = x]: each component's linear regression, weighted by its responsibility."""
        gain = self.schedule.alpha[t] * self.covs @ self.noised.precision_matrix[t]      # (K, d, d)
        each = self.means + torch.einsum("kij,bkj->bki", gain, x[:, None] - self.noised.mean[t])
        return (self.parts(x)[:, t].softmax(1)[..., None] * each).sum(1)

    def sample(self, n):
        clean = MultivariateNormal(self.means, self.covs)
        return MixtureSameFamily(Categorical(self.weights), clean).sample([n])


def mixture(schedule=SCHEDULES["log-SNR"]):
    """A mixture of two Gaussians in the plane, and the exact model of it."""
    truth = Mixture(schedule, [0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]],
                    [[[0.2, 0.1], [0.1, 0.3]], [[0.05, 0.0], [0.0, 0.4]]])
    return truth, CDM(truth.logits, schedule)


def one_gaussian(schedule, mean=(0.5, -1.0), cov=((0.5, 0.3), (0.3, 0.4))):
    truth = Mixture(schedule, [1.0], [mean], [cov])
    return truth, CDM(truth.logits, schedule)


# ------------------------------------------------------------------------- the paper in two tests


@pytest.mark.parametrize("name", SCHEDULES)
def test_theorem_3_1_the_gradient_of_exact_logits_is_the_posterior_mean(name):
    truth, model = mixture(SCHEDULES[name])
    x = 2 * torch.randn(64, 2).double()
    for t in range(51):
        assert_close(model.denoise(x, t), truth.posterior_mean(x, t), rtol=1e-8, atol=1e-8)
    assert_close(model.predict_noise(x, 51), x)                    # pure noise: eps is x itself


@pytest.mark.parametrize("name", SCHEDULES)
def test_theorem_3_2_the_logits_give_the_exact_log_density_at_every_level(name):
    truth, model = mixture(SCHEDULES[name])
    x = 2 * torch.randn(64, 2).double()
    for t in range(52):
        assert_close(model.log_prob(x, np.int64(t)), truth.logits(x)[:, t])
    t = torch.randint(0, 52, (64,))                                # a level per row
    assert_close(model.log_prob(x, t), truth.logits(x).gather(1, t[:, None])[:, 0])


# ------------------------------------------------------------------------------- levels and noise


@pytest.mark.parametrize("make", [ddpm_schedule, uniform_schedule, ot_schedule, log_snr_schedule])
@pytest.mark.parametrize("T", [2, 3, 257])
def test_schedules_fall_from_clean_to_pure_noise_as_their_definition_says(make, T):
    alpha, sigma = schedule = make(T)
    assert CDM(None, schedule).T == T and alpha.dtype == torch.float64     # else a ValueError: BAD
    t = torch.arange(T + 2).double() / (T + 1)
    if make is ddpm_schedule:
        assert 3.5e-5 < alpha[T] ** 2 < 4.2e-5                           # 4.04e-5 at T = 1000
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        assert_close(make(1000).alpha[1:-1] ** 2, (1 - beta).cumprod(0))
    elif make is log_snr_schedule:
        assert_close(2 * (alpha / sigma).log()[1:-1], torch.linspace(14, -8, T).double())
    else:
        assert_close(sigma, t)
    preserved = 1 - t if make is ot_schedule else (1 - sigma ** 2).sqrt()
    assert_close(alpha, preserved, rtol=1e-7, atol=1e-9)


def test_stratified_integers_are_evenly_spread_and_in_random_order():
    for _ in range(50):
        counts = torch.bincount(cdm.stratified(64, 32), minlength=32)
        assert counts.sum() == 64 and counts.min() >= 1 and counts.max() <= 3
    many = torch.cat([cdm.stratified(7, 4)[:2] for _ in range(10000)])
    assert_close(torch.bincount(many) / len(many), torch.full((4,), 0.25), atol=0.02, rtol=0)


# ----------------------------------------------------------------------------------- the classifier


def small_model(T=10, width=32):
    return CDM(toy_2d.MLP(2, T + 2, width, 2, frequencies=0), log_snr_schedule(T, 8, -8))


def observed(model, x0, *args):
    """The losses of a model, and what it computed them from: t, eps, xt, levels, which."""
    noised, asked, add_noise, ask = [], [], model.add_noise, model.ratio_and_noise
    model.add_noise = lambda x0, t, eps: noised.append((t, eps)) or add_noise(x0, t, eps)
    model.ratio_and_noise = lambda *args: asked.append(args) or ask(*args)
    losses = model.losses(x0, *args)
    del model.add_noise, model.ratio_and_noise
    return losses, *noised[0], *asked[0]


@pytest.mark.parametrize("K", [2, 5, None])
def test_the_losses_are_cross_entropy_and_weighted_error_over_a_window_of_levels(K):
    truth, model = mixture(log_snr_schedule(20, 8, -8))
    model.window, x0, w_mse = K, truth.sample(4400), torch.rand(22).double()
    (ce, mse), t, eps, xt, levels, which = observed(model, x0, w_mse)
    assert_close(xt, model.add_noise(x0, t, eps))
    assert_close(levels.gather(1, which[:, None])[:, 0], t)
    assert_close(ce, F.cross_entropy(truth.logits(xt).gather(1, levels), which))
    assert_close(mse, (w_mse[t] * (model.predict_noise(xt, t) - eps).square().mean(1)).mean())
    n = K or 22                                                   # all windows and places alike
    assert levels.shape == (4400, n) and (levels.diff() == 1).all()
    places = torch.bincount(levels[:, 0] * n + which)
    assert len(places) == (23 - n) * n and places.max() - places.min() <= 1
    model.net = lambda x: 1.5 * truth.logits(x)                     # a wrong one is worse in both
    torch.manual_seed(0)
    worse = model.losses(x0, w_mse)
    model.net = truth.logits
    torch.manual_seed(0)
    assert all(a > b for a, b in zip(worse, model.losses(x0, w_mse)))


@pytest.mark.parametrize("K", [2, 5, None])
def test_the_exact_classifier_is_where_the_cross_entropy_of_windows_is_stationary(K, monkeypatch):
    """At one point x, average over all windows and places, with the chance p(t | x) of level t: no
    level's logit may want to move. Each row has shifts of its own, so gradients can be weighted."""
    truth, _ = mixture(log_snr_schedule(20, 8, -8))
    n = (23 - (K or 22)) * (K or 22)
    shift, x = torch.zeros(n, 22).double().requires_grad_(), torch.tensor([[0.3, -0.2]]).double()
    model = CDM(lambda x: truth.logits(x) + shift, truth.schedule)
    model.window = K
    monkeypatch.setattr(cdm, "stratified", lambda B, n, device: torch.arange(n))
    model.add_noise = lambda x0, t, eps: drawn.append(t) or x.expand(n, 2)
    drawn = []
    model.losses(torch.zeros(n, 2).double())[0].backward()
    p = truth.logits(x).softmax(1)[0, drawn[0]]
    assert shift.grad.abs().max() > 1e-4
    assert_close(p @ shift.grad, torch.zeros(22).double(), atol=1e-12, rtol=0)


def test_compiled_equals_eager_where_nothing_is_random_and_losses_compile():
    model, x, t = small_model(), torch.randn(4, 2), torch.tensor([1, 3, 5, 9])
    compiled = torch.compile(model.predict_noise)
    assert_close(compiled(x, t), model.predict_noise(x, t), rtol=1e-4, atol=1e-5)
    sum(torch.compile(model.losses, backend="aot_eager", fullgraph=True)(x)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("schedule", [log_snr_schedule(2000, 18, -8), ot_schedule(2000)])
def test_dpm_solver_is_second_order_and_ddim_first(schedule):
    # steps of the straight path are uneven in log-SNR, so that the solver's ratio of steps counts
    _, model = one_gaussian(schedule, (0.0, 0.0), ((0.49, 0.0), (0.0, 0.49)))
    start, marginal = torch.ones(1, 2).double(), (schedule.alpha * 0.7).hypot(schedule.sigma)
    truth, error = 0.7 / marginal[2000], {}                  # the flow scales x by the ratio of std
    for method, steps in ((m, n) for m in ("ddim", "dpm") for n in (50, 100, 200)):
        error[method, steps] = abs(sample(model, start, steps, method)[0, 0] - truth).item()
    for steps in (50, 100):
        assert 1.7 < error["ddim", steps] / error["ddim", 2 * steps] < 2.3
        assert 3.2 < error["dpm", steps] / error["dpm", 2 * steps] < 4.8
    assert error["dpm", 50] < error["ddim", 50] / 4


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [1, 7, None])
@pytest.mark.parametrize("schedule", [log_snr_schedule(60, 8, -8), ot_schedule(60)])
def test_samples_have_the_right_mean_and_covariance(method, steps, schedule):
    """With Gaussian data every step is affine, so mean and covariance follow by matrices alone."""
    (alpha, sigma), (truth, model) = schedule, one_gaussian(schedule)
    eye, calls, precisions = torch.eye(2).double(), [], truth.noised.precision_matrix
    predict = model.predict_noise
    model.predict_noise = lambda x, t: calls.append(t) or predict(x, t)
    x = sample(model, torch.randn(4000, 2).double(), steps and np.int64(steps), method)
    n = steps or 60
    assert calls == [60 - i * 60 // n for i in range(n)]                # exactly n calls
    mean, cov = torch.zeros(2).double(), eye
    for t, s in zip(calls, calls[1:] + [0]):
        # E[x_0|x_t] = m + gain (x_t - alpha_t m)
        gain = alpha[t] * truth.covs[0] @ precisions[t, 0]
        alpha_ts = alpha[t] / alpha[s]
        var_ts = sigma[t] ** 2 - alpha_ts ** 2 * sigma[s] ** 2
        if method == "ddpm":                                # posterior mean and variance, Ho et al.
            a, b = alpha_ts * sigma[s] ** 2 / sigma[t] ** 2, alpha[s] * var_ts / sigma[t] ** 2
            variance = var_ts * sigma[s] ** 2 / sigma[t] ** 2
        else:
            a, b, variance = sigma[s] / sigma[t], alpha[s] - alpha[t] * sigma[s] / sigma[t], 0
        step = a * eye + b * gain
        mean = step @ mean + b * (truth.means[0] - alpha[t] * gain @ truth.means[0])
        cov = step @ cov @ step.T + variance * eye
    assert_close(x.mean(0), mean, atol=0.05, rtol=0)
    assert_close(torch.cov(x.T), cov, atol=0.05, rtol=0)
    if steps is None and method == "ddim":                    # and with small steps it is the truth
        assert_close(cov, truth.covs[0], atol=0.05, rtol=0)


# ----------------------------------------------------------------------------------------- audits


def test_elbo_ode_and_one_pass_agree_for_the_exact_classifier():
    truth, model = mixture(log_snr_schedule(80, 8, -10))
    x0 = truth.sample(2000)
    x1 = model.add_noise(x0, 1, torch.randn_like(x0))
    one_pass = model.log_prob(x1, 1)
    assert_close(ode_log_prob(model, x1[:100], 1), one_pass[:100], atol=0.03, rtol=0)
    guess = ode_log_prob(model, x1[:400], 1, probes=2)                   # Hutchinson: no bias
    assert_close(guess.mean(), one_pass[:400].mean(), atol=0.05, rtol=0)
    bound = elbo(model, x0)
    assert abs(bound.mean() - one_pass.mean()) < 0.06             # two standard errors of 2000 rows
    wrong = CDM(lambda x: 2 * truth.logits(x), model.schedule)  # a wrong denoiser loosens the bound
    assert elbo(wrong, x0).mean() < bound.mean() - 0.1


def test_the_elbo_is_a_lower_bound_also_where_level_T_is_not_yet_noise():
    truth, model = one_gaussian(log_snr_schedule(80, 8, 0), (1.0, -1.0))       # alpha_T^2 = 1/2
    x0 = truth.sample(2000)
    x1 = model.add_noise(x0, 1, torch.randn_like(x0))
    gap = model.log_prob(x1, 1).mean() - elbo(model, x0).mean()
    mean, cov = truth.noised.mean[80, 0], truth.noised.covariance_matrix[80, 0]
    kl = 0.5 * (mean @ mean + cov.trace() - 2 - cov.logdet())              # KL(p_T || N(0, I))
    assert_close(gap, kl, atol=0.08, rtol=0)


@pytest.mark.parametrize("schedule", [log_snr_schedule(100, 6, -6), ot_schedule(120)])
def test_annealing_brackets_a_planted_constant_and_does_not_see_others(schedule):
    truth, _ = mixture(schedule)                 # the straight path is not variance preserving
    planted = torch.zeros(len(schedule.alpha)).double()
    planted[1], planted[40:60] = 0.8, -0.5                 # p_1 integrates to exp(0.8)
    model = CDM(lambda x: truth.logits(x) + planted, schedule)
    x1 = model.add_noise(truth.sample(1000), 1, torch.randn(1000, 2).double())
    below, above = annealed_log_z(model, x1)
    width = 0.6 if schedule.alpha[1] > 0.998 else 5.0            # few levels near the data are wide
    assert below < 0.8 < above < below + width
    assert abs((below + above) / 2 - 0.8) < width / 6


def lattice(schedule, counts):
    """The exact model of one 8-bit pixel, given counts per grey value, and images of it as x0."""
    grey, p = torch.tensor(list(counts)), torch.tensor(list(counts.values())).double()
    place = (2 * grey.double() + 1) / 256 - 1

    def logits(x):
        sigma = schedule.sigma.clamp(min=1e-4)                      # level 0 gets a tiny width
        z = (x[..., None] - schedule.alpha * place[:, None]) / sigma
        logs = (p / p.sum()).log()[:, None] - z ** 2 / 2 - sigma.log() - math.log(2 * math.pi) / 2
        return logs.logsumexp(1)

    return CDM(logits, schedule), place[torch.multinomial(p, 4000, replacement=True)][:, None]


def test_the_bits_of_a_known_distribution_are_its_entropy():
    model, x0 = lattice(log_snr_schedule(100, 14, -8), {0: 2, 10: 1, 11: 1})       # 1.5 bits
    x1, sigma1 = model.add_noise(x0, 1, torch.randn_like(x0)), model.schedule.sigma[1]
    for log_p1 in (model.log_prob(x1, 1), elbo(model, x0)):
        assert_close(bits_per_dim(log_p1, sigma1, 1).mean().item(), 1.5, atol=0.04, rtol=0)
    ode = bits_per_dim(ode_log_prob(model, x1[:500], 1), sigma1, 1).mean()
    assert abs(ode - bits_per_dim(model.log_prob(x1[:500], 1), sigma1, 1).mean()) < 0.1
    two = bits_per_dim(2 * model.log_prob(x1, 1), sigma1, 2)                # two equal pixels
    assert_close(two, bits_per_dim(model.log_prob(x1, 1), sigma1, 1))


# ---------------------------------------------------------------------- as a user meets the module


def test_it_runs_in_float32_and_float64_on_points_and_images_and_is_saved():
    for dtype in (torch.float32, torch.float64):
        make = lambda: CDM(nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.SiLU(),
                                         nn.Linear(32, 22)), log_snr_schedule(20, 8, -8)).to(dtype)
        model, twin = make(), make()
        x = sample(model, torch.randn(3, 1, 4, 4, dtype=dtype), 5, "dpm")
        assert x.shape == (3, 1, 4, 4) and x.dtype == dtype
        for result in (model.log_prob(x), elbo(model, x), ode_log_prob(model, x, probes=2)):
            assert result.dtype == dtype and result.shape == (3,)
        assert not x.requires_grad and not elbo(model, x).requires_grad       # no graph is kept
        sum(model.losses(x)).backward()
        assert not torch.equal(twin.log_prob(x), model.log_prob(x))
        twin.load_state_dict(model.state_dict())
        assert_close(twin.log_prob(x), model.log_prob(x))
        parallel = CDM(nn.DataParallel(model.net), model.schedule)                # a wrapped network
        assert_close(parallel.predict_noise(x, 3), model.predict_noise(x, 3))


class Labelled(nn.Module):
    """The mixture's exact classifier; its two components are two classes."""

    def forward(self, x, y=None):
        truth, _ = mixture()
        if y is None:
            return truth.logits(x)
        return (truth.parts(x) - truth.weights.log())[torch.arange(len(x)), :, y]


def test_guidance_0_is_the_labelled_model_and_minus_1_the_one_without_labels():
    truth, _ = mixture()
    model, x = CDM(Labelled(), truth.schedule), truth.sample(8)
    y, ones, t = torch.tensor([0, 1] * 4), torch.ones(8).long(), torch.arange(1, 48, 6)
    free, labelled = model.predict_noise(x, t), given(model, y).predict_noise(x, t)
    assert not torch.allclose(free, labelled)
    assert_close(model.predict_noise(x, t), free)                  # the model itself has no labels
    assert_close(given(model, y, -1.0).predict_noise(x, t), free)
    assert_close(given(model, y, 2.0).predict_noise(x, t), labelled + 2 * (labelled - free))
    ddm = DDM(lambda x, t, y=None: (model if y is None else given(model, y)).predict_noise(x, t),
              truth.schedule)
    for w in (-1.0, 0.0, 2.0):
        assert_close(given(ddm, y, w).predict_noise(x, t), given(model, y, w).predict_noise(x, t))
    alone = CDM(lambda x: Labelled()(x, ones), truth.schedule)
    assert_close(sample(given(model, ones), x, 10), sample(alone, x, 10))
    assert_close(given(given(model, y, 3.0), ones).log_prob(x), alone.log_prob(x))     # replaced


def test_a_labelled_model_shares_weights_keeps_its_class_is_copied_and_pickled():
    model, y, x = digit_model()[0], torch.arange(3), torch.randn(3, 1, 8, 8)
    labelled = given(model, y, 1.0)
    assert type(labelled) is mnist.DigitCDM and labelled.window == 2
    labelled.net.net.label.weight.data += torch.randn(11, 32)               # seen by both
    value = labelled.log_prob(x)
    assert_close(given(model, y, 1.0).log_prob(x), value)
    for twin in (copy.deepcopy(labelled), pickle.loads(pickle.dumps(labelled))):
        assert_close(twin.log_prob(x), value)
        twin.net.net.label.weight.data.zero_()
        assert_close(labelled.log_prob(x), value)


def test_a_ddm_of_the_same_denoiser_is_the_same_diffusion_model():
    truth, exact = one_gaussian(SCHEDULES["log-SNR"])
    shown = []
    ddm = DDM(lambda xt, t: shown.append(t) or exact.predict_noise(xt, t), truth.schedule)
    start, x0 = torch.randn(6, 2).double(), truth.sample(5000)
    assert_close(sample(ddm, start, 10), sample(exact, start, 10))
    assert_close(ode_log_prob(ddm, start), ode_log_prob(exact, start))
    shown.clear()
    ce, mse = ddm.losses(x0)                   # the CDM also meets t = 0, where eps_hat = 0 costs 1
    assert ce == 0
    assert_close(mse, exact.losses(x0)[1] * 52 / 50 - 1 / 50, atol=0.02, rtol=0)
    assert shown[0].min() == 1 and shown[0].max() == 50


BAD = {
    "T too small": lambda m, x: CDM(m.net, ddpm_schedule(1)),
    "log-SNR rises": lambda m, x: CDM(m.net, log_snr_schedule(10, -8, 8)),
    "schedule ends": lambda m, x: CDM(None, Schedule(torch.linspace(1, 0.1, 9), torch.rand(9))),
    "schedule shape": lambda m, x: CDM(None, Schedule(torch.ones(5), torch.ones(4))),
    "no schedule": lambda m, x: CDM(None, 1000),
    "lazy layer": lambda m, x: CDM(nn.LazyLinear(12), m.schedule),
    "level above": lambda m, x: m.predict_noise(x, 12),
    "level below": lambda m, x: m.log_prob(x, -1),
    "level float": lambda m, x: m.add_noise(x, 3.5, x),
    "level tensor shape": lambda m, x: m.log_prob(x, torch.zeros(3, dtype=torch.long)),
    "level tensor dtype": lambda m, x: m.log_prob(x, torch.zeros(4)),
    "pure noise denoised": lambda m, x: m.denoise(x, 11),
    "integer data": lambda m, x: m.losses(x.byte()),
    "integer data noised": lambda m, x: m.add_noise(x.byte(), 1, x),
    "label as int": lambda m, x: given(m, 7),
    "float labels": lambda m, x: given(m, torch.zeros(4)),
    "logit width": lambda m, x: CDM(m.net, ddpm_schedule(20)).log_prob(x),
    "method": lambda m, x: sample(m, x, method="euler"),
    "no steps": lambda m, x: sample(m, x, steps=0),
    "steps above T": lambda m, x: sample(m, x, steps=11),
    "ODE level": lambda m, x: ode_log_prob(m, x, 0),
    "empty batch": lambda m, x: m.losses(x[:0]),
    "ELBO of nothing": lambda m, x: elbo(m, x[:0]),
    "ELBO of few levels": lambda m, x: elbo(m, x),
    "half precision": lambda m, x: m.bfloat16().log_prob(x.bfloat16()),
    "ELBO in half precision": lambda m, x: elbo(small_model(30).bfloat16(), x.bfloat16()),
    "blurred greys": lambda m, x: bits_per_dim(0.0, 0.001, 1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_value_error(name):
    with pytest.raises(ValueError):
        BAD[name](small_model(), torch.randn(4, 2))


def test_a_level_in_a_tensor_never_wraps_around():
    with pytest.raises(IndexError):
        small_model().add_noise(torch.randn(4, 2), torch.full((4,), -1), torch.randn(4, 2))


# -------------------------------------------------------------------------------------- toy_2d.py


@pytest.mark.parametrize("name", toy_2d.DATASETS)
def test_the_oracles_are_exact_at_every_level(name):
    oracle, points = toy_2d.DATASETS[name](), toy_2d.grid()[::3]
    cell = 3 * (2 * toy_2d.HALF / toy_2d.CELLS) ** 2           # every third cell stands for three
    for t in (0, 24, 41):
        p = oracle.log_prob(points, t).exp()
        assert_close((p.sum() * cell).item(), 1.0, atol=0.01, rtol=0)
        weigh = lambda x: (-(x - 0.5).square().sum(1)).exp()   # smooth: the lattice is a coarse one
        noised = weigh(oracle.sample(20000, t)).mean()
        assert_close(noised, (weigh(points) * p).sum() * cell, atol=0.01, rtol=0)
    assert_close(oracle.logits(points[::999])[:, 24], oracle.log_prob(points[::999], 24))


def test_evaluate_gives_the_truth_a_kl_of_zero_and_sees_through_a_wrong_scale():
    oracle = toy_2d.two_modes()
    for z in (0.0, 0.5):
        row = toy_2d.evaluate(lambda x: oracle.log_prob(x.double()) + z, oracle)[0]
        assert_close(row, dict(KL=0.0, log_Z=z, KL_raw=-z, heavy_mode=0.9), atol=1e-4, rtol=0)
    equal = toy_2d.Oracle(oracle.centres, std=oracle.std)       # KL of weights 0.5 by hand
    row = toy_2d.evaluate(lambda x: equal.log_prob(x.double()), oracle)[0]
    assert_close(row["KL"], 0.9 * math.log(1.8) + 0.1 * math.log(0.2), atol=1e-4, rtol=0)
    far = toy_2d.Oracle(torch.tensor([(5.0, 0.0), (0.0, 0.0)]), std=0.1)
    with pytest.raises(ValueError, match="50% of the density lies outside"):
        toy_2d.evaluate(lambda x: far.log_prob(x.double()), far)


@pytest.mark.parametrize("name", toy_2d.METHODS)
def test_every_method_recovers_a_known_log_ratio(name):
    schedule = log_snr_schedule(40, 8, -6)
    oracle = toy_2d.Oracle(torch.tensor([(0.8, -0.4)]), std=0.4, schedule=schedule)
    make = lambda outputs, timed=False: toy_2d.MLP(2 + timed, outputs, 64, 2, frequencies=0)
    method = toy_2d.METHODS[name](make, schedule)
    toy_2d.train(method, lambda: oracle.sample(512).float(), steps=300, lr=1e-2)
    x = oracle.sample(500)
    error = (method.log_prob(x.float()) - oracle.log_prob(x)).detach()
    error = error - error.mean() if name == "MSE" else error     # it does not know the constant
    # log N(x; 0, I) in place of log p would be 1.5 off, without its mean 0.7
    assert error.abs().mean() < (0.3 if name in ("MSE", "time-score", "DDM-ODE") else 0.15)


def test_the_chasm_measures_the_mean_and_the_root_mean_square_error_in_nats(monkeypatch):
    oracle = toy_2d.CorrelatedPairs(6)
    exact = CDM(oracle.logits, oracle.schedule)
    for t in (0, 15, 41):
        pair = torch.eye(3).double().repeat(2, 2) - torch.eye(6).double()       # 1 where paired
        cov = torch.eye(6).double() + oracle.schedule.alpha[t] ** 2 * oracle.RHO * pair
        normal = MultivariateNormal(torch.zeros(6).double(), cov)
        x = oracle.sample(20000, t).double()
        assert_close(x.T.cov(), cov, atol=0.05, rtol=0)
        assert_close(exact.log_prob(x, t), normal.log_prob(x))

    exact.weight = nn.Parameter(torch.zeros(()))                               # to be trained
    off = toy_2d.Method(exact, lambda x0: exact.weight ** 2, lambda x: exact.log_prob(x) + 3)
    monkeypatch.setitem(toy_2d.CHASM, "off", lambda make, schedule: off)
    row, (truth, learned) = toy_2d.chasm_run(6, "off", 1, 0)
    assert_close([row[k] for k in ("rms", "estimated", "true")], [3.0, 4.5, 1.5], atol=0.1, rtol=0)
    assert truth[0] == 0 and abs(truth[-1] + 1.5) < 0.1 and len(truth) == 42
    assert_close(learned, truth)


def test_a_table_shows_a_spread_over_equal_trainings_only_and_refuses_nan(capsys, tmp_path):
    rows = [dict(method=m, seed=s, v=v) for m, s, v in (("p", 0, 1.0), ("p", 1, 3.0), ("q", 0, 5.0))]
    other = [dict(method="p", seed=0, v=1.0)]                                   # another density
    lines = [("speed, m/s", "v", 1, rows), ("all", "v", 1, rows + other)]
    toy_2d.table(tmp_path / "t.csv", rows, lines)
    said = re.sub(" +", " ", capsys.readouterr().out).splitlines()
    assert said[0] == "| | p | q |" and said[2] == "| speed, m/s | 2.0 +- 1.4 | 5.0 |"
    assert said[3] == "| all | 1.7 | 5.0 |"
    saved = (tmp_path / "t.csv").read_text("utf-8").split()
    assert saved == ["method,seed,v", "p,0,1.0", "p,1,3.0", "q,0,5.0"]
    rows[0]["v"] = math.nan
    with pytest.raises(SystemExit, match="speed, m/s, p: .*nan.* is not finite"):
        toy_2d.table(tmp_path / "t.csv", rows, lines)


@pytest.mark.parametrize("flags, trainings, words, files", [
    ("--datasets two_modes two_modes --methods NCE CDM DDM-ODE NCE --seeds 2", 6,
     "two_modes: KL, nats|two_modes: log Z, nats|(0.9)|+-|s left", ["toy_2d.csv", "toy_2d.png"]),
    ("--chasm --seeds 1", 10, "d = 4: mean log-ratio (1), nats|rms|time-score",
     ["chasm.csv", "hero.png", "posterior.png"])])
def test_every_command_prints_a_table_and_draws(flags, trainings, words, files, tmp_path, capsys,
                                                monkeypatch):
    out = tmp_path / "my results"
    monkeypatch.setattr(toy_2d, "CELLS", 40)
    monkeypatch.setattr(toy_2d, "DIMENSIONS", (2, 4))
    monkeypatch.setattr(sys, "argv", ["toy_2d", *flags.split(), "--steps", "2", "--out", str(out)])
    toy_2d.main()
    said = capsys.readouterr().out
    assert all(word in said for word in words.split("|")), said
    assert sorted(f.name for f in out.iterdir()) == files
    assert len((out / files[0]).read_text("utf-8").splitlines()) == 1 + trainings


def test_a_job_that_fails_ends_the_others_at_once_also_where_processes_are_spawned():
    begun = time.time()
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        with pytest.raises(SystemExit, match="stopped by ZeroDivisionError"):
            toy_2d.in_parallel([(time.sleep, 100), (divmod, 1, 0)])
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert time.time() - begun < 60 and not multiprocessing.active_children()


# --------------------------------------------------------------------------------------- mnist.py


def digit_model(family="cdm"):
    torch.manual_seed(0)
    images = (torch.rand(50, 1, 8, 8) * 300 - 40).clamp(0, 255).to(torch.uint8)
    return mnist.build(dict(model=family, dataset="digits", width=16), images), images


def scattered(model):
    """The model in float64, with its weights away from the zeros of the start."""
    for p in model.double().parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model


def test_the_digit_classifier_starts_as_the_exact_one_of_independent_pixels_on_a_lattice():
    model, images = digit_model()
    x, (alpha, sigma) = 0.5 * torch.randn(3, 1, 8, 8), model.schedule
    counts = torch.stack([images == k for k in mnist.PixelMixture.GREYS]).double().sum(1)
    share = torch.cat([counts, (50 - counts.sum(0, keepdim=True)).expand(3, -1, -1, -1) / 3]) + 1
    grey = (2 * torch.arange(-1000, 1256).double() + 1) / 256 - 1             # also beyond 0 .. 255
    for t in (0, 1, 5, 8, 9, 10, 30, 64):          # at level 0 a little noise stands in for none
        seen = Normal(alpha[t] * grey, sigma[t].clamp(min=3e-4))
        seen = seen.log_prob(x[..., None].double()).exp()                      # (3, 1, 8, 8, 2256)
        p = sum(share[i] * seen[..., 1000 + k] for i, k in enumerate(mnist.PixelMixture.GREYS))
        for i, mean in enumerate((-0.6, 0.0, 0.6)):
            prior = Normal(mean, math.sqrt(math.exp(-1.5) + mnist.STEP ** 2))
            p = p + share[5 + i] * (seen * prior.log_prob(grey).exp() * mnist.STEP).sum(-1)
        log_p = (p / share.sum(0)).log().flatten(1).sum(1)
        assert_close(model.log_prob(x, t).double(), log_p, atol=0.05, rtol=1e-3)


def test_the_lattice_factor_is_what_noise_leaves_of_a_lattice_of_greys():
    x, alpha = torch.linspace(-0.9, 0.9, 500).view(1, 1, -1), torch.tensor(0.95).view(1, 1, 1)
    grey = (torch.arange(-300, 300) + 0.5) * mnist.STEP
    for sigma in torch.tensor([0.003, 0.0044, 0.4]).view(3, 1, 1, 1):
        seen = Normal(alpha * grey, sigma).log_prob(x[..., None]).exp().sum(3) * alpha * mnist.STEP
        assert_close(mnist.log_lattice(x, alpha, sigma).exp(), seen, atol=0.005, rtol=1e-3)


def test_the_digit_denoiser_starts_as_the_digit_classifier_and_has_the_same_size():
    (model, images), (ddm, _) = digit_model(), digit_model("ddm")
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1, 20, 40, 64])
    assert_close(ddm.predict_noise(x, t), model.predict_noise(x, t), atol=1e-3, rtol=1e-3)
    ddm.losses(x)[1].backward()
    assert all(p.grad is not None for p in ddm.parameters())
    a, b = (sum(p.numel() for p in m.parameters()) for m in (model, ddm))
    assert a - b == 32                                     # the constants, which a DDM has not


def test_the_digit_classifier_keeps_rows_apart_and_serves_any_levels_in_any_number():
    model = scattered(digit_model()[0])
    x, t = 0.5 * torch.randn(5, 1, 8, 8).double(), torch.tensor([0, 1, 25, 64, 65])
    every = model.log_ratio(x, torch.arange(66).expand(5, 66))
    one_by_one = torch.stack([model.log_ratio(x[i:i + 1], t[i:i + 1, None])[0] for i in range(5)])
    assert_close(one_by_one, every.gather(1, t[:, None]))
    assert_close(every[:, 65], torch.zeros(5).double(), atol=1e-9, rtol=0)     # p_{T+1} = N(0, I)
    finer = mnist.DigitCDM(model.net, log_snr_schedule(127, 14, -8)).double()  # every second is new
    assert_close(finer.log_prob(x, 11), model.log_prob(x, 6), atol=1e-4, rtol=1e-4)
    y = torch.tensor([3, 1, 10, 5, 0])
    given(model, y).losses(x)[1].backward()
    for name, p in model.named_parameters():                   # constants are learned by CE alone
        assert (p.grad is not None) == (name != "net.constant.weight"), name
    given(model, y).losses(x)[0].backward()
    assert model.net.constant.weight.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["cdm", "ddm"])
def test_no_label_is_the_label_number_ten(family):
    x, t, y = torch.randn(2, 1, 8, 8).double(), torch.tensor([3, 9]), torch.tensor([3, 5])
    model = scattered(digit_model(family)[0])
    free = model.predict_noise(x, t)
    assert_close(given(model, torch.full((2,), 10)).predict_noise(x, t), free)
    assert not torch.allclose(given(model, y).predict_noise(x, t), free)
    with pytest.raises(IndexError):
        given(model, y + 7).predict_noise(x, t)


def test_the_best_linear_denoiser_is_exact_for_a_gaussian():
    images = torch.randint(0, 256, (4000, 1, 2, 2), dtype=torch.uint8)
    images[:, :, 1] = images[:, :, :1, 0] // 2                     # three pixels that are related
    schedule, x0 = log_snr_schedule(9, 6, -8), mnist.to_x0(images).flatten(1).double()
    cov, found = x0.T.cov(), mnist.best_linear_mse(images, schedule)
    for t in (1, 5, 9):                          # eps_hat = sigma N^-1 (xt - alpha m), N = cov(xt)
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        noised = cov * alpha ** 2 + sigma ** 2 * torch.eye(4).double()
        assert_close(found[t], 1 - sigma ** 2 * torch.linalg.inv(noised).trace() / 4)
    assert found[0] == found[1] and found[10] == found[9]


def training(out, device="cpu", model="cdm", steps=100):
    """mnist.train on 64 images of noise."""
    config = dict(model=model, dataset="digits", width=8, batch=16, steps=steps, lr=0.01, seed=0)
    images, y = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8), torch.arange(64) % 10
    return mnist.train(config, images, y, device, out)


def test_training_warms_up_clips_averages_and_drops_labels(monkeypatch, tmp_path):
    rates, norms, weights, given_to, labels = [], [], [], [], []

    def note(optimiser, *_):                                                      # before a step
        group = optimiser.param_groups[0]
        rates.append(group["lr"])
        norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
        weights.append([p.detach().clone() for p in group["params"]])
        labels.append(given_to[-1].clone())

    monkeypatch.setattr(mnist, "W_CE", 100.0)                                 # a large gradient
    monkeypatch.setattr(mnist, "given", lambda model, y: given_to.append(y) or given(model, y))
    handle = register_optimizer_step_pre_hook(note)
    average = training(tmp_path)
    handle.remove()
    assert_close(rates[:4], [0.01 * step / 4 for step in (1, 2, 3)] + [0.01 * 0.5 * (
        1 + math.cos(math.pi * 0.04))], rtol=1e-6, atol=0)
    assert rates[-1] < 1e-9 and abs(max(norms) - 2.0) < 1e-3
    expected, weights = weights[0], weights + weights[-1:]         # the last step moves nothing
    for step, now in enumerate(weights[1:], 1):
        expected = [a + 9 / (9 + step) * (w - a) for a, w in zip(expected, now)]
    assert_close(list(average.parameters()), expected, rtol=1e-4, atol=1e-5)
    assert 0.17 < (torch.cat(labels) == mnist.CLASSES).float().mean() < 0.23


@pytest.mark.parametrize("family", ["cdm", "ddm"])
def test_training_and_sampling_stay_on_the_device(family, monkeypatch, tmp_path):
    """On PyTorch's meta device tensors have no values, and to mix them with the CPU's is an error."""
    monkeypatch.setattr(mnist, "save", lambda path, **content: None)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)
    model = training(tmp_path, "meta", family, steps=3)
    for method in ("ddpm", "ddim", "dpm"):
        x = sample(model, torch.randn(3, 1, 8, 8, device="meta"), 12, method)
        assert x.is_meta and x.shape == (3, 1, 8, 8)


make_judge = mnist.make_judge


def run_digits(monkeypatch, out, *flags):
    """mnist.py on scikit-learn's digits, with a small preset."""
    monkeypatch.setattr(mnist, "make_judge", lambda *data: make_judge(*data, steps=20))
    tiny = dict(width=8, batch=16, steps=120, lr=0.01, one_pass=100, elbo=20, slow=10, fine=40,
                samples=100)
    monkeypatch.setattr(mnist, "QUICK", tiny)
    monkeypatch.setattr(sys, "argv", ["mnist.py", "--dataset", "digits", "--quick", "--device",
                                      "cpu", "--out", str(out), *map(str, flags)])
    mnist.main()


def numbers(said):
    """The numbers on a screen, without the times."""
    return re.findall(r"[+-]?\d+\.\d{3,}", re.sub(r"step .*", "", said))


def test_a_cdm_and_a_ddm_train_resume_and_are_measured_side_by_side(monkeypatch, tmp_path, capsys):
    run_digits(monkeypatch, tmp_path / "a ddm", "--steps", 3, "--model", "ddm")
    assert "one forward pass" not in capsys.readouterr().out             # a DDM has no such thing
    out, save = tmp_path / "a cdm", mnist.save

    def stop(path, **content):                        # as Ctrl-C does, after a save
        save(path, **content)
        if content.get("step") == 100:
            raise KeyboardInterrupt
    monkeypatch.setattr(mnist, "save", stop)
    with pytest.raises(SystemExit, match="--resume goes on from it"):
        run_digits(monkeypatch, out)
    monkeypatch.setattr(mnist, "save", save)
    with pytest.raises(SystemExit, match="stopped at step 100: add --resume"):
        run_digits(monkeypatch, out)
    with pytest.raises(SystemExit, match="is of .*, not of .*: name another --out"):
        run_digits(monkeypatch, out, "--resume", "--batch", 32)
    capsys.readouterr()
    run_digits(monkeypatch, out, "--resume")
    said = capsys.readouterr().out
    run_digits(monkeypatch, tmp_path / "b")                              # uninterrupted: the same
    assert numbers(capsys.readouterr().out) == numbers(said)
    a, b = (torch.load(folder / "model.pt") for folder in (out, tmp_path / "b"))
    assert_close(a["ema"], b["ema"], rtol=0, atol=0)
    assert not torch.equal(a["ema"]["net.last.weight"], a["model"]["net.last.weight"])
    steps = [line.split(",")[0] for line in (out / "log.csv").read_text("utf-8").split()]
    assert steps == ["step", "100", "120"]
    ce, = re.findall(r"step    120 of 120   cross-entropy ([\d.]+)", said)
    assert float(ce) < math.log(2)
    one, log_z, both = (float(re.search(pattern, said)[1]) for pattern in (
        r"one forward pass, 100 images +([\d.-]+)", r"log Z, between .* +([\d.-]+) \+-",
        r"one pass \+ log Z: ([\d.-]+)"))
    assert abs(one + log_z - both) < 0.002 and one < 5
    run_digits(monkeypatch, tmp_path / "c", "--weights", out / "model.pt", tmp_path / "a ddm/weights.pt")
    together = capsys.readouterr().out
    assert set(numbers(said)[:4]) <= set(numbers(together))           # the CDM's numbers once more
    for what in (r"\| model, label first", r"\| weights, free", r"\| weights +\| +\d+ \|"):
        assert re.search(what, together), what
    for name in ("samples.png", "levels.png", "errors.png"):
        assert (tmp_path / "c" / name).stat().st_size > 2000


def test_what_cannot_go_on_says_why_and_keeps_what_is_saved(monkeypatch, tmp_path):
    def refused(why, *flags):
        with pytest.raises(SystemExit, match=why):
            run_digits(monkeypatch, tmp_path, *flags)

    refused("there is no .*model.pt", "--resume")
    refused("absent.pt holds no weights", "--weights", tmp_path / "absent.pt")
    (tmp_path / "notes.pt").write_text("not weights", "utf-8")
    refused("notes.pt holds no weights", "--weights", tmp_path / "notes.pt")
    torch.save(dict(config=dict(model="cdm", dataset="digits", width=12), ema={}), tmp_path / "e.pt")
    refused("e.pt holds no weights", "--weights", tmp_path / "e.pt")
    refused("cdm.pt holds no weights.*is of", "--weights", HERE / "assets/mnist_cdm.pt")
    monkeypatch.setattr(mnist, "W_CE", math.inf)
    refused("diverged at step 1: ")
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("script, flags, message", [
    (toy_2d, ["--datasets", "moons"], "invalid choice: 'moons'"), (toy_2d, ["--steps", "0"], "1 or more"),
    (toy_2d, ["--chasm", "--methods", "CDM"], "not with --chasm"),
    (toy_2d, ["--out", __file__], "cannot be made: File exists"),
    (mnist, ["--steps", "two"], "invalid int"), (mnist, ["--width", "10"], "multiple of 4"),
    (mnist, ["--data", "nowhere at all"], "MNIST cannot be read")])
def test_flags_that_mean_nothing_end_in_one_sentence(script, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    monkeypatch.setattr(toy_2d, "in_parallel", None)                       # train nothing
    monkeypatch.setattr(mnist, "URL", "file:///nowhere/")
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert message in f"{stop.value}{capsys.readouterr().err}"


def test_the_frechet_distance_of_two_gaussians_is_its_closed_form():
    a, b = torch.randn(50000, 3).double(), 2 * torch.randn(50000, 3).double() + 1
    assert_close(mnist.frechet(a, b), 3 * 1.0 + 3 * (1 - 2) ** 2, atol=0.1, rtol=0)
    assert abs(mnist.frechet(a, a)) < 1e-9


def test_the_committed_weights_know_digits():
    model = mnist.load(HERE / "assets/mnist_cdm.pt")
    black = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    data = Path(os.environ.get("MNIST", HERE / "data/mnist"))
    digits = mnist.load_data("mnist", data)[2][0][:100] if data.exists() else black
    def bits(images):
        x1 = model.add_noise(mnist.to_x0(images), 1, torch.randn(images.shape))
        return bits_per_dim(model.log_prob(x1, 1), model.schedule.sigma[1], 784)
    assert bits(black) < 0.3 < bits(255 - black)
    assert bits(digits).mean() < 1.15 and bits(digits).max() < bits(255 - digits).min()


def test_a_download_is_kept_if_it_is_whole_and_read_from_disk_ever_after(monkeypatch, tmp_path):
    idx = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4)) + bytes(range(24))
    packed, data = gzip.compress(idx), tmp_path / "my data"
    (tmp_path / "f.gz").write_bytes(packed)
    monkeypatch.setattr(mnist, "URL", f"{tmp_path.as_uri()}/")
    with pytest.raises(RuntimeError, match="hash"):
        mnist.read_or_download(data, "f.gz", "0000")
    assert not list(data.iterdir())
    for _ in range(2):
        images = mnist.read_or_download(data, "f.gz", hashlib.sha256(packed).hexdigest()[:16])
        assert images.shape == (2, 3, 4) and images.sum() == 276
        (tmp_path / "f.gz").unlink(missing_ok=True)


# ------------------------------------------------------------------------------ README and consoles

README = (HERE / "README.md").read_text("utf-8")


def test_the_programs_print_ascii_so_that_any_console_can_show_it():
    for name in ("cdm.py", "toy_2d.py", "mnist.py"):
        assert (HERE / name).read_bytes().isascii(), name
    subprocess.run([sys.executable, HERE / "mnist.py", "-h"], check=True, capture_output=True,
                   env=os.environ | {"PYTHONIOENCODING": "cp1251"})


def test_the_readme_names_files_and_flags_that_there_are():
    names = re.findall(r"\]\(([^)#]+)\)|([\w./-]+\.(?:py|png|pt|txt))\b", README)
    names = {a or b for a, b in names}
    for name in (n for n in names if not n.startswith(("runs/", "http"))):
        assert (HERE / name).exists(), name
    for script in ("toy_2d", "mnist"):
        known = set(re.findall(r'add\("(--\w+)"', (HERE / f"{script}.py").read_text("utf-8")))
        commands = re.findall(rf"python {script}\.py([^`#|\n]*)", README)
        used = {flag for command in commands for flag in re.findall(r"--[a-zA-Z][\w-]*", command)}
        assert used and used - known <= {"--steps", "--batch", "--width"}, used - known


def test_the_code_in_the_readme_runs_or_is_that_of_cdm(capsys):
    code = lambda line: re.sub(r"\s{2,}#.*", "", line.strip())
    lines = {code(line) for line in (HERE / "cdm.py").read_text("utf-8").splitlines()}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        if "import torch" in block:
            exec(block, {})
            found = float(re.search(r"-?[\d.]+", capsys.readouterr().out)[0])
            assert abs(found - float(re.search(r"print.*# (-?[\d.]+)", block)[1])) < 0.05
        else:
            assert all(code(line) in lines for line in block.splitlines()), block
