//! Directories that an administrator mapped, opened part by part without following links: whatever lies in one, and
//! whatever somebody puts there while it is read, nothing outside of it is reached.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use object_store::path::Path;
use rustix::fs::{Dir, Mode, OFlags, open, openat};
use tokio_util::io::ReaderStream;

use super::Object;
use super::error::{Error, Kind};

/// Deeper ones are somebody's mistake.
const MAX_DEPTH: usize = 32;
const CHUNK_BYTES: usize = 256 << 10;

/// One of them.
#[derive(Clone, Debug)]
pub(super) struct MappedDirectory(PathBuf);

impl MappedDirectory {
    pub(super) fn new(root: PathBuf) -> Self {
        Self(root)
    }

    pub(super) async fn head(&self, path: &Path) -> io::Result<Object> {
        let (root, path) = (self.0.clone(), path.clone());
        blocking(move || object(&open_file(&root, &path)?, path)).await
    }

    pub(super) async fn list(&self, prefix: &Path, most: usize) -> io::Result<Vec<Object>> {
        let (root, prefix) = (self.0.clone(), prefix.clone());
        blocking(move || {
            let mut found = Vec::new();
            walk(&open_directory(&root, &prefix)?, &prefix, most, 0, &mut found)?;
            Ok(found)
        })
        .await
    }

    pub(super) async fn read(
        &self,
        path: &Path,
        from: u64,
    ) -> io::Result<(Object, impl Stream<Item = io::Result<Bytes>> + Send + use<>)> {
        let (root, path) = (self.0.clone(), path.clone());
        let (object, file) = blocking(move || {
            let mut file = open_file(&root, &path)?;
            let object = object(&file, path)?;
            file.seek(SeekFrom::Start(from))?;
            Ok((object, file))
        })
        .await?;
        Ok((object, ReaderStream::with_capacity(tokio::fs::File::from_std(file), CHUNK_BYTES).boxed()))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn directory_below(at: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?)
}

/// The root may be a link: the administrator's.
fn open_directory(root: &std::path::Path, path: &Path) -> io::Result<OwnedFd> {
    let mut at = open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for part in path.parts() {
        at = directory_below(&at, OsStr::new(part.as_ref()))?;
    }
    Ok(at)
}

fn open_file(root: &std::path::Path, path: &Path) -> io::Result<File> {
    let parts: Vec<_> = path.parts().map(|part| part.as_ref().to_owned()).collect();
    let Some((name, directories)) = parts.split_last() else {
        return Err(io::Error::from(io::ErrorKind::IsADirectory));
    };
    file_below(open_directory(root, &directories.iter().map(String::as_str).collect())?, OsStr::new(name))
}

fn file_below(at: impl AsFd, name: &OsStr) -> io::Result<File> {
    // Not blocking: a pipe that nobody writes to would hold a thread for ever.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(openat(at, name, flags, Mode::empty())?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::from(io::ErrorKind::IsADirectory)) }
}

fn object(file: &File, path: Path) -> io::Result<Object> {
    let meta = file.metadata()?;
    let version = format!("{}-{}.{:09}-{}", meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size());
    Ok(Object { path, size: meta.size(), version })
}

fn walk(at: &OwnedFd, path: &Path, most: usize, depth: usize, found: &mut Vec<Object>) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::from(io::ErrorKind::NotADirectory));
    }
    for entry in Dir::read_from(at)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let text = name.to_str().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidFilename))?;
        let path = path.clone().join(text);
        match directory_below(at, name) {
            Ok(below) => walk(&below, &path, most, depth + 1, found)?,
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NOTDIR.raw_os_error()) => {
                found.push(object(&file_below(at, name)?, path)?);
            }
            Err(e) => return Err(e),
        }
        if found.len() > most {
            return Ok(());
        }
    }
    Ok(())
}

