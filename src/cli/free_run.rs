//! Turns prompts into continuations of them and these into a table: the model, noise through the plan, the truth.

use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use ndarray::{Array2, ArrayView1};
use rayon::prelude::*;
use serde::Serialize;
use wavegen::audio::{SampleFormat, WavFormat};
use wavegen::baselines::noise_through_plan;
use wavegen::checkpoint::Checkpoint;
use wavegen::generate::{Colour, Guide, Intervention, Options, Path as Continued};
use wavegen::metrics::{
    self, Adherence, Failure, Kinship, LevelDrift, Music, Timbre, Track, adherence, failures, kinship, level_drift,
    music, tonality_db,
};
use wavegen::plan::{Spectrum, bands_of};
use wavegen::plot::{Row, spectrograms};
use wavegen::rng::Rng;
use wavegen::sink;

use super::common::{Talk, interrupted, print};
use super::engine::Loaded;
use super::eval::Piece;

/// Where a free run's plan comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanFrom {
    /// The model plans itself
    Own,
    /// The analysis of what really comes next
    True,
    /// The same, through the model's codebooks
    Quantized,
    /// What really comes next, frame by frame in random order: a control without music
    Shuffled,
}

impl PlanFrom {
    pub fn is_through_codebooks(self) -> bool {
        matches!(self, Self::Own | Self::Quantized)
    }
}

/// What to play.
pub struct Setup<'a> {
    pub plan: PlanFrom,
    pub places: Vec<Place<'a>>,
    /// Plan frames before and after the join.
    pub prompt_frames: usize,
    pub frames: usize,
    pub options: Options,
    pub governed: bool,
    pub keep: Option<&'a Path>,
    pub spectrograms: Option<&'a Path>,
}

/// One continuation against the plan that it followed.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    pub adherence: Adherence,
    pub level_drift: LevelDrift,
    pub tonality_db: f32,
    pub failures: Vec<Failure>,
    pub music: Music,
    /// With the prompt.
    pub kinship: Kinship,
    #[serde(skip)]
    timbre: Timbre,
}

/// All figures after one prompt.
#[derive(Clone, Debug, Serialize)]
pub struct Continuation {
    pub file: String,
    /// Where in the file the join lies.
    pub at_s: f64,
    pub model: Figures,
    /// What the governor did about it.
    pub interventions: Vec<Intervention>,
    /// White noise through the filter that the same plan describes.
    pub floor: Figures,
    /// What the recording does: against its own plan if that was given, else by itself.
    pub truth: Figures,
}

/// Means over all continuations.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Root mean square over continuations.
    pub adherence_db: f32,
    pub worst_adherence_db: f32,
    pub bias_db: f32,
    /// Mean of |median drift|, and the worst.
    pub level_drift_db: f32,
    pub worst_level_drift_db: f32,
    pub tonality_db: f32,
    /// Continuations with any failure.
    pub n_failed: usize,
    pub music: Music,
    pub kinship: Kinship,
    /// Frechet distance of the log-mel frames to the recordings'.
    pub frechet: f64,
}

/// A free run's result.
#[derive(Clone, Debug, Serialize)]
pub struct FreeRun {
    pub plan: PlanFrom,
    pub model: Summary,
    pub floor: Summary,
    pub truth: Summary,
    pub continuations: Vec<Continuation>,
}

/// A prompt and what follows it.
pub struct Place<'a> {
    piece: &'a Piece,
    // Plan frame of the join.
    join: usize,
}

impl Setup<'_> {
    /// Makes the folders that it writes to.
    pub fn make_folders(&self) -> Result<()> {
        for directory in [self.keep, self.spectrograms].into_iter().flatten() {
            std::fs::create_dir_all(directory).with_context(|| format!("{}: cannot be made", directory.display()))?;
            if std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some()) {
                bail!("{}: is not empty; give a new folder", directory.display());
            }
        }
        Ok(())
    }
}

