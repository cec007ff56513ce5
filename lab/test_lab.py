"""Tests of the scripts: files, checkpoints, processes, command lines; and of what is in lab/."""

import gzip
import hashlib
import math
import os
import re
import subprocess
import sys
from unittest.mock import patch

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal, Normal
from torch.testing import assert_close

import mnist
import toy_2d
from cdm import CDM, dpm_solver, log_snr_schedule, sample
from lab import digits
from lab.audits import annealed_log_z, log_z_at_least, ode_log_prob
from mnist import to_x0
from test_cdm import HERE, IMAGES, Exact, X, digit_model, from_seed_0, same_start  # noqa: F401

SMALL = dict(width=8, batch=8, steps=101, lr=0.01)
LEVELS, LABELS = torch.tensor([1, 20, 40, 64]), torch.tensor([3, 1, 10, 5])


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script, flags):                 # returns what the script prints, with a small preset
        monkeypatch.setattr(sys, "argv", ["x.py", *flags.split()])
        try:
            script.main()
        except SystemExit as stop:
            print(stop)
        plt.close("all")
        return "".join(capsys.readouterr())
    monkeypatch.setattr(mnist, "QUICK", SMALL)
    return run


def train(out, steps, device="cpu", kind="cdm", **start):
    """Train on images whose grey is 20 times their label."""
    config = dict(model=kind, dataset="digits", width=8, batch=16, steps=steps, lr=0.01, seed=0)
    y = (torch.arange(64) % 10).to(device)
    images = (20 * y).byte().view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
    model = from_seed_0(mnist.build, config, IMAGES).to(device)
    model = digits.DigitDDM(model.net, model.schedule).to(device) if kind == "ddm" else model
    mnist.train(model, images, y, config, out / "model.pt", **start)
    return model


