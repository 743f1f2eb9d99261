//! What real recordings have beyond a model's samples goes on after the join: treble, balance and width.
//!
//! The recordings lie outside the repository: `WAVEGEN_SHARED`, else `../shared` beside it; those that are missing are skipped. A recording's
//! beginning is the prompt, and what a model of 16 kHz hears of the rest is played after it, as by a perfect model.

use std::path::{Path, PathBuf};

use wavegen::audio::{Clip, decode_file, resample};
use wavegen::codec::Codec;
use wavegen::generate::{CONTEXT_S, Prompt, Seam};
use wavegen::metrics::{level_db, median};

/// Of a recording, the part that is the prompt.
const PROMPT: f64 = 0.6;

/// Levels of what is heard after the join, dB: of the treble that the model lacks, of the sides against the middle below it, and of the first channel against
/// the last.
#[derive(Debug)]
struct Figures {
    treble: f32,
    width: f32,
    balance: f32,
}

fn channel(clip: &Clip, c: usize) -> Vec<f32> {
    clip.samples.iter().skip(c).step_by(clip.channels).copied().collect()
}

fn figures(clip: &Clip) -> Figures {
    let channels: Vec<[Vec<f32>; 2]> = (0..clip.channels)
        .map(|c| {
            let all = channel(clip, c);
            let low = resample(&resample(&all, clip.sample_rate, 16_000).unwrap(), 16_000, clip.sample_rate).unwrap();
            let treble = all.iter().zip(&low).map(|(x, y)| x - y).collect();
            [low, treble]
        })
        .collect();
    let ([first, _], [last, _]) = (&channels[0], &channels[clip.channels - 1]);
    let mix = |sign: f32| first.iter().zip(last).map(|(x, y)| 0.5 * (x + sign * y)).collect::<Vec<f32>>();
    Figures {
        treble: level_db(&channels.iter().flat_map(|[_, treble]| treble.iter().copied()).collect::<Vec<f32>>()),
        width: level_db(&mix(-1.0)) - level_db(&mix(1.0)),
        balance: level_db(first) - level_db(last),
    }
}

/// The frames after the prompt, as they are and as they are played.
fn play_on(path: &Path) -> [Clip; 2] {
    let clip = decode_file(path).unwrap();
    let (rate, channels) = (clip.sample_rate, clip.channels);
    let n_prompt = (PROMPT * clip.n_frames() as f64) as usize;
    let distant = n_prompt.saturating_sub((CONTEXT_S * f64::from(rate)) as usize);
    let end = Clip { samples: clip.samples[distant * channels..n_prompt * channels].to_vec(), ..clip };
    let prompt = Prompt::new(&end, n_prompt as u64, &Codec::default()).unwrap();
    let heard = resample(&clip.downmix(), rate, 16_000).unwrap();
    let first = (n_prompt as u64 * 16_000).div_ceil(rate.into()) as usize;
    let samples: Vec<f32> = heard[first..].iter().map(|x| x * prompt.gain()).collect();
    let mut seam = Seam::new(&prompt).unwrap();
    let mut out = Vec::new();
    for piece in samples.chunks(512) {
        seam.push(piece).unwrap();
        seam.take(u64::MAX, &mut out);
    }
    let n = out.len();
    let truth = clip.samples[n_prompt * channels..][..n].to_vec();
    [truth, out].map(|samples| Clip { samples, ..clip })
}

#[test]
fn treble_balance_and_width_go_on_as_they_were() {
    let shared = std::env::var_os("WAVEGEN_SHARED").map(PathBuf::from);
    let shared = shared.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let mut errors = [const { Vec::new() }; 3];
    for name in [
        "essentia/recorded/dubstep.mp3",
        "essentia/recorded/flamenco.mp3",
        "essentia/recorded/Guitar-A4-432-1.ogg",
        "rodio/assets/RL.m4a",
        "rodio/assets/music.flac",
        "pydub/test/data/test1.mp3",
        "pydub/test/data/test4.wav",
    ] {
        let path = shared.join("formats").join(name);
        if !path.exists() {
            println!("skipped: {} is not there", path.display());
            continue;
        }
        let [truth, made] = play_on(&path);
        let [truth_is, made_is] = [&truth, &made].map(figures);
        println!("{name}: {truth_is:.1?}, played {made_is:.1?}");
        errors[0].push((made_is.treble - truth_is.treble).abs());
        if truth.channels > 1 {
            errors[1].push((made_is.width - truth_is.width).abs());
            errors[2].push((made_is.balance - truth_is.balance).abs());
        }
    }
    for (what, errors) in ["treble", "width", "balance"].into_iter().zip(errors) {
        if !errors.is_empty() {
            println!("{what}: off by {:.1} dB in the median, {errors:.1?}", median(&errors));
            assert!(median(&errors) < 2.5, "{what}: {errors:?}");
        }
    }
}