/// Plays after every prompt, on all cores; when interrupted only what is done by then, `None` where nothing is.
pub fn play_all(
    checkpoint: &Checkpoint,
    engine: &Loaded,
    spectrum: &Spectrum,
    setup: &Setup,
    talk: &Talk,
) -> Result<Option<FreeRun>> {
    let bar = talk.bar((setup.places.len() * setup.frames) as u64, "{bar:40} {percent} %, {eta} left");
    let play = |(i, place)| play(checkpoint, engine, spectrum, place, i, setup, &mut || bar.inc(1));
    let all = setup.places.par_iter().enumerate().map(play).collect::<Result<Vec<_>>>()?;
    bar.finish_and_clear();
    let all: Vec<Continuation> = all.into_iter().flatten().collect();
    if all.is_empty() {
        return Ok(None);
    }
    let truths: Vec<&Figures> = all.iter().map(|c| &c.truth).collect();
    let model = summarise(&all.iter().map(|c| &c.model).collect::<Vec<_>>(), &truths);
    let floor = summarise(&all.iter().map(|c| &c.floor).collect::<Vec<_>>(), &truths);
    let truth = summarise(&truths, &truths);
    Ok(Some(FreeRun { plan: setup.plan, model, floor, truth, continuations: all }))
}

/// `n` joins spread evenly over all places of files where a prompt and its continuation fit, of so many plan frames.
pub fn places(pieces: &[Piece], hop: usize, n: usize, prompt_frames: usize, frames: usize) -> Result<Vec<Place<'_>>> {
    let room = |piece: &Piece| (piece.tokens.len() / hop + 1).saturating_sub(prompt_frames + frames);
    let total: usize = pieces.iter().map(room).sum();
    if total == 0 {
        bail!("no file is long enough for a prompt and its continuation; lower --prompt-seconds or --seconds");
    }
    let place = |i: usize| {
        let mut at = (2 * i + 1) * total / (2 * n);
        for piece in pieces {
            if at < room(piece) {
                return Ok(Place { piece, join: at + prompt_frames });
            }
            at -= room(piece);
        }
        bail!("a place lies outside the files")
    };
    (0..n).map(place).collect()
}

fn play(
    checkpoint: &Checkpoint,
    engine: &Loaded,
    spectrum: &Spectrum,
    place: &Place,
    i: usize,
    setup: &Setup,
    advance: &mut dyn FnMut(),
) -> Result<Option<Continuation>> {
    let (codec, hop) = (&checkpoint.config.codec, spectrum.hop());
    let (from, to) = ((place.join - setup.prompt_frames) * hop, (place.join + setup.frames) * hop);
    let context = &place.piece.tokens[from..place.join * hop];
    let heard_before = codec.decode_all(context);
    let true_samples = codec.decode_all(&place.piece.tokens[place.join * hop..to]);
    let true_track = Track::analyse(&heard_before, &true_samples, spectrum)?;
    let mut engine = engine.stream()?;
    let given = match setup.plan {
        PlanFrom::Own => None,
        PlanFrom::True => Some(true_track.bands.clone()),
        PlanFrom::Quantized => {
            let mut plan = engine.plan_of(&place.piece.tokens[from..to])?;
            let mut frames = plan.split_off(setup.prompt_frames);
            let (colour, before) = Colour::of_prompt(plan, &heard_before, spectrum);
            colour.follow(&before, &mut frames);
            Some(bands_of(&frames))
        }
        PlanFrom::Shuffled => Some(shuffled(&true_track.bands, setup.options.seed ^ i as u64)),
    };

    let options = Options { stream: i as u32, ..setup.options };
    let mut path = Continued::new(engine.as_mut(), &options, context, setup.governed)?;
    if let Some(bands) = given {
        path.set_guide(engine.as_mut(), Guide::Other { bands: bands.into(), start: 0 })?;
    }
    let mut planned = Array2::zeros((0, spectrum.n_bands()));
    let mut samples = Vec::new();
    for _ in 0..setup.frames {
        if interrupted() {
            return Ok(None);
        }
        let frame = path.next(engine.as_mut())?;
        planned.push_row(ArrayView1::from(&frame.plan.bands))?;
        samples.extend(codec.decode_all(&frame.tokens));
        advance();
    }
    if let Some(directory) = setup.keep {
        keep(&directory.join(format!("{i:03}.wav")), codec.sample_rate, &heard_before, &samples)?;
    }
    let planned = Track::new(planned, spectrum)?;
    let noise = noise_through_plan(
        &heard_before,
        planned.bands.view(),
        spectrum,
        &checkpoint.config.forecast,
        options.seed,
        options.stream,
    )?;
    if let Some(directory) = setup.spectrograms {
        let path = directory.join(format!("{i:03}.png"));
        let bands =
            [&true_samples, &samples, &noise].map(|after| spectrum.analyse(&[&heard_before[..], after].concat()));
        let titles = ["the recording", "the model", "noise through the same plan"];
        let name = short(&place.piece.name);
        let rows: Vec<Row> = titles
            .iter()
            .zip(&bands)
            .map(|(title, bands)| Row { title: format!("{name}: {title}"), bands: bands.view() })
            .collect();
        let picture = spectrograms(&rows, spectrum, Some(setup.prompt_frames));
        picture.save(&path).with_context(|| format!("{}: cannot be written", path.display()))?;
    }
    let per_second = codec.sample_rate as f32 / hop as f32;
    let context_db = metrics::level_db(&heard_before);
    let figures = |samples: &[f32], planned: &Track| -> Result<Figures> {
        let heard = Track::analyse(&heard_before, samples, spectrum)?;
        let mut failures = failures(samples, &heard, planned, spectrum);
        // A plan may ask for silence; only the model's own is to blame for it.
        let died = setup.plan == PlanFrom::Own && last_second(samples, codec.sample_rate, hop) < context_db - DIED_DB;
        if died && !failures.contains(&Failure::Collapse) {
            failures.push(Failure::Collapse);
        }
        Ok(Figures {
            music: music(samples, codec.sample_rate),
            kinship: kinship(&heard_before, samples, codec.sample_rate),
            timbre: Timbre::of(samples, codec.sample_rate),
            adherence: adherence(heard.bands.view(), planned.bands.view()),
            level_drift: level_drift(&heard.level_db, &planned.level_db, per_second),
            tonality_db: tonality_db(heard.bands.view()),
            failures,
        })
    };
    let true_plan = match setup.plan {
        PlanFrom::Own | PlanFrom::Shuffled => &true_track,
        PlanFrom::True | PlanFrom::Quantized => &planned,
    };
    Ok(Some(Continuation {
        file: place.piece.name.clone(),
        at_s: (place.join * hop) as f64 / f64::from(codec.sample_rate),
        model: figures(&samples, &planned)?,
        interventions: path.interventions(),
        floor: figures(&noise, &planned)?,
        truth: figures(&true_samples, true_plan)?,
    }))
}

