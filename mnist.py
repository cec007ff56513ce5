"""CDM on MNIST: train a noise-level classifier, draw digits, read likelihoods off its logits.

    python mnist.py --quick                        a short training, four minutes on two CPU cores
    python mnist.py --weights assets/mnist_cdm.pt assets/mnist_ddm.pt
                                                   measure two trained networks, 10 to 20 minutes
    python mnist.py --device cuda                  the full training, on a GPU
    python mnist.py --dataset digits --quick       8x8 digits of scikit-learn, without a download

Read cdm.py first: the method is there. Here are a network for digits, a training loop, and how the
results are measured. They go to runs/: weights.pt, log.csv, pictures, and model.pt for --resume.
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

from cdm import (CDM, DDM, annealed_log_z, bits_per_dim, elbo, given, log_normal,
                 log_snr_schedule, ode_log_prob, sample)

# width: channels of the network; batch: images a step; lr: the peak learning rate. Then the number
# of images whose likelihood is measured by one_pass, by the elbo, and by what is slow (ODE, log Z);
# the number of levels for log Z (fine); that of samples for the Frechet distance (0: none).
FULL = dict(width=64, batch=256, steps=20000, lr=0.002,
            one_pass=10000, elbo=500, slow=40, fine=2048, samples=1000)
QUICK = dict(width=32, batch=64, steps=500, lr=0.004,
             one_pass=500, elbo=200, slow=40, fine=512, samples=0)

# ------------------------------------------------------------------------------------------- data
URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {"train-images-idx3-ubyte.gz": "440fcabf73cc546f",           # how the file's SHA-256 begins
         "train-labels-idx1-ubyte.gz": "3552534a0a558bbe",
         "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79",
         "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6d"}
CLASSES, SIZE = 10, {"mnist": 28, "digits": 8}


def read_or_download(folder, name, sha256):
    """The images uint8 (N, 1, 28, 28) or the labels (N,) in folder/name, which is downloaded first
    if it is not there. The file is gzipped IDX: a header of 16 or 8 bytes, and then the numbers."""
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL + name, folder / name, sha256, progress=False)
    data = torch.tensor(np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8))
    return data[16:].view(-1, 1, 28, 28) if "images" in name else data[8:].long()


def load_data(dataset, folder):
    """(images, labels) for training, validation and test: uint8 (N, 1, H, W) and long (N,)."""
    if dataset == "digits":                                          # 1797 of 8x8, grey 0 .. 16
        digits, order = load_digits(), np.random.default_rng(0).permutation(1797)
        images = torch.tensor(digits.images[order] * 255 / 16).round().to(torch.uint8)[:, None]
        parts = [1350, 150, 297]
        return list(zip(images.split(parts), torch.tensor(digits.target[order]).split(parts)))
    try:
        x, y, test_x, test_y = (read_or_download(Path(folder), *file) for file in FILES.items())
    except Exception as error:
        sys.exit(f"MNIST cannot be read: {error}\nDelete a damaged file, put {list(FILES)} "
                 f"into {folder}, name another folder by --data, or use --dataset digits.")
    return (x[:-5000], y[:-5000]), (x[-5000:], y[-5000:]), (test_x, test_y)


def to_x0(images):
    """Grey values k = 0 .. 255 as floats: [-1, 1] is cut into 256 parts, and k is the middle of
    part k, (2k+1)/256 - 1."""
    return (2 * images.float() + 1) / 256 - 1


# ---------------------------------------------------------------------------------------- network
CLEANEST, NOISIEST = 14.0, -8.0                 # log-SNR at level 1 and at level T
STEP = 2 / 256                                  # distance of two grey values


class Block(nn.Module):
    """Two convolutions and a skip connection, (B, C, H, W) -> the same. cond (B, 32) is the class
    and, in a DDM, the level. GroupNorm keeps rows apart; SiLU is smooth, as a CDM needs.

    If the number of places H W is given, learned matrices (H W, H W) mix all places first, one for
    each quarter of the channels: attention whose weights do not depend on x, and cheaper."""

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
            x = x + (quarters @ self.matrices).view_as(x)                     # (B, C, H, W)
        h = self.conv1(F.silu(self.norm1(x))) + self.cond(cond)[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class Trunk(nn.Module):
    """A small U-Net: images (B, 1, H, W) -> features (B, width, H/2, W/2). At half the resolution
    it sees strokes, at a quarter of it the whole digit."""

    def __init__(self, size, width):
        super().__init__()
        places = (size // 4) ** 2
        self.stem = nn.Conv2d(4, width, 3, padding=1)                 # 2x2 pixels are 4 channels
        self.fine = Block(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse1, self.coarse2 = Block(2 * width, places), Block(2 * width, places)
        self.up = nn.Conv2d(2 * width, width, 1)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x, cond):
        fine = self.fine(self.stem(F.pixel_unshuffle(x, 2)), cond)
        coarse = self.coarse2(self.coarse1(self.down(fine), cond), cond)
        both = torch.cat([fine, F.interpolate(self.up(coarse), scale_factor=2.0)], 1)
        return self.join(F.silu(self.norm(both)))


class PixelMixture(nn.Module):
    """Features (B, width, H/2, W/2) -> log [p_t(x) / N(x; 0, I)] in nats, (B,), of pixels x (B, d).

    For each pixel the features give a mixture over clean grey values: five values that MNIST is
    full of, and three Gaussians. Noise turns a grey value c into N(alpha c, sigma^2), and N(m, v)
    into N(alpha m, alpha^2 v + sigma^2), so the noisy log-density is a formula. But the mixture
    depends on x itself, so nothing forces the result to integrate to 1: log Z measures that.
    Untrained, the mixture is the histogram of each pixel, which makes 1.77 bits/dim; all from there
    to 1.12 was learned. log_lattice, at the end of this section, may be skipped."""

    GREYS, GAUSSIANS = (0, 252, 253, 254, 255), 3

    def __init__(self, images, width):
        super().__init__()
        n, g = len(self.GREYS), self.GAUSSIANS
        self.read = nn.Conv2d(width, 4 * (n + 3 * g), 3, padding=1)     # 4: for each of 2x2 pixels
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)
        count = torch.stack([(images == k).flatten(1).sum(0) for k in self.GREYS])       # (n, d)
        others = (len(images) - count.sum(0, keepdim=True)).expand(g, -1) / g
        share = (torch.cat([count, others]) + 1) / (len(images) + n + g)
        self.log_weight = nn.Parameter(share.log())                                    # (n+g, d)
        self.register_buffer("grey", to_x0(torch.tensor(self.GREYS))[:, None], persistent=False)
        self.register_buffer("mean", torch.linspace(-0.6, 0.6, g)[:, None], persistent=False)

    def forward(self, features, x, alpha, sigma):
        n, g = len(self.GREYS), self.GAUSSIANS
        x, alpha, sigma = x[:, None], alpha[:, None, None], sigma[:, None, None]      # (B, 1, d)
        params = F.pixel_shuffle(self.read(features), 2).flatten(2)
        weight, mean, spread = params.split([n + g, g, g], 1)                        # (B, .., d)
        log_weight = (weight + self.log_weight).log_softmax(1)
        of_greys = log_gaussian(x, alpha * self.grey, sigma ** 2)
        mean, variance = self.mean + mean, torch.exp(spread - 1.5) + STEP ** 2       # of clean x
        of_gaussians = log_gaussian(x, alpha * mean, alpha ** 2 * variance + sigma ** 2)
        of_gaussians = of_gaussians + log_lattice(x, sigma)               # 0 but for little noise
        log_p = torch.cat([of_greys, of_gaussians], 1)
        return torch.logsumexp(log_weight + log_p, 1).sum(1) - log_normal(x)


def log_gaussian(x, mean, variance):
    """log N(x; mean, variance) of each number."""
    return -((x - mean) ** 2 / variance + torch.log(2 * math.pi * variance)) / 2


def waves(alpha, sigma):
    """How a network is told a level: by sines and cosines of where its log-SNR lies between those
    of level 1 and of level T, (..) -> (.., 32). Level 0 looks like 1, and T+1 like T."""
    log_snr = 2 * (alpha.clamp(min=1e-9) / sigma.clamp(min=1e-9)).log()
    depth = ((CLEANEST - log_snr) / (CLEANEST - NOISIEST)).clamp(0, 1)
    phase = depth[..., None] * torch.arange(1, 17, device=depth.device) * (math.pi / 2)
    return torch.cat([phase.sin(), phase.cos()], -1)


class DigitClassifier(nn.Module):
    """log [p_t(x) / p_{T+1}(x)] in nats of images x (B, 1, H, W), of classes y (B,) or of unknown
    class, at the levels asked about: alpha and sigma (B, n) -> (B, n).

        x -> trunk, which is told no level               "what is it, and how noisy?"
          -> last layers, told the level asked about     "suppose that it were of level t"
          -> a mixture of clean grey values, per pixel   "then these greys were behind it"
          -> log-ratio: sum over pixels, plus constant   "and p_t(x) would be so large"

    The paper's network returns the logits of all T+2 levels; this one only those asked about. It is
    not told which of them is the true one, so it is a classifier all the same. It knows levels by
    their noise, not by their number, and so serves any number of them.

    In a DDM the network is the same, but its trunk is told the level, and looks at `seen`, which is
    x again: so the gradient in x does not go through the trunk."""

    def __init__(self, images, width):
        super().__init__()
        self.trunk, self.mixture = Trunk(images.shape[-1], width), PixelMixture(images, width)
        self.level, self.label = nn.Linear(32, width), nn.Embedding(CLASSES + 1, 32)
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.constant = nn.Linear(32, 1, bias=False)               # a learned number for each level
        nn.init.zeros_(self.label.weight)
        nn.init.zeros_(self.constant.weight)

    def forward(self, x, alpha, sigma, seen=None, y=None):
        n, wave = alpha.shape[1], waves(alpha, sigma)                                 # (B, n, 32)
        cond = self.label.weight[-1:] if y is None else self.label(y)    # the last: unknown class
        if seen is None:
            features = self.trunk(x, cond)
        else:
            features = self.trunk(seen, cond + wave[:, 0])
        # From here on there are B n rows, one for each level that is asked about.
        features, pixels = (v.repeat_interleave(n, 0) for v in (features, x.flatten(1)))
        h = self.norm1(features + self.level(wave).flatten(0, 1)[:, :, None, None])
        h = F.silu(self.norm2(features + self.last(F.silu(h))))
        sigma = sigma.clamp(min=3e-4)                # at level 0, greys would be infinitely narrow
        ratio = self.mixture(h, pixels, alpha.flatten(), sigma.flatten()).view_as(alpha)
        pure_noise = waves(torch.zeros_like(alpha), torch.ones_like(sigma))
        constant = self.constant(wave - pure_noise)[..., 0]    # at T+1 it is 0, and ratio is 0, too
        return ratio + 10 * constant                                       # 10: learns faster


class DigitCDM(CDM):
    """A CDM whose network is asked about levels, two neighbours at a time in training."""
    window = 2

    def log_ratio(self, x, levels):
        return self.net(x, self.alpha[levels], self.sigma[levels])


class DigitDDM(DDM):
    """A DDM of the same network: theorem 3.1 as if its features did not depend on x."""

    def predict_noise(self, xt, t):
        levels = self.level(t, xt)[:, None]
        alpha, sigma = self.alpha[levels], self.sigma[levels]                             # (B, 1)
        gradient = torch.func.grad(lambda x: self.net(x, alpha, sigma, xt).sum())(xt)
        return sigma[..., None, None] * (xt - gradient)


def log_lattice(x, sigma):
    """A correction of log p for the Gaussians of PixelMixture, (B, 1, d). It may be skipped.

    Clean pixels take only the values c_j = STEP (j + 1/2), but a Gaussian spreads between them too.
    With little noise (where alpha is 1) the factor, sum over j of STEP N(x; c_j, sigma^2), gathers
    its mass at these values; two neighbours on each side are enough. Where noise hides the steps,
    the factor is 1. Nothing in it is learned. Without it, 0.125 bits/dim are lost."""
    hidden = sigma > 0.6 * STEP
    sigma = torch.where(hidden, STEP, sigma)
    neighbours = STEP * (torch.arange(-2, 3, device=x.device)[:, None] + 0.5)            # (5, 1)
    near = log_gaussian(torch.remainder(x, STEP), neighbours, sigma ** 2)            # (B, 5, d)
    return torch.where(hidden, 0.0, near.logsumexp(1, keepdim=True) + math.log(STEP))


def build(config, images=None):
    """The untrained model of a configuration (model, dataset, width). images (N, 1, H, W) give the
    histograms of the pixels; without them, weights have to be loaded."""
    if images is None:
        images = torch.zeros(1, 1, SIZE[config["dataset"]], SIZE[config["dataset"]])
    family = {"cdm": DigitCDM, "ddm": DigitDDM}[config["model"]]
    net = DigitClassifier(images, config["width"])
    return family(net, log_snr_schedule(64, CLEANEST, NOISIEST))


# --------------------------------------------------------------------------------------- training
W_CE = 0.02                    # of the cross-entropy: so small that the denoising error leads
UNLABELLED = 0.2               # the share of rows whose class is hidden; they teach p(x)


def best_linear_mse(images, schedule):
    """The mean squared error of eps_hat of the best linear denoiser at each level, float64 (T+2,):
    the mean of alpha^2 s / (alpha^2 s + sigma^2) over the eigenvalues s of the images' covariance
    (Wiener 1949). Levels 0 and T+1 get the value of their neighbours."""
    s = torch.linalg.eigvalsh(to_x0(images.cpu()).flatten(1).T.double().cov()).clamp(min=0)
    alpha, sigma = (v[1:-1, None] for v in schedule)
    error = (alpha ** 2 * s / (alpha ** 2 * s + sigma ** 2)).mean(1)
    return torch.cat([error[:1], error, error[-1:]])


def save(path, **content):
    """Written beside the old file first, so that one of the two is whole whenever we stop."""
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)


def load(path, device="cpu", dataset=None):
    """The trained model in a weights.pt or model.pt, ready to measure. SystemExit if none is there,
    or if it was trained on another dataset."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if dataset not in (None, content["config"]["dataset"]):
            raise ValueError(f"it is of {content['config']}")
        model = build(content["config"])
        model.load_state_dict(content["model"])
    except Exception as error:
        sys.exit(f"{path} holds no weights that can be used here: {error!r:.300}")
    return model.to(device).eval()


