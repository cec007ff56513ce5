"""CDM in the plane, where the truth is known exactly at every noise level.

    python toy_2d.py          two minutes on two CPU cores, no download

Trains a noise-level classifier on four densities, three times each: with cross-entropy only (CE),
with the denoising error only (MSE), and with both (CDM). Prints how far each is from the truth and
draws runs/toy_2d/toy_2d.png. Read it for the oracle, the table's columns and the small network.
Not here: images (mnist.py) and the method itself (cdm.py).
"""

import argparse
import concurrent.futures
import math
import os
import time
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import make_moons, make_swiss_roll
from torch import nn

from cdm import CDM, log_snr_schedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen: no screen is needed)

SCHEDULE = log_snr_schedule(T=20, first=10, last=-6)   # few levels: neighbours still overlap in 2-D
HALF, CELLS = 4.25, 300                                # evaluation grid: [-4.25, 4.25]^2, 300 x 300

# ------------------------------------------------------------------------------------- the truth


class Oracle:
    """A density known exactly at every level, with the model's interface (float64).

    A uniform mixture of equal bumps: squares of half-width `half`, blurred by Gaussian noise `std`.
    half = 0 gives Gaussians, std = 0 a checkerboard. Noising scales the centres and the squares by
    alpha_t and adds sigma_t^2 to the variance, so every level is again such a mixture."""

    def __init__(self, centres, std=0.0, half=0.0, schedule=SCHEDULE):
        self.centres, self.std, self.half, self.schedule = centres.double(), std, half, schedule

    def sample(self, n, t=0):
        """n draws from p_t: (n, 2)."""
        centre = self.centres[torch.randint(len(self.centres), (n,))]
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
        return log_bump.sum(2).logsumexp(1) - math.log(len(self.centres))

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


DATASETS = {"eight_gaussians": eight_gaussians, "checkerboard": checkerboard,
            "two_moons": two_moons, "swiss_roll": swiss_roll}
METHODS = {"CE": (1.0, 0.0), "MSE": (0.0, 1.0), "CDM": (1.0, 0.3)}             # w_ce, w_mse

# ------------------------------------------------------------------------------------ the learner


class FourierMLP(nn.Module):
    """Points (B, 2) -> logits (B, L). A plain MLP is too smooth, so it is shown waves of x too."""

    def __init__(self, levels, width=128, layers=4, waves=16, highest=2.0):
        super().__init__()
        steps = torch.arange(1, waves + 1) / waves
        self.register_buffer("frequency", 2 * math.pi * highest * steps)
        sizes = [2 + 4 * waves] + [width] * layers
        hidden = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, levels))

    def forward(self, x):
        phase = (x[..., None] * self.frequency).flatten(1)                            # (B, 2 waves)
        return self.net(torch.cat([x, phase.sin(), phase.cos()], 1))


