"""The paper as tests: exact classifiers stand where the network goes, so every answer is known.

Run with `pytest`: about a minute on two CPU cores, no network access. Read the two theorems first.
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from torch.testing import assert_close

import cdm
import mnist
import toy_2d
from cdm import (CDM, DDM, Schedule, annealed_log_z, bits_per_dim, ddpm_schedule, dpm_solver, elbo,
                 log_snr_schedule, ode_log_prob, ot_schedule, sample, uniform_schedule)

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text("utf-8")
SCHEDULES = ddpm_schedule, uniform_schedule, ot_schedule, log_snr_schedule


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)               # tiny tensors: a second thread costs more than it brings
    torch.set_default_dtype(torch.float32)


def from_seed_0(function, *args, **cond):
    torch.manual_seed(0)
    return function(*args, **cond)


# ------------------------------------- what several tests use (On a first reading, skip to Exact.)
IMAGES = (from_seed_0(torch.rand, 50, 1, 8, 8) * 300 - 40).clamp(0, 255).byte()
X, LEVELS = 0.5 * from_seed_0(torch.randn, 4, 1, 8, 8).double(), torch.tensor([1, 20, 40, 64])
DIGITS = "--dataset digits --device cpu --quick "
SMALL = dict(width=8, batch=8, steps=101, lr=0.01, one_pass=30, elbo=10, slow=5, fine=20,
             samples=100)


def small_model(window=None):
    """A plane's CDM with T = 10, untrained."""
    net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 12))
    model = CDM(net, log_snr_schedule(10, 8, -8))
    model.window = window
    return model


def digit_model(family="cdm", scatter=0.0):
    """Untrained or, in float64, with weights that are away from the zeros of the start."""
    config = dict(model=family, dataset="digits", width=16)
    model = from_seed_0(mnist.build, config, IMAGES)
    for p in model.parameters():
        p.data += scatter * torch.randn_like(p)
    return model.double() if scatter else model


def training(out, steps, device="cpu", model="cdm"):
    """Train on images whose grey is 20 times their label."""
    config = dict(model=model, dataset="digits", width=8, batch=16, steps=steps, lr=0.01, seed=0)
    y = torch.arange(64) % 10
    return mnist.train(config, (20 * y).byte().view(-1, 1, 1, 1).repeat(1, 1, 8, 8), y, device, out)


