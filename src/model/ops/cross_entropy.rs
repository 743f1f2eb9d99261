//! Cross-entropy of logits and targets: the softmax is never stored.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::{Values, gradient, values, width};
use crate::simd::{portable, wide_loop};

/// [`super::Ops::cross_entropy`]
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    logits.contiguous()?.apply_op1(CrossEntropy { targets: targets.to_vec() })
}

struct CrossEntropy {
    targets: Vec<u32>,
}

wide_loop! {
    /// Turns each row of logits into its softmax, and `log_sums` into the logarithms of what it was divided by.
    fn softmax(rows: &'a mut [f32], log_sums: &'a mut [f32], n: usize) {
        for (row, log_sum) in rows.chunks_exact_mut(n).zip(log_sums) {
            let most = row.iter().fold(f32::NEG_INFINITY, |most, &x| if x > most { x } else { most });
            for x in row.iter_mut() {
                *x = portable::exp(*x - most);
            }
            let sum = row.iter().sum::<f32>();
            *log_sum = most + portable::ln(sum);
            let scale = 1.0 / sum;
            for x in row.iter_mut() {
                *x *= scale;
            }
        }
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, logits) = (width(layout)?, values(logits, layout)?);
        if logits.len() != n * self.targets.len() || self.targets.iter().any(|&target| target as usize >= n) {
            bail!("cross_entropy: {} targets below {n} expected for {:?}", logits.len() / n, layout.shape());
        }
        let (mut rows, mut out) = (logits.to_vec(), vec![0.0; self.targets.len()]);
        softmax(&mut rows, &mut out, n);
        for ((out, row), &target) in out.iter_mut().zip(logits.chunks_exact(n)).zip(&self.targets) {
            *out -= row[target as usize];
        }
        let len = out.len();
        Ok((CpuStorage::F32(out), len.into()))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let mut d = Values::of(logits)?.to_vec();
        let n = d.len() / self.targets.len().max(1);
        softmax(&mut d, &mut vec![0.0; self.targets.len()], n);
        for ((d, &target), &dy) in d.chunks_exact_mut(n.max(1)).zip(&self.targets).zip(&*Values::of(&dy)?) {
            d[target as usize] -= 1.0;
            d.iter_mut().for_each(|d| *d *= dy);
        }
        gradient(d, logits)
    }
}
