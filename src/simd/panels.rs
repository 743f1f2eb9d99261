//! Weights of a linear map packed for one pass through memory: panels of outputs, inputs in order within a panel.

/// Outputs that are computed side by side.
pub const LANES: usize = 16;
/// Most vectors of [`LANES`] outputs in a panel: as many sums as fit in registers.
pub const MAX_VECTORS: usize = 6;
/// Adding and subtracting this rounds to a whole number (ties to even) when |x| < 2^22.
pub(super) const ROUNDING: f32 = 12_582_912.0;
/// Vectors whose numbers are all smaller are rounded to nothing.
pub(super) const SMALLEST: f32 = 1e-30;
/// Inputs that one integer instruction takes at a time.
pub const GROUP: usize = 4;

/// What numbers of which `most` is the largest are multiplied with before they are rounded.
#[inline(always)]
pub(super) fn factor(most: f32) -> f32 {
    if most > SMALLEST { 127.0 / most } else { 0.0 }
}

/// What one is worth among numbers that were multiplied with [`factor`] and rounded: `most / 127`, rounded to 17 binary digits, so
/// that every rounded value is an f32 and rounds to itself.
#[inline(always)]
pub(super) fn unit(most: f32) -> f32 {
    if most > SMALLEST { f32::from_bits(((most / 127.0).to_bits() + 0x40) & !0x7f) } else { 0.0 }
}

/// The nearest whole number (ties to even) of -128..=127.
#[inline(always)]
pub(super) fn whole(x: f32) -> i8 {
    // The low byte of the shifted sum is the whole number in two's complement.
    (x + ROUNDING).to_bits() as i8
}

/// The larger one, or b if they cannot be compared: what one instruction computes.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// [`LANES`] numbers that are used side by side: a cache line.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub struct LineF32(pub [f32; LANES]);

impl LineF32 {
    pub const ZERO: Self = Self([0.0; LANES]);
}

/// Four inputs' weights for [`LANES`] outputs, the inputs of an output side by side: a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct LineI8(pub [i8; GROUP * LANES]);

impl LineI8 {
    pub const ZERO: Self = Self([0; GROUP * LANES]);
}

/// Neighbouring outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Panel {
    /// The first output.
    pub first: usize,
    /// Vectors of [`LANES`] outputs, 1 to [`MAX_VECTORS`].
    pub vectors: usize,
    /// Its first line.
    pub at: usize,
}

/// Cuts `n_out` outputs into panels of equal width where that is possible; `depth` lines make a vector.
fn panels(n_out: usize, depth: usize) -> Vec<Panel> {
    let vectors = n_out.div_ceil(LANES);
    let widest = match vectors {
        0..=MAX_VECTORS => vectors,
        _ => [MAX_VECTORS, 4, 5].into_iter().find(|&v| vectors.is_multiple_of(v)).unwrap_or(MAX_VECTORS),
    };
    (0..vectors)
        .step_by(widest.max(1))
        .map(|v| Panel { first: v * LANES, vectors: widest.min(vectors - v), at: v * depth })
        .collect()
}

/// A linear map in f32: `[panel][input][vector]` lines.
#[derive(Clone, Debug, PartialEq)]
pub struct PanelsF32 {
    pub n_in: usize,
    pub n_out: usize,
    pub(super) panels: Vec<Panel>,
    pub(super) lines: Vec<LineF32>,
}

impl PanelsF32 {
    /// From weights `[n_in, n_out]`.
    pub fn pack(weights: &[f32], n_out: usize) -> Self {
        let n_in = weights.len() / n_out;
        let panels = panels(n_out, n_in);
        let mut lines = Vec::with_capacity(n_in * n_out.div_ceil(LANES));
        for panel in &panels {
            for row in weights.chunks_exact(n_out) {
                for v in 0..panel.vectors {
                    let mut line = LineF32::ZERO;
                    let outputs = row[panel.first + v * LANES..].iter().take(LANES);
                    line.0.iter_mut().zip(outputs).for_each(|(x, &w)| *x = w);
                    lines.push(line);
                }
            }
        }
        Self { n_in, n_out, panels, lines }
    }
}

/// A linear map in whole numbers of -127..=127 with a scale per output: `[panel][group of 4 inputs][vector]` lines.
pub struct PanelsI8 {
    pub n_in: usize,
    pub n_out: usize,
    /// Groups of four inputs; the last one may be padded with zeros.
    pub groups: usize,
    pub(super) panels: Vec<Panel>,
    pub(super) lines: Vec<LineI8>,
    /// Weight = scale * whole number, `[n_out]` padded to whole vectors.
    pub(super) scales: Vec<f32>,
    /// `-128 * sum of an output's whole numbers`, padded to whole vectors: what instructions that take unsigned inputs start from.
    pub(super) offsets: Vec<i32>,
}

impl PanelsI8 {
    /// From weights `[n_in, n_out]`, which are [rounded](Rounded::new).
    pub fn pack(weights: &[f32], n_out: usize) -> Self {
        Rounded::new(weights, n_out).pack()
    }
}

