//! The operations that both transformers are made of, on a GPU, by kernels/training.cu and attention_window.cu; what has no kernel is
//! composed of candle's operations. Sums are f32 and in one order: the same bits every time. Weights and the residual stream are f32;
//! what lies between two maps of a block is f32 ([`OPS`]) or bf16 ([`OPS_BF16`]), and so are the products that make it.

use candle_core::{D, DType, Error, Result, Shape, Tensor, Var, bail};

use super::attention::attention;
use super::launch::{
    self, AdamwArgs, CrossEntropyShape, Element, GatherShape, HEAD_DIMS, MixtureShape, NormShape, SiluShape,
    SwigluArgs, SwigluShape,
};
use super::memory::{Fresh, add_to, address, element, f32, gpu, launch, of_one, of_three, of_two};
use crate::model::config::N_FORECASTS;
use crate::model::head::Targets;
use crate::model::ops::stack::{Backward, Step, Steps};
use crate::model::ops::{Ops, plain};
use crate::train::optimizer::Update;

const F32: Element = Element::F32;

/// For models whose tensors are on a GPU.
pub(crate) static OPS: Ops = Ops {
    rms_norm,
    norm_linear: |x, gain, weight| norm_linear(x, gain, weight, F32),
    project: |x, gain, weight| norm_linear(x, gain, weight, F32),
    linear: plain::linear,
    silu_linear,
    add_linear,
    add_swiglu_linear,
    attention: |qkv, n_heads, window| {
        let (y, back) = attention_step(qkv, n_heads, window)?;
        of_one("attention", qkv, y, move |_, d_y| back(d_y).map(|[d_qkv]| d_qkv))
    },
    spread: plain::spread,
    gather_add,
    bound_scales: plain::bound_scales,
    nll,
    cross_entropy,
    steps: Some(&STEPS),
};

/// The same with [`Ops::project`] to bf16, whose element all follow that work on what it gives.
pub(crate) static OPS_BF16: Ops =
    Ops { project: |x, gain, weight| norm_linear(x, gain, weight, Element::Bf16), steps: Some(&STEPS_BF16), ..OPS };

/// What stacks of blocks are trained by.
static STEPS: Steps = Steps {
    project: |inputs| norm_linear_step(inputs, F32).map(step),
    attention: |qkv, n_heads, window| attention_step(qkv, n_heads, window).map(step),
    add_linear: |inputs| add_linear_step(inputs).map(step),
    add_swiglu_linear: |inputs| add_swiglu_linear_step(inputs).map(step),
    add: |sum, x| add_to(&sum, x).map(|()| sum),
};

/// The same with bf16 between two maps.
static STEPS_BF16: Steps = Steps { project: |inputs| norm_linear_step(inputs, Element::Bf16).map(step), ..STEPS };

/// A result and its way back, for a stack.
fn step<const N: usize>((result, back): (Fresh, Backward<N>)) -> Step<N> {
    (result.into(), back)
}

/// Rows and width of the last dimension.
fn rows(x: &Tensor) -> Result<(usize, usize)> {
    let width = x.dim(D::Minus1)?;
    Ok((x.elem_count() / width.max(1), width))
}

/// A norm whose backward pass is still to come; its result is of `element`, its input f32.
struct Norm {
    shape: NormShape,
    element: Element,
    x: Tensor,
    gain: Tensor,
    inverse_rms: Tensor,
}

impl Norm {
    fn forward(x: &Tensor, gain: &Tensor, element: Element) -> Result<(Self, Fresh)> {
        let (x, gain) = (f32(x)?, f32(gain)?);
        let device = gpu(&x)?;
        let (rows, dim) = rows(&x)?;
        if gain.elem_count() != dim {
            bail!("rms_norm: gains {:?} for {:?}", gain.shape(), x.shape());
        }
        let shape = NormShape { rows, dim };
        let (y, inverse_rms) = (Fresh::new(x.shape(), element, device)?, Fresh::new(rows, F32, device)?);
        let mut args = shape.args().map_err(Error::wrap)?;
        (args.x, args.gain, args.y) = (address(&x)?, address(&gain)?, y.address()?);
        args.inverse_rms = inverse_rms.address()?;
        // SAFETY: the sizes are those of `shape`.
        unsafe { launch(device, &shape.forward(element), &args) }?;
        let inverse_rms = inverse_rms.tensor();
        Ok((Self { shape, element, x, gain, inverse_rms }, y))
    }

