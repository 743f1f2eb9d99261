//! Messages and the status line of a stream.

use std::io::{self, Write};

use super::super::common::say;

/// Messages and the status line.
pub struct Screen {
    pub quiet: bool,
    pub status: bool,
    /// The terminal gives keys at once and takes lines as they are.
    pub raw: bool,
    pub shown: bool,
}

impl Screen {
    pub fn note(&self, text: &str) {
        if !self.quiet {
            self.warn(text);
        }
    }

    pub fn warn(&self, text: &str) {
        let over = if self.shown { "\r\x1b[2K" } else { "" };
        let end = if self.raw { "\r" } else { "" };
        say(&format!("{over}{text}{end}"));
    }

    pub fn line(&mut self, text: &str) {
        if self.status {
            // Whether anyone looks does not matter.
            let _ = write!(io::stderr(), "\r\x1b[2K{text}");
            self.shown = true;
        }
    }

    pub fn clear(&mut self) {
        self.line("");
        self.shown = false;
    }
}
