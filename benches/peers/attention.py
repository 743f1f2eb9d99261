"""What torch does with the attention shapes of `wavegen bench kernels`: scaled_dot_product_attention under a banded mask and
flex_attention under a sliding window (compiled), forward, and forward with backward. One JSON object per line on stdout."""

import functools
import json
import statistics
import sys
import time

try:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError as reason:
    sys.exit(f"nothing measured: {reason}")

BATCH, EXCERPT, ROUNDS = 16, 16_384, 20
# hop, heads, head_dim, window of the default tiers (src/model/config.rs)
TIERS = [(64, 4, 64, 128), (8, 3, 64, 128), (1, 2, 48, 32)]


def timed(call):
    """Seconds: median, least, most of ROUNDS calls after three that warm up."""
    times = []
    for _ in range(ROUNDS + 3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    times = sorted(times[3:])
    return {"median": statistics.median(times), "least": times[0], "most": times[-1]}


def masked(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def measure(name, attend, shape, window, dtype, expected):
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    weights = torch.randn(shape, device="cuda", dtype=dtype)

    def both():
        q.grad = k.grad = v.grad = None
        (attend(q, k, v) * weights).sum().backward()

    with torch.no_grad():
        got = attend(*(x[:1] for x in expected[0])).float()
        error = ((got - expected[1]).norm() / expected[1].norm()).item()
        forward = timed(lambda: attend(q, k, v))
    print(json.dumps({
        "peer": name, "shape": [*shape, window], "dtype": str(dtype).removeprefix("torch."), "relative_error": error,
        "passed": error < (1e-2 if dtype == torch.bfloat16 else 3e-3), "forward": forward, "forward_backward": timed(both),
    }), flush=True)


def main():
    if not torch.cuda.is_available():
        print("nothing measured: no CUDA device", file=sys.stderr)
        return
    torch.manual_seed(0)
    # Beyond the limit of 8 it would quietly run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(flex_attention, dynamic=False)
    for hop, heads, head_dim, window in TIERS:
        length = EXCERPT // hop
        shape = (BATCH, heads, length, head_dim)
        at = torch.arange(length, device="cuda")
        block_mask = create_block_mask(
            lambda b, h, i, j: (j <= i) & (i - j < window), None, None, length, length, device="cuda")
        for dtype in (torch.bfloat16, torch.float32):
            parts = [torch.randn((1, *shape[1:]), device="cuda", dtype=dtype) for _ in range(3)]
            # The definition, in chunks of queries so that the scores of a long excerpt fit.
            q, k, v = (x.double() for x in parts)
            rows = []
            for first in range(0, length, 1024):
                low, end = max(0, first - window), min(length, first + 1024)
                scores = q[:, :, first:end] @ k[:, :, low:end].transpose(-1, -2) / head_dim**0.5
                i, j = at[first:end, None], at[None, low:end]
                rows.append(scores.masked_fill((j > i) | (i - j >= window), -torch.inf).softmax(-1) @ v[:, :, low:end])
            expected = (parts, torch.cat(rows, 2).float())
            measure("flex_attention", functools.partial(compiled, block_mask=block_mask), shape, window, dtype, expected)
            if length <= 4096:
                mask = (at[None] <= at[:, None]) & (at[:, None] - at[None] < window)
                measure("sdpa", functools.partial(masked, mask=mask), shape, window, dtype, expected)


main()
