"""What torch.compile with CUDA graphs does with the wave transformer's steps of the preset `base`: the same blocks with ring
caches at batch B, random weights in bf16, without forecasts, plan and draws, so it is less work than `wavegen bench decode --engine
cuda` does. One JSON object per line on stdout: microseconds per step of each tier, and of a sample (each tier's step over its hop)."""

import json
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as F
except ImportError as reason:
    sys.exit(f"nothing measured: {reason}")

# hop, dim, layers, heads, window, inputs of the default tiers (src/model/config.rs)
TIERS = [(64, 256, 4, 4, 128, 64 * 18), (8, 160, 3, 5, 128, 8 * 18), (1, 96, 2, 2, 32, 8 * 18)]
BATCHES, STEPS, ROUNDS = (1, 16, 256, 2048), 100, 7


class Tier(torch.nn.Module):
    """One step of a tier: inputs [B, inputs] -> [B, dim]; keys and values of the last `window` steps lie in rings."""

    def __init__(self, batch, dim, layers, heads, window, inputs):
        super().__init__()
        def matrix(*shape):
            return torch.nn.Parameter(torch.randn(shape) * shape[0] ** -0.5, requires_grad=False)

        self.heads, self.window = heads, window
        self.input = matrix(inputs, dim)
        self.blocks = torch.nn.ModuleList()
        for _ in range(layers):
            block = torch.nn.Module()
            block.qkv, block.out = matrix(dim, 3 * dim), matrix(dim, dim)
            block.up, block.down = matrix(dim, 6 * dim), matrix(3 * dim, dim)
            for ring in ("keys", "values"):
                block.register_buffer(ring, torch.randn(batch, heads, window, dim // heads))
            self.blocks.append(block)
        self.register_buffer("turn", torch.randn(2, dim // heads // 2))

    def rotate(self, x):
        x = F.rms_norm(x, x.shape[-1:])
        a, b = x.chunk(2, -1)
        cos, sin = self.turn
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def forward(self, inputs, slot):
        x = inputs @ self.input
        for block in self.blocks:
            qkv = F.rms_norm(x, x.shape[-1:]) @ block.qkv
            q, k, v = qkv.view(len(x), 3, self.heads, 1, -1).unbind(1)
            block.keys.index_copy_(2, slot, self.rotate(k))
            block.values.index_copy_(2, slot, v)
            attended = F.scaled_dot_product_attention(self.rotate(q), block.keys, block.values)
            x = x + attended.reshape(x.shape) @ block.out
            gate, value = (F.rms_norm(x, x.shape[-1:]) @ block.up).chunk(2, -1)
            x = x + (F.silu(gate) * value) @ block.down
        return x


def measure(batch):
    tiers = []
    for hop, *sizes, inputs in TIERS:
        tier = Tier(batch, *sizes, inputs).to("cuda", torch.bfloat16)
        x = torch.randn(batch, inputs, device="cuda", dtype=torch.bfloat16)
        slot = torch.zeros(1, device="cuda", dtype=torch.long)
        expected = tier(x, slot)
        step = torch.compile(tier, dynamic=False)
        for _ in range(3):
            got = step(x, slot)
        error = ((got - expected).float().norm() / expected.float().norm()).item()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(x, slot)
        times = []
        for _ in range(ROUNDS + 2):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(STEPS):
                graph.replay()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begun) / STEPS * 1e6)
        times = sorted(times[2:])
        tiers.append({"hop": hop, "us": statistics.median(times), "least": times[0], "most": times[-1], "relative_error": error})
    sample_us = sum(tier["us"] / tier["hop"] for tier in tiers)
    print(json.dumps({
        "peer": "torch.compile + CUDA graph", "streams": batch, "tiers": tiers, "sample_us": sample_us,
        "samples_per_s": batch / sample_us * 1e6, "streams_at_real_time": batch / sample_us * 1e6 / 16_000,
        "passed": all(tier["relative_error"] < 2e-2 for tier in tiers),
    }), flush=True)


def main():
    if not torch.cuda.is_available():
        print("nothing measured: no CUDA device", file=sys.stderr)
        return
    torch.manual_seed(0)
    with torch.no_grad():
        for batch in BATCHES:
            measure(batch)


main()
