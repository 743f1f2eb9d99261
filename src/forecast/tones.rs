//! Goes on with the partials that the past sounds with, each as loud as the plan says.
//!
//! Noise through a filter flutters however sharp the filter is; a partial does not. So a line of the planned spectrum that stands
//! out of its surroundings is played by an oscillator, with the frequency and the phase that the past has there, and only the rest
//! is left to prediction (the deterministic and the stochastic part of Serra and Smith, 1990). Amplitudes are the plan's alone, so that nothing can
//! feed itself.

use std::f64::consts::{FRAC_PI_2, TAU};
use std::ops::Range;

use realfft::num_complex::Complex;
use serde::{Deserialize, Serialize};

use super::ForecastError;
use super::history::History;
use super::sharp::{Sharpened, Sharpener};
use crate::plan::Spectrum;
use crate::plan::fourier::Workspace;
use crate::plan::response::Response;

/// Of a line's power, what is left to prediction at least.
const LEFT: f64 = 0.03;
/// A line this far above its surroundings, nepers of power, begins to be a tone (2 dB) ...
const STANDS_OUT: f64 = 0.46;
/// ... and is one when it is this much higher (8 dB).
const STANDS_OUT_OVER: f64 = 1.84;
/// Bands on either side that are a band's surroundings.
const SURROUNDINGS: usize = 6;
/// Bins of the grid to either side that a line's power may lie in.
const LINE_REACH: usize = 7;
/// The past has a line where the plan has one if it lies this near, as a factor of frequency (a quarter tone between them) or bins ...
const NEAR: f64 = 0.01455;
const NEAR_BINS: f64 = 1.5;
/// ... and is at most this much softer, as a factor of power (12 dB).
const HEARD: f64 = 0.063;
/// A tone this much louder than the past has it begins now, nepers of power (13 dB): at once, not over a frame.
const BEGINS: f64 = 3.0;
/// Samples in which it rises.
const RISE: usize = 128;
/// Oscillators that turn together.
const LANES: usize = 8;
/// Steps of the window's transform within half a bin to either side.
const STEPS: usize = 32;

/// The tones of a stream.
#[derive(Clone)]
pub(super) struct Tones {
    state: State,
    /// Samples since the frame began.
    at: usize,
    /// Of the frame that is played, `[hop]`; nothing before the first.
    ahead: Vec<f32>,
    /// Made with the first frame.
    room: Option<Room>,
}

/// What a stream of tones remembers between two frames.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct State {
    pub heard: History,
    /// How the tones of the frame before would go on, `[hop]`; nothing before the first.
    pub rest: Vec<f32>,
}

/// Tables, and room to work in.
#[derive(Clone)]
struct Room {
    work: Workspace,
    /// Transform of the plan's window at `-1/2 ..= 1/2` bins of the grid, `[2 STEPS + 1]`.
    lobe: Vec<Complex<f64>>,
    /// `[n_bands]`
    surroundings: Vec<f64>,
    /// Where the plan has tones, and their share of its power there.
    lines: Vec<(Range<usize>, f64)>,
    steady: Choir,
    rising: Choir,
}

/// A tone: `amplitude cos(turn t + phase)`, t samples after the frame began.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tone {
    amplitude: f64,
    turn: f64,
    phase: f64,
}

/// Tones that begin or go on alike.
#[derive(Clone)]
struct Choir {
    tones: Vec<Tone>,
    /// What they sound like together, `[2 hop]`.
    sound: Vec<f64>,
}

impl Tones {
    /// Of a stream's beginning, before which there is silence; `keep` samples are remembered, no fewer than the plan's window.
    pub fn new(keep: usize) -> Self {
        State { heard: History::new(keep), rest: Vec::new() }.into()
    }

    /// Samples that are remembered.
    pub fn keep(&self) -> usize {
        self.state.heard.keep()
    }

    /// Whether enough is remembered to find the tones of plans of `spectrum`.
    pub fn fits(&self, spectrum: &Spectrum) -> Result<(), ForecastError> {
        let (past_window, plan_window) = (self.keep(), spectrum.window_len());
        match plan_window > past_window {
            true => Err(ForecastError::TonesWindow { past_window, plan_window }),
            false => Ok(()),
        }
    }

    /// What the tones say of the next sample.
    pub fn next(&self) -> f32 {
        self.ahead.get(self.at).copied().unwrap_or(0.0)
    }