    /// Gradients of x and gain.
    fn backward(&self, d_y: &Tensor) -> Result<[Tensor; 2]> {
        let Self { shape, element, x, gain, inverse_rms } = self;
        let device = gpu(x)?;
        let (d_x, d_gain) = (Fresh::new(x.shape(), F32, device)?, Fresh::new(shape.dim, F32, device)?);
        let parts = Fresh::new((shape.parts(), shape.dim), F32, device)?;
        let mut args = shape.args().map_err(Error::wrap)?;
        (args.x, args.gain, args.inverse_rms) = (address(x)?, address(gain)?, address(inverse_rms)?);
        (args.d_y, args.d_x, args.d_gain_parts) = (address(d_y)?, d_x.address()?, parts.address()?);
        let (sum, mut sums) = shape.sum_parts();
        (sums.parts, sums.sums) = (parts.address()?, d_gain.address()?);
        // SAFETY: the sizes are those of `shape`.
        unsafe {
            launch(device, &shape.backward(*element), &args)?;
            launch(device, &shape.backward_gain(*element), &args)?;
            launch(device, &sum, &sums)?;
        }
        Ok([d_x.tensor(), d_gain.tensor()])
    }
}

fn rms_norm(x: &Tensor, gain: &Tensor) -> Result<Tensor> {
    let (norm, y) = Norm::forward(x, gain, F32)?;
    of_two("rms_norm", [x, gain], y, move |_, d_y| norm.backward(d_y))
}

/// x's shape with another width.
fn widened(x: &Tensor, width: usize) -> Vec<usize> {
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(width);
    shape
}

/// `x weight` as `shape`, in the element of x, to which the f32 weight is rounded.
fn product(x: &Tensor, weight: &Tensor, shape: impl Into<Shape>) -> Result<Fresh> {
    Fresh::product(x, &weight.to_dtype(x.dtype())?, shape)
}

/// Gradients of x and weight where [`product`] has this one.
fn linear_backward(x: &Tensor, weight: &Tensor, d_y: &Tensor) -> Result<[Tensor; 2]> {
    let (inputs, outputs) = weight.dims2()?;
    let (x_rows, d_rows) = (x.reshape(((), inputs))?, d_y.to_dtype(x.dtype())?.reshape(((), outputs))?);
    let d_x = product(&d_rows, &weight.t()?, x.shape())?;
    let d_weight = Fresh::product(&x_rows.t()?, &d_rows, weight.shape())?.tensor();
    Ok([d_x.tensor(), d_weight.to_dtype(weight.dtype())?])
}

fn norm_linear(x: &Tensor, gain: &Tensor, weight: &Tensor, element: Element) -> Result<Tensor> {
    let (y, back) = norm_linear_step([x, gain, weight], element)?;
    of_three("norm_linear", [x, gain, weight], y, move |_, d_y| back(d_y))
}

fn norm_linear_step([x, gain, weight]: [&Tensor; 3], element: Element) -> Result<(Fresh, Backward<3>)> {
    let (norm, normalised) = Norm::forward(x, gain, element)?;
    let (normalised, weight) = (normalised.tensor(), f32(weight)?);
    let y = product(&normalised, &weight, widened(x, weight.dim(1)?))?;
    let back = move |d_y: &Tensor| {
        let [d_normalised, d_weight] = linear_backward(&normalised, &weight, d_y)?;
        let [d_x, d_gain] = norm.backward(&d_normalised)?;
        Ok([d_x, d_gain, d_weight])
    };
    Ok((y, Box::new(back)))
}

