"""The paper as tests: exact classifiers stand where the network goes, so every answer is known.

Run with `pytest`: about a minute on two CPU cores, no network access. Read the two theorems first.
"""

import argparse
import gzip
import hashlib
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
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
        assert_close(model.log_prob(x, t), truth.logits(x)[:, t])
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


def test_stratified_levels_hit_every_level_equally_often():
    for _ in range(50):
        counts = torch.bincount(cdm.stratified_levels(64, 0, 31), minlength=32)
        assert counts.sum() == 64 and counts.min() >= 1 and counts.max() <= 3
    many = torch.cat([cdm.stratified_levels(7, 1, 4) for _ in range(4000)])
    assert_close(torch.bincount(many)[1:] / len(many), torch.full((4,), 0.25), atol=0.01, rtol=0)


# ----------------------------------------------------------------------------------- the classifier


def small_model(T=10, width=32):
    return CDM(toy_2d.MLP(2, T + 2, width, 2, frequencies=0), log_snr_schedule(T, 8, -8))


def test_the_loss_is_its_parts_and_minimal_for_the_exact_classifier():
    truth, model = mixture(log_snr_schedule(20, 8, -8))
    xt, eps, levels, t = drawn = model.draw(truth.sample(20000))
    weights, error = torch.rand(22).double(), (model.predict_noise(xt, t) - eps).square().mean(1)
    exact = model.loss_at(*drawn, w_ce=0.5, w_mse=weights)               # a weight for each level
    assert_close(exact.ce, nn.functional.cross_entropy(truth.logits(xt), t))
    assert_close(exact.mse, error.mean())
    assert_close(exact.total, 0.5 * exact.ce + (weights[t] * error).mean())
    assert_close(model.loss_at(*drawn, w_mse=2.0).total, exact.ce + 2 * exact.mse)
    ddm = DDM(lambda x, t: model.predict_noise(x, t), truth.schedule)
    assert_close(ddm.loss_at(xt, eps, t, w_mse=weights).total, (weights[t] * error).mean())
    tilted = CDM(lambda x: truth.logits(x) * 1.5, truth.schedule).loss_at(*drawn)
    assert tilted.ce > exact.ce + 0.02 and tilted.mse > exact.mse + 0.005