# ----------------------------------------------------------------------------------- MNIST's files
@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Stands for MNIST: the i-th image is of grey i % 10, which is its label."""
    for name in mnist.FILES:
        header, size = (16, 784) if "images" in name else (8, 1)
        y = (torch.arange(5007 if "train" in name else 3) % 10).byte()
        content = bytes(header) + y.repeat_interleave(size).numpy().tobytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, 1))
        monkeypatch.setitem(mnist.FILES, name, hashlib.md5(content).hexdigest())
    monkeypatch.setattr(mnist, "URL", f"{tmp_path.as_uri()}/")
    return tmp_path


def test_images_keep_their_labels_and_the_last_5000_for_training_become_validation(folder):
    for (x, y), n, first in zip(mnist.load_data("mnist", folder), (7, 5000, 3), (0, 7, 0)):
        assert x.shape == (n, 1, 28, 28) and torch.equal(y, (first + torch.arange(n)) % 10)
        assert torch.equal(x[:, 0, 5, 5], y)


@pytest.mark.parametrize("content", [b"<html>", b"", gzip.compress(bytes(8) + b"\1\2\3")])
def test_a_file_that_is_not_of_mnist_is_named(content, folder):
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.gz is damaged, or not MNIST"):
        mnist.load_data("mnist", folder)


def test_missing_files_are_downloaded_once(folder):
    for _ in range(2):
        assert mnist.load_data("mnist", folder / "new")[2][1].tolist() == [0, 1, 2]
        for file in folder.glob("*.gz"):
            file.unlink()


# --------------------------------------------------------------------------------------- training
def test_images_are_trained_on_with_their_labels_of_which_a_fifth_is_dropped(tmp_path):
    losses = mnist.DigitCDM.losses
    with patch.object(mnist.DigitCDM, "losses", autospec=True, side_effect=losses) as calls:
        model = train(tmp_path, 50)
    x0, y = (torch.cat(v) for v in zip(*((c.args[1], c.kwargs["y"]) for c in calls.call_args_list)))
    kept = y != mnist.NO_LABEL
    assert torch.equal(x0[kept, 0, 3, 3], to_x0(20 * y[kept]))
    assert 0.77 < kept.float().mean() < 0.83
    assert model.w_mse[64] > 1 > model.w_mse[1]         # an error counts more where it is small


@pytest.mark.parametrize("kind", ["cdm", "ddm"])
def test_training_and_sampling_stay_on_the_device(kind, monkeypatch, tmp_path):
    """On PyTorch's meta device tensors have no values; to mix them with the CPU's is an error."""
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "__format__", lambda tensor, how: "1")
    monkeypatch.setattr(mnist, "best_linear_mse", lambda images, schedule: torch.ones(66))
    model, x = train(tmp_path, 2, "meta", kind), torch.randn(3, 1, 8, 8, device="meta")
    assert sample(model, x, 3, eta=1.0).is_meta and dpm_solver(model, x, 3).is_meta


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(monkeypatch, tmp_path):
    train(tmp_path, 3)
    monkeypatch.setattr(mnist, "W_CE", math.inf)
    with pytest.raises(FloatingPointError, match="diverged"):
        train(tmp_path, 4, start=mnist.read(tmp_path / "model.pt"))
    assert mnist.read(tmp_path / "model.pt")["step"] == 3


def test_a_run_that_is_stopped_and_resumed_equals_a_whole_one(run, monkeypatch, tmp_path):
    def save_then_stop(path, step=0, save=mnist.save, **content):
        save(path, step=step, **content)
        if step == 100:
            raise KeyboardInterrupt                                            # as Ctrl-C does
    flags = f"--dataset digits --device cpu --quick --out {tmp_path}"
    monkeypatch.setattr(mnist, "show_samples", lambda *_: sys.exit("trained"))
    said = run(mnist, f"{flags}/whole")
    assert re.search(r"step    101 of 101   cross-entropy 0\.[0-6].*   weighted MSE 0\.\d", said)
    with patch.object(mnist, "save", save_then_stop):
        said = run(mnist, f"{flags}/resumed")
    assert re.search("interrupted; .*resumed/model.pt can be resumed", said)
    said = run(mnist, f"{flags}/resumed --resume --batch 32")
    assert re.search("model.pt is no checkpoint of this run. It has .*'batch': 8", said)
    assert "100 steps are done" in run(mnist, f"{flags}/resumed --resume")
    whole, resumed = (torch.load(tmp_path / f"{name}/model.pt") for name in ("whole", "resumed"))
    for key in ("model", "optimiser"):
        assert_close(whole[key], resumed[key], rtol=0, atol=0)
    assert "101 steps are done" in run(mnist, f"{flags}/whole --resume")


# ----------------------------------------------------------------------------- the command lines
@pytest.mark.parametrize("flags, why", [
    ("--dataset mnist --data {0}/bad", "bad/train-images-idx3-ubyte.gz is damaged"),
    ("--out {0}/run", "run holds a run: add --resume"),
    ("--out {0}/new --resume", "new/model.pt is missing, or not"),
    ("--out {0}/renamed --resume", "renamed/model.pt is no checkpoint of this run"),
    ("--out {0}/file", "exists: .*file"), ("--out {0}/full", "full/model.pt cannot be written"),
    ("--weights {0}/bad/train-images-idx3-ubyte.gz", "is missing, or not a file that mnist"),
    ("--weights {0}/list", "list is missing, or not a file that mnist.py wrote"),
    ("--weights {0}/ddm", "ddm holds a ddm, not a cdm")])
def test_what_cannot_go_on_says_why_and_names_the_file(flags, why, run, tmp_path):
    for name in ("bad/train-images-idx3-ubyte.gz", "run/weights.pt", "renamed/x", "full/x", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"some text")
    (tmp_path / "full/model.pt.part").symlink_to("/dev/full")                     # a full disk
    torch.save([1, 2], tmp_path / "list")
    same = dict(model="cdm", dataset="digits", log_snr=list(mnist.LOG_SNR), seed=0, **SMALL)
    torch.save(dict(config=dict(model="ddm")), tmp_path / "ddm")
    torch.save(dict(config=same), tmp_path / "renamed/model.pt")
    flags = "--dataset digits --quick --device cpu --out {0}/out " + flags
    assert re.search(why, run(mnist, flags.format(tmp_path)).splitlines()[-1])
    assert (tmp_path / "run/weights.pt").read_bytes() == b"some text"


@pytest.mark.parametrize("flags, n, words, files", [
    ("--datasets two_modes --methods NCE CDM --seeds 2 --steps 2", 5,
     r"KL .*log_Z.*mass_left.*\n.*\n.*NCE.*\+-", ["toy_2d.csv", "toy_2d.png"]),
    ("--chasm --seeds 1 --steps 32", 31, r"rms_error .*s_per_1000_steps(.*\n)*.*time-score",
     ["chasm.csv", "chasm.png"]),
    ("--tour --steps 2", None, "results are in", ["tour.png"])])
def test_each_toy_tabulates_and_draws(flags, n, words, files, run, tmp_path):
    assert re.search(words, run(toy_2d, f"{flags} --out {tmp_path}/new"))
    written = sorted(tmp_path.glob("new/*"))
    assert [file.name for file in written] == files
    assert n is None or len(written[0].read_text("utf-8").splitlines()) == n


def test_a_toy_refuses_a_csv_that_cannot_be_written(run, tmp_path):
    (tmp_path / "toy_2d.csv").mkdir()
    pytest.raises(OSError, run, toy_2d, f"--out {tmp_path}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of Unix")
def test_workers_end_with_their_parent():
    """They hold its output open, so reading it to the end waits for them, too."""
    code = """import time, toy_2d
