//! Turns figures into pictures: losses over steps, and plans as spectrograms.
//!
//! Drawn dot by dot, so that it works the same on a machine without fonts, and written as PNG.

mod font;
mod picture;

use ndarray::ArrayView2;

use crate::plan::{DB_PER_UNIT, Spectrum};
pub use picture::{Color, Picture};
use picture::{TEXT_HEIGHT, text_width};

pub const BLUE: Color = [0x1f, 0x77, 0xb4];
pub const ORANGE: Color = [0xff, 0x7f, 0x0e];
pub const GREEN: Color = [0x2c, 0xa0, 0x2c];
const INK: Color = [0x30, 0x30, 0x30];
const GRID: Color = [0xe4, 0xe4, 0xe4];
const MARK: Color = [0xff, 0xff, 0xff];

/// Room around a panel for its labels.
const LEFT: usize = 100;
const RIGHT: usize = 24;
const ABOVE: usize = 34;
const BELOW: usize = 44;

/// A line in a chart.
pub struct Series<'a> {
    pub name: &'a str,
    pub color: Color,
    /// What is not finite is left out.
    pub points: Vec<(f64, f64)>,
}

/// Lines over one x.
pub struct Chart<'a> {
    pub title: &'a str,
    pub x_label: &'a str,
    pub series: Vec<Series<'a>>,
}

const CHART: (usize, usize) = (900, 300);

/// Charts, one below the other; those without points are left out.
pub fn charts(charts: &[Chart]) -> Picture {
    let drawn: Vec<&Chart> =
        charts.iter().filter(|chart| chart.series.iter().any(|series| !series.points.is_empty())).collect();
    let (width, height) = (LEFT + CHART.0 + RIGHT, ABOVE + CHART.1 + BELOW);
    let mut picture = Picture::new(width, (height * drawn.len()).max(1));
    for (i, chart) in drawn.into_iter().enumerate() {
        draw_chart(&mut picture, i * height, chart);
    }
    picture
}

fn draw_chart(picture: &mut Picture, top: usize, chart: &Chart) {
    let finite = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
    let points: Vec<(f64, f64)> =
        chart.series.iter().flat_map(|series| series.points.iter().copied().filter(finite)).collect();
    // From the beginning on.
    let x = Axis::over(vec![0.0, points.iter().map(|p| p.0).fold(0.0, f64::max)], CHART.0);
    let y = Axis::over(points.iter().map(|p| p.1).collect(), CHART.1);
    let (left, bottom) = (LEFT, top + ABOVE + CHART.1);
    let place = |(at_x, at_y): (f64, f64)| (left as f64 + x.at(at_x), bottom as f64 - y.at(at_y));
    for tick in y.ticks() {
        let row = place((x.low, tick)).1 as usize;
        picture.fill((left, row), (CHART.0, 1), GRID);
        picture.text_before((left - 8, row.saturating_sub(TEXT_HEIGHT / 2)), &y.label(tick), INK);
    }
    for tick in x.ticks() {
        let column = place((tick, y.low)).0 as usize;
        picture.fill((column, top + ABOVE), (1, CHART.1), GRID);
        let label = x.label(tick);
        picture.text((column.saturating_sub(text_width(&label) / 2), bottom + 6), &label, INK);
    }
    picture.fill((left, bottom), (CHART.0, 2), INK);
    picture.fill((left, top + ABOVE), (2, CHART.1), INK);
    picture.text((left, top + 8), chart.title, INK);
    picture.text_before((left + CHART.0, bottom + 6 + TEXT_HEIGHT), chart.x_label, INK);
    let mut right = left + CHART.0;
    for series in chart.series.iter().rev().filter(|series| !series.points.is_empty()) {
        picture.text_before((right, top + 8), series.name, series.color);
        right = right.saturating_sub(text_width(series.name) + 24);
        let places: Vec<(f64, f64)> = series.points.iter().filter(|p| finite(p)).map(|&p| place(p)).collect();
        for pair in places.windows(2) {
            picture.line(pair[0], pair[1], series.color);
        }
        for &(x, y) in &places {
            picture.fill(((x - 2.0).max(0.0) as usize, (y - 2.0).max(0.0) as usize), (5, 5), series.color);
        }
    }
}

