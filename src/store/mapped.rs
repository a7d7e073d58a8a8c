//! Directories that an administrator mapped, opened part by part without following links: whatever lies in one, and
//! whatever somebody puts there while it is read, nothing outside of it is reached.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use object_store::path::Path;
use rand::RngExt as _;
use rustix::fs::{AtFlags, Dir, Mode, OFlags, linkat, mkdirat, open, openat, renameat, unlinkat};
use rustix::io::Errno;
use tokio_util::io::ReaderStream;

use super::Object;
use super::error::{Error, Kind, Purpose};

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

/// A file that is being written, under a name that nobody looks for.
pub(super) struct Draft {
    directory: OwnedFd,
    file: Option<File>,
    hidden: String,
    name: String,
}

impl Draft {
    pub(super) async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        let mut file = self.file.take().ok_or(io::ErrorKind::NotFound)?;
        let file = blocking(move || file.write_all(&bytes).map(|()| file)).await?;
        self.file = Some(file);
        Ok(())
    }

    /// Now it has its name.
    pub(super) async fn finish(self) -> io::Result<()> {
        blocking(move || self.publish()).await
    }

    fn publish(self) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.sync_all()?;
        }
        renameat(&self.directory, &self.hidden, &self.directory, &self.name)?;
        Ok(())
    }

    /// The same, unless something has that name already.
    fn publish_first(self) -> io::Result<bool> {
        if let Some(file) = &self.file {
            file.sync_all()?;
        }
        match linkat(&self.directory, &self.hidden, &self.directory, &self.name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Gone already, if it has its name.
        let _ = unlinkat(&self.directory, &self.hidden, AtFlags::empty());
    }
}

impl MappedDirectory {
    /// The whole file and its version; `None` if it has more than `limit` bytes.
    pub(super) async fn fetch(&self, path: &Path, limit: u64) -> io::Result<Option<(Bytes, String)>> {
        let (root, path) = (self.0.clone(), path.clone());
        blocking(move || {
            let mut file = open_file(&root, &path)?;
            let object = object(&file, path)?;
            if object.size > limit {
                return Ok(None);
            }
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(Some((bytes.into(), object.version)))
        })
        .await
    }

    /// Writes a file if there is none, or if it is the one that is expected. Whether it was written.
    pub(super) async fn put(
        &self,
        path: &Path,
        content: Bytes,
        expected: Option<String>,
    ) -> io::Result<bool> {
        let (root, path) = (self.0.clone(), path.clone());
        blocking(move || {
            let mut draft = begin(&root, &path)?;
            if let Some(file) = &mut draft.file {
                file.write_all(&content)?;
            }
            let Some(expected) = expected else { return draft.publish_first() };
            let there = file_below(&draft.directory, OsStr::new(&draft.name))
                .and_then(|file| object(&file, path).map(|object| object.version));
            match there {
                Ok(version) if version == expected => draft.publish().map(|()| true),
                Ok(_) => Ok(false),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
                Err(e) => Err(e),
            }
        })
        .await
    }

    pub(super) async fn draft(&self, path: &Path) -> io::Result<Draft> {
        let (root, path) = (self.0.clone(), path.clone());
        blocking(move || begin(&root, &path)).await
    }

    pub(super) async fn delete(&self, path: &Path) -> io::Result<()> {
        let (root, path) = (self.0.clone(), path.clone());
        blocking(move || {
            let (directories, name) = split(&path)?;
            Ok(unlinkat(open_directory(&root, &directories)?, &name, AtFlags::empty())?)
        })
        .await
    }
}

