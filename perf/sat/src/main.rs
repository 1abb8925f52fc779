//! `sat`: the service-available time of systems that start containers, measured side by side.
//!
//! A container is started from an image that lies in a registry, on a host that has nothing of it. The time from the
//! first command to the first correct HTTP answer of the service is the *service-available time*. Most published
//! figures stop at a line in a log or at the end of the pull; a system that answers a pull in no time and then lets
//! the program wait for each of its files looks fast there, and not here.
//!
//! A *cell* is one image, one system, one network and one number of containers. Its runs are interleaved with
//! those of the other cells, so that a slow minute of the machine meets all of them. Each run begins cold, and the
//! record says by which facts that was seen.
//!
//! # Contents
//!
//! * [`arguments`] what the command line asks for
//! * [`plan`]      which runs that is, in their order, and how much disk they need
//! * [`images`]    builds images of several gzip layers from packages alone
//! * [`network`]   the registry, and the proxy that shapes all traffic to it
//! * [`systems`]   the systems under test: one file a system
//! * [`measure`]   one run: cold, timed to the correct answer, counted
//! * [`record`]    the raw record of each run: what was measured is not measured again
//! * [`report`]    tables, JSON, pictures
//! * [`session`]   all of it in order: images, conversions, runs, report
//! * [`place`]     folders of the harness, and the removal of what a killed run left
//! * [`program`]   programs that are found, started and ended
//! * [`failure`]   why something could not be done

mod arguments;
mod failure;
mod images;
mod measure;
mod network;
mod place;
mod plan;
mod program;
mod record;
mod report;
mod session;
mod systems;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let arguments = arguments::Arguments::parse();
    match session::run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("sat: {failure}");
            ExitCode::FAILURE
        }
    }
}
