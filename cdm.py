"""Classification Diffusion Models (CDM): the whole method in one file.

Read it top to bottom (15 minutes) beside the paper: Yadin, Elata, Michaeli, "Classification
Diffusion Models: Revitalizing Density Ratio Estimation", NeurIPS 2024. A network sees a noisy
sample and classifies how noisy it is. That is all it is trained for, yet its logits l_t(x) hold a
diffusion model and a likelihood, exact if the classifier is:

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

# ---------------------------------------------------------------- noise levels (paper, section 2)


class Schedule(NamedTuple):
    """Signal and noise scale of every level: two tensors (T+2,) from (1, 0) down to (0, 1)."""
    alpha: torch.Tensor
    sigma: torch.Tensor


def _with_ends(first, inner, last):
    """The levels t = 1 .. T, with the clean level 0 and the pure-noise level T+1 around them."""
    return F.pad(F.pad(inner, (1, 0), value=first), (0, 1), value=last)


def ddpm_schedule(T=1000):
    """Ho et al. 2020: beta from 1e-4 to 0.02 over 1000 steps, alpha_t^2 = product of (1 - beta).
    With T levels each stands for 1000/T steps, so that alpha_T^2 = 4e-5 whatever T is."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    log_alpha2 = _with_ends(0, 1000 / T * torch.log1p(-beta).cumsum(0), -math.inf)
    return Schedule(torch.exp(log_alpha2 / 2), torch.sqrt(1 - torch.exp(log_alpha2)))


def uniform_schedule(T=1000):
    """sigma_t = t/(T+1), variance preserving; as TRE (Rhodes et al. 2020); "unif." in the paper."""
    sigma = torch.linspace(0, 1, T + 2, dtype=torch.float64)
    return Schedule(torch.sqrt(1 - sigma ** 2), sigma)


def ot_schedule(T=1000):
    """The straight path of flow matching: alpha_t = 1 - t/(T+1), sigma_t = t/(T+1)."""
    sigma = torch.linspace(0, 1, T + 2, dtype=torch.float64)
    return Schedule(1 - sigma, sigma)


def log_snr_schedule(T=256, first=14.0, last=-8.0):
    """log(alpha_t^2 / sigma_t^2) falls linearly from `first` at t = 1 to `last` at t = T, so that
    no neighbours are far apart: where a classifier is never in doubt, it learns nothing."""
    log_snr = _with_ends(math.inf, torch.linspace(first, last, T, dtype=torch.float64), -math.inf)
    return Schedule(torch.sqrt(torch.sigmoid(log_snr)), torch.sqrt(torch.sigmoid(-log_snr)))


def stratified_levels(B, low, high, device=None):
    """B sorted levels (B,) from low .. high; one random number serves all, so that every level gets
    its fair share: less variance than independent draws. Rows must come in random order."""
    share = (torch.arange(B, device=device) + torch.rand((), device=device)) / B        # in 0 .. 1
    return low + (share * (high - low + 1)).long().clamp(max=high - low)      # it may round up to 1


def log_normal(x):
    """log N(x; 0, I) in nats: (B, ...) -> (B,)."""
    return -0.5 * (x * x + math.log(2 * math.pi)).flatten(1).sum(1)


# ------------------------------------------- what every diffusion model does, given predict_noise


class Loss(NamedTuple):
    """total is to be minimised; ce (nats) and mse (per number): detached, without their weights."""
    total: torch.Tensor
    ce: torch.Tensor
    mse: torch.Tensor


