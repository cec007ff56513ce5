"""CDM on MNIST: train a noise-level classifier, sample digits, read likelihoods off its logits.

    python mnist.py --weights assets/mnist_cdm.pt        no training: evaluate these weights
    python mnist.py --dataset digits --quick             scikit-learn's 8x8 digits, no download
    python mnist.py --quick                              a short run, 2 minutes on two CPU cores
    python mnist.py --device cuda                        the full training run, on a GPU

Read cdm.py first; it has the method. Here are data, a network, a training loop and an evaluation.
"""

import argparse
import gzip
import hashlib
import math
import os
import pickle
import sys
import time
import zlib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from cdm import CDM, bits_per_dim, elbo, log_normal, log_snr_schedule, sample

# width: channels of the network; batch: images per step; lr: the highest learning rate
FULL = dict(width=64, batch=256, steps=20000, lr=0.002)
QUICK = dict(width=32, batch=64, steps=500, lr=0.003)
LOG_SNR = 64, 14.0, -8.0                    # number of levels T; log-SNR at level 1 and at level T

# ------------------------------------------------------------------------------------------- data
URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",      # MD5 when unpacked
         "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
         "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
         "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}
SIZE = {"mnist": 28, "digits": 8}
CLASSES, NO_LABEL = 10, 10                      # labels are 0 .. 9; an eleventh, 10, means none
STEP = 2 / 256                                  # distance between neighbouring grey values


def read_mnist(folder, name):
    """Images, uint8 (N, 1, 28, 28), or labels, long (N,), from folder/name.gz, which is downloaded
    if missing. Raises ValueError if the file is not MNIST's."""
    path = folder / f"{name}.gz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {URL}{path.name} to {folder}", flush=True)
        torch.hub.download_url_to_file(URL + path.name, path, progress=False)
    try:
        raw = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raw = b""
    if hashlib.md5(raw).hexdigest() != FILES[name]:
        raise ValueError(f"{path} is damaged, or not MNIST: delete it")
    data = torch.tensor(np.frombuffer(raw, np.uint8))              # after a header of 16 or 8 bytes
    return data[16:].view(-1, 1, 28, 28) if "images" in name else data[8:].long()


def load_data(dataset, folder):
    """(images, labels) for training, validation and test: uint8 (N, 1, H, W) and long (N,). The
    validation set is for experiments; this file does not use it."""
    if dataset == "digits":                                          # 1797 of 8x8, grey 0 .. 16
        digits, order = load_digits(), np.random.default_rng(0).permutation(1797)
        x = torch.tensor(digits.images[order] * 255 / 16).round().byte()[:, None]
        y, parts = torch.tensor(digits.target[order]), [1350, 150, 297]
        return list(zip(x.split(parts), y.split(parts)))
    x, y, *test_set = (read_mnist(Path(folder), name) for name in FILES)
    return (x[:-5000], y[:-5000]), (x[-5000:], y[-5000:]), test_set


def to_x0(images):
    """Grey values k = 0 .. 255 (uint8) as floats: the centre of the k-th of 256 equal bins of
    [-1, 1], that is (2k+1)/256 - 1. Back from x: ((x + 1) * 128).floor().clamp(0, 255)."""
    return (2 * images.float() + 1) / 256 - 1


# ---------------------------------------------------------------------------------------- network
# Why not just T+2 outputs, as in the paper? At level 1 a digit's log-ratio is thousands of nats,
# and its gradient must be right to a fraction of a grey step. A formula supplies most of that
# before training. The Trunk, a U-Net, looks at a noisy image once, and must not be told its level:
# finding it is the task. The head, PixelMixture, turns the Trunk's features into an answer for any
# level t, true or not: how likely the image would be, if t were its level.


