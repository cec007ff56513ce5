"""Density ratio estimation where the truth is known: CDM beside what came before it.

    python toy_2d.py                seven methods on six densities in the plane, two minutes
    python toy_2d.py --seeds 3      the same with mean and spread over three trainings
    python toy_2d.py --chasm        up to 160 dimensions, where the older methods fail, five minutes

Times are of two CPU cores. All methods train the same network on the same samples. They are
noise-contrastive estimation (NCE), telescoping ratios (TRE), a classifier of noise levels with one
of a CDM's two losses (CE, MSE) or both (CDM), the time score, and a denoising diffusion model."""

import argparse
import math
import multiprocessing
import signal
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import make_moons, make_swiss_roll
from torch import nn

from cdm import CDM, DDM, log_normal, log_snr_schedule, ode_log_prob, sample, uniform_schedule

SCHEDULE = log_snr_schedule(T=40, first=10, last=-6)     # neighbours are 0.4 apart: they overlap
HALF, CELLS = 4.25, 120                                # evaluation grid: [-4.25, 4.25]^2, 120 x 120

# ------------------------------------------------------------------------------------- the truth


class Oracle:
    """A density that is known at every level (float64): CDM(oracle.logits, SCHEDULE) is exact.

    It is a mixture of squares of half-width `half` (points if 0), blurred by Gaussian noise `std`.
    Noising scales the squares by alpha_t and blurs them more, so each level is such a mixture."""

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
        half, std = alpha * self.half, max(1e-6, math.hypot(alpha * self.std, sigma))
        gap = (x[:, None] - alpha * self.centres).abs()                                  # (B, K, 2)
        if half == 0:
            log_bump = -0.5 * (gap / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
        else:                               # a square blurred by a Gaussian: log of Phi(b) - Phi(a)
            high = torch.special.log_ndtr((half - gap) / std)
            low = torch.special.log_ndtr((-half - gap) / std)
            log_bump = high + torch.log(-torch.expm1(low - high)) - math.log(2 * half)
        return (log_bump.sum(2) + self.weights.log()).logsumexp(1)

    def logits(self, x):
        """The logits of the exact classifier are log p_t(x) of every level t, (B, T+2)."""
        return torch.stack([self.log_prob(x, t) for t in range(len(self.schedule.alpha))], 1)


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
    centres = torch.from_numpy(points[along.argsort()[5::10]][:, [0, 2]])   # 400, evenly spaced
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


# To add your own, write a function that returns an Oracle, its centres about 1 from 0, and list it.
DATASETS = {f.__name__: f for f in (eight_gaussians, checkerboard, two_moons, swiss_roll, pinwheel,
                                    two_modes)}

# ------------------------------------------------------------------------------------ the methods


class MLP(nn.Module):
    """It maps points (B, d), for some methods with a time (B,) in 0 .. 1, to (B, outputs). It sees
    sines and cosines of its inputs too, because a plain MLP is too smooth for the plane."""

    def __init__(self, inputs, outputs, width=96, layers=4, frequencies=32):
        super().__init__()
        steps = torch.arange(1, frequencies + 1) / max(frequencies, 1)
        self.register_buffer("frequencies", 2 * math.pi * steps)
        hidden = [nn.Linear(inputs + 2 * frequencies * inputs, width), nn.SiLU()]
        for _ in range(layers - 1):
            hidden += [nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(width, outputs))

    def forward(self, x, time=None):
        if time is not None:
            x = torch.cat([x, time[:, None]], 1)
        phase = (x[..., None] * self.frequencies).flatten(1)                    # (B, d frequencies)
        return self.net(torch.cat([x, phase.sin(), phase.cos()], 1))


# A method is a network to train, its loss(x0), a scalar, and its log_prob(x) in nats, (B,).
Method = namedtuple("Method", "net loss log_prob")


def tre(make, schedule, bridges=9):
    """Telescoping ratios (Rhodes et al. 2020): a binary classifier for each pair of neighbours in a
    chain from data to N(0, I), sigma_k = k/bridges. A pair shares x0 and eps: much less noise. With
    one bridge this is noise-contrastive estimation (Gutmann, Hyvarinen 2010): data or N(0, I)?"""
    alpha, sigma = (v.float() for v in uniform_schedule(bridges - 1))
    net = make(bridges)                                            # h_k(x) = log p_k / p_{k+1}

    def loss(x0):
        k, eps = torch.randint(bridges, (len(x0), 1)), torch.randn_like(x0)
        near = net(alpha[k] * x0 + sigma[k] * eps).gather(1, k)
        far = net(alpha[k + 1] * x0 + sigma[k + 1] * eps).gather(1, k)
        return F.softplus(-near).mean() + F.softplus(far).mean()

    return Method(net, loss, lambda x: net(x).sum(1) + log_normal(x))


def classifier(make, schedule, w_ce, w_mse, t=0):
    """One classifier of all levels: CE alone is by Yair, Michaeli 2022; a CDM has both losses."""
    model = CDM(make(len(schedule.alpha)), schedule)

    def loss(x0):
        ce, mse = model.losses(x0, w_mse)
        return w_ce * ce + mse

    return Method(model, loss, lambda x: model.log_prob(x, t))


def time_score(make, schedule, points=40):
    """DRE-infinity (Choi et al. 2022): regress s = d log p_a / da for x = cos(a) x0 + sin(a) eps, a
    from 0 (data) to pi/2, then integrate it. The target (Yu et al. 2025), times sigma = sin(a) to
    keep its variance bounded, is the same derivative of log p_a(x given x0)."""
    net = make(1, timed=True)

    def loss(x0):
        time = (torch.arange(len(x0)) + torch.rand(())) / len(x0)
        angle = time[:, None] * math.pi / 2
        alpha, sigma = angle.cos(), angle.sin()
        eps = torch.randn_like(x0)
        target = (alpha * (eps ** 2 - 1) - sigma * eps * x0).sum(1)
        return F.mse_loss(sigma[:, 0] * net(alpha * x0 + sigma * eps, time)[:, 0], target)

    def log_prob(x):                                                      # by the midpoint rule
        times = (torch.arange(points) + 0.5) / points
        s = sum(net(x, time.expand(len(x)))[:, 0] for time in times) / points
        return log_normal(x) - math.pi / 2 * s

    return Method(net, loss, log_prob)


def ddm(make, schedule):
    """A denoising diffusion model (Ho et al. 2020): log p by the probability-flow ODE."""
    net, T = make(2, timed=True), len(schedule.alpha) - 2
    model = DDM(lambda xt, t: net(xt, t / T), schedule)
    return Method(net, lambda x0: model.losses(x0)[1], lambda x: ode_log_prob(model, x))


# The denoising error at little noise is what makes a density sharp, so it counts more there.
W_MSE = 1 / (SCHEDULE.sigma ** 2 + 0.05)
W_MSE = (W_MSE / W_MSE.mean()).float()
# MSE teaches nothing at level 0, and the ODE ends at level 1. For these two log p_1 stands in for
# log p_0, as sigma_1 = 0.0067 is little beside 0.1, the finest detail of the densities.
METHODS = {"NCE": partial(tre, bridges=1), "TRE": tre,
           "CE": partial(classifier, w_ce=1.0, w_mse=0.0),
           "MSE": partial(classifier, w_ce=0.0, w_mse=W_MSE, t=1), "time-score": time_score,
           "CDM": partial(classifier, w_ce=1.0, w_mse=W_MSE), "DDM-ODE": ddm}


def train(method, draw, steps, lr=5e-3):
    """Let Adam take `steps` batches draw(), at a rate that warms up and then decays as a cosine."""
    torch.set_num_threads(1)             # small tensors: two trainings side by side are faster
    optimiser = torch.optim.Adam(method.net.parameters())
    for step in range(1, steps + 1):
        rate = min(20 * step / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = lr * rate
        optimiser.zero_grad()
        method.loss(draw()).backward()
        optimiser.step()


def grid():
    """Centres of the evaluation cells: (CELLS^2, 2), float64."""
    axis = (torch.arange(CELLS, dtype=torch.float64) + 0.5) * (2 * HALF / CELLS) - HALF
    return torch.cartesian_prod(axis, axis)


@torch.no_grad()
def evaluate(log_prob, oracle):
    """How far is a density q from the truth p? All in nats, by sums over the grid.

    KL_raw = E_data[log p - log q] takes q as the model states it, and may be negative if q does not
    integrate to Z = 1; KL = KL_raw + log Z is the honest number. heavy_mode is the share of q where
    two_modes has 0.9. Returns these, log p, and log q - log Z. ValueError if p leaves the grid."""
    points, log_cell = grid(), 2 * math.log(2 * HALF / CELLS)
    log_q = torch.cat([log_prob(x.float()) for x in points.split(1600)]).double()
    log_p = torch.cat([oracle.log_prob(x) for x in points.split(3000)])
    if log_p.logsumexp(0) + log_cell < math.log(0.99):
        raise ValueError(f"over 1 % of the density lies outside +-{HALF}: shrink it")
    kl_raw = (log_p.softmax(0) * (log_p - log_q)).sum().item()
    log_z = (log_q.logsumexp(0) + log_cell).item()
    heavy_mode = log_q.softmax(0)[points[:, 0] < 0].sum().item()
    row = dict(KL=kl_raw + log_z, log_Z=log_z, KL_raw=kl_raw, heavy_mode=heavy_mode)
    return row, log_p, log_q - log_z


def run(dataset, name, steps, seed):
    """One training in the plane gives a row of numbers, and pictures: titles and arrays."""
    torch.manual_seed(seed)
    oracle = DATASETS[dataset]()
    x0 = oracle.sample(200_000).float()
    method = METHODS[name](lambda outputs, timed=False: MLP(2 + timed, outputs), SCHEDULE)
    train(method, lambda: x0[torch.randint(len(x0), (512,))], steps)
    row, log_p, log_q = evaluate(method.log_prob, oracle)
    pictures = {"truth": log_p.numpy(), name: log_q.numpy()}
    if name == "CDM":
        pictures["CDM samples"] = sample(method.net, torch.randn(2000, 2), None, "ddpm").numpy()
    return dict(dataset=dataset, method=name, seed=seed, **row), pictures


# ------------------------------------------------------------------------------ the density chasm

DIMENSIONS = (20, 40, 80, 160)
CHASM = {name: METHODS[name] for name in ("NCE", "TRE", "CE", "time-score")}
CHASM["CDM"] = partial(classifier, w_ce=0.01, w_mse=1.0)                  # the MSE must lead here


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
    """Train a plain MLP on correlated pairs; measure on 5000 new samples, in nats. The row has the
    mean log-ratio to N(0, I) and the rms error of one; the list, for a classifier, the mean of
    log p_t(x) / p_0(x) at every level t, (T+2,): exact and learned."""
    torch.manual_seed(seed)
    oracle = CorrelatedPairs(d)
    method = CHASM[name](lambda outputs, timed=False: MLP(d + timed, outputs, 256, 3, 0),
                         oracle.schedule)
    train(method, lambda: oracle.sample(256).float(), steps, lr=2e-3)
    x = oracle.sample(5000).float()
    with torch.no_grad():
        exact, estimate = oracle.logits(x), method.log_prob(x) - log_normal(x)
        logits = [exact, method.net.net(x)] if isinstance(method.net, CDM) else []
    error = estimate - (exact[:, 0] - exact[:, -1])
    row = dict(d=d, method=name, seed=seed, true=d / 4, estimated=estimate.mean().item(),
               rms=error.square().mean().sqrt().item())
    return row, [(l - l[:, :1]).mean(0).numpy() for l in logits]


# ------------------------------------------------------------------- processes, tables, figures


def in_parallel(jobs):
    """The results of all jobs (function, *arguments), in order, by a process for each core. If one
    of them fails, or at Ctrl-C, the others are ended too."""
    start, ignore = time.time(), (signal.SIGINT, signal.SIG_IGN)    # only this process sees Ctrl-C
    with ProcessPoolExecutor(initializer=signal.signal, initargs=ignore) as pool:
        futures = [pool.submit(*job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                left = (time.time() - start) / done * (len(jobs) - done)
                print(f"{done:4} of {len(jobs)} trainings, {left:4.0f} s left", flush=True)
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.terminate()
            raise SystemExit(f"stopped by {type(error).__name__} {error}")
    return [future.result() for future in futures]


def table(path, rows, seeds, digits):
    """Save rows as CSV; print a Markdown table with a line for `seeds` neighbours, which differ by
    seed alone: the mean of each number and, if it depends on the seed, its standard deviation."""
    np.savetxt(path, [[str(v) for v in row.values()] for row in rows], fmt="%s", delimiter=",",
               header=",".join(rows[0]), comments="", encoding="utf-8")
    what, method, _, *keys = rows[0]                  # dataset or d, method, seed, the numbers
    lines = [[what, method, *keys]]
    for i in range(0, len(rows), seeds):
        lines.append([str(rows[i][what]), rows[i][method]])
        for key in keys:
            values = np.array([row[key] for row in rows[i:i + seeds]])
            spread = f" +- {values.std(ddof=1):.{digits}f}" if np.ptp(values) > 0 else ""
            lines[-1].append(f"{values.mean():.{digits}f}{spread}")
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(f"{c:{w}}" for c, w in zip(line, widths)) + " |")


def plane_figure(results, path):
    """Draw a row for each dataset: the square roots of densities, and samples (n, 2)."""
    pictures = {}
    for row, found in results:                                          # of several seeds the last
        pictures.setdefault(row["dataset"], {}).update(found)
    columns = max(map(len, pictures.values()))
    fig, axes = plt.subplots(len(pictures), columns, squeeze=False, layout="constrained",
                             figsize=(1.2 * columns, 1.2 * len(pictures) + 0.5))
    fig.suptitle("Each density is drawn\nas its square root.", fontsize=10)
    for row, (dataset, found) in zip(axes, pictures.items()):
        row[0].set_ylabel(dataset.replace("_", " "), fontsize=10)
        for ax, (title, picture) in zip(row, found.items()):
            ax.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
            ax.set_title(title if ax in axes[0] else "", fontsize=10)
            if picture.ndim == 2:
                ax.scatter(*picture.T, s=0.5, color="C0", linewidth=0)
            else:
                ax.imshow(np.exp(picture / 2).reshape(CELLS, CELLS).T, origin="lower", cmap="Blues",
                          extent=[-HALF, HALF] * 2, vmin=0, vmax=np.exp(found["truth"].max() / 2))
    fig.savefig(path, dpi=120)


def chasm_figure(results, path):
    """Draw the estimated against the true mean log-ratio, and beside it what the classifiers make
    of clean points at every level, in the last of DIMENSIONS."""
    true = np.array(DIMENSIONS) / 4
    estimated = np.array([row["estimated"] for row, _ in results])
    estimated = estimated.reshape(len(true), len(CHASM), -1)          # (dimensions, methods, seeds)
    curves = {row["method"]: curve for row, curve in results}            # the last one remains
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for i, name in enumerate(CHASM):
        left.plot(true, estimated[:, i].mean(1), color=f"C{i}", label=name)
        left.plot(true, estimated[:, i], "o", markersize=4, color=f"C{i}")
        if curves[name]:
            exact, learned = curves[name]
            right.plot(learned, color=f"C{i}")
    left.plot(true, true, "k--", linewidth=1, label="exact")
    right.plot(exact, "k--", linewidth=1)
    left.set(title="mean log-ratio of data to noise, nats", ylabel="estimated",
             xlabel="true: the number of dimensions / 4 (a dot for each training)")
    right.set(title=f"mean over clean points x in {DIMENSIONS[-1]} dimensions, nats",
              xlabel=f"level t: 0 is clean, {len(exact) - 1} noise", ylabel="log $p_t(x) / p_0(x)$")
    fig.legend(loc="outside lower center", ncols=6)
    fig.savefig(path, dpi=120)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--datasets", nargs="+", choices=DATASETS, metavar="NAME", help=" ".join(DATASETS))
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=" ".join(METHODS))
    add("--chasm", action="store_true", help="correlated Gaussian pairs in 20 to 160 dimensions")
    add("--steps", type=int, default=1000, help="steps of a training (%(default)s)")
    add("--seeds", type=int, help="trainings of each, seeds 0, 1, .. (1; with --chasm 3)")
    add("--out", type=Path, default=Path("runs/toy_2d"), help="folder for results (%(default)s)")
    args = p.parse_args()
    seeds = (3 if args.chasm else 1) if args.seeds is None else args.seeds
    if args.chasm and (args.datasets or args.methods):
        p.error("--datasets and --methods choose from the plane: not with --chasm")
    if args.steps < 1 or seeds < 1:
        p.error("--steps and --seeds must be 1 or more")
    csv = args.out / ("chasm.csv" if args.chasm else "toy_2d.csv")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        csv.open("a").close()
    except OSError as error:
        p.error(f"--out: {csv} cannot be written: {error.strerror}")
    if args.chasm:
        what, sets, methods = "correlated pairs in dimensions", DIMENSIONS, CHASM
        job, figure, digits = chasm_run, chasm_figure, 2
        note = "true and estimated: the mean log-ratio; rms: the error of one log-ratio"
    else:
        what, sets = "the densities", dict.fromkeys(args.datasets or DATASETS)   # each name once
        methods = dict.fromkeys(args.methods or METHODS)
        job, figure, digits = run, plane_figure, 4
        note = "KL = KL_raw + log_Z. heavy_mode: the share of the left half, 0.9 in two_modes"
    start = time.time()
    jobs = [(job, d, m, args.steps, s) for d in sets for m in methods for s in range(seeds)]
    rounds = math.ceil(len(jobs) / multiprocessing.cpu_count())
    seconds = (1.5 + 0.005 * args.steps) * rounds
    print(f"{', '.join(methods)} learn {what} {', '.join(map(str, sets))} in {args.steps} steps.\n"
          f"{len(jobs)} trainings, {seeds} of each, take roughly {seconds:.0f} s", flush=True)
    results = in_parallel(jobs)
    table(csv, [row for row, _ in results], seeds, digits)
    figure(results, csv.with_suffix(".png"))
    print(f"In nats. {note}.\n{time.time() - start:.0f} s; numbers and figure in {args.out}")


if __name__ == "__main__":
    main()
