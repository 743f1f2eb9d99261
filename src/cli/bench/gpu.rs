//! `wavegen bench kernels` and `wavegen bench decode --engine cuda` (`bench train --device cuda` is in `train.rs`): turns a GPU's time into figures beside its own peaks.
//!
//! Checked first, then warmed up, then medians and ranges over rounds. Without a GPU there is nothing to measure, which is no
//! failure unless `WAVEGEN_REQUIRE_CUDA=1`.

use anyhow::Result;

use super::super::Outcome;
use super::super::common::{ModelArgs, Talk};
use super::super::engine::{cuda_is_required, gpu};

/// How fast the training kernels are on a GPU, beside its copies and matrix products
#[derive(clap::Args)]
pub struct Args {
    /// Rounds; figures are medians over them
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    #[command(flatten)]
    talk: Talk,
}

/// What to measure of generation.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub struct Generation<'a> {
    pub model: &'a ModelArgs,
    /// Streams that are played together.
    pub batches: Option<&'a [u16]>,
    pub rounds: u16,
    pub talk: &'a Talk,
}

/// `measure` on the GPU, or the reason why there is none.
macro_rules! on_gpu {
    ($talk:expr, |$gpu:ident| $measure:expr) => {
        match gpu() {
            #[cfg(feature = "cuda")]
            Ok($gpu) => $measure,
            #[cfg(not(feature = "cuda"))]
            Ok(never) => match never {},
            Err(e) => nothing_measured(&$talk, e),
        }
    };
}

/// Says why there is no GPU.
///
/// # Errors
/// Where there has to be one.
pub fn nothing_measured(talk: &Talk, why: anyhow::Error) -> Result<Outcome> {
    if cuda_is_required() {
        return Err(why);
    }
    talk.note(&format!("nothing measured: {why:#}"));
    talk.json(&serde_json::json!({ "measured": false, "reason": format!("{why:#}") }), false)?;
    Ok(Outcome::Done)
}

pub fn kernels(args: &Args) -> Result<Outcome> {
    on_gpu!(args.talk, |gpu| measured::kernels(args, &gpu))
}

pub fn generation(args: &Generation) -> Result<Outcome> {
    on_gpu!(args.talk, |gpu| measured::generation(args, gpu))
}

#[cfg(feature = "cuda")]
mod measured {
    use std::sync::Arc;
    use std::time::Instant;

    use anyhow::{Context, Result};
    use candle_core::{D, DType, Device, Tensor, Var};
    use serde::Serialize;
    use wavegen::checkpoint::Checkpoint;
    use wavegen::codec::Token;
    use wavegen::cuda::launch::{DecodeGeometry, Element, GROUP_SIZES};
    use wavegen::cuda::{Gpu, attention_window, device};
    use wavegen::engine::UNIFORMS_PER_SAMPLE;
    use wavegen::engine::cpu::{CpuEngine, CpuOptions, Precision};
    use wavegen::engine::cuda::{CudaEngine, MachineError, Model, Plan, Sampling, Streams, Wave};
    use wavegen::model::config::ModelConfig;
    use wavegen::rng::{Kind, uniform};
    use wavegen::sampler::PlanSampling;

    use super::super::super::Outcome;
    use super::super::super::check::{Distance, chords, costs};
    use super::super::super::common::print;
    use super::{Args, Generation};

    /// Excerpts of a training step, and samples of each.
    const BATCH: usize = 16;
    const EXCERPT: usize = 16_384;
    /// Elements of the probes' matrices' side, and bytes that the copy probe reads.
    const SIDE: usize = 8192;
    const COPIED: usize = 1 << 30;
    /// Streams played together.
    const STREAMS: [u16; 4] = [1, 16, 256, 2048];
    /// Samples that a launch plays, all streams together, at least a frame of each.
    const LAUNCH: usize = 1 << 17;
    /// Most that distributions may differ from the CPU engine's, mean absolute bits per sample.
    const MOST_F32_BITS: f64 = 0.002;
    const MOST_BF16_BITS: f64 = 0.1;

