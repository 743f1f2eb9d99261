//! Turns plan frames into how they are played: how much begins, what sounds, how loud and how bright it is. Of several ways to go on the one that
//! is nearest to the prompt in this is taken, what was played before it counted in.

use serde::{Deserialize, Serialize};

use crate::metrics::pitch_class;
use crate::plan::{DB_PER_UNIT, PlanFrame, Spectrum};

/// Seconds at the end of a prompt that it is taken from, at most and at least.
const HEARD_S: f32 = 10.0;
const LEAST_S: f32 = 1.0;
/// Bands this far below a frame's loudest are faint, dB.
const FAINT_DB: f32 = 50.0;
/// Differences that count as much as each other: of the rise (its logarithm), of the entropy in bits, of the level in dB, of the shares
/// of pitch classes, and of the timbre in dB rms.
const RISE: f32 = 0.3;
const ENTROPY_BITS: f32 = 0.3;
const LEVEL_DB: f32 = 3.0;
const SHARES: f32 = 0.4;
const TIMBRE_DB: f32 = 1.5;
/// Share of the newest stretch in what was played: two of them are half of it.
const NEWEST: f32 = 0.29;
/// Groups of neighbouring bands, equally many of them each, that a timbre is told by.
const N_GROUPS: usize = 8;

/// How a stretch of music is played, as far as plan frames tell; means over them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manner {
    /// [`rise`] from frame to frame.
    rise: f32,
    level_db: f32,
    /// Shares that the twelve pitch classes have in the power, and how many sound at a time: the entropy of a frame's shares.
    shares: [f32; 12],
    entropy_bits: f32,
    /// Levels of groups of bands from low to high, by the mean of them all.
    timbre_db: [f32; N_GROUPS],
}

/// Of the plan of a prompt the end that tells how it is played, if it is long enough.
pub fn telling<'a>(plan: &'a [PlanFrame], spectrum: &Spectrum) -> Option<&'a [PlanFrame]> {
    let frames = |seconds: f32| (seconds * spectrum.sample_rate() as f32) as usize / spectrum.hop();
    (plan.len() >= frames(LEAST_S)).then(|| &plan[plan.len().saturating_sub(frames(HEARD_S))..])
}

/// What bands rise by from a frame to the next, on the average; falling counts as nothing, and so does what is faint.
pub fn rise(frame: &[f32], before: &[f32]) -> f32 {
    let floor = faint(frame);
    let rises = frame.iter().zip(before).map(|(now, before)| (now.max(floor) - before.max(floor)).max(0.0));
    rises.sum::<f32>() / frame.len() as f32
}

fn faint(frame: &[f32]) -> f32 {
    frame.iter().copied().fold(f32::NEG_INFINITY, f32::max) - FAINT_DB / DB_PER_UNIT
}