def run(script, flags, *more):
    """What a script prints, with presets that are small."""
    said, judge, few = io.StringIO(), partial(mnist.make_judge, steps=20), partial(sample, steps=2)
    with patch.multiple(mnist, QUICK=SMALL, FULL=SMALL, make_judge=judge, sample=few), \
            patch.object(sys, "argv", ["x.py", *flags.split(), *map(str, more)]), \
            plt.rc_context(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            script.main()
        except SystemExit as stop:
            print(stop)
    return said.getvalue()


# --------------------------------------------------------------------------- theorems and losses
class Exact(CDM):
    """The CDM of two Gaussians in the plane: N(alpha m_k, alpha^2 S_k + sigma^2 I) at level t."""

    def __init__(self, schedule=log_snr_schedule(50, 8, -8), weights=(0.3, 0.7)):
        super().__init__(self.logits, schedule)
        self.means = torch.tensor([[-1.0, 0.5], [1.0, 0.0]]).double()
        self.covs = torch.tensor([[[0.2, 0.1], [0.1, 0.3]], [[0.05, 0], [0, 0.4]]]).double()
        alpha, sigma = (v.view(-1, 1, 1) for v in schedule)
        covs = alpha[..., None] ** 2 * self.covs + sigma[..., None] ** 2 * torch.eye(2)
        parts = MultivariateNormal(alpha * self.means, covs)                         # (T+2, K), 2
        weights = Categorical(torch.tensor(weights).double().expand(self.T + 2, 2))
        self.noised = MixtureSameFamily(weights, parts, validate_args=False)

    def logits(self, x, y=None):
        """log p(t | x), (B, T+2), given both Gaussians or, by labels y (B,), one for each row."""
        if y is None:
            return self.noised.log_prob(x[:, None]).log_softmax(1)
        parts = self.noised.component_distribution.log_prob(x[:, None, None])       # (B, T+2, K)
        return parts[torch.arange(len(x)), :, y].log_softmax(1)

    def data(self, n):
        return self.noised.sample([n])[:, 0]

    def posterior_mean(self, x, t):
        """E[x_0 | x_t = x]: each component's linear regression, weighted by its responsibility."""
        parts, weights = self.noised.component_distribution, self.noised.mixture_distribution
        part = (parts.log_prob(x[:, None, None]) + weights.logits)[:, t].softmax(1)    # (B, K)
        gain = self.schedule.alpha[t] * self.covs @ parts.precision_matrix[t]          # (K, d, d)
        each = self.means + torch.einsum("kij,bkj->bki", gain, x[:, None] - parts.mean[t])
        return (part[..., None] * each).sum(1)


@pytest.mark.parametrize("make", SCHEDULES)
def test_theorem_3_1_the_gradient_of_exact_logits_is_the_posterior_mean(make):
    exact, x = Exact(make(50)), 2 * torch.randn(64, 2).double()
    for t in range(51):
        assert_close(exact.denoise(x, t), exact.posterior_mean(x, t), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", SCHEDULES)
def test_theorem_3_2_the_logits_give_the_exact_log_density_at_every_level(make):
    exact, x = Exact(make(50)), 2 * torch.randn(52, 2).double()
    truth = exact.noised.log_prob(x[:, None])
    for t in range(52):
        assert_close(exact.log_prob(x, t), truth[:, t])
    assert_close(exact.log_prob(x, torch.arange(52)), truth.diag())


def test_the_ddpm_schedule_is_that_of_the_paper_and_ends_alike_for_every_T():
    assert_close((ddpm_schedule().alpha[[1, 2, 500]] ** 2).tolist(),
                 [0.9999, 0.99978009, 0.07858724], rtol=1e-6, atol=0)
    for T in (2, 50, 1000):
        assert 3.5e-5 < ddpm_schedule(T).alpha[T] ** 2 < 4.2e-5


@pytest.mark.parametrize("K", [1, 2, 5, None])
def test_the_losses_classify_a_window_of_levels_and_denoise_the_true_one(K):
    model, k = Exact(log_snr_schedule(20, 8, -8)), K or 22
    model.window, x0 = K, model.data(4400)
    with patch.object(model, "add_noise", wraps=model.add_noise) as noising, \
            patch.object(model, "log_ratio_and_noise", wraps=model.log_ratio_and_noise) as asked:
        ce, mse = model.losses(x0)
    (clean, t, eps), (xt, levels) = noising.call_args.args, asked.call_args.args
    window, first = levels.sort(1)[0], levels.amin(1)
    assert_close((clean, xt), (x0, model.add_noise(x0, t, eps)))
    assert_close(window, first[:, None] + torch.arange(k))                   # adjacent levels,
    assert first.unique().tolist() == list(range(23 - k))                    # all the windows,
    place = (t - first).bincount(minlength=k) / 4400                         # any place in them
    assert_close(place, torch.full((k,), 1 / k), atol=0.03, rtol=0)
    assert_close(ce, F.cross_entropy(model.logits(xt).gather(1, window), t - first))
    assert_close(mse, F.mse_loss(model.predict_noise(xt, t), eps))


@pytest.mark.parametrize("level", [1, 25, 50])
def test_a_ddm_learns_at_levels_1_to_T_by_their_weights_and_has_no_cross_entropy(level):
    ddm, w_mse = DDM(lambda xt, t: 0 * xt, ot_schedule(50)), torch.zeros(52)        # its MSE is 1
    w_mse[level] = 100
    w_mse[[0, 51]] = math.nan
    ce, mse = ddm.losses(torch.zeros(20000, 2), w_mse)
    assert ce == 0 and abs(mse - 2) < 0.4                          # 100 at one level of 50


# -------------------------------------------------------------------------- labels and guidance
USES = {
    "log_prob": lambda m, x, **y: m.log_prob(x, 3, **y),
    "log Z": lambda m, x, **y: torch.tensor(annealed_log_z(m, x, **y)),
    "losses": lambda m, x, **y: torch.stack(m.losses(x, **y)),
    "denoise": lambda m, x, **y: m.denoise(x, 30, **y),
    "elbo": lambda m, x, **y: elbo(m, x, **y),
    "ODE": lambda m, x, **y: ode_log_prob(m, x, 40, **y),
}


@pytest.mark.parametrize("name", USES)
def test_labels_choose_the_model_of_their_class_everywhere_also_in_a_ddm(name):
    use, both, first = partial(from_seed_0, USES[name]), Exact(), Exact(weights=(1.0, 0.0))
    x, y = torch.randn(20, 2).double(), torch.zeros(20).long()
    assert_close(use(both, x, y=y), use(first, x))
    if name not in ("log_prob", "log Z"):
        ddm, true = (DDM(model.predict_noise, model.schedule) for model in (both, first))
        assert_close(use(ddm, x, y=y), use(true, x))


@pytest.mark.parametrize("sampler", [partial(sample, eta=1.0), sample, dpm_solver])
def test_guidance_minus_1_forgets_the_labels_and_more_exaggerates_them_linearly(sampler):
    x, y = torch.randn(20, 2).double(), torch.ones(20).long()
    assert_close(from_seed_0(sampler, Exact(), x, 5, guidance=-1.0, y=y),
                 from_seed_0(sampler, Exact(), x, 5))
    free, plain, guided = (sampler(Exact(), x, 1, guidance=w, y=y) for w in (-1.0, 0.0, 3.0))
    assert_close(guided - plain, 3 * (plain - free))              # one step is linear in eps_hat
    assert not torch.allclose(plain, free)


# ------------------------------------------------------------------------------------- samplers
def test_dpm_solver_is_second_order_and_ddim_first():
    alpha, sigma = schedule = ot_schedule(1000)                      # its log-SNR steps are uneven
    std = (0.7 * alpha).hypot(sigma)                                    # of data N(0, 0.7^2)
    model = DDM(lambda x, t: (sigma / std ** 2)[t, None] * x, schedule)   # the flow scales x by std
    error = {(method, n): abs(method(model, std[1000].view(1, 1), n).item() - 0.7)
             for method in (sample, dpm_solver) for n in (50, 100, 200)}
    for n in (50, 100):
        assert 1.7 < error[sample, n] / error[sample, 2 * n] < 2.3
        assert 3.2 < error[dpm_solver, n] / error[dpm_solver, 2 * n] < 4.8


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps, levels", [(1, [24]), (7, [24, 21, 18, 14, 11, 7, 4]),
                                           (None, list(range(24, 0, -1)))])
