//! Turns a container's statements about encoder delay, padding and edits into the decoded frames to keep.
//!
//! Symphonia trims MP3, Ogg, FLAC, WAV and AIFF itself; for ISO/MP4 it reads edit lists without applying them, and for
//! CAF it states delay and padding without applying them.

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

/// Frames to keep of what the decoder makes, in ascending order; frame 0 is the decoder's first.
pub type Keep = Vec<Range<u64>>;

/// Keeps one range.
pub fn only(range: Range<u64>) -> Keep {
    std::iter::once(range).collect()
}

/// The edits of one track of an ISO/MP4 file (ISO/IEC 14496-12, 8.6.6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EditList {
    movie_timescale: u32,
    media_timescale: u32,
    // (duration in movie time, 0 to the end; start in media time, -1 for a pause)
    edits: Vec<(u64, i64)>,
    /// Whether media follows in fragments, which the header does not count.
    pub fragmented: bool,
}

impl EditList {
    /// Finds track `track_id` and its edits, if it has any; None where there is no such track.
    pub fn read(file: &mut (impl Read + Seek), track_id: u32) -> Option<Self> {
        read_edit_list(file, track_id).ok().flatten()
    }

    /// The frames that the edits play, at `sample_rate`; `n_frames` is the media's length where it is known. Without
    /// edits that is all. None: no edit plays anything, or they do not play the media in order.
    ///
    /// Pauses are not played. An end within one tick of the movie's clock of the media's end is the media's end.
    pub fn keep(&self, sample_rate: u32, n_frames: Option<u64>) -> Option<Keep> {
        let frames = |ticks: u64, timescale: u32| {
            let frames = u128::from(ticks) * u128::from(sample_rate) / u128::from(timescale);
            u64::try_from(frames).unwrap_or(u64::MAX)
        };
        let end = n_frames.unwrap_or(u64::MAX);
        let tick = frames(1, self.movie_timescale) + 1;
        if self.edits.is_empty() {
            return Some(only(0..end));
        }
        let mut keep: Keep = Vec::new();
        for &(duration, start) in &self.edits {
            let Ok(start) = u64::try_from(start) else {
                continue;
            };
            let start = frames(start, self.media_timescale);
            let stop = match duration {
                0 => end,
                _ => start.saturating_add(frames(duration, self.movie_timescale)),
            };
            let stop = if stop.saturating_add(tick) >= end { end } else { stop };
            if start >= stop || keep.last().is_some_and(|last| last.end > start) {
                return None;
            }
            keep.push(start..stop);
        }
        (!keep.is_empty()).then_some(keep)
    }
}

/// The frames to keep by iTunes' gapless comment: " 00000000 DELAY PADDING LENGTH ..." in hexadecimal.
pub fn keep_by_itunes_comment(comment: &str) -> Option<Keep> {
    let mut fields = comment.split_whitespace().skip(1).map(|field| u64::from_str_radix(field, 16));
    let (delay, _padding, length) = (fields.next()?.ok()?, fields.next()?.ok()?, fields.next()?.ok()?);
    (length > 0).then(|| only(delay..delay.saturating_add(length)))
}

/// Removes from `block` (interleaved, its first frame is frame `position`) all frames that are not kept.
pub fn apply(keep: &[Range<u64>], position: u64, channels: usize, block: &mut Vec<f32>) {
    let n_frames = (block.len() / channels) as u64;
    let mut kept = 0;
    for range in keep {
        let start = range.start.clamp(position, position + n_frames) - position;
        let end = range.end.clamp(position, position + n_frames) - position;
        if start < end {
            let samples = start as usize * channels..end as usize * channels;
            let len = samples.len();
            block.copy_within(samples, kept);
            kept += len;
        }
    }
    block.truncate(kept);
}

/// A box's name and where its content ends; the file stands at its start.
struct BoxHead {
    name: [u8; 4],
    end: u64,
}

/// Reads the next box's head; None at `limit`.
fn next_box(file: &mut (impl Read + Seek), limit: u64) -> io::Result<Option<BoxHead>> {
    let start = file.stream_position()?;
    if start.saturating_add(8) > limit {
        return Ok(None);
    }
    let size = u64::from(read_u32(file)?);
    let mut name = [0; 4];
    file.read_exact(&mut name)?;
    let end = match size {
        0 => limit,
        1 => start.saturating_add(read_u64(file)?),
        size => start + size,
    };
    // A box that does not contain its own head would be read forever.
    let valid = end >= file.stream_position()?;
    Ok(valid.then_some(BoxHead { name, end: end.min(limit) }))
}

fn read_edit_list(file: &mut (impl Read + Seek), track_id: u32) -> io::Result<Option<EditList>> {
    let file_bytes = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    while let Some(top) = next_box(file, file_bytes)? {
        if &top.name == b"moov" {
            return read_movie(file, top.end, track_id);
        }
        file.seek(SeekFrom::Start(top.end))?;
    }
    Ok(None)
}

fn read_movie(file: &mut (impl Read + Seek), limit: u64, track_id: u32) -> io::Result<Option<EditList>> {
    let (mut movie_timescale, mut fragmented, mut found) = (0, false, None);
    while let Some(head) = next_box(file, limit)? {
        match &head.name {
            b"mvhd" => movie_timescale = read_timescale(file)?,
            b"mvex" => fragmented = true,
            b"trak" => found = found.or(Some(read_track(file, head.end)?).filter(|track| track.id == track_id)),
            _ => {}
        }
        file.seek(SeekFrom::Start(head.end))?;
    }
    let found = found.filter(|track| movie_timescale > 0 && track.media_timescale > 0);
    Ok(found.map(|Track { media_timescale, edits, .. }| EditList {
        movie_timescale,
        media_timescale,
        edits,
        fragmented,
    }))
}

