"""Density-ratio estimation where the truth is known: CDM against its predecessors.

    python toy_2d.py --tour         a picture of the idea: one network, four readings, 15 seconds
    python toy_2d.py                six methods on six 2-D densities, 80 seconds
    python toy_2d.py --chasm        how soon is a log-ratio of 20 nats learned? 5 minutes

All methods train the same MLP on the same samples: noise-contrastive estimation (NCE), telescoping
ratios (TRE), the time score, and a classifier of noise levels with one of the CDM's two losses (CE,
MSE) or both (CDM). Times are for two CPU cores."""

import argparse
import math
import os
import threading
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from torch import nn

from cdm import CDM, log_normal, log_snr_schedule, sample, sample_step, uniform_schedule

SCHEDULE = log_snr_schedule(T=40, first=10, last=-6)     # log-SNR steps of 0.4: neighbours overlap
HALF, CELLS = 4.25, 120                                # evaluation grid: [-4.25, 4.25]^2, 120 x 120
IMAGE = dict(origin="lower", extent=[-HALF, HALF] * 2, interpolation="bilinear")     # for imshow

# ------------------------------------------------------------------------------------- the truth
class Oracle:
    """A density known exactly at every level (float64): CDM(oracle.logits, SCHEDULE) is exact.
    It is a mixture of squares of half-width `half` (points if 0), blurred by Gaussian noise `std`.
    Noising only scales the squares by alpha_t and blurs them more, so p_t is of the same form."""

    def __init__(self, centres, std=0.0, half=0.0, schedule=SCHEDULE):
        self.centres, self.std, self.half, self.schedule = centres.double(), std, half, schedule

    def sample(self, n, t=0):
        """n samples from p_t: (n, 2)."""
        centre = self.centres[torch.randint(len(self.centres), (n,))]
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
        return log_bump.sum(2).logsumexp(1) - math.log(len(self.centres))

    def logits(self, x):
        """Logits of the exact classifier: log p_t(x) at every level t, (B, T+2)."""
        return torch.stack([self.log_prob(x, t) for t in range(len(self.schedule.alpha))], 1)


def eight_gaussians():
    angle = torch.arange(8) * math.pi / 4
    return Oracle(math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1), std=0.1)

def checkerboard():
    corner = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2])
    return Oracle((corner - 1.5) * 0.85, half=0.425)

def two_moons():
    angle = torch.linspace(0, math.pi, 100)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    centres = torch.cat([upper, torch.tensor([1.0, 0.5]) - upper])
    return Oracle((centres - centres.mean(0)) / centres.std(0), std=0.1)

def swiss_roll():
    angle = 1.5 * math.pi * torch.linspace(1, 3, 400)
    centres = angle[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return Oracle((centres - centres.mean(0)) / centres.std(0), std=0.1)

def pinwheel():
    along = torch.special.ndtri((torch.arange(40) + 0.5) / 40)           # quantiles of N(0, 1)
    arm = torch.arange(5)[:, None] * 2 * math.pi / 5
    radius, angle = 1 + 0.3 * along, arm + 0.25 * torch.exp(0.3 * along)
    centres = torch.stack([radius * angle.cos(), radius * angle.sin()], 2).view(-1, 2)
    return Oracle(centres / centres.std(0), std=0.1)

def two_modes():                                 # no gradient tells how heavy each mode is
    return Oracle(torch.tensor([(-1.2, 0.0)] * 9 + [(1.2, 0.0)]), std=0.15)

# To add your own: write a function that returns an Oracle (centres about 1 from 0), and list it.
DATASETS = {f.__name__: f for f in (eight_gaussians, checkerboard, two_moons, swiss_roll, pinwheel,
                                    two_modes)}

# ------------------------------------------------------------------------------------ the methods
# A method: the network to train, a scalar loss(x0), and log_prob(x) in nats, (B,).
Method = namedtuple("Method", "net loss log_prob")


class MLP(nn.Module):
    """An MLP from points (B, d), for some methods with a time (B,) in 0 .. 1, to (B, outputs). Its
    inputs include sines and cosines, because a plain MLP is too smooth for these densities."""

    def __init__(self, inputs, outputs, width=96, layers=4, frequencies=32):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, frequencies + 1) * 2 * math.pi / 32)
        hidden = [nn.Linear(inputs + 2 * frequencies * inputs, width), nn.SiLU()]
        for _ in range(layers - 1):
            hidden += [nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(width, outputs))

    def forward(self, x, time=None):
        if time is not None:
            x = torch.cat([x, time[:, None]], 1)
        phase = (x[..., None] * self.frequencies).flatten(1)                    # (B, d frequencies)
        return self.net(torch.cat([x, phase.sin(), phase.cos()], 1))