fn silu_linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (x, weight, bias) = (f32(x)?, f32(weight)?, f32(bias)?);
    let device = gpu(&x)?.clone();
    let ((rows, _), dim) = (rows(&x)?, weight.dim(1)?);
    if bias.elem_count() != dim {
        bail!("silu_linear: biases {:?} for {:?}", bias.shape(), weight.shape());
    }
    let shape = SiluShape { rows, dim };
    let mut args = shape.args().map_err(Error::wrap)?;
    let z = product(&x, &weight, widened(&x, dim))?.tensor();
    let y = Fresh::new(z.shape(), F32, &device)?;
    (args.z, args.bias, args.y) = (address(&z)?, address(&bias)?, y.address()?);
    // SAFETY: the sizes are those of `shape`; so below.
    unsafe { launch(&device, &shape.forward(), &args) }?;
    of_three("silu_linear", [&x.clone(), &weight.clone(), &bias.clone()], y, move |_, d_y| {
        let d_z = Fresh::new(z.shape(), F32, &device)?;
        let (parts, d_bias) = (Fresh::new((shape.parts(), dim), F32, &device)?, Fresh::new(dim, F32, &device)?);
        let mut args = args;
        (args.z, args.bias, args.d_y) = (address(&z)?, address(&bias)?, address(d_y)?);
        (args.d_z, args.d_bias_parts) = (d_z.address()?, parts.address()?);
        let (sum, mut sums) = shape.sum_parts();
        (sums.parts, sums.sums) = (parts.address()?, d_bias.address()?);
        // SAFETY: as above.
        unsafe {
            launch(&device, &shape.backward(), &args)?;
            launch(&device, &shape.backward_bias(), &args)?;
            launch(&device, &sum, &sums)?;
        }
        let [d_x, d_weight] = linear_backward(&x, &weight, &d_z.tensor())?;
        Ok([d_x, d_weight, d_bias.tensor()])
    })
}

/// Heads that no kernel serves attend by candle's operations.
fn attention_step(qkv: &Tensor, n_heads: usize, window: usize) -> Result<(Fresh, Backward<1>)> {
    if HEAD_DIMS.contains(&(qkv.dim(D::Minus1)? / 3 / n_heads)) {
        return attention(qkv, n_heads, window);
    }
    let (input, element) = (Var::from_tensor(&qkv.to_dtype(DType::F32)?)?, qkv.dtype());
    let y = plain::attention(&input, n_heads, window)?;
    let result = Fresh::copy(&y.to_dtype(element)?.detach(), y.shape())?;
    let back = move |d: &Tensor| {
        let gradients = (&y * d.to_dtype(DType::F32)?)?.sum_all()?.backward()?;
        let Some(d_qkv) = gradients.get(&input) else { bail!("attention: no gradient") };
        Ok([d_qkv.to_dtype(element)?])
    };
    Ok((result, Box::new(back)))
}

fn add_linear(residual: &Tensor, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (y, back) = add_linear_step([residual, x, weight])?;
    of_three("add_linear", [residual, x, weight], y, move |_, d_y| back(d_y))
}

fn add_linear_step([residual, x, weight]: [&Tensor; 3]) -> Result<(Fresh, Backward<3>)> {
    let (residual, x, weight) = (f32(residual)?, x.contiguous()?, f32(weight)?);
    let y = product(&x, &weight, residual.shape())?.add(&residual)?;
    let back = move |d_y: &Tensor| {
        let [d_x, d_weight] = linear_backward(&x, &weight, d_y)?;
        Ok([d_y.clone(), d_x, d_weight])
    };
    Ok((y, Box::new(back)))
}

/// `silu(gate) value` of up `[.., 2 * hidden]`, on rows of half the width.
fn swiglu(up: &Tensor) -> Result<Fresh> {
    let (shape, mut args) = swiglu_of(up)?;
    let element = element(up)?;
    let y = Fresh::new((shape.rows, shape.hidden), element, gpu(up)?)?;
    (args.up, args.y) = (address(up)?, y.address()?);
    // SAFETY: the sizes are those of `shape`.
    unsafe { launch(gpu(up)?, &shape.forward(element), &args) }?;
    Ok(y)
}

fn swiglu_backward(up: &Tensor, d_y: &Tensor) -> Result<Fresh> {
    let (shape, mut args) = swiglu_of(up)?;
    let element = element(up)?;
    let d_up = Fresh::new(up.shape(), element, gpu(up)?)?;
    (args.up, args.d_y, args.d_up) = (address(up)?, address(d_y)?, d_up.address()?);
    // SAFETY: the sizes are those of `shape`.
    unsafe { launch(gpu(up)?, &shape.backward(element), &args) }?;
    Ok(d_up)
}

