//! Embeddings: several rows of a table added to each row of a sequence.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{Values, by_rows, gradient, values, width};
use crate::simd::wide_loop;

/// [`super::Ops::gather_add`]
pub fn gather_add(x: &Tensor, table: &Tensor, codes: &[u32]) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&table.contiguous()?, GatherAdd { codes: codes.to_vec() })
}

struct GatherAdd {
    /// `[rows of x, rows of the table that are added to each]`
    codes: Vec<u32>,
}

wide_loop! {
    /// `out[i] += ` the rows of `codes[i]`.
    fn add_selected(table: &'a [f32], codes: &'a [u32], out: &'a mut [f32], dim: usize) {
        let each = codes.len() * dim / out.len();
        for (out, codes) in out.chunks_exact_mut(dim).zip(codes.chunks_exact(each)) {
            for &code in codes {
                let row = &table[code as usize * dim..][..dim];
                out.iter_mut().zip(row).for_each(|(y, x)| *y += x);
            }
        }
    }
}

wide_loop! {
    /// The other way: every row of `dy` is added to the rows of its codes.
    fn add_to_selected(dy: &'a [f32], codes: &'a [u32], dtable: &'a mut [f32], dim: usize) {
        let each = codes.len() * dim / dy.len();
        for (dy, codes) in dy.chunks_exact(dim).zip(codes.chunks_exact(each)) {
            for &code in codes {
                let row = &mut dtable[code as usize * dim..][..dim];
                row.iter_mut().zip(dy).for_each(|(y, x)| *y += x);
            }
        }
    }
}

impl CustomOp2 for GatherAdd {
    fn name(&self) -> &'static str {
        "gather_add"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, table: &CpuStorage, lt: &Layout) -> Result<(CpuStorage, Shape)> {
        let (dim, x, table) = (width(lx)?, values(x, lx)?, values(table, lt)?);
        let rows = x.len() / dim;
        if rows == 0 || !self.codes.len().is_multiple_of(rows) || lt.dims().last() != Some(&dim) {
            bail!("gather_add: {} codes of {:?} for {:?}", self.codes.len(), lt.shape(), lx.shape());
        }
        let n = table.len() / dim;
        if let Some(code) = self.codes.iter().find(|&&code| code as usize >= n) {
            bail!("gather_add: code {code} of a table of {n} rows");
        }
        let each = self.codes.len() / rows;
        let mut out = vec![0.0; x.len()];
        by_rows(&mut out, dim, 0, |_, first, out| {
            out.copy_from_slice(&x[first * dim..][..out.len()]);
            add_selected(table, &self.codes[first * each..][..out.len() / dim * each], out, dim);
        });
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, table: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let mut dtable = vec![0.0; table.elem_count()];
        add_to_selected(&Values::of(&dy)?, &self.codes, &mut dtable, table.dim(1)?);
        Ok((Some(dy), gradient(dtable, table)?))
    }
}
