//! A folder of recorded notes (`<note>v<layer>.ogg`) as a bank that gives any key at any velocity.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use wavegen::audio::decode_file;

use crate::perform::KEYS;
use crate::pitch::Resampler;

/// A recording starts where it first exceeds this fraction of its peak ...
const ONSET_FRACTION: f32 = 0.003;
/// ... less this time, over which it is faded in.
const ONSET_MARGIN_S: f64 = 0.0015;
/// A recording ends where it falls below this fraction of its peak for good.
const TAIL_FRACTION: f32 = 5e-5;
/// A key is played from a recording at most this far from it, in semitones.
const FARTHEST: i32 = 6;
/// Two layers are compared over this time after the onset ...
const COMPARED_S: f64 = 0.5;
/// ... at shifts up to this.
const LARGEST_SHIFT_S: f64 = 0.004;

/// All layers of all sampled keys; each recording is decoded when it is first needed.
pub struct Bank {
    sample_rate: u32,
    /// By MIDI note number.
    keys: BTreeMap<i32, SampledKey>,
    /// By the bits of the ratio; all recordings share a few.
    resamplers: Mutex<BTreeMap<u64, Arc<Resampler>>>,
}

struct SampledKey {
    /// From the softest to the loudest.
    layers: Vec<Layer>,
    /// How layer `i` goes with layer `i + 1`.
    matches: Vec<OnceLock<Match>>,
}

struct Layer {
    path: PathBuf,
    /// Pitched to each key that this recording serves.
    pitched: OnceLock<Result<BTreeMap<i32, Vec<f32>>, String>>,
}

/// How well a softer layer adds to a louder one.
#[derive(Clone, Copy)]
struct Match {
    /// The softer one is played this many samples later (or earlier), so that the two are in phase.
    shift: i64,
    /// Correlation at that shift, -1 to 1.
    correlation: f64,
    /// Root mean square of the softer and the louder.
    rms: [f64; 2],
}

/// One recording's share in a struck note.
pub struct Part<'a> {
    pub samples: &'a [f32],
    pub gain: f32,
    /// Played this many samples after the onset.
    pub shift: i64,
}

