"""CDM on MNIST: train a noise-level classifier, draw digits, read likelihoods off its logits.

    python mnist.py --quick                             three minutes on two CPU cores
    python mnist.py --weights assets/mnist_cdm.pt --beside assets/mnist_ddm.pt
                                                        what is in the box, measured
    python mnist.py --device cuda                       the full run
    python mnist.py --dataset digits --quick            8x8 digits of scikit-learn, no download

Read it for a classifier that can be asked about one level at a time, for a DDM of the same parts
(--model ddm), and for how bits/dim of 8-bit images are measured and certified. Results go to
runs/: model.pt (checkpoint), weights.pt (small), log.csv, pictures. The method itself is in cdm.py.
Not here: distributed training, data augmentation.
"""

import argparse
import copy
import gzip
import hashlib
import math
import os
import time
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from cdm import CDM, DDM, annealed_log_z, bits_per_dim, log_snr_schedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen: no screen is needed)

# ------------------------------------------------------------------------------------------- data

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
           "https://storage.googleapis.com/cvdf-datasets/mnist/")
FILES = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",  # MD5 of what is in the .gz
         "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
         "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
         "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}


def parse_idx(data, name, md5):
    """The array in the bytes of an IDX file. ValueError if they are not what they should be."""
    digest = hashlib.md5(data).hexdigest()
    if data[:3] != b"\0\0\x08" or digest != md5:
        raise ValueError(f"{name} is damaged: {len(data)} bytes with MD5 {digest}, not {md5}")
    axes = data[3]                                            # big-endian sizes, then the bytes
    shape = np.frombuffer(data, ">i4", axes, 4)
    return np.frombuffer(data, np.uint8, -1, 4 + 4 * axes).reshape(shape)


def read_or_download(folder, name, md5, mirrors=MIRRORS):
    """One IDX array from folder/name or folder/name.gz, else from the first mirror that answers.

    SystemExit, with what to do, if a file there is damaged or no mirror gives a good one."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            try:
                data = path.read_bytes()
                return parse_idx(gzip.decompress(data) if path.suffix == ".gz" else data, path, md5)
            except (EOFError, OSError, ValueError, zlib.error) as error:
                raise SystemExit(f"{path} cannot be used ({error}). Delete it to fetch it anew.")
    problems = []
    for mirror in mirrors:
        try:
            print(f"downloading {mirror}{name}.gz", flush=True)
            with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=30) as reply:
                packed = reply.read()
            array = parse_idx(gzip.decompress(packed), f"{mirror}{name}.gz", md5)
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"{name}.gz.part"
            part.write_bytes(packed)
            os.replace(part, folder / f"{name}.gz")               # all of it or nothing
            return array
        except (EOFError, HTTPException, OSError, ValueError, zlib.error) as error:
            problems.append(f"  {mirror}: {error}")
    raise SystemExit("\n".join([
        f"MNIST could not be downloaded ({name}.gz):", *problems,
        f"Put these four files, with or without .gz, into {folder}/ (or name another --data):",
        *(f"  {f}" for f in FILES), "or run offline with --dataset digits."]))


def load_data(dataset, folder):
    """(images, labels) of training, validation and test: uint8 (N, 1, H, W), long (N,)."""
    if dataset == "digits":                                       # 1797 digits of 8x8, grey 0 .. 16
        images, labels = load_digits().images, load_digits().target
        order = np.random.default_rng(0).permutation(len(images))
        images = np.rint(images[order] * 255 / 16).astype(np.uint8)
        arrays = images[:1500], labels[order][:1500], images[1500:], labels[order][1500:]
        held_out = 150
    else:
        arrays = [read_or_download(Path(folder), name, md5) for name, md5 in FILES.items()]
        held_out = 5000
    x, y, test, test_y = (torch.from_numpy(a.copy()) for a in arrays)
    x, test, y, test_y = x[:, None], test[:, None], y.long(), test_y.long()
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
    """A small U-Net, images (B, 1, H, W) and what it is told (B, 32) -> features (B, width, H/2,
    W/2). Half of the resolution sees strokes, a quarter of it the whole digit. H and W are
    multiples of 4."""

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
    """Features -> log p_t(x) / N(x; 0, I) of pixels x (B, d) that are independent given features.

    A clean pixel is one of five shades that MNIST is full of, or from one of three Gaussians on the
    lattice of grey values. Noise turns a shade c into N(alpha c, sigma^2), and a Gaussian N(m, v)
    into N(alpha m, alpha^2 v + sigma^2) times the comb. As long as the features say nothing, a
    pixel's weights are its own: how often it has which shade in the training images."""

    EXACT, GAUSSIANS = (0, 252, 253, 254, 255), 3

    def __init__(self, images, width):
        super().__init__()
        n, g = len(self.EXACT), self.GAUSSIANS
        self.read = nn.Conv2d(width, 4 * (n + 3 * g), 3, padding=1)    # numbers of each of 2x2 pixels
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


