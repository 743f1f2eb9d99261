//! Weights of a linear map packed for one pass through memory: panels of outputs, inputs in order within a panel.

/// Outputs that are computed side by side.
pub const LANES: usize = 16;
/// Most vectors of [`LANES`] outputs in a panel: as many sums as fit in registers.
pub const MAX_VECTORS: usize = 6;
/// Adding and subtracting this rounds to a whole number (ties to even) when |x| < 2^22.
pub(super) const ROUNDING: f32 = 12_582_912.0;
/// Inputs that one integer instruction takes at a time.
pub const GROUP: usize = 4;

/// [`LANES`] numbers that are used side by side: a cache line.
#[derive(Clone, Copy)]
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
    /// From weights `[n_in, n_out]`, each output rounded to 127 steps either side of 0.
    pub fn pack(weights: &[f32], n_out: usize) -> Self {
        let n_in = weights.len() / n_out;
        let groups = n_in.div_ceil(GROUP);
        let mut most = vec![0.0f32; n_out];
        for row in weights.chunks_exact(n_out) {
            most.iter_mut().zip(row).for_each(|(most, w)| *most = most.max(w.abs()));
        }
        let factors: Vec<f32> = most.iter().map(|&m| if m > 0.0 { 127.0 / m } else { 0.0 }).collect();
        let panels = panels(n_out, groups);
        let mut lines = vec![LineI8::ZERO; groups * n_out.div_ceil(LANES)];
        let mut offsets = vec![0; n_out.next_multiple_of(LANES)];
        for panel in &panels {
            let end = n_out.min(panel.first + panel.vectors * LANES);
            for (k, row) in weights.chunks_exact(n_out).enumerate() {
                let group = &mut lines[panel.at + k / GROUP * panel.vectors..][..panel.vectors];
                for j in panel.first..end {
                    let rounded = (row[j] * factors[j] + ROUNDING - ROUNDING) as i8;
                    let lane = j - panel.first;
                    group[lane / LANES].0[lane % LANES * GROUP + k % GROUP] = rounded;
                    offsets[j] -= 128 * i32::from(rounded);
                }
            }
        }
        let mut scales: Vec<f32> = most.iter().map(|m| m / 127.0).collect();
        scales.resize(offsets.len(), 0.0);
        Self { n_in, n_out, groups, panels, lines, scales, offsets }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
