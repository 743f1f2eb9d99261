//! Turns recordings, and what a microphone heard, into what a voice goes on after at a device's rate and channels.

use anyhow::{Result, bail};
use wavegen::audio::Clip;
use wavegen::codec::Codec;
use wavegen::generate::{CONTEXT_S, GenerateError, Prompt, resample_end};
use wavegen::metrics::{SILENCE_DB, level_db};

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

/// A clip at another rate and channel count. Mono goes to the front, all goes to mono, else channels keep their places.
pub fn reshaped(clip: &Clip, (rate, channels): (u32, usize)) -> Result<Clip> {
    let own: Vec<Vec<f32>> = match (clip.channels, channels) {
        (_, 1) => vec![clip.downmix()],
        (n, _) => (0..n.min(channels)).map(|c| clip.samples.iter().skip(c).step_by(n).copied().collect()).collect(),
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
