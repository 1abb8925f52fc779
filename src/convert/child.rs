//! A meta image that is built in a process of its own, within limits.
//!
//! A daemon builds the meta image of a plain image that its users named. Authors of layers decide how much memory and
//! time that takes: a tar of some megabytes can name ten million files. So the daemon starts itself again as a child that
//! has nothing but two pipes: it gets manifest, config and layers through one, and answers with the built image through
//! the other. The child limits itself before it reads the first byte: memory, open files, files at all, and its
//! share of the processors. What exceeds the memory ends the child, and is told with the figure; the daemon and its
//! devices go on.
//!
//! The parent reads the store, so that the child needs neither network nor credentials. It streams: a layer is never whole
//! in memory on either side. Blobs of the result go from the pipe into the store, which compares their digests.
//!
//! ```text
//! to the child      number: memory; text: media type; bytes: manifest; bytes: config
//!                   for each layer: pieces, then an empty one; a broken stream closes the pipe
//! from the child    0; number of layers, for each digest, number, bytes; bytes: config; text: media type; bytes: manifest
//!                   or 1; text: the error
//! ```
//!
//! All numbers are little-endian and of 8 bytes; bytes and texts follow their length.

use std::io::{self, BufReader, BufWriter, Cursor, Read, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use parking_lot::{Condvar, Mutex};
use rustix::process::{Resource, Rlimit, getpriority_process, setpriority_process, setrlimit};
use thiserror::Error;

use crate::image::{ConvertedImage, convert_image};
use crate::{ConvertOptions, KnownLayers, Silent};
use formats::oci::{Descriptor, Digest, Document, Manifest};
use registry::store::{ImageStore, Selector, StoreError, StoredManifest};
use source::failure::with_causes;
use source::{ByteSource, MemoryBudget, OverBudget, Reserved};

/// Argument of the program that makes it such a child. The command line does not list it.
pub const COMMAND: &str = "build-meta";

/// Share of the budget of images that one conversion may take: two fit beside each other as long as no image is open.
const SHARE: u64 = 2;

/// Most memory of one conversion, 4 GiB: more than any known image takes, and less than a large budget leaves.
const MOST_MEMORY: u64 = 4 << 30;

/// Open files of the child: three pipes, and what a thread's start takes.
const FILES: u64 = 32;

/// Priority of the child: a reader of a device gets nine times its share of a busy processor.
const NICE: i32 = 10;

/// Most bytes of a text from the child: an error with all its causes.
const LONGEST_TEXT: u64 = 64 << 10;

/// Most bytes of a manifest or config that goes through the pipes, 16 MiB: registries take manifests of 4.
const LONGEST_DOCUMENT: u64 = 16 << 20;

/// Most bytes of one layer of the result: as many as a store reads at once.
const LONGEST_LAYER: u64 = 1 << 30;

/// Bytes of a layer in one piece.
const PIECE: usize = 256 << 10;

/// Failure of a conversion in a child.
#[derive(Debug, Error)]
pub enum ChildError {
    /// There is no memory for it.
    #[error(transparent)]
    Budget(#[from] OverBudget),
    /// The image could not be read, or the result not written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The child cannot be started.
    #[error("Cannot start the process that builds it")]
    Start(#[source] io::Error),
    /// The child's own error.
    #[error("{0}")]
    Refused(String),
    /// It needs more memory than it may take.
    #[error(
        "Building it takes more than {memory} bytes of memory, which one conversion may take: raise \
         turbobd.memoryBudgetMB, or convert the image elsewhere by `turbobd convert`"
    )]
    Memory {
        /// The limit in bytes.
        memory: u64,
    },
    /// It ended without an answer.
    #[error("The process that builds it ended early ({status}): {said}")]
    Ended {
        /// Its end.
        status: ExitStatus,
        /// The last of what it wrote to stderr.
        said: String,
    },
}

/// How meta images are built for devices.
#[derive(Clone, Debug, Default)]
pub enum Builder {
    /// In this process, without limits: for the commands of a user.
    #[default]
    Here,
    /// In a child.
    Child(Arc<Program>),
}

/// The program that becomes a child, and the memory that all children may take.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    budget: MemoryBudget,
    /// Number of children.
    running: Mutex<usize>,
    ended: Condvar,
}

