"""CDM on MNIST: train a noise-level classifier, draw digits, read likelihoods off its logits.

    python mnist.py --quick                             minutes on two CPU cores
    python mnist.py --weights assets/mnist_cdm.pt       what is in the box, measured
    python mnist.py --device cuda                       the full run
    python mnist.py --benchmark                         what it costs, beside a DDM
    python mnist.py --dataset digits                    8x8 digits of scikit-learn, no download

Read it for the network, the same for a CDM and a DDM (--model ddm), with class labels or without
(--conditional), and for how bits/dim of 8-bit images are measured and doubted. Results go to
runs/mnist: model.pt (checkpoint; the one before becomes model.old.pt), weights.pt (small), log.csv,
pictures. The method itself is in cdm.py. Not here: distributed training, data augmentation.
"""

import argparse
import copy
import ctypes
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
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cdm import (CDM, DDM, annealed_log_z, bits_per_dim, ddpm_schedule, elbo, log_snr_schedule,
                 ot_schedule, stratified_levels, uniform_schedule)

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
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{name} is no IDX file of bytes: it starts with {data[:4].hex()}")
    digest = hashlib.md5(data).hexdigest()
    if digest != md5:
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


class Block(nn.Module):
    """Two convolutions and a skip around them. GroupNorm, so that rows stay independent; SiLU,
    which is curved everywhere, for the loss differentiates the network's gradient."""

    def __init__(self, inputs, outputs, told):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.level = nn.Linear(32, outputs) if told else None
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, waves=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.level:
            h = h + self.level(waves)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """(B, 1, H, W) -> features (B, width, H/2, W/2); H and W are multiples of 4. told (B, 32):
    what it may know of the level (a classifier of levels may not) or the class."""

    def __init__(self, width, told=False):
        super().__init__()
        self.stem = nn.Conv2d(4, width, 3, padding=1)              # 2x2 pixels become 4 channels
        self.fine1 = Block(width, width, told)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse1, self.coarse2 = (Block(2 * width, 2 * width, told) for _ in range(2))
        self.up = nn.Conv2d(2 * width, width, 1)
        self.fine2 = Block(2 * width, width, told)
        self.norm = nn.GroupNorm(4, width)

    def forward(self, x, told=None):
        h = self.fine1(self.stem(F.pixel_unshuffle(x, 2)), told)
        coarse = self.coarse2(self.coarse1(self.down(h), told), told)
        up = F.interpolate(self.up(coarse), scale_factor=2.0)
        return F.silu(self.norm(self.fine2(torch.cat([h, up], 1), told)))


ANY = 10                                                          # the label of unlabelled rows


class Labels(nn.Embedding):
    """Class labels (B,) of the rows of x -> (B, 32). No labels: ANY, any class."""

    def __init__(self):
        super().__init__(ANY + 1, 32)

    def forward(self, x, y=None):
        unknown = torch.full((len(x),), ANY, device=x.device)
        return super().forward(unknown if y is None else y)


def told_label(net, x, y):
    """What a network is told of the labels: (B, 32), or None if it was made without."""
    if y is not None and net.label is None:
        raise ValueError("this network must be used without labels: it was trained so")
    return net.label(x, y) if net.label else None


def drop_labels(y, rate=0.1):
    """Labels (B,), some turned into ANY: so one network learns p(x) beside p(x given y)."""
    return torch.where(torch.rand(y.shape, device=y.device) < rate, ANY, y)


STEP = 2 / 256                                                    # between two 8-bit grey values


class PixelMixture(nn.Module):
    """Features (B, width, H/2, W/2) -> what each clean pixel may be: black, near white or grey.

    Gives log-weights (B, 3, d, 1), and means and variances (B, 2, d, 1) of the last two, which are
    Gaussians. As long as the features are not used, the weights are the pixel's own: how often it
    is black, white and grey in the training images."""

    def __init__(self, images, width):
        super().__init__()
        self.read = nn.Conv2d(width, 7 * 4, 3, padding=1)         # 7 numbers for each of 2x2 pixels
        nn.init.zeros_(self.read.weight), nn.init.zeros_(self.read.bias)
        shades = torch.stack([images == 0, images >= 252, (images > 0) & (images < 252)])
        count = shades.flatten(2).sum(1)                                                    # (3, d)
        self.log_weight = nn.Parameter(((count + 1) / (len(images) + 3)).log())

    def forward(self, h):
        numbers = F.pixel_shuffle(self.read(h), 2).flatten(2)[..., None]              # (B, 7, d, 1)
        weight = (numbers[:, :3] + self.log_weight[..., None]).log_softmax(1)
        mean = torch.stack([0.98 + 0.03 * numbers[:, 3], numbers[:, 4]], 1)
        start = torch.tensor([-9.0, -1.5], device=h.device)[:, None, None]
        return weight, mean, (numbers[:, 5:] + start).exp() + (STEP / 2) ** 2


