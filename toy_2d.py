"""Density ratio estimation in the plane, where the truth is known: CDM beside what came before it.

    python toy_2d.py                two minutes on two CPU cores, no download
    python toy_2d.py --seeds 3      the README's table, mean and spread
    python toy_2d.py --chasm        up to 160 dimensions, where the older methods fail

Seven ways to learn log p(x), each a short function over one network and one budget of samples:
NCE, TRE, a noise-level classifier (CE), its gradient alone (MSE), the time score, CDM, and a
denoising diffusion model (DDM). Prints how far each is from the truth and draws runs/toy_2d/*.png.
Not here: images (mnist.py) and the method itself (cdm.py).
"""

import argparse
import concurrent.futures
import csv
import math
import os
import statistics
import time
from pathlib import Path
from typing import Callable, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import make_moons, make_swiss_roll
from torch import nn

from cdm import (CDM, DDM, log_normal, log_snr_schedule, ode_log_prob, stratified_levels,
                 uniform_schedule)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen: no screen is needed)

SCHEDULE = log_snr_schedule(T=20, first=10, last=-6)   # few levels: neighbours still overlap in 2-D
EXACT = dict(color="black", linestyle="--", linewidth=1)
HALF, CELLS = 4.25, 160                                # evaluation grid: [-4.25, 4.25]^2, 160 x 160

# ------------------------------------------------------------------------------------- the truth


class Oracle:
    """A density known exactly at every level, with the model's interface (float64).

    A mixture of equal bumps: squares of half-width `half`, blurred by Gaussian noise `std`.
    half = 0 gives Gaussians, std = 0 a checkerboard. Noising scales the centres and the squares by
    alpha_t and adds sigma_t^2 to the variance, so every level is again such a mixture."""

    def __init__(self, centres, std=0.0, half=0.0, weights=None, schedule=SCHEDULE):
        self.centres, self.std, self.half, self.schedule = centres.double(), std, half, schedule
        self.weights = torch.ones(len(centres)) if weights is None else torch.tensor(weights)
        self.weights = (self.weights / self.weights.sum()).double()

    def sample(self, n, t=0):
        """n draws from p_t: (n, 2)."""
        centre = self.centres[torch.multinomial(self.weights, n, replacement=True)]
        x0 = centre + self.half * (2 * torch.rand(n, 2) - 1) + self.std * torch.randn(n, 2)
        return self.schedule.alpha[t] * x0 + self.schedule.sigma[t] * torch.randn(n, 2)

    def log_prob(self, x, t=0):
        """log p_t(x) in nats: (B, 2) -> (B,)."""
        alpha, sigma = float(self.schedule.alpha[t]), float(self.schedule.sigma[t])
        half, std = alpha * self.half, math.hypot(alpha * self.std, sigma)
        gap = (x[:, None] - alpha * self.centres).abs()                                  # (B, K, 2)
        if half == 0:
            log_bump = -0.5 * (gap / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
        elif std == 0:
            log_bump = torch.where(gap < half, -math.log(2 * half), -math.inf)
        else:                                  # a box blurred by a Gaussian: log of Phi(b) - Phi(a)
            high, low = (torch.special.log_ndtr((edge - gap) / std) for edge in (half, -half))
            log_bump = high + torch.log(-torch.expm1(low - high)) - math.log(2 * half)
        return (log_bump.sum(2) + self.weights.log()).logsumexp(1)

    def logits(self, x):
        """The exact classifier: log p_t(x) of every level, (B, T+2)."""
        return torch.stack([self.log_prob(x, t) for t in range(len(self.schedule.alpha))], 1)

    def denoise(self, x, t):
        """E[x_0 | x_t = x], by theorem 3.1 from the exact logits."""
        return CDM(self.logits, self.schedule).denoise(x, t)


def eight_gaussians():
    angle = torch.arange(8) * math.pi / 4
    return Oracle(math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1), std=0.1)


def checkerboard():
    corner = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2])
    return Oracle((corner - 1.5) * 0.85, half=0.425)


