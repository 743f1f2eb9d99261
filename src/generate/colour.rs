//! Turns plan frames into those of one recording: what codebooks that are for all music lose of this one, it has shown itself.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};
use serde::{Deserialize, Serialize};

use crate::cholesky::solve;
use crate::plan::{PlanFrame, Spectrum, bands_of, neighbourhoods};
use crate::simd::Kernels;

/// Frames that count as much as the assumption that bands have no bias.
const USUAL: f64 = 100.0;
/// Added to the squares of the bands: as much as 5,600 frames of 9 dB about their mean that say that the map changes nothing.
const RIDGE: f64 = 1500.0;
/// Most frames after a prompt in which it is still felt what its last one lacked: 2 s at 16 kHz.
const FELT: usize = 64;

/// Most of a jump that is taken back for each of the frames beside it.
const MOST_TAKEN: f64 = 0.5;
/// Frames at the end of a prompt that details are taken from, at most and at least: 20 s and 2 s at 16 kHz.
const SHOWN: std::ops::Range<usize> = 62..625;
/// Share of what the likest of them lacks.
const DETAIL: f32 = 0.6;

/// What plan frames lack to be those of a recording: a linear map of their bands, in the first frames after a prompt some of what its
/// last one lacked, too, steadiness, and details.
///
/// The map is by least squares from the frames of a prompt as the model reads them and as they are (ridge regression: Hoerl and Kennard,
/// 1970; as recognizers of speech adapt to a speaker: Gales, 1998); a short prompt changes little. How much of what a frame lacks the
/// later ones lack as well is the autocorrelation of what they do.
///
/// Where one frame has other entries of the codebooks than the next, many neighbouring bands jump together, which sounds like an attack. Of
/// what a band's neighbourhood jumps by, seen from the frame before and from the one after, shares are taken back that bring the prompt's
/// frames nearest to the recording.
///
/// Codebooks draw all sounds with the same few strokes, so at last a frame gets a share of what that frame of the prompt lacks which is likest to it, with its
/// neighbours: not the nearest that could be said of it, but as detailed as the recording (as concatenative synthesis takes units: Schwarz, 2006).
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
    /// The shares of the difference from the frame before and from the one after that are taken back.
    steady: [f32; 2],
    /// The end of the prompt, oldest first; nothing where that is too short.
    shown: Vec<Shown>,
}

/// A coloured frame of the prompt and what it lacks, `[n_bands]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Shown {
    bands: Vec<f32>,
    lacks: Vec<f32>,
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
        let bands = bands_of(&plan);
        let lacks = &wanted - &bands;
        colour.remember(lacks.view());
        colour.steady = steadiness(bands.view(), lacks.view());
        if plan.len() >= SHOWN.start {
            let frames = plan.iter().zip(lacks.rows()).skip(plan.len().saturating_sub(SHOWN.end));
            let shown = |(frame, lacks): (&PlanFrame, ArrayView1<f32>)| Shown {
                bands: frame.bands.clone(),
                lacks: lacks.to_vec(),
            };
            colour.shown = frames.map(shown).collect();
        }
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
        self.feel(k, bands);
    }

    /// What of it the prompt's end has to do with.
    pub fn feel(&self, k: u64, bands: &mut [f32]) {
        if let Some(share) = usize::try_from(k).ok().and_then(|k| self.felt.get(k)) {
            bands.iter_mut().zip(&self.last).for_each(|(band, lacks)| *band += share * lacks);
        }
    }

    /// Takes back what coloured bands jump by from the frame `before` and to the one `after`, as far as they are there, and gives them
    /// their details; `[n_bands]` each.
    pub fn finish(&self, before: Option<&[f32]>, bands: &mut [f32], after: Option<&[f32]>) {
        let details = self.likest([before, Some(bands), after]).map_or(&[][..], |shown| &shown.lacks);
        let jumps = [before, after].map(|other| other.map(|other| jumps(other, bands)));
        for (share, jumps) in self.steady.iter().zip(jumps) {
            bands.iter_mut().zip(jumps.iter().flatten()).for_each(|(band, jump)| *band += share * jump);
        }
        bands.iter_mut().zip(details).for_each(|(band, lacks)| *band += DETAIL * lacks);
    }

    /// The frame of the prompt that is likest to the second of three, each with those beside it.
    fn likest(&self, frames: [Option<&[f32]>; 3]) -> Option<&Shown> {
        let dot = Kernels::chosen().dot;
        let far = |a: &[f32], b: &[f32]| dot(a, a) + dot(b, b) - 2.0 * dot(a, b);
        let distance = |k: usize| {
            let beside = |i: usize| self.shown.get((k + i).checked_sub(1)?);
            let distances = (0..3).filter_map(|i| Some(far(frames[i]?, &beside(i)?.bands)));
            let (sum, n) = distances.fold((0.0, 0), |(sum, n), far| (sum + far, n + 1));
            sum / n as f32
        };
        let all = self.shown.iter().enumerate().map(|(k, shown)| (shown, distance(k)));
        all.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(shown, _)| shown)
    }

    /// Gives the frames that follow a prompt, whose own are coloured, the recording's colour, and finishes them.
    pub fn follow(&self, prompt: &[PlanFrame], frames: &mut [PlanFrame]) {
        let mut before = prompt.last().map(|frame| frame.bands.clone());
        before.iter_mut().for_each(|bands| self.feel(0, bands));
        for (k, frame) in (0..).zip(&mut *frames) {
            self.apply_after(k, &mut frame.bands);
        }
        for k in 0..frames.len() {
            let (now, after) = frames[k..].split_at_mut(1);
            let unfinished = now[0].bands.clone();
            self.finish(before.as_deref(), &mut now[0].bands, after.first().map(|frame| &frame.bands[..]));
            before = Some(unfinished);
        }
    }
}