def tre(make, schedule, bridges=9):
    """Telescoping ratios (Rhodes et al. 2020): one binary classifier per step of a chain from data
    to N(0, I), sigma_k = k/bridges. The two sides share x0 and eps, which greatly reduces variance.
    With one bridge: noise-contrastive estimation (Gutmann, Hyvarinen 2010), data or N(0, I)?"""
    alpha, sigma = (v.float() for v in uniform_schedule(bridges - 1))
    net = make(bridges)                                            # h_k(x) = log p_k / p_{k+1}
    def loss(x0):
        k, eps = torch.randint(bridges, (len(x0), 1)), torch.randn_like(x0)
        near = net(alpha[k] * x0 + sigma[k] * eps).gather(1, k)
        far = net(alpha[k + 1] * x0 + sigma[k + 1] * eps).gather(1, k)
        return nn.functional.softplus(-near).mean() + nn.functional.softplus(far).mean()
    return Method(net, loss, lambda x: net(x).sum(1) + log_normal(x))


def classifier(make, schedule, w_ce=1.0, w_mse=1.0):
    """One classifier of all levels: a CDM or, with one loss alone, CE (Yair, Michaeli 2022) or MSE.
    MSE learns nothing at level 0, so it reports log p_1: sigma_1 is negligible here."""
    model = CDM(make(len(schedule.alpha)), schedule)
    def loss(x0):
        losses = zip((w_ce, w_mse), model.losses(x0))
        return sum(w * loss for w, loss in losses if w)       # a weight of 0 spares a backward pass
    return Method(model, loss, lambda x: model.log_prob(x, 0 if w_ce else 1))


def time_score(make, schedule, points=40):
    """DRE-infinity (Choi et al. 2022): for x = cos(a) x0 + sin(a) eps, regress s = d log p_a / da,
    then integrate it from a = 0 (data) to pi/2. The target (Yu et al. 2025) is the same derivative
    of log p_a(x | x0), multiplied by sigma = sin(a) to keep its variance bounded."""
    net = make(1, timed=True)
    def loss(x0):
        time = (torch.arange(len(x0)) + torch.rand(())) / len(x0)
        angle = time[:, None] * math.pi / 2
        alpha, sigma, eps = angle.cos(), angle.sin(), torch.randn_like(x0)
        target = (alpha * (eps ** 2 - 1) - sigma * eps * x0).sum(1)
        return (sigma[:, 0] * net(alpha * x0 + sigma * eps, time)[:, 0] - target).square().mean()
    def log_prob(x):                                                      # by the midpoint rule
        times = (torch.arange(points) + 0.5) / points
        s = sum(net(x, time.expand(len(x)))[:, 0] for time in times) / points
        return log_normal(x) - math.pi / 2 * s
    return Method(net, loss, log_prob)


METHODS = {"CDM": classifier, "CE": partial(classifier, w_mse=0), "NCE": partial(tre, bridges=1),
           "TRE": tre, "time-score": time_score, "MSE": partial(classifier, w_ce=0)}