def two_moons():
    centres = torch.from_numpy(make_moons(200, shuffle=False)[0])
    return Oracle((centres - centres.mean(0)) / centres.std(0), std=0.1)


def swiss_roll():
    points, along = make_swiss_roll(4000, random_state=0)
    evenly = along.argsort()[5::10]                                                    # 400 of them
    centres = torch.from_numpy(points[evenly][:, [0, 2]])
    return Oracle((centres - centres.mean(0)) / centres.std(0), std=0.1)


def pinwheel():
    along = torch.special.ndtri((torch.arange(40) + 0.5) / 40)           # quantiles of N(0, 1)
    arm = torch.arange(5)[:, None] * 2 * math.pi / 5
    radius, angle = 1 + 0.3 * along, arm + 0.25 * torch.exp(0.3 * along)
    centres = torch.stack([radius * angle.cos(), radius * angle.sin()], 2).view(-1, 2)
    return Oracle(centres / centres.std(0), std=0.1)


def two_modes():
    """Too far apart for a gradient to relate them: which methods get the weights right?"""
    return Oracle(torch.tensor([(-1.2, 0.0), (1.2, 0.0)]), std=0.15, weights=[0.9, 0.1])


# one of your own: an Oracle of torch centres about 1 from 0, well inside of +-4.25; list it here
DATASETS = {f.__name__: f for f in (eight_gaussians, checkerboard, two_moons, swiss_roll, pinwheel,
                                    two_modes)}

# ------------------------------------------------------------------------------------ the methods


class MLP(nn.Module):
    """Points (B, d), with a time (B,) in 0 .. 1 where a method needs it -> (B, outputs).

    A plain MLP is too smooth for the plane, so it is shown waves of its inputs too."""

    def __init__(self, inputs, outputs, width=96, layers=4, waves=16, highest=1.0):
        super().__init__()
        steps = torch.arange(1, waves + 1) / max(waves, 1)
        self.register_buffer("frequency", 2 * math.pi * highest * steps)
        sizes = [inputs + 2 * waves * inputs] + [width] * layers
        hidden = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, outputs))

    def forward(self, x, time=None):
        if time is not None:
            x = torch.cat([x, time[:, None]], 1)
        phase = (x[..., None] * self.frequency).flatten(1)                            # (B, d waves)
        return self.net(torch.cat([x, phase.sin(), phase.cos()], 1))


class Method(NamedTuple):
    """What a method is: a network to train, its loss(x0), log_prob(x) in nats, and how many passes
    (forward or backward) through the network one log_prob takes."""
    net: nn.Module
    loss: Callable
    log_prob: Callable
    passes: int


def nce(make, schedule):
    """Noise-contrastive estimation (Gutmann, Hyvarinen 2010): one classifier, data or N(0, I)?"""
    net = make(1)                                                  # h(x) = log p(x) / N(x; 0, I)

    def loss(x0):
        return F.softplus(-net(x0)).mean() + F.softplus(net(torch.randn_like(x0))).mean()

    return Method(net, loss, lambda x: net(x)[:, 0] + log_normal(x), 1)


def tre(make, schedule, bridges=9):
    """Telescoping ratios (Rhodes et al. 2020): a binary classifier for each pair of neighbours in a
    chain from data to N(0, I), sigma_k = k/bridges. A pair shares x0 and eps: much less noise."""
    alpha, sigma = (v.float() for v in uniform_schedule(bridges - 1))
    net = make(bridges)                                            # h_k(x) = log p_k / p_{k+1}

    def loss(x0):
        k, eps = stratified_levels(len(x0), 0, bridges - 1)[:, None], torch.randn_like(x0)
        near, far = (net(alpha[i] * x0 + sigma[i] * eps).gather(1, k) for i in (k, k + 1))
        return F.softplus(-near).mean() + F.softplus(far).mean()

    return Method(net, loss, lambda x: net(x).sum(1) + log_normal(x), 1)


def classifier(w_ce, w_mse, t=0):
    """One classifier of all levels (Yair, Michaeli 2022 with CE alone; CDM with both losses)."""
    def method(make, schedule):
        model = CDM(make(len(schedule.alpha)), schedule)
        return Method(model, lambda x0: model.loss(x0, w_ce=w_ce, w_mse=w_mse).total,
                      lambda x: model.log_prob(x, t), 1)
    return method