class Network(nn.Module):
    """What the CDM's network and the DDM's have in common: parts, levels and labels. Levels enter
    by their noise alone, so that a trained network serves any number of them."""

    def __init__(self, images, schedule, width):
        super().__init__()
        self.trunk, self.shades = Trunk(images.shape, width), Shades(images, width)
        self.level, self.label = nn.Linear(32, width), nn.Embedding(CLASSES + 1, 32)
        nn.init.zeros_(self.label.weight)
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        alpha, sigma = (v.float() for v in schedule)
        log_snr = 2 * (alpha.clamp(min=1e-9) / sigma.clamp(min=1e-9)).log()
        place = ((CLEANEST - log_snr) / (CLEANEST - NOISIEST)).clamp(0, 1)              # (T+2,)
        phase = place[:, None] * torch.arange(1, 17) * (math.pi / 2)
        self.register_buffer("waves", torch.cat([phase.sin(), phase.cos()], 1), persistent=False)
        self.register_buffer("alpha", alpha, persistent=False)    # level 0: a small width, not none
        self.register_buffer("sigma", torch.cat([sigma[1:2] / 3, sigma[1:]]), persistent=False)

    def class_of(self, x, y):
        """The labels y (B,), or none, as vectors (B, 32). ValueError if there is no such class."""
        if y is None:
            y = torch.full((len(x),), CLASSES, device=x.device)
        elif not self.training and not (0 <= y.min() and y.max() <= CLASSES):
            raise ValueError(f"labels must be in 0 .. {CLASSES - 1}, or {CLASSES} for any class")
        return self.label(y)

    def ask(self, features, x, t):
        """log p_t(x) / N(x; 0, I) of pixels x (B, d) at the level t asked about."""
        h = self.norm1(features + self.level(self.waves[t])[:, :, None, None])
        h = self.norm2(features + self.last(F.silu(h)))
        return self.shades(F.silu(h), x, self.alpha[t], self.sigma[t])


class DigitClassifier(Network):
    """The CDM's: digits x (B, 1, H, W) of unknown levels -> log p_t(x) / p_{T+1}(x), nats, at the
    levels t it is asked about, (B, n) -> (B, n).

    The paper's network computes all T+2 logits at once. This one is asked for those in need: the
    trunk, which does not know the question, reads x once; the last convolution and the shades are
    told t. With a constant for each level, smooth in log-SNR, as independent pixels are not all."""

    takes_levels = True

    def __init__(self, images, schedule, width):
        super().__init__(images, schedule, width)
        self.constant = nn.Linear(32, 1, bias=False)
        nn.init.zeros_(self.constant.weight)

    def forward(self, x, levels, y=None):
        n, t = levels.shape[1], levels.flatten()
        features = self.trunk(x, self.class_of(x, y)).repeat_interleave(n, 0)
        ratio = self.ask(features, x.flatten(1).repeat_interleave(n, 0), t)
        constant = 10 * self.constant(self.waves[t] - self.waves[-1])[:, 0]      # none at level T+1
        return (ratio + constant).view(levels.shape)


class DigitDenoiser(Network):
    """The DDM's: every block is told the level t (B,) of x -> eps_hat like x, which is
    -sigma_t grad log p_t of the pixels' shades, held fixed. Wider by sqrt(2), so that it costs as
    much as the classifier's forward and backward pass."""

    def __init__(self, images, schedule, width):
        super().__init__(images, schedule, 4 * round(math.sqrt(2) * width / 4))

    def forward(self, x, t, y=None):
        features, pixels = self.trunk(x, self.waves[t] + self.class_of(x, y)), x.flatten(1)
        ratio, pull = torch.func.vjp(lambda pixels: self.ask(features, pixels, t), pixels)
        eps_hat = self.sigma[t][:, None] * (pixels - pull(torch.ones_like(ratio))[0])
        return eps_hat.view_as(x)


# --------------------------------------------------------------------------------------- training


