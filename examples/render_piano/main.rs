//! Renders MIDI files with a folder of recorded piano notes to WAV: the training corpus of a piano model.
//!
//! ```text
//! cargo run --release --example render_piano -- scores/ --samples salamander/ -o corpus/ --humanise --vary --seed 1
//! ```
//! MIDI -> `midi` -> performance -> `perform` -> `band` -> `synth` with `bank` -> `room` -> WAV. Output depends on the seed and
//! on each file's name alone. One line per file goes to stdout (tab-separated), problems go to stderr.
mod band;
mod bank;
mod files;
mod midi;
mod perform;
mod pitch;
mod random;
mod room;
mod synth;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use rayon::prelude::*;
use wavegen::audio::{SampleFormat, WavFormat};
use wavegen::sink::{Sink, WavFileSink};

use band::Band;
use files::{Part, Piece};
use random::Random;
use room::Room;

/// Peak of a rendering before its gain, in dB of full scale.
const PEAK_DB: f64 = -3.0;
/// Silence before the first note, and time for the last one to ring after its key came up, in seconds.
const LEAD_IN_S: f64 = 0.1;
const RING_OUT_S: f64 = 2.5;
/// An excerpt that stops in the middle of the music fades over this time, in seconds.
const FADE_S: f64 = 0.05;

