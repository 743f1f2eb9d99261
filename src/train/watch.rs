//! Turns a model in training into what shows how far it has come: one scene that it plays by itself, always the same, as a
//! spectrogram, and the course of its losses.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::dataset::Dataset;
use super::scene::{Follow, Scene};
use super::{Part, TrainError, beside};
use crate::checkpoint::Checkpoint;
use crate::codec::Codec;
use crate::engine::Engine;
use crate::engine::cpu::{CpuEngine, CpuOptions};
use crate::metrics::Adherence;
use crate::plan::Spectrum;
use crate::plot::{BLUE, Chart, GREEN, ORANGE, Row, Series, charts, spectrograms};
use crate::sampler::PlanSampling;

/// Plan frames of the scene: heard before, and played.
const SCENE: (usize, usize) = (32, 96);
const SEED: u64 = 0;

/// What an evaluation found, bits per frame or sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    pub step: usize,
    /// Mean over the steps since the last evaluation.
    pub train: f64,
    /// On held-out pieces, if there are any: by the averaged weights, and by those of the last step.
    pub held_out: Option<f64>,
    pub held_out_raw: Option<f64>,
}

/// Everything evaluations of a part found.
pub type History = Vec<Judged>;

/// Watches a training run.
pub struct Watch {
    scene: Option<Scene>,
    spectrum: Spectrum,
    codec: Codec,
    /// Pictures go beside this file.
    output: PathBuf,
}

impl Watch {
    /// Chooses the scene: the middle of the longest piece to judge by, if it is long enough.
    pub fn new(data: &Dataset, output: &Path) -> Result<Self, TrainError> {
        let hop = data.spectrum.hop();
        let piece = data.judges().iter().max_by_key(|piece| piece.n_frames(hop));
        let room = |n_frames: usize| n_frames.checked_sub(SCENE.0 + SCENE.1);
        let scene = match piece.and_then(|piece| Some((piece, room(piece.n_frames(hop))?))) {
            Some((piece, room)) => Some(Scene::cut(data, piece, room / 2, SCENE)?),
            None => None,
        };
        let (spectrum, codec) = (data.spectrum.clone(), data.codec.clone());
        Ok(Self { scene, spectrum, codec, output: output.to_owned() })
    }

    /// Where the pictures of the run that makes `output` are: losses, and the scene.
    pub fn pictures(output: &Path) -> [PathBuf; 2] {
        ["loss.png", "sample.png"].map(|name| beside(output, name))
    }

    /// Draws the losses of both parts.
    pub fn draw_losses(&self, plan: &History, wave: &History) -> Result<(), TrainError> {
        let chart = |title, history: &History| {
            let points = |bits: fn(&Judged) -> Option<f64>| {
                history.iter().filter_map(|judged| Some((judged.step as f64, bits(judged)?))).collect()
            };
            Chart {
                title,
                x_label: "step",
                series: vec![
                    Series { name: "train", color: BLUE, points: points(|judged| Some(judged.train)) },
                    Series { name: "held out, last step", color: GREEN, points: points(|judged| judged.held_out_raw) },
                    Series { name: "held out, average", color: ORANGE, points: points(|judged| judged.held_out) },
                ],
            }
        };
        let picture = charts(&[chart("plan, bits/frame", plan), chart("wave, bits/sample", wave)]);
        self.save(0, &picture)
    }

    /// Lets the model play the scene, following the recording's plan and its own, and draws both; how far the first is from
    /// its plan. `None` where no piece is long enough.
    pub fn listen(&self, checkpoint: &Checkpoint, part: Part, step: usize) -> Result<Option<Adherence>, TrainError> {
        let Some(scene) = &self.scene else { return Ok(None) };
        let engine = CpuEngine::new(checkpoint, &CpuOptions::default())?;
        let play = |follow| {
            let mut engine = engine.fork()?;
            engine.set_sampling(PlanSampling::default(), checkpoint.generation);
            scene.play(&mut engine, follow, SEED, &self.spectrum, &self.codec)
        };
        let (guided, own) = rayon::join(|| play(Follow::Recording), || play(Follow::Own));
        let (guided, own) = (guided?, own?);
        let adherence = guided.adherence();
        let stage = format!("{} step {step}", part.name());
        let titles = [
            "the recording".to_owned(),
            format!("{stage}: played on by its plan, {:.1} dB from it", adherence.rms_db),
            format!("{stage}: played on by the model's own plan"),
        ];
        let bands = [scene.recording.view(), guided.heard.view(), own.heard.view()];
        let rows: Vec<Row> = titles.into_iter().zip(bands).map(|(title, bands)| Row { title, bands }).collect();
        self.save(1, &spectrograms(&rows, &self.spectrum, Some(scene.join())))?;
        Ok(Some(adherence))
    }

    fn save(&self, which: usize, picture: &crate::plot::Picture) -> Result<(), TrainError> {
        let path = &Self::pictures(&self.output)[which];
        picture.save(path).map_err(|source| TrainError::Picture { path: path.clone(), source })
    }
}
