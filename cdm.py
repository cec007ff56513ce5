"""Classification Diffusion Models (CDM): the whole method in one file.

A network looks at a noisy sample and guesses how noisy it is. Its logits l_t(x) contain two more
models: a likelihood, and the denoiser that diffusion sampling needs (Yadin, Elata, Michaeli,
NeurIPS 2024, arXiv 2402.10095).

    noise           x_t = alpha_t x_0 + sigma_t eps,   eps ~ N(0, I);   p_t is the density of x_t
    classifier      softmax(l(x))_t = p(t | x),        all levels t are equally likely
    theorem 3.2     log p_t(x) = l_t(x) - l_{T+1}(x) + log N(x; 0, I)
    theorem 3.1     E[eps | x_t = x] = sigma_t (x - gradient of [l_t(x) - l_{T+1}(x)])

The theorems have the paper's numbers. 3.2 is Bayes' rule: all p(t | x) share one denominator, and
p_{T+1} = N(0, I) is known. 3.1 is the gradient of 3.2, because grad log N(x; 0, I) = -x and, by
Tweedie's formula, E[eps | x_t = x] = -sigma_t grad log p_t(x).

    level t          0: clean data      1 .. T: more and more noise    T+1: pure noise
    alpha, sigma     1, 0               alpha falls, sigma grows       0, 1
    used for         log p_0            sampling; 8-bit likelihoods    the known density

Samples x are (B, ...), a batch of B rows; a level t is an int or an integer tensor (B,).
Likelihoods are in nats. **cond, such as y=labels, goes to the network. An int that is no
level, or x of a wrong shape or type, raises ValueError.
"""

import math
import numbers
from collections import namedtuple
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------ 1. noise levels
Schedule = namedtuple("Schedule", "alpha sigma")       # float64 (T+2,): alpha 1 -> 0, sigma 0 -> 1


def log_snr_schedule(T=64, first=14.0, last=-8.0):
    """The log of the signal-to-noise ratio, SNR = alpha^2 / sigma^2, falls in equal steps, from
    `first` at t = 1 to `last` at t = T. With alpha^2 + sigma^2 = 1, alpha^2 = sigmoid(log SNR)."""
    log_snr = torch.linspace(first, last, T, dtype=torch.float64)
    log_snr = torch.cat([torch.tensor([math.inf]), log_snr, torch.tensor([-math.inf])])
    return Schedule(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())


