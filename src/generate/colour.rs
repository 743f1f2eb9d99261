//! Turns plan frames into those of one recording: what codebooks that are for all music lose of this one, it has shown itself.

use ndarray::{ArrayView1, ArrayView2, Axis, s};
use serde::{Deserialize, Serialize};

use crate::cholesky::solve;
use crate::plan::{PlanFrame, Spectrum, bands_of};

/// Frames that count as much as the assumption that bands have no bias.
const USUAL: f64 = 100.0;
/// Added to the squares of the bands: as much as 5,600 frames of 9 dB about their mean that say that the map changes nothing.
const RIDGE: f64 = 1500.0;
/// Most frames after a prompt in which it is still felt what its last one lacked: 2 s at 16 kHz.
const FELT: usize = 64;

/// What plan frames lack to be those of a recording: a linear map of their bands, and in the first frames after a prompt some of what its
/// last one lacked, too.
///
/// The map is by least squares from the frames of a prompt as the model reads them and as they are (ridge regression: Hoerl and Kennard,
/// 1970; as recognizers of speech adapt to a speaker: Gales, 1998); a short prompt changes little. How much of what a frame lacks the
/// later ones lack as well is the autocorrelation of what they do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Colour {
    /// What is added whatever is read, `[n_bands]`; empty where nothing changes.
    constant: Vec<f32>,
    /// What is added for every band that is read, a row each, `[n_bands, n_bands]`.
    map: Vec<f32>,
    /// The least and the most that frames of the prompt got, `[n_bands]`: it knows nothing of others.
    range: Vec<(f32, f32)>,
    /// What the prompt's last frame lacks, coloured, `[n_bands]`.
    last: Vec<f32>,
    /// The share of it that each of the next frames lacks, `[FELT]` at most.
    felt: Vec<f32>,
}

impl Colour {
    /// Of a prompt, samples as the model hears them, and its `plan` as the model reads it: its colour, and its frames coloured.
    pub fn of_prompt(mut plan: Vec<PlanFrame>, prompt: &[f32], spectrum: &Spectrum) -> (Self, Vec<PlanFrame>) {
        let wanted = spectrum.analyse(&prompt[prompt.len() % spectrum.hop()..]);
        // The first frames look back into silence.
        let first = spectrum.window_frames().min(wanted.nrows());
        let wanted = wanted.slice(s![first.., ..]);
        plan.drain(..plan.len().saturating_sub(wanted.nrows()));
        if plan.is_empty() {
            return (Self::default(), plan);
        }
        let mut colour = Self::of(bands_of(&plan).view(), wanted);
        plan.iter_mut().for_each(|frame| colour.apply(&mut frame.bands));
        colour.remember((&wanted - &bands_of(&plan)).view());
        (colour, plan)
    }

    /// Learns of what frames of the prompt lack, coloured, `[n_frames, n_bands]`, how long it is felt.
    fn remember(&mut self, lacks: ArrayView2<f32>) {
        let n = lacks.nrows();
        let likeness = |lag: usize| {
            let pairs = lacks.rows().into_iter().skip(lag).zip(lacks.rows());
            pairs.map(|(later, earlier)| f64::from(later.dot(&earlier))).sum::<f64>() / (n - lag) as f64
        };
        let all = likeness(0);
        if all > 0.0 {
            let fading = |lag: usize| 1.0 - lag as f64 / FELT as f64;
            let share = |lag: usize| (likeness(lag) / all).clamp(0.0, 1.0) * fading(lag);
            self.felt = (1..FELT.min(n / 2)).map(|lag| share(lag) as f32).collect();
            self.last = lacks.row(n - 1).to_vec();
        }
    }

    /// Of frames as they are read and as they should be, `[n_frames, n_bands]`; one that changes nothing where there are none.
    fn of(read: ArrayView2<f32>, wanted: ArrayView2<f32>) -> Self {
        let read = read.mapv(f64::from);
        let Some(mean) = read.mean_axis(Axis(0)) else { return Self::default() };
        let lacks = wanted.mapv(f64::from) - &read;
        let bias = lacks.sum_axis(Axis(0)) / (read.nrows() as f64 + USUAL);
        let (read, lacks) = (read - &mean, lacks - &bias);
        let mut squares = read.t().dot(&read);
        squares.diag_mut().iter_mut().for_each(|square| *square += RIDGE);
        let map = solve(squares, read.t().dot(&lacks));
        let constant = &bias - &mean.dot(&map);
        let got = read.dot(&map) + &bias;
        let narrow = |x: f64| x as f32;
        let range_of = |band: ArrayView1<f64>| {
            let most = band.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            (narrow(band.iter().copied().fold(f64::INFINITY, f64::min)), narrow(most))
        };
        Self {
            constant: constant.into_iter().map(narrow).collect(),
            map: map.into_iter().map(narrow).collect(),
            range: got.columns().into_iter().map(range_of).collect(),
            ..Self::default()
        }
    }

