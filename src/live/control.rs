//! Turns lines such as `temperature 0.9` into what they ask of a stream that plays.

use std::path::PathBuf;

use crate::generate::CONTEXT_S;

/// Something that changes what is played while it plays.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// What is played: below 1 safer, above bolder.
    Temperature(f32),
    /// What is played: only the likeliest choices of this probability.
    TopP(f32),
    /// How it sounds: breath and noise.
    Grain(f32),
    /// Volume as a factor.
    Volume(f32),
    /// Silence, or the volume again, reached in so many seconds.
    Mute { muted: bool, seconds: f32 },
    /// The plan stands still: the sound freezes; or goes on.
    Hold(bool),
    /// Go back these seconds and take another way.
    Vary(f64),
    /// Play this recording's plan.
    Follow(PathBuf),
    /// Back to the model's own plans.
    Own,
    /// Play on after this recording instead.
    Prompt(PathBuf),
    /// Hear what is played to a microphone, for so many seconds or until this is said again, and play on from there.
    Listen(Option<f64>),
    /// Save what was played in the last seconds.
    Take { seconds: f64, path: Option<PathBuf> },
    /// Other uniforms from here on.
    Seed(u64),
    /// Say how things are.
    Status,
    /// What can be said.
    Help,
    /// End.
    Quit,
}

/// A line that asks for nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{line:?}: {reason}; say `help` for what can be said")]
pub struct Nonsense {
    line: String,
    reason: String,
}

/// All that can be said.
pub const HELP: &str = "temperature X | top-p X | grain X | volume X | mute | unmute | fade [SECONDS] | hold | go | \
vary [SECONDS] | follow FILE | own | prompt FILE | \
listen [SECONDS] | take [SECONDS] [FILE] | seed N | status | help | quit";

/// Seconds that changes of the volume take, and fades.
pub const RAMP_S: f32 = 0.01;
pub const FADE_S: f32 = 2.0;
const VARY_S: f64 = 4.0;
const TAKE_S: f64 = 30.0;
/// A line is cut here in messages.
const SHOWN: usize = 60;

impl Request {
    /// Reads one line.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(line: &str) -> Result<Self, Nonsense> {
        let fail = |reason: String| Nonsense { line: line.trim().chars().take(SHOWN).collect(), reason };
        let (word, rest) = line.trim().split_once(char::is_whitespace).unwrap_or((line.trim(), ""));
        let rest = rest.trim();
        let number = |low: f64, high: f64, usual: Option<f64>| -> Result<f64, Nonsense> {
            match (rest.is_empty(), usual) {
                (true, Some(usual)) => return Ok(usual),
                (true, None) => return Err(fail(format!("{word} needs a number"))),
                _ => {}
            }
            let value: f64 = rest.parse().map_err(|_| fail(format!("{rest:?} is no number")))?;
            let fits = (low..=high).contains(&value);
            if fits { Ok(value) } else { Err(fail(format!("must lie in {low} to {high}"))) }
        };
        let file = || match rest {
            "" => Err(fail(format!("{word} needs a file"))),
            name => Ok(PathBuf::from(name)),
        };
        let alone = |request: Self| {
            if rest.is_empty() { Ok(request) } else { Err(fail(format!("{word} stands alone"))) }
        };
        match word {
            "temperature" => Ok(Self::Temperature(number(0.0, 10.0, None)? as f32)),
            "top-p" => Ok(Self::TopP(number(0.0, 1.0, None)? as f32)),
            "grain" => Ok(Self::Grain(number(0.0, 10.0, None)? as f32)),
            "volume" => Ok(Self::Volume(number(0.0, 1.0, None)? as f32)),
            "mute" => alone(Self::Mute { muted: true, seconds: RAMP_S }),
            "unmute" => alone(Self::Mute { muted: false, seconds: RAMP_S }),
            "fade" => Ok(Self::Mute { muted: true, seconds: number(0.01, 600.0, Some(FADE_S.into()))? as f32 }),
            "hold" => alone(Self::Hold(true)),
            "go" => alone(Self::Hold(false)),
            "vary" => Ok(Self::Vary(number(0.0, MOST_VARY_S, Some(VARY_S))?)),
            "follow" => Ok(Self::Follow(file()?)),
            "own" => alone(Self::Own),
            "prompt" => Ok(Self::Prompt(file()?)),
            "listen" if rest.is_empty() => Ok(Self::Listen(None)),
            "listen" => Ok(Self::Listen(Some(number(LEAST_LISTEN_S, MOST_LISTEN_S, None)?))),
            "take" => {
                let (seconds, path) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
                let seconds: f64 = match seconds {
                    "" => TAKE_S,
                    text => text.parse().map_err(|_| fail(format!("{text:?} is no number of seconds")))?,
                };
                if !(seconds > 0.0 && seconds <= MOST_TAKE_S) {
                    return Err(fail(format!("must be more than 0 and at most {MOST_TAKE_S} seconds")));
                }
                let path = Some(path.trim()).filter(|path| !path.is_empty()).map(PathBuf::from);
                Ok(Self::Take { seconds, path })
            }
            "seed" => rest.parse().map(Self::Seed).map_err(|_| fail("a seed is a whole number".into())),
            "status" => alone(Self::Status),
            "help" => alone(Self::Help),
            "quit" => alone(Self::Quit),
            "" => Err(fail("an empty line".into())),
            _ => Err(fail("no such request".into())),
        }
    }
}

