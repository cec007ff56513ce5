"""Classification Diffusion Models (CDM): the whole method in one file.

A network looks at a noisy sample and guesses how noisy it is. Its logits l_t(x) contain two more
models: a likelihood, and the denoiser that diffusion sampling needs (Yadin, Elata, Michaeli,
NeurIPS 2024, arXiv 2402.10095).

    noise           x_t = alpha_t x_0 + sigma_t eps,   eps ~ N(0, I);   p_t is the density of x_t
    classifier      softmax(l(x))_t = p(t | x),        all levels t are equally likely
    theorem 3.2     log p_t(x) = l_t(x) - l_{T+1}(x) + log N(x; 0, I)
    theorem 3.1     E[eps | x_t = x] = sigma_t (x - gradient of [l_t(x) - l_{T+1}(x)])

Theorem 3.2 is Bayes' rule: all p(t | x) share one denominator, and p_{T+1} = N(0, I) is known.
Theorem 3.1 is its gradient, since grad log N(x; 0, I) = -x and, by Tweedie's formula,
    grad log p_t(x) = E[grad_x log p(x_t = x | x_0) | x_t = x] = -E[eps | x_t = x] / sigma_t

    level t          0: clean data      1 .. T: more and more noise    T+1: pure noise
    alpha, sigma     1, 0               alpha falls, sigma grows       0, 1
    used for         log p_0            sampling, likelihoods          the known density

Samples x are (B, ...), a batch of B rows; a level t is an int or a long tensor (B,). Likelihoods
are in nats. Most invalid input raises ValueError. **cond, such as y=labels, goes to the network.
"""

import math
from collections import namedtuple
from itertools import pairwise

import torch
from torch import nn
from torch.distributions import Normal

# ------------------------------------------------------------------------------ 1. noise levels
Schedule = namedtuple("Schedule", "alpha sigma")       # float64 (T+2,): alpha 1 -> 0, sigma 0 -> 1


def log_snr_schedule(T=64, first=14.0, last=-8.0):
    """log(alpha_t^2 / sigma_t^2), the log of the signal-to-noise ratio (SNR), falls in equal steps
    from `first` at t = 1 to `last` at t = T. Variance preserving: alpha_t^2 + sigma_t^2 = 1."""
    log_snr = torch.linspace(first, last, T, dtype=torch.float64)
    log_snr = torch.cat([torch.tensor([math.inf]), log_snr, torch.tensor([-math.inf])])
    return Schedule(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())


class Diffusion(nn.Module):
    """What CDM and DDM have in common. A subclass defines predict_noise and losses."""

    def __init__(self, net, schedule):
        super().__init__()
        alpha, sigma = (v.double().cpu() for v in schedule)
        ends = [alpha[0], sigma[0], alpha[-1], sigma[-1]]
        if len(alpha) < 3 or ends != [1, 0, 0, 1] or not ((alpha / sigma).diff() < 0).all():
            raise ValueError(f"alpha / sigma must fall, from 1 / 0 to 0 / 1; got {schedule}")
        self.net, self.schedule, self.T = net, Schedule(alpha, sigma), len(alpha) - 2

    def level(self, t, x):
        """Check t, an int or a long tensor (B,), and return it as a long tensor (B,). The values in
        a tensor are not checked here, which would stall a GPU; indexing rejects bad ones later."""
        if not x.is_floating_point() or x.dim() < 2 or len(x) == 0:
            raise ValueError(f"x must be floats (B, ...), B > 0; got {x.dtype} {tuple(x.shape)}")
        if not torch.is_tensor(t) and not isinstance(t, float) and 0 <= t <= self.T + 1:
            t = torch.full((len(x),), int(t), device=x.device)
        if not torch.is_tensor(t) or t.dtype != torch.long or t.shape != x.shape[:1]:
            raise ValueError(f"a level is 0 .. {self.T + 1} or a long tensor (B,), got {t!r}")
        return t

    def scales(self, t, x):
        """alpha_t and sigma_t for each row, shaped (B, 1, ..) to multiply x."""
        t, shape = self.level(t, x), (-1,) + (1,) * (x.dim() - 1)
        return [v.to(x, non_blocking=True).index_select(0, t).view(shape) for v in self.schedule]

    def add_noise(self, x0, t, eps):
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self.scales(t, x0)
        return alpha * x0 + sigma * eps

    def denoise(self, xt, t, **cond):
        """E[x_0 | x_t = xt], t up to T: at T+1 alpha is 0, and rows of a tensor t give nan."""
        if not torch.is_tensor(t) and t == self.T + 1:
            raise ValueError(f"only levels up to {self.T} can be denoised, got {t}")
        alpha, sigma = self.scales(t, xt)
        return (xt - sigma * self.predict_noise(xt, t, **cond)) / alpha

    def mse(self, eps_hat, eps, t, w_mse):
        """Mean squared error of eps_hat. w_mse: None, or one weight per level, (T+2,)."""
        error = (eps_hat - eps).square().flatten(1).mean(1)                                 # (B,)
        return error.mean() if w_mse is None else (w_mse.to(error)[t] * error).mean()


