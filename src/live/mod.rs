//! Plays as the model makes it: engine, ring, sound card.
//!
//! ```text
//! requests --control--> changes --+
//!                                 v
//! engine --Path, Seam--> Conductor --engine's thread--> ring --callback--> device
//!                                 +--> recording (a Sink)
//! ```
//! | module | turns | into |
//! |---|---|---|
//! | [`conductor`] | an engine and changes | frames at the device's rate |
//! | [`ring`] | frames in pieces | frames when the device wants them; underruns into fades and a count |
//! | [`stream`] | a conductor, a ring, a recording | a thread that keeps the ring full |
//! | [`device`] | a name | a device and its shape, and a stream that plays |
//! | [`clock`] | time, true or simulated | a device that nobody hears |
//! | [`control`] | lines | requests |
//! | [`admission`] | a few steps | whether the machine is fast enough, and what buffer it needs |
//!
//! The callback never locks, allocates or logs. Nothing here prints.

pub mod admission;
#[cfg(any(feature = "live", target_os = "macos", target_os = "windows"))]
mod card;
pub mod clock;
pub mod conductor;
pub mod control;
pub mod device;
#[cfg(target_os = "linux")]
mod pulse;
pub mod ring;
pub mod stream;

pub use admission::{Admission, Speed};
pub use conductor::{Change, Conductor};
pub use control::Request;
pub use device::{Device, LiveError, Playing};
pub use ring::{Feed, Pull};
pub use stream::{Order, Report, Streamer};
