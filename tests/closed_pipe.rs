//! A reader of a command's output may stop at any time: `turbobd inspect … | head -1`.
//!
//! The command does not panic and prints no complaint, and its status is the same as with all output read.
//! Any other obstacle to its output is a failure in one sentence.

use crate::image;
use std::fs::File;
use std::process::{Command, Stdio};

use crate::image::{Ended, Images, end, turbobd};

/// A pipe without a reader.
fn nobody() -> std::io::PipeWriter {
    std::io::pipe().unwrap().1
}

/// Runs a command whose output is not read.
fn unread(command: &mut Command) -> Ended {
    let output = command.stdout(nobody()).stderr(Stdio::piped()).spawn().unwrap();
    let output = output.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    Ended { code: output.status.code(), stdout: String::new(), stderr }
}

#[test]
fn a_reader_who_stops_reading_is_no_failure_of_any_command() {
    let images = Images::converted();
    let run_dir = tempfile::tempdir().unwrap();
    let (turbo, place) = (images.name("turbo"), images.place());
    let commands: [&[&str]; 15] = [
        &["--help"],
        &["--version"],
        &["attach", "--help"],
        &["inspect", &turbo],
        &["inspect", &turbo, "--json"],
        &["export", &turbo, "--digest"],
        &["check", &turbo],
        &["check", &turbo, "--data"],
        &["convert", "-r", &place, "-i", "latest", "--turboOCI", "again", "--vsize", "1"],
        &["convert", "-r", &place, "-i", "latest", "--turboOCI", "again", "--vsize", "1", "--json"],
        &["ls"],
        &["ls", "--json"],
        &["doctor"],
        &["doctor", "--json"],
        &["cache"],
    ];
    for args in commands {
        let run = || {
            let mut command = turbobd();
            command.args(args).env("TURBOBD_RUN_DIR", run_dir.path());
            command
        };
        let (unread, read) = (unread(&mut run()), end(&mut run()));
        assert!(!read.stdout.is_empty(), "turbobd {args:?} prints nothing");
        assert_eq!(unread.code, read.code, "turbobd {args:?}: {}", unread.stderr);
        for word in ["panicked", "pipe", "stdout"] {
            assert!(!unread.stderr.contains(word), "turbobd {args:?}: {}", unread.stderr);
        }
    }
}

#[test]
fn a_log_and_remarks_that_nobody_reads_change_nothing_of_what_is_done() {
    let images = Images::converted();
    let (turbo, place) = (images.name("turbo"), images.place());
    let missing = format!("{turbo}-missing");
    let commands: [&[&str]; 3] = [
        &["convert", "-r", &place, "-i", "latest", "--turboOCI", "again", "--vsize", "1"],
        &["export", &turbo, "--digest"],
        &["check", &missing],
    ];
    for args in commands {
        let run = || {
            let mut command = turbobd();
            command.args(args).env("RUST_LOG", "trace").stdout(Stdio::piped());
            command
        };
        let read = end(&mut run());
        assert!(!read.stderr.is_empty(), "turbobd {args:?} says nothing");
        let unread = run().stderr(nobody()).spawn().unwrap().wait_with_output().unwrap();
        assert_eq!(unread.status.code(), read.code, "turbobd {args:?}");
        assert_eq!(String::from_utf8(unread.stdout).unwrap(), read.stdout, "turbobd {args:?}");
    }
}

#[test]
fn a_full_disk_behind_stdout_is_a_failure_in_one_sentence() {
    let images = Images::converted();
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for args in [&["inspect"][..], &["inspect", "--json"], &["export", "--digest"], &["check"]] {
        let output =
            turbobd().args(args).arg(images.name("turbo")).stdout(full()).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        let ended = Ended { code: output.status.code(), stdout: String::new(), stderr };
        image::is_refusal(&ended, args, &["Cannot write to stdout", "No space left"]);
    }
}
