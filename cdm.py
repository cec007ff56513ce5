"""Classification Diffusion Models (CDM): the whole method in one file.

Read this file top to bottom (15 minutes) with the paper beside it: Yadin, Elata, Michaeli,
"Classification Diffusion Models: Revitalizing Density Ratio Estimation", NeurIPS 2024.

A network sees a noisy sample and classifies how noisy it is. That is all it is trained for, yet
its logits l_t(x) hold a diffusion model and an exact likelihood:

    noise         x_t = alpha_t x_0 + sigma_t eps       t = 0 clean data, 1 .. T, T+1 pure N(0, I)
    classifier    softmax(l(x))_t = p(t | x)            t drawn uniformly from the T+2 levels
    theorem 3.2   log p_t(x)        = l_t(x) - l_{T+1}(x) + log N(x; 0, I)         one forward pass
    theorem 3.1   E[eps | x_t = x]  = sigma_t ( x - grad_x [l_t(x) - l_{T+1}(x)] )    one backward

Both are Bayes' rule: the logits give p_t / p_{T+1}, and p_{T+1} = N(0, I) is known. Names follow
the paper: x0, xt, eps, eps_hat (estimate of eps), x0_hat. Shapes: B rows, L = T + 2 levels, and
`...` for the axes of one sample, d numbers in all. Likelihoods are in nats unless said otherwise.

Not here: networks, data and training loops (toy_2d.py, mnist.py), learned variances.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- noise levels (paper, section 2)


class Schedule(NamedTuple):
    """Signal and noise scale of every level: two tensors (T+2,) from (1, 0) down to (0, 1)."""
    alpha: torch.Tensor
    sigma: torch.Tensor


def _schedule(T, inner):
    """Put the clean level 0 and the pure-noise level T+1 around the levels inner(t), t = 1 .. T."""
    if not isinstance(T, int) or T < 2:
        raise ValueError(f"a schedule needs an int T >= 2, got {T!r}")
    alpha, sigma = inner(torch.arange(1, T + 1, dtype=torch.float64))
    zero, one = alpha.new_zeros(1), alpha.new_ones(1)
    return Schedule(torch.cat([one, alpha, zero]), torch.cat([zero, sigma, one]))


def ddpm_schedule(T=1000):
    """Ho et al. 2020: beta from 1e-4 to 0.02 over 1000 steps, alpha_t^2 = product of (1 - beta).

    With T levels each step stands for 1000/T of theirs, so beta acts as a rate: its factor is
    (1 - beta)^(1000/T), which ends at alpha_T^2 = 4e-5 whatever T is."""
    def inner(t):
        beta = 1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)
        log_alpha2 = 1000 / T * torch.log1p(-beta).cumsum(0)
        return torch.exp(log_alpha2 / 2), torch.sqrt(-torch.expm1(log_alpha2))
    return _schedule(T, inner)


def uniform_schedule(T=1000):
    """sigma_t = t/(T+1), variance preserving; as TRE (Rhodes et al. 2020); "unif." in the paper."""
    return _schedule(T, lambda t: (torch.sqrt(1 - (t / (T + 1)) ** 2), t / (T + 1)))


def ot_schedule(T=1000):
    """The straight path of flow matching: alpha_t = 1 - t/(T+1), sigma_t = t/(T+1)."""
    return _schedule(T, lambda t: (1 - t / (T + 1), t / (T + 1)))


def log_snr_schedule(T=256, first=13.0, last=-8.0):
    """log(alpha_t^2 / sigma_t^2) falls linearly from `first` at t = 1 to `last` at t = T.

    Neighbours then overlap equally well at every noise level, which is what a classifier needs."""
    if not first > last:
        raise ValueError(f"log-SNR must fall: first {first} is not above last {last}")
    def inner(t):
        log_snr = first + (last - first) * (t - 1) / (T - 1)
        return torch.sqrt(torch.sigmoid(log_snr)), torch.sqrt(torch.sigmoid(-log_snr))
    return _schedule(T, inner)


def stratified_levels(B, low, high, device=None):
    """B sorted levels (B,) from low .. high. One uniform draw serves the batch, so that every level
    gets its fair share: less variance than independent draws. Rows must come in random order."""
    n = high - low + 1
    spread = (torch.arange(B, device=device) + torch.rand((), device=device)) / B * n
    return low + spread.long().clamp(max=n - 1)              # float32 can round the product up to n


def log_normal(x):
    """log N(x; 0, I) in nats: (B, ...) -> (B,)."""
    return -0.5 * (x * x + math.log(2 * math.pi)).flatten(1).sum(1)


# ------------------------------------------- what every diffusion model does, given predict_noise


class Loss(NamedTuple):
    """total is to be minimised; ce (nats) and mse (per number) are its parts, detached, or nan."""
    total: torch.Tensor
    ce: torch.Tensor
    mse: torch.Tensor


class Diffusion(nn.Module):
    """Noising, denoising and samplers: they need only predict_noise(xt, t), which a subclass gives.

    Wherever a level t is asked for, it is an int or a long tensor (B,); else ValueError."""

    y, guidance = None, 0.0                                                # see given(): no labels

    def __init__(self, net, schedule):
        super().__init__()
        alpha, sigma = schedule
        if alpha.dim() != 1 or alpha.shape != sigma.shape or len(alpha) < 4:
            raise ValueError("a schedule must be two 1-D tensors of one length T+2, T >= 2, "
                             f"got shapes {tuple(alpha.shape)} and {tuple(sigma.shape)}")
        log_snr = 2 * (alpha.double().log() - sigma.double().log())
        ends = (alpha[0], sigma[0], alpha[-1], sigma[-1])
        if ends != (1, 0, 0, 1) or not (log_snr.diff() < 0).all():
            raise ValueError("a schedule must fall in log-SNR from alpha, sigma = 1, 0 to 0, 1")
        self.net = net
        self.T = len(alpha) - 2
        self.schedule = Schedule(alpha.double().cpu(), sigma.double().cpu())
        self.register_buffer("alpha", alpha.float(), persistent=False)    # follow .to(device); MPS
        self.register_buffer("sigma", sigma.float(), persistent=False)    # has no float64

    def predict_noise(self, xt, t):
        """eps_hat = E[eps | x_t = xt]: (B, ...) -> (B, ...)."""
        raise NotImplementedError

    def given(self, y, guidance=0.0):
        """The same model of p(x given y), for the class labels y, long (B,), of the B rows to come.

        Its net takes labels as net(.., y=y), and to be called without them means "any class", which
        training teaches by dropping some. guidance w (Ho, Salimans 2022) overstates what the labels
        change: out(y) + w (out(y) - out()), for out the logits of a CDM or a DDM's eps_hat. -1: as
        without labels; 0: p(x given y); above 0: samples more typical of y, but no density. Costs
        two calls of the net unless w is 0. log_prob given a label that x does not have: only to be
        trusted with noise enough for such x to be likely. ValueError if y is not long (B,)."""
        if not isinstance(y, torch.Tensor) or y.dtype != torch.long or y.dim() != 1:
            raise ValueError(f"labels y must be a long tensor (B,), got {y!r}")
        model = copy.copy(self)                                     # shares weights, not y
        model.y, model.guidance = y, guidance
        return model

    def _net(self, *inputs, y=None):
        """The network's output, for the labels if any. ValueError if their number is off."""
        y = self.y if y is None else y
        if y is None:
            return self.net(*inputs)
        if len(y) != len(inputs[0]):
            raise ValueError(f"y must have a label for each of {len(inputs[0])} rows, got {len(y)}")
        out = self.net(*inputs, y=y)
        return out + self.guidance * (out - self.net(*inputs)) if self.guidance else out

    def _levels(self, t, x, low=0, high=None):
        """t as a long tensor (B,), after checking that it lies in low .. high (default T+1)."""
        high = self.T + 1 if high is None else high
        if isinstance(t, int) and low <= t <= high:
            return torch.full((len(x),), t, device=x.device, dtype=torch.long)
        if isinstance(t, torch.Tensor) and t.dtype == torch.long and t.shape == x.shape[:1]:
            if torch.compiler.is_compiling() or not ((t < low) | (t > high)).any():
                return t
        raise ValueError(f"level t must be an int or a long tensor ({len(x)},) with values "
                         f"{low} .. {high}, got {t!r}")

    def _scales(self, t, x):
        """alpha_t and sigma_t of each row, shaped (B, 1, ..) to multiply x."""
        tables = self.schedule if x.dtype == torch.float64 else (self.alpha, self.sigma)
        return [v.to(x)[t].reshape(-1, *[1] * (x.dim() - 1)) for v in tables]

    def _noised(self, x0, low, high):
        """What a training step shows: levels t (B,) from low .. high, eps, and xt. ValueError for a
        model with guidance, whose output is no density to be taught."""
        if self.guidance:
            raise ValueError("a model must be trained without guidance")
        t, eps = stratified_levels(len(x0), low, high, x0.device), torch.randn_like(x0)
        alpha, sigma = self._scales(t, x0)
        return t, eps, alpha * x0 + sigma * eps

    def add_noise(self, x0, t, eps):
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self._scales(self._levels(t, x0), x0)
        return alpha * x0 + sigma * eps

    def denoise(self, xt, t):
        """x0_hat = E[x_0 | x_t = xt] = (xt - sigma_t eps_hat) / alpha_t; t in 0 .. T."""
        t = self._levels(t, xt, high=self.T)                   # at T+1 no signal is left: alpha = 0
        alpha, sigma = self._scales(t, xt)
        return (xt - sigma * self.predict_noise(xt, t)) / alpha

    # -------------------------------------------------------------------------------- samplers

    @torch.no_grad()
    def sample(self, shape, steps=50, method="ddim", xT=None):
        """Draw samples of the given shape (B, ...) with exactly `steps` calls of predict_noise.

        method: "ddpm" (ancestral, Ho et al. 2020), "ddim" (deterministic, Song et al. 2021) or
        "dpm" (DPM-Solver++ 2M, Lu et al. 2022). xT: the starting noise in place of a fresh N(0, I)
        draw; it then sets shape, device and dtype. Each step goes from a level t to any lower level
        s, so every number of steps from 1 to T is right. ValueError for others."""
        if method not in ("ddpm", "ddim", "dpm"):
            raise ValueError(f"method must be 'ddpm', 'ddim' or 'dpm', got {method!r}")
        if not isinstance(steps, int) or not 1 <= steps <= self.T:
            raise ValueError(f"steps must be an int in 1 .. T = {self.T}, got {steps!r}")
        if xT is None:
            xT = torch.randn(shape, device=self.alpha.device, dtype=self.alpha.dtype)
        x, alpha, sigma = xT, self.schedule.alpha.tolist(), self.schedule.sigma.tolist()
        levels = [self.T - i * self.T // steps for i in range(steps + 1)]               # T .. 0
        last_x0, last_h = None, None
        for t, s in zip(levels, levels[1:]):
            eps_hat = self.predict_noise(x, t)
            x0_hat = (x - sigma[t] * eps_hat) / alpha[t]
            if method == "dpm":            # x0_hat as a straight line in log(alpha/sigma), solved
                h = math.log(alpha[s] * sigma[t] / (sigma[s] * alpha[t])) if s else math.inf
                bend = h / (2 * last_h) * (x0_hat - last_x0) if s and last_h else 0
                reach = alpha[s] - alpha[t] * sigma[s] / sigma[t]
                x = sigma[s] / sigma[t] * x + reach * (x0_hat + bend)
                last_x0, last_h = x0_hat, h
            else:                          # DDPM is DDIM with part of its eps_hat drawn afresh
                fresh = sigma[t] ** 2 - (alpha[t] / alpha[s] * sigma[s]) ** 2    # var of x_t | x_s
                variance = fresh * (sigma[s] / sigma[t]) ** 2 if method == "ddpm" else 0.0
                x = alpha[s] * x0_hat + math.sqrt(max(0, sigma[s] ** 2 - variance)) * eps_hat
                if variance:
                    x = x + math.sqrt(variance) * torch.randn_like(x)
        return x


# --------------------------------------------------------------- the two families, side by side


class DDM(Diffusion):
    """A denoising diffusion model: net(xt, t) -> eps_hat (B, ...) is told the level t."""

    def predict_noise(self, xt, t):
        return self._net(xt, self._levels(t, xt))

    def loss(self, x0, y=None):
        """The DDPM loss: mean squared error of eps_hat at stratified levels 1 .. T; labels y."""
        t, eps, xt = self._noised(x0, 1, self.T)
        mse = F.mse_loss(self._net(xt, t, y=y), eps)
        return Loss(mse, torch.full_like(mse, math.nan), mse.detach())


class CDM(Diffusion):
    """A classification diffusion model: net(x) -> logits (B, T+2). To guess t is the net's task.

    net: a module or any callable, so an exact classifier can stand in. Rows must not influence each
    other (no BatchNorm), and the second derivative must not vanish (SiLU, not ReLU).

    A density ratio needs two logits of each row, not T+2. A net with an attribute picks_levels =
    True saves the rest: called as net(x, levels, every), levels (B, n), it gives logits (B, n). In
    training, every is True and it gives these and, with x held fixed, all (B, T+2): cross-entropy
    does not differentiate in x, and second derivatives of T+2 logits would double a step's time."""

    def logits(self, x, y=None):
        """l(x): (B, ...) -> (B, T+2). ValueError if the network's output has another shape."""
        return self._checked(self._net(x, y=y), len(x), self.T + 2)

    def _checked(self, logits, *shape):
        if logits.shape != shape:
            raise ValueError(f"net must give logits of shape {shape}, T+2 levels unless it picks, "
                             f"got {tuple(logits.shape)}")
        return logits

    def _log_ratio(self, x, t, y=None, every=False):
        """log p_t(x) / p_{T+1}(x) = l_t(x) - l_{T+1}(x), nats (B,): Bayes' rule, t being uniform.
        Beside it the logits: l(x) if `every` level is asked for, else those at hand."""
        pair = torch.stack([t, torch.full_like(t, self.T + 1)], 1)                        # (B, 2)
        if getattr(self.net, "picks_levels", False):
            picked = self._net(x, pair, every, y=y)
            two, logits = picked if every else (picked, picked)
            self._checked(two, len(x), 2)
        else:
            logits = self.logits(x, y)
            two = logits.gather(1, pair)
        return two[:, 0] - two[:, 1], logits

    def log_prob(self, x, t=0):
        """Theorem 3.2: log p_t(x), nats (B,), from one forward pass. t = 0 is the data density."""
        log_ratio, _ = self._log_ratio(x, self._levels(t, x))
        return log_ratio + log_normal(x)                                       # p_{T+1} = N(0, I)

    def _ratio_and_noise(self, xt, t, y=None, every=False):
        """Theorem 3.1, the one place where the classifier is differentiated: log-ratio, eps_hat and
        logits. With E[eps | x_t] = -sigma_t grad log p_t (Tweedie), p_t = ratio times N(0, I).

        vjp rather than autograd.grad: it can be compiled, it stays differentiable in the weights
        (training), and under no_grad it keeps no graph of them (sampling)."""
        log_ratio, pull, logits = torch.func.vjp(lambda x: self._log_ratio(x, t, y, every), xt,
                                                 has_aux=True)                              # (B,)
        (grad,) = pull(torch.ones_like(log_ratio))    # (B, ...) one pass: rows are independent
        _, sigma = self._scales(t, xt)                                                # (B, 1, ..)
        return log_ratio, sigma * (xt - grad), logits                                     # (B, ...)

    def predict_noise(self, xt, t):
        """Theorem 3.1: eps_hat = sigma_t (xt - grad_x [l_t(xt) - l_{T+1}(xt)])."""
        return self._ratio_and_noise(xt, self._levels(t, xt))[1]

    def loss(self, x0, y=None, w_ce=1.0, w_mse=1.0):
        """w_ce CE(l(x_t), t) + w_mse MSE(eps_hat, eps) at stratified levels t = 0 .. T+1.

        x0 (B, ...), and where the net takes class labels y (B,), some of them dropped.
        CE alone has no signal where levels are told apart with certainty, so gradients drift there.
        MSE teaches the gradients, but leaves each level's constant free. Together they fix both.
        w_ce = 1 is right in 2-D; from 64 dimensions on the MSE must lead (w_ce about 0.001)."""
        t, eps, xt = self._noised(x0, 0, self.T + 1)
        if w_mse:
            _, eps_hat, logits = self._ratio_and_noise(xt, t, y, every=True)
            mse = F.mse_loss(eps_hat, eps)
        else:                                                  # CE only: no gradient in x is needed
            logits, mse = self.logits(xt, y), torch.full((), math.nan).to(xt)
        ce = F.cross_entropy(logits, t)
        total = w_ce * ce + w_mse * mse if w_mse else w_ce * ce
        return Loss(total, ce.detach(), mse.detach())


# ------------------------------------------------------- audits: can the likelihood be believed?
#
# The densities that a classifier short of the optimum states need not integrate to 1. Check them.


@torch.no_grad()
def rung_log_z(model, x0):
    """log E_{x ~ p_{t+1}} [exp(l_t(x) - l_{t+1}(x))] of a CDM, t = 0 .. T: (T+1,), zeros if exact.

    Each rung of the ladder from noise to data is a density ratio p_t / p_{t+1}, and so must average
    to 1; where it does not, the classifier's constants are off. x0 (B, ...) is held-out data."""
    rungs = []
    for t in range(model.T + 1):
        logits = model.logits(model.add_noise(x0, t + 1, torch.randn_like(x0)))
        rungs.append(torch.logsumexp(logits[:, t] - logits[:, t + 1], 0) - math.log(len(x0)))
    return torch.stack(rungs)


@torch.no_grad()
def elbo(model, x0, draws=4):
    """Lower bound on E[log p_1(x_1) given x_0], nats (B,), from `draws` random levels per row.

    -bound = KL(q(x_T|x_0) || N(0, I)) + 1/2 int E||eps - eps_hat||^2 dlog-SNR + entropy of
    q(x_1|x_0) (Kingma et al. 2021), the integral over levels 1 .. T by the trapezoid rule. It uses
    the denoiser alone: loose by its error, and blind to the constants that rung_log_z checks. The
    rule errs, to either side, where levels are over 1 apart in log-SNR. ValueError if draws < 1."""
    if draws < 1:
        raise ValueError(f"draws must be 1 or more, got {draws!r}")
    alpha, sigma = (v[1:-1].to(x0.dtype) for v in model.schedule)                         # (T,)
    log_snr, d = 2 * (alpha / sigma).log(), x0[0].numel()
    left, right = log_snr[:1], log_snr[-1:]
    width = (torch.cat([left, log_snr[:-1]]) - torch.cat([log_snr[1:], right])) / 2
    weight, integral = (width / 2).to(x0), 0
    for _ in range(draws):
        t = stratified_levels(len(x0), 1, model.T, x0.device)
        t = t[torch.randperm(len(t), device=t.device)]
        eps = torch.randn_like(x0)
        error = eps - model.predict_noise(model.add_noise(x0, t, eps), t)
        integral = integral + model.T / draws * weight[t - 1] * error.square().flatten(1).sum(1)
    var1, varT = float(sigma[0]) ** 2, float(sigma[-1]) ** 2
    mean2 = float(alpha[-1]) ** 2 * x0.square().flatten(1).sum(1)
    prior = 0.5 * (mean2 + d * (varT - 1 - math.log(varT)))              # KL(q(x_T|x_0) || N(0, I))
    return -(integral + prior + 0.5 * d * math.log(2 * math.pi * math.e * var1))


@torch.no_grad()
def ode_log_prob(model, x, t=1, steps=None, probes=0):
    """log p_t(x), nats (B,), by the probability-flow ODE from level t (1 .. T-1) to level T.

    In y = x/alpha and tau = sigma/alpha the flow is dy/dtau = eps_hat, and log p changes by its
    divergence (Song et al. 2021). Heun's method on `steps` intervals between levels (default: all),
    two predict_noise calls each. probes = 0: exact trace, d backward passes per call; probes = n:
    Hutchinson's unbiased estimate from n random sign vectors. ValueError for other t or steps."""
    if not isinstance(t, int) or not 1 <= t < model.T:
        raise ValueError(f"t must be an int level in 1 .. T-1 = {model.T - 1}, got {t!r}")
    steps = model.T - t if steps is None else steps
    if not isinstance(steps, int) or not 1 <= steps <= model.T - t:
        raise ValueError(f"steps must be an int in 1 .. T - t = {model.T - t}, got {steps!r}")
    if probes < 0:
        raise ValueError(f"probes must be 0 (exact trace) or more, got {probes!r}")
    alpha, sigma, d = model.schedule.alpha.tolist(), model.schedule.sigma.tolist(), x[0].numel()
    if probes:
        vectors = torch.randint(0, 2, (probes, *x.shape), device=x.device).to(x) * 2 - 1
    else:
        vectors = torch.eye(d).to(x).reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)

    def flow(y, level):
        """dy/dtau, and its divergence as dlogp/dlog(tau)."""
        eps_hat, pull = torch.func.vjp(lambda x: model.predict_noise(x, level), alpha[level] * y)
        trace = sum((v * pull(v)[0]).flatten(1).sum(1) for v in vectors) / max(probes, 1)
        return eps_hat, sigma[level] * trace

    levels = [t + i * (model.T - t) // steps for i in range(steps + 1)]
    y, gained = x / alpha[t], 0
    for a, b in zip(levels, levels[1:]):
        tau_a, tau_b = sigma[a] / alpha[a], sigma[b] / alpha[b]
        slope_a, trace_a = flow(y, a)
        slope_b, trace_b = flow(y + (tau_b - tau_a) * slope_a, b)
        y = y + (tau_b - tau_a) * (slope_a + slope_b) / 2
        gained = gained + math.log(tau_b / tau_a) * (trace_a + trace_b) / 2
    return log_normal(alpha[model.T] * y) + d * math.log(alpha[model.T] / alpha[t]) + gained


@torch.no_grad()
def annealed_log_z(model, x, forward=True, moves=1):
    """Log-weights w, nats (B,), whose averages bracket log Z_1 = log int p_1(x) dx of a CDM, which
    is 0 if p_1 is normalised: annealed importance sampling (Neal 2001) through all levels.

    forward: x (B, ...), drawn from N(0, I), goes down to level 1. E[exp w] = Z_1: E[w] <= log Z_1.
    Else x, data at level 1, goes up. As far as data follow p_1, E[exp -w] = 1/Z_1: E[w] >= log Z_1.
    Between levels x takes DDPM's step, down, or the noising's, up: if it stood still there, the
    many directions that are mere noise would cost thousands of levels. At each level: `moves` MALA
    moves under p_t. ValueError if moves < 0 or the model is no CDM."""
    if moves < 0 or not hasattr(model, "log_prob"):
        raise ValueError(f"annealing takes a CDM and moves >= 0, got {type(model)}, {moves!r}")
    alpha, sigma = model.schedule.alpha.tolist(), model.schedule.sigma.tolist()

    def at(x, t):                                                        # log p_t and its gradient
        log_ratio, eps_hat, _ = model._ratio_and_noise(x, model._levels(t, x))
        return log_ratio + log_normal(x), -eps_hat / sigma[t]

    def log_step(z, std):                                                     # log N(z; 0, std^2)
        return log_normal(z / std) - z[0].numel() * math.log(std)

    levels = range(model.T, 0, -1) if forward else range(1, model.T + 1)
    log_p, grad = at(x, levels[0])
    w = log_p - log_normal(x) if forward else torch.zeros_like(log_p)
    for t, following in zip(levels, [*levels[1:], None]):
        for _ in range(moves):             # a Langevin step, accepted so that it keeps p_t as it is
            step, noise = 0.5 * sigma[t], torch.randn_like(x)
            new = x + step ** 2 / 2 * grad + step * noise
            new_log_p, new_grad = at(new, t)
            back = (x - new - step ** 2 / 2 * new_grad) / step
            gain = new_log_p - log_p + log_normal(back) - log_normal(noise)
            accept = torch.rand_like(gain).log() < gain
            rows = accept.view(-1, *[1] * (x.dim() - 1))
            x, grad = torch.where(rows, new, x), torch.where(rows, new_grad, grad)
            log_p = torch.where(accept, new_log_p, log_p)
        if following is None:
            return w if forward else w + log_p - log_normal(x)
        low, high = sorted((t, following))
        carry = alpha[high] / alpha[low]
        fresh = math.sqrt(sigma[high] ** 2 - (carry * sigma[low]) ** 2)  # std of x_high given x_low
        std = fresh * sigma[low] / sigma[high]                      # of DDPM's x_low given x_high
        mean, std_new = ((x + fresh ** 2 * grad) / carry, std) if forward else (carry * x, fresh)
        new = mean + std_new * torch.randn_like(x)
        new_log_p, new_grad = at(new, following)
        here, there = (x, log_p, grad), (new, new_log_p, new_grad)
        (xh, log_ph, gradh), (xl, log_pl, _) = (here, there) if forward else (there, here)
        w = w + log_pl + log_step(xh - carry * xl, fresh)
        w = w - log_ph - log_step(xl - (xh + fresh ** 2 * gradh) / carry, std)
        x, log_p, grad = there


@torch.no_grad()
def bits_per_dim(model, images, by="one_pass", **options):
    """Upper bound on -log2 P(k)/d, bits/dim (B,), of 8-bit images k (uint8, (B, ...)).

    Pixels on a lattice have no density, so the bound goes through level 1, a slightly noisy x_1:
        -log P(k) <= E[ log q(x_1|k) - log p_1(x_1) - log P(k|x_1) ]
    with P(k|x_1) a softmax over the 256 grey values, pixel by pixel. It is tight when sigma_1 is at
    most a sixth of a grey step (log-SNR 13). Grey value k stands at x_0 = (2k+1)/256 - 1.
    by: where log p_1 comes from, "one_pass" (theorem 3.2; CDM only), "elbo" or "ode" (`options` go
    to that function). ValueError for anything else, or images that are not uint8."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 with values 0 .. 255, got {images.dtype}")
    if by not in ("elbo", "ode") and not (by == "one_pass" and hasattr(model, "log_prob")):
        raise ValueError(f"by must be 'one_pass' (CDM only), 'elbo' or 'ode', got {by!r}")
    alpha, sigma = float(model.schedule.alpha[1]), float(model.schedule.sigma[1])
    d = images[0].numel()
    grey = ((2 * torch.arange(256, device=images.device) + 1) / 256 - 1).to(model.alpha)
    x0 = grey[images.long()]
    eps = torch.randn_like(x0)
    x1 = alpha * x0 + sigma * eps
    fit = -((x1.flatten()[:, None] - alpha * grey) / sigma).square() / 2               # (B d, 256)
    log_k = -F.cross_entropy(fit, images.long().flatten(), reduction="none").view(len(x0), d)
    if by == "elbo":                                     # it averages over eps, and so must log q
        log_q = -0.5 * d * math.log(2 * math.pi * math.e * sigma ** 2)
        log_p1 = elbo(model, x0, **options)
    else:
        log_q = log_normal(eps) - d * math.log(sigma)
        one_pass = by == "one_pass"
        log_p1 = model.log_prob(x1, 1) if one_pass else ode_log_prob(model, x1, 1, **options)
    return (log_q - log_p1 - log_k.sum(1)) / (d * math.log(2))
