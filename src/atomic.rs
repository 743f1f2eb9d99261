//! Turns bytes into a file that appears under its name when it is whole, and not before.

use std::collections::BTreeSet;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::{NamedTempFile, TempDir};

/// Links from link to link that are followed at most, as the kernels of operating systems do.
const MOST_LINKS: usize = 40;

/// How the names of temporary files begin.
pub(crate) const PREFIX: &str = ".wavegen-";

/// The beginning of a file, in a temporary file beside its place; dropped, nothing remains.
pub struct Part {
    file: NamedTempFile,
    /// Its place.
    path: PathBuf,
    _listed: Listed,
}

impl Part {
    /// Begins the file `path` (a link: what it leads to), as readable as any new file of its owner.
    ///
    /// # Errors
    /// There is no such folder, or it cannot be written to; or the path is that of a folder or a device.
    pub fn beside(path: &Path) -> io::Result<Self> {
        let path = followed(path);
        let mut builder = tempfile::Builder::new();
        builder.prefix(PREFIX).suffix(".part");
        // Temporary files are private otherwise.
        #[cfg(unix)]
        builder.permissions(<std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666));
        // Asked first, since the library's own errors name the temporary file.
        let folder = folder_of(&path);
        folder.metadata()?;
        if path.exists() && !path.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        let file = builder.tempfile_in(folder).map_err(|error| io::Error::from(error.kind()))?;
        let _listed = Listed::new(file.path());
        Ok(Self { file, path, _listed })
    }

    /// Gives the file its name when all of it is on the disk; with `force` in the place of one that is there.
    ///
    /// # Errors
    /// The disk is full (which may show only here), or there is a file by that name ([`io::ErrorKind::AlreadyExists`]), which came into
    /// being meanwhile: then the temporary file stays, and the error names it.
    pub fn finish(self, force: bool) -> io::Result<()> {
        self.file.as_file().sync_all()?;
        let Self { file, path, _listed } = self;
        let named = if force { file.persist(path) } else { file.persist_noclobber(path) };
        named.map(drop).map_err(|failed| match failed.error.kind() {
            io::ErrorKind::AlreadyExists => match failed.file.keep() {
                Ok((_, kept)) => {
                    let why = format!("already exists now; what was to be there is in {}", kept.display());
                    io::Error::new(io::ErrorKind::AlreadyExists, why)
                }
                Err(failed) => failed.error,
            },
            _ => failed.error,
        })
    }
}

impl Write for Part {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Part {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Writes `bytes` as the file `path`: whatever happens meanwhile, it holds the old or the new content. One that is there is
/// replaced with `force` alone.
///
/// # Errors
/// As [`Part`]'s.
pub fn write_whole(path: &Path, bytes: &[u8], force: bool) -> io::Result<()> {
    let mut file = Part::beside(path)?;
    file.write_all(bytes)?;
    file.finish(force)
}

/// The folder that a file is in.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether two paths are those of one file, which need not be there yet.
pub fn is_same_file(a: &Path, b: &Path) -> bool {
    let place = |path: &Path| {
        let path = followed(path);
        folder_of(&path).canonicalize().ok().zip(path.file_name().map(ToOwned::to_owned))
    };
    place(a).is_some_and(|a| place(b) == Some(a))
}

/// A temporary folder; dropped, nothing remains.
pub struct Folder {
    folder: TempDir,
    _listed: Listed,
}

impl Folder {
    /// An empty one where the system keeps such.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new() -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("wavegen-").tempdir()?;
        let _listed = Listed::new(folder.path());
        Ok(Self { folder, _listed })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Where a path leads to that is a link, or a link to a link; there need be nothing yet.
fn followed(path: &Path) -> PathBuf {
    let mut path = path.to_path_buf();
    for _ in 0..MOST_LINKS {
        let Ok(target) = path.read_link() else { break };
        path = folder_of(&path).join(target);
    }
    path
}

/// Temporary files and folders that there are now.
static PARTS: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn parts() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    PARTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An entry among what [`remove_parts`] removes, until dropped.
#[derive(Debug)]
pub(crate) struct Listed(PathBuf);

impl Listed {
    pub(crate) fn new(path: &Path) -> Self {
        parts().insert(path.to_path_buf());
        Self(path.to_path_buf())
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        parts().remove(&self.0);
    }
}

/// Removes the temporary files and folders that there are: for a program that ends at once, in which nothing is dropped.
pub fn remove_parts() {
    for part in parts().iter() {
        // There is nobody left to be told.
        let _ = if part.is_dir() { std::fs::remove_dir_all(part) } else { std::fs::remove_file(part) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_removed_when_the_program_ends_at_once_and_whole_files_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("whole");
        write_whole(&path, b"old", false).unwrap();
        let refused = write_whole(&path, b"new", false).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert!(refused.to_string().contains(".wavegen-"), "{refused}");
        let part = Part::beside(&folder.path().join("part")).unwrap();
        let temporary = part.file.path().to_path_buf();
        assert!(parts().contains(&temporary) && temporary.exists());
        // As `remove_parts` does; other tests have parts too.
        std::fs::remove_file(&temporary).unwrap();
        drop(part);
        assert!(!parts().contains(&temporary));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }

    #[cfg(unix)]
    #[test]
    fn what_a_link_leads_to_is_written_and_the_link_stays() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("far")).unwrap();
        symlink("far/file", at("link")).unwrap();
        symlink("link", at("link of a link")).unwrap();
        symlink("round", at("round")).unwrap();
        for content in [b"one", b"two"] {
            write_whole(&at("link of a link"), content, true).unwrap();
            assert_eq!(std::fs::read(at("far/file")).unwrap(), content);
        }
        assert!(at("link").is_symlink() && at("link of a link").is_symlink());
        write_whole(&at("round"), b"a link to itself leads nowhere", true).unwrap();
    }
}
