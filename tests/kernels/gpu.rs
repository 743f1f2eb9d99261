//! Runs launches on the machine's GPU, and the tensor operations built on them.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Instant;

use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::{D, DType, Device, Tensor, Var};
use wavegen::codec::N_CODES;
use wavegen::cuda::kernels::Kernels;
use wavegen::cuda::{GpuForecaster, attention_window};
use wavegen::forecast::{CpuForecaster, ForecastConfig, Forecaster, Forecasts};
use wavegen::model::Model;
use wavegen::model::config::ModelConfig;
use wavegen::model::features::{N_FEATURES, N_TOKEN_VALUES};
use wavegen::model::head::{self, Targets};
use wavegen::model::ops::Inner;
use wavegen::model::params::Params;
use wavegen::model::plan_transformer::is_fitted;
use wavegen::model::wave_transformer::{PLAN_FRAMES, WaveInputs};
use wavegen::plan::Spectrum;
use wavegen::rng::Rng;
use wavegen::train::optimizer::AdamW;

use crate::forecast::{Excerpt, compare, excerpt};
use crate::launch::Launch;

/// What a kernel takes.
pub trait Args: Copy + DeviceRepr {}
impl<A: Copy + DeviceRepr> Args for A {}

fn device() -> Option<&'static Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| match wavegen::cuda::device() {
        Ok(device) => Some(device),
        Err(e) if std::env::var_os("WAVEGEN_REQUIRE_CUDA").is_some_and(|v| v == "1") => panic!("{e}"),
        Err(e) => {
            println!("no test runs on a GPU: {e}");
            None
        }
    });
    device.as_ref()
}

pub fn is_there() -> bool {
    device().is_some()
}

/// As `Emulator::run`.
pub fn run<A: Args>(launch: &Launch, args: &A, n_pointers: u32, buffers: &mut [Vec<u8>]) -> Result<(), String> {
    let Some(Device::Cuda(device)) = device() else { return Err("no GPU".to_string()) };
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let kernels = Kernels::of(device).map_err(|e| text(&e))?;
    let stream = kernels.stream();
    let mut on_device = Vec::with_capacity(buffers.len());
    for buffer in buffers.iter() {
        on_device.push(device.clone_htod(buffer).map_err(|e| text(&e))?);
    }
    let mut args = *args;
    // SAFETY: each of these structs begins with `n_pointers` addresses, as u64.
    let pointers =
        unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(&mut args).cast::<u64>(), n_pointers as usize) };
    for pointer in pointers.iter_mut().filter(|pointer| **pointer != 0) {
        *pointer = on_device[*pointer as usize - 1].device_ptr_mut(stream).0;
    }
    // SAFETY: the addresses are those of buffers that live until they have been read back below.
    unsafe { kernels.launch(launch, &args) }.map_err(|e| text(&e))?;
    for (buffer, on_device) in buffers.iter_mut().zip(&on_device) {
        debug_assert_eq!(on_device.device_ptr(stream).0 % 16, 0);
        *buffer = device.clone_dtoh(on_device).map_err(|e| text(&e))?;
    }
    Ok(())
}

/// softmax(q k^T / sqrt(d)) v under a mask, by candle's own operations.
fn plain(q: &Tensor, k: &Tensor, v: &Tensor, window: usize) -> candle_core::Result<Tensor> {
    let (_, n_heads, len, head_dim) = q.dims4()?;
    let n_kv_heads = k.dim(1)?;
    let all_heads = |t: &Tensor| {
        let heads: Vec<u32> = (0..n_heads).map(|head| (head / (n_heads / n_kv_heads)) as u32).collect();
        t.index_select(&Tensor::from_vec(heads, n_heads, t.device())?, 1)
    };
    let sees = |i: usize, j: usize| j <= i && j + window > i;
    let mask = (0..len * len).map(|at| if sees(at / len, at % len) { 0.0f32 } else { -1e9 }).collect();
    let mask = Tensor::from_vec(mask, (len, len), q.device())?;
    let scores = (q.matmul(&all_heads(k)?.t()?)? / (head_dim as f64).sqrt())?.broadcast_add(&mask)?;
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&all_heads(v)?)
}