@pytest.mark.parametrize("K", [2, 5])
def test_a_network_asked_for_levels_learns_the_same_from_windows_of_them(K):
    """Average over the levels that a sample x may have come from, p(t | x), and over the K windows
    that hold t, each with chance 1/K: for the exact classifier no constant wants to move."""
    truth, plain = mixture(log_snr_schedule(20, 8, -8))
    shift = torch.zeros(22).double().requires_grad_()

    def net(x, levels):                             # asked for levels; it could shift their logits
        logits = truth.logits(x) + shift
        return logits.gather(1, levels) - logits[:, -1:]

    net.takes_levels = True
    model = CDM(net, truth.schedule)
    x, t = truth.sample(22), torch.arange(22)
    assert_close(model.log_prob(x, t), plain.log_prob(x, t))
    assert_close(model.predict_noise(x, t), plain.predict_noise(x, t))
    drawn = plain.draw(x)
    assert_close(model.loss_at(*drawn), plain.loss_at(*drawn))

    total, x = 0, 0.5 * x[:1]
    for t, p in enumerate(truth.logits(x).softmax(1)[0].tolist()):
        for k in range(K):
            levels = t - k + torch.arange(K)[None]
            loss = model.loss_at(x, x, levels, torch.tensor([k]), w_ce=1.0, w_mse=0.0)
            total = total + p / K * loss.total
    total.backward()
    assert_close(shift.grad, torch.zeros(22).double(), atol=1e-12, rtol=0)

    x0, n = truth.sample(8800), 8800                   # and what `draw` gives are such windows
    xt, eps, levels, which = model.draw(x0, K)
    t = levels.gather(1, which[:, None])[:, 0]
    assert_close(xt, model.add_noise(x0, t, eps))
    assert_close(torch.bincount(t), torch.full((22,), n // 22), rtol=0, atol=1)
    assert_close(torch.bincount(which) / n, torch.full((K,), 1 / K), atol=0.02, rtol=0)
    assert levels.shape == (n, K) and (levels.diff() == 1).all() and levels.min() == 1 - K


@pytest.mark.parametrize("family, backend", [
    ("MLP", "inductor"), ("cdm", "aot_eager"), ("ddm", "aot_eager")])
def test_the_compiled_loss_equals_the_eager_one_and_so_do_its_gradients(family, backend):
    model, shape, window = small_model(), (2,), ()
    if family != "MLP":
        model, shape = given(digit_model(family)[0], torch.arange(32) % 10), (1, 8, 8)
        window = (2,) if family == "cdm" else ()
    compiled = torch.compile(model.loss_at, backend=backend, fullgraph=True, dynamic=False)
    drawn = model.draw(torch.randn(32, *shape), *window)        # all that is random is in here
    losses, grads = [], []
    for loss_at in (model.loss_at, compiled):
        model.zero_grad()
        losses.append(loss_at(*drawn))
        losses[-1].total.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert_close(losses[1], losses[0], equal_nan=True)                  # a DDM has no CE
    assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


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
@pytest.mark.parametrize("steps", [1, 7, 60])
@pytest.mark.parametrize("schedule", [log_snr_schedule(60, 8, -8), ot_schedule(60)])
def test_samples_have_the_right_mean_and_covariance(method, steps, schedule):
    """With Gaussian data every step is affine, so mean and covariance follow by matrices alone."""
    (alpha, sigma), (truth, model) = schedule, one_gaussian(schedule)
    eye, calls, precisions = torch.eye(2).double(), [], truth.noised.precision_matrix
    predict = model.predict_noise
    model.predict_noise = lambda x, t: calls.append(t) or predict(x, t)
    x = sample(model, torch.randn(4000, 2).double(), steps, method)
    assert calls == [60 - i * 60 // steps for i in range(steps)]           # exactly `steps` calls
    mean, cov = torch.zeros(2).double(), eye
    for t, s in zip(calls, calls[1:] + [0]):
        # E[x_0|x_t] = m + gain (x_t - alpha_t m)
        gain = alpha[t] * truth.covs[0] @ precisions[t, 0]
        carry = alpha[t] / alpha[s]
        fresh = sigma[t] ** 2 - carry ** 2 * sigma[s] ** 2
        if method == "ddpm":                                # posterior mean and variance, Ho et al.
            a, b = carry * sigma[s] ** 2 / sigma[t] ** 2, alpha[s] * fresh / sigma[t] ** 2
            variance = fresh * sigma[s] ** 2 / sigma[t] ** 2
        else:
            a, b, variance = sigma[s] / sigma[t], alpha[s] - alpha[t] * sigma[s] / sigma[t], 0
        step = a * eye + b * gain
        mean = step @ mean + b * (truth.means[0] - alpha[t] * gain @ truth.means[0])
        cov = step @ cov @ step.T + variance * eye
    assert_close(x.mean(0), mean, atol=0.05, rtol=0)
    assert_close(torch.cov(x.T), cov, atol=0.05, rtol=0)
    if steps == 60 and method == "ddim":                      # and with small steps it is the truth
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
    bound = elbo(model, x0, draws=20)
    assert abs(bound.mean() - one_pass.mean()) < 0.06             # two standard errors of 2000 rows
    wrong = CDM(lambda x: 2 * truth.logits(x), model.schedule)  # a wrong denoiser loosens the bound
    assert elbo(wrong, x0, draws=5).mean() < bound.mean() - 0.1


def test_the_elbo_is_a_lower_bound_also_where_level_T_is_not_yet_noise():
    truth, model = one_gaussian(log_snr_schedule(80, 8, 0), (1.0, -1.0))       # alpha_T^2 = 1/2
    x0 = truth.sample(2000)
    x1 = model.add_noise(x0, 1, torch.randn_like(x0))
    gap = model.log_prob(x1, 1).mean() - elbo(model, x0, draws=20).mean()
    mean, cov = truth.noised.mean[80, 0], truth.noised.covariance_matrix[80, 0]
    kl = 0.5 * (mean @ mean + cov.trace() - 2 - cov.logdet())              # KL(p_T || N(0, I))
    assert_close(gap, kl, atol=0.08, rtol=0)


def test_each_row_of_the_elbo_meets_all_levels():
    _, model = one_gaussian(log_snr_schedule(40, 8, -8))
    x0 = torch.ones(4000, 2).double()
    bound = elbo(model, x0, draws=1)              # equal rows, in an order that must not matter
    spread = 4 * (bound.std() * (2 / 2000) ** 0.5).item()
    assert_close(bound[:2000].mean(), bound[2000:].mean(), atol=spread, rtol=0)
    one_by_one = elbo(model, x0[:400], draws=40)      # each level once: little noise
    assert one_by_one.std() < bound.std() / 3
    assert_close(one_by_one.mean(), bound.mean(), atol=spread, rtol=0)


def test_the_audits_expose_a_likelihood_better_than_the_truth_in_64_dimensions():
    """A short training on a Gaussian with the covariance of scikit-learn's digits, whose entropy is
    known. The MSE leads and is not at its optimum: one pass lands below the truth about as far as
    the ELBO above it, and log Z says so. Numbers in nats; `pytest -s -k 64` prints them."""
    pixels = torch.from_numpy(load_digits().data)
    cov, eye = (pixels / pixels.std()).T.cov(), torch.eye(64).double()
    root = torch.linalg.cholesky(cov + 1e-6 * eye).float()
    schedule = log_snr_schedule(64, 7, -8)
    alpha, sigma = (v[:, None] for v in schedule)
    variance = alpha ** 2 * cov.diag() + sigma.clamp(min=sigma[1].item()) ** 2             # (L, 64)
    mlp = toy_2d.MLP(64, 66, width=256, layers=3, frequencies=0)
    nn.init.zeros_(mlp.net[-1].weight), nn.init.zeros_(mlp.net[-1].bias)
    constant, precision = variance.log().sum(1).float(), (1 / variance).T.float()
    pixels = lambda x: -0.5 * (x.square() @ precision + constant)   # independent ones, exactly, and
    model = CDM(lambda x: pixels(x) + mlp(x), schedule)             # what an MLP adds
    method = toy_2d.Method(mlp, lambda x0: model.loss(x0, w_ce=0.001).total, None, 1)
    toy_2d.train(method, lambda: torch.randn(256, 64) @ root.T, steps=400, lr=3e-3)
    x0 = torch.randn(2000, 64) @ root.T
    x1 = model.add_noise(x0, 1, torch.randn_like(x0))
    truth = 0.5 * torch.logdet(2 * math.pi * math.e * (alpha[1] ** 2 * cov + sigma[1] ** 2 * eye))
    one_pass, bound = -model.log_prob(x1, 1).mean(), -elbo(model, x0, draws=8).mean()
    ode = -ode_log_prob(model, x1[:200], probes=4).mean()
    log_z, off, below, above = annealed_log_z(model, x1[:500])
    print(f"\n64-d Gaussian, -E log p_1: truth {truth:.2f}, one pass {one_pass:.2f}, ELBO "
          f"{bound:.2f}, ODE {ode:.2f}, log Z {log_z:.2f} +- {off:.2f}")
    assert one_pass < truth - 1                              # too good to be true: not normalised
    assert truth < bound < truth + 4 and truth - 0.3 < ode < truth + 4
    assert below < log_z < above and log_z > 1 and one_pass + log_z > truth - 0.5


@pytest.mark.parametrize("schedule", [log_snr_schedule(100, 6, -6), ot_schedule(120)])
def test_annealing_finds_a_missing_normaliser_from_both_sides(schedule):
    truth, exact = mixture(schedule)             # the straight path is not variance preserving
    wrong = torch.zeros(len(schedule.alpha)).double()
    wrong[1], wrong[40:60] = 0.8, -0.5                     # p_1 integrates to e^0.8, others cancel
    model = CDM(lambda x: truth.logits(x) + wrong, schedule)
    x1 = model.add_noise(truth.sample(1000), 1, torch.randn(1000, 2).double())
    log_z, off, below, above = annealed_log_z(model, x1)
    assert below < 0.8 < above and off < 0.06
    assert abs(log_z - 0.8) < 3 * off
    log_z, off, below, above = annealed_log_z(model, x1[:3])                # too few to overlap
    assert_close((log_z - off, log_z + off), tuple(sorted((below, above))), atol=1e-5, rtol=0)


def lattice(schedule, counts):
    """The exact model of one 8-bit pixel, given counts per grey value, and images of it."""
    grey, p = torch.tensor(list(counts)), torch.tensor(list(counts.values())).double()
    def logits(x):
        sigma = schedule.sigma.clamp(min=1e-4)                      # level 0 gets a tiny width
        z = (x[..., None] - schedule.alpha * ((2 * grey[:, None] + 1) / 256 - 1)) / sigma
        logs = (p / p.sum()).log()[:, None] - z ** 2 / 2 - sigma.log() - math.log(2 * math.pi) / 2
        return logs.logsumexp(1)
    images = grey[torch.multinomial(p, 4000, replacement=True)].to(torch.uint8)[:, None]
    return CDM(logits, schedule).double(), images


def test_the_8_bit_bound_of_a_known_distribution_is_its_entropy():
    counts = {0: 2, 10: 1, 11: 1}                                        # entropy 1.5 bits
    model, images = lattice(log_snr_schedule(100, 13, -8), counts)
    bits = bits_per_dim(model, images).mean()
    assert 1.48 < bits < 1.56                       # 0.03 of it: neighbours 10 and 11 blur a little
    assert abs(bits_per_dim(model, images[:500], ode_log_prob).mean() - bits) < 0.1
    assert abs(bits_per_dim(model, images, elbo, draws=20).mean() - bits) < 0.05
    sharp = lattice(log_snr_schedule(100, 16, -8), counts)[0]
    assert abs(bits_per_dim(sharp, images).mean() - 1.5) < 0.02
    # at log-SNR 8 (sigma_1 = 2.3 grey steps) 10 and 11 blur: still a bound, no longer tight
    assert bits_per_dim(lattice(log_snr_schedule(100, 8, -8), counts)[0], images).mean() > 1.6


# ---------------------------------------------------------------------- as a user meets the module


def test_it_runs_in_float32_and_float64_on_points_and_images_and_is_saved():
    for dtype in (torch.float32, torch.float64):
        make = lambda: CDM(nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.SiLU(),
                                         nn.Linear(32, 12)), ddpm_schedule(10)).to(dtype)
        model, twin = make(), make()
        x = sample(model, torch.randn(3, 1, 4, 4, dtype=dtype), 5, "dpm")
        assert x.shape == (3, 1, 4, 4) and x.dtype == dtype
        for result in (model.log_prob(x), elbo(model, x), ode_log_prob(model, x, probes=2)):
            assert result.dtype == dtype and result.shape == (3,)
        assert not x.requires_grad and not elbo(model, x).requires_grad       # no graph is kept
        model.loss(x).total.backward()
        assert not torch.equal(twin.log_prob(x), model.log_prob(x))
        twin.load_state_dict(model.state_dict())
        assert_close(twin.log_prob(x), model.log_prob(x))


def test_guidance_0_is_the_labelled_model_and_minus_1_the_one_without_labels():
    truth, _ = mixture()

    def net(x, y=None):                                   # its two components as two classes
        if y is None:
            return truth.logits(x)
        parts = truth.parts(x) - truth.weights.log()                                   # (B, L, 2)
        return parts[torch.arange(len(x)), :, y]

    model, x = CDM(net, truth.schedule), truth.sample(8)
    y, ones, t = torch.tensor([0, 1] * 4), torch.ones(8).long(), torch.arange(1, 48, 6)
    free, told = model.predict_noise(x, t), given(model, y).predict_noise(x, t)
    assert not torch.allclose(free, told)
    assert_close(given(model, y, -1.0).predict_noise(x, t), free)
    assert_close(given(model, y, 2.0).predict_noise(x, t), told + 2 * (told - free))
    ddm = DDM(lambda x, t, y=None: (model if y is None else given(model, y)).predict_noise(x, t),
              truth.schedule)
    for w in (-1.0, 0.0, 2.0):
        assert_close(given(ddm, y, w).predict_noise(x, t), given(model, y, w).predict_noise(x, t))
    alone = CDM(lambda x: net(x, ones), truth.schedule)
    assert_close(sample(given(model, ones), x, 10), sample(alone, x, 10))
    drawn = model.draw(x)
    assert_close(given(model, ones).loss_at(*drawn), alone.loss_at(*drawn))


def test_a_ddm_of_the_same_denoiser_is_the_same_diffusion_model():
    truth, exact = one_gaussian(SCHEDULES["log-SNR"])
    shown = []
    told = DDM(lambda xt, t: shown.append(t) or exact.predict_noise(xt, t), truth.schedule)
    start, x0 = torch.randn(6, 2).double(), truth.sample(5000)
    assert_close(sample(told, start, 10), sample(exact, start, 10))
    assert_close(ode_log_prob(told, start), ode_log_prob(exact, start))
    shown.clear()
    loss, ends = told.loss(x0), 1 / 50         # the CDM also meets t = 0, where eps_hat = 0 costs 1
    assert_close(loss.total, exact.loss(x0).mse * 52 / 50 - ends, atol=0.02, rtol=0)
    assert shown[0].min() == 1 and shown[0].max() == 50


BAD = {
    "T too small": lambda m, x: CDM(m.net, ddpm_schedule(1)),
    "log-SNR rises": lambda m, x: CDM(m.net, log_snr_schedule(10, -8, 8)),
    "schedule ends": lambda m, x: CDM(None, Schedule(torch.linspace(1, 0.1, 9), torch.rand(9))),
    "schedule shape": lambda m, x: CDM(None, Schedule(torch.ones(5), torch.ones(4))),
    "level above": lambda m, x: m.predict_noise(x, 12),
    "level below": lambda m, x: m.log_prob(x, -1),
    "level float": lambda m, x: m.add_noise(x, 3.0, x),
    "level tensor shape": lambda m, x: m.log_prob(x, torch.zeros(3, dtype=torch.long)),
    "level tensor dtype": lambda m, x: m.log_prob(x, torch.zeros(4)),
    "level tensor range": lambda m, x: m.log_prob(x, torch.full((4,), 12)),
    "pure noise denoised": lambda m, x: m.denoise(x, 11),
    "label count": lambda m, x: given(m, torch.zeros(3).long()).log_prob(x),
    "label as int": lambda m, x: given(m, 7).log_prob(x),
    "logit width": lambda m, x: CDM(m.net, ddpm_schedule(20)).log_prob(x),
    "method": lambda m, x: sample(m, x, method="euler"),
    "no steps": lambda m, x: sample(m, x, steps=0),
    "steps above T": lambda m, x: sample(m, x, steps=11),
    "ODE level": lambda m, x: ode_log_prob(m, x, 0),
    "ELBO of nothing": lambda m, x: elbo(m, x[:0]),
    "float images": lambda m, x: bits_per_dim(m, x),
    "another likelihood": lambda m, x: bits_per_dim(m, x.byte(), lambda m, x: elbo(m, x)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_value_error_that_says_what_was_expected(name):
    with pytest.raises(ValueError, match="must"):
        BAD[name](small_model(), torch.randn(4, 2))


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


def test_metropolis_steps_bring_back_what_has_gone_astray_and_keep_the_rest():
    oracle = toy_2d.Oracle(torch.tensor([(0.8, -0.4)]), std=0.4)
    x = torch.cat([oracle.sample(4000), torch.full((200, 2), 2.0).double()])
    moved = toy_2d.metropolis(oracle.log_prob, x, steps=60, std=0.4)
    for part in (moved[:4000], moved[4000:]):
        assert_close(part.mean(0), oracle.centres[0], atol=0.1, rtol=0)
        assert_close(part.std(0), torch.full((2,), 0.4).double(), atol=0.06, rtol=0)


@pytest.mark.parametrize("name", toy_2d.METHODS)
def test_every_method_recovers_a_known_log_ratio_in_the_passes_that_it_states(name):
    schedule, calls = log_snr_schedule(20, 8, -6), []
    oracle = toy_2d.Oracle(torch.tensor([(0.8, -0.4)]), std=0.4, schedule=schedule)
    make = lambda outputs, timed=False: toy_2d.MLP(2 + timed, outputs, 64, 2, frequencies=0)
    method = toy_2d.METHODS[name](make, schedule)
    toy_2d.train(method, lambda: oracle.sample(512).float(), steps=300, lr=1e-2)
    for layer in (m for m in method.net.modules() if isinstance(m, toy_2d.MLP)):
        layer.register_forward_hook(lambda *_: calls.append(1))
    x = oracle.sample(500)
    error = (method.log_prob(x.float()) - oracle.log_prob(x)).detach()
    backward = 2 if name == "DDM-ODE" else 0    # for each forward pass; the trace: one a dimension
    assert method.passes == len(calls) * (1 + backward)
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
    off = toy_2d.Method(exact, lambda x0: exact.weight ** 2, lambda x: exact.log_prob(x) + 3, 1)
    monkeypatch.setitem(toy_2d.CHASM, "off", lambda make, schedule: off)
    row, (truth, learned) = toy_2d.chasm_run(6, "off", 1, 0)
    assert_close([row[k] for k in ("rms", "estimated", "true")], [3.0, 4.5, 1.5], atol=0.1, rtol=0)
    assert truth[0] == 0 and abs(truth[-1] + 1.5) < 0.1 and len(truth) == 42
    assert_close(learned, truth)


def test_a_table_shows_mean_and_spread_and_refuses_what_is_not_a_number(capsys, tmp_path):
    rows = [dict(method=m, v=v) for m, v in (("p", 1.0), ("p", 3.0), ("q", 5.0))]
    toy_2d.table(tmp_path / "t.csv", rows, [("speed, m/s", "v", 1, rows)])
    lines = re.sub(" +", " ", capsys.readouterr().out).splitlines()
    assert lines[0] == "| | p | q |" and lines[2] == "| speed, m/s | 2.0 ± 1.4 | 5.0 |"
    assert (tmp_path / "t.csv").read_text().split() == ["method,v", "p,1.0", "p,3.0", "q,5.0"]
    rows[0]["v"] = math.nan
    with pytest.raises(SystemExit, match="speed, m/s, p: .*nan.* is not finite"):
        toy_2d.table(tmp_path / "t.csv", rows, [("speed, m/s", "v", 1, rows)])


@pytest.mark.parametrize("flags, trainings, words, files", [
    ("--datasets two_modes --methods NCE CDM DDM-ODE --seeds 2", 6,
     "two_modes: KL, nats|two_modes: log Z, nats|(0.9)|±|234", ["toy_2d.csv", "toy_2d.png"]),
    ("--chasm --seeds 1", 10, "d = 4: mean log-ratio (1), nats|rms|time-score",
     ["chasm.csv", "hero.png", "posterior.png"])])
def test_every_command_prints_a_table_and_draws(flags, trainings, words, files, tmp_path, capsys,
                                                monkeypatch):
    monkeypatch.setattr(toy_2d, "CELLS", 40)
    monkeypatch.setattr(toy_2d, "DIMENSIONS", (2, 4))
    monkeypatch.setattr(sys, "argv", f"toy_2d {flags} --steps 2 --out {tmp_path}/new".split())
    toy_2d.main()
    out = capsys.readouterr().out
    assert all(word in out for word in words.split("|")), out
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == files
    assert len((tmp_path / "new" / files[0]).read_text().splitlines()) == 1 + trainings


# --------------------------------------------------------------------------------------- mnist.py


def digit_model(family="cdm", T=12):
    torch.manual_seed(0)
    images = (torch.rand(50, 1, 8, 8) * 300 - 40).clamp(0, 255).to(torch.uint8)
    return mnist.build(dict(model=family, T=T, width=16), images), images


def scattered(model):
    """The model in float64, with its weights away from the zeros of the start."""
    for p in model.double().parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model


def test_the_digit_classifier_starts_as_the_exact_one_of_independent_pixels_on_a_lattice():
    model, images = digit_model(T=64)
    x, alpha, sigma = 0.5 * torch.randn(3, 1, 8, 8), model.schedule.alpha, model.net.sigma
    counts = torch.stack([images == k for k in mnist.Shades.EXACT]).double().sum(1)
    share = torch.cat([counts, (50 - counts.sum(0, keepdim=True)).expand(3, -1, -1, -1) / 3]) + 1
    grey = (2 * torch.arange(-1000, 1256).double() + 1) / 256 - 1             # also beyond 0 .. 255
    for t in (0, 1, 5, 8, 9, 10, 30, 64):          # at level 0 a little noise stands in for none
        seen = Normal(alpha[t] * grey, sigma[t])
        seen = seen.log_prob(x[..., None].double()).exp()                      # (3, 1, 8, 8, 2256)
        p = sum(share[i] * seen[..., 1000 + k] for i, k in enumerate(mnist.Shades.EXACT))
        for i, mean in enumerate((-0.6, 0.0, 0.6)):
            prior = Normal(mean, math.sqrt(math.exp(-1.5) + mnist.STEP ** 2))
            p = p + share[5 + i] * (seen * prior.log_prob(grey).exp() * mnist.STEP).sum(-1)
        log_p = (p / share.sum(0)).log().flatten(1).sum(1)
        assert_close(model.log_prob(x, t).double(), log_p, atol=0.05, rtol=1e-3)


def test_the_comb_is_the_lattice_of_greys_seen_through_noise():
    x, alpha = torch.linspace(-0.9, 0.9, 500).view(1, 1, -1), torch.tensor(0.95).view(1, 1, 1)
    grey = (torch.arange(-300, 300) + 0.5) * mnist.STEP
    for sigma in torch.tensor([0.003, 0.0047, 0.4]).view(3, 1, 1, 1):
        seen = Normal(alpha * grey, sigma).log_prob(x[..., None]).exp().sum(3) * alpha * mnist.STEP
        assert_close(mnist.log_comb(x, alpha, sigma).exp(), seen, atol=0.005, rtol=1e-3)


def test_the_digit_denoiser_starts_as_the_digit_classifier_and_costs_as_much():
    (model, images), (told, _) = digit_model(), digit_model("ddm")
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1, 4, 8, 12])
    assert_close(told.predict_noise(x, t), model.predict_noise(x, t), atol=1e-3, rtol=1e-3)
    told.loss(x).total.backward()
    assert all(p.grad is not None for p in told.parameters())
    wide = mnist.DigitDenoiser(images, log_snr_schedule(4), 32).last.out_channels
    assert 1.8 < (wide / 32) ** 2 < 2.2        # FLOPs, and a backward pass to x costs a forward one


def test_the_digit_classifier_keeps_rows_apart_and_serves_any_levels_in_any_number():
    model = scattered(digit_model()[0])
    x, t = 0.5 * torch.randn(5, 1, 8, 8).double(), torch.tensor([0, 1, 5, 12, 13])
    every = model.log_ratio(x, torch.arange(14).expand(5, 14))
    one_by_one = torch.stack([model.log_ratio(x[i:i + 1], t[i:i + 1, None])[0] for i in range(5)])
    assert_close(one_by_one, every.gather(1, t[:, None]))
    assert_close(every[:, 13], torch.zeros(5).double(), atol=1e-9, rtol=0)     # p_{T+1} = N(0, I)
    finer = digit_model(T=23)[0].double()                     # every other level is one of the 12
    finer.load_state_dict(model.state_dict())
    assert_close(finer.log_prob(x, 11), model.log_prob(x, 6), atol=1e-4, rtol=1e-4)
    y = torch.tensor([3, 1, 10, 5, 0])
    given(model, y).loss(x, 2, w_ce=0.0).total.backward()
    for name, p in model.named_parameters():                   # constants are learned by CE alone
        assert (p.grad.abs().max() > 0) == (name != "net.constant.weight"), name
    given(model, y).loss(x, 2).total.backward()
    assert model.net.constant.weight.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["cdm", "ddm"])
def test_no_label_is_the_label_any_and_there_are_no_others(family):
    x, t, y = torch.randn(2, 1, 8, 8).double(), torch.tensor([3, 9]), torch.tensor([3, 5])
    model = scattered(digit_model(family)[0]).eval()
    free = model.predict_noise(x, t)
    assert_close(given(model, torch.full((2,), mnist.CLASSES)).predict_noise(x, t), free)
    assert not torch.allclose(given(model, y).predict_noise(x, t), free)
    with pytest.raises(ValueError, match="labels must be in 0 .. 9"):
        given(model, y + 7).predict_noise(x, t)


def test_the_best_linear_denoiser_is_exact_for_a_gaussian():
    images = torch.randint(0, 256, (4000, 1, 2, 2), dtype=torch.uint8)
    images[:, :, 1] = images[:, :, :1, 0] // 2                     # three pixels that are related
    schedule, x0 = log_snr_schedule(9, 6, -8), mnist.to_x0(images).flatten(1).double()
    cov, found = x0.T.cov(), mnist.wiener_error(images, schedule)
    for t in (1, 5, 9):                          # eps_hat = sigma N^-1 (xt - alpha m), N = cov(xt)
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        noised = cov * alpha ** 2 + sigma ** 2 * torch.eye(4).double()
        assert_close(found[t], 1 - sigma ** 2 * torch.linalg.inv(noised).trace() / 4)
    assert found[0] == found[1] and found[10] == found[9]


def training(out, device="cpu", model="cdm", steps=100):
    """mnist.train on 64 images of noise."""
    args = argparse.Namespace(device=torch.device(device), steps=steps, out=out, resume=False,
                              batch=16, lr=0.01, seed=0, model=model)
    images, y = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8), torch.arange(64) % 10
    return mnist.train(args, dict(model=model, dataset="digits", T=12, width=8), images, y)


