"""python make_golden.py REFERENCE_DIR: writes signals.safetensors and head.safetensors beside this script.

REFERENCE_DIR holds signals.py, forecast.c and model.py, the torch experiment that the maths here is ported from.
Needs numpy, torch and gcc. Every array is little-endian; shapes and meanings stand in tests/golden.rs."""
import json, os, sys
import numpy as np, torch

sys.path.insert(0, sys.argv[1])
import model as M, signals as S

HERE = os.path.dirname(os.path.abspath(__file__))
N = 12 * S.HOP

def save(name, arrays):
    kinds = {'float32': 'F32', 'uint16': 'U16'}
    header, data = {}, b''
    for key, a in arrays.items():
        a = np.ascontiguousarray(a)
        header[key] = dict(dtype=kinds[a.dtype.name], shape=a.shape, data_offsets=[len(data), len(data) + a.nbytes])
        data += a.tobytes()
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(os.path.join(HERE, name), 'wb') as f: f.write(len(text).to_bytes(8, 'little') + text + data)

def chord(rng):
    """silence, a chord that rings out, and a second one into its tail, over a little noise"""
    t = np.arange(N) / S.SAMPLE_RATE; x = 0.001 * rng.normal(size=N)
    for start, notes in ((0.02, (220.0, 277.2, 329.6)), (0.22, (146.8, 440.0))):
        for f in notes:
            for k in range(1, 9):
                s = np.maximum(t - start, 0)
                x += 0.12 / k * np.exp(-3 * k ** 0.5 * s) * np.sin(2 * np.pi * k * f * s)
    return x.astype(np.float32)

rng = np.random.default_rng(3)
codes = S.encode(chord(rng)); plan = S.plan(codes)
both, scale = S.forecasts(codes, plan)
S.ORDER = 512; S._LAG = np.exp(-0.5 * (2 * np.pi * 1 / S.SAMPLE_RATE * np.arange(S.ORDER + 1)) ** 2)
sharp, sharp_scale = S.forecasts(codes, plan)
save('signals.safetensors', dict(tokens=codes.astype(np.uint16), plan=plan, past=both[:, 0], planned=both[:, 1], log_scale=scale[::S.HOP],
                                 planned_sharp=sharp[:, 1], log_scale_sharp=sharp_scale[::S.HOP]))

rows = rng.choice(N, 96, replace=False); p, s = torch.from_numpy(both[rows]), torch.from_numpy(scale[rows])
head = torch.from_numpy((rng.normal(size=(len(rows), 3 * M.K)) * rng.choice([0.3, 1, 4], size=(len(rows), 1))).astype(np.float32))
x = codes[rows].astype(np.int64); x[:8] = rng.integers(0, 256, 8); x[8], x[9] = 0, 255; x = torch.from_numpy(x)
w, m, z = M.mixture(head, p, s)
save('head.safetensors', dict(head=head.numpy(), forecasts=p.numpy(), log_scale=s.numpy(), tokens=x.numpy().astype(np.uint16),
                              log_weights=w.numpy(), means=m.numpy(), scales=z.numpy(), nll=M.nll(head, p, s, x).numpy()))
