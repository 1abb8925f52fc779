//! A cgroup for everything that a run starts.
//!
//! It gives the CPU time of all processes, also of those that have ended, and the list of those that live. Version 1
//! (`cpuacct`) and version 2 have both; no controller is needed in version 2. The containers get a cgroup beside the
//! system's programs, because version 2 allows no processes in a cgroup that has controllers below it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::failure::{Attempt as _, Failure};

/// Name of the cgroup of all runs.
const ROOT: &str = "turbobd-sat";

/// Where the cgroup file systems are.
const MOUNTED: &str = "/sys/fs/cgroup";

/// The cgroup of one run.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    dir: PathBuf,
}

/// Folder of the cgroup of all runs: in version 2, or in the hierarchy of version 1 that counts CPU time.
fn root() -> PathBuf {
    let mounted = Path::new(MOUNTED);
    if mounted.join("cgroup.controllers").exists() {
        return mounted.join(ROOT);
    }
    mounted.join("cpuacct").join(ROOT)
}

impl Group {
    /// An empty cgroup for a run.
    pub(crate) fn new() -> Result<Self, Failure> {
        kill_all(Duration::from_secs(10))?;
        let dir = root();
        let system = dir.join("system");
        fs::create_dir_all(&system)
            .attempt(|| format!("make the cgroup {} (root is needed)", system.display()))?;
        Ok(Self { dir })
    }

    /// The file that takes the processes of the system's programs.
    pub(crate) fn processes_file(&self) -> PathBuf {
        self.dir.join("system/cgroup.procs")
    }

    /// The cgroup of a container, as `ctr run --cgroup` takes it.
    pub(crate) fn container(number: u32) -> String {
        format!("/{ROOT}/container-{number}")
    }

    /// The CPU time of everything that ran in it.
    pub(crate) fn processor(&self) -> Result<Duration, Failure> {
        let one = self.dir.join("cpuacct.usage");
        if one.exists() {
            let text = fs::read_to_string(&one).attempt(|| "read the CPU time of a run".into())?;
            let nanoseconds = text.trim().parse().attempt(|| format!("understand {text:?}"))?;
            return Ok(Duration::from_nanos(nanoseconds));
        }
        let text = fs::read_to_string(self.dir.join("cpu.stat"))
            .attempt(|| "read the CPU time of a run".into())?;
        let used = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        let used = used.and_then(|used| used.trim().parse().ok());
        used.map(Duration::from_micros)
            .ok_or_else(|| Failure::cannot("read the CPU time of a run", "cpu.stat has none"))
    }

    /// Living processes of the system's programs.
    pub(crate) fn programs(&self) -> Vec<u32> {
        processes(&self.dir.join("system"))
    }
}

/// Processes of a cgroup, without those of the cgroups below.
fn processes(dir: &Path) -> Vec<u32> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.trim().parse().ok()).collect()
}

/// Ends all processes of all runs, in all hierarchies, and removes their cgroups.
pub(crate) fn kill_all(limit: Duration) -> Result<(), Failure> {
    let mut roots = vec![Path::new(MOUNTED).join(ROOT)];
    // runc makes the container's cgroup in each hierarchy of version 1.
    let hierarchies = fs::read_dir(MOUNTED).into_iter().flatten().flatten();
    roots.extend(hierarchies.map(|entry| entry.path().join(ROOT)));
    let start = Instant::now();
    for root in roots.iter().filter(|root| root.is_dir()) {
        while !emptied(root) {
            if start.elapsed() > limit {
                return Err(Failure::Late {
                    what: format!("the end of the processes in {}", root.display()),
                    seconds: limit.as_secs(),
                    detail: format!(": {:?}", processes(&root.join("system"))),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}

/// Kills the processes of a cgroup and removes it, with those below; true if it is gone.
fn emptied(dir: &Path) -> bool {
    for process in processes(dir) {
        if let Some(pid) = i32::try_from(process).ok().and_then(Pid::from_raw) {
            // A process that has ended meanwhile is what is wanted.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    let below = fs::read_dir(dir).into_iter().flatten().flatten();
    let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    // Each must be tried, so no short circuit.
    let gone = below.map(|entry| emptied(&entry.path())).filter(|gone| !gone).count() == 0;
    gone && (fs::remove_dir(dir).is_ok() || !dir.exists())
}