def wiener_error(images, schedule):
    """The MSE of eps_hat of the best linear denoiser at every level, (T+2,), from the covariance of
    the images: alpha^2 / sigma^2 times the mean over its eigenvalues s of s sigma^2 / (alpha^2 s +
    sigma^2) (Wiener 1949). Level 0 has that of level 1, T+1 that of T."""
    s = torch.linalg.eigvalsh(to_x0(images).flatten(1).T.double().cov()).clamp(min=0)
    alpha, sigma = (v[1:-1, None] for v in schedule)
    error = (alpha ** 2 * s / (alpha ** 2 * s + sigma ** 2)).mean(1)
    return torch.cat([error[:1], error, error[-1:]])


def pick_device(name):
    """auto: cuda if there, else cpu. A device that is asked for and not there is an error."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise SystemExit(f"--device {name}: torch {torch.__version__} sees none; try --device cpu")
    return torch.device(name)


def build(config, images):
    """The model that a configuration stands for; images give size and the pixels' own shades."""
    schedule = log_snr_schedule(config["T"], CLEANEST, NOISIEST)
    family, network = {"cdm": (CDM, DigitClassifier), "ddm": (DDM, DigitDenoiser)}[config["model"]]
    return family(network(images, schedule, config["width"]), schedule)


def save(path, **content):
    """Plain tensors and numbers, written beside the old file first: a good one is always there."""
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)