impl Manner {
    /// Of plan frames that follow each other, `[n_bands]` each; zeros where there are none.
    pub fn of<'a>(frames: impl Iterator<Item = &'a [f32]>, spectrum: &Spectrum) -> Self {
        let classes: Vec<Option<usize>> = spectrum.centres_hz().iter().map(|&hz| pitch_class(hz)).collect();
        let (mut sum, mut n, mut before) = (Self::default(), 0u32, None::<&[f32]>);
        for frame in frames {
            let floor = faint(frame);
            sum.rise += before.map_or(0.0, |before| rise(frame, before));
            let (mut shares, mut total) = ([0.0f32; 12], 0.0);
            for (band, class) in frame.iter().zip(&classes) {
                // A band holds ln(power) / 4.
                let power = (4.0 * band).exp();
                total += power;
                if let Some(class) = class {
                    shares[*class] += power;
                }
            }
            let of_classes = shares.iter().sum::<f32>().max(f32::MIN_POSITIVE);
            for (sum_of, share) in sum.shares.iter_mut().zip(shares.map(|power| power / of_classes)) {
                *sum_of += share;
                sum.entropy_bits -= if share > 0.0 { share * share.log2() } else { 0.0 };
            }
            let group_len = frame.len().div_ceil(N_GROUPS);
            let mean = |bands: &[f32]| bands.iter().map(|band| band.max(floor)).sum::<f32>() / bands.len() as f32;
            let of_all = mean(frame);
            for (sum, group) in sum.timbre_db.iter_mut().zip(frame.chunks(group_len)) {
                *sum += (mean(group) - of_all) * DB_PER_UNIT;
            }
            sum.level_db += 10.0 * total.max(f32::MIN_POSITIVE).log10();
            n += 1;
            before = Some(frame);
        }
        let each = 1.0 / n.max(1) as f32;
        Self {
            rise: sum.rise / n.saturating_sub(1).max(1) as f32,
            level_db: sum.level_db * each,
            shares: sum.shares.map(|share| share * each),
            entropy_bits: sum.entropy_bits * each,
            timbre_db: sum.timbre_db.map(|level| level * each),
        }
    }

    /// What was played so, and then this; what was played longer ago counts less.
    pub fn after(&self, before: &Self) -> Self {
        let mean = |now: f32, before: f32| before + NEWEST * (now - before);
        let means = |a: &[f32], b: &[f32], i: usize| mean(a[i], b[i]);
        Self {
            rise: mean(self.rise, before.rise),
            level_db: mean(self.level_db, before.level_db),
            shares: std::array::from_fn(|i| means(&self.shares, &before.shares, i)),
            entropy_bits: mean(self.entropy_bits, before.entropy_bits),
            timbre_db: std::array::from_fn(|i| means(&self.timbre_db, &before.timbre_db, i)),
        }
    }

    /// How differently something else is played: 1 where one thing differs by as much as counts.
    pub fn distance(&self, other: &Self) -> f32 {
        let rise = (self.rise.max(f32::MIN_POSITIVE) / other.rise.max(f32::MIN_POSITIVE)).ln();
        let shares = self.shares.iter().zip(&other.shares).map(|(a, b)| (a - b).abs()).sum::<f32>() / 2.0;
        let timbre = self.timbre_db.iter().zip(&other.timbre_db).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
        let differences = [
            rise / RISE,
            (self.entropy_bits - other.entropy_bits) / ENTROPY_BITS,
            (self.level_db - other.level_db) / LEVEL_DB,
            shares / SHARES,
            (timbre / N_GROUPS as f32).sqrt() / TIMBRE_DB,
        ];
        differences.map(|difference| difference * difference).iter().sum::<f32>().sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PlanConfig;

    #[test]
    fn each_difference_counts_by_itself() {
        let spectrum = Spectrum::new(16_000, &PlanConfig::default()).unwrap();
        let note = |class: usize, level_db: f32| -> Vec<f32> {
            let power = |&hz: &f64| if pitch_class(hz) == Some(class) { level_db } else { -90.0 };
            spectrum.centres_hz().iter().map(|hz| power(hz) / DB_PER_UNIT).collect()
        };
        let of = |frames: &[Vec<f32>]| Manner::of(frames.iter().map(Vec::as_slice), &spectrum);
        let held = of(&vec![note(3, -20.0); 32]);
        let struck = of(&(0..32).map(|k| note(3, -20.0 - 5.0 * (k % 4) as f32)).collect::<Vec<_>>());
        let struck_twice_as_often = of(&(0..32).map(|k| note(3, -20.0 - 10.0 * (k % 2) as f32)).collect::<Vec<_>>());
        let louder = of(&vec![note(3, -17.0); 32]);
        let another = of(&vec![note(8, -20.0); 32]);
        assert_eq!((held.distance(&held), held.rise, held.entropy_bits < 1e-3), (0.0, 0.0, true));
        assert!(struck.rise > 0.0 && struck_twice_as_often.rise > 1.2 * struck.rise);
        assert!((held.distance(&louder) - 1.0).abs() < 0.01, "{}", held.distance(&louder));
        let as_bright = Manner { timbre_db: held.timbre_db, ..another };
        assert!((held.distance(&as_bright) - 1.0 / SHARES).abs() < 0.1, "{}", held.distance(&as_bright));
        let brighter = Manner { timbre_db: held.timbre_db.map(|level| level + TIMBRE_DB), ..held };
        assert!((held.distance(&brighter) - 1.0).abs() < 0.01, "{}", held.distance(&brighter));
        let on_the_way = another.after(&held);
        assert!((held.distance(&on_the_way) - held.distance(&another) * NEWEST).abs() < 0.01, "{on_the_way:?}");
        assert_eq!(held.after(&held), held);
        let half = note(3, -20.0).len() / 2;
        let high =
            of(&vec![note(3, -20.0).iter().enumerate().map(|(i, &x)| if i < half { -90.0 } else { x }).collect(); 32]);
        let lean = |m: &Manner| {
            m.timbre_db[N_GROUPS / 2..].iter().sum::<f32>() - m.timbre_db[..N_GROUPS / 2].iter().sum::<f32>()
        };
        assert!(lean(&high) > lean(&held) + 5.0, "{high:?}");
        let chord: Vec<f32> = note(3, -20.0).iter().zip(note(8, -20.0)).map(|(a, b)| a.max(b)).collect();
        assert!((of(&vec![chord; 32]).entropy_bits - 1.0).abs() < 0.1);
    }
}