class Diffusion(torch.nn.Module):
    """Noise, and the denoiser eps_hat = predict_noise(xt, t) = E[eps | x_t], (B, ...) -> (B, ...),
    that a subclass gives. A level t is an int or a long tensor (B,); ValueError if it is not."""

    def __init__(self, net, schedule):
        super().__init__()
        alpha, sigma = (v.double().cpu() for v in schedule)
        if not (len(alpha) == len(sigma) >= 4 and ((alpha / sigma).diff() < 0).all()
                and (alpha[0], sigma[0], alpha[-1], sigma[-1]) == (1, 0, 0, 1)):
            raise ValueError("a schedule must be two tensors (T+2,), T >= 2, that fall in log-SNR "
                             f"from alpha, sigma = 1, 0 to 0, 1; got {schedule}")
        self.net, self.T, self.schedule = net, len(alpha) - 2, Schedule(alpha, sigma)
        self.register_buffer("alpha", alpha.float(), persistent=False)    # follow .to(device); MPS
        self.register_buffer("sigma", sigma.float(), persistent=False)    # has no float64

    def add_noise(self, x0, t, eps):
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self._scales(self._levels(t, x0), x0)
        return alpha * x0 + sigma * eps

    def denoise(self, xt, t):
        """x0_hat = E[x_0 | x_t = xt] = (xt - sigma_t eps_hat) / alpha_t. Not at T+1: alpha = 0."""
        alpha, sigma = self._scales(self._levels(t, xt, self.T), xt)
        return (xt - sigma * self.predict_noise(xt, t)) / alpha

    def draw(self, x0, *, low=1, high=None):
        """What a training step sees: xt, eps and levels t (B,), stratified over low .. high (T)."""
        t = stratified_levels(len(x0), low, self.T if high is None else high, x0.device)
        eps, (alpha, sigma) = torch.randn_like(x0), self._scales(t, x0)
        return alpha * x0 + sigma * eps, eps, t

    def loss(self, x0, *window, **weights):
        """The training loss of clean data x0 (B, ...). Only `draw` is random: loss_at compiles."""
        return self.loss_at(*self.draw(x0, *window), **weights)

    def _levels(self, t, x, highest=None):
        """t as a long tensor (B,), after checking that it lies in 0 .. highest (default T+1)."""
        highest = self.T + 1 if highest is None else highest
        if isinstance(t, int) and 0 <= t <= highest and len(x):
            return torch.full((len(x),), t, device=x.device)
        if (torch.is_tensor(t) and t.dtype == torch.long and t.shape == x.shape[:1] and len(x)
                and not ((t < 0) | (t > highest)).any()):
            return t
        raise ValueError(f"level t must be an int or a long tensor (B,) in 0 .. {highest}, for a "
                         f"batch of B = {len(x)} rows, 1 or more; got {t!r}")

    def _scales(self, t, x):
        """alpha_t and sigma_t of each row, shaped (B, 1, ..) to multiply x."""
        tables = self.schedule if x.dtype == torch.float64 else (self.alpha, self.sigma)
        return [v.to(x)[t].reshape(-1, *[1] * (x.dim() - 1)) for v in tables]

    def _errors(self, eps_hat, eps, t, w_mse):
        """The mean squared error, and the same times w_mse, a number or one a level (T+2,)."""
        error = (eps_hat - eps).square().flatten(1).mean(1)                                 # (B,)
        weight = torch.as_tensor(w_mse).to(error).expand(self.T + 2)[t]
        return error.mean().detach(), (weight * error).mean()


# --------------------------------------------------------------- the two families, side by side


class DDM(Diffusion):
    """A denoising diffusion model: net(xt, t) -> eps_hat (B, ...) is told the level t."""

    def predict_noise(self, xt, t):
        return self.net(xt, self._levels(t, xt))

    def loss_at(self, xt, eps, t, w_mse=1.0):
        """The DDPM loss, MSE(eps_hat, eps), weighted as in CDM.loss_at."""
        mse, total = self._errors(self.net(xt, t), eps, t, w_mse)
        return Loss(total, torch.full_like(mse, math.nan), mse)


