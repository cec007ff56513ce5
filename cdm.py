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
the paper: x0, xt, eps, eps_hat (estimate of eps), x0_hat. Shapes: B rows, n levels asked for, and
`...` for the axes of one sample, d numbers in all. Likelihoods are in nats unless said otherwise.

Not here: networks, data and training loops (toy_2d.py, mnist.py), learned variances.
"""

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
    With T levels each stands for 1000/T steps, so that alpha_T^2 = 4e-5 whatever T is."""
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
    """log(alpha_t^2 / sigma_t^2) falls linearly from `first` at t = 1 to `last` at t = T, so that
    neighbours overlap equally well at every noise level, which is what a classifier needs."""
    if not first > last:
        raise ValueError(f"log-SNR must fall: first {first} is not above last {last}")
    def inner(t):
        log_snr = first + (last - first) * (t - 1) / (T - 1)
        return torch.sqrt(torch.sigmoid(log_snr)), torch.sqrt(torch.sigmoid(-log_snr))
    return _schedule(T, inner)


def stratified_levels(B, low, high, device=None):
    """B sorted levels (B,) from low .. high; one random number serves all, so that every level gets
    its fair share: less variance than independent draws. Rows must come in random order."""
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

    y, guidance = None, 0.0                                          # class labels: see given()

    def __init__(self, net, schedule):
        super().__init__()
        alpha, sigma = (v.double().cpu() for v in schedule)
        if not (alpha.dim() == 1 and alpha.shape == sigma.shape and len(alpha) >= 4
                and (alpha[0], sigma[0], alpha[-1], sigma[-1]) == (1, 0, 0, 1)
                and ((alpha / sigma).diff() < 0).all()):
            raise ValueError("a schedule must be two tensors (T+2,), T >= 2, that fall in log-SNR "
                             f"from alpha, sigma = 1, 0 to 0, 1; got {schedule}")
        self.net, self.T, self.schedule = net, len(alpha) - 2, Schedule(alpha, sigma)
        self.register_buffer("alpha", alpha.float(), persistent=False)    # follow .to(device); MPS
        self.register_buffer("sigma", sigma.float(), persistent=False)    # has no float64

    def predict_noise(self, xt, t):
        """eps_hat = E[eps | x_t = xt]: (B, ...) -> (B, ...)."""
        raise NotImplementedError

    def add_noise(self, x0, t, eps):
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self._scales(self._levels(t, x0), x0)
        return alpha * x0 + sigma * eps

    def denoise(self, xt, t):
        """x0_hat = E[x_0 | x_t = xt] = (xt - sigma_t eps_hat) / alpha_t; t in 0 .. T."""
        t = self._levels(t, xt, self.T)                        # at T+1 no signal is left: alpha = 0
        alpha, sigma = self._scales(t, xt)
        return (xt - sigma * self.predict_noise(xt, t)) / alpha

    def _levels(self, t, x, highest=None):
        """t as a long tensor (B,), after checking that it lies in 0 .. highest (default T+1)."""
        highest = self.T + 1 if highest is None else highest
        if isinstance(t, int) and 0 <= t <= highest:
            return torch.full((len(x),), t, device=x.device, dtype=torch.long)
        if (isinstance(t, torch.Tensor) and t.dtype == torch.long and t.shape == x.shape[:1]
                and not ((t < 0) | (t > highest)).any()):
            return t
        raise ValueError(f"level t must be an int or a long tensor ({len(x)},) with values "
                         f"0 .. {highest}, got {t!r}")

    def _scales(self, t, x):
        """alpha_t and sigma_t of each row, shaped (B, 1, ..) to multiply x."""
        tables = self.schedule if x.dtype == torch.float64 else (self.alpha, self.sigma)
        return [v.to(x)[t].reshape(-1, *[1] * (x.dim() - 1)) for v in tables]

    def loss(self, x0, window=None, **weights):
        """The training loss of clean data x0 (B, ...) at random levels. Only `draw` is random, so
        that `loss_at` can be compiled to the same numbers."""
        drawn = self.draw(x0) if window is None else self.draw(x0, window)
        return self.loss_at(*drawn, **weights)

    @torch.no_grad()
    def sample(self, shape, steps=50, method="ddim", xT=None):
        """Draw samples of the given shape (B, ...) with exactly `steps` calls of predict_noise.

        method: "ddpm" (ancestral, Ho et al. 2020), "ddim" (deterministic, Song et al. 2021) or
        "dpm" (DPM-Solver++ 2M, Lu et al. 2022). xT: the starting noise in place of a fresh N(0, I)
        draw; it then sets shape, device and dtype. Every number of steps from 1 to T is right, as a
        step goes from a level t to any lower one, s. ValueError for others."""
        if method not in ("ddpm", "ddim", "dpm"):
            raise ValueError(f"method must be 'ddpm', 'ddim' or 'dpm', got {method!r}")
        if not isinstance(steps, int) or not 1 <= steps <= self.T:
            raise ValueError(f"steps must be an int in 1 .. T = {self.T}, got {steps!r}")
        if xT is None:
            xT = torch.randn(shape, device=self.alpha.device, dtype=self.alpha.dtype)
        x, alpha, sigma = xT, *(v.tolist() for v in self.schedule)
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

    def given(self, y, guidance=0.0):
        """The same model of p(x given y), for the class labels y, long (B,), of the B rows to come.

        The net is called as net(.., y=y), and without y for "any class". guidance w (Ho, Salimans
        2022) overstates what labels change in its output, out(y) + w (out(y) - out()): 0 is p(x
        given y), more is more typical of y, but no density. ValueError if y is not long (B,)."""
        if not isinstance(y, torch.Tensor) or y.dtype != torch.long or y.dim() != 1:
            raise ValueError(f"labels y must be a long tensor (B,), got {y!r}")
        model = object.__new__(type(self))                   # shares everything but y and guidance
        model.__dict__.update(self.__dict__, y=y, guidance=guidance)
        return model

    def _net(self, *inputs):
        """The network's output, for the labels if any. ValueError if their number is off."""
        if self.y is None:
            return self.net(*inputs)
        if len(self.y) != len(inputs[0]):
            raise ValueError(f"labels y must be {len(inputs[0])}, one a row, got {len(self.y)}")
        out = self.net(*inputs, y=self.y)
        return out + self.guidance * (out - self.net(*inputs)) if self.guidance else out

    def _noised(self, x0, low, high):
        """What a training step sees: xt, eps and levels t (B,), stratified over low .. high.
        ValueError for a guided model: it is no density to be taught."""
        if self.guidance:
            raise ValueError("a model must be trained without guidance")
        t, eps = stratified_levels(len(x0), low, high, x0.device), torch.randn_like(x0)
        alpha, sigma = self._scales(t, x0)
        return alpha * x0 + sigma * eps, eps, t

    @staticmethod
    def _errors(eps_hat, eps, t, w_mse):
        """The mean squared error, and the same times w_mse, a number or one a level (T+2,)."""
        error = (eps_hat - eps).square().flatten(1).mean(1)                                 # (B,)
        weight = w_mse[t] if isinstance(w_mse, torch.Tensor) else w_mse
        return error.mean().detach(), (weight * error).mean()