def log_pixel(x, mixture, alpha, sigma, lattice=True):
    """log p_t of noisy pixels x (B, d, 1) under their mixtures, at the levels that alpha and sigma,
    (L,) or (B, 1, L), stand for: (B, d, L), without the constant that all share.

    Clean pixels lie on the lattice STEP (j + 1/2), and little noise leaves that visible. A Gaussian
    N(m, v) on it, noised, is N(alpha m, alpha^2 v + sigma^2) times a ripple: the sum over the
    lattice of the clean value's posterior given x, N((alpha v x + sigma^2 m) / noised, s^2), s^2 =
    v sigma^2 / noised. Poisson's formula makes it 1 + 2 sum_n (-1)^n exp(-2 (pi n s / STEP)^2)
    cos(2 pi n mean / STEP); three terms do from level 1 on. lattice = False leaves the ripple out,
    for levels whose noise hides the lattice."""
    weight, means, variances = mixture
    parts = [(1 / sigma, weight[:, 0] - 0.5 * ((x + 255 / 256 * alpha) / sigma) ** 2)]      # black
    for i in (0, 1):                                                                # white, grey
        mean, variance = means[:, i], variances[:, i]
        noised = alpha ** 2 * variance + sigma ** 2
        factor = noised.rsqrt()
        exponent = weight[:, i + 1] - 0.5 * ((x - alpha * mean) * factor) ** 2
        if lattice:
            cos = ((alpha * variance * x + sigma ** 2 * mean) / noised * (2 * math.pi / STEP)).cos()
            fade = (-2 * (math.pi / STEP) ** 2 * variance * sigma ** 2 / noised).exp()
            ripple = 1 + 2 * (-fade * cos + fade ** 4 * (2 * cos ** 2 - 1)
                              - fade ** 9 * (4 * cos ** 3 - 3 * cos))
            factor = factor * ripple.clamp(min=1e-3)
        parts.append((factor, exponent))
    with torch.no_grad():                    # logsumexp by hand, no gradient through the shift:
        top = torch.maximum(torch.maximum(parts[0][1], parts[1][1]), parts[2][1])   # 3 times faster
    return top + sum(factor * (exponent - top).exp() for factor, exponent in parts).log()


def place(schedule):
    """Where a level stands between clean, 0, and noise, 1, whatever their number: (L,)."""
    log_snr = 2 * (schedule.alpha.clamp(min=1e-9) / schedule.sigma.clamp(min=1e-9)).log()
    return ((13 - log_snr.float()) / 21).clamp(0, 1)


class DigitClassifier(nn.Module):
    """Noisy digits x (B, 1, H, W) -> logits (B, L) over noise levels.

    The U-Net reads the whole image and sets the mixture of every pixel. Were pixels independent,
    the sum of their log p_t would be the exact logits. So it is at the start, the last layers being
    zero. A read-out of the pooled features, smooth in log-SNR, corrects each level as a whole.
    Levels enter by their noise alone, so a trained network serves any number of them. With labels
    it also takes the class y (B,) of the digits: log p_t(x given y)."""

    def __init__(self, images, schedule, width, labels=False):
        super().__init__()
        self.unet, self.mixture = UNet(width, labels), PixelMixture(images, width)
        self.label = Labels() if labels else None
        self.level = nn.Linear(width, 16)
        nn.init.zeros_(self.level.weight), nn.init.zeros_(self.level.bias)
        alpha, sigma = (v.float() for v in schedule)
        self.register_buffer("alpha", alpha, persistent=False)    # level 0: a small width, not none
        self.register_buffer("sigma", torch.cat([sigma[1:2] / 3, sigma[1:]]), persistent=False)
        waves = torch.cos(math.pi * torch.arange(16)[:, None] * place(schedule))        # (16, L)
        self.register_buffer("waves", waves, persistent=False)
        self.few = int((sigma < STEP).sum())                 # where the lattice of greys is visible

    picks_levels = True

    def forward(self, x, levels=None, every=False, y=None):
        h = self.unet(x, told_label(self, x, y))
        mixture, whole = self.mixture(h), self.level(h.mean((2, 3)))                     # (B, 16)

        def every_level(x):                                                             # (B, L)
            n = self.few
            fine = log_pixel(x, mixture, self.alpha[:n], self.sigma[:n]).sum(1)
            coarse = log_pixel(x, mixture, self.alpha[n:], self.sigma[n:], lattice=False).sum(1)
            return torch.cat([fine, coarse], 1) + whole @ self.waves

        x = x.flatten(1)[..., None]                                                     # (B, d, 1)
        if levels is None:
            return every_level(x)
        alpha, sigma = (v[levels][:, None] for v in (self.alpha, self.sigma))           # (B, 1, n)
        correction = (whole[:, :, None] * self.waves.T[levels].mT).sum(1)
        picked = log_pixel(x, mixture, alpha, sigma).sum(1) + correction                # (B, n)
        return (picked, every_level(x.detach())) if every else picked


class DigitDenoiser(nn.Module):
    """The DDM's network, of the same parts: x (B, 1, H, W) and level t (B,) -> eps_hat like x.

    Told t, it gives each pixel's mixture, and eps_hat = -sigma_t grad log p_t of that mixture, held
    fixed. Wider by sqrt(2), it costs as much as the classifier's forward and backward pass."""

    def __init__(self, images, schedule, width, labels=False):
        super().__init__()
        width = 4 * round(math.sqrt(2) * width / 4)
        self.unet, self.mixture = UNet(width, told=True), PixelMixture(images, width)
        self.label = Labels() if labels else None
        for name, value in zip(("alpha", "sigma", "time"), (*schedule, place(schedule))):
            self.register_buffer(name, value.float(), persistent=False)

    def forward(self, x, t, y=None):
        phase = self.time[t][:, None] * torch.arange(1, 17, device=x.device) * (math.pi / 2)
        told = torch.cat([phase.sin(), phase.cos()], 1)                                # (B, 32)
        label = told_label(self, x, y)
        mixture = self.mixture(self.unet(x, told if label is None else told + label))
        alpha, sigma = (v[t][:, None, None] for v in (self.alpha, self.sigma))
        log_p, pull = torch.func.vjp(lambda pixels: log_pixel(pixels, mixture, alpha, sigma),
                                     x.flatten(1)[..., None])
        return -(sigma * pull(torch.ones_like(log_p))[0]).view_as(x)


