//! Matrix products of plain slices by the crate `gemm`, with every size checked before.
//!
//! One of the crate's few files with `unsafe`: gemm takes pointers.
#![allow(unsafe_code)]

use gemm::Parallelism;

/// A matrix whose rows or columns lie in a slice.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// A matrix to write to; its rows lie in a slice.
pub struct MatrixMut<'a> {
    values: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

/// Elements from the first to the last of a matrix.
fn extent(rows: usize, cols: usize, row_stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols }
}

impl<'a> Matrix<'a> {
    /// `values.len() / cols` rows, one after the other.
    pub fn new(values: &'a [f32], cols: usize) -> Self {
        Self::strided(values, values.len() / cols, cols, cols)
    }

    /// Rows of `cols` values, `row_stride` apart.
    ///
    /// # Panics
    /// If the slice is too short.
    pub fn strided(values: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(values.len() >= extent(rows, cols, row_stride), "{rows} rows of {cols} do not fit");
        Self { values, rows, cols, row_stride, col_stride: 1 }
    }

    /// Transposed.
    pub fn t(self) -> Self {
        let Self { values, rows, cols, row_stride, col_stride } = self;
        Self { values, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

impl<'a> MatrixMut<'a> {
    /// As [`Matrix::new`].
    pub fn new(values: &'a mut [f32], cols: usize) -> Self {
        let rows = values.len() / cols;
        Self::strided(values, rows, cols, cols)
    }

    /// As [`Matrix::strided`].
    ///
    /// # Panics
    /// If the slice is too short, or rows overlap.
    pub fn strided(values: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(values.len() >= extent(rows, cols, row_stride), "{rows} rows of {cols} do not fit");
        assert!(row_stride >= cols, "rows of {cols} overlap");
        Self { values, rows, cols, row_stride }
    }
}

/// `out = a b`, on this thread.
///
/// # Panics
/// If the sizes do not match.
pub fn multiply(a: Matrix, b: Matrix, out: MatrixMut) {
    product(a, b, out, false);
}

/// `out += a b`, on this thread.
///
/// # Panics
/// If the sizes do not match.
pub fn multiply_add(a: Matrix, b: Matrix, out: MatrixMut) {
    product(a, b, out, true);
}

fn product(a: Matrix, b: Matrix, out: MatrixMut, add: bool) {
    assert_eq!((a.rows, a.cols, b.cols), (out.rows, b.rows, out.cols), "a product's sizes");
    // SAFETY: the three slices are as long as their matrices' extents (asserted when they were made, and transposing changes
    // nothing about it), `out` is borrowed mutably, and all is initialised.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            a.cols,
            out.values.as_mut_ptr(),
            1,
            out.row_stride as isize,
            add,
            a.values.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..n).map(|_| rng.normal()).collect()
    }

    #[test]
    fn products_of_parts_and_transposes_are_those_of_their_definition() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (33, 48, 63), (130, 17, 96), (4, 0, 3)] {
            let (a, b) = (numbers((m + k) * (k + 2) + 3, 1), numbers((n + 1) * (k + n) + 2, 2));
            let lines = Matrix::strided(&a, m, k, k + 2);
            let columns = Matrix::strided(&b, n, k, k + 1).t();
            let mut out = numbers(m * (n + 4), 3);
            let before = out.clone();
            for add in [false, true] {
                let target = MatrixMut::strided(&mut out, m, n, n + 4);
                if add {
                    multiply_add(lines, columns, target)
                } else {
                    multiply(lines, columns, target)
                }
                for i in 0..m {
                    for j in 0..n + 4 {
                        let got = out[i * (n + 4) + j];
                        if j >= n {
                            assert_eq!(got, before[i * (n + 4) + j], "beside the matrix");
                            continue;
                        }
                        let exact: f32 = (0..k).map(|x| a[i * (k + 2) + x] * b[j * (k + 1) + x]).sum();
                        let exact = if add { 2.0 * exact } else { exact };
                        assert!((got - exact).abs() < 1e-4, "{m}x{k}x{n}, add {add}: {got} for {exact}");
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "do not fit")]
    fn a_matrix_beyond_its_slice_is_refused() {
        Matrix::strided(&[0.0; 10], 3, 4, 4);
    }
}
