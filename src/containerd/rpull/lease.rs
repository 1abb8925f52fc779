//! The lease of a pull, and the leases of pulls that died.
//!
//! While a lease lives, the garbage collection leaves what belongs to it. A pull ends its lease when the image has its name,
//! and also when it fails or a signal ends it. A pull that is killed leaves its lease: containerd ends that after
//! a day, and the next pull on this host ends it at once. To tell a dead pull from a living one, the lease bears a label with the
//! process: the boot, the namespace of process numbers, the number, and the start time. A process of another namespace
//! cannot be seen, so its lease stays.

use std::fs;
use std::time::Duration;

use jiff::Timestamp;
use tonic::Code;

use super::connection::ContainerdClient;
use super::error::RpullError;
use crate::api::leases::{CreateLeaseRequest, DeleteLeaseRequest, LeaseRecord, ListLeasesRequest};

/// Label with the time at which containerd ends a lease.
const EXPIRE: &str = "containerd.io/gc.expire";
/// Label with the process that pulls.
const PROCESS: &str = "dev.turbobd.rpull.process";
/// Life of a lease. A pull may take hours; containerd's own pulls use the same time.
const LIFE: Duration = Duration::from_secs(24 * 3600);

/// A lease that is held.
pub(super) struct PullLease {
    containerd: ContainerdClient,
    id: String,
}

impl PullLease {
    /// Ends the leases of dead pulls, and begins one.
    pub(super) async fn begin(containerd: &ContainerdClient) -> Result<Self, RpullError> {
        let this = PullProcess::this();
        for lease in dead(containerd, this.as_ref()).await {
            tracing::info!(lease, "ending the lease of a pull that died");
            // Another pull may do the same.
            let _ = delete(containerd, &lease, false).await;
        }
        let now = Timestamp::now();
        let id = format!("turbobd-rpull-{}-{}", now.as_nanosecond(), std::process::id());
        let end = now.checked_add(LIFE).unwrap_or(Timestamp::MAX);
        let mut request = CreateLeaseRequest { id: id.clone(), ..CreateLeaseRequest::default() };
        request.labels.insert(EXPIRE.to_owned(), end.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        if let Some(this) = this {
            request.labels.insert(PROCESS.to_owned(), this.to_string());
        }
        let created = containerd.leases().create(containerd.request(request)).await;
        created.map_err(|status| containerd.failed("begin a lease".to_owned(), &status))?;
        Ok(Self { containerd: containerd.clone(), id })
    }

    /// Its identifier.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Ends it. With `collect`, containerd collects garbage before this returns.
    pub(super) async fn end(self, collect: bool) -> Result<(), RpullError> {
        delete(&self.containerd, &self.id, collect).await
    }
}

async fn delete(containerd: &ContainerdClient, id: &str, collect: bool) -> Result<(), RpullError> {
    let request = DeleteLeaseRequest { id: id.to_owned(), sync: collect };
    match containerd.leases().delete(containerd.request(request)).await {
        Ok(_) => Ok(()),
        Err(status) if status.code() == Code::NotFound => Ok(()),
        Err(status) => Err(containerd.failed(format!("end lease {id}"), &status)),
    }
}

/// Leases of pulls whose process is no more. Without an answer there are none: they are found another time.
async fn dead(containerd: &ContainerdClient, this: Option<&PullProcess>) -> Vec<String> {
    let Some(this) = this else { return Vec::new() };
    let list = containerd.request(ListLeasesRequest::default());
    let leases = match containerd.leases().list(list).await {
        Ok(reply) => reply.into_inner().leases,
        Err(status) => {
            tracing::debug!(error = status.message(), "leases cannot be listed");
            return Vec::new();
        }
    };
    let is_dead = |lease: &LeaseRecord| {
        let process = lease.labels.get(PROCESS).and_then(|text| PullProcess::parse(text));
        process.is_some_and(|process| process.is_dead(this))
    };
    leases.into_iter().filter(is_dead).map(|lease| lease.id).collect()
}

/// A process, told from all others of all boots.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PullProcess {
    /// Identifier of the boot.
    boot: String,
    /// Namespace of process numbers, as `/proc` names it.
    namespace: String,
    number: u32,
    /// Start time in clock ticks since the boot.
    start: u64,
}

impl PullProcess {
    /// This process; `None` without `/proc`.
    fn this() -> Option<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
        let namespace = fs::read_link("/proc/self/ns/pid").ok()?.display().to_string();
        let number = std::process::id();
        Some(Self { boot, namespace, number, start: start_of(number)? })
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(' ');
        let process = Self {
            boot: parts.next()?.to_owned(),
            namespace: parts.next()?.to_owned(),
            number: parts.next()?.parse().ok()?,
            start: parts.next()?.parse().ok()?,
        };
        Some(process).filter(|_| parts.next().is_none())
    }

    /// True if it is no more, as far as `this` process can know.
    fn is_dead(&self, this: &Self) -> bool {
        if self.boot != this.boot {
            return true;
        }
        self.namespace == this.namespace && start_of(self.number) != Some(self.start)
    }
}

impl std::fmt::Display for PullProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {} {}", self.boot, self.namespace, self.number, self.start)
    }
}

/// Start time of a process in clock ticks since the boot (proc(5), field 22 of `stat`); `None` if there is none.
fn start_of(process: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The second field is a name, which may hold blanks and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_again_and_one_that_ended_is_dead() {
        let this = PullProcess::this().unwrap();
        assert_eq!(PullProcess::parse(&this.to_string()), Some(this.clone()));
        assert!(!this.is_dead(&this));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let mut other = this.clone();
        (other.number, other.start) = (child.id(), start_of(child.id()).unwrap());
        child.wait().unwrap();
        assert!(other.is_dead(&this));
        let elsewhere = PullProcess { namespace: "pid:[1]".to_owned(), ..other.clone() };
        assert!(!elsewhere.is_dead(&this), "a process that cannot be seen may live");
        let earlier = PullProcess { boot: "b".to_owned(), ..this.clone() };
        assert!(earlier.is_dead(&this));
        assert_eq!(PullProcess::parse("a b c"), None);
    }
}
