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
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
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
README = (HERE / "README.md").read_text("utf-8")
SCHEDULES = ddpm_schedule, uniform_schedule, ot_schedule, log_snr_schedule


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)               # tiny tensors: a second thread costs more than it brings


class Exact(CDM):
    """The CDM of two Gaussians in the plane: N(alpha m_k, alpha^2 S_k + sigma^2 I) at level t."""

    def __init__(self, schedule=log_snr_schedule(50, 8, -8)):
        super().__init__(self.logits, schedule)
        self.weights = torch.tensor([0.3, 0.7]).double()
        self.means = torch.tensor([[-1.0, 0.5], [1.0, 0.0]]).double()
        self.covs = torch.tensor([[[0.2, 0.1], [0.1, 0.3]], [[0.05, 0], [0, 0.4]]]).double()
        alpha, sigma = (v[:, None, None, None] for v in schedule)
        self.noised = MultivariateNormal(alpha[..., 0] * self.means,                 # (T+2, K), 2
                                         alpha ** 2 * self.covs + sigma ** 2 * torch.eye(2))
        self.at_0 = self.weights.log() + self.noised.log_prob(torch.zeros(2).double())
        self.data = MixtureSameFamily(Categorical(self.weights),
                                      MultivariateNormal(self.means, self.covs))

    def parts(self, x):                          # log(w_k N_k(x)), (B, T+2, K): a quadratic form
        P, mean = self.noised.precision_matrix, self.noised.mean[..., None]
        pull = torch.einsum("bi,tki->btk", x, (P @ mean)[..., 0])
        return self.at_0 + pull - torch.einsum("bij,tkij->btk", x[:, :, None] * x[:, None], P) / 2

    def logits(self, x):
        return self.parts(x).logsumexp(2)

    def posterior_mean(self, x, t):
        """E[x_0 | x_t = x]: each component's linear regression, weighted by its responsibility."""
        gain = self.schedule.alpha[t] * self.covs @ self.noised.precision_matrix[t]      # (K, d, d)
        each = self.means + torch.einsum("kij,bkj->bki", gain, x[:, None] - self.noised.mean[t])
        return (self.parts(x)[:, t].softmax(1)[..., None] * each).sum(1)


@pytest.mark.parametrize("make", SCHEDULES)
def test_theorem_3_1_the_gradient_of_exact_logits_is_the_posterior_mean(make):
    exact, x = Exact(make(50)), 2 * torch.randn(64, 2).double()
    for t in range(51):
        assert_close(exact.denoise(x, t), exact.posterior_mean(x, t), rtol=1e-8, atol=1e-8)
    assert_close(exact.predict_noise(x, 51), x)                    # pure noise: eps is x itself


@pytest.mark.parametrize("make", SCHEDULES)
def test_theorem_3_2_the_logits_give_the_exact_log_density_at_every_level(make):
    exact, x = Exact(make(50)), 2 * torch.randn(52, 2).double()
    truth = MixtureSameFamily(Categorical(exact.weights.expand(52, 2)), exact.noised)
    for t in range(52):
        assert_close(exact.log_prob(x, t), truth.log_prob(x[:, None])[:, t])
    assert_close(exact.log_prob(x, torch.arange(52)), truth.log_prob(x[:, None]).diag())


@pytest.mark.parametrize("T", [2, 257, 1000])
def test_schedules_are_those_of_their_papers(T):
    ddpm, uniform, ot, log_snr = (make(T) for make in SCHEDULES)
    linear, one = torch.linspace(0, 1, T + 2).double(), torch.ones(T + 2).double()
    for alpha, sigma in (ddpm, uniform, log_snr):                            # variance preserving
        assert_close(alpha ** 2 + sigma ** 2, one)
    assert_close((uniform.sigma, ot.sigma, ot.alpha + ot.sigma), (linear, linear, one),
                 rtol=0, atol=1e-6)
    assert_close(2 * torch.log(log_snr.alpha / log_snr.sigma)[1:-1],
                 torch.linspace(14, -8, T).double(), rtol=0, atol=1e-5)
    assert 3.5e-5 < ddpm.alpha[T] ** 2 < 4.2e-5                      # of T = 1000, as its betas are
    assert_close((ddpm_schedule().alpha[[1, 2, 500]] ** 2).tolist(),
                 [0.9999, 0.99978009, 0.07858724], rtol=1e-6, atol=0)