class Block(nn.Module):
    """A residual block of two convolutions, (B, C, H, W) -> same, given the label's embedding.
    BatchNorm would mix rows, and ReLU is not smooth: hence GroupNorm and SiLU. If `places` = H * W
    is set, the positions are mixed first, as in MLP-Mixer (Tolstikhin et al. 2021), by a learned
    matrix (H * W, H * W) for each of four groups of channels."""

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

    def forward(self, x, embedding):
        if self.places:
            groups = F.silu(self.norm0(x)).flatten(2).unflatten(1, (4, -1))     # (B, 4, C/4, H W)
            x = x + (groups @ self.matrices).view_as(x)              # the matrices start at zero
        h = self.conv1(F.silu(self.norm1(x))) + self.cond(embedding)[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class Trunk(nn.Module):
    """A small U-Net, (B, 1, H, W) -> features (B, width, H/2, W/2). Half resolution shows strokes,
    quarter resolution the whole digit. It pools by averages, because its gradient is the denoiser,
    and strided convolutions leave checkerboards in gradients."""

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

    def forward(self, x, embedding):
        fine = self.stem2(F.silu(self.stem1(x)))                              # (B, width/4, H, W)
        fine = self.fine1(F.pixel_unshuffle(fine, 2), embedding)              # (B, width, H/2, W/2)
        coarse = self.down(F.avg_pool2d(fine, 2))
        coarse = self.coarse2(self.coarse1(coarse, embedding), embedding)
        both = torch.cat([fine, F.interpolate(self.up(coarse), scale_factor=2.0)], 1)
        fine = self.fine2(self.join(F.silu(self.norm1(both))), embedding)
        return F.silu(self.norm2(fine))


class PixelMixture(nn.Module):
    """log [p_t(x) / N(x; 0, I)], (B, n), of images x (B, 1, H, W) at n noise levels alpha, sigma
    (B, n). A clean pixel equals one of five exact greys c that dominate MNIST, or is drawn from one
    of three Gaussians N(m, v). With noise, it has the density

        sum of w N(x_i; alpha c, sigma^2)  +  sum of w N(x_i; alpha m, alpha^2 v + sigma^2).

    Eight log w, three m and three log v make 14 numbers per pixel. They are read off the features
    (B, width, H/2, W/2), and each level adjusts them by a scale and a shift, the same at all pixels
    (FiLM, Perez et al. 2018). The log-densities are summed over the pixels, and each level adds a
    constant. As the features depend on x itself, nothing forces p_t to integrate to 1. Before
    training, the w of a pixel are the frequencies of its greys in `images`."""

    GREYS = 0, 252, 253, 254, 255

    def __init__(self, images, width):
        super().__init__()
        self.read = nn.Conv2d(width, 4 * 14, 3, padding=1)     # 14 numbers for each of 2x2 pixels
        self.adjust = nn.Linear(32, 2 * 14)                      # scale and shift of the 14 numbers
        self.constant = nn.Linear(32, 1, bias=False)
        for parameter in (*self.read.parameters(), *self.adjust.parameters(), self.constant.weight):
            nn.init.zeros_(parameter)
        count = torch.stack([(images == k).flatten(1).sum(0) for k in self.GREYS])       # (5, d)
        others = (len(images) - count.sum(0, keepdim=True)).expand(3, -1) / 3
        self.log_weight = nn.Parameter((torch.cat([count, others]) + 1).log())           # (8, d)
        self.register_buffer("grey", to_x0(torch.tensor(self.GREYS))[:, None], persistent=False)
        self.register_buffer("mean", torch.linspace(-0.6, 0.6, 3)[:, None], persistent=False)

    def forward(self, features, x, alpha, sigma):
        level = waves(alpha, sigma)                                                  # (B, n, 32)
        numbers = F.pixel_shuffle(self.read(features), 2).flatten(2)[:, None]        # (B, 1, 14, d)
        scale, shift = self.adjust(level)[..., None].chunk(2, dim=2)           # each (B, n, 14, 1)
        numbers = numbers * (1 + scale) + shift                                      # (B, n, 14, d)
        log_weight, mean, log_variance = numbers.split([8, 3, 3], dim=2)
        log_weight = (log_weight + self.log_weight).log_softmax(2)
        mean = mean + self.mean
        variance = torch.exp(log_variance - 1.5) + STEP ** 2     # at first 0.47^2, at least STEP^2
        x_ = x.flatten(1)[:, None, None]                                             # (B, 1, 1, d)
        alpha_, sigma_ = alpha[..., None, None], sigma[..., None, None]              # (B, n, 1, 1)
        sigma_ = sigma_.clamp(min=3e-4)                    # keeps level 0 finite, where sigma is 0
        greys = log_gaussian(x_, alpha_ * self.grey, sigma_ ** 2)
        others = log_gaussian(x_, alpha_ * mean, alpha_ ** 2 * variance + sigma_ ** 2)
        others = others + log_comb(x_, sigma_)           # pulls the Gaussians to the 256 greys
        log_p = (log_weight + torch.cat([greys, others], 2)).logsumexp(2).sum(2)          # (B, n)
        # The constant of a level, which only cross-entropy can teach. It is 0 at levels T and T+1,
        # and up to 28 nats elsewhere: the factor of 10 lets it learn faster.
        pure_noise = waves(alpha.new_zeros(1), alpha.new_ones(1))
        return log_p - log_normal(x)[:, None] + 10 * self.constant(level - pure_noise)[..., 0]


class DigitNet(nn.Module):
    """log [p_t(x) / N(x; 0, I)], (B, n), of noisy images x (B, 1, H, W) at the noise levels alpha
    and sigma (B, n), given labels y (B,) in 0 .. 9, or none."""

    def __init__(self, images, width):
        super().__init__()
        self.trunk, self.mixture = Trunk(images.shape[-1], width), PixelMixture(images, width)
        self.label = nn.Embedding(CLASSES + 1, 32)
        nn.init.zeros_(self.label.weight)

    def embed(self, x, y):
        """The embedding of the labels y of images x, (B, 32)."""
        if y is None:
            y = torch.full((len(x),), NO_LABEL, device=x.device)
        return self.label(y)

    def forward(self, x, alpha, sigma, y=None):
        return self.mixture(self.trunk(x, self.embed(x, y)), x, alpha, sigma)


class DigitCDM(CDM):
    """The paper's network returns all T+2 logits. Ours takes the levels to score as an input, and
    nothing marks the true one. It identifies a level by alpha and sigma, so T can change. Do not
    use level 0, at which exact greys have no density: likelihoods are at level 1."""

    def __init__(self, net, schedule):
        super().__init__(net, schedule)
        self.register_buffer("w_mse", torch.ones(self.T + 2), persistent=False)    # see train

    def log_ratios(self, x, levels, y=None):
        """log [p_t(x) / p_{T+1}(x)], (B, n), at the levels (B, n), by one look at x."""
        alpha, sigma = (v.to(x, non_blocking=x.is_cuda)[levels] for v in self.schedule)
        return self.net(x, alpha, sigma, y)

    def log_ratio(self, x, t, y=None):
        return self.log_ratios(x, self.level(t, x)[:, None], y)[:, 0]

    def logits(self, x, y=None):
        """All of them, (B, T+2), relative to the last, which is 0."""
        return self.log_ratios(x, torch.arange(self.T + 2, device=x.device).expand(len(x), -1), y)

    def losses(self, x0, y=None):
        """Like CDM.losses, with two changes. The classifier decides only between the true level t
        and a neighbour, so that the cost of a step does not grow with T; the denoising error ties
        distant levels together. And each level's error has a weight, w_mse."""
        lower = torch.randint(self.T + 1, (len(x0), 1), device=x0.device)
        coin = torch.randint(2, (len(x0), 1), device=x0.device)
        levels = torch.cat([lower + coin, lower + 1 - coin], 1)     # true level t, neighbour (B, 2)
        t, eps = levels[:, 0], torch.randn_like(x0)
        xt = self.add_noise(x0, t, eps)

        def summed_log_ratio(x):
            ratios = self.log_ratios(x, levels, y)
            return ratios[:, 0].sum(), ratios

        gradient, ratios = torch.func.grad(summed_log_ratio, has_aux=True)(xt)
        _, sigma = self.scales(t, xt)
        error = (sigma * (xt - gradient) - eps).square().flatten(1).mean(1)                  # (B,)
        # t is always in column 0, but the network cannot see which column it is scoring.
        return F.cross_entropy(ratios, torch.zeros_like(t)), (self.w_mse[t] * error).mean()


def build(config, images=None):
    """An untrained model from a config (dataset, width). Loading weights needs no images."""
    if images is None:
        images = torch.zeros(1, 1, SIZE[config["dataset"]], SIZE[config["dataset"]])
    net = DigitNet(images, config["width"])
    return DigitCDM(net, log_snr_schedule(*config.get("log_snr", LOG_SNR))).float()


# ----------------------------------------------------------- details of the network (skip at first)
def log_gaussian(x, mean, variance):
    """log N(x; mean, variance) of each number."""
    return -((x - mean) ** 2 / variance + torch.log(2 * math.pi * variance)) / 2


def log_comb(x, sigma):
    """The log of a comb, (B, n, 1, d): a function with a peak at each of the 256 greys, and mean 1
    over x. It moves the mass of the three Gaussians to the greys, which saves 0.13 bits/dim.
    The peaks have width sigma, and the nearest five suffice."""
    peaks = STEP * (torch.arange(-2, 3, dtype=x.dtype, device=x.device)[:, None] + 0.5)    # (5, 1)
    near = log_gaussian(torch.remainder(x, STEP), peaks, sigma ** 2)                 # (B, n, 5, d)
    comb = near.logsumexp(2, keepdim=True) + math.log(STEP)
    return torch.where(sigma > 0.6 * STEP, 0.0, comb)                # there it is flat to 0.2 %


def waves(alpha, sigma):
    """Noise-level embedding, (..) -> (.., 32): sines and cosines of the log-SNR, rescaled from
    14 .. -8 (whatever LOG_SNR is) to 0 .. 1. Levels 0 and T+1 get the embedding of 1 and T."""
    log_snr = 2 * (alpha.clamp(min=1e-9) / sigma.clamp(min=1e-9)).log()
    depth = ((14 - log_snr) / 22).clamp(0, 1)
    phase = depth[..., None] * torch.arange(1, 17, device=depth.device) * (math.pi / 2)
    return torch.cat([phase.sin(), phase.cos()], -1)


# --------------------------------------------------------------------------------------- training
W_CE = 0.02            # weight of the cross-entropy: small, so that the denoising error dominates
UNLABELLED = 0.2       # fraction of rows whose label is dropped; they train the unconditional p(x)


def best_linear_mse(images, schedule):
    """Noise-prediction MSE of the best linear denoiser at each level, float64 (T+2,): the variance
    of eps given x_t, alpha^2 s / (alpha^2 s + sigma^2), averaged over the eigenvalues s of the
    image covariance (Wiener 1949). Levels 0 and T+1 copy their neighbours."""
    s = torch.linalg.eigvalsh(to_x0(images.cpu()).flatten(1).T.double().cov()).clamp(min=0)
    alpha, sigma = (v[1:-1, None] for v in schedule)
    error = (alpha ** 2 * s / (alpha ** 2 * s + sigma ** 2)).mean(1)
    return torch.cat([error[:1], error, error[-1:]])


def save(path, **content):
    """Save to another file first, so that an interruption never damages `path`. Raises OSError."""
    try:
        torch.save(content, f"{path}.part")
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:            # a full disk is a RuntimeError to PyTorch
        raise OSError(f"{path} cannot be written: {error}") from error


def read(path, kind="cdm"):
    """What a training run saved: a dict of config, model (weights) and, in model.pt, step and
    optimiser. Raises ValueError if the file is another one, or not of this kind of model."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["config"]["model"]
    except (OSError, EOFError, LookupError, TypeError, RuntimeError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path} is missing, or not a file that mnist.py wrote") from e
    if found != kind:
        raise ValueError(f"{path} holds a {found}, not a {kind}")
    return content


def load(path, device="cpu", kind="cdm"):
    """A trained model, in eval mode. Errors: see read."""
    content = read(path, kind)
    model = build(content["config"])
    model.load_state_dict(content["model"])
    return model.to(device).eval()


def train(model, images, labels, config, path, start=None):
    """Train a model with the settings of `config`, saving it to `path` every 100 steps or once a
    minute. A run resumes from `start`, what read(path) returned: on a CPU, exactly as if it had not
    stopped. Raises FloatingPointError if training diverges."""
    steps, done = config["steps"], 0
    optimiser = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=images.is_cuda)
    if start:
        model.load_state_dict(start["model"])
        optimiser.load_state_dict(start["optimiser"])
        done = start["step"]
    error = best_linear_mse(images, model.schedule)
    model.w_mse.copy_(error.mean() / error)                   # so that levels count about equally
    begun = saved = time.time()
    for step in range(done + 1, steps + 1):
        torch.manual_seed(config["seed"] * 1_000_003 + step)     # so that a resumed run is the same
        rows = torch.randint(len(images), (config["batch"],), device=images.device)
        dropped = torch.rand(len(rows), device=images.device) < UNLABELLED
        y = labels[rows].masked_fill(dropped, NO_LABEL)
        ce, mse = model.losses(to_x0(images[rows]), y=y)
        optimiser.zero_grad()
        (W_CE * ce + mse).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        warm_up, cosine = step / (0.03 * steps + 1), math.cos(math.pi * (step - 1) / steps)
        optimiser.param_groups[0]["lr"] = config["lr"] * min(warm_up, (1 + cosine) / 2)
        optimiser.step()
        if step in (1, steps) or step % 100 == 0 or time.time() - saved > 60:
            if not (ce + mse + norm).isfinite():              # reading a number waits for the GPU
                raise FloatingPointError(f"training diverged before step {step}: try --seed")
            save(path, config=config, step=step, model=model.state_dict(),
                 optimiser=optimiser.state_dict())
            saved = time.time()
            left = (steps - step) * (saved - begun) / (step - done) / 60
            print(f"step {step:6d} of {steps}   cross-entropy {ce:.3f} (chance 0.693)   weighted "
                  f"MSE {mse:.4f} (linear denoiser {error.mean():.4f})   {left:.1f} min left",
                  flush=True)


# ------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def claimed_bits(model, images, y=None):
    """Bits/dim of 8-bit images (B, 1, H, W), (B,), as one forward pass claims: maybe too few."""
    x0 = to_x0(images)
    x1 = model.add_noise(x0, 1, torch.randn_like(x0))
    return bits_per_dim(model.log_prob(x1, 1, y=y), model.schedule.sigma[1].item(), x0[0].numel())


def elbo_bits(model, images, y=None):
    """An upper bound on the bits/dim of 8-bit images (B, 1, H, W), (B,): the number to quote."""
    x0 = to_x0(images)
    return bits_per_dim(elbo(model, x0, y=y), model.schedule.sigma[1].item(), x0[0].numel())


@torch.no_grad()
def show_samples(model, noise, file):
    """Draw samples from noise (100, 1, H, W): ten of each class, one class per row."""
    y = torch.arange(CLASSES, device=noise.device).repeat_interleave(10)
    x0 = sample(model, noise, eta=1.0, y=y)[:, 0]
    rows = F.pad(x0, (1, 1, 1, 1), value=-1).unflatten(0, (CLASSES, 10))
    picture = torch.cat([torch.cat(list(row), 1) for row in rows])
    plt.imsave(file, np.kron(picture.cpu(), np.ones((3, 3))), cmap="gray", vmin=-1, vmax=1)


@torch.no_grad()
def show_levels(model, x0, file):
    """Draw what the classifier makes of one digit x0, (1, 1, H, W), at six noise levels."""
    fig, axes = plt.subplots(3, 6, figsize=(9, 4.6), layout="constrained")
    for (noisy, bars, clean), t in zip(axes.T, (25, 31, 37, 44, 50, 56)):
        xt, near = model.add_noise(x0, t, torch.randn_like(x0)), range(t - 8, t + 9)
        posterior = model.logits(xt)[0].softmax(0).cpu().numpy()
        noisy.imshow(xt[0, 0].cpu(), cmap="gray", vmin=-2, vmax=2)
        noisy.set(title=f"level {t}", xticks=[], yticks=[])
        bars.bar(near, posterior[near], color=["C1" if s == t else "C0" for s in near])
        bars.set(yticks=[], ylim=(0, None))
        clean.imshow(model.denoise(xt, t)[0, 0].cpu(), cmap="gray", vmin=-1, vmax=1)
        clean.set(xticks=[], yticks=[])
    for ax, label in zip(axes[:, 0], ("noisy digit", "p(level | x)", "denoised")):
        ax.set_ylabel(label)
    fig.savefig(file, dpi=100)


# ------------------------------------------------------------------------------------------- main
def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--dataset", choices=SIZE, default="mnist", help="digits: 8x8, no download")
    add("--data", default="data/mnist", help="folder of the four MNIST files (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    add("--quick", action="store_true", help="for a CPU: a small network, a short run")
    add("--out", type=Path, help="output folder (runs/ and the name of the run)")
    add("--weights", metavar="FILE", help="do not train, evaluate these weights")
    add("--resume", action="store_true", help="continue the run in --out, with its other flags")
    for name, what in (("steps", "training steps"), ("batch", "images per step"),
                       ("width", "channels of the network, a multiple of 4")):
        add(f"--{name}", type=int, help=f"{what} ({FULL[name]}; with --quick {QUICK[name]})")
    add("--seed", type=int, default=0)
    p.set_defaults(**(QUICK if p.parse_args().quick else FULL))        # steps, batch, width and lr
    args = p.parse_args()
    if min(args.steps, args.batch, args.width) < 1 or args.width % 4:
        p.error("--steps and --batch must be at least 1, --width a multiple of 4")
    run = "weights" if args.weights else args.dataset + ("_quick" if args.quick else "")
    args.out = args.out or Path("runs", run)
    return args


def find_saved(args, config):
    """What --weights or --resume asks for, or None. Raises ValueError if that does not fit."""
    if args.weights:
        return read(args.weights)
    path = args.out / "model.pt"
    if args.resume:
        saved = read(path)
        if "step" not in saved or saved["config"] != config:
            raise ValueError(f"{path} is no checkpoint of this run. It has {saved['config']}")
        return saved
    if path.exists() or (args.out / "weights.pt").exists():
        raise ValueError(f"{args.out} holds a run: add --resume, or choose another --out")


def main():
    args = arguments()
    config = dict(model="cdm", dataset=args.dataset, log_snr=list(LOG_SNR), seed=args.seed,
                  **{name: getattr(args, name) for name in FULL})
    try:                                             # all that is read, before any long work
        args.out.mkdir(parents=True, exist_ok=True)
        saved = find_saved(args, config)
        config = saved["config"] if saved else config
        train_set, _, test_set = load_data(config["dataset"], args.data)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    torch.manual_seed(config["seed"])
    model = build(config, train_set[0]).to(args.device)
    if args.weights:
        model.load_state_dict(saved["model"])
    else:
        done, path = saved["step"] if saved else 0, args.out / "model.pt"
        print(f"training on {args.device}, {done} steps are done: {config}", flush=True)
        images, labels = (v.to(args.device) for v in train_set)
        try:
            train(model, images, labels, config, path, saved)
            save(args.out / "weights.pt", config=config, model=model.state_dict())
        except (OSError, FloatingPointError) as error:
            sys.exit(str(error))
        except KeyboardInterrupt:
            sys.exit(f"interrupted; {path if path.exists() else 'nothing'} can be resumed")
    torch.manual_seed(0)                                         # for all models the same digits
    images = test_set[0][torch.randperm(len(test_set[0]))[:1000]].to(args.device)
    show_samples(model, torch.randn_like(to_x0(images[:100])), args.out / "samples.png")
    show_levels(model, to_x0(images[:1]), args.out / "levels.png")
    for name, method in (("one forward pass", claimed_bits), ("ELBO", elbo_bits)):
        bits = torch.cat([method(model, part) for part in images.split(250)])
        print(f"{name:17s} {bits.mean():.3f} +- {bits.std() / len(bits) ** 0.5:.3f} bits/dim, "
              f"{len(bits)} test images", flush=True)
    print(f"figures: {args.out}/samples.png and levels.png")


if __name__ == "__main__":
    main()