# --------------------------------------------------------------------------- 2. the classifier
class CDM(nn.Module):
    """net(x, **cond) -> logits (B, T+2). The network is never told the true level: inferring it is
    its task. Rows must not interact (no BatchNorm). Training needs second derivatives: use smooth
    activations (SiLU, not ReLU), sdpa_kernel(SDPBackend.MATH) for attention, no checkpointing."""

    def __init__(self, net, schedule):
        super().__init__()
        alpha, sigma = (v.double().cpu() for v in schedule)
        ends = [alpha[0], sigma[0], alpha[-1], sigma[-1]]
        if len(alpha) < 3 or ends != [1, 0, 0, 1] or not ((alpha / sigma).diff() < 0).all():
            raise ValueError(f"alpha / sigma must fall from 1 / 0 to 0 / 1, with T > 0: {schedule}")
        self.net, self.schedule, self.T = net, Schedule(alpha, sigma), len(alpha) - 2

    def losses(self, x0, **cond):
        """Cross-entropy and denoising error on clean data x0, to be added as w_ce * ce + mse.
        Cross-entropy teaches how large a ratio of densities is, but stops teaching once levels are
        never confused. The denoising error teaches the ratios' gradients, so it is blind to a
        constant added to a logit. At levels 0 and T+1 it learns nothing: eps_hat is 0 and eps."""
        refuse_inference_mode()
        t = self.level(torch.randint(self.T + 2, x0.shape[:1], device=x0.device), x0)
        eps = torch.randn_like(x0)
        xt = self.add_noise(x0, t, eps)

        def summed_log_ratio(x):                       # rows don't interact, so the sum's gradient
            logits = self.logits(x, **cond)            # has in row i that of row i's log-ratio
            return (logits.gather(1, t[:, None])[:, 0] - logits[:, -1]).sum(), logits

        gradient, logits = torch.func.grad(summed_log_ratio, has_aux=True)(xt)
        _, sigma = self.scales(t, xt)
        eps_hat = sigma * (xt - gradient)                                             # theorem 3.1
        return F.cross_entropy(logits, t), F.mse_loss(eps_hat, eps)

    def forward(self, x0, **cond):
        """`losses`, so that a model can be wrapped in DistributedDataParallel."""
        return self.losses(x0, **cond)

    def logits(self, x, **cond):
        """The network's logits, (B, T+2). Half precision, as under autocast, becomes float32."""
        logits = self.net(x, **cond)
        if not torch.is_tensor(logits) or logits.shape != (len(x), self.T + 2):
            raise ValueError(f"net must return {self.T + 2} logits per row, in a tensor")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def log_ratio(self, x, t, **cond):
        """log [p_t(x) / p_{T+1}(x)], (B,). By Bayes' rule, softmax(logits)_t is p_t(x) over the sum
        of all p_s(x). The sum cancels in the difference of two logits."""
        logits = self.logits(x, **cond)
        return logits.gather(1, self.level(t, x)[:, None])[:, 0] - logits[:, -1]

    def log_prob(self, x, t, **cond):
        """Theorem 3.2: log p_t(x), (B,), in one forward pass; t = 0 is the data density. It is what
        the network claims: nothing forces p_t to integrate to 1, so compare it with `elbo`. For
        8-bit images, which have no density, see bits_per_dim."""
        return self.log_ratio(x, t, **cond) + log_normal(x)

    def predict_noise(self, xt, t, **cond):
        """Theorem 3.1: eps_hat = E[eps | x_t = xt], by one forward and one backward pass."""
        refuse_inference_mode()
        gradient = torch.func.grad(lambda x: self.log_ratio(x, t, **cond).sum())(xt)
        _, sigma = self.scales(t, xt)
        return sigma * (xt - gradient)

    def denoise(self, xt, t, **cond):
        """E[x_0 | x_t = xt]: x_t = alpha_t x_0 + sigma_t eps, solved for x_0. This is impossible at
        T+1, where alpha is 0: an int raises ValueError, rows of a tensor t become inf or nan."""
        if not torch.is_tensor(t) and t == self.T + 1:
            raise ValueError(f"only levels up to {self.T} can be denoised, got {t}")
        alpha, sigma = self.scales(t, xt)
        return (xt - sigma * self.predict_noise(xt, t, **cond)) / alpha

    def add_noise(self, x0, t, eps):
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self.scales(t, x0)
        return alpha * x0 + sigma * eps

    def scales(self, t, x):
        """alpha_t and sigma_t for each row, shaped (B, 1, ..) to multiply x."""
        t, shape = self.level(t, x), (len(x),) + (1,) * (x.dim() - 1)
        tables = (v.to(x, non_blocking=x.is_cuda) for v in self.schedule)
        return [v.index_select(0, t).view(shape) for v in tables]

    def level(self, t, x):
        """The level of each row of x, a long tensor (B,). The values in a tensor t are not checked
        here, as reading them would stall a GPU; a bad one fails later, in indexing."""
        if not x.is_floating_point() or x.dim() < 2 or len(x) == 0:
            raise ValueError(f"x must be floats (B, ...), B > 0; got {x.dtype} {tuple(x.shape)}")
        if isinstance(t, numbers.Integral) and 0 <= t <= self.T + 1:
            t = torch.full((len(x),), int(t), device=x.device)
        if not torch.is_tensor(t) or t.is_floating_point() or t.shape not in ((), x.shape[:1]):
            raise ValueError(f"a level is 0 .. {self.T + 1} or a long tensor (B,), got {t!r}")
        return t.long().expand(len(x))


def refuse_inference_mode():
    """Before PyTorch 2.12, torch.func.grad silently returns zeros in inference mode."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise RuntimeError("use torch.no_grad() in place of torch.inference_mode()")


# --------------------------------------------------------------------------------- 3. sampling
@torch.no_grad()          # no graph for the weights; torch.func.grad w.r.t. x still works
def sample_step(model, xt, t, s, *, eta=0.0, guidance=0.0, **cond):
    """From x_t to x_s, at a lower level s: take the noise off, to get x_0, and put less of it back.
    With eta = 0 it is the same noise (DDIM, Song et al. 2021); with eta = 1, part of it is drawn
    afresh (DDPM, Ho et al. 2020)."""
    if not (0 <= s < t <= model.T and 0 <= eta <= 1):
        raise ValueError(f"0 <= s < t <= {model.T} and 0 <= eta <= 1 must hold: {t=}, {s=}, {eta=}")
    alpha, sigma = (v.tolist() for v in model.schedule)
    eps_hat = guided_noise(model, xt, t, guidance, cond)
    x0_hat = (xt - sigma[t] * eps_hat) / alpha[t]
    if eta > 0:                                # new: the fraction of the variance drawn afresh
        new = eta ** 2 * (1 - (alpha[t] * sigma[s] / (alpha[s] * sigma[t])) ** 2)
        eps_hat = math.sqrt(1 - new) * eps_hat + math.sqrt(new) * torch.randn_like(xt)
    return alpha[s] * x0_hat + sigma[s] * eps_hat


def sample(model, noise, steps=None, *, eta=0.0, guidance=0.0, **cond):
    """Turn noise ~ N(0, I), (B, ...), into samples, from level T to 0 in `steps` steps (None: T).
    alpha_T must be near 0, because pure noise stands in for x_T."""
    x = noise
    for t, s in pairwise(visited_levels(model, steps)):
        x = sample_step(model, x, t, s, eta=eta, guidance=guidance, **cond)
    return x


def visited_levels(model, steps):
    """The steps + 1 levels, from T down to 0, that a sampler visits. None: all levels."""
    steps = model.T if steps is None else steps
    if not (isinstance(steps, numbers.Integral) and 1 <= steps <= model.T):
        raise ValueError(f"steps must be an int in 1 .. {model.T}, got {steps!r}")
    return [model.T - (i * model.T) // steps for i in range(steps + 1)]


def guided_noise(model, x, t, guidance, cond):
    """eps_hat, given cond. Classifier-free guidance (Ho, Salimans 2022) pushes it away from the
    eps_hat without cond."""
    if guidance and not cond:
        raise ValueError("guidance needs a condition to exaggerate, such as y=labels")
    eps_hat = model.predict_noise(x, t, **cond)
    if guidance:
        eps_hat = eps_hat + guidance * (eps_hat - model.predict_noise(x, t))
    return eps_hat


# ------------------------------------------------------------------------------ 4. likelihoods
def log_normal(x):
    """log N(x; 0, I) in nats, (B, ...) -> (B,). Rejects half precision, which loses nats."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a likelihood needs float32 or float64, got {x.dtype}")
    return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def bits_per_dim(log_p1, sigma1, d):
    """-log2 P(k) / d of images k of d pixels with greys 0 .. 255: the bits that a compressor needs
    per pixel. With x_0 = (2k+1)/256 - 1, log_p1 (B,) is log_prob(x_1, 1) or elbo(x_0), in nats.
    Greys have no density, but the noisy x_1 has one. It counts the bits of image and noise, so we
    subtract the noise's entropy: -log2 P(k) <= E[log2 q(x_1|x_0) - log2 p_1(x_1) - log2 P(k|x_1)].
    The last term is dropped: at most 3e-4 bits per pixel, if sigma_1 is 1/8 of a grey step."""
    if not 0 < sigma1 <= 2 / 256 / 8:
        raise ValueError(f"sigma_1 must be at most {2 / 256 / 8:.5f}, got {float(sigma1):.5f}")
    noise_entropy = math.log2(sigma1 * math.sqrt(2 * math.pi * math.e))           # bits per pixel
    return -log_p1 / (d * math.log(2)) - noise_entropy