def train(oracle, w_ce, w_mse, steps, batch=512, lr=5e-3):
    """A CDM fitted to fresh samples of the oracle: Adam, short warm-up, cosine decay."""
    model = CDM(FourierMLP(len(oracle.schedule.alpha)), oracle.schedule)
    optimiser = torch.optim.Adam(model.parameters())
    x0 = oracle.sample(200_000).float()
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(20 * step / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        model.loss(x0[torch.randint(len(x0), (batch,))], w_ce, w_mse).total.backward()
        optimiser.step()
    return model


# ------------------------------------------------------------------------------------ measurement


def grid():
    """Centres of the evaluation cells: (CELLS^2, 2), float64."""
    axis = (torch.arange(CELLS, dtype=torch.float64) + 0.5) * (2 * HALF / CELLS) - HALF
    return torch.cartesian_prod(axis, axis)


@torch.no_grad()
def evaluate(model, oracle):
    """How far is the model's p_0 from the truth? By quadrature on the grid, all in nats:

    KL_raw = E_data[log p - log q] takes q as the model states it, log Z = log of the integral of q.
    A q that is not normalised can have KL_raw < 0; KL = KL_raw + log Z >= 0 is the honest number.
    CE and MSE are means over 20000 fresh samples at all levels."""
    points, cell = grid(), (2 * HALF / CELLS) ** 2
    log_q = torch.cat([model.log_prob(x.float()) for x in points.split(15000)]).double()
    log_p = torch.cat([oracle.log_prob(x) for x in points.split(3000)])
    p = log_p.exp() * cell
    kl_raw = torch.where(p > 0, p * (log_p - log_q), 0).sum().item() / p.sum().item()
    log_z = (torch.logsumexp(log_q, 0) + math.log(cell)).item()
    loss = model.loss(oracle.sample(20000).float())
    row = dict(KL_raw=kl_raw, log_Z=log_z, KL=kl_raw + log_z)
    return dict(row, CE=loss.ce.item(), MSE=loss.mse.item()), log_p, log_q


def run(dataset, method, steps, seed):
    """One training and all that table and figure need of it; runs in a process of its own."""
    torch.set_num_threads(1)                       # small tensors: two runs side by side are faster
    torch.manual_seed(seed)
    oracle, start = DATASETS[dataset](), time.time()
    model = train(oracle, *METHODS[method], steps)
    seconds = time.time() - start
    row, log_p, log_q = evaluate(model, oracle)
    t = int((SCHEDULE.sigma < 0.5).sum())              # a middling level for the denoiser's picture
    axis = torch.linspace(-2.2, 2.2, 15)
    x = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        arrows = torch.cat([x, model.denoise(x, t) - x], 1)
    return dict(dataset=dataset, method=method, **row, seconds=seconds), dict(
        truth=log_p.numpy(), learned=log_q.numpy(), data=oracle.sample(3000).numpy(),
        samples=model.sample((3000, 2), steps=20, method="ddpm").numpy(), arrows=arrows.numpy())


def figure(results, path):
    """Rows: densities. Columns: data, truth, what each method learned, samples, denoiser."""
    datasets = list(dict.fromkeys(d for d, _ in results))
    methods = [m for m in METHODS if (datasets[0], m) in results]
    show = methods[-1]                             # samples and arrows of one method: CDM if it ran
    titles = ["data", "truth p", *(f"learned, {m}" for m in methods), f"samples, {show}",
              f"x to x0_hat, {show}"]
    fig, axes = plt.subplots(len(datasets), len(titles), squeeze=False, layout="constrained",
                             figsize=(2 * len(titles), 2 * len(datasets) + 0.3))
    for row, dataset in zip(axes, datasets):
        first = results[dataset, show]
        density = dict(extent=[-HALF, HALF] * 2, origin="lower", cmap="magma", vmin=0,
                       vmax=math.exp(first["truth"].max()))
        for ax, title in zip(row, titles):
            ax.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
            if ax in axes[0]:
                ax.set_title(title, fontsize=10)
        row[0].set_ylabel(dataset.replace("_", " "), fontsize=10)
        row[0].scatter(*first["data"].T, s=0.5, color="black")
        learned = [results[dataset, m]["learned"] for m in methods]
        for ax, log_q in zip(row[1:], [first["truth"], *learned]):
            ax.imshow(torch.tensor(log_q).exp().view(CELLS, CELLS).T.numpy(), **density)
        row[-2].scatter(*first["samples"].T, s=0.5, color="black")
        row[-1].quiver(*first["arrows"].T, angles="xy", scale_units="xy", scale=1, width=0.006)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=80)
    plt.close(fig)


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
    add("--steps", type=int, default=3200, help="training steps of 512 samples (%(default)s)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/toy_2d"), help="folder for the figure (%(default)s)")
    args = p.parse_args()
    if args.steps < 1:
        p.error("--steps must be positive")
    jobs = [(d, m, args.steps, args.seed) for d in args.datasets for m in args.methods]
    workers = min(len(jobs), os.cpu_count() or 1)
    print(f"{len(jobs)} trainings of {args.steps} steps, {workers} at a time; KL in nats\n\n"
          f"| density         | method |  KL_raw |   log Z |      KL |    CE |   MSE | seconds |\n"
          "| --------------- | ------ | ------- | ------- | ------- | ----- | ----- | ------- |",
          flush=True)
    start, results = time.time(), {}
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for row, pictures in pool.map(run, *zip(*jobs)):
            results[row["dataset"], row["method"]] = pictures
            print("| {dataset:15s} | {method:6s} | {KL_raw:7.4f} | {log_Z:7.4f} | {KL:7.4f} "
                  "| {CE:5.3f} | {MSE:5.3f} | {seconds:7.1f} |".format(**row), flush=True)
    figure(results, args.out / "toy_2d.png")
    print(f"\n{time.time() - start:.0f} s in all; figure: {args.out / 'toy_2d.png'}")


if __name__ == "__main__":
    main()