def work():
    print("at work", flush=True)
    time.sleep(60)
toy_2d.in_parallel(work, [()])"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=HERE)
    assert parent.stdout.readline() == b"at work\n"
    parent.kill()
    parent.communicate(timeout=20)


@pytest.mark.parametrize("script", [toy_2d, mnist])
def test_the_readme_uses_flags_that_there_are(script, run):
    readme = (HERE / "README.md").read_text("utf-8")
    commands = " ".join(re.findall(rf"python {script.__name__}\.py([^`#|\n]*)", readme))
    used = set(re.findall(r"--[a-z]+", commands))
    assert used and used <= set(re.findall(r"--[a-z]+", run(script, "-h")))


# -------------------------------------------------------------------------- the plane and the chasm
def test_evaluate_normalises_before_it_compares():
    truth = toy_2d.two_modes()                                                # weights 0.9 and 0.1
    equal = toy_2d.Oracle(torch.tensor([(-1.2, 0.0), (1.2, 0.0)]), std=0.15)
    numbers = toy_2d.evaluate(lambda x: equal.log_prob(x.double()) + 0.5, truth)[0]
    kl = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert_close(numbers, dict(KL=kl, log_Z=0.5, KL_raw=kl - 0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", toy_2d.METHODS)
def test_every_method_recovers_a_known_log_ratio(name):
    schedule = log_snr_schedule(40, 8, -6)
    oracle = toy_2d.Oracle(torch.tensor([(0.8, -0.4)]), std=0.4, schedule=schedule)
    make = lambda outputs, timed=False: toy_2d.MLP(2 + timed, outputs, 64, 2, frequencies=0)
    method = toy_2d.METHODS[name](make, schedule)
    toy_2d.train(method, lambda: oracle.sample(512).float(), steps=300, lr=1e-2)
    x = oracle.sample(500)               # log N(0, I) as the answer would err by 1.5
    error = (method.log_prob(x.float()) - oracle.log_prob(x)).detach()
    error = error - error.mean() if name == "MSE" else error       # which knows no constant
    assert error.abs().mean() < (0.45 if name in ("MSE", "time-score") else 0.15)


def test_the_chasm_is_20_nats_deep():
    data, noise = toy_2d.correlated_pairs(80), MultivariateNormal(torch.zeros(80), torch.eye(80))
    assert abs(torch.distributions.kl_divergence(data, noise) - 20) < 1e-3


# ------------------------------------------------------------------------------ the digits' network
def test_the_digits_losses_compare_a_level_with_a_neighbour_and_weigh_the_error():
    model = digit_model(scatter=0.02)
    model.w_mse.copy_(torch.rand(66))
    ce, mse = from_seed_0(model.losses, X, LABELS)
    torch.manual_seed(0)
    lower, up, eps = torch.randint(65, (4, 1)), torch.randint(2, (4, 1)), torch.randn_like(X)
    t, other = (lower + up)[:, 0], (lower + 1 - up)[:, 0]
    xt = model.add_noise(X, t, eps)
    gap = model.log_ratio(xt, other, LABELS) - model.log_ratio(xt, t, LABELS)
    assert_close(ce, F.softplus(gap).mean())
    error = (model.predict_noise(xt, t, y=LABELS) - eps).square().flatten(1).mean(1)
    assert_close(mse, (model.w_mse[t] * error).mean())


def test_the_best_linear_denoiser_is_exact_for_a_gaussian():
    images = torch.randint(0, 256, (4000, 1, 2, 2), dtype=torch.uint8)
    images[:, :, 1] = images[:, :, :1, 0] // 2                     # three pixels that are related
    cov, (alpha, sigma) = to_x0(images).flatten(1).double().T.cov(), log_snr_schedule(9, 6)
    found = mnist.best_linear_mse(images, log_snr_schedule(9, 6))
    for t in (1, 5, 9):                          # eps_hat = sigma N^-1 (xt - alpha m), N = cov(xt)
        noised = cov * alpha[t] ** 2 + sigma[t] ** 2 * torch.eye(4)
        assert_close(found[t], 1 - sigma[t] ** 2 * torch.linalg.inv(noised).trace() / 4)


def digit_ddm():
    cdm = digit_model(scatter=0.02)
    return digits.DigitDDM(cdm.net, cdm.schedule).double()


def test_a_ddm_tells_its_trunk_the_level_and_holds_the_features_constant():
    ddm, seen, forward = digit_ddm(), [], mnist.Trunk.forward
    ddm.net.trunk.register_forward_hook(lambda _, inputs, features: seen.append(features))
    eps_hat, _ = (ddm.predict_noise(X, levels) for levels in (LEVELS, LEVELS.flip(0)))
    assert not torch.allclose(*seen)
    with patch.object(mnist.Trunk, "forward", lambda *args: forward(*args).detach()):
        assert_close(ddm.predict_noise(X, LEVELS), eps_hat)
    with pytest.raises(NotImplementedError):
        ddm.log_prob(X, 1)


def test_the_jacobian_of_a_ddm_goes_through_its_features():                           # for the ODE
    ddm, (u, v) = digit_ddm(), torch.randn(2, *X.shape).double()
    _, vjp = torch.func.vjp(lambda x: ddm.predict_noise(x, LEVELS), X)
    up, down = (ddm.predict_noise(X + h * u, LEVELS) for h in (1e-6, -1e-6))
    assert_close((vjp(v)[0] * u).sum(), ((up - down) * v).sum() / 2e-6, rtol=1e-4, atol=0)


def test_the_frechet_distance_of_two_gaussians_is_its_closed_form():
    a, b = torch.randn(50000, 3).double(), 2 * torch.randn(50000, 3).double() + 1
    assert_close(digits.frechet(a, b), 3 * 1.0 + 3 * (1 - 2) ** 2, atol=0.1, rtol=0)


# ------------------------------------------------------------------------------------- the audits
def test_annealing_finds_a_planted_log_z_and_bounds_it():  # exactly, because the data are one point
    alpha, sigma = schedule = log_snr_schedule(60, 6, -16)
    planted = 0.8 * F.one_hot(torch.tensor(1), 62)
    logits = lambda x: Normal(2 * alpha, sigma.clamp(min=1e-9)).log_prob(x) + planted
    log_w = annealed_log_z(CDM(logits, schedule), torch.zeros(50, 1).double())
    assert (log_w - 0.8).abs().max() < 0.002
    assert_close(log_z_at_least(torch.tensor([1.0, 3.0]).log(), 0.9), math.log(2 * 0.1))


def test_the_ode_and_one_pass_agree_if_the_classifier_is_exact():
    model = Exact(log_snr_schedule(50, 8, -10))
    x1 = model.add_noise(model.data(400), 1, torch.randn(400, 2).double())
    one_pass = model.log_prob(x1, 1)
    assert_close(ode_log_prob(model, x1[:50], probes=0), one_pass[:50], atol=0.06, rtol=0)
    assert abs((ode_log_prob(model, x1, probes=2) - one_pass).mean()) < 0.05   # Hutchinson: no bias