class CDM(Diffusion):
    """A classification diffusion model: to guess the level is the net's task.

    net, any callable (an exact classifier can stand in), is of one of two kinds:
        net(x) -> logits (B, T+2) of all levels at once, as in the paper;
        net(x, levels) -> log p_t(x) / p_{T+1}(x) at the levels asked about, (B, n) -> (B, n), 0 at
        T+1; its attribute takes_levels is True. It is not told which of them is the level of x.
    Rows must not influence each other (no BatchNorm), and the second derivative must not vanish
    (SiLU, not ReLU)."""

    def log_ratio(self, x, levels):
        """log p_t(x) / p_{T+1}(x) = l_t(x) - l_{T+1}(x), nats, at levels t: (B, n) -> (B, n).

        Bayes' rule, t being uniform; the one place that knows of which kind the network is."""
        asked = getattr(self.net, "takes_levels", False)
        out = self.net(x, levels) if asked else self.net(x)
        shape = levels.shape if asked else (len(x), self.T + 2)
        if out.shape != shape:
            raise ValueError(f"net must give logits {tuple(shape)}, got {tuple(out.shape)}")
        return out if asked else out.gather(1, levels) - out[:, -1:]

    def log_prob(self, x, t=0):
        """Theorem 3.2: log p_t(x), nats (B,), from one forward pass. t = 0 is the data density."""
        return self.log_ratio(x, self._levels(t, x)[:, None])[:, 0] + log_normal(x)

    def predict_noise(self, xt, t):
        """Theorem 3.1: eps_hat = sigma_t (xt - grad_x [l_t(xt) - l_{T+1}(xt)])."""
        return self.ratio_and_noise(xt, self._levels(t, xt)[:, None])[1]

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

    def draw(self, x0, window=None):
        """One training step's xt, eps, levels (B, K), and which (B,): the index of the true level.

        The true levels are stratified over 0 .. T+1. `levels` are all T+2 or, with window = K > 1,
        K neighbours that hold the true one at a random place; some may lie outside of 0 .. T+1. As
        all places are equally likely, the posterior over the window is the softmax of its logits
        alone (McFadden 1978), and the step costs the same whatever T."""
        xt, eps, t = super().draw(x0, low=0, high=self.T + 1)
        K = self.T + 2 if window is None else window
        which = t if window is None else torch.randint(K, t.shape, device=t.device)
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
        log_ratio, eps_hat = self.ratio_and_noise(xt, levels, which)
        mse, total = self._errors(eps_hat, eps, levels.gather(1, which[:, None])[:, 0], w_mse)
        ce = F.cross_entropy(log_ratio.masked_fill(~inside, -math.inf), which)
        return Loss(total + w_ce * ce, ce.detach(), mse)


# ----------------------------------------------------------------- samples, of a class if need be