impl Program {
    /// The program at `path`, which takes [`COMMAND`]; the children's memory is part of `budget`.
    #[must_use]
    pub fn new(path: PathBuf, budget: MemoryBudget) -> Self {
        Self { path, budget, running: Mutex::default(), ended: Condvar::new() }
    }

    /// This program itself.
    #[must_use]
    pub fn itself(budget: MemoryBudget) -> Self {
        Self::new("/proc/self/exe".into(), budget)
    }

    /// Bytes that one conversion may take.
    #[must_use]
    pub fn memory(&self) -> u64 {
        (self.budget.limit() / SHARE).min(MOST_MEMORY)
    }

    /// Reserves the memory of a conversion; waits for it while others run.
    fn admit(&self) -> Result<Admitted<'_>, OverBudget> {
        let mut running = self.running.lock();
        loop {
            match self.budget.reserve(self.memory(), "A conversion") {
                Ok(part) => {
                    *running += 1;
                    return Ok(Admitted { program: self, part: Some(part) });
                }
                Err(error) if *running == 0 => return Err(error),
                Err(_) => self.ended.wait(&mut running),
            }
        }
    }
}

/// The place of a running conversion.
struct Admitted<'a> {
    program: &'a Program,
    part: Option<Reserved>,
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        let mut running = self.program.running.lock();
        self.part = None;
        *running -= 1;
        self.program.ended.notify_all();
    }
}

/// Options of the conversion for a device: the data lies beside the plain image, also after that is copied elsewhere.
#[must_use]
pub fn meta_options(options: &ConvertOptions) -> ConvertOptions {
    ConvertOptions {
        oci_types: true,
        referrer: true,
        origin: None,
        turbo: true,
        native: None,
        ..options.clone()
    }
}

/// A built manifest.
pub(crate) struct Built {
    pub(crate) media_type: String,
    pub(crate) bytes: Vec<u8>,
}

/// Builds the meta image of `plain`, an image of `from`, in a child, and adds its blobs to `into`. The manifest is only
/// returned.
pub(crate) fn build(
    program: &Program,
    from: &dyn ImageStore,
    plain: &StoredManifest,
    manifest: &Manifest,
    into: &dyn ImageStore,
) -> Result<Built, ChildError> {
    let admitted = program.admit()?;
    let memory = program.memory();
    let size = manifest.config.size;
    if size > LONGEST_DOCUMENT {
        let (store, digest) = (from.name().to_owned(), manifest.config.digest);
        return Err(StoreError::TooLarge { store, digest, size, limit: LONGEST_DOCUMENT }.into());
    }
    let _part = program.budget.reserve(size, "The config of the image")?;
    let config = from.read_blob(&manifest.config)?;
    let child = Command::new(&program.path)
        .arg(COMMAND)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = RunningChild(child.map_err(ChildError::Start)?);
    let lost = || ChildError::Start(io::Error::other("it has no pipes"));
    let stdin = child.0.stdin.take().ok_or_else(lost)?;
    let stdout = child.0.stdout.take().ok_or_else(lost)?;
    let stderr = child.0.stderr.take().ok_or_else(lost)?;
    let (answer, sent, said) = thread::scope(|scope| {
        let sender = scope.spawn(|| send(stdin, from, plain, manifest, &config, memory));
        let said = scope.spawn(move || {
            // The rest is dropped, so that the child does not wait for this pipe.
            let mut text = Vec::new();
            let mut stderr = stderr;
            let read = (&mut stderr).take(LONGEST_TEXT).read_to_end(&mut text);
            let _ = read.and_then(|_| io::copy(&mut stderr, &mut io::sink()));
            String::from_utf8_lossy(&text).trim().to_owned()
        });
        let answer = receive(BufReader::with_capacity(PIECE, stdout), into);
        let has_ended = |error: &Received| matches!(error, Received::Pipe(error) if error.kind() == io::ErrorKind::UnexpectedEof);
        if answer.as_ref().is_err_and(|error| !has_ended(error)) {
            let _ = child.0.kill(); // so that nothing waits for its pipes
        }
        (answer, sender.join(), said.join().unwrap_or_default())
    });
    let status = child.0.wait().map_err(ChildError::Start)?;
    drop(admitted);
    let refused = match answer {
        Ok(Ok(built)) => return Ok(built),
        Ok(Err(text)) => Ok(text),
        Err(error) => Err(error),
    };
    // A store that fails explains the child's failure.
    if let Ok(Err(error)) = sent {
        return Err(error.into());
    }
    match refused {
        Ok(text) => return Err(ChildError::Refused(text)),
        Err(Received::Store(error)) => return Err(error.into()),
        Err(Received::Pipe(error)) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(ChildError::Refused(
                "It answers with a layer that is too large".to_owned(),
            ));
        }
        Err(Received::Pipe(_)) => {}
    }
    // The kernel ends a process with SIGKILL when memory is short.
    if said.contains(OUT_OF_MEMORY) || status.signal() == Some(9) {
        return Err(ChildError::Memory { memory });
    }
    Err(ChildError::Ended { status, said })
}