# --------------------------------------------------------------------------- 2. the classifier
def log_normal(x):
    """log N(x; 0, I) in nats, (B, ...) -> (B,). Rejects half precision, which loses nats."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a likelihood needs float32 or float64, got {x.dtype}")
    return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


class CDM(Diffusion):
    """net(x, **cond) -> logits (B, T+2). The network is never told the true level: inferring it is
    its task. Rows must not interact (no BatchNorm). Training needs second derivatives: use smooth
    activations (SiLU, not ReLU), no checkpointing, and attention within
    sdpa_kernel(SDPBackend.MATH), because fused kernels lack second derivatives.

    To compute only some of the logits, let the network take levels as an input: override log_ratio,
    and set `window`, the number of adjacent levels that `losses` compares."""
    window = None                                              # None: all T+2, as in the paper

    def log_ratio(self, x, levels, **cond):
        """log [p_t(x) / p_{T+1}(x)], (B, n), at the levels (B, n). By Bayes' rule softmax(logits)_t
        is p_t(x) / sum_s p_s(x). The sum cancels in the difference of two logits."""
        logits = self.net(x, **cond)
        if logits.shape != (len(x), self.T + 2):
            raise ValueError(f"net must return {self.T + 2} logits per row: {tuple(logits.shape)}")
        logits = logits if logits.dtype == torch.float64 else logits.float()    # under autocast
        return logits.gather(1, levels) - logits[:, -1:]

    def log_prob(self, x, t=0, **cond):
        """Theorem 3.2: log p_t(x), (B,), in one forward pass; t = 0 is the data density. Data on a
        lattice, such as 8-bit images, have no density: add noise, and use t = 1 and bits_per_dim.
        This is what the network claims; annealed_log_z measures whether p_1 integrates to 1."""
        return self.log_ratio(x, self.level(t, x)[:, None], **cond)[:, 0] + log_normal(x)

    def predict_noise(self, xt, t, **cond):
        """Theorem 3.1: eps_hat = E[eps | x_t = xt], by one forward and one backward pass."""
        return self.log_ratio_and_noise(xt, self.level(t, xt)[:, None], **cond)[1]

    def log_ratio_and_noise(self, xt, levels, **cond):
        """The log-ratios at all `levels` (B, n), and eps_hat at the first of them, levels[:, 0]."""
        def ratio_at_t(x):
            ratio = self.log_ratio(x, levels, **cond)                                     # (B, n)
            return ratio[:, 0].sum(), ratio         # the sum's gradient holds every row's own

        gradient, ratio = torch.func.grad(ratio_at_t, has_aux=True)(xt)
        _, sigma = self.scales(levels[:, 0], xt)
        return ratio, sigma * (xt - gradient)

    def losses(self, x0, w_mse=None, **cond):
        """Cross-entropy and denoising error on clean data x0, to be added as w_ce * ce + mse.
        Each row draws K adjacent levels, from `first` on, and uniformly one of them as the true
        one, so by Bayes' rule the ideal classifier of these K is the softmax of their logits. The
        true level is put in front: K = 3, first = 4 and the offset true = 1 give 5, 6, 4.
        Cross-entropy teaches how large a ratio is, but stops once levels are never confused. The
        error teaches every gradient, but is blind to a constant added to a logit."""
        K, B, device = self.T + 2 if self.window is None else self.window, len(x0), x0.device
        if not 1 <= K <= self.T + 2:
            raise ValueError(f"window must be in 1 .. {self.T + 2}, got {K}")
        first = torch.randint(self.T + 3 - K, (B, 1), device=device)
        true = torch.randint(K, (B, 1), device=device)
        levels = first + (true + torch.arange(K, device=device)) % K                       # (B, K)
        t, eps = self.level(levels[:, 0], x0), torch.randn_like(x0)
        ratio, eps_hat = self.log_ratio_and_noise(self.add_noise(x0, t, eps), levels, **cond)
        return -ratio.log_softmax(1)[:, 0].mean(), self.mse(eps_hat, eps, t, w_mse)


# --------------------------------------------------------------------------------- 3. sampling
def noising_step(schedule, s, t):
    """alpha_ts and std_ts of the step from level s to t > s: x_t = alpha_ts x_s + std_ts noise."""
    alpha, sigma = (v.tolist() for v in schedule)
    alpha_ts = alpha[t] / alpha[s]
    return alpha_ts, math.sqrt(sigma[t] ** 2 - (alpha_ts * sigma[s]) ** 2)      # sigma_t^2 is a sum


def guided_noise(model, x, t, guidance, cond):
    """eps_hat. Classifier-free guidance (Ho, Salimans 2022) exaggerates what cond changes."""
    if guidance and not cond:
        raise ValueError("guidance needs a condition to exaggerate, such as y=labels")
    eps_hat = model.predict_noise(x, t, **cond)
    if guidance:
        eps_hat = eps_hat + guidance * (eps_hat - model.predict_noise(x, t))
    return eps_hat


def step_levels(model, steps):
    """The steps + 1 levels, from T down to 0, that a sampler visits. None: all levels."""
    steps = model.T if steps is None else steps
    if steps not in range(1, model.T + 1):
        raise ValueError(f"steps must be in 1 .. {model.T}, got {steps!r}")
    return [model.T - i * model.T // steps for i in range(steps + 1)]


@torch.no_grad()          # no graph for the weights; torch.func.grad w.r.t. x still works
def sample(model, x, steps=None, eta=0.0, guidance=0.0, **cond):
    """Turn noise x ~ N(0, I), (B, ...), into samples in `steps` steps (default: T). eta = 0 is
    DDIM, which is deterministic (Song et al. 2021); eta = 1 is DDPM (Ho et al. 2020). Each step
    estimates x_0 and noises the estimate again, but only to level s: partly with the old noise,
    eps_hat, and partly with new noise. N(0, I) stands in for x_T, so alpha_T must be near 0."""
    alpha, sigma = (v.tolist() for v in model.schedule)
    for t, s in pairwise(step_levels(model, steps)):
        eps_hat = guided_noise(model, x, t, guidance, cond)
        x0_hat = (x - sigma[t] * eps_hat) / alpha[t]
        new = eta * sigma[s] / sigma[t] * noising_step(model.schedule, s, t)[1]
        kept = math.sqrt(max(0.0, sigma[s] ** 2 - new ** 2))
        x = alpha[s] * x0_hat + kept * eps_hat
        if new > 0:
            x = x + new * torch.randn_like(x)
    return x


@torch.no_grad()
def dpm_solver(model, x, steps=20, guidance=0.0, **cond):
    """DPM-Solver++ 2M (Lu et al. 2022): DDIM made second-order, for few steps. With h the step in
    log(alpha / sigma), it extrapolates the last two x0_hat to the middle of the step."""
    alpha, sigma = (v.tolist() for v in model.schedule)
    last_x0_hat = last_h = None
    for t, s in pairwise(step_levels(model, steps)):
        eps_hat = guided_noise(model, x, t, guidance, cond)
        x0_hat = middle = (x - sigma[t] * eps_hat) / alpha[t]
        if s == 0:
            return x0_hat
        h = math.log(alpha[s] * sigma[t] / (alpha[t] * sigma[s]))
        if last_h is not None:                                       # from the second step on
            middle = x0_hat + h / (2 * last_h) * (x0_hat - last_x0_hat)
        x = sigma[s] / sigma[t] * x + alpha[s] * (1 - math.exp(-h)) * middle
        last_x0_hat, last_h = x0_hat, h


# ------------------- 4. for comparison: an ordinary diffusion model, and schedules of other papers
class DDM(Diffusion):
    """A denoising diffusion model: net(xt, t, **cond) -> eps_hat is conditioned on t, (B,)."""

    def predict_noise(self, xt, t, **cond):
        return self.net(xt, self.level(t, xt), **cond)

    def losses(self, x0, w_mse=None, **cond):
        """Like CDM.losses, but the first is 0, as there is no classifier, and t is in 1 .. T."""
        t = self.level(torch.randint(1, self.T + 1, x0.shape[:1], device=x0.device), x0)
        eps = torch.randn_like(x0)
        eps_hat = self.predict_noise(self.add_noise(x0, t, eps), t, **cond)
        return x0.new_zeros(()), self.mse(eps_hat, eps, t, w_mse)


def ddpm_schedule(T=1000):
    """alpha_t^2 is the product of 1 - beta, with beta rising from 1e-4 to 0.02 (Ho et al. 2020). If
    T is not 1000, one level covers 1000/T of these steps, so that alpha_T^2 stays 4e-5."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    alpha2 = torch.exp(1000 / T * torch.log1p(-beta).cumsum(0))                   # levels 1 .. T
    alpha2 = torch.cat([torch.ones(1), alpha2, torch.zeros(1)])
    return Schedule(alpha2.sqrt(), (1 - alpha2).sqrt())


