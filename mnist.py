"""CDM on MNIST: train a noise-level classifier, draw digits, read likelihoods off its logits.

    python mnist.py --quick            3 minutes on two CPU cores
    python mnist.py --device cuda      the full run
    python mnist.py --dataset digits   8x8 digits that come with scikit-learn, no download

Read it for the network (below), and for how bits/dim of 8-bit images are measured honestly. Results
go to runs/mnist: model.pt (checkpoint; that of the run before becomes model.old.pt), samples.png,
log.csv. The method itself is in cdm.py. Not
here: distributed training, data augmentation, class labels.
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
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from cdm import CDM, bits_per_dim, log_snr_schedule

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
        except (EOFError, OSError, ValueError, zlib.error) as error:
            problems.append(f"  {mirror}: {error}")
    raise SystemExit("\n".join([
        f"MNIST could not be downloaded ({name}.gz):", *problems,
        f"Put these four files, with or without .gz, into {folder}/ (or name another --data):",
        *(f"  {f}" for f in FILES), "or run offline with --dataset digits."]))


def load_data(dataset, folder):
    """Train, validation and test images: uint8 tensors (N, 1, H, W)."""
    if dataset == "digits":                                       # 1797 digits of 8x8, grey 0 .. 16
        images = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
        images = images[np.random.default_rng(0).permutation(len(images))]
        train, test, held_out = images[:1500], images[1500:], 150
    else:
        arrays = [read_or_download(Path(folder), name, md5) for name, md5 in FILES.items()]
        train, _, test, _ = arrays                                # labels are not used
        held_out = 5000
    train, test = (torch.from_numpy(a.copy())[:, None] for a in (train, test))
    return train[:-held_out], train[-held_out:], test


def to_x0(images):
    """Grey value k -> (2k+1)/256 - 1, the middle of its 256th part of [-1, 1]."""
    return (2 * images.float() + 1) / 256 - 1


# ---------------------------------------------------------------------------------------- network


class Block(nn.Module):
    """Two convolutions and a skip around them. GroupNorm, so that rows stay independent; SiLU,
    which is curved everywhere, for the loss differentiates the network's gradient."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return self.skip(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class UNet(nn.Module):
    """(B, 1, H, W) -> features (B, width, H/2, W/2); H and W are multiples of 4."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(4, width, 3, padding=1)              # 2x2 pixels become 4 channels
        self.fine1 = Block(width, width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(Block(2 * width, 2 * width), Block(2 * width, 2 * width))
        self.up = nn.Conv2d(2 * width, width, 1)
        self.fine2 = nn.Sequential(Block(2 * width, width), nn.GroupNorm(8, width), nn.SiLU())

    def forward(self, x):
        h = self.fine1(self.stem(F.pixel_unshuffle(x, 2)))
        up = F.interpolate(self.up(self.coarse(self.down(h))), scale_factor=2.0)
        return self.fine2(torch.cat([h, up], 1))


class DigitClassifier(nn.Module):
    """Noisy digits x (B, 1, H, W) -> logits (B, L) over noise levels.

    If pixels were independent, each a mixture of black, white and a Gaussian grey, the exact logits
    would be sums over pixels of log-mixtures, noised to each level. Here the U-Net reads the whole
    image and sets the mixture of every pixel: three weights, and mean and variance of the grey. A
    linear read-out of the pooled features corrects each level as a whole. With the last layers at
    zero, as at the start, this is the exact classifier of independent pixels."""

    def __init__(self, images, schedule, width):
        super().__init__()
        alpha, sigma = schedule
        self.unet = UNet(width)
        self.pixel = nn.Conv2d(width, 5 * 4, 3, padding=1)        # 5 numbers for each of 2x2 pixels
        self.level = nn.Linear(width, len(alpha))
        for layer in (self.pixel, self.level):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        # the start: how often each pixel is black, white or grey in the training images
        shades = torch.stack([images == 0, images >= 252, (images > 0) & (images < 252)])
        count = shades.flatten(2).sum(1)                                                    # (3, d)
        self.log_weight = nn.Parameter(((count + 1) / (len(images) + 3)).log())
        sigma = torch.cat([sigma[1:2] / 3, sigma[1:]])     # level 0: a small width in place of none
        self.register_buffer("alpha", alpha.float())
        self.register_buffer("variance", sigma.float() ** 2)

    def forward(self, x):
        h = self.unet(x)
        pixel = F.pixel_shuffle(self.pixel(h), 2).flatten(2)                             # (B, 5, d)
        weight = (pixel[:, :3] + self.log_weight).log_softmax(1)[..., None]           # (B, 3, d, 1)
        mean, log_var = pixel[:, 3, :, None], pixel[:, 4, :, None] - 1.5                 # (B, d, 1)
        x = x.flatten(1)[..., None]
        black = self.log_normal(x, -255 / 256, 0.0)                                      # (B, d, L)
        white = self.log_normal(x, 0.98, 0.01 ** 2)                # grey values 252 .. 255
        grey = self.log_normal(x, mean, log_var.exp())
        parts = weight[:, 0] + black, weight[:, 1] + white, weight[:, 2] + grey
        with torch.no_grad():                # logsumexp by hand, no gradient through the shift:
            top = torch.maximum(torch.maximum(parts[0], parts[1]), parts[2])        # 3 times faster
        mixture = top + sum((part - top).exp() for part in parts).log()                  # (B, d, L)
        return mixture.sum(1) + self.level(h.mean((2, 3)))                                  # (B, L)

    def log_normal(self, x, mean, variance):
        """log N(x; mean, variance) noised to every level, without the constant that all share."""
        noised = self.alpha ** 2 * variance + self.variance
        return -0.5 * (noised.log() + (x - self.alpha * mean) ** 2 / noised)


# --------------------------------------------------------------------------------------- training


def pick_device(name):
    """auto: cuda if there, else cpu. A device that is asked for and not there is an error."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise SystemExit(f"--device {name}: torch {torch.__version__} sees none; try --device cpu")
    return torch.device(name)


