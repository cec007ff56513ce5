"""CDM on MNIST: train a noise-level classifier, sample digits, read likelihoods off its logits.

    python mnist.py --quick                        a short training run: 6 minutes on two CPU cores
    python mnist.py --weights assets/mnist_cdm.pt assets/mnist_ddm.pt
                                                   evaluate the trained networks: 13 minutes
    python mnist.py --device cuda                  the full training run, on a GPU
    python mnist.py --dataset digits --quick       scikit-learn's 8x8 digits, no download

Read cdm.py first; it has the method. This file adds a network for digits, a training loop and, in
its second half, an evaluation, which uses the audits in section 5 of cdm.py. Results go to a folder
in runs/: weights.pt, log.csv, figures, and model.pt for --resume.
"""

import argparse
import gzip
import math
import os
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from cdm import (CDM, DDM, annealed_log_z, bits_per_dim, elbo, log_normal, log_snr_schedule,
                 ode_log_prob, sample)

# Training: width is the network's channels, batch the images per step, lr the peak learning rate.
# Evaluation: how many images for one pass, for the ELBO, and for the ODE and log Z (slow); how many
# levels for log Z (fine); how many samples.
FULL = dict(width=64, batch=256, steps=20000, lr=0.002,
            one_pass=10000, elbo=500, slow=40, fine=2048, samples=1000)
QUICK = dict(width=32, batch=64, steps=500, lr=0.003,
             one_pass=500, elbo=200, slow=40, fine=512, samples=100)

# ------------------------------------------------------------------------------------------- data
URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {"train-images-idx3-ubyte.gz": "440fcabf73cc546f",           # how the file's SHA-256 begins
         "train-labels-idx1-ubyte.gz": "3552534a0a558bbe",
         "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79",
         "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6d"}
CLASSES, SIZE = 10, {"mnist": 28, "digits": 8}
STEP = 2 / 256                                  # distance between neighbouring grey values


class UserError(ValueError):
    """What the user can put right: main prints it without a traceback."""


def read_or_download(folder, name, sha256):
    """Images, uint8 (N, 1, 28, 28), or labels (N,), from folder/name, downloaded first if missing.
    The file is gzipped IDX: a header of 16 bytes (images) or 8 (labels), then the raw values."""
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {name} to {folder}", flush=True)
        torch.hub.download_url_to_file(URL + name, folder / name, sha256, progress=False)
    data = torch.tensor(np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8))
    return data[16:].view(-1, 1, 28, 28) if "images" in name else data[8:].long()


def load_data(dataset, folder):
    """(images, labels) for training, validation and test: uint8 (N, 1, H, W) and long (N,). The
    validation set is for experiments; this file does not use it."""
    if dataset == "digits":                                          # 1797 of 8x8, grey 0 .. 16
        digits, order = load_digits(), np.random.default_rng(0).permutation(1797)
        images = torch.tensor(digits.images[order] * 255 / 16).round().to(torch.uint8)[:, None]
        parts = [1350, 150, 297]
        return list(zip(images.split(parts), torch.tensor(digits.target[order]).split(parts)))
    data = []
    try:
        for name, sha256 in FILES.items():
            data.append(read_or_download(Path(folder), name, sha256))
            if "labels" in name and (len(data[-1]) != len(data[-2]) or data[-1].max() >= CLASSES):
                raise ValueError("not one label in 0 .. 9 for each image")
    except Exception as error:
        raise UserError(f"MNIST cannot be read: {name}: {error}\nDelete a damaged file, put "
                        f"{list(FILES)} into {folder}, name another folder by --data, or use "
                        "--dataset digits.") from error
    x, y, *test_set = data
    return (x[:-5000], y[:-5000]), (x[-5000:], y[-5000:]), test_set


def to_x0(images):
    """Grey values k = 0 .. 255 (uint8) as floats: the centre of the k-th of 256 equal bins of
    [-1, 1], that is (2k+1)/256 - 1. Back from x: ((x + 1) * 128).floor().clamp(0, 255)."""
    return (2 * images.float() + 1) / 256 - 1