@torch.no_grad()
def elbo(model, x0, **cond):
    """A lower bound on E[log p_1(x_1) | x_0], (B,), in nats, by the denoiser alone. This p_1 is not
    exp(log_prob), but the level-1 density of DDPM with infinitely many steps (Kingma et al. 2021):
    E[log N(x_T; 0, I)] + d log(sigma_T / sigma_1) - 1/2 integral of ||eps - eps_hat||^2 d(log SNR),
    with d = dim(x_0), by the trapezoid rule, which needs close levels, and one eps per level."""
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
    prior = log_normal(float(alpha[T]) * x0) - d * float(sigma[T]) ** 2 / 2     # E log N(x_T; 0, I)
    return prior + d * math.log(sigma[T] / sigma[1]) - integral / 2


# --------------------------------------- 5. the paper's other schedules and sampler, for reference
def ddpm_schedule(T=1000):
    """alpha_t^2 is the product of 1 - beta, with beta rising from 1e-4 to 0.02 (Ho et al. 2020). If
    T > 1 is not 1000, a level stands for 1000/T of these steps, so that alpha_T^2 stays 4e-5."""
    if T < 2:
        raise ValueError(f"the DDPM schedule needs T > 1, got {T}")
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    alpha2 = torch.exp(1000 / T * torch.log1p(-beta).cumsum(0))                   # levels 1 .. T
    alpha2 = torch.cat([torch.ones(1), alpha2, torch.zeros(1)])
    return Schedule(alpha2.sqrt(), (1 - alpha2).sqrt())


def uniform_schedule(T=1000):
    """sigma_t = t/(T+1), alpha_t^2 = 1 - sigma_t^2, as in TRE (Rhodes et al. 2020)."""
    sigma = torch.linspace(0, 1, T + 2, dtype=torch.float64)
    return Schedule((1 - sigma ** 2).sqrt(), sigma)


def ot_schedule(T=1000):
    """sigma_t = t/(T+1), alpha_t = 1 - sigma_t: the straight path of flow matching."""
    sigma = torch.linspace(0, 1, T + 2, dtype=torch.float64)
    return Schedule(1 - sigma, sigma)


@torch.no_grad()
def dpm_solver(model, noise, steps=20, *, guidance=0.0, **cond):
    """DPM-Solver++ 2M (Lu et al. 2022): DDIM made second-order, for few steps. Each step, of length
    h in log(alpha / sigma), extrapolates x0_hat linearly to the step's midpoint."""
    x, last_x0_hat, last_h = noise, None, None
    alpha, sigma = (v.tolist() for v in model.schedule)
    for t, s in pairwise(visited_levels(model, steps)):
        eps_hat = guided_noise(model, x, t, guidance, cond)
        x0_hat = middle = (x - sigma[t] * eps_hat) / alpha[t]
        if s == 0:
            return x0_hat
        h = math.log(alpha[s] * sigma[t] / (alpha[t] * sigma[s]))
        if last_h is not None:                                       # from the second step on
            middle = x0_hat + h / (2 * last_h) * (x0_hat - last_x0_hat)
        x = alpha[s] * middle + sigma[s] / sigma[t] * (x - alpha[t] * middle)
        last_x0_hat, last_h = x0_hat, h