# --------------------------------------------------------------------------------------- training


def pick_device(name):
    """auto: cuda if there, else cpu. A device that is asked for and not there is an error."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise SystemExit(f"--device {name}: torch {torch.__version__} sees none; try --device cpu")
    return torch.device(name)


SCHEDULES = {"log-snr": log_snr_schedule, "ddpm": ddpm_schedule, "uniform": uniform_schedule,
             "ot": ot_schedule}


def build(config, images):
    """The model that a configuration stands for; images give the pixels' own shades."""
    schedule = SCHEDULES[config["schedule"]](config["T"])
    family, network = {"cdm": (CDM, DigitClassifier), "ddm": (DDM, DigitDenoiser)}[config["model"]]
    labels = config.get("conditional", False)
    return family(network(images, schedule, config["width"], labels), schedule)


def save(path, **content):
    """Plain tensors and numbers, written beside the old file first: a good one is always there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)


def load(path, device):
    """The content of a checkpoint. SystemExit if it is missing, truncated or of another kind."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        content["config"]["T"], content["config"]["dataset"], content["ema"]
        return content
    except Exception as error:
        problem = (str(error) or "no more is known").splitlines()[0]
        problem = problem.split("(1)")[0]                # torch goes on to advise an unsafe load
        raise SystemExit(f"{path} is no usable checkpoint ({type(error).__name__}: {problem})")


def load_weights(model, weights, path):
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise SystemExit(f"{path} holds a network of another shape: {error}")


def load_model(path, dataset, images, device, T=None):
    """The averaged model of a checkpoint, ready to measure, with its own number of levels or T."""
    kept = load(path, device)
    kept["config"]["T"] = T or kept["config"]["T"]
    if kept["config"]["dataset"] != dataset:
        raise SystemExit(f"{path} was trained on --dataset {kept['config']['dataset']}")
    model = build(kept["config"], images).to(device).eval()
    load_weights(model, kept["ema"], path)
    return model