def test_training_warms_up_clips_averages_and_drops_labels(monkeypatch, tmp_path):
    rates, norms, weights, told, labels = [], [], [], [], []

    def note(optimiser, *_):                                                      # before a step
        group = optimiser.param_groups[0]
        rates.append(group["lr"])
        norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
        weights.append([p.detach().clone() for p in group["params"]])
        labels.append(told[-1].clone())

    monkeypatch.setattr(mnist, "W_CE", 100.0)                                 # a large gradient
    monkeypatch.setattr(mnist, "given", lambda model, y: told.append(y) or given(model, y))
    with register_optimizer_step_pre_hook(note):
        ema = training(tmp_path)
    assert_close(rates[:4], [0.01 * step / 4 for step in (1, 2, 3)] + [0.01 * 0.5 * (
        1 + math.cos(math.pi * 0.04))], rtol=1e-6, atol=0)
    assert rates[-1] < 1e-9 and abs(max(norms) - 2.0) < 1e-3
    average, weights = weights[0], weights + weights[-1:]          # the last step moves nothing
    for step, now in enumerate(weights[1:], 1):
        average = [a + 9 / (9 + step) * (w - a) for a, w in zip(average, now)]
    assert_close(list(ema.parameters()), average, rtol=1e-4, atol=1e-5)
    assert 0.45 < (torch.cat(labels) == mnist.CLASSES).float().mean() < 0.55