@pytest.mark.parametrize("K", [2, 5, None])
def test_the_losses_are_cross_entropy_and_weighted_error_over_a_window_of_levels(K):
    model, w_mse, seen = Exact(log_snr_schedule(20, 8, -8)), torch.rand(22).double(), []
    model.window, x0 = K, model.data.sample([4400])
    for name in ("add_noise", "ratio_and_noise"):                         # note what they are given
        method = getattr(model, name)
        setattr(model, name, lambda *args, method=method: seen.append(args) or method(*args))
    ce, mse = model.losses(x0, w_mse)
    (_, t, eps), (xt, levels), *_ = seen
    assert_close((xt, levels[:, 0]), (model.add_noise(x0, t, eps), t))
    assert_close(levels.sort(1)[0], levels.amin(1)[:, None] + torch.arange(K or 22))
    assert_close(ce, -model.logits(xt).gather(1, levels).log_softmax(1)[:, 0].mean())
    assert_close(mse, (w_mse[t] * (model.predict_noise(xt, t) - eps).square().mean(1)).mean())


@pytest.mark.parametrize("K", [2, 5, None])
def test_the_exact_classifier_is_where_the_cross_entropy_of_windows_is_stationary(K, monkeypatch):
    """At one point x, average over all windows and places, with the chance p(t | x) of level t: no
    level's logit may want to move. Each row has shifts of its own, so gradients can be weighted."""
    exact, k = Exact(log_snr_schedule(20, 8, -8)), K or 22
    n = (23 - k) * k
    shift, x = torch.zeros(n, 22).double().requires_grad_(), torch.tensor([[0.3, -0.2]]).double()
    model, drawn = CDM(lambda x: exact.logits(x) + shift, exact.schedule), []
    model.window, row = K, torch.arange(n)[:, None]
    numbers = {23 - k: row // k, k: row % k}              # of windows, and of places in them
    monkeypatch.setattr(torch, "randint", lambda high, *_, **__: numbers[high])
    model.add_noise = lambda x0, t, eps: drawn.append(t) or x.expand(n, 2)
    model.losses(torch.zeros(n, 2).double())[0].backward()
    p = exact.logits(x).softmax(1)[0, drawn[0]]
    assert (shift.grad != 0).sum(0).min() == k          # all windows, those at the ends too
    assert_close(p @ shift.grad, torch.zeros(22).double(), atol=1e-12, rtol=0)


def small_model():
    return CDM(toy_2d.MLP(2, 12, 32, 2, frequencies=0), log_snr_schedule(10, 8, -8))


def test_compiled_equals_eager_where_nothing_is_random_and_losses_compile():
    model, x, t = small_model(), torch.randn(4, 2), torch.tensor([1, 3, 5, 9])
    compiled = torch.compile(model.predict_noise)
    assert_close(compiled(x, t), model.predict_noise(x, t), rtol=1e-4, atol=1e-5)
    sum(torch.compile(model.losses, backend="aot_eager", fullgraph=True)(x)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("schedule", [log_snr_schedule(1000, 18, -8), ot_schedule(1000)])  # uneven
def test_dpm_solver_is_second_order_and_ddim_first(schedule):
    alpha, sigma = schedule
    std = (0.7 * alpha).hypot(sigma)                                    # of data N(0, 0.7^2)
    model = DDM(lambda x, t: (sigma / std ** 2)[t, None] * x, schedule)
    error = {(method, n): abs(sample(model, std[None, 1000:-1], n, method).item() - 0.7)
             for method in ("ddim", "dpm") for n in (50, 100, 200)}     # the flow scales x by std
    for n in (50, 100):
        assert 1.7 < error["ddim", n] / error["ddim", 2 * n] < 2.3
        assert 3.2 < error["dpm", n] / error["dpm", 2 * n] < 4.8


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [1, 7, None])
@pytest.mark.parametrize("schedule", [log_snr_schedule(60, 8, -8), ot_schedule(60)])
def test_samplers_meet_the_density_of_every_level_and_ddpm_the_noising(method, steps, schedule):
    """If all data are one point, x_t ~ N(2 alpha_t, sigma_t^2) however large the steps, and x_s and
    x_t are correlated as in the noising if ddpm draws noise anew, fully if ddim does not."""
    (alpha, sigma), path, n = schedule, [], steps or 60
    z = lambda x, t: (x - 2 * alpha[t, None]) / sigma[t, None]
    model = DDM(lambda x, t: path.append((t, z(x, t))) or path[-1][1], schedule)
    start = model.add_noise(2 * torch.ones(20000, 1).double(), 60, torch.randn(20000, 1).double())
    assert_close(sample(model, start, steps, method), 2 + 0 * start)
    assert [t[0].item() for t, _ in path] == [60 - i * 60 // n for i in range(n)]
    for (t, zt), (s, zs) in pairwise(path):
        shared = (alpha / sigma)[t[0]] / (alpha / sigma)[s[0]] if method == "ddpm" else 1.0
        found = torch.stack([zs.mean(), zs.std(), (zs * zt).mean()]).tolist()
        assert_close(found, [0.0, 1.0, float(shared)], atol=0.04, rtol=0)


@pytest.mark.parametrize("last", [-10, 4])
def test_elbo_ode_and_one_pass_agree_as_far_as_level_T_is_noise(last):
    model, x0 = Exact(log_snr_schedule(50, 8, last)), Exact().data.sample([2000])
    x1, xT = (model.add_noise(x0, t, torch.randn_like(x0)) for t in (1, 50))
    one_pass = model.log_prob(x1, 1)
    kl = (model.logits(xT)[:, 50] - cdm.log_normal(xT)).mean()             # KL(p_T || N(0, I))
    assert (kl > 0.2) == (last == 4)
    assert_close(one_pass.mean() - elbo(model, x0).mean(), kl, atol=0.06, rtol=0)
    if last == -10:
        assert_close(ode_log_prob(model, x1[:50], 1), one_pass[:50], atol=0.06, rtol=0)
        guess = ode_log_prob(model, x1[:400], 1, probes=2)                   # Hutchinson: no bias
        assert abs(guess.mean() - one_pass[:400].mean()) < 0.05


@pytest.mark.parametrize("schedule", [log_snr_schedule(100, 6, -6), ot_schedule(120)])
def test_annealing_brackets_a_planted_constant_and_does_not_see_others(schedule):
    exact = Exact(schedule)                      # the straight path is not variance preserving
    planted = torch.zeros(len(schedule.alpha)).double()
    planted[1], planted[40:60] = 0.8, -0.5                 # p_1 integrates to exp(0.8)
    model = CDM(lambda x: exact.logits(x) + planted, schedule)
    x1 = model.add_noise(exact.data.sample([1000]), 1, torch.randn(1000, 2).double())
    below, above = annealed_log_z(model, x1)
    width = 0.6 if schedule.alpha[1] > 0.998 else 5.0            # few levels near the data are wide
    assert below < 0.8 < above < below + width and abs((below + above) / 2 - 0.8) < width / 6


def test_annealing_is_exact_if_all_data_are_one_point_as_ddpm_steps_are_then():
    alpha, sigma = schedule = log_snr_schedule(60, 6, -16)
    planted = torch.where(torch.arange(62) == 1, 0.8, 0.0)
    logits = lambda x: Normal(2 * alpha, sigma.clamp(min=1e-9)).log_prob(x) + planted
    x1 = 2 * alpha[1] + sigma[1] * torch.randn(50, 1).double()
    assert_close(annealed_log_z(CDM(logits, schedule), x1), (0.8, 0.8), atol=0.002, rtol=0)


def test_the_bits_of_a_known_distribution_are_its_entropy():
    schedule, p = log_snr_schedule(50, 14, -8), torch.tensor([0.5, 0.25, 0.25])        # 1.5 bits
    place = (2 * torch.tensor([0, 10, 11]).double() + 1) / 256 - 1                 # of grey values

    def logits(x):                                                                 # of one pixel
        seen = Normal(schedule.alpha * place[:, None], schedule.sigma.clamp(min=1e-4))
        return (seen.log_prob(x[..., None]) + p.log()[:, None]).logsumexp(1)
    model, x0 = CDM(logits, schedule), place[torch.multinomial(p, 2000, True)][:, None]
    x1, sigma1 = model.add_noise(x0, 1, torch.randn_like(x0)), schedule.sigma[1]
    for log_p1 in (model.log_prob(x1, 1), elbo(model, x0), ode_log_prob(model, x1, 1)):
        assert_close(bits_per_dim(log_p1, sigma1, 1).mean().item(), 1.5, atol=0.06, rtol=0)
    assert_close(bits_per_dim(2 * log_p1, sigma1, 2), bits_per_dim(log_p1, sigma1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_runs_in_both_precisions_on_images_and_is_saved(dtype):
    model, twin = (CDM(nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 22)),
                       log_snr_schedule(20, 8, -8)).to(dtype) for _ in range(2))
    x = sample(model, torch.randn(3, 1, 4, 4, dtype=dtype), mnist.np.int64(5), "dpm")
    assert x.shape == (3, 1, 4, 4) and x.dtype == dtype and not x.requires_grad
    for result in (model.log_prob(x), elbo(model, x), ode_log_prob(model, x, probes=2)):
        assert result.dtype == dtype and result.shape == (3,)
    sum(model.losses(x)).backward()
    twin.load_state_dict(model.state_dict())
    assert_close(twin.log_prob(x), model.log_prob(x))
    twin.net = nn.DataParallel(model.net)                                      # a wrapped network
    assert_close(twin.predict_noise(x, 3), model.predict_noise(x, 3))


def test_guidance_0_is_the_labelled_model_and_minus_1_the_one_without_labels():
    exact, y, t = Exact(), torch.tensor([0, 1] * 4), torch.arange(1, 48, 6)
    x, rows, ones = exact.data.sample([8]), torch.arange(8), torch.ones(8).long()
    of_class = lambda x, y: (exact.parts(x) - exact.weights.log())[rows, :, y]
    model = CDM(lambda x, y=None: exact.logits(x) if y is None else of_class(x, y), exact.schedule)
    free, labelled = model.predict_noise(x, t), given(model, y).predict_noise(x, t)
    assert_close(given(model, y).log_prob(x, t), of_class(x, y)[rows, t])
    for one in (model, given(model, y, -1.0)):                     # the model itself has no labels
        assert_close(one.predict_noise(x, t), free)
    assert_close(given(model, y, 2.0).predict_noise(x, t), labelled + 2 * (labelled - free))
    assert_close(given(given(model, ones, 3.0), y).predict_noise(x, t), labelled)      # replaced


@pytest.mark.parametrize("family", ["cdm", "ddm"])
def test_a_labelled_model_shares_weights_is_copied_and_pickled_and_label_10_is_none(family):
    model, y, x = scattered(family), torch.arange(3), torch.randn(3, 1, 8, 8).double()
    labelled = given(model, y, 1.0)
    labelled.net.net.label.weight.data += torch.randn(11, 32)               # seen by both
    value, free = labelled.predict_noise(x, 9), model.predict_noise(x, 9)
    assert type(labelled) is type(model) and not torch.allclose(value, free)
    assert_close(given(model, y, 1.0).predict_noise(x, 9), value)
    assert_close(given(model, 0 * y + 10).predict_noise(x, 9), free)
    for twin in (copy.deepcopy(labelled), pickle.loads(pickle.dumps(labelled))):
        assert_close(twin.predict_noise(x, 9), value)
    assert twin.to("meta").net.y.is_meta                                # labels go to the device


def test_a_ddm_of_the_same_denoiser_is_the_same_diffusion_model():
    exact, shown = Exact(), []
    ddm = DDM(lambda xt, t: shown.append(t) or exact.predict_noise(xt, t), exact.schedule)
    start, x0 = torch.randn(6, 2).double(), exact.data.sample([5000])
    assert_close(sample(ddm, start, 10), sample(exact, start, 10))
    assert_close(ode_log_prob(ddm, start), ode_log_prob(exact, start))
    ce, mse = ddm.losses(x0)                   # the CDM also meets t = 0, where eps_hat = 0 costs 1
    assert_close(mse, exact.losses(x0)[1] * 52 / 50 - 1 / 50, atol=0.02, rtol=0)
    assert ce == 0 and shown[-1].min() == 1 and shown[-1].max() == 50


BAD = {
    "log-SNR rises": lambda m, x: CDM(m.net, log_snr_schedule(10, -8, 8)),
    "schedule ends": lambda m, x: CDM(m.net, Schedule(*(v[:-1] for v in m.schedule))),
    "no schedule": lambda m, x: CDM(None, 1000),
    "level above": lambda m, x: m.predict_noise(x, 12),
    "level tensor shape": lambda m, x: m.log_prob(x, torch.zeros(3, dtype=torch.long)),
    "level tensor dtype": lambda m, x: m.log_prob(x, torch.zeros(4)),
    "integer data": lambda m, x: m.losses(x.byte()),
    "logit width": lambda m, x: CDM(m.net, ddpm_schedule(20)).log_prob(x),
    "method": lambda m, x: sample(m, x, method="euler"),
    "steps above T": lambda m, x: sample(m, x, steps=11),
    "ODE level": lambda m, x: ode_log_prob(m, x, 0),
    "empty batch": lambda m, x: m.losses(x[:0]),
    "ELBO of few levels": lambda m, x: elbo(m, x),
    "level -1 in a tensor": lambda m, x: m.add_noise(x, torch.full((4,), -1), x),
    "half precision": lambda m, x: m.bfloat16().log_prob(x.bfloat16()),
    "blurred greys": lambda m, x: bits_per_dim(0.0, 0.001, 1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_value_error(name):
    with pytest.raises(IndexError if name == "level -1 in a tensor" else ValueError):
        BAD[name](small_model(), torch.randn(4, 2))


@pytest.mark.parametrize("name", toy_2d.DATASETS)
def test_the_oracles_are_exact_at_every_level(name):
    oracle, points = toy_2d.DATASETS[name](), toy_2d.grid()[::3]
    cell = 3 * (2 * toy_2d.HALF / toy_2d.CELLS) ** 2           # every third cell stands for three
    weigh = lambda x: (-(x - 0.5).square().sum(1)).exp()       # smooth: the lattice is a coarse one
    for t in (0, 24, 41):
        p = oracle.log_prob(points, t).exp()
        assert_close((p.sum() * cell).item(), 1.0, atol=0.01, rtol=0)
        assert_close(weigh(oracle.sample(20000, t)).mean(), (weigh(points) * p).sum() * cell,
                     atol=0.01, rtol=0)


def test_evaluate_gives_the_truth_a_kl_of_zero_and_sees_through_a_wrong_scale():
    oracle = toy_2d.two_modes()
    row = toy_2d.evaluate(lambda x: oracle.log_prob(x.double()) + 0.5, oracle)[0]
    assert_close(row, dict(KL=0.0, log_Z=0.5, KL_raw=-0.5, heavy_mode=0.9), atol=1e-4, rtol=0)
    equal = toy_2d.Oracle(oracle.centres, std=oracle.std)                  # of weights 0.5
    kl = toy_2d.evaluate(lambda x: equal.log_prob(x.double()), oracle)[0]["KL"]
    assert_close(kl, 0.9 * math.log(1.8) + 0.1 * math.log(0.2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", toy_2d.METHODS)
def test_every_method_recovers_a_known_log_ratio(name):
    schedule = log_snr_schedule(40, 8, -6)
    oracle = toy_2d.Oracle(torch.tensor([(0.8, -0.4)]), std=0.4, schedule=schedule)
    make = lambda outputs, timed=False: toy_2d.MLP(2 + timed, outputs, 64, 2, frequencies=0)
    method = toy_2d.METHODS[name](make, schedule)
    toy_2d.train(method, lambda: oracle.sample(512).float(), steps=300, lr=1e-2)
    x = oracle.sample(500)          # N(0, I) would be 1.5 off, and 0.7 without the mean of that
    error = (method.log_prob(x.float()) - oracle.log_prob(x)).detach()
    error = error - error.mean() if name == "MSE" else error       # which knows no constant
    assert error.abs().mean() < (0.45 if name in ("MSE", "time-score", "DDM-ODE") else 0.15)


def test_the_chasm_measures_the_mean_and_the_root_mean_square_error_in_nats(monkeypatch):
    oracle = toy_2d.CorrelatedPairs(6)
    exact = CDM(oracle.logits, oracle.schedule)
    for t in (0, 15, 41):
        pair = torch.eye(3).double().repeat(2, 2) - torch.eye(6).double()       # 1 where paired
        cov = torch.eye(6) + oracle.schedule.alpha[t] ** 2 * oracle.RHO * pair
        x, normal = oracle.sample(20000, t).double(), MultivariateNormal(0 * cov[0], cov)
        assert_close(x.T.cov(), cov, atol=0.05, rtol=0)
        assert_close(exact.log_prob(x, t), normal.log_prob(x))
    exact.weight = nn.Parameter(torch.zeros(()))                               # to be trained
    off = toy_2d.Method(exact, lambda x0: exact.weight ** 2, lambda x: exact.log_prob(x) + 3)
    monkeypatch.setitem(toy_2d.CHASM, "off", lambda make, schedule: off)
    row, (truth, learned) = toy_2d.chasm_run(6, "off", 1, 0)
    assert_close([row[k] for k in ("rms", "estimated", "true")], [3.0, 4.5, 1.5], atol=0.1, rtol=0)
    assert truth[0] == 0 and abs(truth[-1] + 1.5) < 0.1 and abs(learned - truth).max() < 1e-3


def test_a_table_shows_a_spread_over_seeds_where_there_is_one(capsys, tmp_path):
    rows = [dict(d=d, method="p", seed=s, true=d / 4, v=v)
            for d, s, v in ((8, 0, 1.), (8, 1, 3.), (16, 0, 5.), (16, 1, 5.))]
    toy_2d.table(tmp_path / "t.csv", rows, 2, 1)
    said = re.sub(" +", " ", capsys.readouterr().out)
    assert "| d | method | true | v |\n" in said
    assert "\n| 8 | p | 2.0 | 2.0 +- 1.4 |\n| 16 | p | 4.0 | 5.0 |\n" in said
    assert "d,method,seed,true,v\n8,p,0,2.0,1.0\n" in (tmp_path / "t.csv").read_text("utf-8")


@pytest.mark.parametrize("flags, n, words, files", [
    ("--datasets two_modes two_modes --methods NCE CDM NCE --seeds 2", 4,
     " KL |log_Z|0.9 in two_modes|+-|s left", ["toy_2d.csv", "toy_2d.png"]),
    ("--chasm --seeds 1", 10, "dimensions 2, 4 in 2 steps|10 trainings|true|rms|time-score",
     ["chasm.csv", "chasm.png"])])
def test_each_command_tabulates_and_draws(flags, n, words, files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "my results"
    monkeypatch.setattr(toy_2d, "CELLS", 40)
    monkeypatch.setattr(toy_2d, "DIMENSIONS", (2, 4))
    monkeypatch.setattr(sys, "argv", ["toy_2d", *flags.split(), "--steps", "2", "--out", str(out)])
    toy_2d.main()
    said = capsys.readouterr().out
    assert all(word in said for word in words.split("|")), said
    assert sorted(f.name for f in out.iterdir()) == files
    assert len((out / files[0]).read_text("utf-8").splitlines()) == 1 + n


def test_a_job_that_fails_ends_the_others_at_once_where_processes_are_spawned(monkeypatch):
    begun, spawn = time.time(), multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing, "get_context", lambda: spawn)
    with pytest.raises(SystemExit, match="stopped by ZeroDivisionError"):
        toy_2d.in_parallel([(time.sleep, 100), (divmod, 1, 0)])
    assert time.time() - begun < 60 and not multiprocessing.active_children()


def digit_model(family="cdm"):
    torch.manual_seed(0)
    images = (torch.rand(50, 1, 8, 8) * 300 - 40).clamp(0, 255).to(torch.uint8)
    return mnist.build(dict(model=family, dataset="digits", width=16), images), images


def scattered(family="cdm"):
    """The same in float64, with its weights away from the zeros of the start."""
    model = digit_model(family)[0].double()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model


def test_the_digit_classifier_starts_as_the_exact_one_of_independent_pixels_on_a_lattice():
    model, images = digit_model()
    x, (alpha, sigma) = 0.5 * torch.randn(3, 1, 8, 8), model.schedule
    counts = torch.stack([images == k for k in mnist.PixelMixture.GREYS]).double().sum(1)
    share = torch.cat([counts, (50 - counts.sum(0, keepdim=True)).expand(3, -1, -1, -1) / 3]) + 1
    grey = (2 * torch.arange(-1000, 1256).double() + 1) / 256 - 1             # also beyond 0 .. 255
    for t in (0, 1, 5, 9, 10, 30, 64):             # at level 0 a little noise stands in for none
        seen = Normal(alpha[t] * grey, sigma[t].clamp(min=3e-4))
        seen = seen.log_prob(x[..., None].double()).exp()                      # (3, 1, 8, 8, 2256)
        if t < 64:                                 # where all greys that count are among these
            noise = sigma.clamp(min=3e-4).float()[t].view(1, 1, 1)
            factor = mnist.log_lattice(x.flatten(2), noise).view_as(x).exp()
            assert_close(factor.double(), seen.sum(-1) * alpha[t] * mnist.STEP, atol=0.005, rtol=0)
        p = sum(share[i] * seen[..., 1000 + k] for i, k in enumerate(mnist.PixelMixture.GREYS))
        for i, mean in enumerate((-0.6, 0.0, 0.6)):
            prior = Normal(mean, math.sqrt(math.exp(-1.5) + mnist.STEP ** 2))
            p = p + share[5 + i] * (seen * prior.log_prob(grey).exp() * mnist.STEP).sum(-1)
        log_p = (p / share.sum(0)).log().flatten(1).sum(1)
        assert_close(model.log_prob(x, t).double(), log_p, atol=0.05, rtol=1e-3)


def test_the_digit_denoiser_starts_as_the_classifier_but_is_told_its_level(monkeypatch):
    model, ddm, told = digit_model()[0], digit_model("ddm")[0], scattered("ddm")
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1, 20, 40, 64])
    assert_close(ddm.predict_noise(x, t), model.predict_noise(x, t), atol=1e-3, rtol=1e-3)
    ddm.losses(x)[1].backward()
    assert [n for n, p in ddm.named_parameters() if p.grad is None] == ["net.constant.weight"]
    eps_hat, level = told.predict_noise(x.double(), t), mnist.waves(told.alpha[t], told.sigma[t])
    u, v = torch.randn(2, *x.shape).double()
    (slope,) = torch.func.vjp(lambda x: told.predict_noise(x, t), x.double())[1](v)   # for the ODE
    change = told.predict_noise(x + 1e-6 * u, t) - told.predict_noise(x - 1e-6 * u, t)
    assert_close((slope * u).sum((1, 2, 3)), (change * v).sum((1, 2, 3)) / 2e-6, rtol=1e-4, atol=0)
    features = told.net.trunk(x.double(), told.net.label(0 * t + 10) + level)
    monkeypatch.setattr(mnist.Trunk, "forward", lambda *_: features)          # held fixed
    assert_close(told.predict_noise(x.double(), t), eps_hat)


def test_the_digit_classifier_keeps_rows_apart_and_serves_any_levels_in_any_number():
    model, t, y = scattered(), torch.tensor([0, 1, 25, 64, 65]), torch.tensor([3, 1, 10, 5, 0])
    x = 0.5 * torch.randn(5, 1, 8, 8).double()
    every = model.log_ratio(x, torch.arange(66).expand(5, 66))
    one_by_one = torch.stack([model.log_ratio(x[i:i + 1], t[i:i + 1, None])[0] for i in range(5)])
    assert_close(one_by_one, every.gather(1, t[:, None]))
    assert_close(every[:, 65], torch.zeros(5).double(), atol=1e-9, rtol=0)     # p_{T+1} = N(0, I)
    finer = mnist.DigitCDM(model.net, log_snr_schedule(127, 14, -8)).double()  # every second is new
    assert_close(finer.log_prob(x, 11), model.log_prob(x, 6), atol=1e-4, rtol=1e-4)
    given(model, y).losses(x)[1].backward()                    # constants are learned by CE alone
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["net.constant.weight"]


def test_the_best_linear_denoiser_is_exact_for_a_gaussian():
    images = torch.randint(0, 256, (4000, 1, 2, 2), dtype=torch.uint8)
    images[:, :, 1] = images[:, :, :1, 0] // 2                     # three pixels that are related
    schedule, x0 = log_snr_schedule(9, 6, -8), mnist.to_x0(images).flatten(1).double()
    found = mnist.best_linear_mse(images, schedule)
    for t in (1, 5, 9):                          # eps_hat = sigma N^-1 (xt - alpha m), N = cov(xt)
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        noised = x0.T.cov() * alpha ** 2 + sigma ** 2 * torch.eye(4).double()
        assert_close(found[t], 1 - sigma ** 2 * torch.linalg.inv(noised).trace() / 4)
    assert found[0] == found[1] and found[10] == found[9]


def training(out, device="cpu", model="cdm", steps=100):
    config = dict(model=model, dataset="digits", width=8, batch=16, steps=steps, lr=0.01, seed=0)
    images, y = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8), torch.arange(64) % 10
    return mnist.train(config, images, y, device, out)


def test_training_warms_up_clips_and_drops_labels(monkeypatch, tmp_path):
    rates, norms, given_to, labels = [], [], [], []

    def note(optimiser, *_):                                                      # before a step
        group = optimiser.param_groups[0]
        rates.append(group["lr"])
        norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
        labels.append(given_to[-1].clone())
    monkeypatch.setattr(mnist, "W_CE", 100.0)                                 # a large gradient
    monkeypatch.setattr(mnist, "given", lambda model, y: given_to.append(y) or given(model, y))
    handle = register_optimizer_step_pre_hook(note)
    training(tmp_path)
    handle.remove()
    assert_close(rates[:4], [0.0025, 0.005, 0.0075, 0.005 * (1 + math.cos(math.pi * 0.04))])
    assert rates[-1] < 1e-9 and abs(max(norms) - 2.0) < 1e-3
    assert 0.17 < (torch.cat(labels) == mnist.CLASSES).float().mean() < 0.23


@pytest.mark.parametrize("family", ["cdm", "ddm"])
def test_training_and_sampling_stay_on_the_device(family, monkeypatch, tmp_path):
    """On PyTorch's meta device tensors have no values; to mix them with the CPU's is an error."""
    monkeypatch.setattr(mnist, "save", lambda path, **content: None)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)
    model = training(tmp_path, "meta", family, steps=2)
    for method in ("ddpm", "ddim", "dpm"):
        assert sample(model, torch.randn(3, 1, 8, 8, device="meta"), 3, method).is_meta


def test_a_cdm_and_a_ddm_train_resume_and_are_measured_together(monkeypatch, capsys, tmp_path):
    judge, save, measure, out = mnist.make_judge, mnist.save, mnist.measure, tmp_path / "a cdm"
    monkeypatch.setattr(mnist, "make_judge", lambda *data: judge(*data, steps=20))
    monkeypatch.setattr(mnist, "QUICK", dict(width=8, batch=16, steps=120, lr=0.01, one_pass=100,
                                             elbo=20, slow=10, fine=40, samples=100))
    monkeypatch.setattr(mnist, "log_snr_schedule", lambda T, *ends: log_snr_schedule(24, *ends))

    def run_digits(out, *flags):
        monkeypatch.setattr(sys, "argv", ["mnist.py", "--dataset", "digits", "--quick", "--device",
                                          "cpu", "--out", str(out), *map(str, flags)])
        mnist.main()
        return capsys.readouterr().out

    def stop(path, **content):                        # as Ctrl-C does, after a save
        save(path, **content)
        if content.get("step") == 100:
            raise KeyboardInterrupt
    monkeypatch.setattr(mnist, "measure", lambda *_: None)
    run_digits(tmp_path / "a ddm", "--steps", 3, "--model", "ddm")
    run_digits(tmp_path / "b")
    monkeypatch.setattr(mnist, "save", stop)
    for why, *flags in (["--resume goes on from it"], ["has a training already: add --resume"],
                        ["is of .*, not of .*: give the flags", "--resume", "--batch", 32]):
        with pytest.raises(SystemExit, match=why):
            run_digits(out, *flags)
    monkeypatch.setattr(mnist, "save", save)
    monkeypatch.setattr(mnist, "measure", measure)
    said = run_digits(out, "--resume")                                 # as if it had never stopped
    a, b = (torch.load(folder / "model.pt") for folder in (out, tmp_path / "b"))
    assert_close(a["model"], b["model"], rtol=0, atol=0)
    assert re.findall(r"^\w+", (out / "log.csv").read_text(), re.M) == ["step", "100", "120"]
    ce, one, log_z, both = (float(re.search(pattern, said)[1]) for pattern in (
        r"step    120 of 120   cross-entropy ([\d.]+)", r"by one pass, 100 images +([\d.-]+)",
        r"log Z, between .* +([\d.-]+) \+-", r"one pass \+ log Z: ([\d.-]+)"))
    assert ce < math.log(2) and abs(one + log_z - both) < 0.002 and one < 5
    pair = run_digits(tmp_path / "c", "--weights", out / "model.pt", tmp_path / "a ddm/weights.pt")
    for line in ("by one pass", "ELBO minus", "ODE minus", "log Z, between"):   # the same numbers
        assert re.search(f"{line}.*[+]- [0-9.]+", said)[0] in pair
    assert all(f"| {row}" in pair for row in ("real ", f"{out}/model.pt, label first", tmp_path))
    assert "bits/dim by ELBO, 20 images" in pair and len(list((tmp_path / "c").glob("*.png"))) == 3


def test_the_frechet_distance_of_two_gaussians_is_its_closed_form():
    a, b = torch.randn(50000, 3).double(), 2 * torch.randn(50000, 3).double() + 1
    assert_close(mnist.frechet(a, b), 3 * 1.0 + 3 * (1 - 2) ** 2, atol=0.1, rtol=0)


def test_the_committed_weights_know_digits():
    model = mnist.load(HERE / "assets/mnist_cdm.pt")
    black = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    data = Path(os.environ.get("MNIST", HERE / "data/mnist"))
    digits = mnist.load_data("mnist", data)[2][0][:100] if data.exists() else black
    x0 = mnist.to_x0(torch.cat([black, 255 - black, digits, 255 - digits]))
    log_p1 = model.log_prob(model.add_noise(x0, 1, torch.randn_like(x0)), 1)
    bits = bits_per_dim(log_p1, model.schedule.sigma[1], 784)
    real, inverse = bits[2:].chunk(2)
    assert bits[0] < 0.3 < bits[1] and real.mean() < 1.15 and real.max() < inverse.min()


def test_a_download_is_kept_if_it_is_whole_and_read_from_disk_ever_after(monkeypatch, tmp_path):
    images, labels, data = torch.arange(2 * 784) % 251, torch.tensor([3, 1]), tmp_path / "my data"
    for name, header, values in (("images.gz", 16, images), ("labels.gz", 8, labels)):
        packed = gzip.compress(bytes(header) + bytes(values.tolist()))
        (tmp_path / name).write_bytes(packed)
        monkeypatch.setattr(mnist, "URL", f"{tmp_path.as_uri()}/")
        with pytest.raises(RuntimeError, match="hash"):
            mnist.read_or_download(data, name, "0000")
        assert not (data / name).exists()
        for _ in range(2):
            found = mnist.read_or_download(data, name, hashlib.sha256(packed).hexdigest()[:16])
            assert torch.equal(found.flatten().long(), values)
            (tmp_path / name).unlink(missing_ok=True)
        assert found.shape == ((2, 1, 28, 28) if name == "images.gz" else (2,))


@pytest.mark.parametrize("script, flags, why", [
    (toy_2d, "-h", "--seeds"), (mnist, "-h", "--resume"), (mnist, "--width 10", "multiple of 4"),
    (toy_2d, "--chasm --methods CDM", "not with --chasm"), (mnist, "", "MNIST cannot be read"),
    (mnist, "--dataset digits --resume", "there is no .*model.pt"),
    (mnist, "--dataset digits --weights absent.pt", "absent.pt holds no weights"),
    (mnist, "--dataset digits --weights notes.pt", "notes.pt holds no weights"),
    (mnist, "--dataset digits --weights other.pt", "no weights.*it is of .*mnist"),
    (mnist, "--dataset digits --width 8 --batch 8", "diverged at step 1: ")])
def test_what_cannot_go_on_says_why_in_ascii(script, flags, why, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", *flags.split()])
    monkeypatch.setattr(mnist, "URL", "file:///nowhere/")
    monkeypatch.setattr(mnist, "W_CE", math.inf)
    Path("notes.pt").write_text("not weights", "utf-8")
    torch.save(dict(config=dict(dataset="mnist")), "other.pt")
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert re.search(why, f"{stop.value}{''.join(capsys.readouterr())}")
    assert not list(tmp_path.rglob("model.pt"))
    assert all((HERE / f"{name}.py").read_bytes().isascii() for name in ("cdm", "toy_2d", "mnist"))


def test_the_readme_names_files_and_flags_that_there_are():
    names = re.findall(r"\]\(([^)#]+)\)|([\w./-]+\.(?:py|png|pt|txt))\b", README)
    for name in {a or b for a, b in names}:
        assert name.startswith(("runs/", "http")) or (HERE / name).exists(), name
    for script in ("toy_2d", "mnist"):
        known = set(re.findall(r'add\("(--\w+)"', (HERE / f"{script}.py").read_text("utf-8")))
        commands = " ".join(re.findall(rf"python {script}\.py([^`#|\n]*)", README))
        used = set(re.findall(r"--[a-zA-Z][\w-]*", commands))
        assert used and used <= known, used - known


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
