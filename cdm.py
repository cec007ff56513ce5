"""Classification Diffusion Models (CDM): the whole method in one file.

Read it beside the paper (Yadin, Elata, Michaeli, NeurIPS 2024, arXiv 2402.10095). That takes about
25 minutes, and as long again for the audits at the end. A network classifies how noisy a sample is.
Its logits l_t(x) contain a diffusion model and a likelihood, exact for the ideal classifier.

    t               the level, an int or long (B,): 0 is clean data, 1 .. T noisier, T+1 pure noise
    alpha, sigma    scale of the signal and of the noise at each level, (T+2,)
    log-SNR         log(alpha_t^2 / sigma_t^2), the log of the signal-to-noise ratio
    x0, xt          clean samples and their noisy versions: (B, ...), B samples, called rows
    eps, eps_hat    the noise that was added, and its estimate E[eps | x_t]; x0_hat likewise
    p_t             the density of x_t; p_0, at level 0, is that of the data

    noise           x_t = alpha_t x_0 + sigma_t eps,   eps ~ N(0, I)
    classifier      softmax(l(x))_t = p(t | x),        t drawn uniformly from the T+2 levels
    theorem 3.2     log p_t(x) = l_t(x) - l_{T+1}(x) + log N(x; 0, I)
    theorem 3.1     E[eps | x_t = x] = sigma_t (x - gradient of [l_t(x) - l_{T+1}(x)])

Theorem 3.2 is Bayes' rule. Theorem 3.1 is the gradient of 3.2: by Tweedie's formula, E[eps | x_t]
is -sigma_t times that of log p_t. Likelihoods are in nats. Most bad input is a ValueError.
"""

import copy
import math
from collections import namedtuple

import torch
from torch.distributions import Normal

# ---------------------------------------------------------------- levels of noise (section 2)
Schedule = namedtuple("Schedule", "alpha sigma")       # float64 (T+2,), from 1 to 0 and from 0 to 1


def ddpm_schedule(T=1000):
    """alpha_t^2 is a product of factors 1 - beta; beta grows from 1e-4 to 0.02 (Ho et al. 2020).
    For other T than 1000, a level is 1000/T such steps: alpha_T^2 stays 4e-5."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    alpha2 = torch.exp(1000 / T * torch.log1p(-beta).cumsum(0))                   # levels 1 .. T
    alpha2 = torch.cat([torch.ones(1), alpha2, torch.zeros(1)])
    return Schedule(torch.sqrt(alpha2), torch.sqrt(1 - alpha2))


def uniform_schedule(T=1000):
    """sigma_t = t/(T+1), alpha_t^2 = 1 - sigma_t^2: "unif." in the paper (Rhodes et al. 2020)."""
    sigma = torch.linspace(0, 1, T + 2, dtype=torch.float64)
    return Schedule(torch.sqrt(1 - sigma ** 2), sigma)


def ot_schedule(T=1000):
    """sigma_t = t/(T+1), alpha_t = 1 - sigma_t: the straight path of flow matching."""
    sigma = torch.linspace(0, 1, T + 2, dtype=torch.float64)
    return Schedule(1 - sigma, sigma)


def log_snr_schedule(T=256, first=14.0, last=-8.0):
    """The log-SNR falls in equal steps, from `first` at t = 1 to `last` at t = T: sigma_t / alpha_t
    grows by the same factor each time. alpha_t^2 + sigma_t^2 = 1."""
    log_snr = torch.linspace(first, last, T, dtype=torch.float64)
    log_snr = torch.cat([torch.tensor([math.inf]), log_snr, torch.tensor([-math.inf])])
    return Schedule(torch.sqrt(torch.sigmoid(log_snr)), torch.sqrt(torch.sigmoid(-log_snr)))


def log_normal(x):
    """log N(x; 0, I) in nats, (B, ...) -> (B,). Half precision is refused: it loses nats."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a likelihood needs float32 or float64, got {x.dtype}")
    return -0.5 * (x * x + math.log(2 * math.pi)).flatten(1).sum(1)