/// A continuation that ends this far below its prompt has died.
const DIED_DB: f32 = 40.0;

/// Level of the loudest `hop` samples of the last second. Of the samples themselves: plan frames have a floor of -70 dB.
fn last_second(samples: &[f32], sample_rate: u32, hop: usize) -> f32 {
    let last = &samples[samples.len().saturating_sub(sample_rate as usize)..];
    last.chunks(hop).map(metrics::level_db).fold(metrics::SILENCE_DB, f32::max)
}

fn keep(path: &Path, sample_rate: u32, before: &[f32], after: &[f32]) -> Result<()> {
    let mut sink = sink::open(path, true)?;
    sink.start(&WavFormat::new(sample_rate, 1, SampleFormat::I16))?;
    sink.write(before)?;
    sink.write(after)?;
    Ok(sink.finish()?)
}

/// The frames of a plan in random order.
fn shuffled(bands: &Array2<f32>, seed: u64) -> Array2<f32> {
    let mut order: Vec<usize> = (0..bands.nrows()).collect();
    Rng::new(seed).shuffle(&mut order);
    bands.select(ndarray::Axis(0), &order)
}

fn timbre(of: &[&Figures]) -> Timbre {
    let mut all = Timbre::default();
    of.iter().for_each(|figures| all.add(&figures.timbre));
    all
}