/// What the allocator says before it ends a process that the system refuses memory.
const OUT_OF_MEMORY: &str = "memory allocation of";

/// A child, which does not outlive this value.
struct RunningChild(Child);

impl Drop for RunningChild {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends the image. A child that has ended is no error of the sender.
fn send(
    stdin: ChildStdin,
    from: &dyn ImageStore,
    plain: &StoredManifest,
    manifest: &Manifest,
    config: &[u8],
    memory: u64,
) -> Result<(), StoreError> {
    let mut pipe = BufWriter::with_capacity(PIECE, stdin);
    let mut head = || -> io::Result<()> {
        put_number(&mut pipe, memory)?;
        put_bytes(&mut pipe, plain.media_type.as_bytes())?;
        put_bytes(&mut pipe, &plain.bytes)?;
        put_bytes(&mut pipe, config)
    };
    if head().is_err() {
        return Ok(());
    }
    let mut piece = vec![0; PIECE];
    for layer in &manifest.layers {
        let mut blob = from.open_blob(layer)?;
        loop {
            let len = match blob.read(&mut piece) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(match error.downcast::<registry::RegistryError>() {
                        Ok(error) => error.into(),
                        Err(source) => StoreError::Broken {
                            store: from.name().to_owned(),
                            digest: layer.digest,
                            source,
                        },
                    });
                }
            };
            if put_bytes(&mut pipe, &piece[..len]).is_err() {
                return Ok(());
            }
            if len == 0 {
                break;
            }
        }
        if pipe.flush().is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Why there is no answer.
enum Received {
    Pipe(io::Error),
    Store(StoreError),
}

impl From<io::Error> for Received {
    fn from(error: io::Error) -> Self {
        Self::Pipe(error)
    }
}

/// Receives the answer, and adds its blobs to the store; the inner error is the child's text.
fn receive(
    pipe: impl Read + Send + 'static,
    into: &dyn ImageStore,
) -> Result<Result<Built, String>, Received> {
    let shared = Arc::new(Mutex::new(pipe));
    let count = {
        let mut pipe = shared.lock();
        if take_number(&mut *pipe)? != 0 {
            let text = take_bytes(&mut *pipe, LONGEST_TEXT)?;
            return Ok(Err(String::from_utf8_lossy(&text).into_owned()));
        }
        take_number(&mut *pipe)?
    };
    for _ in 0..count {
        let mut digest = [0; 32];
        shared.lock().read_exact(&mut digest)?;
        let size = take_number(&mut *shared.lock())?;
        if size > LONGEST_LAYER {
            return Err(io::Error::from(io::ErrorKind::InvalidData).into());
        }
        let (digest, left) = (Digest(digest), Arc::new(AtomicU64::new(size)));
        // The local store reads a blob once, or not at all if it has it. A second try finds the pipe empty.
        let mut open = || -> Result<Box<dyn Read + Send>, StoreError> {
            Ok(Box::new(Answered { pipe: shared.clone(), left: left.clone() }))
        };
        into.put_blob_from(&digest, size, &mut open).map_err(Received::Store)?;
        let mut rest = Answered { pipe: shared.clone(), left: left.clone() };
        io::copy(&mut rest, &mut io::sink())?;
    }
    let mut pipe = shared.lock();
    let config = take_bytes(&mut *pipe, LONGEST_DOCUMENT)?;
    into.put_blob(&config).map_err(Received::Store)?;
    let media_type = take_bytes(&mut *pipe, LONGEST_TEXT)?;
    let bytes = take_bytes(&mut *pipe, LONGEST_DOCUMENT)?;
    Ok(Ok(Built { media_type: String::from_utf8_lossy(&media_type).into_owned(), bytes }))
}

/// A layer of the answer, which can be read once.
struct Answered<P> {
    pipe: Arc<Mutex<P>>,
    /// Bytes of it that are still in the pipe.
    left: Arc<AtomicU64>,
}

impl<P: Read> Read for Answered<P> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.left.load(Ordering::Relaxed);
        let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(0);
        }
        let len = self.pipe.lock().read(&mut buf[..len])?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left.fetch_sub(len as u64, Ordering::Relaxed);
        Ok(len)
    }
}