/// A matrix `[n_in, n_out]` rounded to whole numbers of -127..=127 with a scale per output.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    pub n_out: usize,
    /// `[n_in, n_out]`
    pub whole: Vec<i8>,
    /// `[n_out]`
    pub scales: Vec<f32>,
}

impl Rounded {
    /// From weights `[n_in, n_out]`. [Values](Self::values) of a rounded matrix are rounded to the same.
    pub fn new(weights: &[f32], n_out: usize) -> Self {
        let mut most = vec![0.0f32; n_out];
        for row in weights.chunks_exact(n_out) {
            most.iter_mut().zip(row).for_each(|(most, w)| *most = larger(w.abs(), *most));
        }
        let factors: Vec<f32> = most.iter().map(|&most| factor(most)).collect();
        let mut rounded = vec![0; weights.len()];
        for (row, rounded) in weights.chunks_exact(n_out).zip(rounded.chunks_exact_mut(n_out)) {
            for ((w, factor), rounded) in row.iter().zip(&factors).zip(rounded) {
                *rounded = whole(w * factor);
            }
        }
        Self { n_out, whole: rounded, scales: most.into_iter().map(unit).collect() }
    }

    pub fn n_in(&self) -> usize {
        self.whole.len() / self.n_out
    }

    /// What the whole numbers stand for, `[n_in, n_out]`.
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.whole.len()];
        for (row, values) in self.whole.chunks_exact(self.n_out).zip(values.chunks_exact_mut(self.n_out)) {
            for ((&q, scale), value) in row.iter().zip(&self.scales).zip(values) {
                *value = f32::from(q) * scale;
            }
        }
        values
    }

    /// Laid out for the kernels.
    pub fn pack(&self) -> PanelsI8 {
        let (n_in, n_out) = (self.n_in(), self.n_out);
        let groups = n_in.div_ceil(GROUP);
        let panels = panels(n_out, groups);
        let mut lines = vec![LineI8::ZERO; groups * n_out.div_ceil(LANES)];
        let mut offsets = vec![0; n_out.next_multiple_of(LANES)];
        for row in self.whole.chunks_exact(n_out) {
            offsets.iter_mut().zip(row).for_each(|(offset, &q)| *offset -= 128 * i32::from(q));
        }
        let zeros = vec![0; n_out];
        for (group, rows) in self.whole.chunks(GROUP * n_out).enumerate() {
            let mut rows = rows.chunks_exact(n_out);
            let [a, b, c, d] = std::array::from_fn(|_| rows.next().unwrap_or(&zeros));
            for panel in &panels {
                let lines = &mut lines[panel.at + group * panel.vectors..][..panel.vectors];
                for (line, at) in lines.iter_mut().zip((panel.first..n_out).step_by(LANES)) {
                    let end = n_out.min(at + LANES);
                    let rows = a[at..end].iter().zip(&b[at..end]).zip(&c[at..end]).zip(&d[at..end]);
                    for (lane, (((&a, &b), &c), &d)) in line.0.as_chunks_mut::<GROUP>().0.iter_mut().zip(rows) {
                        *lane = [a, b, c, d];
                    }
                }
            }
        }
        let mut scales = self.scales.clone();
        scales.resize(offsets.len(), 0.0);
        PanelsI8 { n_in, n_out, groups, panels, lines, scales, offsets }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn a_rounded_matrix_is_near_and_rounds_to_itself() {
        let mut rng = Rng::new(3);
        for n_out in [1, 16, 37] {
            let mut weights: Vec<f32> = (0..50 * n_out).map(|i| rng.normal() * (0.5 + (i % n_out) as f32)).collect();
            weights.iter_mut().step_by(n_out).for_each(|w| *w *= 1e-35);
            let rounded = Rounded::new(&weights, n_out);
            let values = rounded.values();
            for (i, (w, value)) in weights.iter().zip(&values).enumerate() {
                assert!((w - value).abs() <= 0.501 * rounded.scales[i % n_out].max(1e-30), "{w} is {value}");
            }
            assert_eq!(Rounded::new(&values, n_out), rounded);
        }
    }

    #[test]
    fn panels_cover_every_output_once_and_are_as_wide_as_they_can() {
        for (n_out, expected) in
            [(1, vec![1]), (96, vec![6]), (100, vec![6, 1]), (128, vec![4, 4]), (288, vec![6; 3]), (320, vec![4; 5])]
        {
            let panels = panels(n_out, 10);
            assert_eq!(panels.iter().map(|p| p.vectors).collect::<Vec<_>>(), expected, "{n_out} outputs");
            let mut vectors = 0;
            for panel in panels {
                assert_eq!((panel.first, panel.at), (vectors * LANES, vectors * 10));
                vectors += panel.vectors;
            }
            assert_eq!(vectors, n_out.div_ceil(LANES));
        }
    }
}
