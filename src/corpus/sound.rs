//! Turns the levels of all pieces into what is wrong with them, and what to do about it.

use serde::{Deserialize, Serialize};

use crate::metrics::level_db;

/// Width of a level's bin, dB, and how many there are, downwards from full scale.
const STEP_DB: f32 = 4.0;
const BINS: usize = 24;
/// Quarter seconds below this are silent.
const SILENT_DB: f32 = -60.0;
/// Shares and spread that people should know of.
const SILENT_SHARE: f64 = 0.1;
const CLIPPED_SHARE: f64 = 1e-4;
const SPREAD_DB: f32 = 40.0;

/// How loud sound is, quarter second by quarter second, and how much of it was cut off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sound {
    /// Quarter seconds at 0 to -4 dB, -4 to -8 dB ... against full scale, after levelling; the last bin holds all below.
    pub levels: Vec<u64>,
    /// Samples of the sources in runs at full scale.
    pub clipped: u64,
    /// Samples of the sources, all channels.
    pub heard: u64,
}

/// Levels of the quarter seconds of samples as stored, counted in bins.
pub(super) fn levels(samples: &[i16], sample_rate: u32) -> Vec<u64> {
    let mut counts = vec![0; BINS];
    for quarter in samples.chunks((sample_rate / 4).max(1) as usize) {
        let values: Vec<f32> = quarter.iter().map(|&x| f32::from(x) / 32767.0).collect();
        let bin = (-level_db(&values) / STEP_DB).max(0.0) as usize;
        counts[bin.min(BINS - 1)] += 1;
    }
    counts
}

impl Sound {
    /// Adds another piece's.
    pub fn add(&mut self, other: &Self) {
        self.levels.resize(BINS.max(self.levels.len()), 0);
        self.levels.iter_mut().zip(&other.levels).for_each(|(sum, n)| *sum += n);
        self.clipped += other.clipped;
        self.heard += other.heard;
    }

    fn silent_share(&self) -> f64 {
        let silent: u64 = self.levels.iter().skip((-SILENT_DB / STEP_DB) as usize).sum();
        silent as f64 / self.levels.iter().sum::<u64>().max(1) as f64
    }

    fn clipped_share(&self) -> f64 {
        self.clipped as f64 / self.heard.max(1) as f64
    }

    /// See [`Findings`].
    fn range_db(&self) -> (f32, f32) {
        let sounding = &self.levels[..self.levels.len().min((-SILENT_DB / STEP_DB) as usize)];
        let tenth = sounding.iter().sum::<u64>() as f64 / 10.0;
        // From the loud end, evenly within a bin.
        let level_at = |rank: f64| {
            let mut before = 0.0;
            for (bin, &n) in sounding.iter().enumerate() {
                if n > 0 && before + n as f64 >= rank {
                    return -STEP_DB * (bin as f32 + ((rank - before) / n as f64) as f32);
                }
                before += n as f64;
            }
            SILENT_DB
        };
        (level_at(9.0 * tenth), level_at(tenth))
    }

    /// What people should know before they train.
    pub fn findings(&self) -> Findings {
        let (quiet_db, loud_db) = self.range_db();
        let mut findings = Findings {
            silent_share: self.silent_share(),
            clipped_share: self.clipped_share(),
            quiet_db,
            loud_db,
            warnings: Vec::new(),
        };
        if findings.silent_share > SILENT_SHARE {
            findings.warnings.push(format!(
                "{:.0} % of the quarter seconds are silent, and a model learns to fall silent from them; cut pauses out \
                 (ffmpeg -i IN -af silenceremove=stop_periods=-1:stop_duration=1:stop_threshold=-60dB OUT)",
                100.0 * findings.silent_share
            ));
        }
        if findings.clipped_share > CLIPPED_SHARE {
            findings.warnings.push(format!(
                "{:.2} % of the samples are cut off at full scale, and a model learns the distortion; record or master them \
                 lower, or leave those files out (`wavegen prepare` writes \"clipped\" for each into its manifest)",
                100.0 * findings.clipped_share
            ));
        }
        if loud_db - quiet_db > SPREAD_DB {
            findings.warnings.push(format!(
                "levels spread over {:.0} dB, and a model spends itself on very soft sound; even them out \
                 (ffmpeg -i IN -af dynaudnorm OUT) or leave the softest files out",
                loud_db - quiet_db
            ));
        }
        findings
    }
}

/// What is to be known of recordings before a model is trained on them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Findings {
    /// Share of the quarter seconds that are silent, and of the sources' samples that are cut off at full scale.
    pub silent_share: f64,
    pub clipped_share: f64,
    /// Levels that a tenth of the sounding quarter seconds stay below, and that a tenth pass, dB against full scale.
    pub quiet_db: f32,
    pub loud_db: f32,
    /// What is wrong, and what to do about it.
    pub warnings: Vec<String>,
}

impl std::fmt::Display for Findings {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { silent_share, clipped_share, quiet_db, loud_db, .. } = self;
        let (silent, clipped) = (100.0 * silent_share, 100.0 * clipped_share);
        write!(f, "{silent:.1} % silent, {clipped:.3} % clipped, most of it at {quiet_db:.0} to {loud_db:.0} dB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quarters(levels_db: &[f32]) -> Sound {
        let samples: Vec<i16> = levels_db
            .iter()
            .flat_map(|db| (0..250).map(move |i| if i % 2 == 0 { 1.0f32 } else { -1.0 } * 10f32.powf(db / 20.0)))
            .map(|x| (x * 32767.0).round() as i16)
            .collect();
        Sound { levels: levels(&samples, 1000), clipped: 0, heard: 1000 }
    }

    #[test]
    fn silence_clipping_and_spread_are_told_with_a_way_out() {
        let even = quarters(&[-22.0; 20]);
        assert_eq!((even.silent_share(), even.findings().warnings), (0.0, vec![]));
        let (quiet, loud) = even.range_db();
        assert!(-24.0 <= quiet && quiet <= loud && loud <= -20.0, "{quiet} {loud}");
        let mut levels = vec![-22.0; 9];
        levels.push(-90.0);
        let mut paused = quarters(&levels);
        assert!((paused.silent_share() - 0.1).abs() < 1e-9);
        paused.add(&quarters(&[-90.0, -90.0]));
        assert!(
            paused.findings().warnings[0].contains("25 %") && paused.findings().warnings[0].contains("silenceremove")
        );
        let clipped = Sound { clipped: 3, ..even };
        assert!(clipped.findings().warnings[0].contains("0.30 %"), "{:?}", clipped.findings().warnings);
        let mut wide = vec![-10.0; 10];
        wide.extend([-58.0; 10]);
        let wide = quarters(&wide);
        assert!(wide.findings().warnings[0].contains("spread over 50 dB"), "{:?}", wide.findings().warnings);
    }
}
