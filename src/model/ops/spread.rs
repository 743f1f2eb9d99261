//! Vectors of plan frames, or of their sub-steps, as a sequence of steps.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::{Values, gradient, values};

/// [`super::Ops::spread`]
pub fn spread(table: &Tensor, len: usize) -> Result<Tensor> {
    table.contiguous()?.apply_op1(Spread { len })
}

struct Spread {
    len: usize,
}

impl Spread {
    /// Batch, values of a frame's table, how often a frame repeats it, width.
    fn sizes(&self, table: &Shape) -> Result<(usize, usize, usize, usize)> {
        let (batch, frames, period, dim) = table.dims4()?;
        if period * frames == 0 || !self.len.is_multiple_of(period * frames) {
            bail!("spread: {} steps over {frames} frames of {period}", self.len);
        }
        Ok((batch, period * dim, self.len / (frames * period), dim))
    }
}

impl CustomOp1 for Spread {
    fn name(&self) -> &'static str {
        "spread"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, n, times, dim) = self.sizes(layout.shape())?;
        let mut out = Vec::with_capacity(batch * self.len * dim);
        for frame in values(table, layout)?.chunks_exact(n) {
            (0..times).for_each(|_| out.extend_from_slice(frame));
        }
        Ok((CpuStorage::F32(out), (batch, self.len, dim).into()))
    }

    fn bwd(&self, table: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (_, n, times, _) = self.sizes(table.shape())?;
        let dy = dy.contiguous()?;
        let mut sums = vec![0.0; table.elem_count()];
        for (sums, dy) in sums.chunks_exact_mut(n).zip(Values::of(&dy)?.chunks_exact(n * times)) {
            for dy in dy.chunks_exact(n) {
                sums.iter_mut().zip(dy).for_each(|(sum, x)| *sum += x);
            }
        }
        gradient(sums, table)
    }
}