# --------------------------------------------------------------- the two families, side by side


class DDM(Diffusion):
    """A denoising diffusion model: net(xt, t) -> eps_hat (B, ...) is told the level t."""

    def predict_noise(self, xt, t):
        return self._net(xt, self._levels(t, xt))

    def draw(self, x0):
        """xt, eps and levels t (B,) of one training step, t stratified over 1 .. T."""
        return self._noised(x0, 1, self.T)

    def loss_at(self, xt, eps, t, w_mse=1.0):
        """The DDPM loss, MSE(eps_hat, eps), weighted as in CDM.loss_at."""
        mse, total = self._errors(self._net(xt, t), eps, t, w_mse)
        return Loss(total, torch.full_like(mse, math.nan), mse)


class CDM(Diffusion):
    """A classification diffusion model: to guess the level is the net's task.

    net, any callable (an exact classifier can stand in), is of one of two kinds:
        net(x) -> logits (B, T+2) of all levels at once, as in the paper;
        net(x, levels) -> log p_t(x) / p_{T+1}(x) at the levels t it is asked for, (B, n) -> (B, n),
        and has an attribute takes_levels = True. To know which question it answers is not to know
        the answer: nobody labels x, so it is as much a classifier.
    Rows must not influence each other (no BatchNorm), and the second derivative must not vanish
    (SiLU, not ReLU)."""

    def log_ratio(self, x, levels):
        """log p_t(x) / p_{T+1}(x) = l_t(x) - l_{T+1}(x), nats, at levels t: (B, n) -> (B, n).

        Bayes' rule, t being uniform; the one place that knows of which kind the network is.
        ValueError if its output has another shape."""
        asked = getattr(self.net, "takes_levels", False)
        out = self._net(x, levels) if asked else self._net(x)
        shape = levels.shape if asked else (len(x), self.T + 2)
        if out.shape != shape:
            raise ValueError(f"net must give logits {tuple(shape)}, got {tuple(out.shape)}")
        return out if asked else out.gather(1, levels) - out[:, -1:]

    def log_prob(self, x, t=0):
        """Theorem 3.2: log p_t(x), nats (B,), from one forward pass. t = 0 is the data density."""
        log_ratio = self.log_ratio(x, self._levels(t, x)[:, None])[:, 0]
        return log_ratio + log_normal(x)                                       # p_{T+1} = N(0, I)

    def ratio_and_noise(self, xt, levels, which=None):
        """Theorem 3.1, the one place where the classifier is differentiated: the log-ratios at
        levels (B, n), and eps_hat at one of them, with the index `which` (B,) or the first.

        E[eps | x_t] = -sigma_t grad log p_t (Tweedie), p_t = ratio times N(0, I), and the gradient
        of log N(x; 0, I) is -x. vjp, unlike autograd.grad, can be compiled; it stays differentiable
        in the weights (training), and under no_grad it keeps no graph of them (sampling)."""
        which = torch.zeros_like(levels[:, 0]) if which is None else which
        log_ratio, pull = torch.func.vjp(lambda x: self.log_ratio(x, levels), xt)         # (B, n)
        one = F.one_hot(which, levels.shape[1]).to(log_ratio)
        (grad,) = pull(one)                  # (B, ...) in one backward pass: rows are independent
        _, sigma = self._scales(levels.gather(1, which[:, None])[:, 0], xt)               # (B, 1..)
        return log_ratio, sigma * (xt - grad)                                              # (B, ..)

    def predict_noise(self, xt, t):
        """Theorem 3.1: eps_hat = sigma_t (xt - grad_x [l_t(xt) - l_{T+1}(xt)])."""
        return self.ratio_and_noise(xt, self._levels(t, xt)[:, None])[1]

    def draw(self, x0, window=None):
        """One training step's xt, eps, levels (B, K), and which (B,): the index of the true level.

        The true levels are stratified over 0 .. T+1. `levels` are all T+2 or, with window = K, K
        neighbours that hold the true one at a random place; some may lie outside of 0 .. T+1.
        Given such a window, the posterior over it is the softmax of its logits alone (McFadden
        1978), so the step costs the same whatever T. ValueError for K not in 2 .. T+2."""
        K = self.T + 2 if window is None else window
        if not isinstance(K, int) or not 2 <= K <= self.T + 2:
            raise ValueError(f"window must be an int in 2 .. T+2 = {self.T + 2}, got {window!r}")
        xt, eps, t = self._noised(x0, 0, self.T + 1)
        which = t if window is None else torch.randint(0, K, t.shape, device=t.device)
        levels = (t - which)[:, None] + torch.arange(K, device=t.device)                  # (B, K)
        return xt, eps, levels, which

    def loss_at(self, xt, eps, levels, which, w_ce=1.0, w_mse=1.0):
        """w_ce CE(l(x_t), t) + w_mse MSE(eps_hat, eps) at what `draw` gave.

        CE alone has no signal where levels are told apart with certainty, so gradients drift there.
        MSE teaches the gradients, but leaves each level's constant free, and teaches nothing at
        t = 0 and T+1, where no weight moves eps_hat. Together they fix all. w_ce = 1 is right in
        2-D; from 64 dimensions on the MSE must lead. w_mse: a number, or one a level (T+2,)."""
        inside = (levels >= 0) & (levels <= self.T + 1)
        levels = levels.clamp(0, self.T + 1)
        if isinstance(w_mse, torch.Tensor) or w_mse:
            log_ratio, eps_hat = self.ratio_and_noise(xt, levels, which)
            t = levels.gather(1, which[:, None])[:, 0]
            mse, total = self._errors(eps_hat, eps, t, w_mse)
        else:                                                  # CE only: no gradient in x is needed
            log_ratio, mse, total = self.log_ratio(xt, levels), torch.full((), math.nan).to(xt), 0
        ce = F.cross_entropy(log_ratio.masked_fill(~inside, -math.inf), which)
        return Loss(total + w_ce * ce, ce.detach(), mse)


