"""What PyTorch does with the training steps that `wavegen bench train` measures: forward, backward and AdamW of the wave transformer
and of the plan transformer in the shapes of a preset; eager in f32 on the CPU, or compiled in bf16 on a GPU. Same layers; features,
plans and tokens are random tensors of the right shapes, so drawing an excerpt (forecasts, spectra) costs nothing here, which favours
torch.

    python3 benches/peers/train.py [--preset base|small] [--threads 1] [--rounds 5] [--part wave|plan] [--device cuda [--batch 16]]

One JSON object per part on stdout: units (samples, frames) per second and microseconds of processor time per unit, median, least, most."""

import argparse
import functools
import json
import os
import statistics
import sys
import time

try:
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError as reason:
    sys.exit(f"nothing measured: {reason}")

# src/model/config.rs and models/*.toml. Tiers: hop, dim, layers, heads, window.
PRESETS = {
    "base": dict(tiers=[(64, 256, 4, 4, 128), (8, 160, 3, 5, 128), (1, 96, 2, 2, 32)], plan_dim=384, shortcut=96,
                 plan=(384, 5, 6)),
    "small": dict(tiers=[(64, 192, 3, 4, 128), (8, 128, 2, 4, 128), (1, 64, 2, 2, 32)], plan_dim=256, shortcut=64,
                  plan=(256, 4, 4)),
}
LEVELS, TOKEN, TAPS, FEATURES, FORECASTS, COMPONENTS, SLICES, SLICE_DIM = 256, 16, 8, 12, 2, 3, 8, 128
K, OWN = FORECASTS * COMPONENTS, 0.35
HOP, BANDS, CODEBOOKS, ENTRIES, WINDOW, DROPOUT = 512, 148, 4, 512, 512, 0.1
WAVE_FRAMES, PLAN_FRAMES, WAVE_BATCH, PLAN_BATCH = 32, 512, 2, 4


class Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.gain)


@functools.cache
def angles(time_, dim, device):
    turn = torch.arange(time_, device=device)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    return turn.cos(), turn.sin()