def train(config, images, labels, device, out, resume=False, compiled=False):
    """Train and return a model. Writes out/model.pt, log.csv, and at the end the small weights.pt.
    SystemExit if model.pt does not fit to `resume` or to config, or if the training diverges."""
    path, steps, first, log = out / "model.pt", config["steps"], 0, ["step,ce,mse,ms_per_step\n"]
    if resume and not path.exists():
        sys.exit(f"there is no {path} to --resume")
    if not resume and (path.exists() or (out / "weights.pt").exists()):
        sys.exit(f"{out} has a training already: add --resume to go on with it, or name another")
    model = build(config, images).to(device)
    optimiser = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    if resume:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if kept["config"] != config:
            sys.exit(f"{path} is of {kept['config']}, not of {config}: give the flags that it had, "
                     "or start anew in another --out")
        first, log = kept["step"], kept["log"]
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
    error = best_linear_mse(images, model.schedule)
    w_mse = (error.mean() / error).float().to(device)       # an error counts relative to this one
    y = torch.zeros(config["batch"], dtype=torch.long, device=device)
    losses = given(model, y).losses              # it holds y, whose values each step overwrites
    losses = torch.compile(losses) if compiled else losses
    images, labels, begun = images.to(device), labels.to(device), time.time()
    for step in range(first + 1, steps + 1):
        torch.manual_seed(config["seed"] * 1_000_003 + step)   # so that a resumed run is the same
        rows = torch.randint(len(images), (len(y),), device=device)
        hidden = torch.rand(len(y), device=device) < UNLABELLED
        y.copy_(torch.where(hidden, CLASSES, labels[rows]))
        ce, mse = losses(to_x0(images[rows]), w_mse)
        optimiser.zero_grad()
        (W_CE * ce + mse).backward()
        if not math.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 2.0).item()):
            sys.exit(f"diverged at step {step}: a gradient is not finite; try another --seed")
        warm_up, cosine = step / (0.03 * steps + 1), math.cos(math.pi * step / steps)
        optimiser.param_groups[0]["lr"] = config["lr"] * min(warm_up, (1 + cosine) / 2)
        optimiser.step()
        if step % 100 == 0 or step == steps:
            ms = 1000 * (time.time() - begun) / (step - first)
            print(f"step {step:6d} of {steps}   cross-entropy {ce.item():.3f} (chance 0.693)   "
                  f"weighted MSE {mse.item():.4f}   {ms:.0f} ms a step   "
                  f"{ms * (steps - step) / 60000:.1f} min left", flush=True)
            log.append(f"{step},{ce.item():.5f},{mse.item():.6f},{ms:.1f}\n")
            (out / "log.csv").write_text("".join(log), "utf-8")
            save(path, config=config, step=step, log=log, model=model.state_dict(),
                 optimiser=optimiser.state_dict())
    half = {name: value.half() for name, value in model.state_dict().items()}      # 16 bits do
    save(out / "weights.pt", config=config, model=half)
    return model.eval()