    /// What the next sample was; gives what the tones had said of it.
    pub fn push(&mut self, sample: f32) -> f32 {
        let said = self.next();
        self.at += 1;
        self.state.heard.push(sample);
        said
    }

    /// Begins a frame: finds the tones of its spectrum, and takes their power out of it.
    pub fn begin(&mut self, spectrum: &Spectrum, planned: &mut Sharpener) {
        let Sharpened { response, bands, power } = planned.sharpened();
        let (window, hop) = (spectrum.window(), spectrum.hop());
        let Room { work, lobe, surroundings, lines, steady, rising } =
            self.room.get_or_insert_with(|| Room::new(window, response));
        work.block.fill(0.0);
        let heard = self.state.heard.recent(window.len(), 0);
        for ((y, &x), w) in work.block.iter_mut().zip(heard).zip(window) {
            *y = f64::from(x) * w;
        }
        response.grid.fourier.power(work);
        medians(bands, surroundings);
        steady.tones.clear();
        rising.tones.clear();
        // Mean square of a tone whose bins have these powers in sum, and of one whose main lobe is this high.
        let of_bins = 2.0 / (spectrum.energy() * work.block.len() as f64);
        let of_peak = 2.0 / lobe[STEPS].norm_sqr();
        lines.clear();
        for peak in (1..power.len() - 1).filter(|&k| power[k] > power[k - 1] && power[k] >= power[k + 1]) {
            let (below, above, weight) = response.grid.bins[peak];
            let around = surroundings[below] * (1.0 - weight) + surroundings[above] * weight;
            let stands_out = (power[peak].ln() - around - STANDS_OUT) / STANDS_OUT_OVER;
            if stands_out.is_nan() || stands_out <= 0.0 {
                continue;
            }
            let share = stands_out.min(1.0) * (1.0 - LEFT);
            let line = line(power, peak);
            let planned = share * power[line.clone()].iter().sum::<f64>() * of_bins;
            lines.push((line, share));
            let (bin, offset) = heard_near(&work.power, peak, HEARD * planned / of_peak).unwrap_or((peak, 0.0));
            let heard = work.bins[bin] / lobe_at(lobe, offset);
            let turn = TAU * (bin as f64 + offset) / work.block.len() as f64;
            // Of nothing, zeros of either sign, too.
            let angle = if heard.norm_sqr() > 0.0 { heard.arg() } else { 0.0 };
            let phase = (angle + turn * window.len() as f64) % TAU;
            let begins = planned > BEGINS.exp() * 2.0 * heard.norm_sqr();
            let choir = if begins { &mut *rising } else { &mut *steady };
            choir.tones.push(Tone { amplitude: (2.0 * planned).sqrt(), turn, phase });
        }
        for (line, share) in lines.drain(..) {
            power[line].iter_mut().for_each(|power| *power *= 1.0 - share);
        }
        steady.sing(2 * hop);
        rising.sing(2 * hop);
        self.at = 0;
        self.ahead.clear();
        self.state.rest.resize(hop, 0.0);
        for t in 0..hop {
            let new = quarter_turn(t, hop);
            let old = f64::from(self.state.rest[t]) * (1.0 - new);
            self.ahead.push((steady.sound[t] * new + old + rising.sound[t] * quarter_turn(t, RISE)) as f32);
            self.state.rest[t] = (steady.sound[hop + t] + rising.sound[hop + t]) as f32;
        }
    }
}

impl From<State> for Tones {
    fn from(state: State) -> Self {
        Self { state, at: 0, ahead: Vec::new(), room: None }
    }
}

impl From<Tones> for State {
    fn from(tones: Tones) -> Self {
        tones.state
    }
}

impl Room {
    fn new(window: &[f64], response: &Response) -> Self {
        let work = response.grid.fourier.workspace();
        let lobe = lobe(window, work.block.len());
        // Every other bin is a peak at most.
        let most = work.power.len() / 2;
        let choir = || Choir { tones: Vec::with_capacity(most), sound: Vec::new() };
        Self { work, lobe, surroundings: Vec::new(), lines: Vec::with_capacity(most), steady: choir(), rising: choir() }
    }
}