#[derive(Default)]
struct Track {
    id: u32,
    media_timescale: u32,
    edits: Vec<(u64, i64)>,
}

fn read_track(file: &mut (impl Read + Seek), limit: u64) -> io::Result<Track> {
    let mut track = Track::default();
    while let Some(head) = next_box(file, limit)? {
        match &head.name {
            b"tkhd" => {
                let long = read_u32(file)? >> 24 == 1;
                file.seek_relative(if long { 16 } else { 8 })?;
                track.id = read_u32(file)?;
            }
            // Their children are read as if they stood here.
            b"edts" | b"mdia" => continue,
            b"mdhd" => track.media_timescale = read_timescale(file)?,
            b"elst" => track.edits = read_edits(file, head.end)?,
            _ => {}
        }
        file.seek(SeekFrom::Start(head.end))?;
    }
    Ok(track)
}

/// The timescale of an `mvhd` or `mdhd` box, which both begin alike.
fn read_timescale(file: &mut (impl Read + Seek)) -> io::Result<u32> {
    let long = read_u32(file)? >> 24 == 1;
    file.seek_relative(if long { 16 } else { 8 })?;
    read_u32(file)
}

fn read_edits(file: &mut (impl Read + Seek), limit: u64) -> io::Result<Vec<(u64, i64)>> {
    let long = read_u32(file)? >> 24 == 1;
    let n_edits = u64::from(read_u32(file)?);
    let edit_bytes = if long { 20 } else { 12 };
    let room = limit.saturating_sub(file.stream_position()?) / edit_bytes;
    let mut edits = Vec::new();
    for _ in 0..n_edits.min(room) {
        let (duration, start) = match long {
            true => (read_u64(file)?, read_u64(file)? as i64),
            false => (u64::from(read_u32(file)?), i64::from(read_u32(file)? as i32)),
        };
        let _rate = read_u32(file)?;
        edits.push((duration, start));
    }
    Ok(edits)
}

fn read_u32(file: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    file.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn read_u64(file: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edit_list(edits: &[(u64, i64)]) -> EditList {
        EditList { movie_timescale: 1000, media_timescale: 44100, edits: edits.to_vec(), fragmented: false }
    }

    #[test]
    fn an_edit_skips_the_encoder_delay_and_ends_with_the_media() {
        // 1 s declared in milliseconds of a media of 1024 + 44,101 frames: the odd frame is kept.
        assert_eq!(edit_list(&[(1000, 1024)]).keep(44100, Some(45125)), Some(only(1024..45125)));
        assert_eq!(edit_list(&[(0, 2112)]).keep(44100, None), Some(only(2112..u64::MAX)));
        assert_eq!(edit_list(&[]).keep(44100, Some(5)), Some(only(0..5)));
        assert_eq!(edit_list(&[(500, -1), (100, 0)]).keep(44100, Some(44100)), Some(only(0..4410)));
    }

    #[test]
    fn edits_out_of_order_are_not_taken() {
        assert_eq!(edit_list(&[(100, 44100), (100, 0)]).keep(44100, None), None);
        assert_eq!(edit_list(&[(100, 44100)]).keep(44100, Some(1000)), None);
    }

    #[test]
    fn an_edit_list_is_found_in_its_track() {
        fn boxed(name: &[u8; 4], content: &[u8]) -> Vec<u8> {
            [&(content.len() as u32 + 8).to_be_bytes()[..], name, content].concat()
        }
        let timed = |scale: u32| [&[0; 12][..], &scale.to_be_bytes(), &[0; 8]].concat();
        let track = |id: u32, start: u32| {
            let tkhd = boxed(b"tkhd", &[&[0; 12][..], &id.to_be_bytes(), &[0; 64]].concat());
            let entry = [&1u32.to_be_bytes()[..], &700u32.to_be_bytes(), &start.to_be_bytes(), &[0, 1, 0, 0]].concat();
            let edts = boxed(b"edts", &boxed(b"elst", &[&[0; 4][..], &entry].concat()));
            boxed(b"trak", &[tkhd, edts, boxed(b"mdia", &boxed(b"mdhd", &timed(48000)))].concat())
        };
        let moov = boxed(b"moov", &[boxed(b"mvhd", &timed(600)), track(1, 11), track(2, 22)].concat());
        let mut file = io::Cursor::new([boxed(b"ftyp", b"M4A "), moov].concat());
        let expected =
            EditList { movie_timescale: 600, media_timescale: 48000, edits: vec![(700, 22)], fragmented: false };
        assert_eq!(EditList::read(&mut file, 2), Some(expected));
        assert_eq!(EditList::read(&mut file, 3), None);
        assert_eq!(EditList::read(&mut io::Cursor::new(b"RIFF"), 1), None);
    }

    #[test]
    fn the_itunes_comment_gives_delay_and_length() {
        let comment = " 00000000 00000840 000001CA 00000000000AC7F6 00000000";
        assert_eq!(keep_by_itunes_comment(comment), Some(only(0x840..0x840 + 0xac7f6)));
        assert_eq!(keep_by_itunes_comment("nonsense"), None);
    }

    #[test]
    fn only_kept_frames_remain_in_a_block() {
        let mut block: Vec<f32> = (0..20).map(|i| i as f32).collect();
        apply(&[0..101, 103..104, 108..u64::MAX], 100, 2, &mut block);
        assert_eq!(block, [0.0, 1.0, 6.0, 7.0, 16.0, 17.0, 18.0, 19.0]);
    }
}