@pytest.mark.parametrize("family", ["cdm", "ddm"])
def test_training_and_sampling_stay_on_the_device_and_never_wait(family, monkeypatch, tmp_path):
    """On PyTorch's meta device tensors have no values: to mix them with the CPU's, or to ask for a
    number (on a GPU the program would wait for it), is an error. Reports and checkpoints may."""
    for name in ("report", "save"):
        monkeypatch.setattr(mnist, name, lambda *args, **content: None)
    monkeypatch.setattr(mnist.Checkpoint, "save", lambda *args: None)
    model = training(tmp_path, "meta", family, steps=3)
    for method in ("ddpm", "ddim", "dpm"):
        x = sample(model, torch.randn(3, 1, 8, 8, device="meta"), 12, method)
        assert x.is_meta and x.shape == (3, 1, 8, 8)


def run_digits(monkeypatch, out, *flags):
    command = f"""mnist.py --dataset digits --quick --device cpu --samples 20 --images 100 --T 12
                  --fine 12 --out {out}"""
    if not {"--weights", "--batch"} & set(flags):
        command += " --batch 16 --width 8"
    monkeypatch.setattr(sys, "argv", command.split() + list(flags))
    mnist.main()


def test_a_ddm_and_a_cdm_train_and_stand_beside_each_other(monkeypatch, tmp_path, capsys):
    run_digits(monkeypatch, tmp_path / "ddm", "--steps", "3", "--model", "ddm")
    assert "one forward pass" not in capsys.readouterr().out             # a DDM has no such thing
    monkeypatch.setattr(mnist.Timer, "blocked_autorange", lambda timer, **_: timer.timeit(1))
    run_digits(monkeypatch, tmp_path / "cdm", "--steps", "250", "--batch", "64", "--width", "16",
               "--split", "validation", "--beside", str(tmp_path / "ddm/weights.pt"), "--benchmark")
    said = capsys.readouterr().out
    for what in (r"\| CDM, ddim", r"\| DDM, ddpm", r"CDM / DDM: mean \d", r"ertified",
                 r"\| training step of 64 \|.*\| DDM \|"):
        assert re.search(what, said), what
    one, log_z, both, right = (float(re.search(pattern, said)[1]) for pattern in (
        r"\| one forward pass +\| +\d+ \| +([\d.-]+)", r"levels +\| +\d+ \| +([\d.-]+)",
        r"One pass \+ log Z: ([\d.-]+)", r"ten passes: ([\d.]+) %"))
    assert abs(one + log_z - both) < 0.002 and right > 30                         # by chance: 10 %
    for name in ("samples.png", "levels.png", "errors.png"):
        assert (tmp_path / "cdm" / name).stat().st_size > 2000


