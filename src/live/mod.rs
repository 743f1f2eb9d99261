//! Plays as the model makes it: engine, ring, sound card.
//!
//! ```text
//! requests --control--> changes --+     device --callback--> ear --> prompt --> Voice
//!                                 v
//! engine --Voice--> Conductor --engine's thread--> ring --callback--> device
//!                                 +--> recording (a Sink)
//! ```
//! | module | turns | into |
//! |---|---|---|
//! | [`voice`] | an engine and a prompt | frames at the device's rate |
//! | [`conductor`] | a voice and changes | what is played |
//! | [`ring`] | frames in pieces | frames when the device wants them; underruns into fades and a count |
//! | [`stream`] | a conductor, a ring, a recording | a thread that keeps the ring full |
//! | [`device`] | a name | a device and its shape, and a stream that plays or listens |
//! | [`ear`] | what a device hears | a clip |
//! | [`clock`] | time, true or simulated | a device that nobody hears |
//! | [`control`] | lines | requests |
//! | [`admission`] | a few steps | whether the machine is fast enough, and what buffer it needs |
//!
//! Callbacks never lock, allocate or log. Nothing here prints.

pub mod admission;
#[cfg(any(feature = "live", target_os = "macos", target_os = "windows"))]
mod card;
pub mod clock;
pub mod conductor;
pub mod control;
pub mod device;
pub mod ear;
#[cfg(target_os = "linux")]
mod pulse;
pub mod ring;
pub mod stream;
pub mod voice;

pub use admission::{Admission, Speed};
pub use conductor::{Change, Conductor};
pub use control::Request;
pub use device::{Device, Direction, LiveError, Running};
pub use ear::{Ear, Heard};
pub use ring::{Feed, Pull};
pub use stream::{Order, Recording, Report, Streamer};
pub use voice::Voice;