@torch.no_grad()
def sample(model, xT, steps=50, method="ddim"):
    """Samples (B, ...) from the noise xT ~ N(0, I) by exactly `steps` calls of predict_noise.

    method: "ddpm" (ancestral, Ho et al. 2020; too narrow by O(1/steps)), "ddim" (deterministic,
    Song et al. 2021) or "dpm" (DPM-Solver++ 2M, Lu et al. 2022; for few steps). A step goes from a
    level t to any lower one, s, so that 1 to T steps will do. ValueError for others."""
    if method not in ("ddpm", "ddim", "dpm") or steps not in range(1, model.T + 1):
        raise ValueError(f"must be ddpm, ddim or dpm, steps 1 .. {model.T}: {method!r}, {steps!r}")
    alpha, sigma = (v.tolist() for v in model.schedule)
    levels = [model.T - i * model.T // steps for i in range(steps + 1)]                 # T .. 0
    x, last_x0, last_h = xT, None, None
    for t, s in zip(levels, levels[1:]):
        eps_hat = model.predict_noise(x, t)
        x0_hat = (x - sigma[t] * eps_hat) / alpha[t]
        if method == "dpm":                # x0_hat extrapolated to the middle of the step
            h = math.log(alpha[s] * sigma[t] / (sigma[s] * alpha[t])) if s else math.inf
            bend = h / (2 * last_h) * (x0_hat - last_x0) if s and last_h else 0
            reach = alpha[s] - alpha[t] * sigma[s] / sigma[t]
            x = sigma[s] / sigma[t] * x + reach * (x0_hat + bend)
            last_x0, last_h = x0_hat, h
        else:                              # DDPM is DDIM with part of its eps_hat drawn afresh
            fresh = sigma[t] ** 2 - (alpha[t] / alpha[s] * sigma[s]) ** 2        # var of x_t | x_s
            std = sigma[s] / sigma[t] * math.sqrt(fresh) if method == "ddpm" else 0.0
            kept = math.sqrt(max(0, sigma[s] ** 2 - std ** 2))
            x = alpha[s] * x0_hat + kept * eps_hat + std * torch.randn_like(x)
    return x


def given(model, y, guidance=0.0):
    """The same model, weights shared, of p(x given y), for the labels y, long (B,), of B rows.

    Its net is called as net(.., y=y), and without y for "any class". guidance w (Ho, Salimans 2022)
    overstates what labels change in the output, out(y) + w (out(y) - out()): 0 is p(x given y),
    more is more typical of y, but no density. ValueError if y is not long (B,)."""
    def net(x, *level):
        if not torch.is_tensor(y) or y.dtype != torch.long or y.shape != x.shape[:1]:
            raise ValueError(f"labels y must be a long tensor ({len(x)},), got {y!r}")
        out = model.net(x, *level, y=y)
        return out + guidance * (out - model.net(x, *level)) if guidance else out

    net.takes_levels = getattr(model.net, "takes_levels", False)
    labelled = object.__new__(type(model))
    labelled.__dict__.update(model.__dict__, net=net)
    return labelled


# ------------------------------------------------------- audits: can the likelihood be believed?


@torch.no_grad()
def elbo(model, x0, draws=4):
    """Lower bound on E[log p_1(x_1) given x_0], nats (B,), from `draws` random levels per row.

    -bound = KL(q(x_T|x_0) || N(0, I)) + 1/2 int E||eps - eps_hat||^2 dlog-SNR + entropy of
    q(x_1|x_0) (Kingma et al. 2021), the integral by the trapezoid rule on stratified levels: draws
    = T takes each once. Loose by the denoiser's error, and blind to the constants."""
    (alpha, sigma), T, d = model.schedule, model.T, x0.flatten(1).shape[1]
    step = F.pad(-2 * (alpha / sigma).log()[1:-1].diff(), (1, 1))    # in log-SNR; none at the ends
    width, integral = ((step[:-1] + step[1:]) / 2).to(x0), 0                              # (T,)
    start = (torch.randperm(len(x0)) + torch.rand(len(x0))).to(x0) / len(x0)           # in 0 .. 1
    for i in range(draws):
        t = ((i + start) / draws * T).long().clamp(max=T - 1) + 1
        eps = torch.randn_like(x0)
        error = eps - model.predict_noise(model.add_noise(x0, t, eps), t)
        integral = integral + width[t - 1] * error.square().flatten(1).sum(1)
    rest, var = (alpha[T].item() * x0).square().flatten(1).sum(1), sigma[T].item() ** 2
    prior = 0.5 * (rest + d * (var - 1 - math.log(var)))                 # KL(q(x_T|x_0) || N(0, I))
    entropy = d * math.log(sigma[1] * math.sqrt(2 * math.pi * math.e))          # of q(x_1|x_0)
    return -(integral * T / draws / 2 + prior + entropy)


@torch.no_grad()
def ode_log_prob(model, x, t=1, probes=0):
    """log p_t(x), nats (B,), by the probability-flow ODE from level t (1 .. T-1) to level T.

    In y = x/alpha and tau = sigma/alpha the flow is dy/dtau = eps_hat, and log p changes by its
    divergence (Song et al. 2021). Heun's method from level to level, two predict_noise calls each.
    probes = 0: exact trace, d backward passes a call; probes = n: Hutchinson's unbiased estimate
    from n random sign vectors. ValueError for other t."""
    if t not in range(1, model.T):
        raise ValueError(f"t must be an int in 1 .. T-1 = {model.T - 1}, got {t!r}")
    alpha, sigma, d = *(v.tolist() for v in model.schedule), x.flatten(1).shape[1]
    units = torch.eye(d).to(x).view(d, 1, *x.shape[1:]).expand(d, *x.shape)
    vectors = (torch.randint(0, 2, (probes, *x.shape)) * 2 - 1).to(x) if probes else units

    def flow(y, t):
        """dy/dtau, and its divergence times tau: what log p loses per log(tau)."""
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
    level 1: n chains take DDPM steps down, n are noised up. w: how much likelier a chain's path is
    as one of p_1 noised up than as one of N(0, I) stepped down, as a log. Down, E[exp w] = Z, so
    E[w] <= log Z (Jensen); up, if data follow p_1, E[exp -w] = 1/Z, so E[w] >= log Z. Bennett's
    acceptance ratio (1976) joins both; if 3 chains or fewer overlap, middle and half of the bracket
    stand in. It sees what data or the model's own samples reach."""
    (alpha, sigma), T, d = (v.tolist() for v in model.schedule), model.T, x1.flatten(1).shape[1]

    def log_weights(x, down):
        w = -log_normal(x) if down else model.log_prob(x, 1)
        for low in sorted(range(1, T), reverse=down):
            high, eps = low + 1, torch.randn_like(x)
            carry = alpha[high] / alpha[low]
            fresh = math.sqrt(sigma[high] ** 2 - (carry * sigma[low]) ** 2)  # std of x_high | x_low
            back = fresh * sigma[low] / sigma[high]                   # std of DDPM's x_low | x_high
            x_high = x if down else carry * x + fresh * eps
            mean = (x_high - fresh ** 2 / sigma[high] * model.predict_noise(x_high, high)) / carry
            x_low = mean + back * eps if down else x
            w = w + log_normal((x_high - carry * x_low) / fresh) - log_normal((x_low - mean) / back)
            w, x = w + d * math.log(back / fresh), x_low if down else x_high
        return (w + model.log_prob(x, 1) if down else w - log_normal(x)).cpu().double()

    down, up = log_weights(torch.randn_like(x1), True), log_weights(x1, False)
    least, most = torch.cat([down, up]).aminmax()
    for _ in range(60):                         # bisect to where as many are accepted of each kind
        value = (least + most) / 2
        accept = torch.stack([torch.sigmoid(down - value), torch.sigmoid(value - up)])      # (2, n)
        least, most = (value, most) if accept[0].sum() > accept[1].sum() else (least, value)
    chains = accept.sum(1).square() / accept.square().sum(1)        # that count of them, at most n
    below, error, above = down.mean(), (1 / chains - 1 / len(x1)).sum().sqrt(), up.mean()
    if not chains.min() > 3:
        value, error = (below + above) / 2, (above - below).abs() / 2
    return tuple(v.item() for v in (value, error, below, above))


@torch.no_grad()
def bits_per_dim(model, images, by=None, **options):
    """Upper bound on -log2 P(k)/d, bits/dim (B,), of 8-bit images k (uint8, (B, ...)).

    Pixels on a lattice have no density, so the bound goes through level 1, a slightly noisy x_1:
        -log P(k) <= E[ log q(x_1|k) - log p_1(x_1) - log P(k|x_1) ]
    with P(k|x_1) a softmax over the 256 grey values, pixel by pixel. It is tight when sigma_1 is at
    most an eighth of a grey step (log-SNR 14). Grey value k stands at x_0 = (2k+1)/256 - 1.
    by: where log p_1 comes from, None for one forward pass of a CDM (theorem 3.2), elbo, or
    ode_log_prob, with their `options`. ValueError for images that are not uint8."""
    if images.dtype != torch.uint8 or by not in (None, elbo, ode_log_prob):
        raise ValueError(f"images must be uint8 (got {images.dtype}), by one of those three: {by}")
    alpha, sigma = (float(v[1]) for v in model.schedule)
    grey = ((2 * torch.arange(256, device=images.device) + 1) / 256 - 1).to(model.alpha)
    x0, d = grey[images.long()], images.flatten(1).shape[1]
    eps = torch.randn_like(x0)
    x1 = alpha * x0 + sigma * eps
    fit = -((x1.flatten()[:, None] - alpha * grey) / sigma).square() / 2               # (B d, 256)
    log_k = -F.cross_entropy(fit, images.long().flatten(), reduction="none").view(len(x0), d)
    log_q = log_normal(eps) - d * math.log(sigma)
    if by is elbo:                                       # it averages over eps, and so must log q
        x1, log_q = x0, -d * math.log(sigma * math.sqrt(2 * math.pi * math.e))
    log_p1 = by(model, x1, **options) if by else model.log_prob(x1, 1)
    return (log_q - log_p1 - log_k.sum(1)) / (d * math.log(2))