# -------------------------------------------------------------------------------------- measuring
@torch.no_grad()
def batches(function, x):
    """function of a hundred rows of x at a time, joined, as float64 on the CPU."""
    return torch.cat([function(part) for part in x.split(100)]).cpu().double()


def mean_and_error(values):
    """The mean of values (N,) and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def likelihood(model, images, preset):
    """Print the bits/dim of 8-bit images: a CDM's by one forward pass, a DDM's by its ELBO; then by
    how much other estimates differ on the same images; for a CDM also log Z, which is to be added.
    Returns the ELBO, in bits/dim, of the first preset["elbo"] images."""
    x0, sigma1, d = to_x0(images), model.schedule.sigma[1].item(), images[0].numel()
    x1 = model.add_noise(x0, 1, torch.randn_like(x0))
    few = x1[:preset["slow"]]
    ways = [("ELBO", lambda x: elbo(model, x), x0[:preset["elbo"]]),
            ("probability-flow ODE", lambda x: ode_log_prob(model, x, probes=1), few)]
    if isinstance(model, CDM):
        ways.insert(0, ("one pass", lambda x: model.log_prob(x, 1), x1))
    first, bits = ways[0][0], {}
    for name, function, x in ways:
        begun = time.time()
        bits[name] = bits_per_dim(batches(function, x), sigma1, d)
        ms = 1000 * (time.time() - begun) / len(x)
        title, values = f"bits/dim by {name}", bits[name]
        if name != first:
            title, values = f"{name} minus {first}", values - bits[first][:len(x)]
        title, (mean, error) = f"{title}, {len(x)} images", mean_and_error(values)
        print(f"  {title:49s} {mean:6.3f} +- {error:.3f} {ms:8.0f} ms each", flush=True)
    if isinstance(model, CDM):
        finer = DigitCDM(model.net, log_snr_schedule(preset["fine"], CLEANEST, NOISIEST))
        below, above = (v / (d * math.log(2)) for v in annealed_log_z(finer.to(few.device), few))
        middle, margin = (below + above) / 2, abs(above - below) / 2
        title = f"log Z, between {below:.3f} and {above:.3f}"
        print(f"  {title:49s} {middle:6.3f} +- {margin:.3f}")
        mean, error = mean_and_error(bits[first])
        print(f"To be quoted is one pass + log Z: {mean + middle:.3f} +- "
              f"{math.hypot(error, margin):.3f} bits/dim.", flush=True)
    return bits["ELBO"]


def make_judge(images, labels, steps=600):
    """A small classifier of digits, trained on the spot, and its part that gives 64 features."""
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
    """Squared distance of two Gaussians fitted to features (N, 64) (Heusel et al. 2017)."""
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
            - 2 * cross).item()


def of_each_class(images, labels, n):
    """The first n images of each class, as x0 (CLASSES n, 1, H, W)."""
    return to_x0(torch.cat([images[labels == y][:n] for y in range(CLASSES)]))


def quality(models, train_set, test_set, n):
    """Print how far n samples (hundreds) are from the test digits, beside n real ones. Label first:
    samples of p(x | y), as many of each class; together they are nearly samples of p(x) too."""
    judge, body = make_judge(*train_set)
    target = batches(body, of_each_class(*test_set, test_set[1].bincount().min()))
    order = torch.randperm(len(train_set[1])).to(train_set[1])      # neighbours share their writer
    y = torch.arange(100).to(order) % CLASSES
    real = of_each_class(train_set[0][order], train_set[1][order], n // CLASSES)
    drawn = {"real (training) digits": (real, 0)}
    for name, model in models.items():
        for how, one in ((", label first", given(model, y)), (", free", model)):
            begun, noise = time.time(), torch.randn(n, *train_set[0].shape[1:]).to(y.device)
            x0 = batches(lambda x: sample(one, x, method="ddpm"), noise).to(noise)
            drawn[name + how] = x0, 1000 * (time.time() - begun) / n
    print(f"\n| {n:6d} samples, DDPM              | Frechet distance | 90 % sure | ms each |\n"
          "| --------------------------------- | ---------------- | --------- | ------- |")
    for name, (x0, ms) in drawn.items():
        distance = frechet(batches(body, x0), target)
        sure = batches(lambda x: judge(x).softmax(1).amax(1) >= 0.9, x0).mean()
        print(f"| {name:33s} | {distance:16.2f} | {100 * sure:7.1f} % | {ms:7.1f} |")


# ---------------------------------------------------------------------------------------- figures
def picture(ax, x0, title):
    """Images (rows, columns, 1, H, W) as one, black -1 to white 1."""
    x0 = F.pad(x0[:, :, 0], (0, 1, 0, 1), value=-1)                  # a pixel between neighbours
    x0 = x0.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)[:-1, :-1]
    ax.imshow(x0.cpu().numpy(), cmap="gray", vmin=-1, vmax=1)
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def show_samples(models, images, labels, seed, path):
    """Real digits, and those of each model, all models from the same noise: a class in each row."""
    fig, axes = plt.subplots(1, 1 + len(models), figsize=(3 + 3 * len(models), 3.3), squeeze=False,
                             layout="constrained")
    picture(axes[0, 0], of_each_class(images, labels, 10).unflatten(0, (10, 10)), "real digits")
    y = torch.arange(CLASSES, device=labels.device).repeat_interleave(10)
    for ax, (name, model) in zip(axes[0, 1:], models.items()):
        torch.manual_seed(seed)
        noise = torch.randn(100, *images.shape[1:]).to(images.device)
        x0 = sample(given(model, y), noise, method="ddpm").clamp(-1, 1)
        picture(ax, x0.unflatten(0, (10, 10)), f"drawn by {name}")
    fig.savefig(path, dpi=100)


@torch.no_grad()
def show_levels(model, image, path):
    """What the classifier makes of one digit at six levels."""
    every = torch.arange(model.T + 2, device=image.device)[None]
    fig, axes = plt.subplots(4, 6, figsize=(9, 5.6), layout="constrained",
                             height_ratios=[1, 0.6, 1, 1])
    for column, share in zip(axes.T, (0.15, 0.4, 0.55, 0.7, 0.85, 1.0)):
        x0, t = to_x0(image), round(share * model.T)
        eps = torch.randn_like(x0)
        xt = model.add_noise(x0, t, eps)
        picture(column[0], (xt / 2)[None], f"x_t, true level t = {t}")      # / 2: noise exceeds 1
        column[1].plot(model.log_ratio(xt, every)[0].softmax(0).cpu())
        column[1].axvline(t, color="grey", linestyle=":")
        column[1].set(yticks=[], xlabel="level", ylim=(0, None))
        column[1].set_title("p(level given x_t)", fontsize=9)
        off = (model.predict_noise(xt, t) - eps).abs()
        picture(column[2], off[None] - 1, "error |eps_hat - eps|")
        picture(column[3], model.denoise(xt, t)[None], "denoised: x0_hat")
    fig.savefig(path, dpi=100)


@torch.no_grad()
def show_errors(models, bounds, images, train_images, path):
    """The MSE of eps_hat at each level, divided by that of the best linear denoiser (compare figure
    4 of the paper). Prints its mean over levels, and the ELBO, of all models on the same images."""
    x0 = to_x0(images)
    eps = torch.randn_like(x0)
    fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    print(f"\n| {len(x0):5d} images          | weights | ELBO, bits/dim | MSE / best linear's |\n"
          "| --------------------- | ------- | -------------- | ------------------- |")
    for name, model in models.items():
        mse = torch.tensor([F.mse_loss(model.predict_noise(model.add_noise(x0, t, eps), t), eps)
                            for t in range(1, model.T + 1)])
        mse = mse / best_linear_mse(train_images, model.schedule)[1:-1]
        print(f"| {name:21s} | {sum(p.numel() for p in model.parameters()):7d} | "
              f"{bounds[name].mean():14.4f} | {mse.mean():19.4f} |", flush=True)
        style = "-" if isinstance(model, CDM) else "--"               # one nearly covers the other
        alpha, sigma = model.schedule
        ax.plot(2 * (alpha / sigma).log()[1:-1], mse, style, label=name)
    ax.set(xlabel="log-SNR (left: noise)", title="MSE of eps_hat / the best linear denoiser's")
    ax.legend()
    fig.savefig(path, dpi=100)


# ------------------------------------------------------------------------------------------- main
def measure(models, train_set, test_set, preset, seed, out):
    """One screen of numbers on the test set, and three pictures."""
    images = test_set[0][:preset["one_pass"]]
    few, bounds = images[:preset["elbo"]], {}
    show_samples(models, *test_set, seed, out / "samples.png")
    for name, model in models.items():
        print(f"\n{name}")
        torch.manual_seed(seed)                                   # the same noise for all models
        bounds[name] = likelihood(model, images, preset)
        if isinstance(model, CDM):
            show_levels(model, images[:1], out / "levels.png")
    torch.manual_seed(seed)
    show_errors(models, bounds, few, train_set[0], out / "errors.png")
    if preset["samples"]:
        quality(models, train_set, test_set, preset["samples"])
    print(f"pictures: {', '.join(str(path) for path in sorted(out.glob('*.png')))}")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--model", choices=("cdm", "ddm"), default="cdm", help="ddm: a denoiser of the same size")
    add("--dataset", choices=SIZE, default="mnist", help="digits: 8x8, no download")
    add("--data", default="data/mnist", help="folder of the four MNIST files (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    add("--compile", action="store_true", help="use torch.compile: for a GPU, needs Triton")
    add("--quick", action="store_true", help="a small run: minutes on two CPU cores")
    add("--out", type=Path, help="folder for results (runs/ and what the run is)")
    add("--weights", nargs="+", metavar="FILE", help="measure these files, without any training")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--steps", type=int, help="steps of the training")
    add("--batch", type=int, help="images a step")
    add("--width", type=int, help="channels of the network, a multiple of 4")
    add("--seed", type=int, default=0)
    args = p.parse_args()
    if any(v is not None and v < 1 for v in (args.steps, args.batch, args.width)) or (
            args.width or 4) % 4:
        p.error("--steps, --batch and --width must be 1 or more, --width a multiple of 4")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error(f"--device cuda: torch {torch.__version__} sees no such device")
    return args


def main():
    args = arguments()
    preset = {name: vars(args).get(name) or value                  # the flags override the preset
              for name, value in (QUICK if args.quick else FULL).items()}
    run = "measured" if args.weights else f"{args.dataset}_{args.model}{'_quick' * args.quick}"
    out = args.out or Path("runs", run)
    out.mkdir(parents=True, exist_ok=True)
    train_set, _, test_set = load_data(args.dataset, args.data)
    print(f"torch {torch.__version__} on {args.device}; results go to {out}", flush=True)
    try:
        torch.manual_seed(args.seed)
        if args.weights:
            models = {path: load(path, args.device, args.dataset) for path in args.weights}
        else:
            config = dict(model=args.model, dataset=args.dataset, seed=args.seed,
                          **{name: preset[name] for name in ("width", "batch", "steps", "lr")})
            print(f"training: {config}", flush=True)
            models = {args.model: train(config, *train_set, args.device, out, args.resume,
                                        args.compile)}
        train_set, test_set = ([v.to(args.device) for v in part] for part in (train_set, test_set))
        measure(models, train_set, test_set, preset, args.seed, out)
    except KeyboardInterrupt:
        sys.exit(f"stopped. If there is a {out / 'model.pt'}, --resume goes on from it")
    if args.quick and not args.weights:
        print("This was a short training. The README shows what a long one gives: on MNIST 1.12 "
              "bits/dim, and digits that a classifier reads with certainty.")


if __name__ == "__main__":
    main()
