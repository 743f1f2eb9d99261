//! Turns keys in a terminal, lines on standard input and lines on a Unix socket into requests for a stream.

use std::io::{self, BufRead};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::time::Duration;

use anyhow::{Context, Result};
use crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers, poll, read};
use crossterm::terminal::{disable_raw_mode, enable_raw_mode};

use super::common::interrupt;

/// One thing that somebody asked for.
pub struct Asked {
    pub line: String,
    /// Where the answer goes; without, to the terminal.
    pub answer: Option<Sender<String>>,
}

/// What the keys do, for people.
pub const KEYS: &str = "space hold | v another way | m mute | f fade | t/T temperature | p/P top-p | g/G grain | s seed | \
l listen | k take | ? help | q quit";

/// What a key asks for.
fn line_of(code: KeyCode) -> Option<&'static str> {
    Some(match code {
        KeyCode::Char(' ') => "key hold",
        KeyCode::Char('v') => "vary",
        KeyCode::Char('m') => "key mute",
        KeyCode::Char('f') => "key fade",
        KeyCode::Char('t') => "key temperature -",
        KeyCode::Char('T') => "key temperature +",
        KeyCode::Char('p') => "key top-p -",
        KeyCode::Char('P') => "key top-p +",
        KeyCode::Char('g') => "key grain -",
        KeyCode::Char('G') => "key grain +",
        KeyCode::Char('s') => "key seed",
        KeyCode::Char('l') => "listen",
        KeyCode::Char('k') => "take",
        KeyCode::Char('?' | 'h') => "key help",
        KeyCode::Char('q') | KeyCode::Esc => "quit",
        _ => return None,
    })
}

/// A terminal that gives keys at once; dropping it gives it back as it was.
pub struct Keys;

impl Keys {
    /// Sends what keys ask for, until nobody listens.
    pub fn listen(to: Sender<Asked>) -> Result<Self> {
        enable_raw_mode().context("reading keys from the terminal")?;
        std::thread::spawn(move || {
            loop {
                match poll(Duration::from_millis(200)) {
                    Ok(false) => continue,
                    Ok(true) => {}
                    Err(_) => break,
                }
                let Ok(Event::Key(key)) = read() else { continue };
                if key.kind == KeyEventKind::Release {
                    continue;
                }
                // The terminal makes no signal of it now.
                if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
                    interrupt();
                } else if let Some(line) = line_of(key.code)
                    && to.send(Asked { line: line.to_owned(), answer: None }).is_err()
                {
                    break;
                }
            }
        });
        Ok(Self)
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing back.
        let _ = disable_raw_mode();
    }
}

/// Sends the lines of standard input. Where it is closed the music goes on.
pub fn read_stdin(to: Sender<Asked>) {
    std::thread::spawn(move || {
        for line in lines(io::stdin().lock()) {
            if to.send(Asked { line, answer: None }).is_err() {
                return;
            }
        }
        let _ = to.send(Asked { line: CLOSED.to_owned(), answer: None });
    });
}

/// The lines that come in until they end; what is not UTF-8 is replaced.
fn lines(mut from: impl BufRead) -> impl Iterator<Item = String> {
    std::iter::from_fn(move || {
        let mut line = Vec::new();
        let n = from.read_until(b'\n', &mut line).ok()?;
        let text = String::from_utf8_lossy(&line);
        (n > 0).then(|| text.trim_end_matches(['\r', '\n']).to_owned())
    })
}

/// Stands for the end of standard input.
pub const CLOSED: &str = "key closed";

/// Listens on a Unix socket: a line, a line for an answer. The socket's file goes when this is dropped.
#[cfg(unix)]
pub struct Socket(std::path::PathBuf);

#[cfg(unix)]
impl Socket {
    pub fn listen(path: &Path, to: Sender<Asked>) -> Result<Self> {
        use std::io::Write;
        use std::os::unix::net::{UnixListener, UnixStream};

        // A file that nobody listens on was left by a program that ended badly.
        if path.exists() && UnixStream::connect(path).is_err() {
            use std::os::unix::fs::FileTypeExt;
            if path.metadata().is_ok_and(|metadata| metadata.file_type().is_socket()) {
                let _ = std::fs::remove_file(path);
            }
        }
        let listener = UnixListener::bind(path).with_context(|| {
            format!("{}: no socket can be made there; give a new name with --control", path.display())
        })?;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let to = to.clone();
                std::thread::spawn(move || {
                    let Ok(mut answers) = stream.try_clone() else { return };
                    for line in lines(io::BufReader::new(stream)) {
                        let (answer, told) = std::sync::mpsc::channel();
                        if to.send(Asked { line, answer: Some(answer) }).is_err() {
                            return;
                        }
                        let Ok(text) = told.recv() else { return };
                        if writeln!(answers, "{text}").is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Ok(Self(path.to_owned()))
    }
}

#[cfg(unix)]
impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(not(unix))]
pub struct Socket;

#[cfg(not(unix))]
impl Socket {
    pub fn listen(path: &Path, _: Sender<Asked>) -> Result<Self> {
        anyhow::bail!("{}: sockets are there on Unix only; use --control -", path.display())
    }
}