/// Values along a side of a panel.
struct Axis {
    low: f64,
    high: f64,
    /// Between ticks: 1, 2 or 5 times a power of ten.
    step: f64,
    dots: usize,
}

impl Axis {
    /// From the least value to the greatest, or to that which 97 of 100 stay below: first losses are high.
    fn over(mut values: Vec<f64>, dots: usize) -> Self {
        values.sort_by(f64::total_cmp);
        let low = values.first().copied().unwrap_or(0.0);
        let top = values.get((values.len() * 97).div_ceil(100).saturating_sub(1)).copied().unwrap_or(1.0);
        let high = if values.len() > 40 { top } else { values.last().copied().unwrap_or(1.0) };
        // Something to see where all values are the same.
        let high = if high - low > 1e-9 * low.abs().max(1e-9) { high } else { low + low.abs().max(1.0) * 0.1 };
        let rough = (high - low) / 6.0;
        let ten = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * ten).find(|&step| step >= rough).unwrap_or(rough);
        Self { low, high, step, dots }
    }

    /// Dots from the low end; what lies beyond an end is drawn there.
    fn at(&self, value: f64) -> f64 {
        ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0) * self.dots as f64
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let first = (self.low / self.step).ceil() as i64;
        let last = (self.high / self.step).floor() as i64;
        let step = self.step;
        (first..=last).map(move |i| i as f64 * step)
    }

    fn label(&self, tick: f64) -> String {
        let decimals = (-self.step.log10().floor()).clamp(0.0, 6.0) as usize;
        format!("{tick:.decimals$}")
    }
}

/// Dots of a band, and most of a frame.
const BAND: usize = 2;
const FRAME: usize = 8;
const WIDEST: usize = 1600;
/// What is this far below the loudest is black.
const RANGE_DB: f32 = 80.0;
const OCTAVES_HZ: [f64; 7] = [110.0, 220.0, 440.0, 880.0, 1760.0, 3520.0, 7040.0];

/// A plan to be drawn.
pub struct Row<'a> {
    pub title: String,
    /// `[frames, n_bands]`
    pub bands: ArrayView2<'a, f32>,
}

/// Plans, one below the other, on one scale of levels; a line stands before the frame `join`.
pub fn spectrograms(rows: &[Row], spectrum: &Spectrum, join: Option<usize>) -> Picture {
    let frames = rows.iter().map(|row| row.bands.nrows()).max().unwrap_or(0).max(1);
    let dots = (WIDEST / frames).clamp(1, FRAME);
    let (wide, high) = (frames * dots, spectrum.n_bands() * BAND);
    let height = ABOVE + high + BELOW;
    let mut picture = Picture::new(LEFT + wide + RIGHT, (height * rows.len()).max(1));
    let loudest = rows.iter().flat_map(|row| row.bands.iter().copied()).fold(f32::MIN, f32::max);
    let centres = spectrum.centres_hz();
    for (i, row) in rows.iter().enumerate() {
        let (top, bottom) = (i * height + ABOVE, i * height + ABOVE + high);
        picture.text((LEFT, top - ABOVE + 8), &row.title, INK);
        picture.fill((LEFT, top), (wide, high), heat(0.0));
        for (frame, bands) in row.bands.outer_iter().enumerate() {
            for (band, &level) in bands.iter().enumerate() {
                let share = 1.0 + (level - loudest) * DB_PER_UNIT / RANGE_DB;
                picture.fill((LEFT + frame * dots, bottom - (band + 1) * BAND), (dots, BAND), heat(share));
            }
        }
        for hz in OCTAVES_HZ {
            let band = centres.partition_point(|&centre| centre < hz);
            if band < centres.len() {
                let y = bottom - band * BAND;
                picture.fill((LEFT - 6, y), (6, 2), INK);
                picture.text_before((LEFT - 10, y.saturating_sub(TEXT_HEIGHT / 2)), &format!("{hz:.0}"), INK);
            }
        }
        let per_second = f64::from(spectrum.sample_rate()) / spectrum.hop() as f64;
        let step = Axis::over(vec![0.0, frames as f64 / per_second], wide);
        for second in step.ticks() {
            let x = LEFT + (second * per_second * dots as f64) as usize;
            picture.fill((x, bottom), (2, 6), INK);
            let label = format!("{} s", step.label(second));
            picture.text((x.saturating_sub(text_width(&label) / 2), bottom + 10), &label, INK);
        }
        if let Some(join) = join {
            let x = LEFT + join * dots;
            (top..bottom).step_by(8).for_each(|y| picture.fill((x, y), (1, 4), MARK));
        }
    }
    picture
}

