//! A picture of coloured dots, and what is drawn on it: boxes, lines, text; turned into PNG.

use std::io;
use std::path::Path;

use super::font;
use crate::atomic::write_whole;

/// Red, green, blue.
pub type Color = [u8; 3];

/// Dots that a dot of a glyph takes.
const TEXT_SCALE: usize = 2;
/// Size of a line of text.
pub const TEXT_HEIGHT: usize = font::HEIGHT * TEXT_SCALE;

/// A picture, white at first; what is drawn beyond its edges is lost.
pub struct Picture {
    width: usize,
    height: usize,
    /// Row by row.
    dots: Vec<Color>,
}

impl Picture {
    pub fn new(width: usize, height: usize) -> Self {
        Self { width, height, dots: vec![[255; 3]; width * height] }
    }

    pub fn dot(&mut self, x: usize, y: usize, color: Color) {
        if x < self.width && y < self.height {
            self.dots[y * self.width + x] = color;
        }
    }

    /// A filled box; its corner is on the upper left.
    pub fn fill(&mut self, (left, top): (usize, usize), (width, height): (usize, usize), color: Color) {
        for y in top..top + height {
            (left..left + width).for_each(|x| self.dot(x, y, color));
        }
    }

    /// A line two dots wide.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), color: Color) {
        let steps = (to.0 - from.0).abs().max((to.1 - from.1).abs()).ceil().max(1.0);
        for step in 0..=steps as usize {
            let share = step as f64 / steps;
            let at = |a: f64, b: f64| (a + (b - a) * share).round().max(0.0) as usize;
            self.fill((at(from.0, to.0), at(from.1, to.1)), (2, 2), color);
        }
    }

    /// Text from its upper left corner on.
    pub fn text(&mut self, (left, top): (usize, usize), text: &str, color: Color) {
        for (i, character) in text.chars().enumerate() {
            let begin = left + i * (font::WIDTH + 1) * TEXT_SCALE;
            for (column, bits) in font::glyph(character).into_iter().enumerate() {
                for row in (0..font::HEIGHT).filter(|row| bits >> row & 1 == 1) {
                    let corner = (begin + column * TEXT_SCALE, top + row * TEXT_SCALE);
                    self.fill(corner, (TEXT_SCALE, TEXT_SCALE), color);
                }
            }
        }
    }

    /// Text that ends at `right`.
    pub fn text_before(&mut self, (right, top): (usize, usize), text: &str, color: Color) {
        self.text((right.saturating_sub(text_width(text)), top), text, color);
    }

    /// As the bytes of a PNG file.
    pub fn to_png(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(io::Error::other)?;
        writer.write_image_data(self.dots.as_flattened()).map_err(io::Error::other)?;
        writer.finish().map_err(io::Error::other)?;
        Ok(bytes)
    }

    /// Writes a PNG file under a temporary name and renames it when it is whole.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        write_whole(path, &self.to_png()?, true)
    }
}

/// Dots that a line of text is wide.
pub fn text_width(text: &str) -> usize {
    text.chars().count() * (font::WIDTH + 1) * TEXT_SCALE
}
