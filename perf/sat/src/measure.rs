//! One run: a cold start, timed to the first correct answer, and what it used.
//!
//! 1. The stores of the last run are removed, the new one is empty.
//! 2. The daemons start, and the page cache is dropped. The registry's copy of the image is read into it again: the
//!    registry stands for another machine.
//! 3. The line gets its shape, the counters are read, the clock starts.
//! 4. The system pulls and runs; each container is asked until its answer is correct. The clock stops at the last.
//! 5. The counters are read again, everything ends.
//!
//! A run counts only if it was cold: the store had no file, the page cache shrank to what cannot be dropped, and bytes
//! of layers came over the line.
//!
//! # Contents
//!
//! * [`answer`]   the first correct answer
//! * [`counters`] what the kernel counted
//! * [`group`]    a cgroup for everything that the run starts

pub(crate) mod answer;
pub(crate) mod counters;
pub(crate) mod group;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::failure::{Attempt as _, Failure};
use crate::images::Image;
use crate::network::proxy::Answer;
use crate::network::shape::Shape;
use crate::place::used_bytes;
use crate::systems::{Converted, Phase, Running, Site, System};
use group::Group;

/// What one run showed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Seconds from the first command to the last container's first correct answer.
    pub(crate) available: f64,
    /// The same to the first container's.
    pub(crate) first_available: f64,
    /// Phases of container 0 in their order, which add up to its time.
    pub(crate) phases: Vec<Phase>,
    /// Bytes of answers on the line until then.
    pub(crate) wire_bytes: u64,
    /// Requests until then.
    pub(crate) requests: u64,
    /// CPU seconds of all processes of the system and of the containers until then.
    pub(crate) processes_cpu: f64,
    /// CPU seconds of all threads of the kernel in that time.
    pub(crate) kernel_cpu: f64,
    /// Peak of the resident memory of the system's daemons, in bytes, added up.
    pub(crate) peak_memory: u64,
    /// Bytes that the system's daemons had written or would write back.
    pub(crate) written_bytes: u64,
    /// Bytes of the blocks of the system's stores, after the answer.
    pub(crate) store_bytes: u64,
    /// Why the start counts as cold.
    pub(crate) cold: Cold,
    /// Load of the machine before the run: the first number of /proc/loadavg.
    pub(crate) load: f64,
    /// Answers that passed on the line.
    pub(crate) answers: Vec<Answer>,
}

impl Measured {
    /// CPU seconds of all parts.
    pub(crate) fn cpu(&self) -> f64 {
        self.processes_cpu + self.kernel_cpu
    }
}

/// Facts by which a start is cold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cold {
    /// Bytes in the page cache before it was dropped.
    pub(crate) cached_before: u64,
    /// Bytes in it after.
    pub(crate) cached_after: u64,
    /// Files in the store before the daemons started.
    pub(crate) store_files: u64,
    /// Bytes of layers that came over the line.
    pub(crate) layer_bytes: u64,
}

impl Cold {
    /// Fails if the start was not cold.
    fn judge(&self) -> Result<(), Failure> {
        if self.store_files > 0 {
            let text = format!("the start was not cold: its store had {} files", self.store_files);
            return Err(Failure::Invalid(text));
        }
        if self.layer_bytes == 0 {
            let text = "the start was not cold: no byte of a layer came over the line";
            return Err(Failure::Invalid(text.into()));
        }
        if self.cached_after > self.cached_before {
            let text = "the start was not cold: the page cache could not be dropped";
            return Err(Failure::Invalid(text.into()));
        }
        Ok(())
    }
}

/// What a run is about.
pub(crate) struct Run<'a> {
    /// What all systems share.
    pub(crate) site: &'a Site,
    /// The row.
    pub(crate) system: &'a dyn System,
    /// The image.
    pub(crate) image: &'a Image,
    /// What the row has of it in the registry.
    pub(crate) converted: &'a Converted,
    /// Its repository.
    pub(crate) repository: &'a str,
    /// The line.
    pub(crate) shape: Shape,
    /// Containers at once.
    pub(crate) count: u32,
    /// Number of the round: it decides which requests are slow.
    pub(crate) round: u32,
    /// Longest wait for all answers.
    pub(crate) patience: Duration,
}

