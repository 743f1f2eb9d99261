//! Turns the machine into the figures that a bench stands beside: its name, its peaks, the memory of this process.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use wavegen::rng::Rng;
use wavegen::simd::panels::{PanelsF32, PanelsI8};
use wavegen::simd::{Isa, Kernels};

/// Inputs and outputs of the probes' matrices: 192 KiB in 8 bits, 256 KiB in 32, so that they lie in any level-2 cache.
const I8_SHAPE: (usize, usize) = (256, 768);
const F32_SHAPE: (usize, usize) = (128, 512);
/// Bytes that the bandwidth probe reads: more than caches hold.
const STREAM_BYTES: usize = 256 << 20;
/// What the system counts processor time in, seconds.
pub const TICK_S: f64 = 0.01;
/// How long a probe looks for its best time.
const PROBE_TIME: Duration = Duration::from_millis(100);

/// What everything was measured on.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name as the system gives it.
    pub cpu: String,
    pub cores: usize,
    /// Processes that wanted to run, on average over the last minute; other work than ours makes figures worse.
    pub load: Option<f64>,
    /// One core reading memory in order, GB/s.
    pub bandwidth_gb_s: f64,
    pub peaks: Vec<Peak>,
}

/// The most that our kernels do on one core, one vector at a time, weights in the level-2 cache, 10^9 multiply-adds/s.
#[derive(Clone, Debug, Serialize)]
pub struct Peak {
    pub isa: &'static str,
    pub int8_gmac_s: f64,
    pub f32_gmac_s: f64,
}

impl Machine {
    /// Looks and measures, a few tenths of a second for each of `isas`.
    pub fn measure(isas: &[Isa]) -> Self {
        Self {
            cpu: cpu_name(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            load: proc_field("/proc/loadavg", |text| text.split(' ').next()?.parse().ok()),
            bandwidth_gb_s: bandwidth_gb_s(),
            peaks: isas.iter().filter_map(|&isa| Kernels::of(isa)).map(peak).collect(),
        }
    }

    /// The peak that a case is held against.
    pub fn peak(&self, isa: Isa, int8: bool) -> Option<f64> {
        let peak = self.peaks.iter().find(|peak| peak.isa == isa.name())?;
        Some(if int8 { peak.int8_gmac_s } else { peak.f32_gmac_s })
    }
}

fn proc_field<T>(path: &str, find: impl Fn(&str) -> Option<T>) -> Option<T> {
    find(&std::fs::read_to_string(path).ok()?)
}

fn cpu_name() -> String {
    let find = |text: &str| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    proc_field("/proc/cpuinfo", find).unwrap_or_else(|| format!("unknown {}", std::env::consts::ARCH))
}

/// Processor time of this process so far, of all threads, in seconds, a multiple of [`TICK_S`]; `None` where the system does not say.
pub fn cpu_seconds() -> Option<f64> {
    let find = |text: &str| {
        // Fields 14 and 15: user and system; the second, a name in brackets, may hold anything.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
    };
    Some(proc_field("/proc/self/stat", find)? as f64 * TICK_S)
}

/// Products of square matrices by candle, 10^9 multiply-adds/s: on a CPU of matrices that lie in the caches, with as many threads as
/// the caller's pool has.
pub fn gemm_gmac_s(device: &Device, element: DType) -> candle_core::Result<f64> {
    let size: usize = if device.is_cpu() { 512 } else { 4096 };
    let mut rng = Rng::new(1);
    let mut matrix = || {
        let values = (0..size * size).map(|_| rng.normal());
        Tensor::from_iter(values, device)?.reshape((size, size))?.to_dtype(element)
    };
    let (a, b) = (matrix()?, matrix()?);
    a.matmul(&b)?;
    device.synchronize()?;
    let seconds = fastest(|| {
        black_box(a.matmul(&b).and_then(|_| device.synchronize()).ok());
    });
    Ok(size.pow(3) as f64 / seconds / 1e9)
}

/// Seconds of the fastest of as many calls as fit in [`PROBE_TIME`], at least three.
fn fastest(mut call: impl FnMut()) -> f64 {
    let (begun, mut best, mut calls) = (Instant::now(), f64::INFINITY, 0);
    while calls < 3 || begun.elapsed() < PROBE_TIME {
        let start = Instant::now();
        call();
        best = best.min(start.elapsed().as_secs_f64());
        calls += 1;
    }
    best
}

fn bandwidth_gb_s() -> f64 {
    let numbers: Vec<u64> = (0..STREAM_BYTES as u64 / 8).collect();
    let seconds = fastest(|| {
        let (blocks, _) = numbers.as_chunks::<16>();
        let mut sums = [0u64; 16];
        for block in blocks {
            sums.iter_mut().zip(block).for_each(|(sum, x)| *sum = sum.wrapping_add(*x));
        }
        black_box(sums);
    });
    STREAM_BYTES as f64 / seconds / 1e9
}

fn peak(kernels: &'static Kernels) -> Peak {
    // Calls per timing, so that the clock does not count.
    const CALLS: usize = 32;
    let mut rng = Rng::new(1);
    let mut numbers = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.normal()).collect() };
    let gmac_s = |(n_in, n_out): (usize, usize), seconds: f64| (CALLS * n_in * n_out) as f64 / seconds / 1e9;

    let (n_in, n_out) = I8_SHAPE;
    let weights = PanelsI8::pack(&numbers(n_in * n_out), n_out);
    let mut input = vec![0; n_in];
    let scale = (kernels.quantize)(&numbers(n_in), &mut input);
    let mut out = vec![0.0; n_out];
    let int8 = fastest(|| {
        for _ in 0..CALLS {
            (kernels.gemm_i8)(&weights, black_box(&input), &[scale], &mut out);
            black_box(&out);
        }
    });
    let (n_in, n_out) = F32_SHAPE;
    let weights = PanelsF32::pack(&numbers(n_in * n_out), n_out);
    let input = numbers(n_in);
    let mut out = vec![0.0; n_out];
    let f32 = fastest(|| {
        for _ in 0..CALLS {
            (kernels.gemm_f32)(&weights, black_box(&input), &[1.0], &mut out);
            black_box(&out);
        }
    });
    Peak { isa: kernels.isa.name(), int8_gmac_s: gmac_s(I8_SHAPE, int8), f32_gmac_s: gmac_s(F32_SHAPE, f32) }
}