def build(config, images):
    schedule = log_snr_schedule(config["T"])
    return CDM(DigitClassifier(images, schedule, config["width"]), schedule)


def save(path, **content):
    """Plain tensors and numbers, written beside the old file first: a good one is always there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)


def load(path, device):
    """The content of a checkpoint. SystemExit if it is missing, truncated or of another kind."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        content["config"], content["ema"]
        return content
    except Exception as error:
        problem = str(error).splitlines()[0]
        raise SystemExit(f"{path} is no usable checkpoint ({type(error).__name__}: {problem})")


def load_weights(model, weights, path):
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise SystemExit(f"{path} holds a network of another shape: {error}")


def compiled_loss(model, x0, w_ce):
    """The whole loss compiled, gradient of the logits included; eager, and said so, if it fails."""
    try:
        loss = torch.compile(model.loss)
        loss(x0, w_ce).total.backward()
        model.zero_grad()
        return loss
    except Exception as error:
        print(f"compiling failed ({type(error).__name__}); going on without: slower, same results")
        return model.loss


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def train(args, config, images, device):
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
    elif path.exists():
        os.replace(path, path.with_suffix(".old.pt"))              # a new run loses no old one
    images = images.to(device)                                     # the whole data set, one tensor
    loss_of = model.loss
    if device.type == "cuda" and not args.no_compile:
        print("compiling the loss (about a minute)", flush=True)
        loss_of = compiled_loss(model, to_x0(images[:batch]), args.w_ce)
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
        loss = loss_of(to_x0(images[rows]), args.w_ce)
        loss.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step % every == 0:
            if not math.isfinite(loss.total.item() + norm.item()):
                kept = f"{path} is the last good one" if path.exists() else "there is none yet"
                raise SystemExit(f"training diverged: loss {loss.total.item()} at step {step}. "
                                 f"Checkpoint: {kept}. Try a lower --lr")
            checkpoint(step - 1)                                   # weights that just proved good
        optimiser.step()
        with torch.no_grad():                                      # averages about the last tenth
            blend = max(0.001, 9 / (9 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), blend)
        if step == first + 2:
            start = time.time()                                    # the first steps warm up caches
        if step > first + 2 and (step % every == 0 or step in (first + 7, steps)):
            ms = 1000 * (time.time() - start) / (step - first - 2)
            left = (steps - step) * ms / 1000
            print(f"step {step:6d} of {steps}   CE {loss.ce.item():7.3f} nats   "
                  f"MSE {loss.mse.item():.4f}   {ms:5.0f} ms/step   "
                  f"{1000 * batch / ms:6.0f} images/s   {clock(left)} left", flush=True)
            log.write(f"{step},{loss.ce.item():.5f},{loss.mse.item():.6f},{ms:.1f}\n")
            if step == first + 7 and left > 900 and device.type == "cpu" and not args.quick:
                print(f"about {clock(left)} in all on this CPU; --quick takes minutes", flush=True)
            log.flush()
    log.close()
    if not all(p.isfinite().all() for p in ema.parameters()):
        raise SystemExit(f"training diverged at the end; {path} keeps the last good checkpoint")
    checkpoint(steps)
    return ema


# -------------------------------------------------------------------------------------- measuring


