//! Turns a MIDI file into a performance: notes and pedal movements in seconds.
use std::collections::{BTreeMap, HashMap, VecDeque};

use anyhow::{Context, Result, bail};
use midly::{Format, MetaMessage, MidiMessage, Smf, Timing, TrackEventKind};

const PEDAL: u8 = 64;
const PERCUSSION_CHANNEL: u8 = 9;
/// Strikes of one key closer than this are one strike that two voices of the score share.
const UNISON_S: f64 = 0.004;

/// One strike of a key, held until `off_s` (the pedal may let it ring longer).
#[derive(Clone, Debug, PartialEq)]
pub struct Note {
    pub on_s: f64,
    pub off_s: f64,
    /// MIDI note number, 60 = middle C.
    pub key: i32,
    /// 1 to 127, fractional after humanising.
    pub velocity: f64,
    /// Number of its track and channel among those with notes.
    pub voice: usize,
}

/// The sustain pedal arrives at `value` (0 to 127) at `time_s`.
#[derive(Clone, Debug, PartialEq)]
pub struct PedalMove {
    pub time_s: f64,
    pub value: u8,
}

/// What a pianist does: notes by onset, pedal movements by time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Performance {
    pub notes: Vec<Note>,
    pub pedal: Vec<PedalMove>,
    /// When the file's beats (quarters) are; none where it counts in frames of film.
    pub beats_s: Vec<f64>,
    /// Notes of the percussion channel, which a piano does not play.
    pub n_percussion: usize,
    /// Tracks without an end mark, which are read as far as they can be.
    pub n_damaged_tracks: usize,
}

enum Event {
    On { voice: Voice, velocity: u8 },
    Off { voice: Voice },
    Pedal { channel: u8, value: u8 },
    Tempo { us_per_beat: f64 },
    Beat,
}

/// Track, channel and key: which note-off belongs to which note-on.
type Voice = (usize, u8, u8);

/// Reads a standard MIDI file.
///
/// # Errors
/// Not MIDI, a format-2 file (independent songs), or no note in it.
pub fn parse(bytes: &[u8]) -> Result<Performance> {
    let smf = Smf::parse(bytes).context("not a readable MIDI file")?;
    if smf.header.format == Format::Sequential {
        bail!("a format-2 MIDI file holds independent songs; split it first");
    }
    let mut performance = pair(timeline(&smf)?);
    let is_whole = |track: &midly::Track| {
        track.last().is_some_and(|event| event.kind == TrackEventKind::Meta(MetaMessage::EndOfTrack))
    };
    performance.n_damaged_tracks = smf.tracks.iter().filter(|track| !is_whole(track)).count();
    if performance.notes.is_empty() {
        bail!("no note for a piano in this MIDI file");
    }
    Ok(performance)
}

/// All events in time order, seconds from the start of the file; events of one tick keep their file order.
fn timeline(smf: &Smf) -> Result<Vec<(f64, Event)>> {
    let mut by_tick: Vec<(u64, Event)> = Vec::new();
    for (track_index, track) in smf.tracks.iter().enumerate() {
        let mut tick = 0u64;
        for event in track {
            tick += u64::from(event.delta.as_int());
            let event = match event.kind {
                TrackEventKind::Meta(MetaMessage::Tempo(us)) => {
                    Event::Tempo { us_per_beat: f64::from(us.as_int().max(1)) }
                }
                TrackEventKind::Midi { channel, message } => {
                    let channel = channel.as_int();
                    match message {
                        MidiMessage::NoteOn { key, vel } if vel > 0 => {
                            Event::On { voice: (track_index, channel, key.as_int()), velocity: vel.as_int() }
                        }
                        MidiMessage::NoteOn { key, .. } | MidiMessage::NoteOff { key, .. } => {
                            Event::Off { voice: (track_index, channel, key.as_int()) }
                        }
                        MidiMessage::Controller { controller, value } if controller == PEDAL => {
                            Event::Pedal { channel, value: value.as_int() }
                        }
                        _ => continue,
                    }
                }
                _ => continue,
            };
            by_tick.push((tick, event));
        }
    }
    if let (Timing::Metrical(ticks), Some(last)) = (smf.header.timing, by_tick.iter().map(|(tick, _)| *tick).max()) {
        by_tick.extend((0..=last).step_by(usize::from(ticks.as_int()).max(1)).map(|tick| (tick, Event::Beat)));
    }
    by_tick.sort_by_key(|(tick, _)| *tick);

    let (mut s_per_tick, ticks_per_beat) = match smf.header.timing {
        Timing::Metrical(ticks) if ticks.as_int() == 0 => bail!("0 ticks per beat in the MIDI header"),
        Timing::Metrical(ticks) => {
            let ticks = f64::from(ticks.as_int());
            (0.5 / ticks, Some(ticks))
        }
        Timing::Timecode(_, 0) => bail!("0 ticks per frame in the MIDI header"),
        Timing::Timecode(fps, ticks) => (1.0 / f64::from(fps.as_f32()) / f64::from(ticks), None),
    };
    let (mut tick_then, mut time_s) = (0, 0.0);
    let mut events = Vec::with_capacity(by_tick.len());
    for (tick, event) in by_tick {
        time_s += (tick - tick_then) as f64 * s_per_tick;
        tick_then = tick;
        if let (Event::Tempo { us_per_beat }, Some(ticks)) = (&event, ticks_per_beat) {
            s_per_tick = us_per_beat * 1e-6 / ticks;
        }
        events.push((time_s, event));
    }
    Ok(events)
}