def uniform_schedule(T=1000):
    """sigma_t = t/(T+1), alpha_t^2 = 1 - sigma_t^2: "unif." in the paper (Rhodes et al. 2020)."""
    sigma = torch.linspace(0, 1, T + 2, dtype=torch.float64)
    return Schedule((1 - sigma ** 2).sqrt(), sigma)


def ot_schedule(T=1000):
    """sigma_t = t/(T+1), alpha_t = 1 - sigma_t: the straight path of flow matching."""
    sigma = torch.linspace(0, 1, T + 2, dtype=torch.float64)
    return Schedule(1 - sigma, sigma)


# ----------------- 5. audits: can log_prob be believed? (On a first reading, stop here.)
@torch.no_grad()
def annealed_log_z(model, x1, **cond):
    """Z, ideally 1, is the integral of a CDM's p_1 = exp(log_prob(x, 1)). Returns a lower and an
    upper bound on log Z in nats, up to sampling error. More levels narrow the gap.
    Annealed importance sampling (after Neal 2001) gives a path x_1 .. x_T the weight
        w = p_1(x_1) q(x_2|x_1) .. q(x_T|x_{T-1}) / [N(x_T; 0, I) r(x_{T-1}|x_T) .. r(x_1|x_2)],
    where q are noising steps and r the reverse steps of DDPM. Paths sampled from the denominator,
    down from noise, have E[w] = Z, so E[log w] <= log Z (Jensen). Paths up from x1, data at level
    1, have E[1/w] = 1/Z, so E[log w] >= log Z, provided that x1 has the density p_1 / Z."""
    sigma = model.schedule.sigma.tolist()

    def q(xs, t):                                                # noising, level t-1 to t
        alpha_ts, std_ts = noising_step(model.schedule, t - 1, t)
        return Normal(alpha_ts * xs, std_ts, validate_args=False)

    def r(xt, t):                                                # DDPM's reverse step, t to t-1
        alpha_ts, std_ts = noising_step(model.schedule, t - 1, t)
        mean = (xt - std_ts ** 2 / sigma[t] * model.predict_noise(xt, t, **cond)) / alpha_ts
        return Normal(mean, sigma[t - 1] / sigma[t] * std_ts, validate_args=False)

    xt = torch.randn_like(x1)
    log_w_down = -log_normal(xt)
    for t in range(model.T, 1, -1):
        reverse = r(xt, t)
        xs = reverse.sample()
        log_w_down += (q(xs, t).log_prob(xt) - reverse.log_prob(xs)).flatten(1).sum(1)
        xt = xs
    log_w_down += model.log_prob(xt, 1, **cond)
    xs, log_w_up = x1, model.log_prob(x1, 1, **cond)
    for t in range(2, model.T + 1):
        xt = q(xs, t).sample()
        log_w_up += (q(xs, t).log_prob(xt) - r(xt, t).log_prob(xs)).flatten(1).sum(1)
        xs = xt
    return log_w_down.mean().item(), (log_w_up - log_normal(xs)).mean().item()