#[test]
fn attention_of_tensors_has_the_gradients_of_plain_operations() {
    let Some(device) = device() else { return };
    let draw = |heads| Var::randn(0f32, 1f32, (2, heads, 150, 64), device).unwrap();
    let (q, k, v) = (draw(4), draw(2), draw(2));
    let weights = Tensor::randn(0f32, 1f32, q.shape(), device).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let gradients = |custom: bool| {
            let [q, k, v] = [&q, &k, &v]
                .map(|x| x.to_dtype(dtype).unwrap().to_dtype(if custom { dtype } else { DType::F32 }).unwrap());
            let o = if custom { attention_window(&q, &k, &v, 40) } else { plain(&q, &k, &v, 40) };
            let loss = (o.unwrap().to_dtype(DType::F32).unwrap() * &weights).unwrap().sum_all().unwrap();
            loss.backward().unwrap()
        };
        let (ours, plain) = (gradients(true), gradients(false));
        let tolerance = if dtype == DType::F32 { 1e-4 } else { 0.05 };
        for (name, x) in [("q", &q), ("k", &k), ("v", &v)] {
            let difference = (ours.get(x).unwrap() - plain.get(x).unwrap()).unwrap();
            let worst = difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(worst < tolerance, "{dtype:?}, gradient of {name}: off by {worst}");
        }
    }
}

#[test]
fn attention_on_the_cpu_is_refused() {
    let x = Tensor::zeros((1, 1, 4, 32), DType::F32, &Device::Cpu).unwrap();
    let error = attention_window(&x, &x, &x, 4).unwrap_err().to_string();
    assert!(error.contains("the tensors are on the CPU"), "{error}");
}