def time_score(make, schedule, points=40):
    """DRE-infinity (Choi et al. 2022): regress s = d log p_a / da for x = cos(a) x0 + sin(a) eps, a
    from 0 (data) to pi/2, then integrate it. The target (Yu et al. 2025), times sigma = sin(a) to
    keep its variance bounded, is the same derivative of log p_a(x given x0)."""
    net = make(1, timed=True)

    def loss(x0):
        time = (torch.arange(len(x0)) + torch.rand(())) / len(x0)
        alpha, sigma = (wave(time * math.pi / 2)[:, None] for wave in (torch.cos, torch.sin))
        eps = torch.randn_like(x0)
        target = (alpha * (eps ** 2 - 1) - sigma * eps * x0).sum(1)
        return F.mse_loss(sigma[:, 0] * net(alpha * x0 + sigma * eps, time)[:, 0], target)

    def log_prob(x):                                                      # by the midpoint rule
        times = (torch.arange(points) + 0.5) / points
        s = sum(net(x, time.expand(len(x)))[:, 0] for time in times) / points
        return log_normal(x) - math.pi / 2 * s

    return Method(net, loss, log_prob, points)


def ddm(make, schedule):
    """A denoising diffusion model (Ho et al. 2020): log p by the probability-flow ODE.

    Twice the levels: at 20 the ODE solver alone would cost a KL of 0.01 to 0.02, at 40 0.0002."""
    net, T = make(2, timed=True), 2 * (len(schedule.alpha) - 2)
    first, *_, last = (2 * (schedule.alpha / schedule.sigma).log())[1:-1].tolist()
    model = DDM(lambda xt, t: net(xt, t / T), log_snr_schedule(T, first, last))
    return Method(net, lambda x0: model.loss(x0).total, lambda x: ode_log_prob(model, x, t=1),
                  2 * (T - 1) * 3)             # Heun: two slopes a step, each 1 forward, 2 backward


# MSE teaches nothing at level 0 and the ODE ends at level 1: their log p_1 stands in for log p_0
# (sigma_1 = 0.0067 is little beside the densities' 0.1)
# in the plane the cross-entropy leads (see CDM.loss)
METHODS = {"NCE": nce, "TRE": tre, "CE": classifier(1.0, 0.0), "MSE": classifier(0.0, 1.0, t=1),
           "time-score": time_score, "CDM": classifier(1.0, 0.3), "DDM-ODE": ddm}