def train(method, draw, steps, lr=5e-3):
    """Train with Adam on `steps` batches from draw(), with a short warm-up and cosine decay."""
    optimiser = torch.optim.Adam(method.net.parameters())
    for step in range(steps):
        rate = min(20 * (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = lr * rate
        optimiser.zero_grad()
        method.loss(draw()).backward()
        optimiser.step()


# -------------------------------------------------------------------------------------- the plane
def fit(dataset, name, steps, seed):
    """Train one method on 200000 points of one 2-D density; return its oracle and the method."""
    torch.manual_seed(seed)
    oracle = DATASETS[dataset]()
    x0 = oracle.sample(200_000).float()
    method = METHODS[name](lambda outputs, timed=False: MLP(2 + timed, outputs), SCHEDULE)
    train(method, lambda: x0[torch.randint(len(x0), (512,))], steps)
    return oracle, method


def grid():
    """Centres of the evaluation cells: (CELLS^2, 2), float64."""
    axis = (torch.arange(CELLS, dtype=torch.float64) + 0.5) * (2 * HALF / CELLS) - HALF
    return torch.cartesian_prod(axis, axis)


@torch.no_grad()
def evaluate(log_prob, oracle):
    """KL divergence from the truth p to a model q, in nats, as a sum over the grid.
    KL_raw = E_p[log p - log q] takes q at face value, and can be negative if q does not integrate
    to Z = 1; KL = KL_raw + log Z is the honest number. Returns these, log p, and log q - log Z."""
    points, log_cell = grid(), 2 * math.log(2 * HALF / CELLS)
    log_q = torch.cat([log_prob(x.float()) for x in points.split(1600)]).double()
    log_p = torch.cat([oracle.log_prob(x) for x in points.split(3000)])
    if log_p.logsumexp(0) + log_cell < math.log(0.99):
        raise ValueError(f"over 1 % of the density lies outside +-{HALF}: scale it down")
    kl_raw = (log_p.softmax(0) * (log_p - log_q)).sum().item()
    log_z = (log_q.logsumexp(0) + log_cell).item()
    return dict(KL=kl_raw + log_z, log_Z=log_z, KL_raw=kl_raw), log_p, log_q - log_z


def run(dataset, name, steps, seed):
    """Train one method on one 2-D density. Returns a row of numbers, and pictures by title."""
    oracle, method = fit(dataset, name, steps, seed)
    numbers, log_p, log_q = evaluate(method.log_prob, oracle)
    if dataset == "two_modes":                               # the mass of the left mode: 0.9 in p
        numbers["mass_left (0.9)"] = log_q.softmax(0)[grid()[:, 0] < 0].sum().item()
    pictures = {"truth": log_p.view(CELLS, CELLS).T.numpy()}
    if name == "CDM":
        pictures["CDM samples"] = sample(method.net, torch.randn(2000, 2), eta=1.0).numpy()
    pictures[name] = log_q.view(CELLS, CELLS).T.numpy()
    return dict(dataset=dataset, method=name, seed=seed, **numbers), pictures


def tour(steps, file, t=20):
    """Train a CDM on two moons and draw four readings of its logits, the third at level t."""
    model, points = fit("two_moons", "CDM", steps, seed=0)[1].net, grid().float()
    starts = points.view(CELLS, CELLS, 2)[::6, ::6].reshape(-1, 2)
    with torch.no_grad():
        level = (model.net(points).softmax(1) * torch.arange(model.T + 2)).sum(1)        # E[t | x]
        density, blurred = model.log_prob(points, 0).exp(), model.log_prob(points, t).exp()
        level, density, blurred = (v.view(CELLS, CELLS).T for v in (level, density, blurred))
        arrows = model.denoise(starts, t) - starts
        path = [torch.randn(400, 2)]
        for s in range(model.T, 0, -1):                       # DDIM: the same noise, but less of it
            path.append(sample_step(model, path[-1], s, s - 1))
    fig = Figure(figsize=(14, 4.6), layout="constrained")
    fig.suptitle("One network, trained to see how noisy x is: four readings of its logits $l_t$\n")
    a, b, c, d = axes = fig.subplots(1, 4)
    a.set_title("1. A classifier: how noisy is x?\n$p(t\\,|\\,x) = $softmax$\\ l(x)$")
    bar = fig.colorbar(a.imshow(level, **IMAGE), ax=a, location="bottom", shrink=0.7)
    bar.set_ticks([level.min(), level.max()], labels=["low noise", "high noise"])
    b.set_title("2. A density, from two logits\n$\\log p_0 = l_0 - l_{T+1} + \\log N(x; 0, I)$")
    b.imshow(density, "Blues", **IMAGE)
    b.set_xlabel("blue: the density of the data, $p_0$")
    c.set_title("3. A denoiser, from gradients\n$\\hat\\epsilon=\\sigma_t(x-\\nabla[l_t-l_{T+1}])$")
    c.set_xlabel(f"blue: the density at level {t} of {model.T}\nred: to the expected clean point")
    c.imshow(blurred, "Blues", **IMAGE)
    c.quiver(*starts.T, *arrows.T, angles="xy", scale_units="xy", scale=1, color="C3")
    d.set_title("4. A sampler: denoise step by step\n$x_T, x_{T-1}, \\ldots, x_0$")
    d.plot(*torch.stack(path)[:, :80].unbind(2), color="grey", linewidth=0.5, alpha=0.6)
    d.plot(*path[0].T, "C1o", markersize=2, label="noise")
    d.plot(*path[-1].T, "C0o", markersize=2, label="samples")
    d.legend(loc="upper right")
    for ax in axes:
        ax.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), xticks=[], yticks=[], aspect="equal")
    fig.savefig(file, dpi=90, bbox_inches="tight")