/// Bits per sample and per frame, and the gradients of all weights, of a model on `device`.
fn losses_and_gradients(config: &ModelConfig, device: &Device, inner: Inner) -> ([f32; 2], BTreeMap<String, Vec<f32>>) {
    let mut rng = Rng::new(3);
    let (n_bands, frames, batch) = (148, 4, 3);
    let time = frames * config.plan.hop;
    let mut params = Params::new(1).on(device, inner);
    let model = Model::new(&mut params, config, n_bands).unwrap();
    let vars = params.into_vars();
    let mut normal = |shape: &[usize]| {
        let values = (0..shape.iter().product()).map(|_| 0.1 * rng.normal()).collect();
        Tensor::from_vec(values, shape, device).unwrap()
    };
    for var in vars.values() {
        // Heads begin at zero, and no gradient passes them.
        var.set(&(var.as_tensor() + normal(var.dims())).unwrap()).unwrap();
    }
    let cpu = |tensor: Tensor| tensor.to_device(&Device::Cpu).unwrap();
    let features = cpu(normal(&[batch, time, N_FEATURES]));
    let token_values = cpu(normal(&[batch, model.wave.history() + time, N_TOKEN_VALUES]));
    let plan = cpu(normal(&[batch, PLAN_FRAMES - 1 + frames, n_bands]));
    let (plan_bands, dropout) = (normal(&[batch, 70, n_bands]), normal(&[batch, 69, config.plan_transformer.dim]));
    let mut codes = |shape: &[usize], below: usize| {
        let values = (0..shape.iter().product()).map(|_| rng.below(below) as u32).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let inputs = WaveInputs {
        token_codes: codes(&[batch, model.wave.history() + time], N_CODES),
        token_values,
        features,
        past_codes: codes(&[batch, time], N_CODES),
        residual_codes: codes(&[batch, time], N_CODES),
        plan,
    };
    let plan_tokens = codes(&[batch, 70, config.plan.n_codebooks], config.plan.n_entries);
    let mut targets = Targets::default();
    for _ in 0..batch * time {
        let forecasts = [0.3 * rng.uniform(), -0.2 * rng.uniform()];
        targets.push(rng.below(N_CODES) as u16, forecasts, -3.0, &config.codec);
    }
    let wave = head::nll(&model.wave.forward(&inputs).unwrap(), &targets).unwrap().mean_all().unwrap();
    let plan = model.plan.nll(&plan_tokens, &plan_bands, Some(&dropout)).unwrap().mean_all().unwrap();
    let gradients = (&wave + &plan).unwrap().backward().unwrap();
    let of = |var: &Var| gradients.get(var.as_tensor()).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let trained = vars.iter().filter(|(name, _)| !is_fitted(name));
    let gradients = trained.map(|(name, var)| (name.clone(), of(var))).collect();
    ([wave, plan].map(|loss| loss.to_scalar().unwrap()), gradients)
}

#[test]
fn models_on_the_gpu_have_the_losses_and_gradients_of_those_on_the_cpu() {
    let Some(device) = device() else { return };
    for preset in ["tiny", "base"] {
        let config = ModelConfig::preset(preset).unwrap();
        let (losses, gradients) = losses_and_gradients(&config, device, Inner::F32);
        let (expected_losses, expected) = losses_and_gradients(&config, &Device::Cpu, Inner::F32);
        for (a, b) in losses.iter().zip(expected_losses) {
            assert!((a / b - 1.0).abs() < 1e-5, "{preset}: {losses:?} for {expected_losses:?}");
        }
        for (name, expected) in &expected {
            let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            for (a, b) in gradients[name].iter().zip(expected) {
                assert!((a - b).abs() <= 2e-3 * largest, "{preset}, {name}: {a} for {b}, the largest is {largest}");
            }
        }
        let again = losses_and_gradients(&config, device, Inner::F32);
        assert!(again == (losses, gradients), "{preset}: other bits the second time");
    }
}

#[test]
fn models_with_bf16_inside_differ_from_those_in_f32_by_its_rounding() {
    let Some(device) = device() else { return };
    for preset in ["tiny", "base"] {
        let config = ModelConfig::preset(preset).unwrap();
        let (losses, gradients) = losses_and_gradients(&config, device, Inner::Bf16);
        let (expected_losses, expected) = losses_and_gradients(&config, device, Inner::F32);
        for (a, b) in losses.iter().zip(expected_losses) {
            assert!((a / b - 1.0).abs() < 1e-2 && a != &b, "{preset}: {losses:?} for {expected_losses:?}");
        }
        for (name, expected) in &expected {
            let power = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>();
            let apart = power(&mut gradients[name].iter().zip(expected).map(|(a, b)| a - b));
            let off = (apart / power(&mut expected.iter().copied())).sqrt();
            assert!(off < 0.05, "{preset}, {name}: {off} of its size");
        }
        let again = losses_and_gradients(&config, device, Inner::Bf16);
        assert!(again == (losses, gradients), "{preset}: other bits the second time");
    }
}

#[test]
fn the_optimizer_steps_on_the_gpu_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let weights_after = |device: &Device| {
        let mut rng = Rng::new(4);
        let mut draw = |rows: usize, columns: usize| {
            let values: Vec<f32> = (0..rows * columns).map(|_| rng.normal()).collect();
            Tensor::from_vec(values, (rows, columns), device).unwrap()
        };
        let var = Var::from_tensor(&draw(40, 30)).unwrap();
        let mut optimizer = AdamW::new([("x.weight".to_owned(), var.clone())].into()).unwrap();
        for i in 0..5 {
            let goal = draw(40, 30);
            for n in [1, 3] {
                let loss = (var.as_tensor() - &goal).unwrap().sqr().unwrap().sum_all().unwrap();
                optimizer.add(&loss.backward().unwrap(), n).unwrap();
            }
            // The third step changes nothing.
            optimizer.step(0.05, i != 2).unwrap();
        }
        optimizer.swap().unwrap();
        let averages = optimizer.averages().unwrap().remove(0).1.values().into_owned();
        (var.flatten_all().unwrap().to_vec1::<f32>().unwrap(), averages)
    };
    let (got, expected) = (weights_after(device), weights_after(&Device::Cpu));
    for (got, expected) in [(&got.0, &expected.0), (&got.1, &expected.1)] {
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{got:?} for {expected:?}");
    }
}

/// As training has it.
fn base() -> (Spectrum, ForecastConfig) {
    let config = ModelConfig::preset("base").unwrap();
    (Spectrum::new(config.codec.sample_rate, &config.plan).unwrap(), config.forecast)
}