def load(path):
    """The content of a checkpoint. SystemExit if it is missing, damaged or of another kind."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["ema"].items(), [content["config"][k] for k in ("model", "dataset", "T", "width")]
        return content
    except Exception as error:
        problem = (str(error) or "no more is known").splitlines()[0]
        problem = problem.split("(1)")[0]                # torch goes on to advise an unsafe load
        raise SystemExit(f"{path} is no usable checkpoint ({type(error).__name__}: {problem})")


def load_model(path, dataset, images, device, T=None):
    """The averaged model of a checkpoint, ready to measure, with its own number of levels or T."""
    kept = load(path)
    config = kept["config"] | dict(T=T or kept["config"]["T"])
    if config["dataset"] != dataset:
        raise SystemExit(f"{path} was trained on --dataset {config['dataset']}")
    try:
        model = build(config, images)
        model.load_state_dict(kept["ema"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} holds no network that this program can build: {error}")
    if not all(v.isfinite().all() for v in kept["ema"].values()):
        raise SystemExit(f"{path} holds weights that are not finite")
    return model.to(device).eval()


def compiled(function, *example):
    """The function compiled; eager, with the same results, and said so, if that fails."""
    print("compiling the loss (one to two minutes)", flush=True)
    try:
        fast = torch.compile(function, fullgraph=True)
        fast(*example).total.backward()                              # its gradients are thrown away
        return fast
    except Exception as error:
        print(f"compiling failed ({type(error).__name__}); going on without: slower, same results")
        return function


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


W_CE, WINDOW, DROPPED = 0.02, 2, 0.5                      # DROPPED: share of rows without their label


def start(args, config, model, ema, optimiser):
    """Where training starts, 0 or the step of the checkpoint that --resume names, after making sure
    that no longer run is lost. Returns the step."""
    path = args.out / "model.pt"
    if not args.resume:
        if path.exists() and load(path).get("step", 0) > args.steps:
            raise SystemExit(f"{args.out} holds a longer run: --resume it, or name another --out")
        return 0
    kept = load(path)
    if kept["config"] != config or "optimiser" not in kept:
        raise SystemExit(f"--resume: {path} was made with {kept['config']}, not {config}")
    model.load_state_dict(kept["model"])
    ema.load_state_dict(kept["ema"])
    optimiser.load_state_dict(kept["optimiser"])
    return kept["step"]


def train(args, config, images, labels, device):
    """Train; return the model with averaged weights (EMA). Checkpoint and log go to args.out."""
    path, steps, batch = args.out / "model.pt", args.steps, args.batch
    model = build(config, images).to(device)
    ema = copy.deepcopy(model)
    optimiser = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    first = start(args, config, model, ema, optimiser)
    wiener = wiener_error(images, model.schedule)     # each level's error counts relative to this
    weights = dict(w_mse=(wiener.mean() / wiener).float().to(device))
    weights |= dict(w_ce=W_CE) if args.model == "cdm" else {}
    window = (WINDOW,) if args.model == "cdm" else ()
    loss_at = lambda y, *drawn: model.given(y).loss_at(*drawn, **weights)
    images, labels = images.to(device), labels.to(device)         # the whole data set, one tensor
    if not args.no_compile and device.type == "cuda":
        loss_at = compiled(loss_at, labels[:batch], *model.draw(to_x0(images[:batch]), *window))
    log = open(args.out / "log.csv", "a" if first else "w")
    log.write("" if first else "step,ce,mse,ms_per_step\n")
    every, begun = max(1, min(100, steps // 20)), time.time()

    def checkpoint(step):
        save(path, config=config, step=step, model=model.state_dict(), ema=ema.state_dict(),
             optimiser=optimiser.state_dict())

    for step in range(first + 1, steps + 1):
        torch.manual_seed(args.seed * 1_000_003 + step)     # a step depends on its number alone, so
        rows = torch.randint(len(images), (batch,), device=device)        # a resumed run repeats it
        dropped = torch.rand(batch, device=device) < DROPPED           # one network, p(x), p(x|y)
        for group in optimiser.param_groups:                       # warm-up, then half a cosine
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = args.lr * min(step / (0.03 * steps + 1), cosine)
        optimiser.zero_grad()
        loss = loss_at(torch.where(dropped, CLASSES, labels[rows]),
                       *model.draw(to_x0(images[rows]), *window))
        loss.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        if step % every == 0 or step == steps:
            total, ce, mse, norm = (v.item() for v in (loss.total, loss.ce, loss.mse, norm))
            if not math.isfinite(total + norm):
                raise SystemExit(f"training diverged: loss {total} at step {step}. "
                                 + (f"{path} is the last good checkpoint. " if path.exists() else "")
                                 + "Try a lower --lr")
            ms = 1000 * (time.time() - begun) / (step - first)     # .item() waited for the GPU
            print(f"step {step:6d} of {steps}   CE {ce:6.3f} nats   MSE {mse:.4f}   {ms:5.0f} "
                  f"ms/step   {clock((steps - step) * ms / 1000)} left", flush=True)
            log.write(f"{step},{ce:.5f},{mse:.6f},{ms:.1f}\n")
            log.flush()
            checkpoint(step - 1)                                   # weights that just proved good
        optimiser.step()
        with torch.no_grad():                         # averages about the last tenth, or 1000 steps
            blend = max(0.001, 9 / (9 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), blend)
    log.close()
    checkpoint(steps)
    half = {name: v.half() for name, v in ema.state_dict().items()}
    save(args.out / "weights.pt", config=config, ema=half)                 # small, to give away
    return ema


# -------------------------------------------------------------------------------------- measuring


def batches(function, images):
    """function of a hundred images at a time, (B,), as one tensor; ValueError if not all finite."""
    values = torch.cat([function(k) for k in images.split(100)]).double().cpu()
    if not values.isfinite().all():
        raise SystemExit(f"{len(values) - values.isfinite().sum()} of {len(values)} results are "
                         "not finite: these weights cannot be measured")
    return values


@torch.no_grad()
def likelihood(model, finer, images):
    """Print bits/dim of 8-bit images by the ELBO and, of a CDM, by one forward pass, certified.

    What can make one pass wrong is its normaliser log Z alone: `finer`, the same network with more
    levels, measures it by annealing. ELBO and ODE stand beside it, as differences image by image."""
    to_bits = 1 / (images[0].numel() * math.log(2))
    one, few = isinstance(model, CDM), images[:500]
    print(f"\n| {'bits/dim':34s} | images |   mean |   s.e. | seconds |\n"
          f"| {'-' * 34} | ------ | ------ | ------ | ------- |")

    def row(name, values, begun):
        mean, error = values.mean().item(), values.std().item() / len(values) ** 0.5
        print(f"| {name:34s} | {len(values):6d} | {mean:6.3f} | {error:6.3f} | "
              f"{time.time() - begun:7.1f} |", flush=True)
        return mean, error

    begun = time.time()
    if one:
        bits = batches(lambda k: bits_per_dim(model, k), images)
        mean, error = row("one forward pass", bits, begun)
        begun = time.time()
    bound = batches(lambda k: bits_per_dim(model, k, "elbo", draws=model.T), few)
    row("ELBO, an upper bound", bound, begun)
    if not one:
        return
    row("the same less one pass, paired", bound - bits[:500], begun)
    begun, few = time.time(), images[:40]
    flow = batches(lambda k: bits_per_dim(model, k, "ode", probes=1), few)
    row("probability-flow ODE less one pass", flow - bits[:40], begun)
    begun, x0 = time.time(), to_x0(few)
    x1 = finer.add_noise(x0, 1, torch.randn_like(x0))
    log_z, off, below, above = (v * to_bits for v in annealed_log_z(finer, x1))
    if not math.isfinite(log_z + off):
        raise SystemExit(f"log Z is {log_z} +- {off}: these weights cannot be measured")
    print(f"| {'log Z, by annealing':34s} | {2 * len(few):6d} | {log_z:6.3f} | {off:6.3f} | "
          f"{time.time() - begun:7.1f} |\n\nlog Z from below and above: {below:.3f}, {above:.3f} "
          f"({finer.T} levels). One pass + log Z: {mean + log_z:.3f} +- "
          f"{math.hypot(error, off):.3f} bits/dim.")
    print("Certified: " * (off < 0.003) + verdict(log_z, off), flush=True)


def verdict(log_z, off):
    """In words, whether a one-pass value can be believed whose density integrates to exp(log_z)."""
    if off >= 0.003:
        return "Not certified: log Z is known too badly; more levels (--fine) will tell."
    if abs(log_z) <= 0.01 + 2 * off:
        return "the density integrates to 1 within 0.01 bits/dim, so one pass can be believed."
    return f"one pass is {abs(log_z):.3f} too {'low' if log_z > 0 else 'high'}; quote it + log Z."


class FeatureNet(nn.Module):
    """A small classifier of digits, trained on the spot for its 64 features: not Inception's."""

    def __init__(self):
        super().__init__()
        stages = [nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.SiLU())
                  for a, b, stride in ((1, 32, 2), (32, 64, 2), (64, 64, 2))]
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.LazyLinear(64), nn.SiLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x0):
        return self.head(self.body(x0))

    def fit(self, images, labels, steps=600):
        self(to_x0(images[:2]))                                 # the lazy layer learns its size
        optimiser = torch.optim.Adam(self.parameters(), 2e-3)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
            rows = torch.randint(len(images), (128,), device=images.device)
            loss = F.cross_entropy(self(to_x0(images[rows])), labels[rows])
            optimiser.zero_grad(), loss.backward(), optimiser.step()
        return self.eval()

    @torch.no_grad()
    def judge(self, x0):
        """Features (N, 64), and the share of images (N, ..) it is at least 90 % sure of."""
        features = torch.cat([self.body(part) for part in x0.split(500)])
        sure = self.head(features).softmax(1).amax(1) >= 0.9
        return features.cpu().double(), sure.float().mean().item()


