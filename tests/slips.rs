//! A slip of one argument destroys nothing: what exists is named, and stays as it was.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::image::{Images, done, end, noise, refused, turbobd};
use crate::machine;

/// `turbobd export` of a small disk: arguments behind them go to the command.
fn export<'a>(image: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["export", image, "-o"], more].concat()
}

/// An image whose disk of 1 GiB has a few files.
fn small() -> (Images, String) {
    let images = Images::converted();
    let name = images.name("turbo");
    (images, name)
}

#[test]
fn an_existing_file_is_replaced_by_force_only_and_keeps_its_mode_and_its_links() {
    let (_images, image) = small();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (file, link) = (work.path().join("disk"), work.path().join("link"));
    fs::write(&file, "precious").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    symlink("disk", &link).unwrap();
    for path in [&file, &link] {
        let path = path.to_str().unwrap();
        refused(&export(&image, &[path]), &[path, "exists already", "--force"]);
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }
    done(&export(&image, &[link.to_str().unwrap(), "--force"]));
    assert!(link.is_symlink());
    let meta = fs::metadata(&file).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o7777), (1 << 30, 0o640));
    assert_eq!(fs::read_dir(work.path()).unwrap().count(), 2, "something is left beside it");
}

#[test]
fn a_failure_leaves_the_old_file() {
    let (images, image) = small();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = work.path().join("disk");
    fs::write(&file, "precious").unwrap();
    let blob = images.blob_path(&images.layer("latest", 0));
    let len = fs::metadata(&blob).unwrap().len();
    fs::write(&blob, noise(7, len as usize)).unwrap();
    refused(&export(&image, &[file.to_str().unwrap(), "--force"]), &[]);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert_eq!(fs::read_dir(work.path()).unwrap().count(), 1, "something is left beside it");
}

#[test]
fn what_is_no_regular_file_is_written_into_or_refused_and_stays_what_it_is() {
    let (_images, image) = small();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let whole = work.path().join("whole");
    done(&export(&image, &[&text(&whole)]));
    let digest_of = |mut command: Command| machine::run(command.stdin(Stdio::null()));
    let mut sum = Command::new("sha256sum");
    sum.arg(&whole);
    let right = digest_of(sum)[..64].to_owned();

    let dir = text(work.path());
    refused(&export(&image, &[&dir]), &[&dir, "directory"]);
    let socket = work.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    refused(&export(&image, &[&text(&socket), "-f"]), &[&text(&socket), "socket"]);
    assert!(fs::metadata(&socket).unwrap().file_type().is_socket());

    // Its node is one of this test, so that a fault cannot take the host's.
    let full = work.path().join("full");
    machine::run(Command::new("mknod").arg(&full).args(["c", "1", "7"]));
    let said = refused(&export(&image, &[&text(&full)]), &[]);
    assert!(said.contains("No space left"), "{said}");
    assert!(fs::metadata(&full).unwrap().file_type().is_char_device());

    let fifo = work.path().join("fifo");
    machine::run(Command::new("mkfifo").arg(&fifo));
    let reader = Command::new("sha256sum").arg(&fifo).stdout(Stdio::piped()).spawn().unwrap();
    done(&export(&image, &[&text(&fifo)]));
    let read = String::from_utf8(reader.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(read[..64], right);
    assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());

    let mut out = turbobd().args(export(&image, &["-"])).stdout(Stdio::piped()).spawn().unwrap();
    let piped = out.stdout.take().unwrap();
    let sum = Command::new("sha256sum").stdin(piped).output().unwrap();
    assert!(out.wait().unwrap().success());
    assert_eq!(String::from_utf8(sum.stdout).unwrap()[..64], right);
    assert_eq!(end(turbobd().args(export(&image, &["-", "--digest"]))).code, Some(2));
}

#[test]
fn a_block_device_gets_every_byte_of_a_disk_that_it_has_room_for() {
    let (_images, image) = small();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (whole, backing) = (work.path().join("whole"), work.path().join("backing"));
    done(&export(&image, &[whole.to_str().unwrap()]));
    for (size, fits) in [(1_u64 << 20, false), (1 << 30, true)] {
        let file = fs::File::create(&backing).unwrap();
        file.set_len(size).unwrap();
        // Old bytes where the disk has zeros.
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xaa; 4096], size - 4096).unwrap();
        let device = machine::run(Command::new("losetup").args(["-f", "--show"]).arg(&backing));
        let outcome = end(turbobd().args(export(&image, &[&device])));
        machine::run(Command::new("sync").args(["-f", backing.to_str().unwrap()]));
        machine::run(Command::new("losetup").args(["-d", &device]));
        assert_eq!(outcome.code, Some(i32::from(!fits)), "{}", outcome.stderr);
        if fits {
            machine::run(Command::new("cmp").args([&whole, &backing]));
        } else {
            assert!(outcome.stderr.contains("1048576"), "{}", outcome.stderr);
        }
    }
}

#[test]
fn the_tag_of_an_original_is_moved_by_force_only() {
    let images = Images::converted();
    let (before, place) = (images.tagged("latest"), images.place());
    let digest = before["digest"].as_str().unwrap().to_owned();
    let convert = |input: &[&str], more: &[&str]| {
        let fixed = ["convert", "-r", &place, "--vsize", "1"];
        [&fixed[..], input, more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let by_tag: &[&str] = &["-i", "latest"];
    for (input, result) in
        [(by_tag, "--turboOCI"), (by_tag, "-o"), (&["-g", &digest][..], "--turboOCI")]
    {
        let args = convert(input, &[result, "latest"]);
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        refused(&args, &["latest", "--force"]);
        assert_eq!(images.tagged("latest"), before);
    }
    let args = convert(by_tag, &["--turboOCI", "latest", "--force"]);
    done(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert_ne!(images.tagged("latest"), before);
}
