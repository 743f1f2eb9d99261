//! The end of the head: its bias, and log scales bounded around the planned ones.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::{Values, gradient, values};
use crate::simd::{portable, wide_loop};

/// [`super::Ops::bound_scales`]
pub fn bound_scales(head: &Tensor, bias: &Tensor, planned: &Tensor, limit: f32) -> Result<Tensor> {
    head.contiguous()?.apply_op3(&bias.contiguous()?, &planned.contiguous()?, BoundScales { limit })
}

struct BoundScales {
    limit: f32,
}

wide_loop! {
    /// `x = head + bias`, the last third of each row of 3k bounded by `limit`; without what is planned.
    fn bound(head: &'a [f32], bias: &'a [f32], out: &'a mut [f32], limit: f32) {
        let k = bias.len() / 3;
        for (x, out) in head.chunks_exact(3 * k).zip(out.chunks_exact_mut(3 * k)) {
            for ((y, &x), &b) in out.iter_mut().zip(x).zip(bias) {
                *y = x + b;
            }
            for y in &mut out[2 * k..] {
                *y = limit * portable::tanh(*y / limit);
            }
        }
    }
}

impl BoundScales {
    /// Rows of the head that a row of planned scales belongs to.
    fn repeats(&self, head: &Shape, bias: &Shape, planned: &Shape) -> Result<usize> {
        let ((batch, time, width), (planned_batch, frames, slices, k)) = (head.dims3()?, planned.dims4()?);
        let rows = (frames * slices).max(1);
        if width != 3 * k || bias.dims() != [width] || planned_batch != batch || !time.is_multiple_of(rows) {
            bail!("bound_scales: {head:?}, bias {bias:?}, planned {planned:?}");
        }
        Ok(time / rows)
    }
}

impl CustomOp3 for BoundScales {
    fn name(&self) -> &'static str {
        "bound_scales"
    }

    fn cpu_fwd(
        &self,
        head: &CpuStorage,
        lh: &Layout,
        bias: &CpuStorage,
        lb: &Layout,
        planned: &CpuStorage,
        lp: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let repeats = self.repeats(lh.shape(), lb.shape(), lp.shape())?;
        let (head, bias, planned) = (values(head, lh)?, values(bias, lb)?, values(planned, lp)?);
        let (width, k) = (bias.len(), bias.len() / 3);
        let mut out = vec![0.0; head.len()];
        bound(head, bias, &mut out, self.limit);
        for (rows, planned) in out.chunks_exact_mut(repeats * width).zip(planned.chunks_exact(k)) {
            for row in rows.chunks_exact_mut(width) {
                row[2 * k..].iter_mut().zip(planned).for_each(|(y, p)| *y += p);
            }
        }
        Ok((CpuStorage::F32(out), lh.shape().clone()))
    }

    fn bwd(
        &self,
        head: &Tensor,
        bias: &Tensor,
        planned: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let repeats = self.repeats(head.shape(), bias.shape(), planned.shape())?;
        let dy = dy.contiguous()?;
        let (width, k) = (bias.elem_count(), bias.elem_count() / 3);
        let (mut dhead, mut dbias) = (vec![0.0; head.elem_count()], vec![0.0; width]);
        let mut dplanned = vec![0.0; planned.elem_count()];
        {
            let dy = Values::of(&dy)?;
            bound(&Values::of(head)?, &Values::of(bias)?, &mut dhead, self.limit);
            let chunks = dhead.chunks_exact_mut(repeats * width).zip(dy.chunks_exact(repeats * width));
            for ((rows, dy), dplanned) in chunks.zip(dplanned.chunks_exact_mut(k)) {
                for (row, dy) in rows.chunks_exact_mut(width).zip(dy.chunks_exact(width)) {
                    dplanned.iter_mut().zip(&dy[2 * k..]).for_each(|(sum, d)| *sum += d);
                    for (i, (y, &d)) in row.iter_mut().zip(dy).enumerate() {
                        let bounded = *y / self.limit;
                        *y = if i < 2 * k { d } else { d * (1.0 - bounded * bounded) };
                    }
                    dbias.iter_mut().zip(&*row).for_each(|(sum, d)| *sum += d);
                }
            }
        }
        Ok((gradient(dhead, head)?, gradient(dbias, bias)?, gradient(dplanned, planned)?))
    }
}
