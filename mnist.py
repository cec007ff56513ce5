"""CDM on MNIST: train a noise-level classifier, draw digits, read likelihoods off its logits.

    python mnist.py --quick                             three minutes on two CPU cores
    python mnist.py --weights assets/mnist_cdm.pt --beside assets/mnist_ddm.pt
                                                        what is in the box, measured
    python mnist.py --device cuda                       the full run
    python mnist.py --dataset digits --quick            8x8 digits of scikit-learn, no download

Read it for a classifier that is asked about one level at a time, for a DDM of the same parts
(--model ddm), and for how bits/dim of 8-bit images are measured and certified. Results go to
runs/: model.pt (checkpoint), weights.pt (small), log.csv, pictures. The method itself is in cdm.py.
"""

import argparse
import copy
import gzip
import math
import os
import time
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.benchmark import Timer

from cdm import (CDM, DDM, annealed_log_z, bits_per_dim, elbo, given, log_snr_schedule,
                 ode_log_prob, sample)

# ------------------------------------------------------------------------------------------- data

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {"train-images-idx3-ubyte.gz": "440fcabf73cc546f",                # how the SHA-256 begins
         "train-labels-idx1-ubyte.gz": "3552534a0a558bbe",
         "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79",
         "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6d"}


def read_or_download(folder, name, sha256):
    """The array in folder/name, a gzipped IDX file; downloaded, whole or not at all, if need be."""
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL + name, folder / name, sha256, progress=False)
    data = gzip.decompress((folder / name).read_bytes())
    sizes = np.frombuffer(data, ">i4", data[3], 4)                # big-endian, then the bytes
    return torch.tensor(np.frombuffer(data, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes))


def load_data(dataset, folder):
    """(images, labels) of training, validation and test: uint8 (N, 1, H, W), long (N,)."""
    if dataset == "digits":                                       # 1797 digits of 8x8, grey 0 .. 16
        order = np.random.default_rng(0).permutation(1797)
        x = torch.tensor(load_digits().images[order] * 255 / 16).round().to(torch.uint8)
        y = torch.tensor(load_digits().target[order])
        x, y, test, test_y, held_out = x[:1500], y[:1500], x[1500:], y[1500:], 150
    else:
        try:
            x, y, test, test_y = (read_or_download(Path(folder), *file) for file in FILES.items())
        except Exception as error:
            raise SystemExit(f"MNIST cannot be read: {error}\nDelete a damaged file, or put these "
                             f"in {folder}: {list(FILES)}, or use --data or --dataset digits")
        held_out = 5000
    x, y, test, test_y = x[:, None], y.long(), test[:, None], test_y.long()
    return (x[:-held_out], y[:-held_out]), (x[-held_out:], y[-held_out:]), (test, test_y)


def to_x0(images):
    """Grey value k -> (2k+1)/256 - 1, the middle of its 256th part of [-1, 1]."""
    return (2 * images.float() + 1) / 256 - 1


# ---------------------------------------------------------------------------------------- network

CLASSES = 10                                                # the label CLASSES itself: "any class"
STEP = 2 / 256                                              # between two 8-bit grey values
CLEANEST, NOISIEST = 14.0, -8.0                             # log-SNR at levels 1 and T