fn swiglu_of(up: &Tensor) -> Result<(SwigluShape, SwigluArgs)> {
    let (rows, width) = rows(up)?;
    if !width.is_multiple_of(2) {
        bail!("swiglu: {:?} is not gates and as many values", up.shape());
    }
    let shape = SwigluShape { rows, hidden: width / 2 };
    Ok((shape, shape.args().map_err(Error::wrap)?))
}

fn add_swiglu_linear(residual: &Tensor, up: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (y, back) = add_swiglu_linear_step([residual, up, weight])?;
    of_three("add_swiglu_linear", [residual, up, weight], y, move |_, d_y| back(d_y))
}

fn add_swiglu_linear_step([residual, up, weight]: [&Tensor; 3]) -> Result<(Fresh, Backward<3>)> {
    let (residual, up, weight) = (f32(residual)?, up.contiguous()?, f32(weight)?);
    let open = swiglu(&up)?.tensor();
    let y = product(&open, &weight, residual.shape())?.add(&residual)?;
    let back = move |d_y: &Tensor| {
        let [d_open, d_weight] = linear_backward(&open, &weight, d_y)?;
        Ok([d_y.clone(), swiglu_backward(&up, &d_open)?.tensor(), d_weight])
    };
    Ok((y, Box::new(back)))
}

/// The codes of each row belong to tables of equal size that lie one after the other, in order.
fn gather_add(x: &Tensor, table: &Tensor, codes: &[u32]) -> Result<Tensor> {
    let (x, table) = (f32(x)?, f32(table)?);
    let device = gpu(&x)?.clone();
    let ((n, dim), (entries, _)) = (rows(&x)?, table.dims2()?);
    let n_tables = codes.len() / n.max(1);
    let shape = GatherShape { rows: n, dim, n_tables, entries: entries / n_tables.max(1) };
    let (mut args, backward) = (shape.args().map_err(Error::wrap)?, shape.backward());
    if codes.len() != n * n_tables || shape.table_len() != table.elem_count() {
        bail!("gather_add: {} codes for {:?} from {:?}", codes.len(), x.shape(), table.shape());
    }
    let ends: Vec<u32> = (1..=n_tables).map(|t| (t * shape.entries) as u32).collect();
    let in_tables = |codes: &[u32]| {
        codes
            .iter()
            .zip(&ends)
            .fold(true, |all, (code, end)| all & (code.wrapping_add(shape.entries as u32) >= *end && code < end))
    };
    if !codes.chunks_exact(n_tables.max(1)).all(in_tables) {
        bail!("gather_add: a code lies in another table than that of its place");
    }
    let codes = Tensor::from_slice(codes, codes.len(), x.device())?;
    let y = Fresh::new(x.shape(), F32, &device)?;
    (args.x, args.table, args.codes, args.y) = (address(&x)?, address(&table)?, address(&codes)?, y.address()?);
    // SAFETY: the sizes are those of `shape`, the codes those of its tables; so below.
    unsafe { launch(&device, &shape.forward(), &args) }?;
    let table_shape = table.shape().clone();
    of_two("gather_add", [&x, &table], y, move |_, d_y| {
        let parts = Fresh::new((shape.parts(), shape.table_len()), F32, &device)?;
        let d_table = Fresh::new(&table_shape, F32, &device)?;
        let mut args = args;
        (args.codes, args.d_y, args.d_table_parts) = (address(&codes)?, address(d_y)?, parts.address()?);
        let (sum, mut sums) = shape.sum_parts();
        (sums.parts, sums.sums) = (parts.address()?, d_table.address()?);
        // SAFETY: as above.
        unsafe {
            launch(&device, &backward, &args)?;
            launch(&device, &sum, &sums)?;
        }
        Ok([d_y.clone(), d_table.tensor()])
    })
}