/// From black over purple and orange to pale yellow, each lighter than the one before.
fn heat(share: f32) -> Color {
    const ANCHORS: [Color; 7] =
        [[0, 0, 4], [45, 11, 89], [115, 30, 109], [183, 55, 84], [237, 105, 37], [251, 180, 26], [252, 255, 200]];
    let at = share.clamp(0.0, 1.0) * (ANCHORS.len() - 1) as f32;
    let below = (at as usize).min(ANCHORS.len() - 2);
    let part = at - below as f32;
    std::array::from_fn(|i| {
        let (a, b) = (f32::from(ANCHORS[below][i]), f32::from(ANCHORS[below + 1][i]));
        (a + (b - a) * part).round() as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PlanConfig;

    /// Width, height and how many dots of each colour a PNG holds.
    fn colors(picture: &Picture) -> (u32, u32, std::collections::HashMap<Color, usize>) {
        let bytes = picture.to_png().unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut dots = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut dots).unwrap();
        let mut counts = std::collections::HashMap::new();
        dots.as_chunks::<3>().0.iter().for_each(|&color| *counts.entry(color).or_default() += 1);
        (info.width, info.height, counts)
    }

    #[test]
    fn a_chart_shows_its_lines_where_they_are() {
        let falling = (0..50).map(|i| (f64::from(i), 8.0 / f64::from(i + 1))).collect();
        let chart = |points| Chart {
            title: "bits per sample",
            x_label: "step",
            series: vec![
                Series { name: "train", color: BLUE, points },
                Series { name: "validation", color: ORANGE, points: vec![(49.0, 1.0), (10.0, f64::NAN)] },
            ],
        };
        let (width, height, counts) = colors(&charts(&[chart(falling), chart(vec![])]));
        assert_eq!((width, height), ((LEFT + CHART.0 + RIGHT) as u32, 2 * (ABOVE + CHART.1 + BELOW) as u32));
        assert!(counts[&BLUE] > 1500 && counts[&ORANGE] > 200 && counts[&INK] > 1000, "{counts:?}");
        // A straight line fills both diagonal corners and nothing else.
        let axis = Axis::over(vec![2.0, 4.0], 100);
        assert_eq!((axis.at(2.0), axis.at(3.0), axis.at(9.0)), (0.0, 50.0, 100.0));
        assert_eq!(axis.ticks().map(|t| axis.label(t)).collect::<Vec<_>>(), ["2.0", "2.5", "3.0", "3.5", "4.0"]);
        assert!(Axis::over(vec![7.0; 3], 100).at(7.0) == 0.0);
        colors(&charts(&[]));
    }

    #[test]
    fn a_tone_is_a_bright_line_at_its_pitch() {
        let spectrum = Spectrum::new(16_000, &PlanConfig::default()).unwrap();
        let tone: Vec<f32> =
            (0..16_000).map(|i| 0.3 * (std::f32::consts::TAU * 440.0 * i as f32 / 16e3).sin()).collect();
        let bands = spectrum.analyse(&tone);
        let picture = spectrograms(&[Row { title: "440 Hz".into(), bands: bands.view() }], &spectrum, Some(3));
        let (_, _, counts) = colors(&picture);
        assert!(counts.len() > 50 && counts[&MARK] > 1000, "{} colours", counts.len());
        let row = bands.row(20);
        let loudest = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        assert!((spectrum.centres_hz()[loudest] - 440.0).abs() < 20.0);
    }
}