/// The child: limits itself, builds the image that stdin describes, and answers on stdout.
///
/// # Errors
/// The failure of a pipe: then there is no parent to tell another error.
pub fn serve() -> io::Result<()> {
    let mut input = BufReader::with_capacity(PIECE, io::stdin());
    let memory = take_number(&mut input)?;
    limit_itself(memory)?;
    let mut output = BufWriter::with_capacity(PIECE, io::stdout().lock());
    match convert(input) {
        Ok(built) => answer(&mut output, &built)?,
        Err(text) => {
            put_number(&mut output, 1)?;
            let end = text.floor_char_boundary(LONGEST_TEXT as usize);
            put_bytes(&mut output, &text.as_bytes()[..end])?;
        }
    }
    output.flush()
}

/// Limits that hold from here on, whatever the image says.
fn limit_itself(memory: u64) -> io::Result<()> {
    let most = |value: u64| Rlimit { current: Some(value), maximum: Some(value) };
    // All writable private memory: the heap, stacks of threads, mappings. Code and shared pages do not count.
    setrlimit(Resource::Data, most(memory))?;
    setrlimit(Resource::Nofile, most(FILES))?;
    setrlimit(Resource::Fsize, most(0))?; // it writes to its pipes only
    setrlimit(Resource::Core, most(0))?;
    // A parent of even lower priority stays one: only the privileged may go up.
    if getpriority_process(None)? < NICE {
        setpriority_process(None, NICE)?;
    }
    // Where memory is short all the same, the kernel takes this process and not the parent, whose devices are in use.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    Ok(())
}

fn convert(mut input: BufReader<io::Stdin>) -> Result<ConvertedImage, String> {
    let mut head = || -> io::Result<(Vec<u8>, Vec<u8>, Vec<u8>)> {
        Ok((
            take_bytes(&mut input, LONGEST_TEXT)?,
            take_bytes(&mut input, LONGEST_DOCUMENT)?,
            take_bytes(&mut input, LONGEST_DOCUMENT)?,
        ))
    };
    let (media_type, bytes, config) = head().map_err(|error| error.to_string())?;
    let media_type = String::from_utf8_lossy(&media_type).into_owned();
    let config_digest = match Document::parse(&bytes, Some(&media_type)) {
        Ok(Document::Manifest(manifest)) => manifest.config.digest,
        _ => return Err("The manifest cannot be read".to_owned()),
    };
    let digest = Digest::of(&bytes);
    let stored = StoredManifest { media_type, digest, bytes };
    let store = Piped { config, config_digest, input: Arc::new(Mutex::new(input)) };
    let options = meta_options(&ConvertOptions::default());
    let known = KnownLayers::default();
    let built = convert_image(&store, &stored, &options, &known, &Silent);
    let built = built.map_err(|error| with_causes(&error))?.turbo;
    built.ok_or_else(|| "No image was built".to_owned())
}

