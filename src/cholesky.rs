//! Turns symmetric, positive definite matrices into their triangular roots, and systems of equations into solutions.

use ndarray::{Array1, Array2, s};

/// L of `a = L L^T`, lower triangular (A.-L. Cholesky, 1910). A pivot of at most `least` is rounding's: its column is zero.
pub(crate) fn factor(mut a: Array2<f64>, least: f64) -> Array2<f64> {
    let n = a.nrows();
    for j in 0..n {
        let pivot = a[[j, j]];
        let scale = if pivot > least { pivot.sqrt().recip() } else { 0.0 };
        let column: Array1<f64> = &a.slice(s![j.., j]) * scale;
        a.slice_mut(s![j.., j]).assign(&column);
        a.slice_mut(s![..j, j]).fill(0.0);
        for k in j + 1..n {
            let factor = column[k - j];
            let rest = &column.slice(s![k - j..]) * factor;
            a.slice_mut(s![k.., k]).scaled_add(-1.0, &rest);
        }
    }
    a
}

/// x of `a x = b` for a symmetric, positive definite `a`; 0 where `a` says nothing.
pub(crate) fn solve(a: Array2<f64>, mut b: Array2<f64>) -> Array2<f64> {
    let over = |x: f64, pivot: f64| if pivot > 0.0 { x / pivot } else { 0.0 };
    let l = factor(a, 0.0);
    let n = l.nrows();
    for i in 0..n {
        for k in 0..i {
            let (before, mut row) = b.multi_slice_mut((s![k, ..], s![i, ..]));
            row.scaled_add(-l[[i, k]], &before);
        }
        b.row_mut(i).mapv_inplace(|x| over(x, l[[i, i]]));
    }
    for i in (0..n).rev() {
        for k in i + 1..n {
            let (mut row, after) = b.multi_slice_mut((s![i, ..], s![k, ..]));
            row.scaled_add(-l[[k, i]], &after);
        }
        b.row_mut(i).mapv_inplace(|x| over(x, l[[i, i]]));
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn what_is_solved_fits_and_roots_give_back_what_they_are_of() {
        let mut rng = Rng::new(3);
        let mut draw = |rows, columns| Array2::from_shape_fn((rows, columns), |_| f64::from(rng.normal()));
        let (root, x) = (draw(20, 12), draw(12, 5));
        let a = root.t().dot(&root);
        let near = |a: &Array2<f64>, b: &Array2<f64>| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        let l = factor(a.clone(), 0.0);
        assert!(near(&l.dot(&l.t()), &a) && l.indexed_iter().all(|((i, j), &x)| i >= j || x == 0.0), "{l}");
        assert!(near(&solve(a.clone(), a.dot(&x)), &x));
        assert!(solve(Array2::zeros([2, 2]), Array2::ones([2, 1])).iter().all(|x| *x == 0.0));
        // Of rank two, with a row of nothing.
        let flat =
            Array2::from_shape_fn((5, 2), |(i, j)| if i == 3 { 0.0 } else { f64::from(rng.normal()) + j as f64 });
        let a = flat.dot(&flat.t());
        let l = factor(a.clone(), 1e-9);
        assert!(near(&l.dot(&l.t()), &a) && l.row(3).iter().all(|x| *x == 0.0), "{l}");
    }
}