fn nll(head: &Tensor, targets: &Targets) -> Result<Tensor> {
    let head = f32(head)?;
    let device = gpu(&head)?.clone();
    let (n, width) = rows(&head)?;
    let shape = MixtureShape { n, components: width / 3 };
    let (mut args, forward) = (shape.args().map_err(Error::wrap)?, shape.forward().map_err(Error::wrap)?);
    let backward = shape.backward().map_err(Error::wrap)?;
    let given = [&targets.forecasts, &targets.units, &targets.low, &targets.high];
    if given.map(Vec::len) != [N_FORECASTS * n, N_FORECASTS * n, n, n] || width % 3 != 0 {
        bail!("nll: {} targets for {:?}", targets.low.len(), head.shape());
    }
    let given = given.map(|values| Tensor::from_slice(values, values.len(), head.device()));
    let [forecasts, units, low, high] = given;
    let given = [forecasts?, units?, low?, high?];
    let nll = Fresh::new(n, F32, &device)?;
    (args.head, args.nll) = (address(&head)?, nll.address()?);
    (args.forecasts, args.units) = (address(&given[0])?, address(&given[1])?);
    (args.low, args.high) = (address(&given[2])?, address(&given[3])?);
    // SAFETY: the sizes are those of `shape`; so below.
    unsafe { launch(&device, &forward, &args) }?;
    of_one("nll", &head.clone(), nll, move |_, d_nll| {
        let d_head = Fresh::new(head.shape(), F32, &device)?;
        let mut args = args;
        (args.forecasts, args.units) = (address(&given[0])?, address(&given[1])?);
        (args.low, args.high) = (address(&given[2])?, address(&given[3])?);
        (args.head, args.d_nll, args.d_head) = (address(&head)?, address(d_nll)?, d_head.address()?);
        // SAFETY: as above.
        unsafe { launch(&device, &backward, &args) }?;
        Ok(d_head.tensor())
    })
}

fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let logits = f32(logits)?;
    let device = gpu(&logits)?.clone();
    let (rows, classes) = rows(&logits)?;
    let shape = CrossEntropyShape { rows, classes };
    let mut args = shape.args().map_err(Error::wrap)?;
    if targets.len() != rows {
        bail!("cross_entropy: {} targets for {:?}", targets.len(), logits.shape());
    }
    let targets = Tensor::from_slice(targets, rows, logits.device())?;
    let (nll, lse) = (Fresh::new(rows, F32, &device)?, Fresh::new(rows, F32, &device)?);
    (args.logits, args.targets, args.nll, args.lse) =
        (address(&logits)?, address(&targets)?, nll.address()?, lse.address()?);
    // SAFETY: the sizes are those of `shape`; so below.
    unsafe { launch(&device, &shape.forward(F32), &args) }?;
    let lse = lse.tensor();
    of_one("cross_entropy", &logits.clone(), nll, move |_, d_nll| {
        let d_logits = Fresh::new(logits.shape(), F32, &device)?;
        let mut args = args;
        (args.logits, args.targets, args.lse) = (address(&logits)?, address(&targets)?, address(&lse)?);
        (args.d_nll, args.d_logits) = (address(d_nll)?, d_logits.address()?);
        // SAFETY: as above.
        unsafe { launch(&device, &shape.backward(F32), &args) }?;
        Ok(d_logits.tensor())
    })
}

/// One step of the optimizer, in place: weights, means, squares and averages by the gradients; all f32, as many values each.
pub(crate) fn adamw(weights: &Tensor, gradients: &Tensor, moments: [&Tensor; 3], by: &Update) -> Result<()> {
    let [means, squares, averages] = moments;
    let n = weights.elem_count();
    let all = [weights, gradients, means, squares, averages];
    if let Some(odd) = all.into_iter().find(|t| t.elem_count() != n || t.dtype() != DType::F32) {
        bail!("adamw: {odd:?} for weights {:?}", weights.shape());
    }
    let (step, args) = launch::adamw(n).map_err(Error::wrap)?;
    let args = AdamwArgs {
        weights: address(weights)?,
        gradients: address(gradients)?,
        means: address(means)?,
        squares: address(squares)?,
        averages: address(averages)?,
        gradient: by.gradient,
        rate: by.rate,
        square: by.square,
        decay: by.decay,
        average: by.average,
        ..args
    };
    // SAFETY: each has `n` values; nothing else reads or writes them meanwhile, as one stream runs everything in order.
    unsafe { launch(gpu(weights)?, &step, &args) }
}
