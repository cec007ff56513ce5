"""draft"""
import argparse, math, time, sys
from pathlib import Path
import numpy as np
import torch
from sklearn.datasets import make_moons, make_swiss_roll
from torch import nn
from cdm import CDM, log_snr_schedule, log_normal


class Oracle:
    def __init__(self, schedule, centres, std, half_width=0.0):
        self.schedule, self.centres, self.std, self.half_width = schedule, centres, std, half_width

    def sample(self, n, t=0):
        c = self.centres[torch.randint(len(self.centres), (n,))]
        x0 = c + self.half_width * (2 * torch.rand(n, 2).to(c) - 1) + self.std * torch.randn(n, 2).to(c)
        return x0

    def log_prob(self, x, t=0):
        alpha, sigma = float(self.schedule.alpha[t]), float(self.schedule.sigma[t])
        if t == self.schedule.alpha.shape[0] - 1:
            return log_normal(x)
        scale = math.sqrt((alpha * self.std) ** 2 + sigma ** 2)
        w = alpha * self.half_width
        off = (x[:, None] - alpha * self.centres).abs()       # (B, K, 2)
        if w == 0:
            log_p = -0.5 * (off / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)
        elif scale == 0:
            log_p = torch.where(off < w, -math.log(2 * w), -math.inf)
        else:
            a = torch.special.log_ndtr((w - off) / scale)
            b = torch.special.log_ndtr((-w - off) / scale)
            log_p = a + torch.log1p(-torch.exp(b - a)) - math.log(2 * w)
        return torch.logsumexp(log_p.sum(-1), 1) - math.log(len(self.centres))


def eight_gaussians():
    a = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return math.sqrt(2) * torch.stack([a.cos(), a.sin()], 1), 0.1, 0.0

def checkerboard():
    c = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2], dtype=torch.float64)
    return (c - 1.5) * 0.85, 0.0, 0.425

def two_moons():
    c = torch.from_numpy(make_moons(400)[0])
    return (c - c.mean(0)) / c.std(0), 0.1, 0.0

def swiss_roll():
    c = torch.from_numpy(make_swiss_roll(400, random_state=0)[0][:, [0, 2]])
    return (c - c.mean(0)) / c.std(0), 0.1, 0.0

DATA = dict(eight=eight_gaussians, checker=checkerboard, moons=two_moons, swiss=swiss_roll)


class Net(nn.Module):
    def __init__(self, L, width=128, layers=3, freqs=16, fmax=2.0):
        super().__init__()
        self.register_buffer("freq", 2 * math.pi * torch.arange(1, freqs + 1) / freqs * fmax)
        d = 2 + 4 * freqs
        mods = []
        for _ in range(layers):
            mods += [nn.Linear(d, width), nn.SiLU()]; d = width
        self.net = nn.Sequential(*mods, nn.Linear(d, L))
    def forward(self, x):
        a = (x[..., None] * self.freq).flatten(1)
        return self.net(torch.cat([x, a.sin(), a.cos()], 1))


def evaluate(model, oracle, n=400, lim=4.25):
    step = 2 * lim / n
    g = -lim + step * (torch.arange(n, dtype=torch.float64) + 0.5)
    grid = torch.cartesian_prod(g, g)
    with torch.no_grad():
        lq = torch.cat([model.log_prob(c.float()) for c in grid.split(20000)]).double()
        lp = torch.cat([oracle.log_prob(c) for c in grid.split(5000)])
    p = lp.exp() * step ** 2
    raw = (torch.where(p > 0, p * (lp - lq), 0)).sum() / p.sum()
    logz = torch.logsumexp(lq, 0) + 2 * math.log(step)
    return float(raw), float(logz), float(p.sum())


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    for k, v in dict(data="eight", T=30, first=10., last=-8., steps=3000, batch=256, lr=3e-3, width=128, layers=3, freqs=16, fmax=2.0, wce=1.0, wmse=1.0, seed=0, wd=0.0, opt="adam", b2=0.999).items():
        ap.add_argument("--" + k, type=type(v), default=v)
    a = ap.parse_args()
    torch.set_num_threads(1); torch.manual_seed(a.seed)
    sch = log_snr_schedule(a.T, a.first, a.last)
    o = Oracle(sch, *DATA[a.data]())
    m = CDM(Net(a.T + 2, a.width, a.layers, a.freqs, a.fmax), sch)
    data = o.sample(200000).float()
    opt = torch.optim.Adam(m.parameters(), lr=a.lr, betas=(0.9, a.b2))
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, a.lr, total_steps=a.steps, pct_start=0.05, anneal_strategy="cos")
    t0 = time.time()
    for i in range(a.steps):
        x0 = data[torch.randint(len(data), (a.batch,))]
        loss = m.loss(x0, a.wce, a.wmse)
        opt.zero_grad(); loss.total.backward(); opt.step(); sched.step()
    t1 = time.time() - t0
    r, z, s = evaluate(m, o)
    print(" ".join(sys.argv[1:]), f"| KLraw {r:.4f} logZ {z:.4f} KL {r+z:.4f} | ce {loss.ce:.3f} mse {loss.mse:.3f} {t1:.1f}s Zp {s:.5f}", flush=True)