def rotate(x):
    """Normalised and rotated heads, [batch, heads, time, head_dim]."""
    x = F.rms_norm(x, x.shape[-1:])
    cos, sin = angles(*x.shape[-2:], x.device)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Block(nn.Module):
    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.norms = nn.ModuleList([Norm(dim), Norm(dim)])
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 6 * dim, bias=False), nn.Linear(3 * dim, dim, bias=False)

    def attend(self, q, k, v):
        """Causal, each position the last `window`: blocks of queries, each with its own keys and those of the block before."""
        batch, heads, time_, dim = q.shape
        w = self.window
        if time_ <= w:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        n = time_ // w
        q, k, v = (x.reshape(batch * heads, n, w, dim) for x in (q, k, v))
        k, v = (torch.cat((F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0)), x), 2) for x in (k, v))
        i, j = torch.arange(w, device=q.device)[:, None], torch.arange(2 * w, device=q.device)[None] - w
        seen = ((j <= i) & (j > i - w))[None].repeat(n, 1, 1)
        seen[0, :, :w] = False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).reshape(batch, heads, time_, dim)

    def forward(self, x):
        batch, time_, dim = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, time_, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = self.attend(rotate(q), rotate(k), v)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        gate, value = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Wave(nn.Module):
    def __init__(self, tiers, plan_dim, shortcut, **_):
        super().__init__()
        self.tiers, last = tiers, tiers[-1][1]
        self.embedding = nn.Embedding(LEVELS, TOKEN)
        self.register_buffer("values", torch.randn(LEVELS, 2))
        self.inputs = nn.ModuleList(nn.Linear((h if h > 1 else TAPS) * (TOKEN + 2), d, bias=False) for h, d, *_ in tiers)
        self.blocks = nn.ModuleList(nn.ModuleList(Block(d, heads, w) for _ in range(n)) for _, d, n, heads, w in tiers)
        self.down = nn.ModuleList(nn.Linear(a[1], a[0] // b[0] * b[1]) for a, b in zip(tiers, tiers[1:]))
        self.plan = nn.Sequential(nn.Linear(3 * BANDS, plan_dim), nn.SiLU(), nn.Linear(plan_dim, plan_dim), nn.SiLU())
        self.plan_in = nn.ModuleList(nn.Linear(plan_dim, d) for _, d, *_ in tiers)
        self.feature_in = nn.Linear(FEATURES, last)
        self.codes = nn.ModuleList([nn.Embedding(LEVELS, last), nn.Embedding(LEVELS, last)])
        self.norm, self.head = Norm(last), nn.Linear(last, 3 * K)
        self.shortcut = nn.Sequential(nn.Linear(FEATURES, shortcut), nn.SiLU(), nn.Linear(shortcut, shortcut), nn.SiLU(),
                                      nn.Linear(shortcut, 3 * K))
        self.scales = nn.Sequential(nn.Linear(plan_dim, SLICE_DIM), nn.SiLU(), nn.Linear(SLICE_DIM, SLICES * K))

    def tokens(self, x):
        return torch.cat((self.embedding(x), self.values[x]), -1).flatten(-2)

    def forward(self, x, codes, features, plan):
        batch, time_ = codes[0].shape
        before = x.shape[1] - time_
        planned, handed = self.plan(torch.cat((plan[:, 2:], plan[:, 1:-1], plan[:, :-2]), -1)), None
        for i, (hop, dim, *_) in enumerate(self.tiers):
            if hop > 1:
                z = self.inputs[i](self.tokens(x[:, before - hop:][:, :time_].reshape(batch, time_ // hop, hop)))
            else:
                z = self.inputs[i](self.tokens(x[:, before - TAPS:-1].unfold(1, TAPS, 1))) + self.feature_in(features)
                z = z + self.codes[0](codes[0]) + self.codes[1](codes[1])
            z = z + self.plan_in[i](planned).repeat_interleave(HOP // hop, 1)
            if handed is not None:
                z = z + handed
            for block in self.blocks[i]:
                z = block(z)
            if i + 1 < len(self.tiers):
                handed = self.down[i](z).reshape(batch, -1, self.tiers[i + 1][1])
        scales = self.scales(planned).reshape(batch, -1, K).repeat_interleave(HOP // SLICES, 1)
        out = self.head(self.norm(z)) + self.shortcut(features)
        return torch.cat((out[..., :2 * K], scales + OWN * torch.tanh(out[..., 2 * K:] / OWN)), -1)

    def loss(self, x, codes, features, plan, forecasts, units, low, high):
        """Negative log-likelihood of bins under a mixture of logistics around the forecasts."""
        weights, means, scales = self(x, codes, features, plan).chunk(3, -1)
        units = units.repeat_interleave(COMPONENTS, -1)
        mean = forecasts.repeat_interleave(COMPONENTS, -1) + units * 4 * torch.tanh(means / 4)
        scale = units * (2.5 * torch.tanh(scales / 2.5)).exp()
        a, b = (low[..., None] - mean) / scale, (high[..., None] - mean) / scale
        mass = F.logsigmoid(b) + F.logsigmoid(-a) + torch.log(-torch.expm1((a - b).clamp(max=-1e-6)))
        return -torch.logsumexp(F.log_softmax(weights, -1) + mass, -1).mean()

    def draw(self, n):
        time_ = WAVE_FRAMES * HOP
        codes = lambda length: torch.randint(LEVELS, (n, length))
        low = torch.rand(n, time_) * 1.8 - 0.9
        return (codes(64 + time_), (codes(time_), codes(time_)), torch.randn(n, time_, FEATURES), torch.randn(n, WAVE_FRAMES + 2, BANDS),
                low[..., None] + 0.05 * torch.randn(n, time_, FORECASTS), torch.full((n, time_, FORECASTS), 0.05), low, low + 0.02)


class Plan(nn.Module):
    def __init__(self, plan, **_):
        super().__init__()
        dim, layers, heads = plan
        tables = lambda n: nn.ModuleList(nn.Embedding(ENTRIES, dim) for _ in range(n))
        self.embeddings, self.given, self.bands = tables(CODEBOOKS), tables(CODEBOOKS - 1), nn.Linear(BANDS, dim)
        self.blocks, self.norm = nn.ModuleList(Block(dim, heads, WINDOW) for _ in range(layers)), Norm(dim)
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, ENTRIES)) for _ in range(CODEBOOKS))

    def loss(self, codes, bands):
        now, following = codes[:, :-1], codes[:, 1:]
        x = 0.5 * sum(table(now[..., q]) for q, table in enumerate(self.embeddings)) + self.bands(bands[:, :-1])
        x = F.dropout(x, DROPOUT)
        for block in self.blocks:
            x = block(x)
        hidden, total = self.norm(x), 0.0
        for q, head in enumerate(self.heads):
            if q > 0:
                hidden = hidden + self.given[q - 1](following[..., q - 1])
            total = total + F.cross_entropy(head(hidden).flatten(0, 1), following[..., q].flatten())
        return total

    def draw(self, n):
        return torch.randint(ENTRIES, (n, PLAN_FRAMES, CODEBOOKS)), torch.randn(n, PLAN_FRAMES, BANDS)


def measure(part, args):
    model = {"wave": Wave, "plan": Plan}[part](**PRESETS[args.preset])
    batch, units = {"wave": (WAVE_BATCH, WAVE_FRAMES * HOP), "plan": (PLAN_BATCH, PLAN_FRAMES)}[part]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    walls, cpus = [], []
    gpu, at_once, warm_up = args.device == "cuda", 1, 1
    loss = model.loss
    if gpu:
        batch = at_once = args.batch or batch
        loss, warm_up = torch.compile(loss, dynamic=False), 3
    for _ in range(args.rounds + warm_up):
        begun, cpu = time.perf_counter(), sum(os.times()[:2])
        optimizer.zero_grad(set_to_none=True)
        for _ in range(batch // at_once):
            with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
                value = loss(*model.draw(at_once)) * at_once / batch
            value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - begun)
        cpus.append(sum(os.times()[:2]) - cpu)
    walls, cpus = walls[warm_up:], cpus[warm_up:]
    spread = lambda values: {"median": statistics.median(values), "least": min(values), "most": max(values)}
    print(json.dumps({
        "peer": f"torch {torch.__version__}, " + ("compiled bf16" if gpu else "eager f32"), "batch": batch, "part": part, "preset": args.preset, "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()), "load": os.getloadavg()[0],
        "units_per_s": spread([batch * units / wall for wall in walls]),
        "cpu_us": spread([1e6 * cpu / units / batch for cpu in cpus]),
    }), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=["wave", "plan"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int)
    args = parser.parse_args()
    if args.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("nothing measured: no CUDA device")
        torch.set_default_device("cuda")
        torch.set_float32_matmul_precision("high")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for part in [args.part] if args.part else ["wave", "plan"]:
        measure(part, args)


main()