# ------------------------------------------------------------------------------ the density chasm
DIMENSIONS = 80
CHASM = {"CDM": partial(classifier, w_ce=0.01)}                       # the MSE must dominate here
CHASM.update({name: METHODS[name] for name in ("TRE", "CE", "NCE", "time-score")})


def correlated_pairs(d):
    """N(0, S) with unit variances and correlation 0.79506 = sqrt(1 - 1/e) in pairs. Its mean
    log-ratio to N(0, I), which is the KL divergence between the two, is d/4 nats."""
    covariance = torch.kron(torch.tensor([[1, 0.79506], [0.79506, 1]]), torch.eye(d // 2))
    return torch.distributions.MultivariateNormal(torch.zeros(d), covariance)


def chasm_run(name, budgets, seed):
    """Train a plain MLP for each number of steps in `budgets`, and test it on 5000 new samples. The
    rows have the estimated mean log-ratio and the rms error of one log-ratio, both in nats."""
    data, schedule, rows = correlated_pairs(DIMENSIONS), log_snr_schedule(40, 7, -6), []
    make = lambda outputs, timed=False: MLP(DIMENSIONS + timed, outputs, 128, 3, frequencies=0)
    for steps in budgets:
        torch.manual_seed(seed)
        method, start = CHASM[name](make, schedule), time.monotonic()
        train(method, lambda: torch.randn(256, DIMENSIONS) @ data.scale_tril.T, steps, lr=2e-3)
        seconds, x = (time.monotonic() - start) / steps * 1000, data.sample((5000,))
        with torch.no_grad():
            estimate, exact = method.log_prob(x) - log_normal(x), data.log_prob(x) - log_normal(x)
        error = (estimate - exact).mean().item()             # without the samples' own scatter
        rows.append(dict(method=name, steps=steps, seed=seed, estimate=DIMENSIONS / 4 + error,
                         rms_error=(estimate - exact).square().mean().sqrt().item(),
                         s_per_1000_steps=seconds))
    return rows


# ------------------------------------------------------------------- processes, tables, figures
def end_with_parent(parent):
    """Called in a worker process: end it soon after its parent, the script, has ended."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def in_parallel(function, jobs):
    """[function(*job) for job in jobs], by one process per core, with one thread each."""
    workers = Parallel(n_jobs=-1, verbose=10, initializer=end_with_parent, initargs=(os.getpid(),))
    return workers(delayed(function)(*job) for job in jobs)


def table(rows, path, digits):
    """Print rows, each with two names, a seed and numbers, as a Markdown table with one line per
    pair of names: means and, over several seeds, standard deviations. Then save them as CSV."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys[:2] + keys[3:], ["-" * 17] * (len(keys) - 1)]
    for names in dict.fromkeys((row[keys[0]], row[keys[1]]) for row in rows):
        lines.append([str(name) for name in names])
        group = [row for row in rows if (row[keys[0]], row[keys[1]]) == names]
        for key in keys[3:]:
            values = np.array([row[key] for row in group if key in row])
            cell = f"{values.mean():.{digits}f}" if len(values) else ""
            spread = f" +- {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            lines[-1].append(cell + spread)
    for line in lines:
        print("| " + " | ".join(f"{cell:17}" for cell in line) + " |")
    cells = [keys] + [[str(row.get(key, "")) for key in keys] for row in rows]
    path.write_text("".join(",".join(line) + "\n" for line in cells), "utf-8")


def plane_figure(results, path):
    """Draw per dataset the true density, samples of the CDM, and how far each method is off."""
    pictures, limit = {}, math.log(3)
    for row, found in results:                                              # the last seed wins
        pictures.setdefault(row["dataset"], {}).update(found)
    titles = list(next(iter(pictures.values())))
    fig = Figure((max(6, 1.3 * len(titles)), 1.3 * len(pictures) + 1), layout="constrained")
    axes = fig.subplots(len(pictures), len(titles), squeeze=False)
    for row, (dataset, found) in zip(axes, pictures.items()):
        row[0].set_ylabel(dataset.replace("_", " "))
        log_p = found["truth"]
        image = row[0].imshow(np.exp(log_p / 2), "Greys", **IMAGE)
        for ax, title in zip(row, titles):
            ax.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
            ax.set_title(title if ax in axes[0] else "")
            if title == "CDM samples":
                ax.plot(*found[title].T, "k.", markersize=0.7)
            elif title != "truth":
                nothing = np.maximum(log_p, found[title]) < log_p.max() - math.log(50)
                ratio = np.where(nothing, np.nan, found[title] - log_p)
                image = ax.imshow(ratio, "RdBu_r", vmin=-limit, vmax=limit, **IMAGE)
    bar = fig.colorbar(image, ax=axes, location="bottom", aspect=60, shrink=0.6, extend="both")
    bar.set_ticks([-limit, 0, limit], labels=["a third of true density", "right", "three times"])
    fig.savefig(path, dpi=110, bbox_inches="tight")


def chasm_figure(rows, path):
    """Draw the estimated mean log-ratio against the number of training steps."""
    ax = Figure((8, 4.4), layout="constrained").subplots()
    budgets = sorted({row["steps"] for row in rows})
    for i, name in enumerate(CHASM):
        estimates = [[row["estimate"] for row in rows if (row["method"], row["steps"]) == (name, n)]
                     for n in budgets]                                            # (budgets, seeds)
        ax.plot(budgets, estimates, "o", color=f"C{i}", markersize=3)
        ax.plot(budgets, np.mean(estimates, 1), color=f"C{i}", label=name)
    ax.axhline(DIMENSIONS / 4, color="black", linestyle="--", linewidth=1, label="truth")
    ax.set(xscale="log", xticks=budgets, xticklabels=budgets, ylabel="mean log-ratio, nats",
           xlabel="training steps (one dot per run, with a learning rate that decays to zero)",
           title=f"Data against noise in {DIMENSIONS} dimensions: how soon is the ratio right?")
    ax.set_xticks([], minor=True)
    ax.figure.legend(loc="outside right center")
    ax.figure.savefig(path, dpi=110)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--tour", action="store_true", help="draw what one network contains, on two moons")
    add("--chasm", action="store_true", help=f"correlated Gaussian pairs, {DIMENSIONS} dimensions")
    add("--datasets", nargs="+", choices=DATASETS, metavar="NAME", help=" ".join(DATASETS))
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=" ".join(METHODS))
    add("--steps", type=int, help="training steps (1000; --tour 2000; --chasm 8000 and fewer)")
    add("--seeds", type=int, help="runs per setting, seeds 0, 1, .. (1; --chasm 3)")
    add("--out", type=Path, default=Path("runs/toy_2d"), help="output folder (%(default)s)")
    args = p.parse_args()
    if args.tour + args.chasm + bool(args.datasets or args.methods) > 1 or args.tour and args.seeds:
        p.error("--tour takes only --steps and --out; --chasm takes no --datasets or --methods")
    args.name = "tour" if args.tour else "chasm" if args.chasm else "toy_2d"
    steps, seeds = dict(tour=(2000, 1), chasm=(8000, 3), toy_2d=(1000, 1))[args.name]
    args.steps = steps if args.steps is None else args.steps
    args.seeds = seeds if args.seeds is None else args.seeds
    if min(args.steps, args.seeds) < 1:
        p.error("--steps and --seeds must be at least 1")
    return args


def main():
    args, start = arguments(), time.monotonic()
    figure, numbers = args.out / f"{args.name}.png", args.out / f"{args.name}.csv"
    args.out.mkdir(parents=True, exist_ok=True)      # an error is better now than after training
    for file in (figure, numbers):
        file.open("a").close()
        if not file.stat().st_size:
            file.unlink()
    if args.tour:
        in_parallel(tour, [(args.steps, figure)])
    elif args.chasm:
        budgets = sorted({max(1, args.steps >> k) for k in range(6)})  # steps, steps / 2, .., / 32
        jobs = [(name, budgets, seed) for seed in range(args.seeds) for name in CHASM]
        rows = sum(in_parallel(chasm_run, jobs), [])
        table(rows, numbers, 2)
        chasm_figure(rows, figure)
    else:
        sets, methods = args.datasets or DATASETS, args.methods or METHODS
        for name in sets:
            DATASETS[name]().sample(1)         # a mistake in your own density shows its line here
        jobs = [(d, m, args.steps, s) for d in sets for m in methods for s in range(args.seeds)]
        results = in_parallel(run, jobs)
        table([row for row, _ in results], numbers, 4)
        plane_figure(results, figure)
    print(f"Numbers in nats; {time.monotonic() - start:.0f} s; results are in {args.out}")


if __name__ == "__main__":
    main()