# ---------------------------------------------------------------------------------------- network
# The trunk looks at a noisy image x once; only a DDM tells it the noise level. PixelMixture turns
# its features into 14 numbers per pixel, which describe the clean grey value behind the noise by a
# mixture of Gaussians. With Gaussian noise added it is again a mixture of Gaussians, so the density
# at any level, and with it the log-ratio, is a formula.
CLEANEST, NOISIEST = 14.0, -8.0                 # log-SNR at level 1 and at level T


class Block(nn.Module):
    """A residual block of two convolutions, (B, C, H, W) -> same. cond (B, 32) embeds the class
    and, in a DDM, the level. GroupNorm does not mix rows; SiLU is smooth, as a CDM requires.

    Given `places` = H W, every quarter of the channels is first mixed over all positions by its own
    learned (H W, H W) matrix: like attention, but cheaper, with weights that do not depend on x."""

    def __init__(self, channels, places=None):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.cond = nn.Linear(32, channels)
        nn.init.zeros_(self.conv2.weight)
        self.places = places
        if places:
            self.norm0 = nn.GroupNorm(4, channels)
            self.matrices = nn.Parameter(torch.zeros(4, places, places))

    def forward(self, x, cond):
        if self.places:
            quarters = F.silu(self.norm0(x)).flatten(2).unflatten(1, (4, -1))   # (B, 4, C/4, H W)
            x = x + (quarters @ self.matrices).view_as(x)
        h = self.conv1(F.silu(self.norm1(x))) + self.cond(cond)[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class Trunk(nn.Module):
    """A small U-Net, (B, 1, H, W) -> features (B, width, H/2, W/2). Half resolution shows strokes,
    quarter resolution the whole digit. From one to the other it averages, because in a CDM the
    gradient denoises, and that of a strided convolution is uneven from pixel to pixel."""

    def __init__(self, size, width):
        super().__init__()
        places = (size // 4) ** 2
        self.stem1 = nn.Conv2d(1, width // 2, 3, padding=1)
        self.stem2 = nn.Conv2d(width // 2, width // 4, 3, padding=1)
        self.fine1, self.fine2 = Block(width), Block(width)
        self.down = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.coarse1, self.coarse2 = Block(2 * width, places), Block(2 * width, places)
        self.up = nn.Conv2d(2 * width, width, 1)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(4, 2 * width), nn.GroupNorm(4, width)

    def forward(self, x, cond):
        fine = self.stem2(F.silu(self.stem1(x)))                              # (B, width/4, H, W)
        fine = self.fine1(F.pixel_unshuffle(fine, 2), cond)                   # (B, width, H/2, W/2)
        coarse = self.down(F.avg_pool2d(fine, 2))
        coarse = self.coarse2(self.coarse1(coarse, cond), cond)
        both = torch.cat([fine, F.interpolate(self.up(coarse), scale_factor=2.0)], 1)
        fine = self.fine2(self.join(F.silu(self.norm1(both))), cond)
        return F.silu(self.norm2(fine))


class PixelMixture(nn.Module):
    """log [p_t(x) / N(x; 0, I)] in nats, (B, n), of images x (B, 1, H, W) at the noise levels
    alpha, sigma (B, n), as if pixels were independent given the features (B, width, H/2, W/2).

    A clean pixel is one of five grey values that dominate MNIST, or comes from one of three
    Gaussians. The features give 14 numbers per pixel: eight log weights, three means, three log
    variances. The level then scales and shifts these numbers, by the same amounts at all pixels.
    Noise turns a grey c into N(alpha c, sigma^2), and N(m, v) into N(alpha m, alpha^2 v + sigma^2).

    As the features depend on x itself, nothing forces the result to integrate to 1; log Z measures
    its integral. Before training, each pixel has the frequencies of the five greys in the images,
    and three broad Gaussians share the rest."""

    GREYS, GAUSSIANS = (0, 252, 253, 254, 255), 3

    def __init__(self, images, width):
        super().__init__()
        n, g = len(self.GREYS), self.GAUSSIANS                                # n + 3 g = 14 numbers
        self.read = nn.Conv2d(width, 4 * (n + 3 * g), 3, padding=1)     # 4: for each of 2x2 pixels
        self.adjust = nn.Linear(32, 2 * (n + 3 * g))                           # scale and shift
        self.constant = nn.Linear(32, 1, bias=False)            # learned, one for each level
        for parameter in (*self.read.parameters(), *self.adjust.parameters(), self.constant.weight):
            nn.init.zeros_(parameter)
        count = torch.stack([(images == k).flatten(1).sum(0) for k in self.GREYS])       # (5, d)
        others = (len(images) - count.sum(0, keepdim=True)).expand(g, -1) / g
        self.log_weight = nn.Parameter((torch.cat([count, others]) + 1).log())           # (8, d)
        self.register_buffer("grey", to_x0(torch.tensor(self.GREYS))[:, None], persistent=False)
        self.register_buffer("mean", torch.linspace(-0.6, 0.6, g)[:, None], persistent=False)

    def forward(self, features, x, alpha, sigma):
        n, g, wave = len(self.GREYS), self.GAUSSIANS, waves(alpha, sigma)
        pure_noise = waves(alpha.new_zeros(1), alpha.new_ones(1))
        constant = 10 * self.constant(wave - pure_noise)[..., 0]   # 0 at T+1; 10: to learn faster
        sigma = sigma.clamp(min=3e-4)                  # at level 0, the greys would have no width
        numbers = F.pixel_shuffle(self.read(features), 2).flatten(2)[:, None]        # (B, 1, 14, d)
        scale, shift = self.adjust(wave)[..., None].chunk(2, 2)                      # (B, n, 14, 1)
        weight, mean, spread = (numbers * (1 + scale) + shift).split([n + g, g, g], 2)
        log_weight = (weight + self.log_weight).log_softmax(2)                       # (B, n, 8, d)
        mean, variance = self.mean + mean, torch.exp(spread - 1.5) + STEP ** 2     # of clean pixels
        alpha, sigma = alpha[..., None, None], sigma[..., None, None]                # (B, n, 1, 1)
        x = x.flatten(1)[:, None, None]                                              # (B, 1, 1, d)
        greys = log_gaussian(x, alpha * self.grey, sigma ** 2)
        gaussians = log_gaussian(x, alpha * mean, alpha ** 2 * variance + sigma ** 2)
        parts = log_weight + torch.cat([greys, gaussians + log_lattice(x, sigma)], 2)
        return parts.logsumexp(2).sum(2) - log_normal(x)[:, None] + constant


def log_gaussian(x, mean, variance):
    """log N(x; mean, variance) of each number."""
    return -((x - mean) ** 2 / variance + torch.log(2 * math.pi * variance)) / 2


def log_lattice(x, sigma):
    """What makes the Gaussians of PixelMixture discrete, (B, n, 1, d). Safe to skip. It is the log
    of a comb that multiplies their density: a peak at each grey value, or flat (1) once the noise
    hides the steps between them. The five nearest greys suffice. Saves 0.125 bits/dim."""
    hidden = sigma > 0.6 * STEP
    greys = STEP * (torch.arange(-2, 3, dtype=x.dtype, device=x.device)[:, None] + 0.5)    # (5, 1)
    near = log_gaussian(torch.remainder(x, STEP), greys, sigma ** 2)                 # (B, n, 5, d)
    return torch.where(hidden, 0.0, near.logsumexp(2, keepdim=True) + math.log(STEP))


def waves(alpha, sigma):
    """Noise-level embedding, (..) -> (.., 32): sines and cosines of the log-SNR, rescaled so that
    level 1 is at 0 and level T at 1. Level 0 is embedded like level 1, and T+1 like T."""
    log_snr = 2 * (alpha.clamp(min=1e-9) / sigma.clamp(min=1e-9)).log()
    depth = ((CLEANEST - log_snr) / (CLEANEST - NOISIEST)).clamp(0, 1)
    phase = depth[..., None] * torch.arange(1, 17, device=depth.device) * (math.pi / 2)
    return torch.cat([phase.sin(), phase.cos()], -1)


class DigitNet(nn.Module):
    """What a CDM and a DDM of digits share. The label 10 (CLASSES) means none."""

    def __init__(self, images, width):
        super().__init__()
        self.trunk, self.mixture = Trunk(images.shape[-1], width), PixelMixture(images, width)
        self.label = nn.Embedding(CLASSES + 1, 32)
        nn.init.zeros_(self.label.weight)

    def features(self, x, y, level_embedding=0.0):
        """(B, width, H/2, W/2), for labels y (B,) or None."""
        if y is None:
            y = torch.full((len(x),), CLASSES, device=x.device)
        if not torch.is_tensor(y) or y.shape != (len(x),):
            raise ValueError(f"y must be one label per image, a tensor ({len(x)},), got {y}")
        return self.trunk(x, self.label(y) + level_embedding)


class DigitCDM(CDM):
    """The paper's network returns all T+2 logits, this one only those at `levels`. It is not told
    which of them is the true one. It knows a level by alpha and sigma, so T can change later."""
    window = 2                                     # training compares two adjacent levels at a time

    def log_ratio(self, x, levels, y=None):
        tables = (v.to(x, non_blocking=True) for v in self.schedule)
        alpha, sigma = (v.expand(len(x), -1).gather(1, levels) for v in tables)
        return self.net.mixture(self.net.features(x, y), x, alpha, sigma)


class DigitDDM(DDM):
    """A DDM with the same parts. Its trunk is conditioned on the level. Its eps_hat follows from
    the mixture's gradient at constant features; a CDM's gradient also passes through them."""

    def predict_noise(self, xt, t, y=None):
        alpha, sigma = (v.view(-1, 1) for v in self.scales(t, xt))
        features = self.net.features(xt, y, waves(alpha, sigma)[:, 0])
        gradient = torch.func.grad(lambda x: self.net.mixture(features, x, alpha, sigma).sum())(xt)
        return sigma[..., None, None] * (xt - gradient)


def build(config, images=None):
    """An untrained model from a config (model, dataset, width). images (N, 1, H, W) initialise the
    pixel histograms; without them, trained weights must be loaded."""
    if images is None:
        images = torch.zeros(1, 1, SIZE[config["dataset"]], SIZE[config["dataset"]])
    family = {"cdm": DigitCDM, "ddm": DigitDDM}[config["model"]]
    net = DigitNet(images, config["width"])
    return family(net, log_snr_schedule(64, CLEANEST, NOISIEST)).float()


# --------------------------------------------------------------------------------------- training
W_CE = 0.02            # weight of the cross-entropy: small, so that the denoising error dominates
UNLABELLED = 0.2       # fraction of rows whose label is dropped; they train the unconditional p(x)


def best_linear_mse(images, schedule):
    """Noise-prediction MSE of the best linear denoiser at each level, float64 (T+2,): the mean of
    alpha^2 s / (alpha^2 s + sigma^2) over the eigenvalues s of the image covariance (Wiener 1949).
    Levels 0 and T+1 copy their neighbours."""
    s = torch.linalg.eigvalsh(to_x0(images.cpu()).flatten(1).T.double().cov()).clamp(min=0)
    alpha, sigma = (v[1:-1, None] for v in schedule)
    error = (alpha ** 2 * s / (alpha ** 2 * s + sigma ** 2)).mean(1)
    return torch.cat([error[:1], error, error[-1:]])


def save(path, **content):
    """Save to a temporary file, then rename it, so that an interruption never corrupts `path`."""
    try:
        torch.save(content, f"{path}.part")
    except RuntimeError as error:                                # PyTorch's error for a full disk
        raise OSError(str(error)) from error
    os.replace(f"{path}.part", path)


def read(path):
    """The content of a file that train() saved, and the model in it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model = build(content["config"])
        model.load_state_dict(content["model"])
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:
        raise UserError(f"{path} holds no model of mnist.py: {type(error).__name__}") from error
    return content, model


def load(path, device="cpu", dataset=None):
    """A trained model from weights.pt or model.pt, in eval mode. Raises UserError if the file is
    unusable, or the model was trained on another dataset than `dataset`."""
    content, model = read(path)
    if dataset not in (None, content["config"]["dataset"]):
        raise UserError(f"{path} was trained on another dataset: {content['config']}")
    return model.to(device).eval()


def begin(config, images, out):
    """Create the folder `out` with the files that training continues: log.csv, which has only its
    header, and model.pt, an untrained model."""
    model = build(config, images)
    out.mkdir(parents=True, exist_ok=True)
    try:
        if list(out.glob("*.pt")):                              # weights without their log.csv
            raise FileExistsError
        with (out / "log.csv").open("x") as log:     # x: the file must be new, so no run is harmed
            print("step,cross_entropy,weighted_mse,ms_per_step", file=log)
    except FileExistsError:
        raise UserError(f"{out} already holds a run: add --resume to continue it, or choose "
                        "another --out") from None
    save(out / "model.pt", config=config, step=0, model=model.state_dict(), optimiser=None)


def train(config, images, labels, device, out, resume=False, compiled=False):
    """Train and return a model. Every 100 steps it is saved to model.pt in `out`, and the losses of
    the last batch to log.csv; weights.pt, the result, lacks the optimiser. On a CPU a resumed run
    repeats an uninterrupted one exactly, on a GPU up to rounding. Raises UserError if `out` holds
    another run, or if training diverges."""
    path, steps, batch = out / "model.pt", config["steps"], config["batch"]
    if not resume:
        begin(config, images, out)
    content, model = read(path)
    if content["config"] != config or "step" not in content:
        raise UserError(f"{path} is not a checkpoint of {config}, but of {content['config']}: pass "
                        "the original flags, or start over in another --out")
    model, done = model.to(device), content["step"]
    optimiser = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused="cuda" in str(device))
    if done:
        optimiser.load_state_dict(content["optimiser"])
    error = best_linear_mse(images, model.schedule)
    w_mse = (error.mean() / error).float().to(device)       # so that levels count about equally
    losses = torch.compile(model.losses) if compiled else model.losses
    images, labels, begun = images.to(device), labels.to(device), time.time()
    for step in range(done + 1, steps + 1):
        torch.manual_seed(config["seed"] * 1_000_003 + step)   # so that a resumed run is the same
        rows = torch.randint(len(images), (batch,), device=device)
        dropped = torch.rand(batch, device=device) < UNLABELLED
        y = labels[rows].masked_fill(dropped, CLASSES)
        ce, mse = losses(to_x0(images[rows]), w_mse, y=y)
        optimiser.zero_grad()
        (W_CE * ce + mse).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        warm_up, cosine = step / (0.03 * steps + 1), math.cos(math.pi * (step - 1) / steps)
        optimiser.param_groups[0]["lr"] = config["lr"] * min(warm_up, (1 + cosine) / 2)
        optimiser.step()
        if step % 100 == 0 or step == steps:                # the only place that waits for a GPU
            ce, mse = ce.item(), mse.item()
            if not math.isfinite(ce + mse):
                raise UserError(f"diverged before step {step}: the loss is not finite; try another "
                                "--seed, in another --out")
            ms = 1000 * (time.time() - begun) / (step - done)
            print(f"step {step:6d} of {steps}   cross-entropy {ce:.3f} (chance 0.693)   weighted "
                  f"MSE {mse:.4f}   {ms:.0f} ms per step   "
                  f"{ms * (steps - step) / 60000:.1f} min left", flush=True)
            with (out / "log.csv").open("a") as log:
                print(f"{step},{ce:.5f},{mse:.6f},{ms:.1f}", file=log)
            save(path, config=config, step=step, model=model.state_dict(),
                 optimiser=optimiser.state_dict())
    save(out / "weights.pt", config=config, model=model.state_dict())
    return model.eval()


# ------------------------------------------ evaluation (On a first reading of the file, stop here.)
@torch.no_grad()
def batches(function, x):
    """function(x), computed a part of the rows at a time, as float64 on the CPU."""
    parts = x.split(1000 if x.is_cuda else 100)
    return torch.cat([function(part) for part in parts]).cpu().double()


def likelihood(model, images, preset):
    """Print estimates of the bits/dim of 8-bit images: the ELBO, the ODE and, for a CDM, one pass
    and log Z. Returns the ELBO of the first preset["elbo"] images."""
    x0, sigma1, d = to_x0(images), model.schedule.sigma[1].item(), images[0].numel()
    x1 = model.add_noise(x0, 1, torch.randn_like(x0))
    few = x1[:preset["slow"]]

    def line(name, log_p1, x):
        begun = time.time()
        bits = bits_per_dim(batches(log_p1, x), sigma1, d)
        ms = 1000 * (time.time() - begun) / len(x)
        print(f"  {name:22s} {bits.mean():6.3f} +- {bits.std() / len(x) ** 0.5:.3f} bits/dim, "
              f"{len(x):5d} images, {ms:6.0f} ms each", flush=True)
        return bits.mean().item()

    if isinstance(model, CDM):
        one_pass = line("one forward pass", lambda x: model.log_prob(x, 1), x1)
        for n in (preset["elbo"], preset["slow"]):             # the images of the other estimates
            line("one forward pass", lambda x: model.log_prob(x, 1), x1[:n])
    bound = line("ELBO", lambda x: elbo(model, x), x0[:preset["elbo"]])
    line("probability-flow ODE", lambda x: ode_log_prob(model, x, probes=1), few)
    if isinstance(model, CDM):
        finer = DigitCDM(model.net, log_snr_schedule(preset["fine"], CLEANEST, NOISIEST))
        below, above = (v / (d * math.log(2)) for v in annealed_log_z(finer, few))
        print(f"  log Z in {below:.3f} .. {above:.3f}. The number to quote is one pass + log Z: "
              f"{one_pass + (below + above) / 2:.3f} +- {abs(above - below) / 2:.3f}", flush=True)
    return bound


def make_judge(images, labels, steps=600):
    """A small classifier of digits, trained on the spot, and its body: x0 -> 64 features."""
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.SiLU())
              for a, b in ((1, 32), (32, 64), (64, 64))]
    places = math.ceil(images.shape[-1] / 8) ** 2
    body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * places, 64), nn.SiLU())
    judge = nn.Sequential(body, nn.Linear(64, CLASSES)).to(images.device)
    optimiser = torch.optim.Adam(judge.parameters())
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.randint(len(images), (128,), device=images.device)
        optimiser.zero_grad()
        F.cross_entropy(judge(to_x0(images[rows])), labels[rows]).backward()
        optimiser.step()
    return judge.eval(), body


def frechet(a, b):
    """Squared distance between two Gaussians fitted to features (N, 64) (Heusel et al. 2017)."""
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
            - 2 * cross).item()


def of_each_class(images, labels, n):
    """The first n images of each class, as x0 (CLASSES n, 1, H, W)."""
    return to_x0(torch.cat([images[labels == y][:n] for y in range(CLASSES)]))


# ---------------------------------------------------------------------------------------- figures
def picture(ax, x0, title):
    """Tile images (rows, columns, 1, H, W) into one picture; -1 is black, 1 is white."""
    x0 = F.pad(x0[:, :, 0], (0, 1, 0, 1), value=-1)                # a one-pixel gap between tiles
    x0 = x0.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)[:-1, :-1]
    ax.imshow(x0.cpu().numpy(), cmap="gray", vmin=-1, vmax=1)
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def show_samples(models, train_set, test_set, n, seed, path):
    """Draw real digits and each model's samples, one class per row. Print how far n of them, n / 10
    per class, are from the test digits, and of how many the judge is 90 % sure. All models share
    the same noise and the same judge, a classifier that is trained here."""
    torch.manual_seed(seed)
    judge, body = make_judge(*train_set)
    target = batches(body, of_each_class(*test_set, test_set[1].bincount().min()))
    order = torch.randperm(len(train_set[1])).to(train_set[1])     # adjacent digits share a writer
    real = of_each_class(train_set[0][order], train_set[1][order], n // CLASSES)
    y = torch.arange(CLASSES).repeat_interleave(n // CLASSES).to(order)
    fig, axes = plt.subplots(1, 1 + len(models), figsize=(3 + 3 * len(models), 3.3),
                             layout="constrained")
    print(f"\n| {n:5d} samples, DDPM        | Frechet distance | 90 % sure | ms each |\n"
          "| -------------------------- | ---------------- | --------- | ------- |")

    def show(ax, name, x0, ms):
        picture(ax, x0.unflatten(0, (CLASSES, -1))[:, :10], name)
        distance = frechet(batches(body, x0), target)
        sure = batches(lambda x: judge(x).softmax(1).amax(1) >= 0.9, x0).mean()
        print(f"| {name:26s} | {distance:16.2f} | {100 * sure:7.1f} % | {ms:7.1f} |", flush=True)

    show(axes[0], "real (training) digits", real, 0)
    for ax, (name, model) in zip(axes[1:], models.items()):
        for title, guidance in ((f"{name}, guidance 0.3", 0.3), (name, 0.0)):    # 0.0 stays drawn
            torch.manual_seed(seed)
            begun, noise = time.time(), torch.randn_like(real)
            x0 = batches(lambda rows: sample(model, noise[rows], eta=1.0, guidance=guidance,
                                             y=y[rows]), torch.arange(n).to(y)).to(real)
            show(ax, title, x0, 1000 * (time.time() - begun) / n)
    fig.savefig(path, dpi=100)
    plt.close(fig)


@torch.no_grad()
def show_levels(model, image, path):
    """What the classifier makes of one digit at six noise levels."""
    every = torch.arange(model.T + 2, device=image.device)[None]
    fig, axes = plt.subplots(3, 6, figsize=(9, 4.6), layout="constrained",
                             height_ratios=[1, 0.7, 1])
    for column, t in zip(axes.T, (25, 31, 37, 44, 50, 56)):
        x0, near = to_x0(image), range(t - 8, t + 9)
        xt = model.add_noise(x0, t, torch.randn_like(x0))
        picture(column[0], (xt / 2)[None], f"level {t}")                # / 2: noise exceeds 1
        posterior = model.log_ratio(xt, every)[0].softmax(0).cpu().numpy()
        column[1].bar(near, posterior[near], color=["C1" if s == t else "C0" for s in near])
        column[1].set(yticks=[], ylim=(0, None))
        column[1].set_title("p(level | x)", fontsize=9)
        picture(column[2], model.denoise(xt, t)[None], "denoised")
    fig.savefig(path, dpi=100)
    plt.close(fig)


@torch.no_grad()
def show_errors(models, elbos, images, linear, path):
    """Print each model's ELBO, and its MSE relative to the best linear denoiser's. If one of them
    is a DDM, plot how each MSE compares with the DDM's at each level."""
    x0, mse = to_x0(images), {}
    eps = torch.randn_like(x0)
    print(f"\n| {len(x0):5d} images          | weights | ELBO, bits/dim | MSE / best linear's |\n"
          "| --------------------- | ------- | -------------- | ------------------- |")
    for name, model in models.items():
        mse[name] = torch.stack([F.mse_loss(model.predict_noise(model.add_noise(x0, t, eps), t),
                                            eps).cpu() for t in range(1, model.T + 1)])
        print(f"| {name:21s} | {sum(p.numel() for p in model.parameters()):7d} | "
              f"{elbos[name]:14.4f} | {(mse[name] / linear).mean():19.4f} |", flush=True)
    ddms = [name for name in models if isinstance(models[name], DDM)]
    if not ddms or len(models) == 1:
        return
    alpha, sigma = models[ddms[0]].schedule
    fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    for name in mse:
        ax.plot(2 * (alpha / sigma).log()[1:-1], 100 * (mse[name] / mse[ddms[0]] - 1), label=name)
    ax.set(xlabel="log-SNR (left: noise)", ylabel="%",
           title=f"MSE of eps_hat, compared with the {ddms[0]}'s")
    ax.legend()
    fig.savefig(path, dpi=100)
    plt.close(fig)


# ------------------------------------------------------------------------------------------- main
def measure(models, train_set, test_set, preset, seed, out):
    """Print one screen of numbers on the test set, and draw figures."""
    images, elbos = test_set[0][:preset["one_pass"]], {}
    for name, model in models.items():
        print(f"\n{name}")
        torch.manual_seed(seed)                                   # the same noise for all models
        elbos[name] = likelihood(model, images, preset)
    torch.manual_seed(seed)
    linear = best_linear_mse(train_set[0], model.schedule)[1:-1]
    show_errors(models, elbos, images[:preset["elbo"]], linear, out / "errors.png")
    cdms = [model for model in models.values() if isinstance(model, CDM)]
    if cdms:
        show_levels(cdms[0], images[:1], out / "levels.png")
    show_samples(models, train_set, test_set, preset["samples"], seed, out / "samples.png")
    print(f"figures: {', '.join(str(path) for path in sorted(out.glob('*.png')))}")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--model", choices=("cdm", "ddm"), default="cdm", help="ddm: a denoiser of the same size")
    add("--dataset", choices=SIZE, default="mnist", help="digits: 8x8, no download")
    add("--data", default="data/mnist", help="folder of the four MNIST files (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    add("--compile", action="store_true", help="use torch.compile: for a GPU, needs Triton")
    add("--quick", action="store_true", help="for a CPU: a small network, a short run")
    add("--out", type=Path, help="output folder (default: runs/ and the name of the run)")
    add("--weights", nargs="+", metavar="FILE", help="only evaluate and compare these files")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")
    for name, what in (("steps", "training steps"), ("batch", "images per step"),
                       ("width", "channels of the network, a multiple of 4")):
        add(f"--{name}", type=int, help=f"{what} ({FULL[name]}; with --quick {QUICK[name]})")
    add("--seed", type=int, default=0, help="0 .. 10^9")
    args = p.parse_args()
    if any(v is not None and v < 1 for v in (args.steps, args.batch, args.width)):
        p.error("--steps, --batch and --width must be 1 or more")
    if args.width is not None and args.width % 4:
        p.error("--width must be a multiple of 4")
    if not 0 <= args.seed <= 10 ** 9:
        p.error("--seed must be in 0 .. 10^9")
    try:
        torch.zeros(1, device=args.device).item()
    except (AssertionError, RuntimeError) as error:
        p.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    return args


def run(args, preset, out):
    """Train a model, or load some, and measure it."""
    print(f"torch {torch.__version__} on {args.device}; results go to {out}", flush=True)
    torch.manual_seed(args.seed)
    models = [load(path, args.device, args.dataset) for path in args.weights or ()]
    train_set, _, test_set = load_data(args.dataset, args.data)
    if args.weights:
        out.mkdir(parents=True, exist_ok=True)
    else:
        config = dict(model=args.model, dataset=args.dataset, seed=args.seed,
                      **{name: preset[name] for name in ("width", "batch", "steps", "lr")})
        print(f"training: {config}", flush=True)
        models = [train(config, *train_set, args.device, out, args.resume, args.compile)]
    kinds = ["CDM" if isinstance(model, CDM) else "DDM" for model in models]
    names = [kind if kinds.count(kind) == 1 else f"{kind} {path}"
             for kind, path in zip(kinds, args.weights or kinds)]
    train_set, test_set = ([v.to(args.device) for v in part] for part in (train_set, test_set))
    measure(dict(zip(names, models)), train_set, test_set, preset, args.seed, out)


def main():
    args = arguments()
    preset = dict(QUICK if args.quick else FULL)
    for name in ("steps", "batch", "width"):
        preset[name] = getattr(args, name) or preset[name]
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
        preset["slow"] *= 10
    plt.rcParams["text.parse_math"] = False                       # a $ in a file's name is a $
    name = f"{args.dataset}_{args.model}" + ("_quick" if args.quick else "")
    out = args.out or Path("runs", "measured" if args.weights else name)
    try:
        run(args, preset, out)
    except KeyboardInterrupt:
        sys.exit("interrupted; if this was a training run, --resume continues it")
    except UserError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{out} cannot be written: {error}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")      # a console may lack a letter of a name
    main()