/// Renders MIDI files with a folder of recorded piano notes to mono 16-bit WAV files.
#[derive(Parser)]
#[command(after_help = "Example: render_piano scores/ --samples salamander/ -o corpus/ --humanise --vary --seed 1")]
struct Options {
    /// MIDI files, or folders of them
    #[arg(required = true)]
    inputs: Vec<PathBuf>,
    /// Folder of recordings named <note>v<layer>.<any audio format>, e.g. Ds4v16.ogg, or of such folders: then each voice of a
    /// piece gets one of them, drawn, and folders named drums... give it drums
    #[arg(long)]
    samples: PathBuf,
    /// Folder for the WAV files
    #[arg(short, long)]
    output: PathBuf,
    #[arg(long, default_value_t = 16_000, value_parser = clap::value_parser!(u32).range(4_000..=192_000))]
    sample_rate: u32,
    /// Everything drawn depends on this number and the file's name
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Draw transposition (+-3 semitones), tempo (+-10 %), gain (-12 to 0 dB), room and noise floor for each file
    #[arg(long)]
    vary: bool,
    /// Play scores as a hand would: onsets, velocities, slow tempo and dynamics
    #[arg(long)]
    humanise: bool,
    /// Semitones up
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    transpose: i32,
    /// Factor on the tempo
    #[arg(long, default_value_t = 1.0)]
    tempo: f64,
    /// Gain after normalising to a peak of -3 dB
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    gain_db: f64,
    /// Add a small room at this level against the direct sound
    #[arg(long, allow_negative_numbers = true)]
    room_db: Option<f64>,
    /// Add noise of this level
    #[arg(long, allow_negative_numbers = true)]
    noise_dbfs: Option<f64>,
    /// Let pedal values between 32 and 96 damp partly
    #[arg(long)]
    half_pedal: bool,
    /// Shorten silences to this many seconds
    #[arg(long, default_value_t = 4.0)]
    max_gap: f64,
    /// Render at most this many seconds of a file
    #[arg(long)]
    max_seconds: Option<f64>,
    /// Take them from a drawn place instead of the beginning
    #[arg(long)]
    start_anywhere: bool,
    /// Percentage of compositions held out of training, drawn by name
    #[arg(long, default_value_t = 5.0)]
    holdout_percent: f64,
    /// Seed of that draw alone
    #[arg(long, default_value_t = 0)]
    split_seed: u64,
    /// Which compositions to render
    #[arg(long, value_enum, default_value = "all")]
    part: Part,
    /// Render only this many files, drawn
    #[arg(long)]
    limit: Option<usize>,
    /// Overwrite WAV files that are there
    #[arg(long)]
    force: bool,
    /// Threads; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// How one file is played, after all draws.
struct Style {
    transpose: i32,
    tempo: f64,
    gain_db: f64,
    room: Option<Room>,
    noise_dbfs: Option<f64>,
}

impl Style {
    fn new(options: &Options, random: &mut Random) -> Self {
        let own_room = |wet_db| Room { size: 1.0, decay_s: 0.6, wet_db };
        let mut style = Self {
            transpose: options.transpose,
            tempo: options.tempo,
            gain_db: options.gain_db,
            room: options.room_db.map(own_room),
            noise_dbfs: options.noise_dbfs,
        };
        if options.vary {
            style.transpose += random.between(-3.0, 4.0).floor() as i32;
            style.tempo *= random.between(0.9, 1.1);
            style.gain_db += random.between(-12.0, 0.0);
            let drawn = Room {
                size: random.between(0.7, 1.6),
                decay_s: random.between(0.3, 1.2),
                wet_db: random.between(-26.0, -14.0),
            };
            // Three files in four stand in a room, the others are as dry as the recordings.
            style.room = style.room.or((random.unit() < 0.75).then_some(drawn));
            style.noise_dbfs = style.noise_dbfs.or(Some(random.between(-70.0, -60.0)));
        }
        style
    }
}

/// A rendered file and what is told about it.
struct Rendering {
    samples: Vec<f32>,
    style: Style,
    start_s: f64,
    n_notes: usize,
    notices: Vec<String>,
}

fn render(piece: &Piece, band: &Band, options: &Options) -> Result<Rendering> {
    let draws = |purpose: &str| Random::new(options.seed, &format!("{}/{purpose}", piece.name));
    let style = Style::new(options, &mut draws("style"));
    let mut notices = Vec::new();
    let bytes = std::fs::read(&piece.path)?;
    let mut performance = midi::parse(&bytes)?;
    if performance.n_damaged_tracks > 0 {
        notices.push(format!("{} tracks truncated or damaged, read as far as possible", performance.n_damaged_tracks));
    }
    if performance.n_percussion > 0 {
        notices.push(format!("{} percussion notes left out", performance.n_percussion));
    }
    if options.humanise {
        performance.humanise(&mut draws("hand"));
    }
    performance.scale_tempo(style.tempo);
    let n_lost = performance.transpose(style.transpose);
    if n_lost > 0 {
        notices.push(format!("{n_lost} notes off the keyboard left out"));
    }
    ensure!(!performance.notes.is_empty(), "no note on the keyboard");
    let closed_s = performance.close_gaps(LEAD_IN_S, options.max_gap);
    if closed_s > 10.0 {
        notices.push(format!("{closed_s:.0} s of silence closed"));
    }

    let whole_s = performance.duration_s() + RING_OUT_S;
    let length_s = options.max_seconds.map_or(whole_s, |max_s| max_s.min(whole_s));
    let anywhere = if options.start_anywhere { draws("place").unit() } else { 0.0 };
    let start_s = anywhere * (whole_s - length_s);
    let pedal = if options.half_pedal { synth::Pedal::Gradual } else { synth::Pedal::Switch };
    let mut samples = band.play(&performance, pedal, start_s..start_s + length_s, &mut draws("band"))?;
    if let Some(room) = style.room {
        room.add_to(&mut samples, options.sample_rate);
    }
    room::normalise_peak(&mut samples, PEAK_DB + style.gain_db);
    if let Some(level_db) = style.noise_dbfs {
        room::add_noise(&mut samples, level_db, &mut draws("noise"));
    }
    if start_s + length_s < whole_s {
        fade_out(&mut samples, options.sample_rate);
    }
    Ok(Rendering { samples, style, start_s, n_notes: performance.notes.len(), notices })
}

fn fade_out(samples: &mut [f32], sample_rate: u32) {
    let n = ((FADE_S * f64::from(sample_rate)) as usize).min(samples.len());
    for (i, sample) in samples.iter_mut().rev().take(n).enumerate() {
        *sample *= i as f32 / n as f32;
    }
}

/// Renders and writes one piece; its line of the table, the notices, and the seconds rendered.
fn process(piece: &Piece, band: &Band, options: &Options) -> Result<(String, Vec<String>, f64)> {
    let mut sink = WavFileSink::new(&options.output.join(format!("{}.wav", piece.name)), options.force)?;
    let rendering = render(piece, band, options)?;
    sink.start(&WavFormat::new(options.sample_rate, 1, SampleFormat::I16))?;
    sink.write(&rendering.samples)?;
    sink.finish()?;
    let duration_s = rendering.samples.len() as f64 / f64::from(options.sample_rate);
    let Style { transpose, tempo, gain_db, room, noise_dbfs } = rendering.style;
    let shown = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
    let line = format!(
        "{}\t{}\t{:.1}\t{duration_s:.1}\t{}\t{transpose:+}\t{tempo:.3}\t{gain_db:.1}\t{}\t{}",
        piece.name,
        piece.composition,
        rendering.start_s,
        rendering.n_notes,
        shown(room.map(|room| room.wet_db)),
        shown(noise_dbfs),
    );
    Ok((line, rendering.notices, duration_s))
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    ensure!(options.tempo.is_finite() && options.tempo > 0.0, "--tempo must be above 0");
    ensure!(options.max_gap >= 0.0, "--max-gap must not be negative");
    ensure!(options.max_seconds.is_none_or(|max_s| max_s > 0.0), "--max-seconds must be above 0");
    let mut pieces = files::find(&options.inputs)?;
    pieces.retain(|piece| {
        let heldout = piece.percentile(options.split_seed) < options.holdout_percent;
        options.part == Part::All || heldout == (options.part == Part::Heldout)
    });
    if let Some(limit) = options.limit {
        pieces.sort_by_key(|piece| piece.lot(options.seed));
        pieces.truncate(limit);
        pieces.sort_by(|a, b| a.name.cmp(&b.name));
    }
    if pieces.is_empty() {
        bail!("no MIDI file (.mid, .midi) to render");
    }
    std::fs::create_dir_all(&options.output).with_context(|| format!("creating {}", options.output.display()))?;
    let band = Band::open(&options.samples, options.sample_rate)?;
    rayon::ThreadPoolBuilder::new().num_threads(options.threads).build_global()?;

    let begin = Instant::now();
    let results: Vec<_> = pieces
        .par_iter()
        .map(|piece| {
            let result = process(piece, &band, options);
            match &result {
                Ok((_, notices, _)) => {
                    notices.iter().for_each(|notice| eprintln!("{}: {notice}", piece.path.display()))
                }
                Err(error) => eprintln!("skipped {}: {error:#}", piece.path.display()),
            }
            result
        })
        .collect();
    println!("name\tcomposition\tstart_s\tduration_s\tnotes\ttranspose\ttempo\tgain_db\troom_db\tnoise_dbfs");
    let (mut n_rendered, mut total_s) = (0, 0.0);
    for (line, _, duration_s) in results.into_iter().flatten() {
        println!("{line}");
        n_rendered += 1;
        total_s += duration_s;
    }
    let wall_s = begin.elapsed().as_secs_f64();
    let n_threads = rayon::current_num_threads();
    eprintln!(
        "rendered {n_rendered} of {} files, {:.2} h, in {wall_s:.1} s: {:.0}x real time per thread ({n_threads} threads)",
        pieces.len(),
        total_s / 3600.0,
        total_s / wall_s / n_threads as f64,
    );
    if n_rendered == 0 {
        bail!("nothing was rendered");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A format-0 file of 24 notes with some pedal.
    fn small_midi() -> Vec<u8> {
        let mut track = Vec::new();
        for i in 0..24u8 {
            track.extend([0, 0x90, 57 + i % 7, 40 + 3 * i]);
            track.extend([0, 0xb0, 64, if i % 4 < 2 { 127 } else { 0 }]);
            track.extend([48, 0x80, 57 + i % 7, 0]);
        }
        track.extend([0, 0xff, 0x2f, 0]);
        let mut bytes = b"MThd\0\0\0\x06\0\0\0\x01\0\x60MTrk".to_vec();
        bytes.extend((track.len() as u32).to_be_bytes());
        bytes.extend(track);
        bytes
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_on_any_number_of_threads() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["bank", "scores", "out"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        bank::tests::small_bank(&at("bank"));
        for name in ["a", "b", "c", "d"] {
            std::fs::write(at("scores").join(format!("{name}.mid")), small_midi()).unwrap();
        }
        let pieces = files::find(&[at("scores")]).unwrap();
        let render_all = |seed: &str, n_threads: usize| -> Vec<Vec<u8>> {
            let options = Options::parse_from([
                "render_piano".as_ref(),
                at("scores").as_os_str(),
                "--samples".as_ref(),
                at("bank").as_os_str(),
                "--output".as_ref(),
                at("out").as_os_str(),
                "--humanise".as_ref(),
                "--vary".as_ref(),
                "--start-anywhere".as_ref(),
                "--max-seconds=3".as_ref(),
                "--force".as_ref(),
                "--seed".as_ref(),
                seed.as_ref(),
            ]);
            let band = Band::open(&options.samples, options.sample_rate).unwrap();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            let bytes = |piece: &Piece| {
                process(piece, &band, &options).unwrap();
                std::fs::read(at("out").join(format!("{}.wav", piece.name))).unwrap()
            };
            pool.install(|| pieces.par_iter().map(bytes).collect())
        };
        let single = render_all("7", 1);
        assert_eq!(single, render_all("7", 3));
        assert_ne!(single, render_all("8", 1));
        assert_ne!(single[0], single[1], "files of one content are varied each in their own way");
    }
}