    /// Gives the bands of a frame, `[n_bands]`, the recording's colour.
    pub fn apply(&self, bands: &mut [f32]) {
        let mut lacks = self.constant.clone();
        for (band, row) in bands.iter().zip(self.map.chunks_exact(bands.len())) {
            lacks.iter_mut().zip(row).for_each(|(lacks, weight)| *lacks += band * weight);
        }
        for ((band, lacks), (least, most)) in bands.iter_mut().zip(lacks).zip(&self.range) {
            *band += lacks.max(*least).min(*most);
        }
    }

    /// The same for the bands of frame `k` after the prompt.
    pub fn apply_after(&self, k: u64, bands: &mut [f32]) {
        self.apply(bands);
        if let Some(share) = usize::try_from(k).ok().and_then(|k| self.felt.get(k)) {
            bands.iter_mut().zip(&self.last).for_each(|(band, lacks)| *band += share * lacks);
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::rng::Rng;

    /// Frames of 20 bands of some 9 dB, and what has every band 3 dB louder and the upper ten follow the lower ten by half.
    fn frames(n: usize) -> (Array2<f32>, Array2<f32>) {
        let mut rng = Rng::new(3);
        let read = Array2::from_shape_fn((n, 20), |_| 1.0 + 0.5 * rng.normal());
        let mut wanted = &read + 0.17;
        let (low, mut high) = wanted.multi_slice_mut((s![.., ..10], s![.., 10..]));
        high += &(low.mapv(|x| 0.5 * (x - 1.17)));
        (read, wanted)
    }

    /// How much of what lacks is left of other frames of the same kind.
    fn left(n: usize) -> f32 {
        let (read, wanted) = frames(n);
        let colour = Colour::of(read.view(), wanted.view());
        let (mut read, wanted) = frames(n + 400);
        let lacks = (&wanted - &read).slice(s![n.., ..]).mapv(|x| x * x).sum();
        for mut row in read.rows_mut() {
            colour.apply(row.as_slice_mut().unwrap());
        }
        (&wanted - &read).slice(s![n.., ..]).mapv(|x| x * x).sum() / lacks
    }

    #[test]
    fn a_long_recording_shows_its_colour_and_a_short_one_changes_little() {
        let [short, some, long] = [10, 300, 10_000].map(left);
        assert!((0.75..1.0).contains(&short) && some < 0.7 && long < 0.1, "{short} {some} {long}");
    }

    #[test]
    fn what_stays_away_from_frame_to_frame_is_felt_after_the_prompt() {
        let mut rng = Rng::new(5);
        let last = |colour: &Colour, k| {
            let mut bands = [0.0; 20];
            colour.apply_after(k, &mut bands);
            bands
        };
        let mut lacks = Array2::from_shape_fn((200, 20), |(_, band)| if band < 10 { 0.2 } else { -0.1 });
        let mut colour = Colour { range: vec![(0.0, 0.0); 20], constant: vec![0.0; 20], ..Colour::default() };
        colour.remember(lacks.view());
        assert_eq!(last(&colour, 0)[..10], [0.2 * (1.0 - 1.0 / FELT as f32); 10]);
        assert!(last(&colour, 31)[12] < -0.04 && last(&colour, 63) == [0.0; 20]);
        lacks.mapv_inplace(|_| rng.normal());
        colour.remember(lacks.view());
        let share =
            last(&colour, 0).map(f32::abs).iter().sum::<f32>() / colour.last.iter().map(|x| x.abs()).sum::<f32>();
        assert!(share < 0.1, "noise has no memory: {share}");
    }

    #[test]
    fn what_shows_nothing_changes_nothing() {
        let mut bands = [1.0, 2.0, 3.0];
        Colour::of(Array2::zeros((0, 3)).view(), Array2::zeros((0, 3)).view()).apply(&mut bands);
        let still = Array2::from_elem((500, 3), 0.5);
        Colour::of(still.view(), still.view()).apply(&mut bands);
        assert_eq!(bands, [1.0, 2.0, 3.0]);
    }
}