def compiled(loss, *example):
    """The whole loss compiled, gradient of the logits included; eager, and said so, if it fails."""
    print("compiling the loss (one to two minutes)", flush=True)
    try:
        fast = torch.compile(loss, fullgraph=True)
        fast(*example).total.backward()                              # its gradients are thrown away
        return fast
    except Exception as error:
        print(f"compiling failed ({type(error).__name__}); going on without: slower, same results")
        return loss


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def train(args, config, images, labels, device):
    """Train; return the model with averaged weights (EMA). Checkpoint and log go to args.out."""
    path, steps, batch = args.out / "model.pt", args.steps, args.batch
    model = build(config, images).to(device)
    ema = copy.deepcopy(model)
    optimiser = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    first = 0
    if args.resume:
        kept = load(path, device)
        if kept["config"] != config:
            raise SystemExit(f"--resume: {path} was made with {kept['config']}, not {config}")
        load_weights(model, kept["model"], path)
        load_weights(ema, kept["ema"], path)
        optimiser.load_state_dict(kept["optimiser"])
        first = kept["step"]
    else:
        for old in (path, path.with_name("weights.pt"), path.with_name("log.csv")):
            if old.exists():                                       # the run before is kept
                os.replace(old, old.with_suffix(".old" + old.suffix))
    images, labels = images.to(device), labels.to(device)         # the whole data set, one tensor
    weights = dict(w_ce=args.w_ce, w_mse=args.w_mse) if args.model == "cdm" else {}
    loss_of = lambda x0, y: model.loss(x0, y if args.conditional else None, **weights)
    if not args.no_compile and (device.type == "cuda" or device.type == "cpu" and steps >= 2000):
        loss_of = compiled(loss_of, to_x0(images[:batch]), labels[:batch])
    args.out.mkdir(parents=True, exist_ok=True)
    log = open(args.out / "log.csv", "a" if first else "w")
    log.write("" if first else "step,ce,mse,ms_per_step\n")
    every = max(1, min(100, steps // 20))

    def checkpoint(step):
        save(path, config=config, step=step, model=model.state_dict(), ema=ema.state_dict(),
             optimiser=optimiser.state_dict())

    for step in range(first + 1, steps + 1):
        torch.manual_seed(args.seed * 1_000_003 + step)     # a step depends on its number alone, so
        rows = torch.randint(len(images), (batch,), device=device)        # a resumed run repeats it
        for group in optimiser.param_groups:                       # warm-up, then half a cosine
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = args.lr * min(step / (0.03 * steps + 1), cosine)
        optimiser.zero_grad()
        loss = loss_of(to_x0(images[rows]), drop_labels(labels[rows]))
        loss.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step % every == 0:
            if not math.isfinite(loss.total.item() + norm.item()):
                kept = f"{path} is the last good one" if path.exists() else "there is none yet"
                raise SystemExit(f"training diverged: loss {loss.total.item()} at step {step}. "
                                 f"Checkpoint: {kept}. Try a lower --lr")
            checkpoint(step - 1)                                   # weights that just proved good
        optimiser.step()
        with torch.no_grad():                         # averages about the last tenth, or 1000 steps
            blend = max(0.001, 9 / (9 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), blend)
        if step == first + 2:
            loss.ce.item()
            start = time.time()                                    # the first steps warm up caches
        if step > first + 2 and (step % every == 0 or step in (first + 7, steps)):
            ce, mse = loss.ce.item(), loss.mse.item()              # waits for the GPU: now the time
            ms = 1000 * (time.time() - start) / (step - first - 2)
            left = (steps - step) * ms / 1000
            said = f"CE {ce:7.3f} nats   MSE {mse:.4f}" if args.model == "cdm" else f"MSE {mse:.4f}"
            print(f"step {step:6d} of {steps}   {said}   "
                  f"{ms:5.0f} ms/step   {1000 * batch / ms:6.0f} images/s   {clock(left)} left",
                  flush=True)
            log.write(f"{step},{ce:.5f},{mse:.6f},{ms:.1f}\n")
            if step == first + 7 and left > 900 and device.type == "cpu" and not args.quick:
                print(f"about {clock(left)} to go on this CPU; --quick takes minutes", flush=True)
            log.flush()
    log.close()
    if not all(p.isfinite().all() for p in ema.parameters()):
        raise SystemExit(f"training diverged at the end; {path} keeps the last good checkpoint")
    checkpoint(steps)
    half = {name: v.half() for name, v in ema.state_dict().items()}
    save(args.out / "weights.pt", config=config, ema=half)                 # small, to give away
    return ema


# -------------------------------------------------------------------------------------- measuring


def batches(function, images):
    return torch.cat([function(k) for k in images.split(100)]).cpu()


def likelihood(model, images, audit):
    """Print bits/dim of the images, and, of the first `audit`, whatever can contradict it.

    ELBO and ODE use the denoiser and none of the classifier's constants. Annealing finds log Z of
    p_1; where it is not 0, one pass is too low by it. Returns one pass (N,), or a DDM's ELBO."""
    T, few, means = model.T, images[:audit], []
    print(f"\n| {'bits/dim by':27s} | images |   mean |   s.e. | network passes each | seconds |\n"
          f"| {'-' * 27} | ------ | ------ | ------ | ------------------- | ------- |")

    def row(name, k, passes, function, sign=0):
        """bits/dim of k by function; sign 1, -1: log-weights, not bits, from below or above."""
        start = time.time()
        values = batches(function, k)
        mean, error = values.mean().item(), f"{values.std().item() / len(k) ** 0.5:6.3f}"
        if sign:                      # log Z = log E[exp w] from below, -log E[exp -w] from above
            log_z = sign * (torch.logsumexp(sign * values, 0).item() - math.log(len(k)))
            mean, error = means[0] + log_z / (k[0].numel() * math.log(2)), " " * 6
        if k is few:
            means.append(mean)
        print(f"| {name:27s} | {len(k):6d} | {mean:6.3f} | {error} | {passes:>19s} | "
              f"{time.time() - start:7.1f} |", flush=True)
        return values

    draws = max(1, 4000 // len(images))
    found = []
    if isinstance(model, CDM):
        found.append(row("one forward pass", images, "1", lambda k: bits_per_dim(model, k)))
    found.append(row("ELBO", images, f"{draws} x 2",
                     lambda k: bits_per_dim(model, k, "elbo", draws=draws)))
    if isinstance(model, CDM):
        row("one forward pass", few, "1", lambda k: bits_per_dim(model, k))
    row("ELBO", few, "100 x 2", lambda k: bits_per_dim(model, k, "elbo", draws=100))
    row("probability-flow ODE", few, f"{2 * T - 2} x 4",
        lambda k: bits_per_dim(model, k, "ode", probes=1))
    if isinstance(model, CDM):
        noised = lambda k: model.add_noise(to_x0(k), 1, torch.randn_like(to_x0(k)))
        row("one pass + log Z from below", few, f"{2 * T} x 2",
            lambda k: annealed_log_z(model, torch.randn_like(to_x0(k))), 1)
        row("one pass + log Z from above", few, f"{2 * T} x 2",
            lambda k: annealed_log_z(model, noised(k), forward=False), -1)
        one, bound, ode, below, above = means
        off = max(abs(one - bound), abs(one - ode), below - one, one - above)
        wide = above - below
        print(f"\nOn these {len(few)} images one pass is {off:.3f} bits/dim from ELBO, ODE and the "
              f"range of log Z,\nwhich is {wide:.3f} wide" + (
              ": too few images to tell." if len(few) < 20 else
              ".\nThat is too far to believe it: trust the ELBO." if off > 0.02 else
              ".\nNothing contradicts it, but so wide a range proves little: --T 256 narrows it."
              if wide > 0.05 else ": they agree."))
    return found[0]


@torch.no_grad()
def classifier_numbers(model, images):
    """As a classifier of levels: its accuracy, CE in nats, and MSE (the paper's table 1)."""
    right, ce, mse = [], [], []
    for k in images.split(max(1, 6400 // model.T)):                    # all levels, not only two
        t = stratified_levels(len(k), 0, model.T + 1, k.device)
        xt = model.add_noise(to_x0(k), t, torch.randn_like(to_x0(k)))
        right.append((model.logits(xt).argmax(1) == t).float().mean().item())
        loss = model.loss(to_x0(k))
        ce.append(loss.ce.item()), mse.append(loss.mse.item())
    print(f"level accuracy {100 * np.mean(right):.2f} %, CE {np.mean(ce):.3f} nats, "
          f"MSE {np.mean(mse):.4f} on {len(images)} images")


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
    def features(self, x0):
        return torch.cat([self.body(part) for part in x0.split(500)]).cpu().double()      # (N, 64)


def frechet(a, b):
    """Distance of two Gaussians fitted to features (N, 64) (Heusel et al. 2017)."""
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
            - 2 * cross).item()


def fid(models, train, test, n):
    """Fréchet distance of n samples to the test images by model and sampler, with the floor."""
    net = FeatureNet().to(test[0].device).fit(*train)
    with torch.no_grad():
        right = batches(lambda k: net(to_x0(k)).argmax(1), test[0]) == test[1].cpu()
    real = net.features(to_x0(test[0]))
    rows = torch.randperm(len(train[0]))[:n]
    floor = frechet(net.features(to_x0(train[0][rows])), real)
    print(f"\nFréchet distance in the features of a digit classifier (test accuracy "
          f"{100 * right.float().mean():.1f} %), {n} samples\nagainst {len(real)} test images; "
          f"{len(rows)} training images are at {floor:.2f}\n\n"
          "| model | sampler | steps | distance | ms per image |\n"
          "| ----- | ------- | ----- | -------- | ------------ |")
    for name, model in models.items():
        for method, steps in (("ddim", 50), ("ddpm", model.T), ("dpm", 25)):
            start, steps = time.time(), min(steps, model.T)
            x0 = [model.sample((min(200, n - i), *test[0].shape[1:]), steps, method)
                  for i in range(0, n, 200)]
            found = net.features(torch.cat(x0))
            ms = 1000 * (time.time() - start) / n
            print(f"| {name:5s} | {method:7s} | {steps:5d} | "
                  f"{frechet(found, real):8.2f} | {ms:12.1f} |", flush=True)


def picture(ax, x0, title):
    """Images (rows, columns, 1, H, W) as one."""
    ax.imshow(x0[:, :, 0].permute(0, 2, 1, 3).flatten(0, 1).flatten(1).cpu().numpy(), cmap="gray",
              vmin=-1, vmax=1)
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def finish(fig, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)
    print(f"figure: {path}", flush=True)


@torch.no_grad()
def draw(model, images, path, steps):
    """A picture: ten real digits in the top row, samples by DDIM below."""
    rows, steps = 8, min(steps, model.T)
    samples = model.sample((10 * rows, *images.shape[1:]), steps).clamp(-1, 1)
    fig, axes = plt.subplots(2, 1, figsize=(6, 6.4), height_ratios=[1, rows], layout="constrained")
    picture(axes[0], to_x0(images[:10])[None], "real")
    picture(axes[1], samples.unflatten(0, (rows, 10)), f"drawn (DDIM, {steps} steps)")
    finish(fig, path)


@torch.no_grad()
def show_levels(model, image, path):
    """A picture of what the classifier sees: x_t, its posterior over levels, and its gradient."""
    levels = [max(1, round(share * model.T)) for share in (0.15, 0.4, 0.55, 0.7, 0.85, 1.0)]
    fig, axes = plt.subplots(4, len(levels), figsize=(9, 5.4), layout="constrained",
                             height_ratios=[1, 0.6, 1, 1])
    for column, t in zip(axes.T, levels):
        x0 = to_x0(image)
        xt = model.add_noise(x0, t, torch.randn_like(x0))
        picture(column[0], xt[None] / xt.abs().max(), f"x_t, true level t = {t}")
        column[1].plot(model.logits(xt)[0].softmax(0).cpu())
        column[1].axvline(t, color="grey", linestyle=":")
        column[1].set(yticks=[], xlabel="level")
        column[1].set_title("softmax of the logits", fontsize=9)
        picture(column[2], model.predict_noise(xt, t)[None] / 2, "gradient: eps_hat")
        picture(column[3], model.denoise(xt, t)[None], "x0_hat")
    finish(fig, path)


@torch.no_grad()
def compare(models, images, data_mean, path):
    """The paper's figures 4 and 5: ratio of the errors at each level, and the denoised pure noise.

    Of pure noise nothing can be told, so E[x_0 | x_T] is all but the mean of the data."""
    fig = plt.figure(figsize=(9, 3), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[1, 1.2])
    curves = left.subplots()
    panels = right.subplots(1, 1 + len(models), width_ratios=[1, *[3] * len(models)])
    picture(panels[0], data_mean[None, None], "data mean")
    x0 = to_x0(images)
    eps = torch.randn_like(x0)
    found = {}
    for panel, (name, model) in zip(panels[1:], models.items()):
        alpha, sigma, levels = *model.schedule, range(1, model.T + 1, max(1, model.T // 32))
        errors = [F.mse_loss(model.predict_noise(model.add_noise(x0, t, eps), t), eps).item()
                  for t in levels]
        found[name] = np.array(errors)
        log_snr = [2 * math.log(alpha[t] / sigma[t]) for t in levels]
        x0_hat = model.denoise(eps[:3], model.T)
        picture(panel, x0_hat[None], f"{name}'s x0_hat of pure noise")
        off = F.mse_loss(x0_hat, data_mean.expand_as(x0_hat)) ** 0.5
        print(f"{name}: MSE of eps_hat {np.mean(errors):.4f} over {len(errors)} levels; denoised "
              f"pure noise is {off:.3f} (rms) from the data mean")
    curves.plot(log_snr, found["CDM"] / found["DDM"])
    curves.axhline(1, color="grey", linewidth=0.5)
    curves.set(xlabel="log-SNR (left: noise)", ylabel="MSE of eps_hat, CDM / DDM")
    finish(fig, path)


@torch.no_grad()
def classify(model, images, labels):
    """Bayes' rule with ten equally likely classes: the y of the highest log p_t(x_t given y).

    Where noise is low, a digit under a wrong label is like nothing seen in training, and log p_t
    means little. log-SNR -0.3 was best for the validation digits of MNIST: noise enough for the
    classes to meet, digit enough to tell them apart. Without a density there is the denoising error
    at one level, best at log-SNR -2, and the ELBO. All classes are shown the same noise."""
    alpha, sigma = (v[1:-1] for v in model.schedule)
    best, noisier = (1 + (2 * (alpha / sigma).log() - log_snr).abs().argmin().item()
                     for log_snr in (-0.3, -2.0))

    def error(given, x0):
        eps = torch.randn_like(x0)
        eps_hat = given.predict_noise(model.add_noise(x0, noisier, eps), noisier)
        return -(eps_hat - eps).square().flatten(1).sum(1)

    def at(t, draws):
        def log_p(given, x0):
            noised = (model.add_noise(x0, t, torch.randn_like(x0)) for _ in range(draws))
            return sum(given.log_prob(xt, t) for xt in noised)
        return log_p

    ways = [(f"one pass at level {t}, {n} draws", n, at(t, n))
            for t, n in ((1, 1), (best, 1), (best, 4)) if isinstance(model, CDM)]
    ways.append((f"error of eps_hat, level {noisier}", 1, error))
    ways += [(f"ELBO, {n} draws", n, lambda given, x0, n=n: elbo(given, x0, n)) for n in (4, 32)]
    print(f"\n| class by the {type(model).__name__}'s p(x given y) | images | calls | accuracy "
          "| ms per image |\n"
          "| ----------------------------- | ------ | ----- | -------- | ------------ |")
    for name, draws, log_p in ways:

        def most_likely(k):
            found = []
            seed = int(torch.randint(2 ** 31, ()))
            for y in range(ANY):
                with torch.random.fork_rng():                             # the same noise for each
                    torch.manual_seed(seed)
                    given = model.given(torch.full((len(k),), y, device=k.device))
                    found.append(log_p(given, to_x0(k)))
            return torch.stack(found).argmax(0)

        some, start = images[:200 if "ELBO" in name else 1000], time.time()
        right = (batches(most_likely, some) == labels[:len(some)].cpu()).float()
        print(f"| {name:29s} | {len(some):6d} | {10 * draws:5d} | {100 * right.mean():6.2f} % | "
              f"{1000 * (time.time() - start) / len(some):12.1f} |", flush=True)


@torch.no_grad()
def draw_classes(model, shape, path, steps):
    """A picture: one row of samples for each class, from the same noise at growing guidance."""
    y = torch.arange(ANY, device=model.alpha.device).repeat_interleave(6)
    noise = torch.randn(len(y), *shape, device=y.device)
    fig, axes = plt.subplots(1, 4, figsize=(9.6, 4.4), layout="constrained")
    for ax, w in zip(axes, (-1.0, 0.0, 1.0, 3.0)):
        x0 = model.given(y, w).sample(noise.shape, min(steps, model.T), xT=noise)
        picture(ax, x0.clamp(-1, 1).unflatten(0, (ANY, 6)), f"guidance {w:g}" + (
            ": labels unused" if w == -1 else ": p(x given y)" if w == 0 else ""))
    finish(fig, path)


def rank(model, images, bits, path):
    """What one pass is good for: likely and unlikely digits, and telling digits from the rest."""
    order, (fig, axes) = bits.argsort(), plt.subplots(2, 1, figsize=(6, 3), layout="constrained")
    n = min(20, len(order) // 4 * 2)                                # even, and none shown twice
    for ax, rows, title in zip(axes, (order[:n], order[-n:]), ("most", "least")):
        picture(ax, to_x0(images[rows.to(images.device)]).unflatten(0, (2, n // 2)),
                f"{title} likely: {bits[rows].min():.2f} to {bits[rows].max():.2f} bits/dim")
    finish(fig, path)
    images, bits = images[:1000], bits[:1000]
    shuffle = torch.randperm(images[0].numel(), device=images.device)
    noisy = images.float() + 25 * torch.randn(images.shape, device=images.device)
    others = {"rotated by 90 degrees": images.rot90(1, (2, 3)), "inverted": 255 - images,
              "pixels shuffled": images.flatten(1)[:, shuffle].view_as(images),
              "noise of 25 grey values": noisy.clamp(0, 255).to(torch.uint8)}
    print("\n| told from test digits by one pass | AUROC | bits/dim |\n"
          "| --------------------------------- | ----- | -------- |")
    for name, other in others.items():
        theirs = batches(lambda k: bits_per_dim(model, k), other)
        auroc = roc_auc_score([0] * len(bits) + [1] * len(bits), torch.cat([bits, theirs]).numpy())
        print(f"| {name:33s} | {auroc:.3f} | {theirs.mean():8.2f} |", flush=True)


# -------------------------------------------------------------------------------------- benchmark


def naive_loss(model, x0, w_ce):
    """CDM.loss as one would write it first: the logits of all levels differentiated twice, a B x B
    matrix to pick one a row, autograd.grad. Equal, and slower. It also serves to count FLOPs."""
    t, eps = stratified_levels(len(x0), 0, model.T + 1, x0.device), torch.randn_like(x0)
    alpha, sigma = (v[t].view(-1, 1, 1, 1) for v in (model.alpha, model.sigma))
    xt = (alpha * x0 + sigma * eps).requires_grad_()
    logits = model.net(xt + 0)                                # + 0: else the FLOP counter refuses
    score = (logits[:, -1] - torch.diag(logits[:, t])).sum()
    (grad,) = torch.autograd.grad(score, xt, create_graph=True)
    return w_ce * F.cross_entropy(logits, t) + F.mse_loss(sigma * (grad + xt), eps)


def cost(work, device, repeats=5):
    """Median ms of work(), and the MB it takes at its peak beyond those in use; nan: unknown."""
    def run():
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    run(), run()                                                                        # warm-up
    ms = np.median([run() for _ in range(repeats)])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return ms, (torch.cuda.max_memory_allocated() - before) / 1e6
    try:                                                              # Linux with the GNU C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)                       # what was freed goes back,
        Path("/proc/self/clear_refs").write_text("5")                 # and the peak starts anew
        status = lambda key: int(Path("/proc/self/status").read_text().split(key)[1].split()[0])
        before = status("VmRSS:")
        run()
        return ms, (status("VmHWM:") - before) / 1e3
    except OSError:
        return ms, math.nan


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def benchmark(model, images, args, device):
    """What the work of a trained CDM costs, beside the alternatives: medians of one run."""
    def like(family, T):
        config = dict(model=family, schedule="log-snr", T=T, width=model.net.unet.norm.num_channels)
        return build(config, images).to(device)

    def step(m, loss, x0):                                  # loss and gradients, no optimiser
        return lambda: (m.zero_grad(), loss(x0).total.backward())

    def row(what, mine, beside, other, times=1):
        (a, mb_a), (b, mb_b) = cost(mine, device), cost(other, device)
        print(f"| {what:19s} | {beside:34s} | {times * b / a:9.3g} | {a:8.1f} | {times * b:9.1f} | "
              f"{mb_a:5.0f} | {mb_b:5.0f} |", flush=True)

    x0, k, ddm = to_x0(images[:args.batch]).to(device), images[:20].to(device), like("ddm", model.T)
    eager = lambda x0: model.loss(x0, w_ce=args.w_ce)
    fast, ddm_fast = (f if args.no_compile else compiled(f, x0) for f in (eager, ddm.loss))
    naive = lambda: (model.zero_grad(), naive_loss(model, x0, args.w_ce).backward())
    xt = x0.clone().requires_grad_()
    calls = [flops(f) / args.batch / 1e6 for f in (
        lambda: torch.autograd.grad(model.net(xt + 0).sum(), xt), lambda: ddm.predict_noise(x0, 1),
        naive, step(ddm, ddm.loss, x0))]
    print("million FLOPs of an image, CDM and DDM: {:.0f} and {:.0f} to denoise, {:.0f} and {:.0f} "
          "to train".format(*calls))
    print(f"\nbatch {args.batch}, T = {model.T}; ratio: its ms by the CDM's\n\n"
          "| a CDM's             | beside                             |     ratio |       ms | "
          "   its ms |    MB | its MB |\n| --- | --- | --- | --- | --- | --- | --- |")
    row("training step", step(model, fast, x0), "the same, not compiled", step(model, eager, x0))
    row("training step", step(model, fast, x0), "the same, written naively", naive)
    row("training step", step(model, fast, x0), "DDM's", step(ddm, ddm_fast, x0))
    one_pass = lambda: bits_per_dim(model, k)

    def ode(steps):
        torch.manual_seed(0)
        return bits_per_dim(model, k, "ode", steps=steps, probes=1)

    exact = ode(model.T - 1).mean()
    steps = next(n for n in (*range(4, model.T - 1, 4), model.T - 1)
                 if abs(ode(n).mean() - exact) < 0.01)
    row("log-likelihood", one_pass, f"ODE, {steps} steps, to 0.01 bits/dim", lambda: ode(steps))
    draw = lambda: bits_per_dim(model, k, "elbo", draws=1)
    spread = torch.stack([draw() for _ in range(20)]).std(0).mean().item()
    draws = math.ceil((spread / 0.01) ** 2)
    row("log-likelihood", one_pass, f"ELBO, {draws} x one draw, to 0.01", draw, draws)
    for method, steps in (("ddim", min(50, model.T)), ("ddpm", model.T)):
        mine, its = (lambda m=m: m.sample(k.shape, steps, method) for m in (model, ddm))
        row("sampling", mine, f"DDM's, {method}, {steps} steps", its)
    print("\n| batch |    T | ms per step, not compiled | images/s |    MB |\n"
          "| --- | --- | --- | --- | --- |")
    for batch, T in ((16, 64), (64, 64), (256, 64), (1024, 64), (4096, 64), (64, 256), (64, 1000)):
        if batch <= 256 or device.type == "cuda":
            other = like("cdm", T)
            ms, mb = cost(step(other, other.loss, to_x0(images[:batch]).to(device)), device)
            print(f"| {batch:5d} | {T:4d} | {ms:25.1f} | {1000 * batch / ms:8.0f} | {mb:5.0f} |",
                  flush=True)
    print("\n| DDIM steps | ms per image |\n| --- | --- |")
    for steps in (1, 10, 25, 50):
        if steps <= model.T:
            ms, _ = cost(lambda: model.sample(k.shape, steps), device)
            print(f"| {steps:10d} | {ms / len(k):12.1f} |", flush=True)


def arguments():
    """The command line, with the defaults that --quick, --weights and the device give."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--model", choices=("cdm", "ddm"), default="cdm", help="ddm: told the level, to compare")
    add("--conditional", action="store_true", help="a model of the digits given their labels too")
    add("--dataset", choices=("mnist", "digits"), default="mnist", help="digits: 8x8, offline")
    add("--data", default="data/mnist", help="folder of the four MNIST files (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto: cuda, else cpu")
    add("--quick", action="store_true", help="a small run: minutes on two CPU cores")
    add("--out", type=Path, default=Path("runs/mnist"), help="folder for results (%(default)s)")
    add("--weights", type=Path, help="sample and measure with this checkpoint, no training")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--benchmark", action="store_true", help="measure what a CDM costs, beside a DDM")
    add("--split", choices=("validation", "test"), default="test", help="images to measure on")
    add("--measure", type=int, help="how many images to measure on (10000, quick 500)")
    add("--audit", type=int, help="how many to audit by ODE and log Z (200; on a CPU 20)")
    add("--samples", type=int, help="samples for the Fréchet distance (10000; on a CPU 0)")
    add("--beside", type=Path, help="checkpoint of a DDM to compare with")
    add("--steps", type=int, help="training steps (20000, quick 400)")
    add("--batch", type=int, help="images per step (256, quick 64)")
    add("--width", type=int, help="channels, a multiple of 8 (64, quick 32)")
    add("--T", type=int, help="noise levels between clean and pure noise (64); with\n"
        "--weights: as many as you like, for finer audits")
    add("--schedule", choices=SCHEDULES, default="log-snr", help="noise levels (%(default)s)")
    add("--lr", type=float, help="peak learning rate (0.001, quick 0.004)")
    add("--w-ce", type=float, default=0.001, help="weight of the cross-entropy (%(default)s)")
    add("--w-mse", type=float, default=1.0, help="weight of the denoising error (%(default)s)")
    add("--sample-steps", type=int, default=50, help="DDIM steps (%(default)s)")
    add("--no-compile", action="store_true", help="do not compile the loss")
    add("--seed", type=int, default=0)
    args = p.parse_args()
    full = 20000, 256, 64, 64, 1e-3, 10000, 200, 10000
    quick = 400, 64, 32, 64, 4e-3, 500, 20, 0
    args.device = pick_device(args.device)
    if args.weights or args.device.type == "cpu":
        full = *full[:-2], 20, 0                                   # audits of minutes, not an hour
    names = "steps", "batch", "width", "T", "lr", "measure", "audit", "samples"
    args.asked_T = args.T
    if args.benchmark:
        args.weights = args.weights or Path(__file__).parent / "assets/mnist_cdm.pt"
        args.batch = args.batch or (256 if args.device.type == "cuda" else 64)
    for name, value in zip(names, quick if args.quick else full):
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("steps", "batch", "T", "measure", "audit", "sample_steps"):
        if getattr(args, name) < (2 if name == "T" else 1):
            p.error(f"--{name.replace('_', '-')} must be at least {2 if name == 'T' else 1}")
    if args.samples < 0 or args.samples == 1:
        p.error("--samples must be 0, or 2 and more")
    if args.measure < 20 or args.audit < 2:
        p.error("--measure must be at least 20, --audit at least 2")
    if args.weights and args.resume:
        p.error("--weights measures, --resume trains: not both")
    for path in filter(None, (args.weights, args.beside)):
        if not path.is_file():
            raise SystemExit(f"{path} is no usable checkpoint: there is no such file")
    if not args.lr > 0 or args.w_ce < 0 or args.w_mse < 0 or args.w_ce + args.w_mse == 0:
        p.error("--lr must be positive, --w-ce and --w-mse not negative and not both zero")
    if args.width < 8 or args.width % 8:
        p.error("--width must be a multiple of 8")
    return args


def main():
    args = arguments()
    device = args.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(args.seed)
    train_set, validation, test = load_data(args.dataset, args.data)
    images = train_set[0]
    print(f"torch {torch.__version__} on {device}; {len(images)} training images of "
          f"{images.shape[2]}x{images.shape[3]} pixels")
    other = args.beside and load_model(args.beside, args.dataset, images, device, args.asked_T)
    if args.weights:
        model = load_model(args.weights, args.dataset, images, device, args.asked_T)
    else:
        names = "model conditional schedule dataset T width steps batch lr w_ce w_mse seed".split()
        config = {name: getattr(args, name) for name in names}
        model = train(args, config, *train_set, device).eval()
    if other and type(other) is type(model):
        raise SystemExit(f"--beside {args.beside}: one CDM and one DDM can be compared")
    if other and other.T != model.T:
        raise SystemExit(f"--beside has {other.T} levels, not {model.T}; --T can give both as many")
    if args.benchmark and isinstance(model, DDM):
        raise SystemExit(f"--benchmark wants a CDM, {args.weights} is a DDM")
    if args.benchmark:
        return benchmark(model, images, args, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False    # exact now
    held_out = [v.to(device) for v in (test if args.split == "test" else validation)]
    measured = held_out[0][:args.measure]
    torch.manual_seed(args.seed)
    draw(model, measured, args.out / "samples.png", args.sample_steps)
    bits = likelihood(model, measured, args.audit)
    models = {type(model).__name__: model}
    if isinstance(model, CDM):
        classifier_numbers(model, measured[:1000])
        rank(model, measured, bits, args.out / "ranked.png")
        show_levels(model, measured[:1], args.out / "levels.png")
    if other:
        models[type(other).__name__] = other
        compare(models, measured[:100], to_x0(images).mean(0).to(device), args.out / "beside.png")
    for each in models.values():
        if each.net.label:
            classify(each, measured, held_out[1][:args.measure])
    if model.net.label:
        draw_classes(model, measured.shape[1:], args.out / "classes.png", args.sample_steps)
    if args.samples:
        fid(models, [v.to(device) for v in train_set], held_out, args.samples)


if __name__ == "__main__":
    main()
