//! SwiGLU with the linear map after it, added to the residual stream: the gated values are never stored.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::matmul::{Matrix, MatrixMut, multiply, multiply_add};
use super::{ROWS, Values, by_rows, gradient, values, width};
use crate::simd::{portable, wide_loop};

wide_loop! {
    /// `gated = silu(gate) * value`, row by row; rows of `up` are gate and value.
    fn gate(up: &'a [f32], gated: &'a mut [f32], hidden: usize) {
        for (up, gated) in up.chunks_exact(2 * hidden).zip(gated.chunks_exact_mut(hidden)) {
            portable::swiglu(up, gated);
        }
    }
}

wide_loop! {
    /// From the gradient `d` of gated values: that of `up`, and in place of d the gated values themselves.
    fn gate_backward(up: &'a [f32], d: &'a mut [f32], dup: &'a mut [f32], hidden: usize) {
        let rows = up.chunks_exact(2 * hidden).zip(d.chunks_exact_mut(hidden)).zip(dup.chunks_exact_mut(2 * hidden));
        for ((up, d), dup) in rows {
            let ((gate, value), (dgate, dvalue)) = (up.split_at(hidden), dup.split_at_mut(hidden));
            for ((((d, dgate), dvalue), &g), &v) in d.iter_mut().zip(dgate).zip(dvalue).zip(gate).zip(value) {
                let s = portable::sigmoid(g);
                let silu = g * s;
                *dgate = *d * v * (s + silu * (1.0 - s));
                *dvalue = *d * silu;
                *d = silu * v;
            }
        }
    }
}

/// [`super::Ops::add_swiglu_linear`]
pub fn add_swiglu_linear(residual: &Tensor, up: &Tensor, weight: &Tensor) -> Result<Tensor> {
    residual.contiguous()?.apply_op3(&up.contiguous()?, &weight.contiguous()?, AddSwigluLinear)
}

pub(super) struct AddSwigluLinear;

impl CustomOp3 for AddSwigluLinear {
    fn name(&self) -> &'static str {
        "add_swiglu_linear"
    }

    fn cpu_fwd(
        &self,
        residual: &CpuStorage,
        lr: &Layout,
        up: &CpuStorage,
        lu: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (hidden, dim) = (width(lu)? / 2, width(lw)?);
        let (residual, up, weight) = (values(residual, lr)?, values(up, lu)?, values(weight, lw)?);
        if lw.dims() != [hidden, dim] || residual.len() * 2 * hidden != up.len() * dim {
            bail!("add_swiglu_linear: {:?}, {:?}, {:?} do not go together", lr.shape(), lu.shape(), lw.shape());
        }
        let mut out = vec![0.0; residual.len()];
        by_rows(&mut out, dim, ROWS * hidden, |room, first, out| {
            let gated = &mut room[..out.len() / dim * hidden];
            gate(&up[first * 2 * hidden..][..2 * gated.len()], gated, hidden);
            out.copy_from_slice(&residual[first * dim..][..out.len()]);
            multiply_add(Matrix::new(gated, hidden), Matrix::new(weight, dim), MatrixMut::new(out, dim));
        });
        Ok((CpuStorage::F32(out), lr.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        up: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (hidden, dim) = weight.dims2()?;
        let dy = dy.contiguous()?;
        let (mut dup, mut dweight) = (vec![0.0; up.elem_count()], vec![0.0; hidden * dim]);
        {
            let (up, weight, dy) = (Values::of(up)?, Values::of(weight)?, Values::of(&dy)?);
            let mut room = vec![0.0; ROWS * hidden];
            let n = 2 * ROWS * hidden;
            for ((up, dup), dy) in up.chunks(n).zip(dup.chunks_mut(n)).zip(dy.chunks(ROWS * dim)) {
                let room = &mut room[..up.len() / 2];
                let dy = Matrix::new(dy, dim);
                multiply(dy, Matrix::new(&weight, dim).t(), MatrixMut::new(room, hidden));
                gate_backward(up, room, dup, hidden);
                multiply_add(Matrix::new(room, hidden).t(), dy, MatrixMut::new(&mut dweight, dim));
            }
        }
        Ok((Some(dy), gradient(dup, up)?, gradient(dweight, weight)?))
    }
}