def test_samplers_meet_the_density_of_every_level_and_ddpm_the_noising(eta, steps, levels):
    """If all data are at 2, x_t ~ N(2 alpha_t, sigma_t^2), however large the steps are. DDIM keeps
    the noise of a sample; in DDPM it is correlated from step to step as in the noising."""
    alpha, sigma = schedule = ot_schedule(24)
    snr = alpha / sigma
    noise_in = lambda x, t: (x - 2 * alpha[t].view(-1, 1)) / sigma[t].view(-1, 1)
    model, noise = DDM(noise_in, schedule), torch.randn(20000, 1).double()
    start = 2 * alpha[24] + sigma[24] * noise
    with patch.object(model, "predict_noise", wraps=model.predict_noise) as asked:
        assert_close(sample(model, start, steps, eta), torch.full_like(start, 2))
    path = [call.args for call in asked.call_args_list]
    assert [t for _, t in path] == levels
    for (xt, t), (xs, s) in pairwise(path):
        zt, zs = noise_in(xt, t), noise_in(xs, s)
        correlation = (snr[t] / snr[s]).item() if eta else 1.0
        found = torch.stack([zs.mean(), zs.std(), (zs * zt).mean()]).tolist()
        assert_close(found, [0.0, 1.0, correlation], atol=0.04, rtol=0)


# --------------------------------------------------------------------------------------- audits
def test_elbo_ode_and_one_pass_agree_if_the_classifier_is_exact():
    model, x0 = Exact(log_snr_schedule(50, 8, -10)), Exact().data(2000)
    x1 = model.add_noise(x0, 1, torch.randn_like(x0))
    one_pass = model.log_prob(x1, 1)
    assert_close(elbo(model, x0).mean(), one_pass.mean(), atol=0.06, rtol=0)
    assert_close(ode_log_prob(model, x1[:50], 1), one_pass[:50], atol=0.06, rtol=0)
    guess = ode_log_prob(model, x1[:400], 1, probes=2)                   # Hutchinson: no bias
    assert abs(guess.mean() - one_pass[:400].mean()) < 0.05


def test_elbo_counts_what_is_left_of_the_data_at_level_T():
    model, x0 = Exact(log_snr_schedule(50, 8, 4)), Exact().data(2000)
    x1, xT = (model.add_noise(x0, t, torch.randn_like(x0)) for t in (1, 50))
    kl = (model.log_prob(xT, 50) - cdm.log_normal(xT)).mean()              # KL(p_T || N(0, I))
    assert_close((model.log_prob(x1, 1) - elbo(model, x0)).mean(), kl, atol=0.06, rtol=0)


def test_annealing_finds_a_planted_log_z():                # exactly, because the data are one point
    alpha, sigma = schedule = log_snr_schedule(60, 6, -16)
    planted = 0.8 * F.one_hot(torch.tensor(1), 62)
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
    bits = bits_per_dim(model.log_prob(x1, 1), sigma1, 1)
    assert_close(bits.mean().item(), 1.5, atol=0.06, rtol=0)
    assert_close(bits_per_dim(2 * model.log_prob(x1, 1), sigma1, 2), bits)           # of two alike


# ---------------------------------------------------------------------- bad input, and PyTorch
BAD = {
    "log-SNR rises": lambda m, x: CDM(m.net, log_snr_schedule(10, -8, 8)),
    "schedule's end": lambda m, x: CDM(m.net, Schedule(*(v[:-1] for v in m.schedule))),
    "T = 0": lambda m, x: CDM(m.net, log_snr_schedule(0)),
    "level tensor's shape": lambda m, x: m.log_prob(x, torch.zeros(3, dtype=torch.long)),
    "level tensor's dtype": lambda m, x: m.log_prob(x, torch.zeros(4)),
    "denoising pure noise": lambda m, x: m.denoise(x, 11),
    "integer data": lambda m, x: m.losses(x.byte()),
    "data (B,)": lambda m, x: m.losses(x[:, 0]),
    "empty batch": lambda m, x: m.losses(x[:0]),
    "logits' width": lambda m, x: CDM(m.net, ddpm_schedule(20)).log_prob(x),
    "window 0": lambda m, x: small_model(0).losses(x),
    "window T+3": lambda m, x: small_model(13).losses(x),
    "steps above T": lambda m, x: dpm_solver(m, x, steps=11),
    "guidance without labels": lambda m, x: sample(m, x, guidance=1.0),
    "one label for four digits": lambda m, x: digit_model().log_prob(X.float(), 1, y=7),
    "ELBO of few levels": lambda m, x: elbo(m, x),
    "half precision": lambda m, x: m.bfloat16().log_prob(x.bfloat16()),
    "blurred greys": lambda m, x: bits_per_dim(0.0, 0.001, 1),
}