def frechet(a, b):
    """Distance of two Gaussians fitted to features (N, 64) (Heusel et al. 2017)."""
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
            - 2 * cross).item()


def quality(models, train_set, test_set, n):
    """Print how far n samples of each model and sampler are from the test digits."""
    net = FeatureNet().to(test_set[0].device).fit(*train_set)
    real, sure = net.judge(to_x0(test_set[0]))
    floor, _ = net.judge(to_x0(train_set[0][torch.randperm(len(train_set[0]))[:n]]))
    print(f"\n| {n} samples | steps | Fréchet distance | recognised | ms each |\n"
          "| ------------ | ----- | ---------------- | ---------- | ------- |\n"
          f"| {'real digits':12s} |       | {frechet(floor, real):16.2f} | {100 * sure:8.1f} % | "
          "        |")
    for name, model in models.items():
        for method, steps in (("ddim", min(50, model.T)), ("ddpm", model.T)):
            begun = time.time()
            x0 = [model.sample((min(200, n - i), *test_set[0].shape[1:]), steps, method)
                  for i in range(0, n, 200)]
            ms = 1000 * (time.time() - begun) / n
            features, sure = net.judge(torch.cat(x0))
            print(f"| {name + ', ' + method:12s} | {steps:5d} | {frechet(features, real):16.2f} | "
                  f"{100 * sure:8.1f} % | {ms:7.1f} |", flush=True)


def picture(ax, x0, title):
    """Images (rows, columns, 1, H, W) as one, black -1 to white 1."""
    ax.imshow(x0[:, :, 0].permute(0, 2, 1, 3).flatten(0, 1).flatten(1).cpu().numpy(), cmap="gray",
              vmin=-1, vmax=1)
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def finish(fig, path):
    fig.savefig(path, dpi=100)
    plt.close(fig)
    print(f"figure: {path}", flush=True)