def train(method, draw, steps, lr=5e-3):
    """Adam on method.loss of fresh batches draw(), with a short warm-up and a cosine decay."""
    optimiser = torch.optim.Adam(method.net.parameters())
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(20 * step / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        method.loss(draw()).backward()
        optimiser.step()


# ------------------------------------------------------------------------------------ measurement


def grid():
    """Centres of the evaluation cells: (CELLS^2, 2), float64."""
    axis = (torch.arange(CELLS, dtype=torch.float64) + 0.5) * (2 * HALF / CELLS) - HALF
    return torch.cartesian_prod(axis, axis)


@torch.no_grad()
def evaluate(log_prob, oracle):
    """How far is a density from the truth? By quadrature on the grid, all in nats:

    KL_raw = E_data[log p - log q] takes q as the model states it, log Z = log of the integral of q.
    A q that is not normalised can have KL_raw < 0; KL = KL_raw + log Z >= 0 is the honest number.
    left: the share of q at x < 0. Returns the numbers, and log p and log q on the grid. ValueError
    if over 1 % of p lies off the grid: then no number would mean anything."""
    points, cell = grid(), (2 * HALF / CELLS) ** 2
    log_q = torch.cat([log_prob(x.float()) for x in points.split(1600)]).double()
    log_p = torch.cat([oracle.log_prob(x) for x in points.split(3000)])
    p = log_p.exp() * cell
    if p.sum() < 0.99:
        raise ValueError(f"{1 - p.sum():.0%} of the density lies outside +-{HALF}; shrink it")
    kl_raw = torch.where(p > 0, p * (log_p - log_q), 0).sum().item() / p.sum().item()
    log_z = (torch.logsumexp(log_q, 0) + math.log(cell)).item()
    left = log_q.softmax(0)[points[:, 0] < 0].sum().item()
    return dict(KL=kl_raw + log_z, log_Z=log_z, KL_raw=kl_raw, left=left), log_p, log_q


@torch.no_grad()
def posterior(logits, oracle, n=500):
    """What a classifier thinks of points of four true levels: mean of l_t(x) - max_s l_s(x)."""
    torch.manual_seed(0)
    last = len(oracle.schedule.alpha) - 1
    rows = {t: logits(oracle.sample(n, t).float()) for t in (0, last // 3, 2 * last // 3, last)}
    return {t: (l - l.amax(1, keepdim=True)).mean(0).numpy() for t, l in rows.items()}


def run(dataset, name, steps, seed):
    """One training and all that tables and figures need of it; runs in a process of its own."""
    torch.set_num_threads(1)                       # small tensors: two runs side by side are faster
    torch.manual_seed(seed)
    oracle = DATASETS[dataset]()
    x0, start = oracle.sample(200_000).float(), time.time()
    method = METHODS[name](lambda outputs, timed=False: MLP(2 + timed, outputs), SCHEDULE)
    train(method, lambda: x0[torch.randint(len(x0), (512,))], steps)
    seconds = time.time() - start
    row, log_p, log_q = evaluate(method.log_prob, oracle)
    pictures = dict(truth=log_p.numpy(), learned=log_q.numpy())
    if name == "CDM":
        pictures["samples"] = method.net.sample((3000, 2), steps=20, method="ddpm").numpy()
    if name in ("CE", "CDM"):
        pictures["posterior"] = posterior(method.net.logits, oracle)
    return dict(dataset=dataset, method=name, seed=seed, **row, passes=method.passes,
                seconds=seconds), pictures


# ------------------------------------------------------------------------------ the density chasm

# in many dimensions the MSE must lead: see CDM.loss
CHASM = {"NCE": nce, "TRE": tre, "CE": METHODS["CE"], "time-score": time_score,
         "CDM": classifier(0.01, 1.0)}


class CorrelatedPairs:
    """N(0, S) in d dimensions, S = 1 but for correlation RHO within pairs of numbers: an oracle.

    The mean of its log-ratio to N(0, I), the KL divergence of the two, is d/4 nats."""
    RHO, schedule = 0.79506, log_snr_schedule(T=40, first=7, last=-6)

    def __init__(self, d):
        self.d = d

    def sample(self, n, t=0):
        first, second = torch.randn(2, n, self.d // 2)
        x0 = torch.cat([first, self.RHO * first + math.sqrt(1 - self.RHO ** 2) * second], 1)
        return self.schedule.alpha[t] * x0 + self.schedule.sigma[t] * torch.randn(n, self.d)

    def logits(self, x):
        """log p_t(x): a pair's sum and difference are independent, of variance 1 +- r."""
        a, b = x.double().chunk(2, 1)
        u, v = ((a + b) ** 2 / 2).sum(1, keepdim=True), ((a - b) ** 2 / 2).sum(1, keepdim=True)
        r = self.schedule.alpha ** 2 * self.RHO                                          # (T+2,)
        return -(u / (1 + r) + v / (1 - r) + self.d / 2 * torch.log(1 - r * r)) / 2


def chasm_run(d, name, steps, seed):
    """The mean log-ratio a method finds between correlated pairs and N(0, I), and its error (root
    mean square, point by point), on 10000 fresh samples."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    oracle, start = CorrelatedPairs(d), time.time()
    make = lambda outputs, timed=False: MLP(d + timed, outputs, width=256, layers=3, waves=0)
    method = CHASM[name](make, oracle.schedule)
    train(method, lambda: oracle.sample(512).float(), steps, lr=2e-3)
    seconds, x = time.time() - start, oracle.sample(10_000).float()
    exact = oracle.logits(x)
    with torch.no_grad():
        found = method.log_prob(x) - log_normal(x)
    rms = (found - (exact[:, 0] - exact[:, -1])).square().mean().sqrt()
    row = dict(d=d, method=name, seed=seed, true=d / 4, found=found.mean().item(), rms=rms.item(),
               seconds=seconds)
    return row, posterior(method.net.logits, oracle) if name in ("CE", "CDM") else None


# ------------------------------------------------------------------------------ tables and figures


def in_parallel(function, jobs, out):
    """function(*job) -> (row, pictures) of every job, a process per core. Rows are saved as CSV."""
    results = []
    print(f"{len(jobs)} trainings", flush=True)
    with concurrent.futures.ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        for row, pictures in pool.map(function, *zip(*jobs)):
            results.append((row, pictures))
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in row.items()), flush=True)
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, results[0][0])
        writer.writeheader()
        writer.writerows(row for row, _ in results)
    return results


def pivot(rows, title, down, across, value, digits, means=()):
    """Print a Markdown table of row[value], mean ± standard deviation over seeds; then `means` of
    other columns."""
    columns = list(dict.fromkeys(r[across] for r in rows))
    lines = [[down, *(f"{c}" for c in columns), *means]]
    for name in dict.fromkeys(r[down] for r in rows):
        mine = [r for r in rows if r[down] == name]
        lines.append([f"{name}"])
        for column in columns:
            seeds = [r[value] for r in mine if r[across] == column]
            lines[-1].append(f"{statistics.mean(seeds):.{digits}f}")
            if len(seeds) > 1:
                lines[-1][-1] += f" ± {statistics.stdev(seeds):.{digits}f}"
        lines[-1] += [f"{statistics.mean(r[m] for r in mine):.3g}" for m in means]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * w for w in widths])
    print(f"\n{title}\n")
    for line in lines:
        print("| " + " | ".join(f"{cell:>{w}}" for cell, w in zip(line, widths)) + " |", flush=True)


def save(fig, path):
    fig.savefig(path, dpi=80)
    plt.close(fig)
    print(f"figure: {path}")


def density_figure(pictures, path):
    """Rows: datasets. Columns: the truth, what each method learned, samples drawn with the CDM."""
    datasets, methods = (list(dict.fromkeys(key[i] for key in pictures)) for i in (0, 1))
    titles = ["truth", *methods] + ["samples, CDM"] * ("CDM" in methods)
    fig, axes = plt.subplots(len(datasets), len(titles), squeeze=False, layout="constrained",
                             figsize=(1.7 * len(titles), 1.7 * len(datasets) + 0.3))
    for dataset, row in zip(datasets, axes):
        truth = pictures[dataset, methods[0]]["truth"]
        learned = [pictures[dataset, m]["learned"] for m in methods]
        scale = dict(cmap="magma", vmin=0, vmax=math.exp(truth.max()))
        for ax, title, log_p in zip(row, titles, [truth, *learned, None]):
            ax.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
            ax.set_title(title if dataset == datasets[0] else "", fontsize=10)
            if log_p is None:
                ax.scatter(*pictures[dataset, "CDM"]["samples"].T, s=0.4, color="black")
            else:
                image = torch.tensor(log_p).exp().view(CELLS, CELLS).T.numpy()
                ax.imshow(image, extent=[-HALF, HALF] * 2, origin="lower", **scale)
        row[0].set_ylabel(dataset.replace("_", " "), fontsize=10)
    save(fig, path)


def posterior_figure(curves, path):
    """The paper's figure 3: what classifiers think of the level of points of four true levels."""
    fig, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for ax, true in zip(axes, curves["exact"]):
        for name, curve in curves.items():
            ax.plot(curve[true], label=name, **EXACT if name == "exact" else {})
        ax.axvline(true, color="grey", linewidth=0.5)
        ax.set(title=f"points of level {true}", xlabel="level t")
    axes[0].set_ylabel("mean of $l_t(x) - \\max_s\\, l_s(x)$, nats")
    axes[0].legend()
    save(fig, path)


def chasm_figure(rows, path):
    """Estimated against true mean log-ratio, one line a method."""
    fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    for name in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == name and r["seed"] == 0]
        ax.plot([r["true"] for r in mine], [r["found"] for r in mine], marker=".", label=name)
    ax.plot(*[[r["true"] for r in mine]] * 2, label="exact", **EXACT)
    ax.set(xlabel="true mean log-ratio, nats (= dimensions / 4)", ylabel="estimated, nats")
    ax.legend()
    save(fig, path)


def toy(args, seeds):
    """Six densities in the plane by every method."""
    jobs = [(d, m, args.steps, s) for d in args.datasets for m in args.methods for s in seeds]
    results = in_parallel(run, jobs, args.out / "toy_2d.csv")
    rows = [row for row, _ in results]
    pivot(rows, "KL_raw, nats", "method", "dataset", "KL_raw", 4)
    pivot(rows, "log Z, nats", "method", "dataset", "log_Z", 4)
    pivot(rows, "KL = KL_raw + log Z, nats; passes through the network per log p; seconds to train",
          "method", "dataset", "KL", 4, ["passes", "seconds"])
    if "two_modes" in args.datasets:
        pivot([r for r in rows if r["dataset"] == "two_modes"],
              "weight of the heavier of the two modes, truth 0.9", "dataset", "method", "left", 3)
    pictures = {(r["dataset"], r["method"]): p for r, p in results if r["seed"] == 0}
    density_figure(pictures, args.out / "toy_2d.png")
    first = args.datasets[0]
    oracle = DATASETS[first]()
    exact = posterior(oracle.logits, oracle)
    curves = {m: p["posterior"] for (d, m), p in pictures.items() if d == first if "posterior" in p}
    if curves:
        posterior_figure(curves | {"exact": exact}, args.out / "posterior.png")


def chasm(args, seeds):
    """Where data and N(0, I) hardly overlap: correlated pairs, a plain MLP, fresh samples."""
    methods = [m for m in args.methods if m in CHASM]
    if len(methods) < len(args.methods):
        print("not here:", ", ".join(m for m in args.methods if m not in CHASM))
    jobs = [(d, m, args.steps, s) for d in (2, 10, 20, 40, 80, 160) for m in methods for s in seeds]
    results = in_parallel(chasm_run, jobs, args.out / "chasm.csv")
    rows = [row for row, _ in results]
    pivot(rows, "mean log-ratio, nats", "d", "method", "found", 2, ["true"])
    pivot(rows, "error of the log-ratio of a point, root mean square", "d", "method", "rms", 2)
    chasm_figure(rows, args.out / "chasm.png")
    curves = {r["method"]: p for r, p in results if r["d"] == 80 and r["seed"] == 0 and p}
    if curves:
        exact = posterior(CorrelatedPairs(80).logits, CorrelatedPairs(80))
        posterior_figure(curves | {"exact": exact}, args.out / "chasm_posterior.png")


def names(known):
    """A parser of comma-separated names that says which are known."""
    def parse(text):
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; known: {', '.join(known)}")
        return text.split(",")
    return parse


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--datasets", type=names(DATASETS), default=list(DATASETS), help=",".join(DATASETS))
    add("--methods", type=names(METHODS), default=list(METHODS), help=",".join(METHODS))
    add("--steps", type=int, default=1600, help="training steps of 512 samples (%(default)s)")
    add("--seeds", type=int, default=1, help="trainings of each, seeds 0, 1, ... (%(default)s)")
    add("--chasm", action="store_true", help="correlated Gaussian pairs in up to 160 dimensions,\n"
        "in place of --datasets")
    add("--out", type=Path, default=Path("runs/toy_2d"), help="folder for results (%(default)s)")
    args = p.parse_args()
    if args.steps < 1 or args.seeds < 1:
        p.error("--steps and --seeds must be positive")
    if args.chasm and not set(CHASM) & set(args.methods):
        p.error(f"--chasm knows these methods: {', '.join(CHASM)}")
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    (chasm if args.chasm else toy)(args, range(args.seeds))
    print(f"{time.time() - start:.0f} s in all; numbers and figures in {args.out}")


if __name__ == "__main__":
    main()