def test_a_resumed_run_equals_an_uninterrupted_one_and_weights_measure_the_same(
        monkeypatch, tmp_path, capsys):
    save, words = mnist.save, lambda: re.search(r"log Z from below.*", capsys.readouterr().out)[0]

    def keep(path, **content):                        # what an interrupted run would have left
        save(path, **content)
        if content.get("step") == 3:
            save(tmp_path / "b.pt", **content)
    monkeypatch.setattr(mnist, "save", keep)
    run_digits(monkeypatch, tmp_path / "a", "--steps", "6")
    numbers = words()
    (tmp_path / "b").mkdir()
    (tmp_path / "b.pt").rename(tmp_path / "b" / "model.pt")
    run_digits(monkeypatch, tmp_path / "b", "--steps", "6", "--resume")
    a, b = (mnist.load(tmp_path / name / "model.pt") for name in "ab")
    assert a["step"] == b["step"] == 6
    for part in ("model", "ema"):
        assert_close(a[part], b[part], rtol=0, atol=0)
    assert not torch.equal(a["ema"]["net.last.weight"], a["model"]["net.last.weight"])
    capsys.readouterr()
    run_digits(monkeypatch, tmp_path / "c", "--weights", str(tmp_path / "a" / "model.pt"))
    assert words() == numbers


