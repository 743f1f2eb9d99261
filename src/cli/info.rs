//! `wavegen info`: turns an audio file or a model into a description of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;
use wavegen::audio::{AudioSource, Decoder};
use wavegen::checkpoint::Checkpoint;
use wavegen::metrics::{peak, rms};
use wavegen::model::config::{GenerationSettings, ModelConfig};

use super::Outcome;
use super::common::{Talk, is_pipe, print, report_damage};

/// Describe an audio file or a model; without a file, the model inside the program
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen info                     the built-in model: sizes, licence, data
  wavegen info small               the smaller model inside the program, for slow machines
  wavegen info my.safetensors
  wavegen info song.m4a --json")]
pub struct Args {
    /// Audio file or model; - for audio on standard input
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    talk: Talk,
}

#[derive(Serialize)]
struct ModelInfo {
    name: String,
    parameters: usize,
    plan_parameters: usize,
    wave_parameters: usize,
    codebook_parameters: usize,
    stored_as: &'static str,
    multiply_adds_per_sample: f64,
    generation: GenerationSettings,
    notes: BTreeMap<String, String>,
    config: ModelConfig,
}

#[derive(Serialize)]
struct AudioInfo {
    name: String,
    container: String,
    codec: String,
    sample_rate: u32,
    channels: usize,
    sample_format: Option<String>,
    n_frames: u64,
    seconds: f64,
    /// dB against full scale; None for silence.
    peak_db: Option<f32>,
    rms_db: Option<f32>,
    damaged_packets: u64,
}

pub fn run(args: &Args) -> Result<Outcome> {
    match &args.file {
        None => {
            #[cfg(feature = "cuda")]
            report_device(&args.talk);
            model(&Checkpoint::built_in()?, &args.talk)?
        }
        Some(path) if is_model(path) => model(&Checkpoint::named(path)?, &args.talk)?,
        Some(path) => audio(path, &args.talk)?,
    }
    Ok(Outcome::Done)
}

/// Whether there is a GPU that the kernels can run on.
#[cfg(feature = "cuda")]
fn report_device(talk: &Talk) {
    match wavegen::cuda::device() {
        Ok(_) => talk.note("a CUDA device is at hand"),
        Err(e) => talk.note(&format!("{e}; everything runs on the CPU")),
    }
}

/// By name or by content, where it is not inside the program: a safetensors file begins with the length of its JSON header.
fn is_model(path: &Path) -> bool {
    let begins_so = || {
        let mut head = [0; 10];
        let read = File::open(path).and_then(|mut file| file.read_exact(&mut head));
        read.is_ok() && &head[4..] == b"\0\0\0\0{\""
    };
    Checkpoint::is_inside(path)
        || path.extension().is_some_and(|extension| extension == "safetensors")
        || (!is_pipe(path) && path.is_file() && begins_so())
}

fn model(checkpoint: &Checkpoint, talk: &Talk) -> Result<()> {
    let config = &checkpoint.config;
    let codebooks = checkpoint.quantizer.books.len() + checkpoint.quantizer.mean.len();
    let info = ModelInfo {
        name: config.name.clone(),
        parameters: checkpoint.n_weights("") + codebooks,
        plan_parameters: checkpoint.n_weights("plan."),
        wave_parameters: checkpoint.n_weights("wave."),
        codebook_parameters: codebooks,
        stored_as: checkpoint.precision.name(),
        multiply_adds_per_sample: config.wave_transformer.multiply_adds_per_sample(),
        generation: checkpoint.generation,
        notes: checkpoint.notes.clone(),
        config: config.clone(),
    };
    if talk.json {
        return talk.json(&info, false);
    }
    let millions = |n: usize| format!("{:.3} M", n as f64 / 1e6);
    let (plan, rate) = (&config.plan, config.codec.sample_rate);
    print(&format!("model          {}", info.name))?;
    print(&format!("codec          {:?}, {rate} Hz, {} levels", config.codec.quantizer, config.codec.levels()))?;
    print(&format!(
        "plan           {:.2} frames/s of {} tokens with {} entries, {} bands",
        f64::from(rate) / plan.hop as f64,
        plan.n_codebooks,
        plan.n_entries,
        checkpoint.quantizer.n_bands()
    ))?;
    print(&format!("parameters     {}, stored as {}", millions(info.parameters), info.stored_as))?;
    let p = &config.plan_transformer;
    print(&format!(
        "  plan         {}: dim {}, {} layers, {} heads, window {}",
        millions(info.plan_parameters),
        p.dim,
        p.n_layers,
        p.n_heads,
        p.window
    ))?;
    print(&format!("  wave         {}", millions(info.wave_parameters)))?;
    for tier in &config.wave_transformer.tiers {
        print(&format!(
            "    hop {:>4}   dim {}, {} layers, {} heads, window {}",
            tier.hop, tier.dim, tier.n_layers, tier.n_heads, tier.window
        ))?;
    }
    print(&format!("  codebooks    {}", millions(info.codebook_parameters)))?;
    print(&format!("multiply-adds  {:.3} M per sample (wave transformer)", info.multiply_adds_per_sample / 1e6))?;
    let g = info.generation;
    print(&format!("generation     grain {}, past {}, offset {}, level {} dB", g.grain, g.past, g.offset, g.level_db))?;
    for (name, text) in &info.notes {
        print(&format!("{name:<14} {text}"))?;
    }
    Ok(())
}

fn audio(path: &Path, talk: &Talk) -> Result<()> {
    let source = AudioSource::open(path)?;
    let mut decoder = Decoder::from_source(&source)?;
    let (mut top, mut power, mut n_samples) = (0.0f32, 0.0f64, 0u64);
    while let Some(block) = decoder.next_block()? {
        top = top.max(peak(block));
        power += f64::from(rms(block)).powi(2) * block.len() as f64;
        n_samples += block.len() as u64;
    }
    let spec = decoder.spec();
    let n_frames = n_samples / spec.channels as u64;
    let db = |amplitude: f64| (amplitude > 0.0).then(|| (20.0 * amplitude.log10()) as f32);
    let info = AudioInfo {
        name: source.name().to_owned(),
        container: spec.container.clone(),
        codec: spec.codec.clone(),
        sample_rate: spec.sample_rate,
        channels: spec.channels,
        sample_format: spec.sample_format.map(|format| format.to_string()),
        n_frames,
        seconds: n_frames as f64 / f64::from(spec.sample_rate),
        peak_db: db(top.into()),
        rms_db: db((power / n_samples.max(1) as f64).sqrt()),
        damaged_packets: decoder.damaged_packets(),
    };
    report_damage(source.name(), decoder.damaged_packets(), decoder.warnings(), talk);
    if talk.json {
        return talk.json(&info, false);
    }
    let format = info.sample_format.as_deref().unwrap_or("lossy");
    let level = |db: Option<f32>| db.map_or("silence".to_owned(), |db| format!("{db:.1} dB"));
    print(&format!("file      {}", info.name))?;
    print(&format!("format    {} / {}, {format}", info.container, info.codec))?;
    print(&format!(
        "audio     {} Hz, {} channels, {:.3} s ({} frames)",
        info.sample_rate, info.channels, info.seconds, n_frames
    ))?;
    print(&format!("level     peak {}, rms {}", level(info.peak_db), level(info.rms_db))).map_err(Into::into)
}