/// Plan frames that an excerpt is only listened to for.
const FIRST: usize = 8;

fn bits(forecasts: &Forecasts) -> Vec<u32> {
    let Forecasts { past, planned, log_scale } = forecasts;
    [past, planned, log_scale].into_iter().flatten().map(|x| x.to_bits()).collect()
}

#[test]
fn forecasts_at_the_presets_settings_are_those_of_the_cpu_from_four_threads_at_once() {
    let Some(device) = device() else { return };
    let (spectrum, sharp) = base();
    let blunt = ForecastConfig { deconvolution: 0, tones: false, ..sharp.clone() };
    for config in [&sharp, &blunt] {
        let on_gpu = GpuForecaster::new(device, &spectrum, config).unwrap();
        let on_cpu = CpuForecaster { spectrum: &spectrum, config };
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (on_gpu, spectrum) = (&on_gpu, &spectrum);
                scope.spawn(move || {
                    let mut rng = Rng::new(80 + thread);
                    for round in 0..4 {
                        // From the beginning, or from the middle; of any length.
                        let (first, frames) = ([0, FIRST][round % 2], FIRST + 1 + rng.below(20));
                        let Excerpt { samples, plan } =
                            excerpt(frames * spectrum.hop() - rng.below(spectrum.hop()), spectrum, &mut rng);
                        let got = on_gpu.forecasts(&samples, first, plan.view()).unwrap();
                        let expected = on_cpu.forecasts(&samples, first, plan.view()).unwrap();
                        compare(&got, &expected, 0).unwrap_or_else(|e| {
                            panic!("thread {thread}, round {round}, {} samples from frame {first}: {e}", samples.len())
                        });
                        let again = on_gpu.forecasts(&samples, first, plan.view()).unwrap();
                        assert!(bits(&got) == bits(&again), "thread {thread}, round {round}: other bits");
                    }
                });
            }
        });
    }
}

#[test]
fn excerpts_that_cannot_be_forecast_are_refused_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let (spectrum, config) = base();
    let on_gpu = GpuForecaster::new(device, &spectrum, &config).unwrap();
    let on_cpu = CpuForecaster { spectrum: &spectrum, config: &config };
    let Excerpt { samples, plan } = excerpt(3 * spectrum.hop(), &spectrum, &mut Rng::new(79));
    let (short, narrow) = (plan.slice(ndarray::s![1.., ..]), plan.slice(ndarray::s![.., 1..]));
    for (first, plan) in [(0, short), (1, narrow), (3, plan.view()), (9, plan.view())] {
        assert_eq!(on_gpu.forecasts(&samples, first, plan), on_cpu.forecasts(&samples, first, plan), "from {first}");
    }
    let odd = ForecastConfig { past_hop: 100, ..config };
    assert!(GpuForecaster::new(device, &spectrum, &odd).is_err());
}

#[test]
fn forecasting_at_the_presets_settings_tells_how_many_samples_a_second_it_does() {
    let Some(device) = device() else { return };
    let (spectrum, config) = base();
    let on_gpu = GpuForecaster::new(device, &spectrum, &config).unwrap();
    let Excerpt { samples, plan } = excerpt((FIRST + 32) * spectrum.hop(), &spectrum, &mut Rng::new(78));
    for threads in [1, 8] {
        const CALLS: usize = 50;
        let work = |calls: usize| {
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|| {
                        (0..calls).for_each(|_| drop(on_gpu.forecasts(&samples, FIRST, plan.view()).unwrap()))
                    });
                }
            });
        };
        work(2);
        let begun = Instant::now();
        work(CALLS);
        let forecasts = (threads * CALLS * 32 * spectrum.hop()) as f64;
        println!("forecasts from {threads} threads: {:.0} samples/s", forecasts / begun.elapsed().as_secs_f64());
    }
}

#[test]
fn forecasts_on_the_cpu_are_refused() {
    let (spectrum, config) = base();
    let error = GpuForecaster::new(&Device::Cpu, &spectrum, &config).err().unwrap().to_string();
    assert!(error.contains("the device is the CPU"), "{error}");
}