/// Joins note-ons with their note-offs (first on, first off), and the channels' pedals to one.
fn pair(events: Vec<(f64, Event)>) -> Performance {
    let mut performance = Performance::default();
    let mut open: HashMap<Voice, VecDeque<usize>> = HashMap::new();
    let mut pedals: BTreeMap<u8, u8> = BTreeMap::new();
    let mut voices: BTreeMap<(usize, u8), usize> = BTreeMap::new();
    let end_s = events.last().map_or(0.0, |(time_s, _)| *time_s);
    for (time_s, event) in events {
        match event {
            Event::On { voice: (_, PERCUSSION_CHANNEL, _), .. } => performance.n_percussion += 1,
            Event::On { voice, velocity } => {
                let n_voices = voices.len();
                open.entry(voice).or_default().push_back(performance.notes.len());
                performance.notes.push(Note {
                    on_s: time_s,
                    off_s: end_s,
                    key: i32::from(voice.2),
                    velocity: f64::from(velocity),
                    voice: *voices.entry((voice.0, voice.1)).or_insert(n_voices),
                });
            }
            Event::Off { voice } => {
                if let Some(index) = open.get_mut(&voice).and_then(VecDeque::pop_front) {
                    performance.notes[index].off_s = time_s;
                }
            }
            Event::Pedal { channel, value } => {
                pedals.insert(channel, value);
                let value = pedals.values().copied().max().unwrap_or(0);
                if performance.pedal.last().map_or(0, |pedal| pedal.value) != value {
                    performance.pedal.push(PedalMove { time_s, value });
                }
            }
            Event::Beat => performance.beats_s.push(time_s),
            Event::Tempo { .. } => {}
        }
    }
    performance.notes = merge_unisons(performance.notes);
    performance
}

/// A piano has one key per pitch: strikes of it at one moment become one, as loud as the loudest, held as the longest.
fn merge_unisons(notes: Vec<Note>) -> Vec<Note> {
    let mut merged: Vec<Note> = Vec::with_capacity(notes.len());
    let mut latest: HashMap<i32, usize> = HashMap::new();
    for note in notes {
        match latest.get(&note.key).map(|index| &mut merged[*index]) {
            Some(twin) if note.on_s - twin.on_s < UNISON_S => {
                twin.velocity = twin.velocity.max(note.velocity);
                twin.off_s = twin.off_s.max(note.off_s);
            }
            _ => {
                latest.insert(note.key, merged.len());
                merged.push(note);
            }
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Voice = (0, 0, 60);
    const B: Voice = (1, 1, 60);

    fn on(voice: Voice, velocity: u8) -> Event {
        Event::On { voice, velocity }
    }

    #[test]
    fn overlapping_strikes_of_one_key_close_first_on_first_off() {
        let played = pair(vec![
            (0.0, on(A, 50)),
            (1.0, on(A, 60)),
            (1.5, Event::Off { voice: A }),
            (2.0, Event::Off { voice: A }),
        ]);
        let times: Vec<_> = played.notes.iter().map(|note| (note.on_s, note.off_s)).collect();
        assert_eq!(times, [(0.0, 1.5), (1.0, 2.0)]);
    }

    #[test]
    fn a_note_without_an_end_lasts_to_the_end_of_the_file() {
        let played = pair(vec![(0.0, on(A, 50)), (3.0, Event::Pedal { channel: 0, value: 0 })]);
        assert_eq!(played.notes[0].off_s, 3.0);
    }

    #[test]
    fn two_voices_on_one_key_make_one_strike_and_percussion_none() {
        let played = pair(vec![
            (0.0, on(A, 50)),
            (0.0, on(B, 70)),
            (0.0, on((0, PERCUSSION_CHANNEL, 40), 70)),
            (0.5, Event::Off { voice: A }),
            (1.0, Event::Off { voice: B }),
        ]);
        assert_eq!(played.notes, [Note { on_s: 0.0, off_s: 1.0, key: 60, velocity: 70.0, voice: 0 }]);
        assert_eq!(played.n_percussion, 1);
    }

    #[test]
    fn the_pedal_is_down_while_any_channel_holds_it() {
        let pedal = |channel, value| Event::Pedal { channel, value };
        let played = pair(vec![(0.0, pedal(0, 127)), (1.0, pedal(1, 127)), (2.0, pedal(0, 0)), (3.0, pedal(1, 0))]);
        let moves: Vec<_> = played.pedal.iter().map(|p| (p.time_s, p.value)).collect();
        assert_eq!(moves, [(0.0, 127), (3.0, 0)]);
    }

    #[test]
    fn a_truncated_file_is_read_as_far_as_it_goes_and_counted() {
        let head = b"MThd\0\0\0\x06\0\0\0\x01\0\x60MTrk\0\0\0\x0c";
        let whole = [&head[..], &[0, 0x90, 60, 64, 96, 0x80, 60, 0, 0, 0xff, 0x2f, 0]].concat();
        let (read, cut) = (parse(&whole).unwrap(), parse(&whole[..whole.len() - 5]).unwrap());
        assert_eq!((read.n_damaged_tracks, read.notes[0].off_s, read.beats_s), (0, 0.5, vec![0.0, 0.5]));
        assert_eq!((cut.n_damaged_tracks, cut.notes.len()), (1, 1));
    }

    #[test]
    fn bytes_that_are_not_midi_are_an_error() {
        for bytes in [&b""[..], b"RIFF....WAVE", b"MThd\0\0\0\x06\0\x01\0\0\0\x60"] {
            assert!(parse(bytes).is_err(), "{bytes:?}");
        }
    }
}
