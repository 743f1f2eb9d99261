//! Turns recordings, and what a microphone heard, into what a voice goes on after at a device's rate and channels.

use anyhow::{Result, bail};
use wavegen::audio::Clip;
use wavegen::codec::Codec;
use wavegen::generate::{CONTEXT_S, GenerateError, Prompt, resample_end};
use wavegen::metrics::{SILENCE_DB, level_db, peak};

/// Below this level nobody plays: a microphone's own noise, dBFS.
const NOTHING_DB: f32 = -60.0;
/// What lies so far below the loudest moment before the first and after the last that does not is no part of it, dB.
const FAINT_DB: f32 = 40.0;
/// Seconds of a moment, and seconds that are kept before the first.
const MOMENT_S: f64 = 0.01;
const LEAD_S: f64 = 0.05;

/// Which channels of a device carry what comes from one channel: the first two, or the only one.
pub fn fronts(channels: usize) -> Vec<f32> {
    (0..channels).map(|c| if c < 2 { 1.0 } else { 0.0 }).collect()
}

/// A clip at another rate and channel count. Mono goes to the front, all goes to mono, more channels than there are go to stereo, else
/// channels keep their places.
pub fn reshaped(clip: &Clip, (rate, channels): (u32, usize)) -> Result<Clip> {
    let own: Vec<Vec<f32>> = match (clip.channels, channels) {
        (_, 1) => vec![clip.downmix()],
        (n, _) if n > channels => stereo(clip),
        (n, _) => (0..n).map(|c| clip.samples.iter().skip(c).step_by(n).copied().collect()).collect(),
    };
    let own = own.iter().map(|x| resample_end(x, clip.sample_rate, rate)).collect::<Result<Vec<_>, _>>()?;
    let n_frames = own.first().map_or(0, Vec::len);
    let of = |c: usize| match own.len() {
        1 if c < 2 => own.first(),
        _ => own.get(c),
    };
    let places: Vec<_> = (0..channels).map(of).collect();
    let samples = (0..n_frames).flat_map(|i| places.iter().map(move |x| x.map_or(0.0, |x| x[i]))).collect();
    Ok(Clip { samples, channels, sample_rate: rate })
}

/// The two channels of a clip of more, as ITU-R BS.775 has it, softer where that would clip; of channels whose places are not usual, the
/// mean.
fn stereo(clip: &Clip) -> Vec<Vec<f32>> {
    const HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
    // Left and right, centre, bass, and behind or beside, in the order of WAV.
    let (left, right, centre, bass, back) = ([1.0, 0.0], [0.0, 1.0], [HALF, HALF], [0.0, 0.0], [0.5, 0.5]);
    let (behind_left, behind_right) = ([HALF, 0.0], [0.0, HALF]);
    let gains = match clip.channels {
        3 => vec![left, right, centre],
        4 => vec![left, right, behind_left, behind_right],
        5 => vec![left, right, centre, behind_left, behind_right],
        6 => vec![left, right, centre, bass, behind_left, behind_right],
        7 => vec![left, right, centre, bass, back, behind_left, behind_right],
        8 => vec![left, right, centre, bass, behind_left, behind_right, behind_left, behind_right],
        n => vec![[1.0 / n as f32; 2]; n],
    };
    let mix = |side: usize| -> Vec<f32> {
        let frames = clip.samples.chunks_exact(clip.channels);
        frames.map(|frame| frame.iter().zip(&gains).map(|(x, gain)| x * gain[side]).sum()).collect()
    };
    let mut both = vec![mix(0), mix(1)];
    let loudest = both.iter().map(|side| peak(side)).fold(1.0, f32::max);
    both.iter_mut().flatten().for_each(|x| *x /= loudest);
    both
}

/// What a model hears of a clip: its end.
pub fn prompt_after(clip: &Clip, codec: &Codec) -> Result<Prompt, GenerateError> {
    let most = (CONTEXT_S * f64::from(clip.sample_rate)) as usize * clip.channels;
    let end = Clip { samples: clip.samples[clip.samples.len().saturating_sub(most)..].to_vec(), ..*clip };
    Prompt::new(&end, end.n_frames() as u64, codec)
}

/// What was played to a microphone, from where it begins to where it ends, and the seconds since then.
pub fn played(heard: &Clip) -> Result<(Clip, f64)> {
    let moment = (MOMENT_S * f64::from(heard.sample_rate)) as usize * heard.channels;
    let levels: Vec<f32> = heard.samples.chunks(moment.max(heard.channels)).map(level_db).collect();
    let loudest = levels.iter().copied().fold(SILENCE_DB, f32::max);
    let is_played = |level: &f32| loudest > NOTHING_DB && *level >= loudest - FAINT_DB;
    let (Some(first), Some(last)) = (levels.iter().position(is_played), levels.iter().rposition(is_played)) else {
        bail!(
            "nothing was played in {:.1} s ({loudest:.0} dBFS at most); is it the right --source, and turned up? `listen` tries again",
            heard.duration_s()
        );
    };
    let lead = (LEAD_S / MOMENT_S) as usize;
    let end = heard.samples.len().min((last + 1) * moment);
    let samples = heard.samples[first.saturating_sub(lead) * moment..end].to_vec();
    let since_s = ((heard.samples.len() - end) / heard.channels) as f64 / f64::from(heard.sample_rate);
    Ok((Clip { samples, ..*heard }, since_s))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_channels_than_a_device_has_are_mixed_and_none_vanishes_or_clips() {
        let front = |channels: usize, c: usize, level: f32| {
            let samples = (0..100 * channels).map(|i| if i % channels == c { level } else { 0.0 }).collect();
            let clip = reshaped(&Clip { samples, channels, sample_rate: 48_000 }, (48_000, 2)).unwrap();
            [clip.samples[100], clip.samples[101]]
        };
        let half = std::f32::consts::FRAC_1_SQRT_2;
        // Centre, bass and right behind of 5.1.
        assert_eq!([2, 3, 5].map(|c| front(6, c, 0.5)), [[0.5 * half; 2], [0.0; 2], [0.0, 0.5 * half]]);
        assert_eq!(front(9, 8, 0.9), [0.1; 2]);
        let loud = Clip { samples: vec![1.0; 500], channels: 5, sample_rate: 48_000 };
        assert!(reshaped(&loud, (48_000, 2)).unwrap().samples.iter().all(|x| (x - 1.0).abs() < 1e-6));
        // On as many channels they keep their places.
        assert_eq!(reshaped(&loud, (48_000, 5)).unwrap(), loud);
    }

    #[test]
    fn what_was_heard_goes_from_shortly_before_it_is_loud_to_where_it_ends() {
        // Stereo at 1 kHz: 0.3 s of hiss at -80 dBFS, a tone, and 0.205 s of hiss.
        let level = |i: usize| if (300..800).contains(&i) { 0.1 } else { 1e-4 };
        let samples = (0..1005).flat_map(|i| [level(i) * if i % 2 == 0 { 1.0 } else { -1.0 }; 2]).collect();
        let heard = Clip { samples, channels: 2, sample_rate: 1000 };
        let (clip, since_s) = played(&heard).unwrap();
        assert_eq!((clip.samples, since_s), (heard.samples[2 * 250..2 * 800].to_vec(), 0.205));
        let hiss = Clip { samples: heard.samples[..2 * 290].to_vec(), ..heard };
        assert!(played(&hiss).unwrap_err().to_string().contains("(-80 dBFS at most); is it the right --source"));
        assert!(played(&Clip { samples: Vec::new(), ..hiss }).is_err());
    }
}