class Block(nn.Module):
    """Two convolutions and a skip around them, (B, C, H, W) -> the same; before them, if there are
    `places` = H W, every place hears from every other: a matrix for each quarter of the channels.

    It may be told something, (B, 32): a class, and in a DDM the level. GroupNorm, so that rows stay
    independent; SiLU, which is curved everywhere, for training differentiates the gradient."""

    def __init__(self, channels, places=0):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm0 = nn.GroupNorm(4, channels) if places else None
        self.mix = nn.Parameter(torch.zeros(4, places, places)) if places else None
        self.told = nn.Linear(32, channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, told):
        if self.mix is not None:
            parts = F.silu(self.norm0(x)).flatten(2).unflatten(1, (4, -1))       # (B, 4, C/4, H W)
            x = x + (parts @ self.mix).view_as(x)
        h = self.conv1(F.silu(self.norm1(x))) + self.told(told)[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class Trunk(nn.Module):
    """A small U-Net: images (B, 1, H, W) and what it is told (B, 32) -> features (B, width, H/2,
    W/2). At half the resolution it sees strokes, at a quarter the whole digit."""

    def __init__(self, shape, width):
        super().__init__()
        places = shape[-2] // 4 * (shape[-1] // 4)
        self.stem = nn.Conv2d(4, width, 3, padding=1)              # 2x2 pixels become 4 channels
        self.fine = Block(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList(Block(2 * width, places) for _ in range(2))
        self.up = nn.Conv2d(2 * width, width, 1)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x, told):
        fine = self.fine(self.stem(F.pixel_unshuffle(x, 2)), told)
        coarse = self.down(fine)
        for block in self.coarse:
            coarse = block(coarse, told)
        both = torch.cat([fine, F.interpolate(self.up(coarse), scale_factor=2.0)], 1)
        return self.join(F.silu(self.norm(both)))


def log_comb(x, alpha, sigma):
    """What a lattice of grey values makes of a smooth density, at level t, as log of a factor:
    sum_k N(x; alpha c_k, sigma^2) alpha STEP over grey values c_k = STEP (k + 1/2).

    It has no weights and is 0 where the noise hides the lattice; three neighbours a side do."""
    hidden = sigma > 0.6 * alpha * STEP
    alpha, sigma = torch.where(hidden, 1.0, alpha), torch.where(hidden, STEP, sigma)
    neighbours = STEP * (torch.arange(-3, 4, device=x.device)[:, None] + 0.5)
    z = (torch.remainder(x / alpha, STEP) - neighbours) * (alpha / sigma)               # (B, 7, d)
    tooth = torch.logsumexp(-z * z / 2, 1, keepdim=True) - math.log(2 * math.pi) / 2
    return torch.where(hidden, 0.0, tooth + (alpha * STEP / sigma).log())


class Shades(nn.Module):
    """Features -> log p_t(x) / N(x; 0, I), (B,), of pixels x (B, d), each by itself.

    A clean pixel has one of five greys that MNIST is full of, or is from one of three Gaussians on
    the lattice of greys. Noise turns a grey c into N(alpha c, sigma^2), and a Gaussian N(m, v) into
    N(alpha m, alpha^2 v + sigma^2) times the comb. At the start a pixel's weights are how often it
    has which grey in the training images; the features then change them."""

    EXACT, GAUSSIANS = (0, 252, 253, 254, 255), 3

    def __init__(self, images, width):
        super().__init__()
        n, g = len(self.EXACT), self.GAUSSIANS
        self.read = nn.Conv2d(width, 4 * (n + 3 * g), 3, padding=1)        # for each of 2x2 pixels
        nn.init.zeros_(self.read.weight), nn.init.zeros_(self.read.bias)
        count = torch.stack([(images == k).flatten(1).sum(0) for k in self.EXACT])          # (n, d)
        grey = (len(images) - count.sum(0, keepdim=True)).expand(g, -1) / g
        share = (torch.cat([count, grey]) + 1) / (len(images) + n + g)
        self.log_weight = nn.Parameter(share.log())
        shades = to_x0(torch.tensor(self.EXACT))[:, None]
        self.register_buffer("shade", shades, persistent=False)
        self.register_buffer("mean", torch.linspace(-0.6, 0.6, g)[:, None], persistent=False)

    def forward(self, features, x, alpha, sigma):
        alpha, sigma, x = alpha[:, None, None], sigma[:, None, None], x[:, None]        # (B, 1, d)
        n, g, numbers = len(self.shade), len(self.mean), self.read(features)
        weight, mean, spread = F.pixel_shuffle(numbers, 2).flatten(2).split([n + g, g, g], 1)
        variance = (spread - 1.5).exp() + STEP ** 2                                     # (B, g, d)
        noised = alpha ** 2 * variance + sigma ** 2
        exact = -((x - alpha * self.shade) / sigma) ** 2 / 2 - sigma.log()              # (B, n, d)
        grey = -(x - alpha * (self.mean + mean)) ** 2 / noised / 2 - noised.log() / 2
        parts = torch.cat([exact, grey + log_comb(x, alpha, sigma)], 1)
        log_p = torch.logsumexp((weight + self.log_weight).log_softmax(1) + parts, 1, keepdim=True)
        return (log_p + x * x / 2).sum((1, 2))


class DigitClassifier(nn.Module):
    """Digits x (B, 1, H, W) of unknown levels, and their classes y (B,) if any -> log p_t(x) /
    p_{T+1}(x), nats, at the levels that it is asked about, (B, n) -> (B, n).

    The paper's network computes all T+2 logits at once; this one those in need. The trunk reads x
    and does not know the question; the last convolution and the shades are told t. As pixels are
    not all independent, a constant for each level, smooth in log-SNR, is learned beside. Levels
    enter by their noise alone, so that a trained network serves any number of them."""

    takes_levels = True

    def __init__(self, images, schedule, width):
        super().__init__()
        self.trunk, self.shades = Trunk(images.shape, width), Shades(images, width)
        self.level, self.label = nn.Linear(32, width), nn.Embedding(CLASSES + 1, 32)
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.constant = nn.Linear(32, 1, bias=False)
        nn.init.zeros_(self.label.weight), nn.init.zeros_(self.constant.weight)
        alpha, sigma = (v.float() for v in schedule)
        log_snr = 2 * (alpha.clamp(min=1e-9) / sigma.clamp(min=1e-9)).log()
        depth = ((CLEANEST - log_snr) / (CLEANEST - NOISIEST)).clamp(0, 1)              # (T+2,)
        phase = depth[:, None] * torch.arange(1, 17) * (math.pi / 2)
        self.register_buffer("waves", torch.cat([phase.sin(), phase.cos()], 1), persistent=False)
        self.register_buffer("alpha", alpha, persistent=False)    # level 0: a small width, not none
        self.register_buffer("sigma", torch.cat([sigma[1:2] / 3, sigma[1:]]), persistent=False)

    def class_of(self, x, y):
        """The labels y, or none, as vectors (B, 32). ValueError if there is no such class."""
        if y is None:
            y = torch.full((len(x),), CLASSES, device=x.device)
        elif not self.training and not (0 <= y.min() and y.max() <= CLASSES):
            raise ValueError(f"labels must be in 0 .. {CLASSES - 1}, or {CLASSES} for any class")
        return self.label(y)

    def ask(self, features, x, t):
        """log p_t(x) / N(x; 0, I) of pixels x (B, d) by their shades alone, told t (B,)."""
        h = self.norm1(features + self.level(self.waves[t])[:, :, None, None])
        h = self.norm2(features + self.last(F.silu(h)))
        return self.shades(F.silu(h), x, self.alpha[t], self.sigma[t])

    def forward(self, x, levels, y=None):
        n, t = levels.shape[1], levels.flatten()
        features = self.trunk(x, self.class_of(x, y)).repeat_interleave(n, 0)
        ratio = self.ask(features, x.flatten(1).repeat_interleave(n, 0), t)
        constant = 10 * self.constant(self.waves[t] - self.waves[-1])[:, 0]      # none at level T+1
        return (ratio + constant).view(levels.shape)


class DigitDenoiser(DigitClassifier):
    """The DDM's network, of the same parts: all blocks are told the level t (B,) of x, and the
    shades are held fixed: eps_hat = -sigma_t grad log p_t, like x. Wider by sqrt(2), it costs as
    much as the classifier's forward and backward pass."""

    def __init__(self, images, schedule, width):
        super().__init__(images, schedule, 4 * round(math.sqrt(2) * width / 4))
        del self.constant

    def forward(self, x, t, y=None):
        features, pixels = self.trunk(x, self.waves[t] + self.class_of(x, y)), x.flatten(1)
        ratio, pull = torch.func.vjp(lambda pixels: self.ask(features, pixels, t), pixels)
        return (self.sigma[t][:, None] * (pixels - pull(torch.ones_like(ratio))[0])).view_as(x)


# --------------------------------------------------------------------------------------- training

W_CE, WINDOW, UNLABELLED = 0.02, 2, 0.5             # UNLABELLED: the share of rows that teach p(x)


def wiener_error(images, schedule):
    """The MSE of eps_hat of the best linear denoiser at every level, (T+2,): the mean, over the
    eigenvalues s of the images' covariance, of alpha^2 s / (alpha^2 s + sigma^2) (Wiener 1949).
    Levels 0 and T+1 have that of their neighbours."""
    s = torch.linalg.eigvalsh(to_x0(images.cpu()).flatten(1).T.double().cov()).clamp(min=0)
    alpha, sigma = (v[1:-1, None] for v in schedule)
    error = (alpha ** 2 * s / (alpha ** 2 * s + sigma ** 2)).mean(1)
    return torch.cat([error[:1], error, error[-1:]])


def build(config, images):
    """The model that a configuration stands for; images give size and the pixels' own shades."""
    schedule = log_snr_schedule(config["T"], CLEANEST, NOISIEST)
    family, network = {"cdm": (CDM, DigitClassifier), "ddm": (DDM, DigitDenoiser)}[config["model"]]
    return family(network(images, schedule, config["width"]), schedule)


def save(path, **content):
    """Plain tensors and numbers, written beside the old file first: a good one is always there."""
    try:
        torch.save(content, f"{path}.part")
    except RuntimeError as error:                         # so torch says that a disk is full
        raise OSError(f"{path}.part: {error}")
    os.replace(f"{path}.part", path)


def load(path):
    """The content of a checkpoint. SystemExit if it is missing, damaged or of another kind."""
    try:
        if zipfile.ZipFile(path).testzip():                            # compares its checksums
            raise ValueError("damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["ema"].items(), [content["config"][k] for k in ("model", "dataset", "T", "width")]
        return content
    except Exception as error:             # torch's message goes on to advise an unsafe load: cut
        problem = f"{type(error).__name__}: {error}".split("(1)")[0]
        raise SystemExit(f"{path} is no usable checkpoint ({problem})")


def load_model(path, images, dataset="mnist", device="cpu", T=None):
    """The averaged model of a checkpoint, ready to measure, with its own number of levels or T."""
    kept = load(path)
    config = kept["config"] | dict(T=T or kept["config"]["T"])
    try:
        if config["dataset"] != dataset:
            raise ValueError(f"trained on --dataset {config['dataset']}")
        model = build(config, images)
        model.load_state_dict(kept["ema"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} holds no network that can be used here: {error}")
    return model.to(device).eval()


class Checkpoint:
    """args.out/model.pt: model, average and Adam after a step, and the run's configuration."""

    def __init__(self, args, config, **parts):
        self.path, self.config, self.parts = args.out / "model.pt", config, parts
        self.step, self.stamp = 0, self.path.exists() and self.path.stat().st_mtime_ns
        kept = load(self.path) if args.resume or self.stamp else {}
        if not args.resume and kept.get("step", 0) > args.steps:
            raise SystemExit(f"{self.path}: a longer run. --resume it, or name another --out")
        if args.resume:
            if kept["config"] != config or "optimiser" not in kept:
                raise SystemExit(f"--resume: {self.path} is of {kept['config']}, not {config}")
            self.step = kept["step"]
            for name, part in parts.items():
                part.load_state_dict(kept[name])

    def save(self, step):
        """SystemExit if another process has written the file since: the two would mix."""
        if self.stamp != (self.path.exists() and self.path.stat().st_mtime_ns):
            raise SystemExit(f"{self.path} is written by another process too; name another --out")
        save(self.path, config=self.config, step=step,
             **{name: part.state_dict() for name, part in self.parts.items()})
        self.stamp = self.path.stat().st_mtime_ns


def train(args, config, images, labels):
    """Train; return the model with averaged weights (EMA). Checkpoint and log go to args.out."""
    torch.backends.cudnn.benchmark = True             # the second derivative has unusual shapes
    device, steps = args.device, args.steps
    model = build(config, images).to(device)
    ema, optimiser = copy.deepcopy(model), torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    checkpoint = Checkpoint(args, config, model=model, ema=ema, optimiser=optimiser)
    first, begun = checkpoint.step, time.time()
    if not first:
        (args.out / "log.csv").write_text("step,ce,mse,ms_per_step\n")
    wiener = wiener_error(images, model.schedule)     # each level's error counts relative to this
    weights, window = dict(w_mse=(wiener.mean() / wiener).float().to(device)), []
    if args.model == "cdm":
        weights, window = weights | dict(w_ce=W_CE), [WINDOW]
    y = torch.empty(args.batch, dtype=torch.long, device=device)       # the labels of each step
    loss_at = torch.compile(given(model, y).loss_at, disable=device.type != "cuda")  # CPU: no gain
    images, labels = images.to(device), labels.to(device)         # the whole data set, one tensor
    for step in range(first + 1, steps + 1):
        torch.manual_seed(args.seed * 1_000_003 + step)     # a step depends on its number alone, so
        rows = torch.randint(len(images), (args.batch,), device=device)   # a resumed run repeats it
        dropped = torch.rand(args.batch, device=device) < UNLABELLED
        y.copy_(torch.where(dropped, CLASSES, labels[rows]))
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)      # after warm-up, half a cosine
        optimiser.param_groups[0]["lr"] = args.lr * min(step / (0.03 * steps + 1), cosine)
        optimiser.zero_grad()
        loss = loss_at(*model.draw(to_x0(images[rows]), *window), **weights)
        loss.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        if step % max(1, min(100, steps // 20)) == 0 or step == steps:
            report(args, step, loss, norm, (time.time() - begun) / (step - first))
            checkpoint.save(step - 1)                              # weights that just proved good
            first, begun = step, time.time()
        optimiser.step()
        with torch.no_grad():                         # averages about the last tenth, or 1000 steps
            blend = max(0.001, 9 / (9 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), blend)
    checkpoint.save(steps)
    half = {name: v.half() for name, v in ema.state_dict().items()}
    save(args.out / "weights.pt", config=config, ema=half)                 # small, to give away
    return ema.eval()


def report(args, step, loss, norm, seconds):
    """A line of progress, printed and logged. SystemExit if training has diverged."""
    total, ce, mse = (v.item() for v in loss)
    if not math.isfinite(total + norm.item()):
        raise SystemExit(f"training diverged: loss {total} at step {step}. Try a lower --lr. The "
                         f"last good checkpoint, if any, is {args.out / 'model.pt'}")
    print(f"step {step:6d} of {args.steps}   CE {ce:6.3f} nats   MSE {mse:.4f}   "
          f"{1000 * seconds:5.0f} ms/step   {(args.steps - step) * seconds / 60:5.1f} min left",
          flush=True)
    with open(args.out / "log.csv", "a") as log:
        log.write(f"{step},{ce:.5f},{mse:.6f},{1000 * seconds:.1f}\n")


# -------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def batches(function, images):
    """function of a hundred images at a time, as one tensor. SystemExit if not all is finite."""
    values = torch.cat([function(k) for k in images.split(100)]).cpu().double()
    if not values.isfinite().all():
        raise SystemExit(f"{(~values.isfinite()).sum()} of {values.numel()} results are not finite")
    return values


def refined(model, T, images):
    """A CDM with T levels in place of its own: its network serves any number."""
    config = dict(model="cdm", T=T, width=model.net.level.out_features)
    finer = build(config, images[:1].cpu())                              # for their size alone
    finer.load_state_dict(model.state_dict())
    return finer.to(images.device).eval()


def likelihood(model, images, fine):
    """Print bits/dim of 8-bit images by the ELBO and, of a CDM, by one forward pass, certified.

    What can make one pass wrong is its normaliser log Z alone: annealing through `fine` levels
    measures it. ELBO and ODE stand beside it, compared image by image."""
    begun = time.time()
    print(f"| {'bits/dim':36s} | images |   mean |   s.e. | seconds |\n"
          f"| {'-' * 36} | ------ | ------ | ------ | ------- |")

    def row(name, values, error=None):
        nonlocal begun
        mean, error = values.mean().item(), error or values.std().item() / len(values) ** 0.5
        print(f"| {name:36s} | {len(values):6d} | {mean:6.3f} | {error:6.3f} | "
              f"{time.time() - begun:7.1f} |", flush=True)
        begun = time.time()
        return mean, error

    bound = batches(lambda k: bits_per_dim(model, k, elbo, draws=model.T), images[:500])
    row("ELBO, an upper bound", bound)
    if isinstance(model, DDM):
        return
    bits = batches(lambda k: bits_per_dim(model, k), images)
    mean, error = row("one forward pass", bits)
    row("ELBO less one pass, paired", bound - bits[:500])
    flow = batches(lambda k: bits_per_dim(model, k, ode_log_prob, probes=1), images[:40])
    row("probability-flow ODE less one pass", flow - bits[:40])
    finer, x0 = refined(model, fine, images), to_x0(images[:40])
    x1 = finer.add_noise(x0, 1, torch.randn_like(x0))
    found = batches(lambda x1: torch.tensor(annealed_log_z(finer, x1)), x1)
    log_z, off, below, above = (found / (x0[0].numel() * math.log(2))).tolist()
    row(f"log Z by annealing, {finer.T} levels", torch.full((len(x0),), log_z), off)
    print(f"log Z from below and above: {below:.3f}, {above:.3f}. One pass + log Z: "
          f"{mean + log_z:.3f} +- {math.hypot(error, off):.3f} bits/dim.\n{verdict(log_z, off)}")


def verdict(log_z, off):
    """In words: can one pass be believed, whose density integrates to exp(log_z +- off)?"""
    if not off < 0.003:
        return "Not certified: log Z is not known well enough; --fine gives it more levels."
    if abs(log_z) < 0.01:
        return "Certified: the density integrates to 1, within 0.01 bits/dim."
    way = "low" if log_z > 0 else "high"
    return f"Certified with log Z only: by itself one pass is {abs(log_z):.3f} bits/dim too {way}."


def make_judge(images, labels, steps=600):
    """A small classifier of digits, trained on the spot: all of it, and its part up to 64 features
    (which are not Inception's)."""
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.SiLU())
              for a, b in ((1, 32), (32, 64), (64, 64))]
    body = nn.Sequential(*stages, nn.Flatten(), nn.LazyLinear(64), nn.SiLU())
    judge = nn.Sequential(body, nn.Linear(64, CLASSES)).to(images.device)
    judge(to_x0(images[:2]))                                    # the lazy layer learns its size
    optimiser = torch.optim.Adam(judge.parameters(), 2e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.randint(len(images), (128,), device=images.device)
        loss = F.cross_entropy(judge(to_x0(images[rows])), labels[rows])
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    return judge.eval(), body


def frechet(a, b):
    """Distance of two Gaussians fitted to features (N, 64) (Heusel et al. 2017)."""
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
            - 2 * cross).item()


def quality(models, train_set, test_set, n):
    """Print how far n samples of each model and sampler are from the test digits."""
    judge, body = make_judge(*train_set)
    real = batches(body, to_x0(test_set[0]))
    print(f"\n| {n:7d} samples | steps | Fréchet distance | 90 % sure | ms each |\n"
          "| --------------- | ----- | ---------------- | --------- | ------- |")

    def row(name, steps, x0, begun):
        sure = batches(lambda x0: judge(x0).softmax(1).amax(1) >= 0.9, x0).mean()
        print(f"| {name:15s} | {steps:>5} | {frechet(batches(body, x0), real):16.2f} | "
              f"{100 * sure:7.1f} % | {1000 * (time.time() - begun) / len(x0):7.1f} |", flush=True)

    some = torch.randperm(len(train_set[0]))[:n]
    row("training digits", "", to_x0(train_set[0][some]), time.time())
    for name, model in models.items():
        for method, steps in (("ddim", min(50, model.T)), ("ddpm", model.T)):
            begun, xT = time.time(), torch.randn(n, *test_set[0].shape[1:]).to(test_set[0].device)
            x0 = torch.cat([sample(model, x, steps, method) for x in xT.split(200)])
            row(f"{name}, {method}", steps, x0, begun)


def classify(model, images, labels):
    """Bayes' rule with ten equally likely classes: the y of the highest log p_t(x_t given y), at
    log-SNR -0.3. With less noise a digit under a wrong label is like nothing seen in training."""
    t = (2 * (model.schedule.alpha / model.schedule.sigma).log() + 0.3).abs().argmin().item()

    def most_likely(k):
        xt = model.add_noise(to_x0(k), t, torch.randn(k.shape, device=k.device))
        return torch.stack([given(model, torch.full((len(k),), y, device=k.device)).log_prob(xt, t)
                            for y in range(CLASSES)]).argmax(0)

    right = (batches(most_likely, images) == labels.cpu()).double().mean()
    print(f"class of the highest log p_t(x_t given class), t = {t}, ten passes: {100 * right:.1f} %"
          f" of {len(images)} images right", flush=True)


# ---------------------------------------------------------------------------------------- figures


def picture(ax, x0, title):
    """Images (rows, columns, 1, H, W) as one, black -1 to white 1."""
    x0 = F.pad(x0[:, :, 0], (0, 1, 0, 1), value=-1)                  # a pixel between neighbours
    x0 = x0.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)[:-1, :-1]
    ax.imshow(x0.cpu().numpy(), cmap="gray", vmin=-1, vmax=1)
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def show_samples(models, images, path):
    """A picture: real digits, and each model's from the same noise, free and class by class."""
    noise = torch.randn(100, *images.shape[1:], device=images.device)
    y = torch.arange(CLASSES, device=images.device).repeat_interleave(10)
    fig, axes = plt.subplots(1, 1 + 2 * len(models), figsize=(3 + 6 * len(models), 3.3),
                             layout="constrained")
    picture(axes[0], to_x0(images[:100]).unflatten(0, (10, -1)), "real digits")
    seed = torch.initial_seed() + 1          # for the noise of the steps; not that of `noise` again
    for pair, (name, model) in zip((axes[1:3], axes[3:]), models.items()):
        for ax, one, title in zip(pair, (model, given(model, y, 1.0)), ("", ", a class a row")):
            torch.manual_seed(seed)
            x0 = sample(one, noise, model.T, "ddpm").clamp(-1, 1)
            picture(ax, x0.unflatten(0, (10, 10)), f"{name}{title}")
    fig.savefig(path, dpi=100)


@torch.no_grad()
def show_levels(model, image, path):
    """A picture of what the classifier sees of one digit at six levels."""
    every = torch.arange(model.T + 2, device=image.device)[None]
    fig, axes = plt.subplots(4, 6, figsize=(9, 5.6), layout="constrained",
                             height_ratios=[1, 0.6, 1, 1])
    for column, share in zip(axes.T, (0.15, 0.4, 0.55, 0.7, 0.85, 1.0)):
        x0, t = to_x0(image), max(1, round(share * model.T))
        eps = torch.randn_like(x0)
        xt = model.add_noise(x0, t, eps)
        picture(column[0], (xt / 2)[None], f"x_t, true level t = {t}")
        column[1].plot(model.log_ratio(xt, every)[0].softmax(0).cpu())
        column[1].axvline(t, color="grey", linestyle=":")
        column[1].set(yticks=[], xlabel="level", ylim=(0, None))
        column[1].set_title("p(level given x_t)", fontsize=9)
        off = (model.predict_noise(xt, t) - eps).abs()
        picture(column[2], off[None] - 1, "error |eps_hat - eps|")
        picture(column[3], model.denoise(xt, t)[None], "denoised: x0_hat")
    fig.savefig(path, dpi=100)


@torch.no_grad()
def show_errors(models, images, train_images, path):
    """The paper's figure 4: the MSE of eps_hat at each level, CDM beside DDM, and a picture of
    both beside the best linear denoiser."""
    x0, T, schedule = to_x0(images), models["CDM"].T, models["CDM"].schedule
    levels, eps, error = range(1, T + 1, max(1, T // 32)), torch.randn_like(x0), {}
    log_snr = 2 * (schedule.alpha / schedule.sigma).log()[list(levels)]
    linear = wiener_error(train_images, schedule)[list(levels)]
    fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, model in models.items():
        error[name] = torch.tensor([F.mse_loss(model.predict_noise(model.add_noise(x0, t, eps), t),
                                               eps) for t in levels]).double()
        print(f"{name}: MSE at worst {(error[name] / linear).max():.3f} of the best linear one's")
        ax.plot(log_snr, error[name] / linear, "-" if name == "CDM" else "--", label=name)
    ratio = error["CDM"] / error["DDM"]
    print(f"MSE of eps_hat, CDM / DDM: mean {ratio.mean():.3f}, at worst {ratio.max():.3f}")
    ax.set(xlabel="log-SNR (left: noise)", title="MSE of eps_hat / the best linear denoiser's")
    ax.axhline(1, color="grey", linewidth=0.5)
    ax.legend()
    fig.savefig(path, dpi=100)


# ------------------------------------------------------------------------------------------- main


def benchmark(model, ddm, fine, images):
    """Print what the work of a CDM takes, and beside it a DDM's, or other ways to a likelihood."""
    x0, k, finer = to_x0(images), images[:10], refined(model, fine, images)

    def step(m, *window):
        """Loss and gradients of a batch, compiled on a GPU."""
        fast = torch.compile(m.loss_at, dynamic=False, disable=not x0.is_cuda)
        return lambda: fast(*m.draw(x0, *window)).total.backward()

    def ms(work):
        timer = Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads())
        return 1000 * timer.blocked_autorange(min_run_time=1).median

    bits = lambda *by, **options: lambda: bits_per_dim(model, k, *by, **options)
    draw = lambda m: lambda: sample(m, torch.randn_like(x0[:10]), m.T)
    mine, one_pass = step(model, WINDOW), bits()
    print("\n| a CDM's | ms | beside | ms | ratio |\n| --- | --- | --- | --- | --- |")
    for name, work, beside, other in (
            (f"training step of {len(x0)}", mine, "DDM", step(ddm)),
            ("training step", mine, f"at T = {finer.T}, not {model.T}", step(finer, WINDOW)),
            (f"10 samples, {model.T} steps", draw(model), "DDM", draw(ddm)),
            ("10 likelihoods", one_pass, "ELBO", bits(elbo, draws=model.T)),
            ("10 likelihoods", one_pass, "ODE", bits(ode_log_prob, probes=1))):
        a, b = ms(work), ms(other)
        print(f"| {name} | {a:.1f} | {beside} | {b:.1f} | {b / a:.3g} |", flush=True)


def at_least(least, multiple=1):
    """A parser of whole numbers that refuses those that mean nothing."""
    def parse(text):
        if not least <= int(text) < 2 ** 31 or int(text) % multiple:
            raise argparse.ArgumentTypeError(f"must be at least {least}" + (
                f", a multiple of {multiple}" if multiple > 1 else ""))
        return int(text)
    parse.__name__ = "whole number"                                      # so argparse calls it
    return parse


def arguments():
    """The command line, with the defaults that --quick, --weights and the device give."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--model", choices=("cdm", "ddm"), help="ddm: told the level, to compare (cdm)")
    add("--dataset", choices=("mnist", "digits"), default="mnist", help="digits: 8x8, offline")
    add("--data", default="data/mnist", help="folder of the four MNIST files (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="cuda if there, else cpu")
    add("--quick", action="store_true", help="a small run: minutes on two CPU cores")
    add("--out", type=Path, help="folder for results (runs/ and what the run is)")
    add("--weights", type=Path, help="measure this checkpoint, no training")
    add("--beside", type=Path, help="checkpoint of a DDM to compare a CDM with, or the reverse")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--benchmark", action="store_true", help="also time the two, needs --beside")
    add("--split", choices=("validation", "test"), default="test", help="images to measure on")
    add("--images", type=at_least(100), help="how many of them (10000, quick 500)")
    add("--samples", type=at_least(2), help="for Fréchet (GPU 10000, CPU 1000, quick 500)")
    add("--fine", type=at_least(2), help="levels for log Z (2048, quick 512)")
    add("--steps", type=at_least(1), help="training steps (20000, quick 500)")
    add("--batch", type=at_least(1), help="images a step (GPU 256, else 64)")
    add("--width", type=at_least(8, 8), help="channels, a multiple of 8 (GPU 64, else 32)")
    add("--T", type=at_least(2), help="noise levels (64; with --weights: as many as you like)")
    add("--lr", type=float, help="peak learning rate (0.002, quick 0.004)")
    add("--seed", type=at_least(0), default=0)
    args = p.parse_args()
    ignored = [n for n in ("model", "resume", "steps", "batch", "width", "lr") if getattr(args, n)]
    if args.weights and ignored:
        p.error(f"--weights measures and does not train: no --{', --'.join(ignored)}")
    if args.benchmark and not args.beside:
        p.error("--benchmark compares two models: name one with --beside")
    if args.device in ("cuda", "mps") and not getattr(torch, args.device).is_available():
        p.error(f"--device {args.device}: torch {torch.__version__} sees none; try --device cpu")
    gpu = args.device in ("auto", "cuda") and torch.cuda.is_available()
    args.device = torch.device(("cuda" if gpu else "cpu") if args.device == "auto" else args.device)
    run = "measured" if args.weights else f"{args.dataset}_{args.model or 'cdm'}"
    defaults = dict(model="cdm", images=10000, samples=10000 if gpu else 1000, fine=2048, lr=0.002,
                    steps=20000, batch=256 if gpu else 64, width=64 if gpu else 32)
    if args.quick:
        run = f"{run}_quick"
        defaults |= dict(images=500, samples=500, fine=512, lr=0.004, steps=500, batch=64, width=32)
    for name, value in (defaults | dict(out=Path("runs", run))).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 0 < args.lr < math.inf:
        p.error("--lr must be positive")
    return args


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    train_set, validation, test = load_data(args.dataset, args.data)
    images = train_set[0]
    print(f"torch {torch.__version__} on {args.device}; {len(images)} training images of "
          f"{images.shape[2]}x{images.shape[3]} pixels", flush=True)
    setting = images, args.dataset, args.device, args.T
    beside = args.beside and load_model(args.beside, *setting)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.weights:
            model = load_model(args.weights, *setting)
        else:
            names = "model", "dataset", "width", "steps", "batch", "lr", "seed"
            config = {name: getattr(args, name) for name in names} | dict(T=args.T or 64)
            model = train(args, config, *train_set)
        models = {type(m).__name__: m for m in (model, beside) if m}
        if beside and (len(models) < 2 or beside.T != model.T):
            raise SystemExit("--beside compares one CDM with one DDM of as many levels")
        torch.manual_seed(args.seed)
        held_out = validation if args.split == "validation" else test
        on_device = ([v.to(args.device) for v in part] for part in (train_set, held_out))
        measure(args, models, *on_device)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped. If {args.out / 'model.pt'} is there, --resume goes on from it")
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"out of memory: a lower --batch or --width needs less ({error})")
    except OSError as error:
        raise SystemExit(f"the system says: {error}. Can --out {args.out} be written to?")


def measure(args, models, train_set, held_out):
    """One screen of tables, and the pictures of the run."""
    torch.backends.cudnn.allow_tf32 = False                          # numbers as on a CPU
    images, labels = (v[:args.images] for v in held_out)
    show_samples(models, images, args.out / "samples.png")
    for name, model in models.items():
        print(f"\n{name}: {sum(p.numel() for p in model.parameters())} weights, T = {model.T}")
        likelihood(model, images, args.fine)
    if "CDM" in models:
        show_levels(models["CDM"], images[:1], args.out / "levels.png")
        classify(models["CDM"], images[:1000], labels[:1000])
    if len(models) == 2:
        show_errors(models, images[:500], train_set[0], args.out / "errors.png")
    quality(models, train_set, held_out, args.samples)
    if args.benchmark:
        benchmark(models["CDM"], models["DDM"], args.fine, train_set[0][:args.batch])
    print(f"pictures: {', '.join(str(path) for path in sorted(args.out.glob('*.png')))}")


if __name__ == "__main__":
    main()