def test_what_cannot_go_on_says_why_and_keeps_what_is_saved(monkeypatch, tmp_path):
    def refused(why, *flags, out=tmp_path):
        with pytest.raises(SystemExit, match=why):
            run_digits(monkeypatch, out, *flags)

    refused("diverged.*lower --lr", "--steps", "8", "--lr", "1e30")
    path = tmp_path / "model.pt"
    kept = mnist.load(path)
    assert all(v.isfinite().all() for v in kept["ema"].values())
    refused("is of", "--steps", "9", "--resume")                        # of another configuration
    mnist.save(path, **kept | dict(step=100))
    refused("longer run", "--steps", "9")
    refused("Can --out .* be written to", out=path)
    monkeypatch.setattr(mnist, "report", lambda *args: os.utime(path, ns=(1, 1)))
    refused("another process", "--steps", "200")
    monkeypatch.undo()
    def stop(*args):
        raise KeyboardInterrupt                                         # as Ctrl-C does
    monkeypatch.setattr(mnist, "report", stop)
    refused("--resume goes on", "--steps", "200")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bit.pt").write_bytes(data)
    (tmp_path / "cut.pt").write_bytes(data[:3000])
    for name, config in dict(kind=dict(model="gan"), wide=dict(width=16)).items():
        mnist.save(tmp_path / f"{name}.pt", config=kept["config"] | config, ema=kept["ema"])
    for name, why in dict(absent="no usable", bit="no usable.*damaged", cut="no usable",
                          kind="no network", wide="no network").items():
        refused(why, "--weights", str(tmp_path / f"{name}.pt"))