# ------------------------------------------------------------- a diffusion model of the usual kind
class DDM(torch.nn.Module):
    """A denoising diffusion model: net(xt, t) -> eps_hat is told the levels t, a tensor (B,)."""

    def __init__(self, net, schedule):
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise ValueError(f"a Schedule is needed, got {schedule!r}")
        alpha, sigma = (v.double().cpu() for v in schedule)
        ends = [alpha[0], sigma[0], alpha[-1], sigma[-1]]
        if ends != [1, 0, 0, 1] or not ((alpha / sigma).diff() < 0).all():
            raise ValueError(f"alpha / sigma must fall, from 1 / 0 to 0 / 1; got {schedule}")
        self.net, self.schedule, self.T = net, Schedule(alpha, sigma), len(alpha) - 2
        self.register_buffer("alpha", alpha.float(), persistent=False)      # not in a state_dict
        self.register_buffer("sigma", sigma.float(), persistent=False)

    def predict_noise(self, xt, t):
        """eps_hat, the estimate of E[eps | x_t = xt]."""
        return self.net(xt, self.level(t, xt))

    def losses(self, x0, w_mse=1.0):
        """Like CDM.losses, but there is no classifier, so the first loss is 0."""
        t = self.level(torch.randint(1, self.T + 1, x0.shape[:1], device=x0.device), x0)
        eps = torch.randn_like(x0)
        eps_hat = self.predict_noise(self.add_noise(x0, t, eps), t)
        return x0.new_zeros(()), self.mse(eps_hat, eps, t, w_mse)

    def mse(self, eps_hat, eps, t, w_mse):
        """The mean squared error of eps_hat, in which level t has the weight w_mse or w_mse[t]."""
        error = (eps_hat - eps).square().flatten(1).mean(1)                                 # (B,)
        return (torch.as_tensor(w_mse).to(error).expand(self.T + 2)[t] * error).mean()

    def add_noise(self, x0, t, eps):
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self.scales(t, x0)
        return alpha * x0 + sigma * eps

    def denoise(self, xt, t):
        """E[x_0 | x_t = xt] = (xt - sigma_t eps_hat) / alpha_t. Not for t = T+1: alpha_t is 0."""
        alpha, sigma = self.scales(t, xt)
        return (xt - sigma * self.predict_noise(xt, t)) / alpha

    def scales(self, t, x):
        """alpha_t and sigma_t of each row, shaped (B, 1, ..) so that they multiply x."""
        t, ones = self.level(t, x), (1,) * (x.dim() - 1)
        tables = self.schedule if x.dtype == torch.float64 else (self.alpha, self.sigma)
        return [v.to(x).index_select(0, t).view(-1, *ones) for v in tables]

    def level(self, t, x):
        """The level t, an int or a long tensor (B,), as a long tensor (B,) for the batch x."""
        if not x.is_floating_point() or len(x) == 0:
            raise ValueError(f"x must be floats, 1 row or more; got {x.dtype} {tuple(x.shape)}")
        if not torch.is_tensor(t) and t in range(self.T + 2):
            t = torch.full((len(x),), int(t), device=x.device)
        if not torch.is_tensor(t) or t.dtype != torch.long or t.shape != x.shape[:1]:
            raise ValueError(f"a level is 0 .. {self.T + 1} or a long tensor (B,), got {t!r}")
        return t