fn summarise(all: &[&Figures], truths: &[&Figures]) -> Summary {
    let n = all.len().max(1) as f32;
    let mean = |of: &dyn Fn(&Figures) -> f32| all.iter().copied().map(of).sum::<f32>() / n;
    // What is silent has no timbre and no harmony.
    let sounding: Vec<&Music> = all.iter().map(|f| &f.music).filter(|music| music.centroid_hz > 0.0).collect();
    let mean_sound =
        |of: &dyn Fn(&Music) -> f32| sounding.iter().copied().map(of).sum::<f32>() / sounding.len().max(1) as f32;
    let worst = |of: &dyn Fn(&Figures) -> f32| {
        all.iter().copied().map(of).fold(0.0f32, |a, b| if b.abs() > a.abs() { b } else { a })
    };
    Summary {
        adherence_db: mean(&|f| f.adherence.rms_db.powi(2)).sqrt(),
        worst_adherence_db: worst(&|f| f.adherence.rms_db),
        bias_db: mean(&|f| f.adherence.bias_db),
        level_drift_db: mean(&|f| f.level_drift.median_db.abs()),
        worst_level_drift_db: worst(&|f| f.level_drift.median_db),
        tonality_db: mean(&|f| f.tonality_db),
        n_failed: all.iter().filter(|f| !f.failures.is_empty()).count(),
        music: Music {
            centroid_hz: mean_sound(&|music| music.centroid_hz),
            flatness_db: mean_sound(&|music| music.flatness_db),
            onsets_per_s: mean(&|f| f.music.onsets_per_s),
            chroma_bits: mean_sound(&|music| music.chroma_bits),
            chroma_flux: mean_sound(&|music| music.chroma_flux),
            pulse: mean(&|f| f.music.pulse),
        },
        kinship: Kinship {
            beat: mean(&|f| f.kinship.beat),
            harmony: mean(&|f| f.kinship.harmony),
            themes: mean(&|f| f.kinship.themes),
        },
        frechet: timbre(all).distance(&timbre(truths)),
    }
}

impl FreeRun {
    /// A table for people.
    pub fn print(&self) -> Result<()> {
        print(&format!(
            "{:>26} {:>10} {:>10} {:>10} {:>10} {:>10}",
            "", "adherence", "bias", "drift", "tonality", "failures"
        ))?;
        for c in &self.continuations {
            let mut failures: Vec<String> = c.model.failures.iter().map(ToString::to_string).collect();
            failures.extend(c.interventions.iter().map(|i| format!("({} at {:.1} s: another way)", i.alarm, i.at_s)));
            print(&row(&format!("{} {:.1} s", short(&c.file), c.at_s), &c.model, &failures.join(", ")))?;
        }
        let n = self.continuations.len();
        let rows = [("model", &self.model), ("noise through the plan", &self.floor), ("the recording", &self.truth)];
        for (name, s) in rows {
            print(&format!(
                "{name:>26} {:>7.1} dB {:>+7.1} dB {:>7.1} dB {:>7.1} dB {:>5} of {n}",
                s.adherence_db, s.bias_db, s.level_drift_db, s.tonality_db, s.n_failed
            ))?;
        }
        print(&format!(
            "worst: adherence {:.1} dB, drift {:+.1} dB; plan: {}",
            self.model.worst_adherence_db,
            self.model.worst_level_drift_db,
            self.plan.to_possible_value().map_or(String::new(), |plan| plan.get_name().to_owned())
        ))?;
        print(&format!(
            "{:>26} {:>10} {:>10} {:>10} {:>11} {:>8} {:>6} {:>8} {:>8} {:>8} {:>7}",
            "", "centroid", "flatness", "onsets", "chroma", "its flux", "pulse", "Frechet", "beat", "harmony", "themes"
        ))?;
        for (name, Summary { music, kinship, frechet, .. }) in rows {
            print(&format!(
                "{name:>26} {:>7.0} Hz {:>7.1} dB {:>8.2}/s {:>6.2} bits {:>8.3} {:>6} {frechet:>8.1} {:>8} {:>8} {:>7}",
                music.centroid_hz,
                music.flatness_db,
                music.onsets_per_s,
                music.chroma_bits,
                music.chroma_flux,
                known(music.pulse),
                known(kinship.beat),
                known(kinship.harmony),
                known(kinship.themes)
            ))?;
        }
        Ok(())
    }
}

/// A figure, or a dash where there was too little to take it of.
fn known(figure: f32) -> String {
    if figure == 0.0 { "-".into() } else { format!("{figure:.2}") }
}

fn row(name: &str, figures: &Figures, failures: &str) -> String {
    format!(
        "{name:>26} {:>7.1} dB {:>+7.1} dB {:>+7.1} dB {:>7.1} dB  {failures}",
        figures.adherence.rms_db, figures.adherence.bias_db, figures.level_drift.median_db, figures.tonality_db
    )
}

/// The end of a long name.
fn short(name: &str) -> String {
    let file = Path::new(name).file_name().map_or(name.to_owned(), |n| n.to_string_lossy().into_owned());
    let surplus = file.chars().count().saturating_sub(17);
    file.chars().skip(surplus).collect()
}