    /// Seconds: median, least, most.
    #[derive(Clone, Copy, Serialize)]
    struct Seconds {
        median: f64,
        least: f64,
        most: f64,
    }

    /// Times of `rounds` calls after two that warm up; `call` returns when its work is done.
    fn timed(rounds: u16, mut call: impl FnMut() -> Result<()>) -> Result<Seconds> {
        let mut times = Vec::new();
        for round in 0..rounds + 2 {
            let begun = Instant::now();
            call()?;
            if round >= 2 {
                times.push(begun.elapsed().as_secs_f64());
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(Seconds { median: times[times.len() / 2], least: times[0], most: times[times.len() - 1] })
    }

    #[derive(Serialize)]
    struct Peaks {
        gpu: String,
        /// Device to device, bytes read plus bytes written.
        copy_gb_s: f64,
        /// A product of bf16 matrices on random numbers.
        gemm_tflop_s: f64,
    }

    fn peaks(gpu: &Gpu, device: &Device, rounds: u16) -> Result<Peaks> {
        let from = Tensor::rand(0f32, 1f32, COPIED / 4, device)?;
        let copy = timed(rounds, || {
            from.copy()?;
            Ok(device.synchronize()?)
        })?;
        let matrix = || Tensor::randn(0f32, 1f32, (SIDE, SIDE), device)?.to_dtype(DType::BF16);
        let (a, b) = (matrix()?, matrix()?);
        let gemm = timed(rounds, || {
            a.matmul(&b)?;
            Ok(device.synchronize()?)
        })?;
        Ok(Peaks {
            gpu: gpu.name().to_owned(),
            copy_gb_s: 2.0 * COPIED as f64 / copy.median / 1e9,
            gemm_tflop_s: 2.0 * (SIDE as f64).powi(3) / gemm.median / 1e12,
        })
    }

    #[derive(Serialize)]
    struct Attention {
        tier: usize,
        element: &'static str,
        /// batch, heads, len, head_dim, window
        shape: [usize; 5],
        forward: Seconds,
        forward_backward: Seconds,
        /// Of the scores that are needed, against the time of forward and backward.
        tflop_s: f64,
        /// Of the time that the copies' rate would need for inputs and outputs of both passes.
        of_copy: f64,
        /// Greatest differences from the definition, on a short excerpt: of the result, and of the gradients of q, k and v.
        differences: [f32; 4],
        passed: bool,
    }

    /// softmax(q k^T / sqrt(d)) v under a window, by candle's own operations in f32.
    fn definition(q: &Tensor, k: &Tensor, v: &Tensor, window: usize) -> candle_core::Result<Tensor> {
        let (_, _, len, head_dim) = q.dims4()?;
        let sees = |i: usize, j: usize| j <= i && j + window > i;
        let mask = (0..len * len).map(|at| if sees(at / len, at % len) { 0.0f32 } else { -1e9 }).collect();
        let mask = Tensor::from_vec(mask, (len, len), q.device())?;
        let scores = (q.matmul(&k.t()?)? / (head_dim as f64).sqrt())?.broadcast_add(&mask)?;
        candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(v)
    }

    /// As a product: candle sums with a single block. `weights` is `[elements of x, 1]`.
    fn weighted_sum(x: &Tensor, weights: &Tensor) -> candle_core::Result<Tensor> {
        x.reshape((1, x.elem_count()))?.matmul(weights)
    }

    /// `result`, and the gradients of its weighted sum by `inputs`.
    fn with_gradients(result: Tensor, weights: &Tensor, inputs: &[Var; 3]) -> Result<[Tensor; 4]> {
        let gradients = weighted_sum(&result, weights)?.backward()?;
        let of = |input: &Var| gradients.get(input).cloned().context("an input has no gradient");
        let [dq, dk, dv] = inputs.each_ref().map(of);
        Ok([result, dq?, dk?, dv?])
    }

    fn attention(device: &Device, tier: usize, dtype: DType, rounds: u16, peaks: &Peaks) -> Result<Attention> {
        let config = ModelConfig::default();
        let c = &config.wave_transformer.tiers[tier];
        let (len, head_dim) = (EXCERPT / c.hop, c.dim / c.n_heads);
        let draw = |batch: usize, len: usize| -> candle_core::Result<Var> {
            Var::from_tensor(&Tensor::randn(0f32, 1f32, (batch, c.n_heads, len, head_dim), device)?.to_dtype(dtype)?)
        };
        let weights = |n: usize| Tensor::randn(0f32, 1f32, (n, 1), device)?.to_dtype(dtype);
        let short = 300.min(len);
        let inputs = [draw(1, short)?, draw(1, short)?, draw(1, short)?];
        let exact = |x: &Var| Var::from_tensor(&x.as_tensor().to_dtype(DType::F32)?);
        let exact_inputs = [exact(&inputs[0])?, exact(&inputs[1])?, exact(&inputs[2])?];
        let weights_short = weights(c.n_heads * short * head_dim)?;
        let [q, k, v] = &inputs;
        let got = with_gradients(attention_window(q, k, v, c.window)?, &weights_short, &inputs)?;
        let [q, k, v] = &exact_inputs;
        let expected =
            with_gradients(definition(q, k, v, c.window)?, &weights_short.to_dtype(DType::F32)?, &exact_inputs)?;
        let mut differences = [0.0; 4];
        for ((difference, got), expected) in differences.iter_mut().zip(got).zip(expected) {
            *difference = (got.to_dtype(DType::F32)? - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
        }
        let [q, k, v] = [draw(BATCH, len)?, draw(BATCH, len)?, draw(BATCH, len)?];
        let forward = timed(rounds, || {
            attention_window(&q, &k, &v, c.window)?;
            Ok(device.synchronize()?)
        })?;
        let n = BATCH * c.n_heads * len * head_dim;
        let weights = weights(n)?;
        let forward_backward = timed(rounds, || {
            weighted_sum(&attention_window(&q, &k, &v, c.window)?, &weights)?.backward()?;
            Ok(device.synchronize()?)
        })?;
        let values = n as f64;
        // Two products forward, five backward; q, k, v, o forward, and those, d_o and three gradients backward.
        let flops = 7.0 * 2.0 * values * c.window as f64;
        let bytes = 12.0 * values * dtype.size_in_bytes() as f64;
        Ok(Attention {
            tier,
            element: dtype.as_str(),
            shape: [BATCH, c.n_heads, len, head_dim, c.window],
            forward,
            forward_backward,
            tflop_s: flops / forward_backward.median / 1e12,
            of_copy: bytes / (peaks.copy_gb_s * 1e9) / forward_backward.median,
            differences,
            passed: differences.iter().all(|&d| d < if dtype == DType::F32 { 1e-4 } else { 0.05 }),
        })
    }

    pub fn kernels(args: &Args, gpu: &Gpu) -> Result<Outcome> {
        let device = device()?;
        let peaks = peaks(gpu, &device, args.rounds)?;
        let mut all = Vec::new();
        for tier in 0..ModelConfig::default().wave_transformer.tiers.len() {
            for dtype in [DType::BF16, DType::F32] {
                all.push(attention(&device, tier, dtype, args.rounds, &peaks)?);
            }
        }
        if !args.talk.json {
            print(&format!(
                "{}: copies {:.0} GB/s, bf16 products {:.0} TFLOP/s; medians of {}",
                peaks.gpu, peaks.copy_gb_s, peaks.gemm_tflop_s, args.rounds
            ))?;
            for a in &all {
                print(&format!(
                    "attention {:?} {:>4}: forward {:8.1} us, and backward {:8.1} us ({:.1} to {:.1}), {:6.2} TFLOP/s, {:.2} of \
                     the copies' rate, differs by {:.1e}, gradients by {:.1e}, {:.1e}, {:.1e}{}",
                    a.shape,
                    a.element,
                    1e6 * a.forward.median,
                    1e6 * a.forward_backward.median,
                    1e6 * a.forward_backward.least,
                    1e6 * a.forward_backward.most,
                    a.tflop_s,
                    a.of_copy,
                    a.differences[0],
                    a.differences[1],
                    a.differences[2],
                    a.differences[3],
                    if a.passed { "" } else { " FAILED" }
                ))?;
            }
        }
        let passed = all.iter().all(|a| a.passed);
        args.talk.json(&serde_json::json!({ "measured": true, "peaks": peaks, "attention": all }), false)?;
        Ok(if passed { Outcome::Done } else { Outcome::Failed })
    }

    #[derive(Serialize)]
    struct Case {
        model: String,
        element: &'static str,
        streams: usize,
        group_size: usize,
        overlapped: bool,
        /// Share of the wave transformer's weights in shared memory.
        resident: f64,
        /// All streams together.
        samples_per_s: f64,
        samples_per_s_range: [f64; 2],
        /// Of one stream.
        x_real_time: f64,
        streams_at_real_time: f64,
        /// Every stream plays what it plays alone; `None` for one.
        as_alone: Option<bool>,
    }

    #[derive(Serialize)]
    struct Check {
        model: String,
        element: &'static str,
        distance: Distance,
        passed: bool,
    }

    impl Check {
        fn line(&self) -> String {
            let verdict = if self.passed { "ok" } else { "FAILED" };
            let Distance { bits, mean_abs_bits } = self.distance;
            format!("{}, {}: {bits:+.5} bits, {mean_abs_bits:.5} absolute: {verdict}", self.model, self.element)
        }
    }

    impl Case {
        fn line(&self) -> String {
            format!(
                "{:<14} {:<4} {:>5} streams, groups of {}{}: {:>10.0} samples/s ({:.0} to {:.0}), {:7.2} x real time, {:8.1} \
                 streams at real time, {:3.0} % of the weights on chip{}",
                self.model,
                self.element,
                self.streams,
                self.group_size,
                if self.overlapped { ", overlapped" } else { "" },
                self.samples_per_s,
                self.samples_per_s_range[0],
                self.samples_per_s_range[1],
                self.x_real_time,
                self.streams_at_real_time,
                100.0 * self.resident,
                if self.as_alone == Some(false) { " NOT AS ALONE" } else { "" }
            )
        }
    }

    fn uniforms(streams: usize, kind: Kind, n: usize) -> Vec<f32> {
        (0..streams as u32).flat_map(|s| (0..n as u64).map(move |t| uniform(0, s, kind, t))).collect()
    }

    fn case(
        model: &Arc<Model<Gpu>>,
        element: &'static str,
        n: usize,
        geometry: DecodeGeometry,
        rounds: u16,
    ) -> Result<Case> {
        let config = &model.config;
        let (hop, books) = (config.plan.hop, config.plan.n_codebooks);
        let frames = (LAUNCH / hop / n).clamp(1, 32);
        let sampling = Sampling { plan: PlanSampling::default(), wave: model.generation };
        let mut streams = Streams::new(model.clone(), n, geometry)?;
        let plan = uniforms(n, Kind::Plan, frames * books);
        let wave = uniforms(n, Kind::Wave, frames * hop * UNIFORMS_PER_SAMPLE);
        let played = streams.play(frames, Plan::Draw(&plan), Wave::Draw(&wave), &sampling)?;
        let as_alone = (n > 1)
            .then(|| -> Result<bool> {
                let mut same = true;
                for stream in [0, n / 2, n - 1] {
                    let mut one = Streams::new(model.clone(), 1, model.geometry(1))?;
                    let (plan, wave) = (plan.chunks(frames * books), wave.chunks(frames * hop * UNIFORMS_PER_SAMPLE));
                    let (Some(plan), Some(wave)) = (plan.clone().nth(stream), wave.clone().nth(stream)) else {
                        continue;
                    };
                    let alone = one.play(frames, Plan::Draw(plan), Wave::Draw(wave), &sampling)?;
                    same &= played.tokens.chunks(frames * hop).nth(stream) == Some(&alone.tokens[..]);
                }
                Ok(same)
            })
            .transpose()?;
        let time = timed(rounds, || {
            streams.play(frames, Plan::Draw(&plan), Wave::Draw(&wave), &sampling)?;
            Ok(())
        })?;
        let samples = (n * frames * hop) as f64;
        let x_real_time = samples / time.median / n as f64 / f64::from(config.codec.sample_rate);
        Ok(Case {
            model: config.name.clone(),
            element,
            streams: n,
            group_size: geometry.group_size,
            overlapped: geometry.overlapped,
            resident: streams.resident(),
            samples_per_s: samples / time.median,
            samples_per_s_range: [samples / time.most, samples / time.least],
            x_real_time,
            streams_at_real_time: x_real_time * n as f64,
            as_alone,
        })
    }

    fn is_out_of_memory(error: &anyhow::Error) -> bool {
        error.chain().any(|e| matches!(e.downcast_ref(), Some(MachineError::Memory { .. })))
    }

    pub fn generation(args: &Generation, gpu: Arc<Gpu>) -> Result<Outcome> {
        let base = ModelConfig::preset("base").context("the preset base")?;
        let base = Checkpoint::untrained(ModelConfig { name: "base, random".into(), ..base }, 1)?;
        let peaks = peaks(&gpu, &device()?, args.rounds)?;
        // Told as they come: some take a while.
        let tell = |line: String| {
            if args.talk.json {
                args.talk.note(&line);
                return Ok(());
            }
            print(&line)
        };
        tell(format!(
            "{}: copies {:.0} GB/s, bf16 products {:.0} TFLOP/s; medians of {}",
            peaks.gpu, peaks.copy_gb_s, peaks.gemm_tflop_s, args.rounds
        ))?;
        let batches = args.batches.unwrap_or(&STREAMS);
        let (mut checks, mut cases, mut failures): (Vec<Check>, Vec<Case>, Vec<String>) = Default::default();
        for checkpoint in [args.model.load()?, base] {
            let config = &checkpoint.config;
            let tokens: Vec<Token> = chords(&config.codec, 32 * config.plan.hop);
            let options = CpuOptions { precision: Precision::F32, ..CpuOptions::default() };
            let exact = costs(&mut CpuEngine::new(&checkpoint, &options)?, &tokens)?;
            for (element, name, most) in [(Element::F32, "f32", MOST_F32_BITS), (Element::Bf16, "bf16", MOST_BF16_BITS)]
            {
                let model = Arc::new(Model::new(gpu.clone(), &checkpoint, element)?);
                let mut engine = CudaEngine::over(model.clone(), model.geometry(1))?;
                let distance = Distance::between(&exact, &costs(&mut engine, &tokens)?);
                let passed = distance.mean_abs_bits <= most;
                let check = Check { model: config.name.clone(), element: name, distance, passed };
                tell(check.line())?;
                checks.push(check);
                let mut measure = |n: usize, geometry: DecodeGeometry| -> Result<()> {
                    // A GPU without room for so many streams says so, and the others still count.
                    match case(&model, name, n, geometry, args.rounds) {
                        Ok(case) => {
                            tell(case.line())?;
                            cases.push(case);
                        }
                        Err(e) => {
                            let line = format!("{n} streams of {}: {e:#}", config.name);
                            args.talk.warn(&line);
                            if !is_out_of_memory(&e) {
                                failures.push(line);
                            }
                        }
                    }
                    Ok(())
                };
                let one = model.geometry(1);
                let alone = DecodeGeometry { overlapped: false, group_size: 1, ..one };
                let shared = GROUP_SIZES.map(|group_size| DecodeGeometry { group_size, overlapped: true, ..one });
                for n in batches.iter().map(|&n| usize::from(n)) {
                    if n > 1 {
                        measure(n, model.geometry(n))?;
                    } else {
                        [alone].into_iter().chain(shared).try_for_each(|geometry| measure(1, geometry))?;
                    }
                }
            }
        }
        let measured = !cases.is_empty();
        let held = checks.iter().all(|c| c.passed) && cases.iter().all(|c| c.as_alone != Some(false));
        let passed = measured && held && failures.is_empty();
        let report = serde_json::json!({
            "measured": measured, "peaks": peaks, "checks": checks, "cases": cases, "failures": failures
        });
        args.talk.json(&report, false)?;
        Ok(if passed { Outcome::Done } else { Outcome::Failed })
    }
}