def measure(model, images, device, draws=4):
    """Print bits/dim of these images by one forward pass, beside the ELBO of the same network.

    The ELBO does not depend on the classifier's constants, so it audits the one pass."""
    print(f"\n| bits/dim of {len(images):5d} images    |   mean |   s.e. "
          "| network calls, each    | seconds |\n"
          "| --------------------------- | ------ | ------ | ---------------------- | ------- |")
    ways = [("one forward pass (thm. 3.2)", "one_pass", {}, "1 forward"),
            ("ELBO of the same network", "elbo", dict(draws=draws), f"{draws} forward + backward")]
    means = {}
    for name, by, options, calls in ways:
        start = time.time()
        batches = (k.to(device) for k in images.split(100))
        bits = torch.cat([bits_per_dim(model, k, by, **options) for k in batches])
        means[by] = bits.mean().item()
        error = bits.std().item() / len(bits) ** 0.5
        print(f"| {name:27s} | {means[by]:6.3f} | {error:6.3f} "
              f"| {calls:22s} | {time.time() - start:7.1f} |", flush=True)
    if means["one_pass"] < means["elbo"] - 0.02:
        gap = means["elbo"] - means["one_pass"]
        print(f"\none pass is {gap:.2f} below the ELBO: the classifier is not at its optimum yet, "
              "its densities\nneed not integrate to 1. Trust the ELBO.")


def draw(model, images, path, steps):
    """A picture: ten real digits in the top row, samples by DDIM below."""
    start, rows, steps = time.time(), 8, min(steps, model.T)
    samples = model.sample((10 * rows, *images.shape[1:]), steps).cpu()
    grid = torch.cat([to_x0(images[:10]), samples]).clamp(-1, 1).unflatten(0, (rows + 1, 10))
    fig, axes = plt.subplots(2, 1, figsize=(6, 6.4), height_ratios=[1, rows], layout="constrained")
    titles = "real", f"drawn by the CDM (DDIM, {steps} steps)"
    for ax, part, title in zip(axes, (grid[:1], grid[1:]), titles):
        picture = part[:, :, 0].permute(0, 2, 1, 3).flatten(0, 1).flatten(1)        # (rows H, 10 W)
        ax.imshow(picture.numpy(), cmap="gray", vmin=-1, vmax=1)
        ax.set_title(title, fontsize=10)
        ax.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)
    print(f"{10 * rows} samples in {time.time() - start:.0f} s -> {path}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--dataset", choices=("mnist", "digits"), default="mnist", help="digits: 8x8, offline")
    add("--data", default="data/mnist", help="folder of the four MNIST files (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto: cuda, else cpu")
    add("--quick", action="store_true", help="a small run: three minutes on two CPU cores")
    add("--out", type=Path, default=Path("runs/mnist"), help="folder for results (%(default)s)")
    add("--weights", type=Path, help="sample and measure with this checkpoint, no training")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--split", choices=("validation", "test"), default="test", help="images to measure on")
    add("--measure", type=int, help="how many images to measure on (10000, quick 500)")
    add("--steps", type=int, help="training steps (20000, quick 400)")
    add("--batch", type=int, help="images per step (256, quick 64)")
    add("--width", type=int, help="channels, a multiple of 8 (64, quick 32)")
    add("--T", type=int, help="noise levels between clean and pure noise (256, quick 64)")
    add("--lr", type=float, help="peak learning rate (0.001, quick 0.004)")
    add("--w-ce", type=float, default=0.001, help="weight of the cross-entropy (%(default)s)")
    add("--sample-steps", type=int, default=50, help="DDIM steps (%(default)s)")
    add("--no-compile", action="store_true", help="do not compile the loss (cuda only)")
    add("--seed", type=int, default=0)
    args = p.parse_args()
    full, quick = (20000, 256, 64, 256, 1e-3, 10000), (400, 64, 32, 64, 4e-3, 500)
    names = "steps", "batch", "width", "T", "lr", "measure"
    for name, value in zip(names, quick if args.quick else full):
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("steps", "batch", "T", "measure", "sample_steps"):
        if getattr(args, name) < (2 if name == "T" else 1):
            p.error(f"--{name.replace('_', '-')} must be at least {2 if name == 'T' else 1}")
    if not args.lr > 0 or args.w_ce < 0:
        p.error("--lr must be positive and --w-ce not negative")
    if args.width < 8 or args.width % 8:
        p.error("--width must be a multiple of 8")
    device = pick_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(args.seed)
    images, validation, test = load_data(args.dataset, args.data)
    print(f"torch {torch.__version__} on {device}; {len(images)} training images of "
          f"{images.shape[2]}x{images.shape[3]} pixels")
    if args.weights:
        kept = load(args.weights, device)
        if kept["config"]["dataset"] != args.dataset:
            raise SystemExit(f"{args.weights} was trained on --dataset {kept['config']['dataset']}")
        model = build(kept["config"], images).to(device)
        load_weights(model, kept["ema"], args.weights)
    else:
        names = "dataset", "T", "width", "steps", "batch", "lr", "w_ce", "seed"
        config = {name: getattr(args, name) for name in names}
        model = train(args, config, images, device)
    model.eval()
    torch.manual_seed(args.seed)
    held_out = test if args.split == "test" else validation
    measure(model, held_out[:args.measure], device)
    draw(model, held_out, args.out / "samples.png", args.sample_steps)


if __name__ == "__main__":
    main()