impl Bank {
    /// Finds the recordings in `folder`; the bank will give sound at `sample_rate`.
    ///
    /// # Errors
    /// The folder cannot be read, or holds no file named like `Ds4v12.ogg`.
    pub fn open(folder: &Path, sample_rate: u32) -> Result<Self> {
        let mut found: BTreeMap<i32, BTreeMap<u32, PathBuf>> = BTreeMap::new();
        for entry in std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
            let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
            if let Some((key, layer)) = path.file_stem().and_then(|stem| parse_name(stem.to_str()?)) {
                found.entry(key).or_default().insert(layer, path);
            }
        }
        if found.is_empty() {
            bail!("{}: no recording named like Ds4v12.ogg", folder.display());
        }
        let layer = |path| Layer { path, pitched: OnceLock::new() };
        let keys = found.into_iter().map(|(key, paths)| {
            let layers: Vec<_> = paths.into_values().map(layer).collect();
            let matches = layers.iter().skip(1).map(|_| OnceLock::new()).collect();
            (key, SampledKey { layers, matches })
        });
        Ok(Self { sample_rate, keys: keys.collect(), resamplers: Mutex::default() })
    }

    pub fn sample_rate(&self) -> u32 {
        self.sample_rate
    }

    /// The keys that there are recordings of, from the lowest.
    pub fn recorded_keys(&self) -> Vec<i32> {
        self.keys.keys().copied().collect()
    }

    /// The sound of `key` struck at `velocity` (1 to 127): one or two neighbouring layers. The level rises evenly in
    /// dB between the levels of the layers, whatever their phases.
    ///
    /// # Errors
    /// A key far from all recordings, or a recording that cannot be decoded, named.
    pub fn strike(&self, key: i32, velocity: f64) -> Result<Vec<Part<'_>>> {
        let (sampled_key, sampled) =
            self.nearest(key).with_context(|| format!("no recording within {FARTHEST} semitones of key {key}"))?;
        let n_layers = sampled.layers.len();
        // Layer i was struck at about the velocity in the middle of its share of 0..128.
        let position = (velocity / 128.0 * n_layers as f64 - 0.5).clamp(0.0, (n_layers - 1) as f64);
        let (softer, louder_share) = (position as usize, position.fract());
        let layer = |index: usize| self.pitched(sampled_key, &sampled.layers[index], key);
        if louder_share == 0.0 {
            return Ok(vec![Part { samples: layer(softer)?, gain: 1.0, shift: 0 }]);
        }
        let own_key = |index: usize| self.pitched(sampled_key, &sampled.layers[index], sampled_key);
        let (quiet, loud) = (own_key(softer)?, own_key(softer + 1)?);
        let matched = *sampled.matches[softer].get_or_init(|| Match::new(quiet, loud, self.sample_rate));
        let [quiet_gain, loud_gain] = matched.gains(louder_share);
        Ok(vec![
            Part { samples: layer(softer)?, gain: quiet_gain as f32, shift: matched.shift },
            Part { samples: layer(softer + 1)?, gain: loud_gain as f32, shift: 0 },
        ])
    }

    fn nearest(&self, key: i32) -> Option<(i32, &SampledKey)> {
        let near = self.keys.range(key - FARTHEST..=key + FARTHEST);
        near.min_by_key(|(sampled, _)| (*sampled - key).abs()).map(|(sampled, recordings)| (*sampled, recordings))
    }

    /// The layer's recording pitched to `key`.
    fn pitched<'a>(&self, sampled_key: i32, layer: &'a Layer, key: i32) -> Result<&'a [f32]> {
        let pitched = layer.pitched.get_or_init(|| self.load(sampled_key, &layer.path).map_err(|e| format!("{e:#}")));
        match pitched {
            Ok(by_key) => by_key.get(&key).map(Vec::as_slice).with_context(|| format!("key {key} is not on a piano")),
            Err(message) => bail!("{message}"),
        }
    }

    /// Decodes a recording, trims it and pitches it to all the keys it serves.
    fn load(&self, sampled_key: i32, path: &Path) -> Result<BTreeMap<i32, Vec<f32>>> {
        let clip = decode_file(path)?;
        let sample_rate = clip.sample_rate;
        let samples = trim(&clip.downmix(), sample_rate);
        ensure!(!samples.is_empty(), "{}: a silent recording", path.display());
        // Its own key always, because layers are compared on it.
        let serves = |key: &i32| self.nearest(*key).is_some_and(|(nearest, _)| nearest == sampled_key);
        let keys = KEYS.filter(|key| serves(key) || *key == sampled_key);
        let pitch_to = |key: i32| {
            let ratio = 2f64.powf(f64::from(key - sampled_key) / 12.0);
            let step = f64::from(sample_rate) * ratio / f64::from(self.sample_rate);
            (key, self.resampler(step).resample(&samples))
        };
        Ok(keys.map(pitch_to).collect())
    }

    fn resampler(&self, step: f64) -> Arc<Resampler> {
        let mut resamplers = self.resamplers.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(resamplers.entry(step.to_bits()).or_insert_with(|| Arc::new(Resampler::new(step))))
    }
}

impl Match {
    fn new(quiet: &[f32], loud: &[f32], sample_rate: u32) -> Self {
        let seconds = |s: f64| (s * f64::from(sample_rate)) as usize;
        let n = seconds(COMPARED_S).min(quiet.len()).min(loud.len());
        let (quiet, loud) = (&quiet[..n], &loud[..n]);
        let energy = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().max(1e-20);
        let (quiet_energy, loud_energy) = (energy(quiet), energy(loud));
        let largest = seconds(LARGEST_SHIFT_S) as i64;
        let (mut shift, mut product) = (0, f64::NEG_INFINITY);
        for candidate in -largest..=largest {
            let later = &loud[candidate.clamp(0, n as i64) as usize..];
            let earlier = &quiet[(-candidate).clamp(0, n as i64) as usize..];
            let sum: f64 = later.iter().zip(earlier).map(|(a, b)| f64::from(a * b)).sum();
            if sum > product {
                (shift, product) = (candidate, sum);
            }
        }
        Self {
            shift,
            correlation: (product / (quiet_energy * loud_energy).sqrt()).clamp(-1.0, 1.0),
            rms: [quiet_energy, loud_energy].map(|energy| (energy / n.max(1) as f64).sqrt()),
        }
    }

    /// Gains of the two layers when the louder has this share (0 to 1): a linear crossfade of the layers brought to one
    /// level, times the level that lies so far (in dB) between theirs.
    fn gains(&self, louder_share: f64) -> [f64; 2] {
        let share = [1.0 - louder_share, louder_share];
        let level = self.rms[0].powf(share[0]) * self.rms[1].powf(share[1]);
        let power = share[0].powi(2) + share[1].powi(2) + 2.0 * share[0] * share[1] * self.correlation;
        [0, 1].map(|i| share[i] * level / self.rms[i] / power.max(0.05).sqrt())
    }
}