@torch.no_grad()
def elbo(model, x0, **cond):
    """Lower bound on E[log p_1(x_1) | x_0] in nats, (B,), p_1 being DDPM's density as T -> inf:
    E[log N(x_T; 0, I)] + D log(sigma_T / sigma_1) - 1/2 integral of ||eps - eps_hat||^2 d(log-SNR)
    (Kingma et al. 2021), with D = dim(x_0). It uses the denoiser alone, so wrong constants in the
    logits go unnoticed. One eps is drawn per level; the trapezoid rule needs close levels."""
    (alpha, sigma), T, d = model.schedule, model.T, x0[0].numel()
    log_snr = 2 * torch.log(alpha / sigma)[1:-1]
    if (log_snr.diff() < -1 - 1e-9).any():
        raise ValueError("the ELBO needs log-SNR steps of at most 1: try log_snr_schedule")
    errors = []
    for t in range(1, T + 1):
        eps = torch.randn_like(x0)
        error = model.predict_noise(model.add_noise(x0, t, eps), t, **cond) - eps
        errors.append(error.square().flatten(1).sum(1))
    integral = torch.trapezoid(torch.stack(errors), -log_snr.to(x0), dim=0)
    prior = log_normal(float(alpha[T]) * x0) - d * float(sigma[T]) ** 2 / 2
    return prior + d * math.log(sigma[T] / sigma[1]) - integral / 2