impl Choir {
    /// Sounds all tones together for `n` samples, by `cos((t + 1) w) = 2 cos w cos(t w) - cos((t - 1) w)`.
    fn sing(&mut self, n: usize) {
        self.sound.clear();
        self.sound.resize(n, 0.0);
        for tones in self.tones.chunks(LANES) {
            let (mut now, mut before, mut twice) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
            for (lane, tone) in tones.iter().enumerate() {
                now[lane] = tone.amplitude * tone.phase.cos();
                before[lane] = tone.amplitude * (tone.phase - tone.turn).cos();
                twice[lane] = 2.0 * tone.turn.cos();
            }
            for sound in &mut self.sound {
                let mut sum = [0.0; LANES / 2];
                for lane in 0..LANES / 2 {
                    sum[lane] = now[lane] + now[lane + LANES / 2];
                }
                *sound += (sum[0] + sum[1]) + (sum[2] + sum[3]);
                for lane in 0..LANES {
                    let next = twice[lane] * now[lane] - before[lane];
                    before[lane] = now[lane];
                    now[lane] = next;
                }
            }
        }
    }
}

/// The bins around a peak that fall to both sides, the lowest on its left included.
fn line(power: &[f64], peak: usize) -> Range<usize> {
    let (mut first, mut end) = (peak, peak + 1);
    while first > 0 && peak - first < LINE_REACH && power[first - 1] < power[first] {
        first -= 1;
    }
    let falls = |end: usize| power[end] < power[end - 1] && power[end + 1] < power[end];
    while end + 1 < power.len() && end - peak < LINE_REACH && falls(end) {
        end += 1;
    }
    first..end
}

/// The loudest bin near `peak`, and how far off it a line lies (at most half a bin), if it is a maximum of at least the power `least`.
fn heard_near(power: &[f64], peak: usize, least: f64) -> Option<(usize, f64)> {
    let reach = (peak as f64 * NEAR).max(NEAR_BINS);
    let first = ((peak as f64 - reach).floor() as usize).max(1);
    let last = ((peak as f64 + reach).ceil() as usize).min(power.len() - 2);
    let loudest = (first..=last).reduce(|best, bin| if power[bin] > power[best] { bin } else { best })?;
    let [before, at, after] = [loudest - 1, loudest, loudest + 1].map(|bin| power[bin]);
    // What is no number is not heard either.
    let heard = at >= least && at >= before && at >= after && before > 0.0 && after > 0.0;
    if !heard {
        return None;
    }
    // The vertex of a parabola through the logarithms.
    let [before, at, after] = [before, at, after].map(f64::ln);
    let bend = 2.0 * at - before - after;
    let offset = if bend > 0.0 { 0.5 * (after - before) / bend } else { 0.0 };
    Some((loudest, offset.clamp(-0.5, 0.5)))
}

/// Transform of a window at `-1/2 ..= 1/2` bins of a grid of `len`, `[2 STEPS + 1]`.
pub(crate) fn lobe(window: &[f64], len: usize) -> Vec<Complex<f64>> {
    let at = |step: usize| {
        let turn = TAU * (step as f64 - STEPS as f64) / (2 * STEPS * len) as f64;
        window.iter().enumerate().map(|(t, w)| Complex::from_polar(*w, -turn * t as f64)).sum()
    };
    (0..=2 * STEPS).map(at).collect()
}

/// The window's transform at a bin that lies `offset` bins below a line.
fn lobe_at(lobe: &[Complex<f64>], offset: f64) -> Complex<f64> {
    let place = (0.5 - offset) * (2 * STEPS) as f64;
    let step = (place as usize).min(lobe.len() - 2);
    let weight = place - step as f64;
    lobe[step] * (1.0 - weight) + lobe[step + 1] * weight
}

/// Median of each band's surroundings, itself among them; beyond the ends all is as there.
fn medians(bands: &[f64], out: &mut Vec<f64>) {
    let reach = SURROUNDINGS as isize;
    let last = bands.len() as isize - 1;
    out.clear();
    out.extend((0..=last).map(|band| {
        let mut around: [f64; 2 * SURROUNDINGS + 1] =
            std::array::from_fn(|i| bands[(band + i as isize - reach).clamp(0, last) as usize]);
        *around.select_nth_unstable_by(SURROUNDINGS, f64::total_cmp).1
    }));
}