# ------------------------------------------------------- audits: can the likelihood be believed?
#
# The density that a classifier short of the optimum states need not integrate to 1. Check it.


@torch.no_grad()
def elbo(model, x0, draws=4):
    """Lower bound on E[log p_1(x_1) given x_0], nats (B,), from `draws` random levels per row.

    -bound = KL(q(x_T|x_0) || N(0, I)) + 1/2 int E||eps - eps_hat||^2 dlog-SNR + entropy of
    q(x_1|x_0) (Kingma et al. 2021), the integral by the trapezoid rule, levels at most 1 apart. A
    row's levels are stratified: draws = T takes each once. It uses the denoiser alone: loose by its
    error, and blind to the constants. ValueError if there are no draws or no rows."""
    if draws < 1 or not len(x0):
        raise ValueError(f"draws and rows must be 1 or more, got {draws!r} and {len(x0)}")
    alpha, sigma = (v[1:-1].to(x0.dtype) for v in model.schedule)                         # (T,)
    log_snr, d = 2 * (alpha / sigma).log(), x0[0].numel()
    width = (torch.cat([log_snr[:1], log_snr[:-1]]) - torch.cat([log_snr[1:], log_snr[-1:]])) / 2
    weight, integral = width.to(x0) / 2, 0
    start = (torch.randperm(len(x0)) + torch.rand(len(x0))).to(x0.device) / len(x0)   # in 0 .. 1
    for i in range(draws):
        t = 1 + ((i + start) / draws * model.T).long().clamp(max=model.T - 1)
        eps = torch.randn_like(x0)
        error = eps - model.predict_noise(model.add_noise(x0, t, eps), t)
        integral = integral + model.T / draws * weight[t - 1] * error.square().flatten(1).sum(1)
    var1, varT = float(sigma[0]) ** 2, float(sigma[-1]) ** 2
    mean2 = float(alpha[-1]) ** 2 * x0.square().flatten(1).sum(1)
    prior = 0.5 * (mean2 + d * (varT - 1 - math.log(varT)))              # KL(q(x_T|x_0) || N(0, I))
    return -(integral + prior + 0.5 * d * math.log(2 * math.pi * math.e * var1))