@torch.no_grad()
def show_samples(models, images, path):
    """A picture: real digits, and each model's from the same noise, free and class by class."""
    noise = torch.randn(100, *images.shape[1:], device=images.device)
    y = torch.arange(CLASSES, device=images.device).repeat_interleave(10)
    fig, axes = plt.subplots(1, 1 + 2 * len(models), layout="constrained",
                             figsize=(3 + 6 * len(models), 3.4))
    picture(axes[0], to_x0(images[:100]).unflatten(0, (10, -1)), "real digits")
    for i, (name, model) in enumerate(models.items()):
        for ax, given, title in ((axes[2 * i + 1], model, "drawn"),
                                 (axes[2 * i + 2], model.given(y, 1.0), "one class a row")):
            x0 = given.sample(None, model.T, "ddpm", xT=noise).clamp(-1, 1)
            picture(ax, x0.unflatten(0, (10, 10)), f"{name}: {title}")
    finish(fig, path)


@torch.no_grad()
def show_levels(model, image, path):
    """A picture of what the classifier sees: x_t, its posterior over levels, how far the noise it
    finds is off, and the denoised digit."""
    levels = [max(1, round(share * model.T)) for share in (0.15, 0.4, 0.55, 0.7, 0.85, 1.0)]
    every = torch.arange(model.T + 2, device=image.device)[None]
    fig, axes = plt.subplots(4, len(levels), figsize=(9, 5.6), layout="constrained",
                             height_ratios=[1, 0.6, 1, 1])
    for column, t in zip(axes.T, levels):
        x0 = to_x0(image)
        eps = torch.randn_like(x0)
        xt = model.add_noise(x0, t, eps)
        off = (model.predict_noise(xt, t) - eps).abs()
        picture(column[0], (xt / 2)[None], f"x_t, true level t = {t}")
        column[1].plot(model.log_ratio(xt, every)[0].softmax(0).cpu())
        column[1].axvline(t, color="grey", linestyle=":")
        column[1].set(yticks=[], ylim=(0, None), xlabel="level")
        column[1].set_title("p(level given x_t)", fontsize=9)
        picture(column[2], off[None] - 1, "error |eps_hat - eps|")
        picture(column[3], model.denoise(xt, t)[None], "denoised: x0_hat")
    finish(fig, path)