# ----------------------------------------------------------------- the classifier (section 3)
class CDM(DDM):
    """A diffusion model whose denoiser comes from a classifier, net(x) -> logits (B, T+2).
    The network is not told how noisy x is: finding that is its task. Rows must not influence each
    other (no BatchNorm). Training differentiates a gradient: activations must be smooth (SiLU, not
    ReLU). For a network that takes the levels as an input, override log_ratio."""
    window = None           # how many neighbouring levels `losses` compares; None: all T+2

    def log_ratio(self, x, levels):
        """log [p_t(x) / p_{T+1}(x)] in nats, (B, n), at the given levels, long (B, n).
        All levels are equally likely, so by Bayes' rule softmax(logits)_t is p_t(x) times a factor
        that is the same for all t. It cancels in a difference of two logits."""
        logits = self.net(x)
        if logits.shape != (len(x), self.T + 2):
            raise ValueError(f"net must give {self.T + 2} logits a row, got {tuple(logits.shape)}")
        return logits.gather(1, levels) - logits[:, -1:]

    def log_prob(self, x, t=0):
        """Theorem 3.2: log p_t(x) in nats, (B,), in one forward pass. t = 0: the data's density.
        A network may output anything; annealed_log_z measures whether it integrates to 1."""
        ratio = self.log_ratio(x, self.level(t, x)[:, None])[:, 0]
        return ratio + log_normal(x.to(ratio))

    def predict_noise(self, xt, t):
        """Theorem 3.1: E[eps | x_t = xt] = sigma_t (xt - gradient of the log-ratio at t)."""
        return self.ratio_and_noise(xt, self.level(t, xt)[:, None])[1]

    def ratio_and_noise(self, xt, levels):
        """The log-ratios at all `levels` (B, n), and eps_hat at the first of them, levels[:, 0]."""
        def ratio_at_t(x):
            ratio = self.log_ratio(x, levels)                                             # (B, n)
            return ratio[:, 0].sum(), ratio

        # No row's ratio depends on another row, so the gradient of the sum holds each row's.
        # has_aux: `ratio` is returned too. Training differentiates both results once more.
        gradient, ratio = torch.func.grad(ratio_at_t, has_aux=True)(xt)
        _, sigma = self.scales(levels[:, 0], xt)
        return ratio, sigma * (xt - gradient)

    def losses(self, x0, w_mse=1.0):
        """Cross-entropy (nats) and denoising error of clean data x0: two scalars, for the caller to
        weigh and add, w_ce * ce + mse. w_mse: a number, or one for each level (T+2,).
        A window of K neighbouring levels is drawn, then the true level in it, both uniformly: so
        p(t | x, window) is the softmax of its K logits. Cross-entropy teaches nothing about levels
        that are never confused. The error does, but it does not see a constant in a logit."""
        K, B, device = self.window or self.T + 2, len(x0), x0.device
        first = torch.randint(self.T + 3 - K, (B, 1), device=device)   # the window's cleanest level
        place = torch.randint(K, (B, 1), device=device)           # of the true level in the window
        levels = first + (place + torch.arange(K, device=device)) % K    # (B, K), true one first
        t, eps = self.level(levels[:, 0], x0), torch.randn_like(x0)
        ratio, eps_hat = self.ratio_and_noise(self.add_noise(x0, t, eps), levels)
        return -ratio.log_softmax(1)[:, 0].mean(), self.mse(eps_hat, eps, t, w_mse)


# ------------------------------------------------------------------------- samples, and labels
def noising_step(schedule, s, t):
    """alpha_ts and std_ts of the step from level s to t > s: x_t = alpha_ts x_s + std_ts noise."""
    alpha, sigma = (v.tolist() for v in schedule)
    alpha_ts = alpha[t] / alpha[s]
    return alpha_ts, math.sqrt(sigma[t] ** 2 - (alpha_ts * sigma[s]) ** 2)      # variances add up