BAD_FLAGS = [
    (toy_2d, "--datasets moons", "invalid choice: 'moons'"), (toy_2d, "--steps 0", "1 or more"),
    (toy_2d, "--chasm --methods CDM", "not with --chasm"),
    (toy_2d, f"--out {__file__}", "written to: File exists"),
    (mnist, "--steps two", "whole number"), (mnist, "--steps 0", "at least 1"),
    (mnist, "--width 12", "multiple of 8"),
    (mnist, "--weights x.pt --steps 3", "does not train"), (mnist, "--benchmark", "--beside"),
    pytest.param(mnist, "--device cuda", "sees none", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU"))]


@pytest.mark.parametrize("script, flags, message", BAD_FLAGS)
def test_flags_that_mean_nothing_end_in_one_sentence(script, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *flags.split()])
    monkeypatch.setattr(toy_2d, "in_parallel", None)                       # train nothing
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert message in f"{stop.value}{capsys.readouterr().err}"


def test_the_frechet_distance_of_two_gaussians_is_its_closed_form():
    a, b = torch.randn(50000, 3).double(), 2 * torch.randn(50000, 3).double() + 1
    assert_close(mnist.frechet(a, b), 3 * 1.0 + 3 * (1 - 2) ** 2, atol=0.1, rtol=0)
    assert abs(mnist.frechet(a, a)) < 1e-9


def test_the_verdict_follows_log_z_and_its_error_and_nothing_that_is_not_a_number():
    assert mnist.verdict(0.009, 0.002).startswith("Certified: ")
    assert mnist.verdict(0.02, 0.002).endswith("0.020 bits/dim too low.")
    assert mnist.verdict(-0.02, 0.002).endswith("0.020 bits/dim too high.")
    assert mnist.verdict(0.0, 0.004).startswith("Not certified")
    with pytest.raises(SystemExit, match="1 of 3 results are not finite"):
        mnist.batches(lambda k: 1 / k, torch.tensor([1.0, 0.0, 2.0]))


def test_the_committed_weights_know_digits():
    black = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    model = mnist.load_model(HERE / "assets/mnist_cdm.pt", black)
    assert bits_per_dim(model, black).item() < 0.3 < bits_per_dim(model, 255 - black).item()
    data = Path(os.environ.get("MNIST", HERE / "data/mnist"))
    if not data.exists():
        pytest.skip("no MNIST files in data/mnist")
    digits = mnist.load_data("mnist", data)[2][0][:100]
    bits, inverted = bits_per_dim(model, digits), bits_per_dim(model, 255 - digits)
    assert 0.9 < bits.mean() < 1.15 and bits.max() < inverted.min()


def test_a_download_is_kept_if_it_is_whole_and_read_from_disk_ever_after(monkeypatch, tmp_path):
    idx = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4)) + bytes(range(24))
    packed, data = gzip.compress(idx), tmp_path / "data"
    (tmp_path / "f.gz").write_bytes(packed)
    monkeypatch.setattr(mnist, "URL", f"{tmp_path.as_uri()}/")
    with pytest.raises(RuntimeError, match="hash"):
        mnist.read_or_download(data, "f.gz", "0000")
    assert not list(data.iterdir())
    for _ in range(2):
        images = mnist.read_or_download(data, "f.gz", hashlib.sha256(packed).hexdigest()[:16])
        assert images.shape == (2, 3, 4) and images.sum() == 276
        (tmp_path / "f.gz").unlink(missing_ok=True)
    with pytest.raises(SystemExit, match="(?s)cannot be read.*t10k-l.*--dataset digits"):
        mnist.load_data("mnist", tmp_path / "none")