/// `Ds4v12` is key 63 in layer 12: a letter, perhaps `s` (sharp), an octave (4 has middle C), `v`, a layer.
fn parse_name(stem: &str) -> Option<(i32, u32)> {
    let (note, layer) = stem.split_once('v')?;
    let mut characters = note.chars();
    let natural = match characters.next()? {
        'C' => 0,
        'D' => 2,
        'E' => 4,
        'F' => 5,
        'G' => 7,
        'A' => 9,
        'B' => 11,
        _ => return None,
    };
    let rest = characters.as_str();
    let (sharp, octave) = rest.strip_prefix('s').map_or((0, rest), |octave| (1, octave));
    let octave: u8 = octave.parse().ok().filter(|octave| *octave <= 9)?;
    Some((12 * (i32::from(octave) + 1) + natural + sharp, layer.parse().ok()?))
}

/// Cuts the silence before the hammer and after the last audible sound; both new ends are faded.
fn trim(samples: &[f32], sample_rate: u32) -> Vec<f32> {
    let peak = samples.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
    let exceeds = |fraction: f32| move |x: &f32| peak > 0.0 && x.abs() > fraction * peak;
    let margin = (ONSET_MARGIN_S * f64::from(sample_rate)) as usize;
    let Some(onset) = samples.iter().position(exceeds(ONSET_FRACTION)) else { return Vec::new() };
    let start = onset.saturating_sub(margin);
    let end = samples.iter().rposition(exceeds(TAIL_FRACTION)).map_or(samples.len(), |last| last + 1);
    let mut trimmed = samples[start..end].to_vec();
    let fade = margin.min(trimmed.len());
    for i in 0..fade {
        let gain = i as f32 / margin as f32;
        trimmed[i] *= gain;
        let last = trimmed.len() - 1 - i;
        trimmed[last] *= gain;
    }
    trimmed
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Writes a small bank: decaying tones on three keys in four layers, from softly to loudly struck.
    pub fn small_bank(folder: &Path) {
        let spec = hound::WavSpec {
            channels: 1,
            sample_rate: 32_000,
            bits_per_sample: 16,
            sample_format: hound::SampleFormat::Int,
        };
        for (name, hz) in [("A3", 220.0), ("C4", 261.63), ("Ds4", 311.13)] {
            for layer in 1..=4 {
                let mut writer = hound::WavWriter::create(folder.join(format!("{name}v{layer}.wav")), spec).unwrap();
                for i in 0..48_000 {
                    let t = f64::from(i) / 32_000.0;
                    let phase = std::f64::consts::TAU * hz * t + 0.7 * f64::from(layer);
                    let level = 0.05 * f64::from(layer * layer) * (-2.0 * t).exp();
                    let sample = level * (phase.sin() + 0.1 * f64::from(layer) * (2.0 * phase).sin());
                    writer.write_sample((sample * 32_000.0) as i16).unwrap();
                }
                writer.finalize().unwrap();
            }
        }
    }

    fn level_db(bank: &Bank, key: i32, velocity: f64) -> f64 {
        let parts = bank.strike(key, velocity).unwrap();
        let sample = |i: i64| -> f64 {
            let part = |part: &Part| part.gain * part.samples.get((i - part.shift) as usize).copied().unwrap_or(0.0);
            parts.iter().map(|p| f64::from(part(p))).sum()
        };
        10.0 * (100..8000).map(|i| sample(i).powi(2)).sum::<f64>().log10()
    }

    #[test]
    fn names_give_key_and_layer() {
        assert_eq!(parse_name("A0v1"), Some((21, 1)));
        assert_eq!(parse_name("Ds4v16"), Some((63, 16)));
        assert_eq!(parse_name("C8v9"), Some((108, 9)));
        for name in ["README", "H4v1", "C4", "Cv1", "C4vx", "v", ""] {
            assert_eq!(parse_name(name), None, "{name}");
        }
    }

    #[test]
    fn level_rises_with_velocity_without_jumps() {
        let folder = tempfile::tempdir().unwrap();
        small_bank(folder.path());
        let bank = Bank::open(folder.path(), 16_000).unwrap();
        let mut then = level_db(&bank, 61, 1.0);
        for step in 1..=504 {
            let velocity = 1.0 + 0.25 * f64::from(step);
            let now = level_db(&bank, 61, velocity);
            assert!((now - then).abs() < 0.35, "at velocity {velocity}: {then:.2} to {now:.2} dB");
            assert!(now > then - 0.1, "at velocity {velocity}: {then:.2} to {now:.2} dB");
            then = now;
        }
    }

    #[test]
    fn a_recording_that_is_no_audio_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("C4v1.ogg"), b"not audio").unwrap();
        let bank = Bank::open(folder.path(), 16_000).unwrap();
        let error = bank.strike(60, 64.0).err().map(|error| format!("{error:#}")).unwrap_or_default();
        assert!(error.contains("C4v1.ogg"), "{error}");
    }
}
