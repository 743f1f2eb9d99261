//! RMSNorm with a gain, alone and on the way into a linear map: the normalised rows are never stored.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::matmul::{Matrix, MatrixMut, multiply, multiply_add};
use super::{ROWS, Values, by_rows, gradient, values, width};
use crate::simd::{portable, wide_loop};

wide_loop! {
    /// `out = x / rms(x) * gain`, row by row.
    fn normalize(x: &'a [f32], gain: &'a [f32], out: &'a mut [f32]) {
        for (x, out) in x.chunks_exact(gain.len()).zip(out.chunks_exact_mut(gain.len())) {
            let inverse = portable::inverse_rms(x);
            for ((y, &x), &g) in out.iter_mut().zip(x).zip(gain) {
                *y = x * inverse * g;
            }
        }
    }
}

wide_loop! {
    /// From the gradient `dy` of normalised rows: `dx = ..`, `dgain += ..`.
    fn normalize_backward(x: &'a [f32], gain: &'a [f32], dy: &'a [f32], dx: &'a mut [f32], dgain: &'a mut [f32]) {
        let dim = gain.len();
        let rows = x.chunks_exact(dim).zip(dy.chunks_exact(dim)).zip(dx.chunks_exact_mut(dim));
        for ((x, dy), dx) in rows {
            let inverse = portable::inverse_rms(x);
            for ((((dx, dgain), &x), &dy), &g) in dx.iter_mut().zip(&mut *dgain).zip(x).zip(dy).zip(gain) {
                *dgain += dy * x * inverse;
                *dx = dy * g;
            }
            let along = portable::dot_f32(x, dx) * inverse * inverse / dim as f32;
            for (dx, &x) in dx.iter_mut().zip(x) {
                *dx = (*dx - along * x) * inverse;
            }
        }
    }
}

/// [`super::Ops::rms_norm`]
pub fn rms_norm(x: &Tensor, gain: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&gain.contiguous()?, RmsNorm)
}

/// [`super::Ops::norm_linear`]
pub fn norm_linear(x: &Tensor, gain: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&gain.contiguous()?, &weight.contiguous()?, NormLinear)
}

struct RmsNorm;

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, gain: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        let (dim, x, gain) = (width(lx)?, values(x, lx)?, values(gain, lg)?);
        if gain.len() != dim {
            bail!("rms_norm: {} gains for rows of {dim}", gain.len());
        }
        let mut out = vec![0.0; x.len()];
        by_rows(&mut out, dim, 0, |_, first, out| normalize(&x[first * dim..][..out.len()], gain, out));
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, gain: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (mut dx, mut dgain) = (vec![0.0; x.elem_count()], vec![0.0; gain.elem_count()]);
        normalize_backward(&Values::of(x)?, &Values::of(gain)?, &Values::of(&dy)?, &mut dx, &mut dgain);
        Ok((gradient(dx, x)?, gradient(dgain, gain)?))
    }
}

pub(super) struct NormLinear;

impl CustomOp3 for NormLinear {
    fn name(&self) -> &'static str {
        "norm_linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        gain: &CpuStorage,
        lg: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (dim, outputs) = (width(lx)?, width(lw)?);
        let (x, gain, weight) = (values(x, lx)?, values(gain, lg)?, values(weight, lw)?);
        if gain.len() != dim || weight.len() != dim * outputs {
            bail!("norm_linear: rows of {dim}, {} gains and a weight {:?} do not go together", gain.len(), lw.shape());
        }
        let mut out = vec![0.0; x.len() / dim * outputs];
        by_rows(&mut out, outputs, ROWS * dim, |room, first, out| {
            let n = out.len() / outputs * dim;
            let normal = &mut room[..n];
            normalize(&x[first * dim..][..n], gain, normal);
            multiply(Matrix::new(normal, dim), Matrix::new(weight, outputs), MatrixMut::new(out, outputs));
        });
        let mut shape = lx.dims().to_vec();
        shape[lx.dims().len() - 1] = outputs;
        Ok((CpuStorage::F32(out), shape.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dim, outputs) = weight.dims2()?;
        let dy = dy.contiguous()?;
        let mut dx = vec![0.0; x.elem_count()];
        let (mut dgain, mut dweight) = (vec![0.0; dim], vec![0.0; dim * outputs]);
        {
            let (x, gain, weight, dy) = (Values::of(x)?, Values::of(gain)?, Values::of(weight)?, Values::of(&dy)?);
            let mut room = vec![0.0; ROWS * dim];
            let chunks = x.chunks(ROWS * dim).zip(dy.chunks(ROWS * outputs)).zip(dx.chunks_mut(ROWS * dim));
            for ((x, dy), dx) in chunks {
                let room = &mut room[..x.len()];
                let dy = Matrix::new(dy, outputs);
                normalize(x, &gain, room);
                multiply_add(Matrix::new(room, dim).t(), dy, MatrixMut::new(&mut dweight, outputs));
                multiply(dy, Matrix::new(&weight, outputs).t(), MatrixMut::new(room, dim));
                normalize_backward(x, &gain, room, dx, &mut dgain);
            }
        }
        Ok((gradient(dx, x)?, gradient(dgain, gain)?, gradient(dweight, weight)?))
    }
}