@torch.no_grad()
def ode_log_prob(model, x, t=1, probes=0):
    """log p_t(x), nats (B,), by the probability-flow ODE from level t (1 .. T-1) to level T.

    In y = x/alpha and tau = sigma/alpha the flow is dy/dtau = eps_hat, and log p changes by its
    divergence (Song et al. 2021). Heun's method from level to level, two predict_noise calls each.
    probes = 0: exact trace, d backward passes a call; probes = n: Hutchinson's unbiased estimate
    from n random sign vectors. ValueError for other t or probes."""
    if not isinstance(t, int) or not 1 <= t < model.T or probes < 0 or not len(x):
        raise ValueError(f"t must be an int in 1 .. T-1 = {model.T - 1}, probes 0 or more, rows 1 "
                         f"or more, got {t!r}, {probes!r}, {len(x)}")
    alpha, sigma, d = *(v.tolist() for v in model.schedule), x[0].numel()
    if probes:
        vectors = torch.randint(0, 2, (probes, *x.shape), device=x.device).to(x) * 2 - 1
    else:
        vectors = torch.eye(d).to(x).reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)

    def flow(y, t):
        """dy/dtau, and its divergence as dlogp/dlog(tau)."""
        eps_hat, pull = torch.func.vjp(lambda x: model.predict_noise(x, t), alpha[t] * y)
        trace = sum((v * pull(v)[0]).flatten(1).sum(1) for v in vectors) / max(probes, 1)
        return eps_hat, sigma[t] * trace

    y, gained = x / alpha[t], 0
    for s in range(t, model.T):
        tau, tau_next = sigma[s] / alpha[s], sigma[s + 1] / alpha[s + 1]
        slope, trace = flow(y, s)
        slope_next, trace_next = flow(y + (tau_next - tau) * slope, s + 1)
        y = y + (tau_next - tau) * (slope + slope_next) / 2
        gained = gained + math.log(tau_next / tau) * (trace + trace_next) / 2
    return log_normal(alpha[model.T] * y) + d * math.log(alpha[model.T] / alpha[t]) + gained