/// What another frame has more than `bands`, on the average over each band's neighbourhood.
fn jumps(other: &[f32], bands: &[f32]) -> Vec<f32> {
    let differences: Vec<f32> = other.iter().zip(bands).map(|(other, band)| other - band).collect();
    neighbourhoods(&differences).collect()
}

/// Of successive coloured frames and what they lack, `[n_frames, n_bands]`, the shares of their jumps that are best taken back.
fn steadiness(frames: ArrayView2<f32>, lacks: ArrayView2<f32>) -> [f32; 2] {
    let frames: Vec<Vec<f32>> = frames.rows().into_iter().map(|row| row.to_vec()).collect();
    let jumps = |three: &[Vec<f32>]| {
        let pairs = jumps(&three[0], &three[1]).into_iter().zip(jumps(&three[2], &three[1]));
        pairs.map(|(before, after)| [f64::from(before), f64::from(after)]).collect::<Vec<_>>()
    };
    let jumps: Array2<f64> = frames.windows(3).flat_map(jumps).collect::<Vec<_>>().into();
    let lacks = lacks.rows().into_iter().skip(1).flatten().take(jumps.nrows()).map(|&x| f64::from(x));
    let lacks = lacks.collect::<Array1<f64>>().insert_axis(Axis(1));
    let shares = solve(jumps.t().dot(&jumps) + Array2::<f64>::eye(2), jumps.t().dot(&lacks));
    [0, 1].map(|i| shares[[i, 0]].clamp(0.0, MOST_TAKEN) as f32)
}

#[cfg(test)]
mod tests {
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

    /// Sounds that begin every 25 frames, suddenly, and die away, and the same as one reads them whose codebooks jump up and down by 2 dB.
    #[test]
    fn what_codebooks_jump_by_is_taken_back_and_attacks_stay() {
        let mut rng = Rng::new(7);
        let wanted = Array2::from_shape_fn((600, 40), |(k, _)| 2.0 - 0.05 * (k % 25) as f32);
        let mut read = wanted.clone();
        for mut row in read.rows_mut() {
            row += if rng.uniform() < 0.5 { 0.11 } else { -0.11 };
        }
        let steady = steadiness(read.view(), (&wanted - &read).view());
        let colour = Colour { steady, ..Colour::default() };
        let plan = |bands: &Array2<f32>| -> Vec<PlanFrame> {
            let frame = |row: ArrayView1<f32>| PlanFrame { tokens: Vec::new(), bands: row.to_vec() };
            bands.rows().into_iter().map(frame).collect()
        };
        let mut steadied = plan(&read);
        colour.follow(&[], &mut steadied);
        let steadied = bands_of(&steadied);
        let lacks = |of: &Array2<f32>| (&wanted - of).mapv(|x| x * x).sum();
        assert!(lacks(&steadied) < 0.75 * lacks(&read), "{} of {}, {steady:?}", lacks(&steadied), lacks(&read));
        let attack = |of: &Array2<f32>| (1..24).map(|i| of[[25 * i, 20]] - of[[25 * i - 1, 20]]).sum::<f32>() / 23.0;
        assert!(attack(&steadied) > 0.7 * attack(&wanted), "{} of {}", attack(&steadied), attack(&wanted));
        // What is read as it is needs no steadying, and neither does a prompt of a frame or two.
        assert_eq!(steadiness(wanted.view(), Array2::zeros(wanted.dim()).view()), [0.0; 2]);
        for n in 0..3 {
            let few = read.slice(s![..n, ..]);
            assert!(steadiness(few, (&wanted.slice(s![..n, ..]) - &few).view())[0] < 0.5);
        }
        // The first frame has none before it, the last none after it.
        let mut alone = plan(&read.slice(s![..1, ..]).to_owned());
        colour.follow(&[], &mut alone);
        assert_eq!(alone, plan(&read.slice(s![..1, ..]).to_owned()));
    }

    /// Two sounds that take turns, the same but for what comes before.
    #[test]
    fn a_frame_gets_its_details_from_the_likest_with_its_neighbours() {
        let sound = |k: usize| vec![[1.0, 2.0, 1.0, 3.0][k % 4]; 10];
        let shown = |k: usize| Shown { bands: sound(k), lacks: vec![0.1 * (k % 4) as f32; 10] };
        let colour = Colour { shown: (0..80).map(shown).collect(), ..Colour::default() };
        let near = |k: usize| sound(k).iter().map(|x| x + 0.05).collect::<Vec<f32>>();
        for k in 4..8 {
            let (before, mut bands, after) = (near(k - 1), near(k), near(k + 1));
            colour.finish(Some(&before), &mut bands, Some(&after));
            let expected = near(k)[0] + DETAIL * 0.1 * (k % 4) as f32;
            assert!(bands.iter().all(|band| (band - expected).abs() < 1e-5), "{k}: {bands:?}, {expected}");
        }
        let mut alone = near(1);
        colour.finish(None, &mut alone, None);
        assert!((alone[3] - near(1)[3] - DETAIL * 0.1).abs() < 1e-5);
        Colour::default().finish(Some(&near(1)), &mut alone, None);
        assert!((alone[3] - near(1)[3] - DETAIL * 0.1).abs() < 1e-5);
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