/// What to say of it.
pub(super) fn error(error: &io::Error, uri: &str) -> Error {
    let link = error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
    match error.kind() {
        io::ErrorKind::NotFound => Error::new(
            Kind::NotFound,
            format!("{uri} does not exist: put the file there, or correct the URI"),
        ),
        io::ErrorKind::PermissionDenied => Error::new(
            Kind::Denied,
            format!("the operator may not read {uri}: an administrator has to allow its user to"),
        ),
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory | io::ErrorKind::InvalidFilename => {
            Error::new(Kind::Invalid, not_a_file(uri))
        }
        _ if link => Error::new(Kind::Invalid, not_a_file(uri)),
        kind => Error::new(Kind::Unavailable, format!("{uri} can't be read ({kind}); it is tried again")),
    }
}

fn not_a_file(uri: &str) -> String {
    format!(
        "{uri} is, or passes through, something that is neither a file nor a directory: symbolic links are not followed; \
         put the file itself there"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn below(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join("root").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    fn mapped(dir: &tempfile::TempDir) -> MappedDirectory {
        MappedDirectory::new(dir.path().join("root"))
    }

    #[tokio::test]
    async fn files_are_found_read_from_the_middle_and_told_from_their_successors() {
        let dir = below(&[("a/in.jsonl", "0123456789"), ("a/b/x", "x"), ("c", "c")]);
        let mapped = mapped(&dir);
        let path = Path::from("a/in.jsonl");
        let before = mapped.head(&path).await.unwrap();
        assert_eq!(before.size, 10);
        let (seen, stream) = mapped.read(&path, 7).await.unwrap();
        let read: Vec<Bytes> = stream.map(Result::unwrap).collect().await;
        assert_eq!((seen, read.concat()), (before.clone(), b"789".to_vec()));
        let names = |found: Vec<Object>| {
            let mut names: Vec<_> = found.into_iter().map(|o| o.path.to_string()).collect();
            names.sort();
            names
        };
        assert_eq!(names(mapped.list(&Path::from("a"), 9).await.unwrap()), ["a/b/x", "a/in.jsonl"]);
        assert_eq!(names(mapped.list(&Path::ROOT, 9).await.unwrap()).len(), 3);
        std::fs::write(dir.path().join("root/a/new"), "0123456789").unwrap();
        std::fs::rename(dir.path().join("root/a/new"), dir.path().join("root/a/in.jsonl")).unwrap();
        assert_ne!(mapped.head(&path).await.unwrap().version, before.version);
    }

    #[tokio::test]
    async fn links_lead_nowhere() {
        let dir = below(&[("real/x", "x")]);
        let root = dir.path().join("root");
        std::fs::write(dir.path().join("secret"), "s").unwrap();
        symlink(dir.path().join("secret"), root.join("link")).unwrap();
        symlink(dir.path(), root.join("up")).unwrap();
        symlink("real", root.join("within")).unwrap();
        let mapped = mapped(&dir);
        for path in ["link", "up/secret", "within/x", "real"] {
            let e = mapped.head(&Path::from(path)).await.unwrap_err();
            let told = error(&e, "file://data/x");
            assert_eq!(told.kind, Kind::Invalid, "{path}: {e} {told}");
            assert!(mapped.read(&Path::from(path), 0).await.is_err());
        }
        // A listing that leaves them out would leave requests out.
        assert!(mapped.list(&Path::ROOT, 9).await.is_err());
        assert_eq!(mapped.list(&Path::from("real"), 9).await.unwrap().len(), 1);
        assert!(mapped.list(&Path::from("up"), 9).await.is_err());
        let missing = error(&mapped.head(&Path::from("nope")).await.unwrap_err(), "file://data/nope");
        assert_eq!(missing.kind, Kind::NotFound);
    }

    #[tokio::test]
    async fn a_pipe_holds_nobody_up() {
        let dir = below(&[("x", "x")]);
        let pipe = dir.path().join("root/pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert!(mapped(&dir).head(&Path::from("pipe")).await.is_err());
    }
}