# ----------------------------------------------------------------------------------------- README

README = (HERE / "README.md").read_text()


def test_the_readme_names_files_and_flags_that_there_are():
    names = re.findall(r"\]\(([^)#]+)\)|([\w./-]+\.(?:py|png|pt|txt))\b", README)
    names = {a or b for a, b in names}
    for name in (n for n in names if not n.startswith(("runs/", "http"))):
        assert (HERE / name).exists(), name
    for script in ("toy_2d", "mnist"):
        known = set(re.findall(r'add\("(--\w+)"', (HERE / f"{script}.py").read_text()))
        commands = re.findall(rf"python {script}\.py([^`#|\n]*)", README)
        used = {flag for command in commands for flag in re.findall(r"--[a-zA-Z][\w-]*", command)}
        assert len(used) >= 2 and used <= known, used - known


def test_the_code_in_the_readme_is_the_code_of_cdm_and_gives_what_is_written_there(capsys):
    code = lambda line: re.sub(r"\s{2,}#.*", "", line.strip())
    lines = {code(line) for line in (HERE / "cdm.py").read_text().splitlines()}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 4
    for block in blocks:
        if "import torch" in block:
            exec(block, {})
            said, told = capsys.readouterr().out.splitlines(), re.findall(r"# (tensor.*)", block)
            assert len(said) == 2
            assert all(text.startswith(found) for text, found in zip(told, said))
        else:
            assert all(code(line) in lines for line in block.splitlines())