@torch.no_grad()
def annealed_log_z(model, x1):
    """log Z_1 = log int p_1(x) dx of a CDM, 0 if its p_1 is normalised, as four floats in nats:
    value, standard error, and a bracket of it from below and from above.

    Annealed importance sampling (Neal 2001) both ways between N(0, I) and x1 (n, ...), data at
    level 1: n chains take the model's DDPM steps down, n are noised up from x1. Log-weights w: how
    much likelier a path is as one of p_1 noised up than as one of N(0, I) stepped down. Down,
    E[exp w] = Z, so mean w lies below log Z; up, as far as data follow p_1, E[exp -w] = 1/Z, and
    above. More levels narrow the gap. Bennett's acceptance ratio (1976) joins both with least
    variance; if 3 chains or fewer overlap, half of the bracket is the error. ValueError: no CDM, or
    n < 2."""
    if not hasattr(model, "log_prob") or len(x1) < 2:
        raise ValueError(f"log Z needs a CDM and two samples or more, got {type(model)}, {len(x1)}")
    alpha, sigma, d = *(v.tolist() for v in model.schedule), x1[0].numel()

    def at(x, t):
        """log p_t(x) and its gradient."""
        ratio, eps_hat = model.ratio_and_noise(x, model._levels(t, x)[:, None])
        return ratio[:, 0] + log_normal(x), -eps_hat / sigma[t]

    def log_weights(x, levels, down):
        log_p, grad = at(x, levels[0])
        w = log_p - log_normal(x) if down else 0
        for t, s in zip(levels, levels[1:]):
            low, high = min(t, s), max(t, s)
            carry = alpha[high] / alpha[low]
            fresh = math.sqrt(sigma[high] ** 2 - (carry * sigma[low]) ** 2)  # std of x_high | x_low
            back = fresh * sigma[low] / sigma[high]                   # std of DDPM's x_low | x_high
            ddpm = lambda x, grad: (x + fresh ** 2 * grad) / carry                      # its mean
            mean, std = (ddpm(x, grad), back) if down else (carry * x, fresh)
            new = mean + std * torch.randn_like(x)
            new_log_p, new_grad = at(new, s)
            xl, xh, grad_h = (new, x, grad) if down else (x, new, new_grad)
            w = w + (new_log_p - log_p) * (1 if down else -1) - d * math.log(fresh / back) + (
                log_normal((xh - carry * xl) / fresh) - log_normal((xl - ddpm(xh, grad_h)) / back))
            x, log_p, grad = new, new_log_p, new_grad
        return (w if down else w + log_p - log_normal(x)).double()

    levels = range(1, model.T + 1)
    down, up = log_weights(torch.randn_like(x1), levels[::-1], True), log_weights(x1, levels, False)
    low, high = torch.cat([down, up]).aminmax()
    for _ in range(60):                         # bisect to where as many are accepted of each kind
        value = (low + high) / 2
        accept = torch.stack([torch.sigmoid(down - value), torch.sigmoid(value - up)])      # (2, n)
        low, high = (value, high) if accept[0].sum() > accept[1].sum() else (low, value)
    chains = accept.sum(1).square() / accept.square().sum(1)        # that count of them, at most n
    error = (1 / chains - 1 / len(x1)).sum().sqrt()
    below, above = down.mean(), up.mean()
    error = error if chains.min() > 3 else (above - below).abs() / 2
    return value.item(), error.item(), below.item(), above.item()


@torch.no_grad()
def bits_per_dim(model, images, by="one_pass", **options):
    """Upper bound on -log2 P(k)/d, bits/dim (B,), of 8-bit images k (uint8, (B, ...)).

    Pixels on a lattice have no density, so the bound goes through level 1, a slightly noisy x_1:
        -log P(k) <= E[ log q(x_1|k) - log p_1(x_1) - log P(k|x_1) ]
    with P(k|x_1) a softmax over the 256 grey values, pixel by pixel. It is tight when sigma_1 is at
    most an eighth of a grey step (log-SNR 14). Grey value k stands at x_0 = (2k+1)/256 - 1.
    by: where log p_1 comes from, "one_pass" (theorem 3.2; CDM only), "elbo" or "ode" (`options` go
    to that function). ValueError for anything else, or images that are not uint8."""
    if images.dtype != torch.uint8 or not len(images):
        raise ValueError(f"images must be uint8, 0 .. 255, one or more; got {images.dtype}")
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
    log_q = log_normal(eps) - d * math.log(sigma)
    if by == "elbo":                                     # it averages over eps, and so must log q
        log_q = -0.5 * d * math.log(2 * math.pi * math.e * sigma ** 2)
        log_p1 = elbo(model, x0, **options)
    elif by == "ode":
        log_p1 = ode_log_prob(model, x1, **options)
    else:
        log_p1 = model.log_prob(x1, 1)
    return (log_q - log_p1 - log_k.sum(1)) / (d * math.log(2))