impl Run<'_> {
    /// Makes the run, and leaves nothing of it.
    pub(crate) fn measure(&self) -> Result<Measured, Failure> {
        for number in 0..self.count {
            let question = self.image.question(number);
            if !question.port_is_free() {
                let why = "another program listens there";
                return Err(Failure::cannot(
                    format!("use port {} for the service", question.port),
                    why,
                ));
            }
        }
        self.site.place.clean()?;
        let store = self.site.place.folder("work")?;
        let group = Group::new()?;
        let store_files = count_files(&store);
        let running = self.system.start(self.site, self.image, &group, &store)?;
        let measured = self.timed(running, &group, &store, store_files);
        let cleaned = self.site.place.clean();
        let measured = measured?;
        cleaned?;
        measured.cold.judge()?;
        Ok(measured)
    }

    /// Steps 2 to 5.
    fn timed(
        &self,
        mut running: Box<dyn Running>,
        group: &Group,
        store: &Path,
        store_files: u64,
    ) -> Result<Measured, Failure> {
        let (blobs, _) = self.site.registry.blobs(self.repository, &self.converted.tag);
        let (original, _) = self.site.registry.blobs(self.repository, crate::images::TAG);
        let cached_before = counters::page_cache();
        let cached_after = drop_page_cache()?;
        self.site.registry.warm(&[blobs, original].concat());
        let reference =
            format!("{}/{}:{}", self.site.proxy.host(), self.repository, self.converted.tag);
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0);
        group.programs().into_iter().for_each(counters::reset_peak);
        let written =
            |group: &Group| group.programs().into_iter().map(counters::written).sum::<u64>();
        let (cpu, kernel) = (group.processor()?, counters::kernel_threads());
        let written_before = written(group);
        self.site.proxy.set(self.shape, u64::from(self.round));

        let start = Instant::now();
        let phases = self.answered(&mut *running, &reference, start);
        let passed = self.site.proxy.passed();
        let cpu = group.processor()?.saturating_sub(cpu);
        let kernel = counters::kernel_threads() - kernel;
        let peak_memory = group.programs().into_iter().map(counters::peak_memory).sum();
        let written_bytes = written(group).saturating_sub(written_before);
        let store_bytes = used_bytes(store);
        let stopped = running.stop();
        let (phases, available) = phases?;
        // The times are taken; what still runs is ended before the next run.
        if let Err(failure) = stopped {
            eprintln!("  {}: did not end by itself: {failure}", self.system.name());
        }
        // An answer that is under way when the service answers has no line in the log, so not the blobs are added up.
        let others = passed.answers.iter().filter(|answer| answer.kind != "blob");
        let layer_bytes = passed.bytes.saturating_sub(others.map(|answer| answer.bytes).sum());
        Ok(Measured {
            first_available: phases.iter().map(|(_, seconds)| seconds).sum(),
            available,
            phases,
            wire_bytes: passed.bytes,
            requests: passed.requests,
            processes_cpu: cpu.as_secs_f64(),
            kernel_cpu: kernel.max(0.0),
            peak_memory,
            written_bytes,
            store_bytes,
            cold: Cold { cached_before, cached_after, store_files, layer_bytes },
            load,
            answers: passed.answers,
        })
    }

    /// Pulls, starts all containers at once and waits for each one's answer: the phases of container 0, and the time
    /// of the last answer.
    fn answered(
        &self,
        running: &mut dyn Running,
        reference: &str,
        start: Instant,
    ) -> Result<(Vec<Phase>, f64), Failure> {
        let mut phases = Vec::new();
        let known = running.pull(reference)?;
        let pulled = start.elapsed().as_secs_f64();
        split(&mut phases, known, pulled, "pull");
        let running: &dyn Running = running;
        let until = start + self.patience;
        let one = |number: u32| self.one(running, reference, number, start, until);
        let others: Vec<Result<f64, Failure>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..self.count)
                .map(|number| scope.spawn(move || one(number).map(|(_, answered, _)| answered)))
                .collect();
            let first = one(0);
            let mut all: Vec<_> = threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| Err(Failure::Invalid("a thread panicked".into())))
                })
                .collect();
            all.push(first.map(|(known, answered, started)| {
                let told = known.len();
                // What a system does before the container it does first.
                split(&mut phases, known, started - pulled, "container");
                let rest = phases.len() - told - 1;
                phases[rest..].rotate_left(1);
                phases.push(("answer".into(), answered - started));
                answered
            }));
            all
        });
        let mut last = 0.0f64;
        for answered in others {
            last = last.max(answered?);
        }
        Ok((phases, last))
    }

    /// Starts a container and waits for its answer: known phases, the time of the answer, the time of the start's end.
    fn one(
        &self,
        running: &dyn Running,
        reference: &str,
        number: u32,
        start: Instant,
        until: Instant,
    ) -> Result<(Vec<Phase>, f64, f64), Failure> {
        let known = running.run(self.image, reference, number)?;
        let started = start.elapsed().as_secs_f64();
        let answered = self.image.question(number).wait(until).map_err(|seen| Failure::Late {
            what: "a correct answer".into(),
            seconds: self.patience.as_secs(),
            detail: format!(": {seen}; {}", running.said(number)),
        })?;
        Ok((known, answered.duration_since(start).as_secs_f64(), started))
    }
}

/// Adds the phases that a system knows of a step of `seconds`; `name` is the rest.
fn split(phases: &mut Vec<Phase>, known: Vec<Phase>, seconds: f64, name: &str) {
    let told: f64 = known.iter().map(|(_, seconds)| seconds).sum();
    // Each clock starts on its own; a rest of less than nothing is none.
    phases.push((name.into(), (seconds - told).max(0.0)));
    phases.extend(known);
}

/// Drops the page cache; its bytes afterwards.
fn drop_page_cache() -> Result<u64, Failure> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")
        .attempt(|| "drop the page cache (root is needed)".into())?;
    Ok(counters::page_cache())
}

fn count_files(folder: &Path) -> u64 {
    fs::read_dir(folder).into_iter().flatten().count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_to_the_step_that_they_are_of() {
        let mut phases = Vec::new();
        split(&mut phases, vec![("open".into(), 0.2), ("mount".into(), 0.1)], 0.5, "pull");
        let names: Vec<_> = phases.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["pull", "open", "mount"]);
        assert!((phases.iter().map(|(_, s)| s).sum::<f64>() - 0.5).abs() < 1e-9);
        split(&mut phases, vec![("x".into(), 2.0)], 1.0, "rest");
        assert_eq!(phases[3], ("rest".into(), 0.0));
    }

    #[test]
    fn a_start_with_a_used_store_or_without_layers_on_the_line_is_not_cold() {
        let cold = Cold { cached_before: 9, cached_after: 1, store_files: 0, layer_bytes: 5 };
        assert_eq!(cold.judge(), Ok(()));
        for warm in [
            Cold { store_files: 1, ..cold.clone() },
            Cold { layer_bytes: 0, ..cold.clone() },
            Cold { cached_after: 10, ..cold },
        ] {
            assert!(warm.judge().is_err(), "{warm:?}");
        }
    }
}