/// From 0 to 1 over `n` samples as the square of a sine, and 1 from there on.
fn quarter_turn(t: usize, n: usize) -> f64 {
    if t < n { (FRAC_PI_2 * (t as f64 + 0.5) / n as f64).sin().powi(2) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::super::{ForecastConfig, PlannedForecast};
    use super::*;
    use crate::plan::PlanConfig;
    use crate::rng::Rng;

    fn spectrum() -> Spectrum {
        Spectrum::new(16_000, &PlanConfig::default()).unwrap()
    }

    fn config() -> ForecastConfig {
        ForecastConfig { planned_order: 512, lag_window_hz: 1.0, deconvolution: 20, tones: true, ..Default::default() }
    }

    /// A chord in noise, `n` samples.
    fn chord(n: usize, noise: f32) -> Vec<f32> {
        let mut rng = Rng::new(12);
        let tone = |hz: f64, t: usize| (0.1 * (TAU * hz * t as f64 / 16_000.0 + 0.4).sin()) as f32;
        (0..n)
            .map(|t| [220.0, 311.7, 1013.0].map(|hz| tone(hz, t)).iter().sum::<f32>() + noise * rng.normal())
            .collect()
    }

    /// Tones of the frame after `heard`, if it is planned as `sound` is.
    fn tones_after(heard: &[f32], sound: &[f32]) -> Vec<f32> {
        let spectrum = spectrum();
        let plan = spectrum.analyse(sound);
        let bands = plan.row(plan.nrows() - 1).to_vec();
        let mut sharpener = Sharpener::new(&spectrum, &config());
        sharpener.sharpen(&spectrum, &bands, &bands).unwrap();
        let mut tones = Tones::new(4096);
        // Twice, so that nothing fades in from silence.
        let (before, last) = heard.split_at(heard.len() - 512);
        for part in [before, last] {
            part.iter().for_each(|&sample| _ = tones.push(sample));
            sharpener.sharpen(&spectrum, &bands, &bands).unwrap();
            tones.begin(&spectrum, &mut sharpener);
        }
        tones.ahead
    }

    fn power(samples: impl IntoIterator<Item = f32>) -> f32 {
        let (n, sum) = samples.into_iter().fold((0, 0.0), |(n, sum), x| (n + 1, sum + x * x));
        sum / n as f32
    }

    #[test]
    fn partials_go_on_in_phase_and_as_loud_as_planned() {
        let sound = chord(4096 + 512, 0.001);
        let ahead = tones_after(&sound[..4096], &sound);
        let error = power(ahead.iter().zip(&sound[4096..]).map(|(a, b)| a - b));
        let whole = power(sound[4096..].iter().copied());
        assert!(error < 0.05 * whole, "{error} of {whole}");
        // Of a softer past only frequencies and phases are taken.
        let softer: Vec<f32> = sound[..4096].iter().map(|x| 0.5 * x).collect();
        let ahead = power(tones_after(&softer, &sound));
        assert!((ahead / whole).ln().abs() < 0.3, "{ahead} where {whole} was planned");
    }

    #[test]
    fn noise_has_hardly_a_tone() {
        let mut rng = Rng::new(3);
        let noise: Vec<f32> = (0..4608).map(|_| 0.05 * rng.normal()).collect();
        let tones = power(tones_after(&noise[..4096], &noise));
        assert!(tones < 0.4 * 0.05 * 0.05, "{tones}");
        assert_eq!(power(tones_after(&[0.0; 4096], &[0.0; 4608])), 0.0);
    }

    /// Noise around the forecasts of `plan` after `sound`, as in generation.
    fn played(sound: &[f32], plan: &[f32], n_frames: usize, tones: bool) -> Vec<f32> {
        let (spectrum, mut rng) = (spectrum(), Rng::new(21));
        let heard = spectrum.analyse(sound);
        let mut forecast = PlannedForecast::new(&ForecastConfig { tones, ..config() }).unwrap();
        forecast.hear(&spectrum, sound, heard.view()).unwrap();
        let mut out = Vec::new();
        for _ in 0..n_frames {
            forecast.begin_frame(&spectrum, plan, plan).unwrap();
            for _ in 0..spectrum.hop() {
                out.push(forecast.forecast() + forecast.residual_rms() * rng.normal());
                forecast.push(out[out.len() - 1]);
            }
        }
        out
    }

    /// Of the amplitude of 1013 Hz in frames of 512 samples: deviation over mean.
    fn flutter(sound: &[f32]) -> f32 {
        let amplitude = |frame: &[f32]| {
            let turn = |t: usize| Complex::from_polar(1.0, -TAU * 1013.0 * t as f64 / 16_000.0);
            frame.iter().enumerate().map(|(t, &x)| turn(t) * f64::from(x)).sum::<Complex<f64>>().norm() as f32
        };
        let amplitudes: Vec<f32> = sound.chunks_exact(512).map(amplitude).collect();
        let mean = amplitudes.iter().sum::<f32>() / amplitudes.len() as f32;
        power(amplitudes.iter().map(|a| a / mean - 1.0)).sqrt()
    }

    #[test]
    fn what_is_played_flutters_much_less_than_without_tones() {
        let sound = chord(16 * 512, 0.001);
        let plan = spectrum().analyse(&sound).row(15).to_vec();
        let [with, without] = [true, false].map(|tones| flutter(&played(&sound, &plan, 60, tones)));
        assert!(with < 0.2 && without > 0.35, "{with}, without {without}");
    }

    #[test]
    fn what_is_played_stays_as_loud_as_planned() {
        let sound = chord(16 * 512, 0.01);
        let plan = spectrum().analyse(&sound).row(15).to_vec();
        let off = (power(played(&sound, &plan, 60, true)) / power(sound)).ln() * 4.343;
        assert!(off.abs() < 1.0, "{off} dB");
    }

    #[test]
    fn a_tone_that_begins_is_there_at_once() {
        let (soft, loud) = (chord(4096, 0.0), chord(4608, 0.0));
        let early = |heard: Vec<f32>| {
            let ahead = tones_after(&heard, &loud);
            power(ahead[RISE..2 * RISE].to_vec()) / power(ahead[384..].to_vec())
        };
        let begins = early(soft.iter().map(|x| 0.05 * x).collect());
        let grows = early(soft.iter().map(|x| 0.5 * x).collect());
        assert!(begins > 0.5, "{begins}");
        assert!(grows > 0.3, "{grows}");
    }

    #[test]
    fn many_voices_sound_as_each_alone() {
        let mut rng = Rng::new(8);
        let tones: Vec<Tone> = (0..21)
            .map(|_| {
                let [amplitude, turn, phase] = std::array::from_fn(|_| f64::from(rng.uniform()));
                Tone { amplitude, turn: 3.0 * turn + 0.01, phase }
            })
            .collect();
        let mut choir = Choir { tones: tones.clone(), sound: Vec::new() };
        choir.sing(1024);
        for (t, sound) in choir.sound.iter().enumerate() {
            let plain: f64 = tones.iter().map(|tone| tone.amplitude * (tone.turn * t as f64 + tone.phase).cos()).sum();
            assert!((sound - plain).abs() < 1e-9, "{t}: {sound}, expected {plain}");
        }
    }

    #[test]
    fn a_line_is_found_between_bins() {
        let mut room = Room::new(spectrum().window(), &spectrum().response());
        for hz in [100.0, 441.3, 2001.7] {
            for (t, (x, w)) in room.work.block.iter_mut().zip(spectrum().window()).enumerate() {
                *x = 0.2 * (TAU * hz * t as f64 / 16_000.0 + 0.7).cos() * w;
            }
            spectrum().response().grid.fourier.power(&mut room.work);
            let peak = (hz * 4096.0 / 16_000.0).round() as usize;
            let (bin, offset) = heard_near(&room.work.power, peak, 0.0).unwrap();
            let found = (bin as f64 + offset) * 16_000.0 / 4096.0;
            assert!((found - hz).abs() < 0.15, "{found} Hz, expected {hz}");
            let amplitude = 2.0 * room.work.bins[bin] / lobe_at(&room.lobe, offset);
            assert!(
                (amplitude.norm() - 0.2).abs() < 0.004 && (amplitude.arg() - 0.7).abs() < 0.1,
                "{hz} Hz: {amplitude}"
            );
            assert_eq!(heard_near(&room.work.power, peak, 1e9), None);
            room.work.block.fill(0.0);
        }
    }

    #[test]
    fn a_line_ends_where_its_neighbour_begins() {
        let power = [5.0, 1.0, 2.0, 4.0, 9.0, 4.0, 3.0, 5.0, 6.0, 1.0, 0.5];
        assert_eq!((line(&power, 4), line(&power, 8)), (1..6, 6..10));
        let wide: Vec<f64> = (0..40).map(|k| 1.0 / (1.0 + f64::from(k - 20i32).abs())).collect();
        assert_eq!(line(&wide, 20), 20 - LINE_REACH..20 + LINE_REACH);
    }
}
