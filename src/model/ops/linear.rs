//! Linear maps: with a bias and perhaps SiLU after it, or added to a residual stream.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::matmul::{Matrix, MatrixMut, multiply, multiply_add};
use super::{ROWS, Values, by_rows, gradient, values, width};
use crate::simd::{portable, wide_loop};

wide_loop! {
    /// `dz = dy * silu'(z)`, in place of z.
    fn silu_backward(z: &'a mut [f32], dy: &'a [f32]) {
        for (z, &dy) in z.iter_mut().zip(dy) {
            let s = portable::sigmoid(*z);
            *z = dy * s * (1.0 + *z * (1.0 - s));
        }
    }
}

wide_loop! {
    /// `x = silu(x)`
    fn silu(x: &'a mut [f32]) {
        portable::silu(x);
    }
}

wide_loop! {
    /// `sums += ` every row.
    fn add_rows(rows: &'a [f32], sums: &'a mut [f32]) {
        for row in rows.chunks_exact(sums.len()) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
    }
}

/// [`super::Ops::linear`]
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Linear { silu: false })
}

/// [`super::Ops::silu_linear`]
pub fn silu_linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Linear { silu: true })
}

/// [`super::Ops::add_linear`]
pub fn add_linear(residual: &Tensor, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    // Inputs that come from outside want no gradient.
    let op = AddLinear { d_x: x.track_op() };
    residual.contiguous()?.apply_op3(&x.contiguous()?, &weight.contiguous()?, op)
}

struct Linear {
    silu: bool,
}

/// `out = x weight + bias`
fn map(x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
    out.chunks_exact_mut(bias.len()).for_each(|row| row.copy_from_slice(bias));
    let (inputs, outputs) = (weight.len() / bias.len(), bias.len());
    multiply_add(Matrix::new(x, inputs), Matrix::new(weight, outputs), MatrixMut::new(out, outputs));
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
        bias: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (inputs, outputs) = (width(lx)?, width(lb)?);
        let (x, weight, bias) = (values(x, lx)?, values(weight, lw)?, values(bias, lb)?);
        if lw.dims() != [inputs, outputs] || bias.len() != outputs {
            bail!("linear: rows of {inputs}, a weight {:?} and a bias {:?} do not go together", lw.shape(), lb.shape());
        }
        let mut out = vec![0.0; x.len() / inputs * outputs];
        by_rows(&mut out, outputs, 0, |_, first, out| {
            map(&x[first * inputs..][..out.len() / outputs * inputs], weight, bias, out);
            if self.silu {
                silu(out);
            }
        });
        let mut shape = lx.dims().to_vec();
        shape[lx.dims().len() - 1] = outputs;
        Ok((CpuStorage::F32(out), shape.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (inputs, outputs) = weight.dims2()?;
        let dy = dy.contiguous()?;
        // Inputs that come from outside want no gradient.
        let mut dx = x.track_op().then(|| vec![0.0; x.elem_count()]);
        let (mut dweight, mut dbias) = (vec![0.0; inputs * outputs], vec![0.0; outputs]);
        {
            let (x, weight, bias, dy) = (Values::of(x)?, Values::of(weight)?, Values::of(bias)?, Values::of(&dy)?);
            let mut room = vec![0.0; ROWS * outputs];
            for (i, (x, dy)) in x.chunks(ROWS * inputs).zip(dy.chunks(ROWS * outputs)).enumerate() {
                let dz = if self.silu {
                    let z = &mut room[..dy.len()];
                    map(x, &weight, &bias, z);
                    silu_backward(z, dy);
                    z
                } else {
                    dy
                };
                add_rows(dz, &mut dbias);
                let dz = Matrix::new(dz, outputs);
                multiply_add(Matrix::new(x, inputs).t(), dz, MatrixMut::new(&mut dweight, outputs));
                if let Some(dx) = &mut dx {
                    let dx = &mut dx[i * ROWS * inputs..][..x.len()];
                    multiply(dz, Matrix::new(&weight, outputs).t(), MatrixMut::new(dx, inputs));
                }
            }
        }
        let dx = dx.map(|dx| gradient(dx, x)).transpose()?.flatten();
        Ok((dx, gradient(dweight, weight)?, gradient(dbias, bias)?))
    }
}

pub(super) struct AddLinear {
    /// Whether x wants a gradient.
    pub d_x: bool,
}

impl CustomOp3 for AddLinear {
    fn name(&self) -> &'static str {
        "add_linear"
    }

    fn cpu_fwd(
        &self,
        residual: &CpuStorage,
        lr: &Layout,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (inputs, outputs) = (width(lx)?, width(lw)?);
        let (residual, x, weight) = (values(residual, lr)?, values(x, lx)?, values(weight, lw)?);
        if lw.dims() != [inputs, outputs] || residual.len() != x.len() / inputs * outputs {
            bail!("add_linear: {:?} + {:?} x {:?} do not go together", lr.shape(), lx.shape(), lw.shape());
        }
        let mut out = vec![0.0; residual.len()];
        by_rows(&mut out, outputs, 0, |_, first, out| {
            let x = &x[first * inputs..][..out.len() / outputs * inputs];
            out.copy_from_slice(&residual[first * outputs..][..out.len()]);
            multiply_add(Matrix::new(x, inputs), Matrix::new(weight, outputs), MatrixMut::new(out, outputs));
        });
        Ok((CpuStorage::F32(out), lr.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (inputs, outputs) = weight.dims2()?;
        let dy = dy.contiguous()?;
        let mut dweight = vec![0.0; inputs * outputs];
        let mut dx = self.d_x.then(|| vec![0.0; x.elem_count()]);
        {
            let (x, weight, dy) = (Values::of(x)?, Values::of(weight)?, Values::of(&dy)?);
            let dy = Matrix::new(&dy, outputs);
            multiply(Matrix::new(&x, inputs).t(), dy, MatrixMut::new(&mut dweight, outputs));
            if let Some(dx) = &mut dx {
                multiply(dy, Matrix::new(&weight, outputs).t(), MatrixMut::new(dx, inputs));
            }
        }
        let dx = dx.map(|dx| gradient(dx, x)).transpose()?.flatten();
        Ok((Some(dy), dx, gradient(dweight, weight)?))
    }
}