fn answer(output: &mut impl Write, built: &ConvertedImage) -> io::Result<()> {
    put_number(output, 0)?;
    put_number(output, built.layers.len() as u64)?;
    for layer in &built.layers {
        let bytes = layer.bytes().ok_or_else(|| io::Error::other("a layer is not in memory"))?;
        output.write_all(&Digest::of(bytes).0)?;
        put_bytes(output, bytes)?;
    }
    put_bytes(output, &built.config)?;
    put_bytes(output, built.media_type.as_bytes())?;
    put_bytes(output, &built.manifest)
}

/// The image that comes through the pipe: its layers can be read once, in their order.
struct Piped {
    config: Vec<u8>,
    config_digest: Digest,
    input: Arc<Mutex<BufReader<io::Stdin>>>,
}

impl Piped {
    fn lacks(&self, what: &dyn ToString) -> StoreError {
        StoreError::NotFound { store: self.name().to_owned(), what: what.to_string() }
    }
}

impl ImageStore for Piped {
    fn name(&self) -> &'static str {
        "the image"
    }

    fn manifest(&self, _: &Selector) -> Result<StoredManifest, StoreError> {
        Err(self.lacks(&"manifest"))
    }

    fn open_blob(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>, StoreError> {
        if blob.digest == self.config_digest {
            return Ok(Box::new(Cursor::new(self.config.clone())));
        }
        Ok(Box::new(PipedBlob { input: self.input.clone(), left: 0, ended: false }))
    }

    fn blob_source(
        &self,
        digest: &Digest,
        _: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, StoreError> {
        Err(self.lacks(digest))
    }

    fn put_blob(&self, bytes: &[u8]) -> Result<(), StoreError> {
        Err(self.lacks(&Digest::of(bytes)))
    }

    fn put_blob_from(
        &self,
        digest: &Digest,
        _: u64,
        _: &mut dyn FnMut() -> Result<Box<dyn Read + Send>, StoreError>,
    ) -> Result<(), StoreError> {
        Err(self.lacks(digest))
    }

    fn has_blob(&self, _: &Digest, _: u64) -> Result<bool, StoreError> {
        Ok(false)
    }

    fn put_manifest(&self, _: Option<&str>, _: &str, bytes: &[u8]) -> Result<(), StoreError> {
        Err(self.lacks(&Digest::of(bytes)))
    }
}

/// A layer as it comes through the pipe.
struct PipedBlob {
    input: Arc<Mutex<BufReader<io::Stdin>>>,
    /// Bytes of the present piece that are left.
    left: u64,
    ended: bool,
}

impl Read for PipedBlob {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut input = self.input.lock();
        if self.left == 0 && !self.ended {
            self.left = take_number(&mut *input)?;
            self.ended = self.left == 0;
        }
        let len = buf.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(0);
        }
        let len = input.read(&mut buf[..len])?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= len as u64;
        Ok(len)
    }
}

fn put_number(pipe: &mut impl Write, number: u64) -> io::Result<()> {
    pipe.write_all(&number.to_le_bytes())
}

fn put_bytes(pipe: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    put_number(pipe, bytes.len() as u64)?;
    pipe.write_all(bytes)
}

fn take_number(pipe: &mut impl Read) -> io::Result<u64> {
    let mut number = [0; 8];
    pipe.read_exact(&mut number)?;
    Ok(u64::from_le_bytes(number))
}

/// Takes bytes of at most `most`; memory is taken as they arrive.
fn take_bytes(pipe: &mut impl Read, most: u64) -> io::Result<Vec<u8>> {
    let len = take_number(pipe)?;
    if len > most {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = Vec::new();
    if pipe.take(len).read_to_end(&mut bytes)? as u64 != len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}
