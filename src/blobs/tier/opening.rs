//! Opening a directory: exclusively, on a suitable filesystem, with its present contents.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use super::presence::Map;
use super::state::{FileState, TierShared, file_name, map_bytes};
use super::store::{DirStore, Store as _, StoredFile};
use super::{TierError, TierKind, in_pages};

/// Longest map that is read, 1 GiB: 32 million records.
const MOST_MAP: u64 = 1 << 30;

/// Creates the directory and takes its lock, which holds until the file is closed.
pub(super) fn lock(kind: TierKind, dir: &Path) -> Result<File, TierError> {
    let io = |what| move |source| TierError::Io { what, dir: dir.to_owned(), source };
    sys::private::folder(dir).map_err(io("use"))?;
    let path = dir.join(format!("turbobd.{}.lock", kind.name()));
    let options = OpenOptions::new().write(true).create(true).truncate(false).clone();
    let file = sys::private::open(&path, &options);
    let file = file.map_err(io("write to"))?;
    if !sys::flock::exclusive(&file, sys::flock::MOMENT).map_err(io("lock"))? {
        return Err(TierError::InUse { kind: kind.name(), dir: dir.to_owned() });
    }
    Ok(file)
}

/// Refuses a directory on this process's own device: a write there would wait for a read that waits for the
/// write.
pub(super) fn refuse_own_device(dir: &Path) -> Result<(), TierError> {
    let io = |source| TierError::Io { what: "look at", dir: dir.to_owned(), source };
    let dev = std::fs::metadata(dir).map_err(io)?.dev();
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    let own = |device: String| TierError::OwnDevice { dir: dir.to_owned(), device };
    let place = Path::new("/sys/dev/block").join(format!("{major}:{minor}"));
    if let Ok(target) = std::fs::read_link(&place) {
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("ublkb") {
            return Err(own(format!("/dev/{name}")));
        }
        // A loop device over this process's FUSE file.
        let backing = std::fs::read_to_string(place.join("loop/backing_file")).unwrap_or_default();
        if !backing.is_empty() && on_our_fuse(Path::new(backing.trim())) {
            return Err(own(format!("/dev/{name}")));
        }
    }
    if on_our_fuse(dir) {
        return Err(own("a FUSE file".to_owned()));
    }
    Ok(())
}

/// True if the mount that holds `path` belongs to this process's FUSE server.
fn on_our_fuse(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let holder = mounts
        .lines()
        .filter_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let at = mount.split(' ').nth(4)?;
            path.starts_with(at).then_some((at.len(), kind))
        })
        .max_by_key(|(len, _)| *len);
    holder.is_some_and(|(_, kind)| kind.starts_with("fuse.turbobd "))
}

/// Tests that the filesystem can free a part of a file.
pub(super) fn probe_holes(kind: TierKind, dir: &Path) -> Result<(), TierError> {
    let store = DirStore::new(dir);
    let name = format!("turbobd.{}.probe", kind.name());
    let io = |source| TierError::Io { what: "write to", dir: dir.to_owned(), source };
    let file = store.open(&name).map_err(io)?;
    file.set_len(2 * super::PAGE).map_err(io)?;
    let punched = file.punch(0, super::PAGE);
    store.remove(&name).map_err(io)?;
    punched.map_err(|source| TierError::NoHoles { dir: dir.to_owned(), source })
}

/// Finds the present files and their contents. An incomplete pair of files is removed; a file of another
/// program is left alone.
pub(super) fn read_directory(shared: &Arc<TierShared>) -> io::Result<()> {
    let names: BTreeSet<String> = shared.store.names()?.into_iter().collect();
    let ending = |what: &str| format!(".{}.{what}", shared.kind.name());
    let (map, data, new) = (ending("map"), ending("data"), ending("map.new"));
    for name in &names {
        if let Some(stem) = name.strip_suffix(&map) {
            let stem = format!("{stem}.{}", shared.kind.name());
            let whole = names.contains(&format!("{stem}.data")) && read_file(shared, &stem)?;
            if !whole {
                shared.counters.resets.add(1);
                tracing::warn!("The cache file {stem} is unusable and removed");
                shared.store.remove(name)?;
                shared.store.remove(&format!("{stem}.data"))?;
            }
        } else if name.ends_with(&new)
            || name.strip_suffix(&data).is_some_and(|stem| !names.contains(&format!("{stem}{map}")))
        {
            shared.store.remove(name)?;
        }
    }
    Ok(())
}

/// Reads one pair of files; false when it is unusable.
fn read_file(shared: &Arc<TierShared>, stem: &str) -> io::Result<bool> {
    let file = shared.store.open(&format!("{stem}.map"))?;
    let len = file.len()?;
    if len > MOST_MAP {
        return Ok(false);
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0)?;
    let Some(Map { subject, seed, mut present, records }) = Map::parse(&bytes) else {
        return Ok(false);
    };
    if subject.kind != shared.kind || file_name(&subject) != stem {
        return Ok(false);
    }
    let mut state = FileState::new(stem.to_owned(), subject, seed);
    let data = shared.store.open(&state.data_name())?;
    let end = data.len()?;
    // The file was truncated, or never grew: chunks past its end are missing.
    present.retain(|_, extent| extent.at.saturating_add(extent.len.into()) <= end);
    let pages: u64 = present.values().map(|extent| in_pages(extent.len.into())).sum();
    if data.allocated()? > pages {
        free_gaps(&*data, end, &present)?;
    }
    state.records = Some(records);
    state.extra = extra(&*data, pages)? + extra(&*file, map_bytes(records))?;
    let mut all = shared.lock();
    let number = all.add(state);
    all.used += pages;
    let mut present: Vec<_> = present.into_iter().collect();
    present.sort_unstable_by_key(|(chunk, _)| *chunk);
    for (chunk, extent) in present {
        all.publish(number, chunk, extent, true);
    }
    Ok(true)
}

/// Bytes that a file takes beyond its `bytes`: blocks of the filesystem's own metadata.
pub(super) fn extra(file: &dyn StoredFile, bytes: u64) -> io::Result<u64> {
    Ok(file.allocated()?.saturating_sub(bytes))
}

/// Frees space without a record: writes that a crash interrupted.
fn free_gaps(
    data: &dyn StoredFile,
    end: u64,
    present: &std::collections::HashMap<u32, super::presence::ChunkExtent>,
) -> io::Result<()> {
    let mut extents: Vec<_> =
        present.values().map(|e| (e.at, e.at + in_pages(e.len.into()))).collect();
    extents.sort_unstable();
    extents.push((in_pages(end), in_pages(end)));
    let mut at = 0;
    for (first, last) in extents {
        if first > at {
            data.punch(at, first - at)?;
        }
        at = at.max(last);
    }
    Ok(())
}