/// Furthest that `vary` goes back, seconds.
pub const MOST_VARY_S: f64 = 30.0;
/// Shortest and longest time that it listens, seconds; the longest is what a model hears.
pub const LEAST_LISTEN_S: f64 = 0.1;
pub const MOST_LISTEN_S: f64 = CONTEXT_S;
/// Longest take, seconds.
pub const MOST_TAKE_S: f64 = 60.0;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_request_can_be_said() {
        for (line, expected) in [
            ("temperature 0.9", Request::Temperature(0.9)),
            ("  top-p 0.5 ", Request::TopP(0.5)),
            ("grain 0", Request::Grain(0.0)),
            ("volume 0.5", Request::Volume(0.5)),
            ("mute", Request::Mute { muted: true, seconds: RAMP_S }),
            ("unmute", Request::Mute { muted: false, seconds: RAMP_S }),
            ("fade 5", Request::Mute { muted: true, seconds: 5.0 }),
            ("hold", Request::Hold(true)),
            ("go", Request::Hold(false)),
            ("vary", Request::Vary(VARY_S)),
            ("vary 2.5", Request::Vary(2.5)),
            ("follow my song.wav", Request::Follow("my song.wav".into())),
            ("prompt a.flac", Request::Prompt("a.flac".into())),
            ("own", Request::Own),
            ("listen", Request::Listen(None)),
            ("listen 8", Request::Listen(Some(8.0))),
            ("take", Request::Take { seconds: TAKE_S, path: None }),
            ("take 5 a b.wav", Request::Take { seconds: 5.0, path: Some("a b.wav".into()) }),
            ("seed 7", Request::Seed(7)),
            ("quit", Request::Quit),
        ] {
            assert_eq!(Request::parse(line), Ok(expected), "{line}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_the_reason() {
        for (line, reason) in [
            ("", "empty"),
            ("sing", "no such request"),
            ("temperature", "needs a number"),
            ("temperature hot", "is no number"),
            ("temperature nan", "must lie"),
            ("top-p 2", "must lie in 0 to 1"),
            ("listen 41", "must lie in 0.1 to 40"),
            ("take -1", "more than 0"),
            ("take 1e9", "at most"),
            ("mute now", "stands alone"),
            ("follow", "needs a file"),
            ("seed x", "whole number"),
        ] {
            let message = Request::parse(line).unwrap_err().to_string();
            assert!(message.contains(reason), "{line}: {message}");
        }
    }

    proptest! {
        #[test]
        fn no_line_is_too_strange_to_read(line in ".{0,200}") {
            let _ = Request::parse(&line);
        }
    }
}