@pytest.mark.parametrize("use", BAD.values(), ids=BAD)
def test_bad_input_is_a_value_error(use):
    with pytest.raises(ValueError):
        use(small_model(), torch.randn(4, 2))


@pytest.mark.parametrize("t", [-1, 12])
def test_a_level_out_of_range_is_an_error_also_in_a_tensor(t):
    model, x = small_model(), torch.randn(2, 2)
    with pytest.raises(ValueError):
        model.log_prob(x, t)
    with pytest.raises((IndexError, RuntimeError)):
        model.log_prob(x, torch.tensor([1, t]))


def test_conversions_of_a_model_do_not_round_alpha_and_sigma():
    model = small_model().bfloat16().float()
    for found, exact in zip(model.scales(torch.arange(12), torch.ones(12, 1)), model.schedule):
        assert torch.equal(found[:, 0], exact.float())


def test_losses_compile():
    losses = torch.compile(small_model().losses, backend="aot_eager", fullgraph=True)
    sum(losses(torch.randn(4, 2))).backward()


def test_losses_are_float32_under_autocast():
    model, x = small_model(), torch.randn(100, 2)
    losses = from_seed_0(model.losses, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.net(x).dtype == torch.bfloat16
        assert_close(from_seed_0(model.losses, x), losses, atol=0.02, rtol=0)   # of equal dtype


# --------------------------------------------------------------------------- the plane: toy_2d.py
@pytest.mark.parametrize("name", toy_2d.DATASETS)
def test_the_oracles_are_exact_at_every_level(name):
    oracle, points = toy_2d.DATASETS[name](), toy_2d.grid()[::3]             # faster than all
    cell = (2 * toy_2d.HALF) ** 2 / len(points)                               # area per point
    weigh = lambda x: (-(x - 0.5).square().sum(1)).exp()       # smooth: the lattice is a coarse one
    for t in (0, 24, 41):
        p = oracle.log_prob(points, t).exp()
        assert_close((p.sum() * cell).item(), 1.0, atol=0.01, rtol=0)
        assert_close(weigh(oracle.sample(20000, t)).mean(), (weigh(points) * p).sum() * cell,
                     atol=0.01, rtol=0)


def test_evaluate_normalises_before_it_compares():
    truth = toy_2d.two_modes()                                                # weights 0.9 and 0.1
    equal = toy_2d.Oracle(torch.tensor([(-1.2, 0.0), (1.2, 0.0)]), std=0.15)
    numbers = toy_2d.evaluate(lambda x: equal.log_prob(x.double()) + 0.5, truth)[0]
    kl = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert_close(numbers, dict(KL=kl, log_Z=0.5, KL_raw=kl - 0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", toy_2d.METHODS)
def test_every_method_recovers_a_known_log_ratio(name):
    schedule = log_snr_schedule(40, 8, -6)
    oracle = toy_2d.Oracle(torch.tensor([(0.8, -0.4)]), std=0.4, schedule=schedule)
    make = lambda outputs, timed=False: toy_2d.MLP(2 + timed, outputs, 64, 2, frequencies=0)
    method = toy_2d.METHODS[name](make, schedule)
    toy_2d.train(method, lambda: oracle.sample(512).float(), steps=300, lr=1e-2)
    x = oracle.sample(500)               # log N(0, I) as the answer would err by 1.5
    error = (method.log_prob(x.float()) - oracle.log_prob(x)).detach()
    error = error - error.mean() if name == "MSE" else error       # which knows no constant
    assert error.abs().mean() < (0.45 if name in ("MSE", "time-score", "DDM-ODE") else 0.15)


def test_the_row_cdm_ode_is_the_ode_and_not_the_one_pass_of_the_same_network():
    oracle = toy_2d.Oracle(torch.tensor([(0.8, -0.4)]), std=0.4)
    method = toy_2d.Method(CDM(oracle.logits, oracle.schedule), None,
                           lambda x: oracle.log_prob(x) + 1)
    with patch.object(toy_2d, "fit", return_value=(oracle, method)), \
            patch.object(toy_2d, "CELLS", 30):
        one_pass, ode = toy_2d.run("two_moons", "CDM", 1, 0)[0]
    assert_close([one_pass["log_Z"], ode["log_Z"]], [1.0, 0.0], atol=0.05, rtol=0)


def test_the_chasm_is_20_nats_deep_and_its_errors_are_in_nats(monkeypatch):
    weight, data = nn.Linear(1, 1), toy_2d.correlated_pairs(80)
    off = toy_2d.Method(weight, lambda x0: weight(x0[:, :1]).sum(), lambda x: data.log_prob(x) + 3)
    monkeypatch.setitem(toy_2d.CHASM, "three nats too many", lambda make, schedule: off)
    (row,) = toy_2d.chasm_run("three nats too many", [1], 0)
    assert_close([row["estimate"], row["rms_error"]], [20.0 + 3.0, 3.0], atol=0.3, rtol=0)


@pytest.mark.parametrize("flags, n, words, files", [
    ("--datasets two_modes --methods NCE CDM NCE --seeds 2 --steps 2", 6,
     r"4 of 4 jobs.*KL .*log_Z.*heavy_mode.*\+-", ["toy_2d.csv", "toy_2d.png"]),
    ("--chasm --seeds 1 --steps 64", 30, r"5 of 5 jobs.*rms_error.*time-score",
     ["chasm.csv", "chasm.png"]),
    ("--tour --steps 2", None, "1 of 1 jobs", ["tour.png"])])
def test_each_command_tabulates_and_draws(flags, n, words, files, tmp_path):
    with patch.object(toy_2d, "CELLS", 40):
        assert re.search(words, run(toy_2d, flags, "--out", tmp_path / "my results"), re.S)
    written = sorted(tmp_path.glob("my results/*"))
    assert [file.name for file in written] == files
    assert n is None or len(written[0].read_text("utf-8").splitlines()) == 1 + n


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of Unix")
@pytest.mark.parametrize("name, start", [("SIGTERM", "fork"), ("SIGKILL", "spawn")])
def test_workers_end_with_their_parent(name, start):
    """They hold its output open, so reading it to the end waits for them, too."""
    code = (f"import multiprocessing, time, toy_2d; multiprocessing.set_start_method('{start}'); "
            "toy_2d.in_parallel([(abs, -1), (time.sleep, 1000)])")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=HERE)
    assert b"1 of 2 jobs" in parent.stdout.readline()
    parent.send_signal(getattr(signal, name))
    parent.communicate(timeout=30)


# -------------------------------------------------------------------------- the digits' network
def test_untrained_digit_models_are_exact_so_that_one_pass_equals_the_elbo():
    model, ddm, x0 = digit_model(), digit_model("ddm"), mnist.to_x0(IMAGES.repeat(20, 1, 1, 1))
    x1 = model.add_noise(x0, 1, torch.randn_like(x0))
    assert_close(model.log_prob(x1, 1).mean(), elbo(model, x0).mean(), atol=0.7, rtol=0)
    assert_close(ddm.predict_noise(X.float(), LEVELS), model.predict_noise(X.float(), LEVELS),
                 atol=1e-3, rtol=1e-3)


def test_an_untrained_classifier_prefers_images_like_those_it_was_built_for():
    black, white = (torch.full((50, 1, 8, 8), grey).byte() for grey in (0, 255))
    model = mnist.build(dict(model="cdm", dataset="digits", width=16), black)
    likely, unlikely = (model.log_prob(mnist.to_x0(images), 9) for images in (black, white))
    assert likely.min() > unlikely.max() + 64                  # by more than a nat for each pixel


def test_the_digit_classifier_keeps_rows_apart_and_serves_any_levels_of_any_schedule():
    model = digit_model(scatter=0.02)
    every = model.log_ratio(X, torch.arange(66).expand(4, 66))
    for i, t in enumerate([0, 25, 64, 65]):
        assert_close(model.log_ratio(X[i:i + 1], torch.tensor([[t]]))[0, 0], every[i, t])
    assert_close(every[:, 65], torch.zeros(4).double(), atol=1e-9, rtol=0)     # p_{T+1} = N(0, I)
    finer = mnist.DigitCDM(model.net, log_snr_schedule(127)).double()          # every second is new
    assert_close(finer.log_prob(X, 2 * LEVELS - 1), model.log_prob(X, LEVELS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["cdm", "ddm"])
def test_denoising_trains_all_but_one_constant_and_every_scale_and_shift_by_the_level(family):
    model = digit_model(family, scatter=0.02)
    model.losses(X, y=torch.tensor([3, 1, 10, 5]))[1].backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None]
    assert untrained == ["net.mixture.constant.weight"]
    assert (model.net.mixture.adjust.weight.grad != 0).any(1).all()      # each scale and each shift


def test_the_trunk_pools_by_averages():
    model, seen = digit_model(scatter=0.02), {}
    model.net.trunk.fine1.register_forward_hook(lambda _, inputs, y: seen.update(fine=y))
    model.net.trunk.down.register_forward_hook(lambda _, inputs, y: seen.update(coarse=inputs[0]))
    model.log_prob(X, 20)
    a, b, c, d = (seen["fine"][..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    assert_close(seen["coarse"], (a + b + c + d) / 4)


@pytest.mark.parametrize("family", ["cdm", "ddm"])
def test_the_trunk_is_told_the_level_in_a_ddm_and_never_in_a_cdm(family):
    model, forward = digit_model(family, scatter=0.02), mnist.Trunk.forward
    with patch.object(mnist.Trunk, "forward", autospec=True, side_effect=forward) as trunk:
        model.predict_noise(X, 20)
        model.predict_noise(X, 40)
    (_, _, cond_at_20), (_, _, cond_at_40) = (call.args for call in trunk.call_args_list)
    assert torch.equal(cond_at_20, cond_at_40) == (family == "cdm")


def test_the_digit_denoiser_holds_the_features_constant():
    ddm, forward = digit_model("ddm", scatter=0.02), mnist.Trunk.forward
    eps_hat = ddm.predict_noise(X, LEVELS)
    with patch.object(mnist.Trunk, "forward", lambda *args: forward(*args).detach()):
        assert_close(ddm.predict_noise(X, LEVELS), eps_hat)


def test_the_jacobian_of_the_digit_denoiser_goes_through_the_features():           # for the ODE
    ddm, (u, v) = digit_model("ddm", scatter=0.02), torch.randn(2, *X.shape).double()
    _, vjp = torch.func.vjp(lambda x: ddm.predict_noise(x, LEVELS), X)
    up, down = (ddm.predict_noise(X + h * u, LEVELS) for h in (1e-6, -1e-6))
    assert_close((vjp(v)[0] * u).sum(), ((up - down) * v).sum() / 2e-6, rtol=1e-4, atol=0)


def test_a_model_is_float32_also_if_the_default_is_float64():
    torch.set_default_dtype(torch.float64)
    model = digit_model()
    assert {v.dtype for v in (*model.parameters(), *model.buffers())} == {torch.float32}


def test_the_best_linear_denoiser_is_exact_for_a_gaussian():
    images = torch.randint(0, 256, (4000, 1, 2, 2), dtype=torch.uint8)
    images[:, :, 1] = images[:, :, :1, 0] // 2                     # three pixels that are related
    cov, (alpha, sigma) = mnist.to_x0(images).flatten(1).double().T.cov(), log_snr_schedule(9, 6)
    found = mnist.best_linear_mse(images, log_snr_schedule(9, 6))
    for t in (1, 5, 9):                          # eps_hat = sigma N^-1 (xt - alpha m), N = cov(xt)
        noised = cov * alpha[t] ** 2 + sigma[t] ** 2 * torch.eye(4)
        assert_close(found[t], 1 - sigma[t] ** 2 * torch.linalg.inv(noised).trace() / 4)
    assert found[0] == found[1] and found[10] == found[9]


def test_the_frechet_distance_of_two_gaussians_is_its_closed_form():
    a, b = torch.randn(50000, 3).double(), 2 * torch.randn(50000, 3).double() + 1
    assert_close(mnist.frechet(a, b), 3 * 1.0 + 3 * (1 - 2) ** 2, atol=0.1, rtol=0)


def test_the_committed_weights_expect_black_and_not_white():
    model = mnist.load(HERE / "assets/mnist_cdm.pt")
    x0 = mnist.to_x0(torch.tensor([0, 255]).view(2, 1, 1, 1).expand(2, 1, 28, 28))
    x1 = model.add_noise(x0, 1, torch.randn_like(x0))
    black, white = bits_per_dim(model.log_prob(x1, 1), model.schedule.sigma[1], 784)
    assert black < 0.3 < white


# --------------------------------------------------------------------------------- MNIST's files
@pytest.fixture
def folder(tmp_path):
    """5007 training digits and 3 for test. The i-th image is of grey i % 10, which is its label."""
    for name in mnist.FILES:
        header, size = (16, 784) if "images" in name else (8, 1)
        y = (torch.arange(5007 if "train" in name else 3) % 10).byte()
        content = bytes(header) + y.repeat_interleave(size).numpy().tobytes()
        (tmp_path / name).write_bytes(gzip.compress(content, 1))
    return tmp_path


def test_images_keep_their_labels_and_the_last_5000_for_training_become_validation(folder):
    for (x, y), n, first in zip(mnist.load_data("mnist", folder), (7, 5000, 3), (0, 7, 0)):
        assert x.shape == (n, 1, 28, 28) and torch.equal(y, (first + torch.arange(n)) % 10)
        assert torch.equal(x[:, 0, 5, 5], y)


@pytest.mark.parametrize("name, content", [
    ("train-labels", gzip.compress(bytes(8) + b"\1\2\3")),                   # another count
    ("t10k-labels", gzip.compress(bytes(8) + b"\1\2\x0a")),                  # above 9
    ("t10k-images", gzip.compress(bytes(16 + 500))),                         # no whole image
    ("t10k-images", b"<html>")])
def test_mnist_files_that_do_not_fit_are_named(name, content, folder):
    (file,) = folder.glob(f"{name}*")
    file.write_bytes(content)
    with pytest.raises(mnist.UserError, match=rf"^MNIST cannot be read: {name}.*\n"):
        mnist.load_data("mnist", folder)


def test_a_download_is_kept_if_it_is_whole_and_read_from_disk_ever_after(folder, monkeypatch):
    name, data = "t10k-labels-idx1-ubyte.gz", folder / "my data"
    sha256 = hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
    monkeypatch.setattr(mnist, "URL", f"{folder.as_uri()}/")
    with pytest.raises(RuntimeError, match="hash"):
        mnist.read_or_download(data, name, "0000")
    assert not (data / name).exists()
    for _ in range(2):
        assert mnist.read_or_download(data, name, sha256).tolist() == [0, 1, 2]
        (folder / name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- training
def test_the_learning_rate_warms_up_and_decays_and_gradients_are_clipped(monkeypatch, tmp_path):
    rates, norms = [], []
    def note(optimiser):                                                       # in place of a step
        (group,) = optimiser.param_groups
        rates.append(group["lr"])
        norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
    monkeypatch.setattr(mnist, "W_CE", 100.0)                                     # large gradients
    monkeypatch.setattr(torch.optim.Adam, "step", note)
    training(tmp_path, 50)
    assert rates.index(max(rates)) == 2 and rates[2] > 0.0099
    assert abs(rates[25] - 0.005) < 1e-5 and 0 < rates[49] < 1e-4 and abs(max(norms) - 2) < 1e-3


def test_images_are_trained_on_with_their_labels_of_which_a_fifth_is_dropped(tmp_path):
    with patch.object(mnist.DigitCDM, "losses", autospec=True, side_effect=CDM.losses) as losses:
        training(tmp_path, 50)
    calls = [(call.args[1], call.kwargs["y"]) for call in losses.call_args_list]
    x0, y = (torch.cat(v) for v in zip(*calls))
    kept = y != mnist.CLASSES
    assert torch.equal(x0[kept, 0, 3, 3], mnist.to_x0(20 * y[kept]))
    assert 0.77 < kept.float().mean() < 0.83
    w_mse = losses.call_args.args[2]                     # an error counts more where it is smaller
    assert w_mse[64] > 1 > w_mse[1]


@pytest.mark.parametrize("family", ["cdm", "ddm"])
def test_training_and_sampling_stay_on_the_device(family, monkeypatch, tmp_path):
    """On PyTorch's meta device tensors have no values; to mix them with the CPU's is an error."""
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)
    model, x = training(tmp_path, 2, "meta", family), torch.randn(3, 1, 8, 8, device="meta")
    assert sample(model, x, 3, eta=1.0).is_meta and dpm_solver(model, x, 3).is_meta


def test_a_run_that_diverges_stops_and_is_not_saved(monkeypatch, tmp_path):
    monkeypatch.setattr(mnist, "W_CE", math.inf)
    with pytest.raises(mnist.UserError, match="diverged"):
        training(tmp_path, 3)
    assert torch.load(tmp_path / "model.pt")["step"] == 0


# ------------------------------------------------------------------ the command lines, and README
def test_a_run_that_is_stopped_and_resumed_equals_a_whole_one_exactly(monkeypatch, tmp_path):
    def save_then_stop(path, step=0, save=mnist.save, **content):
        save(path, step=step, **content)
        if step == 100:
            raise KeyboardInterrupt                                            # as Ctrl-C does
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "measure", lambda *_: None)
    said = run(mnist, DIGITS + "--out whole")
    assert re.search(r"step    101 of 101   cross-entropy 0\.[0-6].*   weighted MSE 0\.\d", said)
    with patch.object(mnist, "save", save_then_stop):
        said = run(mnist, DIGITS + "--out resumed")
    assert re.search("interrupted; .*--resume continues it", said)
    said = run(mnist, DIGITS + "--out resumed --resume --model ddm --batch 32")
    assert re.search("not a checkpoint of .*'ddm'.*'batch': 32.*, but of .*: pass the orig", said)
    run(mnist, DIGITS + "--out resumed --resume")
    whole, resumed = (torch.load(f"{name}/model.pt") for name in ("whole", "resumed"))
    assert_close((whole["model"], whole["optimiser"]), (resumed["model"], resumed["optimiser"]),
                 rtol=0, atol=0)


def test_equal_models_get_equal_numbers_in_an_evaluation_and_all_figures_are_closed(tmp_path):
    files = [tmp_path / name for name in ("$a_$b.pt", "_x.pt", "ddm.pt")]
    for file, family in zip(files, ("cdm", "cdm", "ddm")):
        config = dict(model=family, dataset="digits", width=16)
        mnist.save(file, config=config, model=digit_model(family).state_dict())
    said = run(mnist, DIGITS + "--weights", *files, "--out", tmp_path / "my results")
    for row in (r"\nCDM .*pt\n  one forward pass +(.*) bits/dim,    30 images",
                r"ELBO +(.*) bits/dim,    10 images", r"ODE +(.*) bits/dim,     5 images",
                r"log Z in (.*) The", r"pt \| +\d+ \|(.*)", r"pt, guidance 0.3 \|(.*?)\|"):
        first, second, *_ = re.findall(row, said)
        assert first == second
    assert re.search(r"\n\| real \(training\) digits +\| +\d", said)
    assert len(list(tmp_path.glob("my results/*.png"))) == 3 and not plt.get_fignums()


def test_samples_are_scored_with_and_without_guidance_from_the_same_noise(tmp_path):
    digits, judge = (IMAGES, torch.arange(50) % 10), partial(mnist.make_judge, steps=1)
    with patch.object(mnist, "sample", side_effect=lambda model, noise, **_: noise) as sampler, \
            patch.object(mnist, "make_judge", judge):
        mnist.show_samples({"CDM": digit_model()}, digits, digits, 50, 0, tmp_path / "samples.png")
    guided, plain = sampler.call_args_list
    assert (guided.kwargs["guidance"], plain.kwargs["guidance"]) == (0.3, 0.0)
    assert_close(guided.args[1], plain.args[1])


def test_the_number_to_quote_is_one_pass_plus_log_z(capsys):
    mnist.likelihood(digit_model(), IMAGES, SMALL)
    pattern = r"pass +(.*?) (?:.|\n)*log Z in (.*) \.\. (.*)\. The .*: (.*) \+- (.*)"
    one_pass, below, above, quoted, half = map(
        float, re.search(pattern, capsys.readouterr().out).groups())
    assert abs(one_pass + (below + above) / 2 - quoted) < 0.002 and below < above
    assert abs((above - below) / 2 - half) < 0.002


@pytest.mark.parametrize("script, flags, why", [
    (toy_2d, "--chasm --methods CDM", "--tour and --chasm go neither"),
    (mnist, "", "MNIST cannot be read"),
    (mnist, "--width 10", "a multiple of 4"), (mnist, "--steps 0", "--steps, .* must be 1 or more"),
    (mnist, "--seed 99999999999999", "--seed must be"), (mnist, "--device foo", "--device foo: "),
    (mnist, "--device cuda:99", "error: --device cuda:99: "),
    (mnist, DIGITS + "--resume", "there is no file .*model.pt"),
    (mnist, DIGITS + "--out bad", "bad already holds a run: add --resume"),
    (mnist, DIGITS + "--weights bad/model.pt", "model.pt holds no model of mnist.py"),
    (mnist, DIGITS + "--weights mnist.pt", "mnist.pt .*was trained on another dataset"),
    (mnist, DIGITS + "--out mnist.pt/below", "below cannot be written"),
    (mnist, DIGITS + "--out mnist.pt --weights digits.pt", "mnist.pt cannot be written")])
def test_what_cannot_go_on_says_why_and_changes_no_file(script, flags, why, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "URL", "file:///nowhere/")
    for dataset in mnist.SIZE:
        config = dict(model="cdm", dataset=dataset, width=4)
        mnist.save(f"{dataset}.pt", config=config, model=mnist.build(config).state_dict())
    Path("bad").mkdir()
    Path("bad/model.pt").write_text("not a model", "utf-8")
    assert re.search(why, run(script, flags))
    assert [file.read_bytes() for file in tmp_path.rglob("model.pt")] == [b"not a model"]


def test_the_readme_names_files_and_flags_that_there_are():
    names = re.findall(r"\]\(([^)#]+)\)|([\w./-]+\.(?:py|png|pt|txt))\b", README)
    for name in {a or b for a, b in names}:
        assert name.startswith(("runs/", "http")) or (HERE / name).exists(), name
    for script in ("toy_2d", "mnist"):
        known = set(re.findall(r"--\w+", run(sys.modules[script], "-h")))
        commands = " ".join(re.findall(rf"python {script}\.py([^`#|\n]*)", README))
        used = set(re.findall(r"--[a-zA-Z][\w-]*", commands))
        assert used and used <= known, used - known


CODE = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", [block for block in CODE if "import torch" in block])
def test_an_example_in_the_readme_prints_what_it_says(block, capsys, monkeypatch):
    mnist_files = Path(os.environ.get("MNIST", HERE / "data/mnist"))
    if "data/mnist" in block and not mnist_files.exists():
        pytest.skip("needs MNIST")
    monkeypatch.chdir(HERE)
    exec(block.replace("2000)", "1000)").replace("data/mnist", str(mnist_files)), {})
    found, said = float(capsys.readouterr().out), float(re.search(r"print.*# (-?[\d.]+)", block)[1])
    assert abs(found - said) < 0.3


def test_other_code_in_the_readme_is_that_of_cdm():
    code = lambda line: re.sub(r"\s{2,}#.*", "", line.strip())
    lines = {code(line) for line in (HERE / "cdm.py").read_text("utf-8").splitlines()}
    for block in CODE:
        if "import torch" not in block:
            assert all(code(line) in lines for line in block.splitlines()), block