/// Directories that are missing are made, and no link is followed.
fn begin(root: &std::path::Path, path: &Path) -> io::Result<Draft> {
    let (directories, name) = split(path)?;
    let mut directory = open_directory(root, &Path::ROOT)?;
    for part in directories.parts() {
        let part = OsStr::new(part.as_ref());
        match mkdirat(&directory, part, Mode::from_raw_mode(0o750)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        directory = directory_below(&directory, part)?;
    }
    let hidden = format!(".{:016x}.part", rand::rng().random::<u64>());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(openat(&directory, &hidden, flags, Mode::from_raw_mode(0o640))?);
    Ok(Draft { directory, file: Some(file), hidden, name })
}

fn split(path: &Path) -> io::Result<(Path, String)> {
    let parts: Vec<_> = path.parts().map(|part| part.as_ref().to_owned()).collect();
    let Some((name, directories)) = parts.split_last() else {
        return Err(io::Error::from(io::ErrorKind::IsADirectory));
    };
    Ok((directories.iter().map(String::as_str).collect(), name.clone()))
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
    let (directories, name) = split(path)?;
    file_below(open_directory(root, &directories)?, OsStr::new(&name))
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
pub(super) fn error(error: &io::Error, uri: &str, purpose: Purpose) -> Error {
    let link = error.raw_os_error() == Some(Errno::LOOP.raw_os_error());
    let writes = purpose == Purpose::Write;
    let (may_not, cannot) = if writes { ("write", "written") } else { ("read", "read") };
    match error.kind() {
        io::ErrorKind::NotFound if writes => Error::new(
            Kind::NotFound,
            format!("the directory of {uri} does not exist: an administrator has to see to that"),
        ),
        io::ErrorKind::NotFound => Error::new(
            Kind::NotFound,
            format!("{uri} does not exist: put the file there, or correct the URI"),
        ),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Error::new(
            Kind::Denied,
            format!("the operator may not {may_not} {uri}: an administrator has to allow its user to"),
        ),
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory | io::ErrorKind::InvalidFilename => {
            Error::new(Kind::Invalid, not_a_file(uri))
        }
        _ if link => Error::new(Kind::Invalid, not_a_file(uri)),
        kind => Error::new(Kind::Unavailable, format!("{uri} can't be {cannot} ({kind}); it is tried again")),
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
            let told = error(&e, "file://data/x", Purpose::Read);
            assert_eq!(told.kind, Kind::Invalid, "{path}: {e} {told}");
            assert!(mapped.read(&Path::from(path), 0).await.is_err());
        }
        // A listing that leaves them out would leave requests out.
        assert!(mapped.list(&Path::ROOT, 9).await.is_err());
        assert_eq!(mapped.list(&Path::from("real"), 9).await.unwrap().len(), 1);
        assert!(mapped.list(&Path::from("up"), 9).await.is_err());
        let gone = mapped.head(&Path::from("nope")).await.unwrap_err();
        let missing = error(&gone, "file://data/nope", Purpose::Read);
        assert_eq!(missing.kind, Kind::NotFound);
    }

    #[tokio::test]
    async fn files_are_written_whole_or_not_at_all() {
        let dir = below(&[("x", "x")]);
        let root = dir.path().join("root");
        let mapped = mapped(&dir);
        let path = Path::from("new/deep/out.jsonl");
        let mut draft = mapped.draft(&path).await.unwrap();
        draft.write("half".into()).await.unwrap();
        assert!(mapped.head(&path).await.is_err(), "nobody sees half a file");
        drop(draft);
        assert_eq!(std::fs::read_dir(root.join("new/deep")).unwrap().count(), 0, "nothing is left of it");
        let mut draft = mapped.draft(&path).await.unwrap();
        for part in ["a", "b"] {
            draft.write(part.into()).await.unwrap();
        }
        draft.finish().await.unwrap();
        assert_eq!(std::fs::read_to_string(root.join("new/deep/out.jsonl")).unwrap(), "ab");
        assert_eq!(std::fs::read_dir(root.join("new/deep")).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn what_is_there_is_replaced_only_if_it_is_what_was_seen() {
        let dir = below(&[("x", "x")]);
        let mapped = mapped(&dir);
        let path = Path::from("manifest.json");
        assert!(mapped.put(&path, "1".into(), None).await.unwrap());
        assert!(!mapped.put(&path, "2".into(), None).await.unwrap());
        let (_, version) = mapped.fetch(&path, 9).await.unwrap().unwrap();
        assert!(mapped.put(&path, "33".into(), Some(version.clone())).await.unwrap());
        assert!(!mapped.put(&path, "4".into(), Some(version)).await.unwrap());
        assert_eq!(mapped.fetch(&path, 9).await.unwrap().unwrap().0, "33");
        assert!(mapped.fetch(&path, 1).await.unwrap().is_none(), "too large");
        mapped.delete(&path).await.unwrap();
        assert!(mapped.fetch(&path, 9).await.is_err());
        assert_eq!(std::fs::read_dir(dir.path().join("root")).unwrap().count(), 1, "no drafts are left");
    }

    #[tokio::test]
    async fn nothing_is_written_through_a_link() {
        let dir = below(&[("x", "x")]);
        let root = dir.path().join("root");
        symlink(dir.path(), root.join("up")).unwrap();
        symlink(dir.path().join("target"), root.join("link")).unwrap();
        let mapped = mapped(&dir);
        assert!(mapped.put(&Path::from("up/y"), "1".into(), None).await.is_err());
        assert!(mapped.draft(&Path::from("up/deep/y")).await.is_err());
        assert!(!mapped.put(&Path::from("link"), "1".into(), None).await.unwrap());
        mapped.draft(&Path::from("link")).await.unwrap().finish().await.unwrap();
        assert!(!dir.path().join("target").exists() && !dir.path().join("deep").exists());
    }

    #[tokio::test]
    async fn a_pipe_holds_nobody_up() {
        let dir = below(&[("x", "x")]);
        let pipe = dir.path().join("root/pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert!(mapped(&dir).head(&Path::from("pipe")).await.is_err());
    }
}
