//! Which MIDI files are rendered: found in folders, named, split by composition.
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::random::hash;

/// One MIDI file.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub path: PathBuf,
    /// Its path below the folder it was found in, with `_` between the parts: the stem of the output's name.
    pub name: String,
    /// What it is a part or a version of: the unit of the split.
    pub composition: String,
}

/// Which side of the split is rendered.
#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
pub enum Part {
    All,
    Train,
    Heldout,
}

/// The MIDI files among `inputs` and in the folders among them, by name.
///
/// # Errors
/// A path that is not there or cannot be read.
pub fn find(inputs: &[PathBuf]) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    for input in inputs {
        if input.is_dir() {
            let mut paths = Vec::new();
            walk(input, &mut paths)?;
            pieces.extend(
                paths.into_iter().map(|path| Piece::new(path.clone(), path.strip_prefix(input).unwrap_or(&path))),
            );
        } else {
            std::fs::metadata(input).with_context(|| format!("reading {}", input.display()))?;
            let name = input.file_name().map(PathBuf::from).unwrap_or_default();
            pieces.push(Piece::new(input.clone(), &name));
        }
    }
    pieces.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
    // Two files of one name: the later ones get a number.
    let mut seen: HashMap<String, usize> = HashMap::new();
    for piece in &mut pieces {
        let count = seen.entry(piece.name.clone()).or_default();
        *count += 1;
        if *count > 1 {
            piece.name = format!("{}-{count}", piece.name);
        }
    }
    Ok(pieces)
}

fn walk(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
        if path.is_dir() {
            walk(&path, paths)?;
        } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("mid") || e.eq_ignore_ascii_case("midi")) {
            paths.push(path);
        }
    }
    Ok(())
}

impl Piece {
    fn new(path: PathBuf, below: &Path) -> Self {
        let below = below.with_extension("");
        let mut parts: Vec<String> = below.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        parts.dedup();
        // Collections sort by composer, then opus; a flat folder says in the name which movement it is.
        let composition = match parts.as_slice() {
            [composer, opus, ..] => format!("{composer}_{opus}"),
            _ => without_movement(&parts.concat()).to_owned(),
        };
        Self { path, name: parts.join("_"), composition }
    }

    /// The share of compositions, in [0, 100), below which this one falls under a seed.
    pub fn percentile(&self, seed: u64) -> f64 {
        (hash(&format!("{seed}/{}", self.composition)) >> 11) as f64 / (1u64 << 53) as f64 * 100.0
    }

    /// Order in which a limited number of pieces is chosen under a seed.
    pub fn lot(&self, seed: u64) -> u64 {
        hash(&format!("{seed}:{}", self.name))
    }
}

/// `Sonata_No_2_abc_cut_mov_1` without `_cut_mov_1`.
fn without_movement(name: &str) -> &str {
    let mut name = name;
    loop {
        let numberless = name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('_');
        let ends = ["_mov", "_no", "_part", "_cut", "_midi", "_a", "_b"];
        let Some(shorter) = ends.iter().find_map(|end| numberless.strip_suffix(end)) else { return name };
        name = shorter;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn composition(below: &str) -> String {
        Piece::new(PathBuf::new(), Path::new(below)).composition
    }

    #[test]
    fn movements_share_a_composition() {
        assert_eq!(composition("Sonata_No_2_abc_cut_mov_1.mid"), "Sonata_No_2_abc");
        assert_eq!(composition("Sonata_No_2_abc_mov_12.mid"), "Sonata_No_2_abc");
        assert_eq!(composition("Fugue_BWV862_gCL5_a.mid"), "Fugue_BWV862_gCL5");
        assert_eq!(composition("Don_Juan_S418_part1.mid"), "Don_Juan_S418");
        assert_eq!(composition("Toccata_Op_7.mid"), "Toccata_Op_7");
        assert_eq!(composition("BachJS/BWV816/suite/gigue.midi"), "BachJS_BWV816");
        assert_eq!(composition("JoplinS/search/search.midi"), "JoplinS_search");
    }

    #[test]
    fn names_say_where_a_file_was_found_and_are_unique() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a/b/b.mid", "a_b.mid", "a/c.MIDI", "notes.txt"] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, b"").unwrap();
        }
        let pieces = find(&[folder.path().to_owned()]).unwrap();
        let names: Vec<_> = pieces.iter().map(|piece| piece.name.as_str()).collect();
        assert_eq!(names, ["a_b", "a_b-2", "a_c"]);
    }
}