@torch.no_grad()
def show_errors(models, images, train_images, path):
    """The paper's figures 4 and 5: the error at each level beside the other model's and the best
    linear denoiser's, and the denoised pure noise: little can be told of it but the data mean."""
    data_mean, x0 = to_x0(train_images).mean(0).to(images.device), to_x0(images)
    schedule, eps = models["CDM"].schedule, torch.randn_like(x0)
    levels = range(1, models["CDM"].T + 1, max(1, models["CDM"].T // 32))
    log_snr = [2 * math.log(schedule.alpha[t] / schedule.sigma[t]) for t in levels]
    wiener = wiener_error(train_images, schedule)[list(levels)].numpy()
    fig = plt.figure(figsize=(11, 3.2), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[2, 1.1])
    (ratio, linear), panels = left.subplots(1, 2), right.subplots(1 + len(models), 1)
    picture(panels[0], data_mean[None, None], "mean of the data")
    found = {}
    for panel, (name, model) in zip(panels[1:], models.items()):
        found[name] = np.array([F.mse_loss(model.predict_noise(
            model.add_noise(x0, t, eps), t), eps).item() for t in levels])
        x0_hat = model.denoise(eps[:6], model.T)
        picture(panel, x0_hat[None], f"{name}'s x0_hat of pure noise")
        off = F.mse_loss(x0_hat, data_mean.expand_as(x0_hat)) ** 0.5
        worst = (found[name] / wiener).max()
        print(f"{name}: MSE of eps_hat {found[name].mean():.4f}, at worst {worst:.3f} of the best "
              f"linear denoiser's; denoised pure noise is {off:.3f} (rms) from the data mean")
        linear.plot(log_snr, found[name] / wiener, label=name)
    both = found["CDM"] / found["DDM"]
    print(f"MSE CDM / DDM: mean of levels {both.mean():.3f}, worst {both.max():.3f}")
    ratio.plot(log_snr, both, color="black")
    ratio.set_title("MSE of eps_hat, CDM / DDM (below 1: CDM better)", fontsize=9)
    linear.set_title("MSE / that of the best linear denoiser", fontsize=9)
    linear.legend()
    for ax in (ratio, linear):
        ax.axhline(1, color="grey", linewidth=0.5)
        ax.set_xlabel("log-SNR (left: noise)")
    finish(fig, path)


@torch.no_grad()
def classify(model, images, labels):
    """Bayes' rule with ten equally likely classes: the y of the highest log p_t(x_t given y).

    t: log-SNR -0.3, which was best on validation digits. Where noise is low, a digit under a wrong
    label is like nothing seen in training; where it is high, nothing is left to tell."""
    t = (2 * (model.schedule.alpha / model.schedule.sigma).log() + 0.3).abs().argmin().item()

    def most_likely(k):
        xt = model.add_noise(to_x0(k), t, torch.randn_like(to_x0(k)))
        classes = torch.arange(CLASSES, device=k.device)[:, None].expand(-1, len(k))
        return torch.stack([model.given(y).log_prob(xt, t) for y in classes]).argmax(0)

    right = (batches(most_likely, images) == labels.cpu()).double()
    print(f"class of the highest log p_t(x_t given y), t = {t}, ten passes: {100 * right.mean():.1f} "
          f"% of {len(images)} images right", flush=True)


# -------------------------------------------------------------------------------------- benchmark


def milliseconds(work, device, repeats=7):
    """Median time of work(), after two calls to warm up."""
    times = []
    for _ in range(2 + repeats):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
    return np.median(times[2:])


def benchmark(model, images, args):
    """Print what the work of a CDM costs, and the same of a DDM or of other ways to a likelihood."""
    batch, device = args.batch, args.device
    x0, k, width = to_x0(images[:batch]).to(device), images[:40].to(device), args.width
    make = lambda family, T: build(dict(model=family, T=T, width=width), images).to(device)
    ddm, finer = make("ddm", model.T), make("cdm", 1000)

    def step(m, *window):
        """Loss and gradients of a batch, compiled or not; no optimiser."""
        loss_at = m.loss_at if args.no_compile else compiled(m.loss_at, *m.draw(x0, *window))
        return lambda: loss_at(*m.draw(x0, *window)).total.backward()

    def row(what, work, beside, other):
        mine, its = milliseconds(work, device), milliseconds(other, device)
        print(f"| {what:22s} | {mine:8.1f} | {beside:22s} | {its:8.1f} | {its / mine:7.3g} |",
              flush=True)

    print(f"batch {batch}, T = {model.T}, width {width}; likelihoods and samples of {len(k)} images")
    mine = step(model, WINDOW)
    others = step(ddm), step(finer, WINDOW), step(model)
    print(f"\n| {'a CDM takes':22s} | {'ms':8s} | {'beside':22s} | {'ms':8s} | ratio   |\n"
          f"| {'-' * 22} | -------- | {'-' * 22} | -------- | ------- |")
    for name, other in zip(("a DDM's", "the same at T = 1000", "all levels, no window"), others):
        row("training step", mine, name, other)
    for method, steps in (("ddim", min(50, model.T)), ("ddpm", model.T)):
        drawn = [lambda m=m: m.sample(k.shape, steps, method) for m in (model, ddm)]
        row(f"sampling, {method}", drawn[0], f"a DDM's, {steps} steps", drawn[1])
    one_pass = lambda: bits_per_dim(model, k)
    row("likelihood, one pass", one_pass, f"ELBO, {model.T} levels",
        lambda: bits_per_dim(model, k, "elbo", draws=model.T))
    row("likelihood, one pass", one_pass, "ODE, one probe",
        lambda: bits_per_dim(model, k, "ode", probes=1))


# ------------------------------------------------------------------------------------------- main


def arguments():
    """The command line, with the defaults that --quick, --weights and the device give."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--model", choices=("cdm", "ddm"), help="ddm: told the level, to compare (cdm)")
    add("--dataset", choices=("mnist", "digits"), default="mnist", help="digits: 8x8, offline")
    add("--data", default="data/mnist", help="folder of the four MNIST files (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto: cuda, else cpu")
    add("--quick", action="store_true", help="a small run: minutes on two CPU cores")
    add("--out", type=Path, help="folder for results (runs/ and what the run is)")
    add("--weights", type=Path, help="measure this checkpoint, no training")
    add("--beside", type=Path, help="checkpoint of a DDM to compare a CDM with, or the reverse")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--benchmark", action="store_true", help="time a CDM beside a DDM, nothing else")
    add("--split", choices=("validation", "test"), default="test", help="images to measure on")
    add("--images", type=int, help="how many of them (10000, quick 500)")
    add("--samples", type=int, help="samples for the Fréchet distance (GPU 10000, CPU 1000,\n"
        "quick 500; 0: none)")
    add("--fine", type=int, help="levels for log Z (1024, quick 256)")
    add("--steps", type=int, help="training steps (20000, quick 500)")
    add("--batch", type=int, help="images per step (GPU 256, else 64)")
    add("--width", type=int, help="channels, a multiple of 8 (GPU 64, else 32)")
    add("--T", type=int, help="noise levels (64; with --weights: as many as you like)")
    add("--lr", type=float, help="peak learning rate (0.002, quick 0.004)")
    add("--no-compile", action="store_true", help="do not compile the loss")
    add("--seed", type=int, default=0)
    args = p.parse_args()
    args.device, name = pick_device(args.device), f"{args.dataset}_{args.model or 'cdm'}"
    trains = "model", "steps", "batch", "width", "lr", "resume", "no_compile"
    ignored = [f"--{n.replace('_', '-')}" for n in trains if getattr(args, n) and args.weights]
    if ignored or args.weights and args.benchmark:
        p.error(f"--weights measures: no {', '.join(ignored) or '--benchmark'}")
    gpu = args.device.type == "cuda"
    full = dict(model="cdm", images=10000, samples=10000 if gpu else 1000, fine=1024, steps=20000,
                batch=256 if gpu else 64, width=64 if gpu else 32, lr=0.002,
                out=Path("runs") / ("measured" if args.weights else name))
    quick = full | dict(images=500, samples=500, fine=256, steps=500, batch=64, width=32, lr=0.004,
                        out=Path("runs") / f"{name}_quick")
    for name, value in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    bounds = dict(images=2, samples=0, fine=2, steps=1, batch=1, width=8, T=2, seed=0)
    for name, least in bounds.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            p.error(f"--{name} must be at least {least}")
    if args.samples == 1 or args.width % 8 or not 0 < args.lr < math.inf or args.seed >= 2 ** 31:
        p.error("--samples must not be 1, --width a multiple of 8, --lr positive, --seed < 2^31")
    return args


def main():
    args = arguments()
    device = args.device
    torch.manual_seed(args.seed)
    train_set, validation, test = load_data(args.dataset, args.data)
    images = train_set[0]
    print(f"torch {torch.__version__} on {device}; {len(images)} training images of "
          f"{images.shape[2]}x{images.shape[3]} pixels")
    config = {n: getattr(args, n) for n in "model dataset width steps batch lr seed".split()}
    config["T"] = args.T or 64
    if args.benchmark:
        return benchmark(build(config, images).to(device), images, args)
    beside = args.beside and load_model(args.beside, args.dataset, images, device, args.T)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / ".part").touch(), (args.out / ".part").unlink()
    except OSError as error:
        raise SystemExit(f"--out {args.out} cannot be written to: {error}")
    if args.weights:
        model = load_model(args.weights, args.dataset, images, device, args.T)
    else:
        model = train(args, config, *train_set, device).eval()
    models = {type(m).__name__: m for m in (model, beside) if m}
    if beside and (len(models) < 2 or beside.T != model.T):
        raise SystemExit("--beside compares one CDM with one DDM of as many levels")
    measure(args, models, train_set, validation if args.split == "validation" else test)


def measure(args, models, train_set, held_out):
    """One screen of tables and the pictures of the run."""
    device, images = args.device, held_out[0][:args.images].to(args.device)
    torch.manual_seed(args.seed)
    show_samples(models, images, args.out / "samples.png")
    for name, model in models.items():
        print(f"\n{name}: {sum(p.numel() for p in model.parameters())} weights")
        finer = None
        if name == "CDM":                                       # its network serves any T
            config = dict(model="cdm", T=args.fine, width=model.net.level.out_features)
            finer = build(config, train_set[0]).to(device)
            finer.load_state_dict(model.state_dict())
        likelihood(model, finer, images)
    if "CDM" in models:
        show_levels(models["CDM"], images[:1], args.out / "levels.png")
        classify(models["CDM"], images[:1000], held_out[1][:args.images][:1000])
    if len(models) == 2:
        show_errors(models, images[:500], train_set[0], args.out / "errors.png")
    if args.samples:
        quality(models, [v.to(device) for v in train_set], [v.to(device) for v in held_out],
                args.samples)


if __name__ == "__main__":
    main()
