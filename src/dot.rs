//! Sums products of two slices in one fixed order, so that equal inputs give equal bits wherever it is called.

use std::ops::{Add, Mul};

/// `sum a[i] * b[i]` over the shorter length, summed in `LANES` interleaved lanes, which are then folded in
/// halves; `LANES` is a power of two. Written so that the compiler vectorises it.
#[inline(always)]
pub(crate) fn dot<T, const LANES: usize>(a: &[T], b: &[T]) -> T
where
    T: Copy + Default + Add<Output = T> + Mul<Output = T>,
{
    let n = a.len().min(b.len());
    let (a_blocks, a_rest) = a[..n].as_chunks::<LANES>();
    let (b_blocks, b_rest) = b[..n].as_chunks::<LANES>();
    let mut lanes = [T::default(); LANES];
    for (x, y) in a_blocks.iter().zip(b_blocks) {
        for i in 0..LANES {
            lanes[i] = lanes[i] + x[i] * y[i];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = lanes[i] + lanes[i + width];
        }
        width /= 2;
    }
    a_rest.iter().zip(b_rest).fold(lanes[0], |sum, (&x, &y)| sum + x * y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_summed_whole() {
        for n in 0..100 {
            let a: Vec<f64> = (0..n).map(|i| i as f64 - 3.0).collect();
            let b: Vec<f64> = (0..n).map(|i| 2.0 * i as f64 + 1.0).collect();
            let plain: f64 = a.iter().zip(&b).map(|(x, y)| x * y).sum();
            assert_eq!(dot::<f64, 8>(&a, &b), plain, "length {n}");
        }
    }
}