@torch.no_grad()
def ode_log_prob(model, x, t=1, probes=0, **cond):
    """log p_t(x) in nats, (B,), t in 1 .. T-1, where p_t is the density that DDIM samples.
    The probability-flow ODE (Song et al. 2021) runs from level t to T. With y = x / alpha and
    tau = sigma / alpha it reads dy/dtau = eps_hat, and d log p(y) / dtau = -trace(J), where J is
    the Jacobian of eps_hat w.r.t. y. probes: the number of random v in a mean of v^T J v, which
    estimates the trace, or 0 for the exact trace by d backward passes."""
    if t not in range(1, model.T):
        raise ValueError(f"t must be an int in 1 .. {model.T - 1}, got {t!r}")
    alpha, sigma = (v.tolist() for v in model.schedule)
    d, tau = x[0].numel(), [s / a for a, s in zip(alpha[:-1], sigma)]
    if probes:
        vectors = torch.randint(2, (probes, *x.shape), device=x.device).to(x) * 2 - 1
    else:
        vectors = torch.eye(d).to(x).view(d, 1, *x.shape[1:]).expand(d, *x.shape)
    y, slopes = x / alpha[t], []
    for s in range(t, model.T + 1):
        eps_hat, vjp = torch.func.vjp(lambda y: model.predict_noise(alpha[s] * y, s, **cond), y)
        trace = sum((v * vjp(v)[0]).flatten(1).sum(1) for v in vectors)                # v^T J v
        slopes.append(-tau[s] * trace / max(1, probes))               # d log p(y) / d log(tau)
        if s < model.T:                                                            # Heun's method
            step = tau[s + 1] - tau[s]
            ahead = model.predict_noise(alpha[s + 1] * (y + step * eps_hat), s + 1, **cond)
            y = y + step * (eps_hat + ahead) / 2
    change = torch.trapezoid(torch.stack(slopes), torch.tensor(tau[t:]).log().to(x), dim=0)
    return log_normal(alpha[-2] * y) + d * math.log(alpha[-2] / alpha[t]) - change


def bits_per_dim(log_p1, sigma1, d):
    """Bits/dim, -log2 P(k) / d, of 8-bit images k of d values. log_p1 is log p_1 in nats, (B,):
    log_prob(x_1, 1) - log Z, ode_log_prob(x_1, 1) or elbo(x_0), where x_0 = (2k+1)/256 - 1.
    Grey values have no density, but x_1 has one. Its code would also pay for the noise, so we
    subtract the noise's entropy: -log2 P(k) <= E[log2 q(x_1|k) - log2 p_1(x_1)], tight to 3e-4
    bits/dim if sigma_1 is at most an eighth of a grey step."""
    if not 0 < sigma1 <= 2 / 256 / 8:
        raise ValueError(f"sigma_1 must be at most {2 / 256 / 8:.5f}, got {float(sigma1):.5f}")
    return -math.log2(sigma1 * math.sqrt(2 * math.pi * math.e)) - log_p1 / (d * math.log(2))