@torch.no_grad()          # no graph for the weights; torch.func.grad in x works all the same
def sample(model, x, steps=None, method="ddim"):
    """Turn noise x ~ N(0, I), (B, ...), into samples by `steps` calls of predict_noise (None: T).
    ddim is deterministic (Song et al. 2021); ddpm draws part of the noise anew (Ho et al. 2020);
    dpm is DPM-Solver++ 2M, for few steps (Lu et al. 2022). N(0, I) replaces x_T, so alpha_T must be
    near 0: with 0.2, as uniform_schedule(50) has it, DDIM's mean of data N(1, 0.2^2) is 0.96."""
    steps = model.T if steps is None else steps
    if method not in ("ddim", "ddpm", "dpm") or steps not in range(1, model.T + 1):
        raise ValueError(f"ddim, ddpm or dpm in 1 .. {model.T} steps; got {method!r}, {steps!r}")
    alpha, sigma = (v.tolist() for v in model.schedule)
    levels = [model.T - i * model.T // steps for i in range(steps + 1)]                   # T .. 0
    last_x0_hat, last_h = 0.0, math.inf                # inf: the first step is of first order
    for t, s in zip(levels, levels[1:]):                                    # from t to a cleaner s
        eps_hat = model.predict_noise(x, t)
        x0_hat = (x - sigma[t] * eps_hat) / alpha[t]
        new = sigma[s] / sigma[t] * noising_step(model.schedule, s, t)[1] if method == "ddpm" else 0
        if method == "dpm" and s > 0:       # x0_hat half a step ahead; h is infinite at s = 0
            h = math.log(alpha[s] * sigma[t] / (alpha[t] * sigma[s]))    # step in log(alpha/sigma)
            ahead = x0_hat + h / (2 * last_h) * (x0_hat - last_x0_hat)
            last_x0_hat, last_h = x0_hat, h
            x0_hat, eps_hat = ahead, (x - alpha[t] * ahead) / sigma[t]
        kept = math.sqrt(max(0, sigma[s] ** 2 - new ** 2))              # the rest of the noise
        x = alpha[s] * x0_hat + kept * eps_hat + new * torch.randn_like(x)
    return x


class Given(torch.nn.Module):
    """The network `net` with the labels y (B,) of a batch filled in."""
    def __init__(self, net, y, guidance):
        super().__init__()
        self.net = net.net if isinstance(net, Given) else net        # these labels replace others
        self.guidance = guidance
        self.register_buffer("y", y, persistent=False)

    def forward(self, *inputs):
        out = self.net(*inputs, y=self.y)
        return out + self.guidance * (out - self.net(*inputs)) if self.guidance else out


def given(model, y, guidance=0.0):
    """The model of p(x | y), with the same weights, for labels y, long (B,). They replace old
    ones. Its network takes net(.., y=y), and net(..) for no label. Guidance w exaggerates what y
    changes, out(y) + w (out(y) - out()): typical samples, no density (Ho, Salimans 2022)."""
    labelled = copy.copy(model)                           # it shares all but `net` with the model
    labelled._modules = dict(model._modules)
    labelled.net = Given(model.net, y, guidance)
    return labelled


# --------------------------------------------- three audits: do others agree with log_prob, is Z 1?
@torch.no_grad()
def elbo(model, x0):
    """Lower bound on E[log p_1(x_1) | x_0] in nats, (B,), for DDPM's p_1 as T goes to infinity:
    E[log N(x_T; 0, I)] + d log(sigma_T / sigma_1) - 1/2 integral of ||eps - eps_hat||^2 d(log-SNR)
    (Kingma et al. 2021); x_0 has d numbers. One eps is drawn at each level; the trapezoid rule
    needs close levels. Only the denoiser counts: wrong constants in the logits do not show."""
    (alpha, sigma), T, d = model.schedule, model.T, x0[0].numel()
    log_snr = 2 * torch.log(alpha / sigma)[1:-1]
    if (log_snr.diff() < -1 - 1e-9).any():
        raise ValueError("the ELBO needs levels at most 1 apart in log-SNR: try log_snr_schedule")
    errors = []
    for t in range(1, T + 1):
        eps = torch.randn_like(x0)
        error = model.predict_noise(model.add_noise(x0, t, eps), t) - eps
        errors.append(error.square().flatten(1).sum(1))
    integral = torch.trapezoid(torch.stack(errors), -log_snr.to(x0), dim=0)
    prior = log_normal(float(alpha[T]) * x0) - d * float(sigma[T]) ** 2 / 2
    return prior + d * math.log(sigma[T] / sigma[1]) - integral / 2


@torch.no_grad()
def ode_log_prob(model, x, t=1, probes=0):
    """log p_t(x) in nats, (B,), t in 1 .. T-1, for the p_t that the ODE sampler draws.
    The probability-flow ODE (Song et al. 2021) leads from level t to T. In y = x / alpha and
    tau = sigma / alpha it reads dy/dtau = eps_hat, and d log p(y) / dtau is -trace of J, the
    Jacobian of eps_hat in y. probes = 0: exact, by d backward passes; else a mean of v^T J v."""
    if t not in range(1, model.T):
        raise ValueError(f"t must be an int in 1 .. {model.T - 1}, got {t!r}")
    alpha, sigma = (v.tolist() for v in model.schedule)
    d, tau = x[0].numel(), [s / a for a, s in zip(alpha[:-1], sigma)]
    vectors = torch.eye(d).to(x).view(d, 1, *x.shape[1:]).expand(d, *x.shape)
    if probes:
        vectors = torch.randint(2, (probes, *x.shape), device=x.device).to(x) * 2 - 1
    y, slopes = x / alpha[t], []
    for s in range(t, model.T + 1):
        eps_hat, vjp = torch.func.vjp(lambda y: model.predict_noise(alpha[s] * y, s), y)
        trace = sum((v * vjp(v)[0]).flatten(1).sum(1) for v in vectors)                # v^T J v
        slopes.append(-tau[s] * trace / max(1, probes))               # d log p(y) / d log(tau)
        if s < model.T:                                                            # Heun's method
            step = tau[s + 1] - tau[s]
            next_eps_hat = model.predict_noise(alpha[s + 1] * (y + step * eps_hat), s + 1)
            y = y + step * (eps_hat + next_eps_hat) / 2
    change = torch.trapezoid(torch.stack(slopes), torch.tensor(tau[t:]).log().to(x), dim=0)
    return log_normal(alpha[-2] * y) + d * math.log(alpha[-2] / alpha[t]) - change


@torch.no_grad()
def annealed_log_z(model, x1):
    """A lower and an upper bound on log Z in nats, up to sampling errors. Z, ideally 1, is the
    integral of p_1 = exp(log_prob(x, 1)) of a CDM. More levels narrow the gap.
    Importance sampling (after Neal 2001) assigns to a path x_1 .. x_T of levels 1 to T a weight,
        w = p_1(x_1) q(x_2|x_1) .. q(x_T|x_{T-1}) / [N(x_T; 0, I) r(x_{T-1}|x_T) .. r(x_1|x_2)].
    Paths drawn downward, from noise by r, have E[w] = Z, so E[log w] <= log Z (Jensen). Paths drawn
    upward by q, from x1 (B, ...), have E[1/w] = 1/Z, so E[log w] >= log Z, if x1, data at level 1,
    follow p_1 / Z. The better the model, the more this bound can be trusted."""
    sigma = model.schedule.sigma.tolist()

    def q(xs, t):                                                # the noising from level t-1 to t
        alpha_ts, std_ts = noising_step(model.schedule, t - 1, t)
        return Normal(alpha_ts * xs, std_ts)

    def r(xt, t):                                                # DDPM's step from level t to t-1
        alpha_ts, std_ts = noising_step(model.schedule, t - 1, t)
        mean = (xt - std_ts ** 2 / sigma[t] * model.predict_noise(xt, t)) / alpha_ts
        return Normal(mean, sigma[t - 1] / sigma[t] * std_ts)

    def mean_log_w(path, steps):
        log_w = model.log_prob(path[0], 1) - log_normal(path[-1])
        for t, (xs, xt, step) in enumerate(zip(path, path[1:], steps), 2):
            log_w = log_w + (q(xs, t).log_prob(xt) - step.log_prob(xs)).flatten(1).sum(1)
        return log_w.mean().item()

    down, up, steps = [torch.randn_like(x1)], [x1], []
    for t in range(model.T, 1, -1):
        steps.insert(0, r(down[0], t))
        down.insert(0, steps[0].sample())
    for t in range(2, model.T + 1):
        up.append(q(up[-1], t).sample())
    return mean_log_w(down, steps), mean_log_w(up, [r(xt, t) for t, xt in enumerate(up[1:], 2)])


def bits_per_dim(log_p1, sigma1, d):
    """Bits/dim, -log2 P(k) / d, of 8-bit images k of d pixels, from log p_1 in nats, (B,), which is
    log_prob(x_1, 1) minus log Z, ode_log_prob(x_1, 1) or elbo(x_0), for x_0 = (2k+1)/256 - 1.
    Grey values have no density; blurred by the noise of x_1 they do. The noise is no part of the
    image: its entropy is subtracted, -log2 P(k) <= E[log2 q(x_1|k) - log2 p_1(x_1)]. The error
    is at most 3e-4 bits a pixel if sigma_1 is at most an eighth of a grey step."""
    if not 0 < sigma1 <= 2 / 256 / 8:
        raise ValueError(f"sigma_1 must be at most {2 / 256 / 8:.5f}, got {float(sigma1):.5f}")
    return -math.log2(sigma1 * math.sqrt(2 * math.pi * math.e)) - log_p1 / (d * math.log(2))
