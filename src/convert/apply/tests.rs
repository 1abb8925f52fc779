//! Small stacks of layers, and the tree that a container would see.

use super::*;
use formats::tar::{SparsePiece, Timestamp};
use formats::units::Bytes;

/// One entry from a line: `KIND PATH [-> TARGET] [key=value…]`, kinds as in `ls -l`, `h` for a hard link.
pub(super) fn entry(line: &str, number: u64) -> TarEntry {
    let mut words = line.split(' ');
    let kind = words.next().unwrap();
    let mut entry = TarEntry {
        header_offset: Bytes(number * 512),
        name: words.next().unwrap().as_bytes().to_vec(),
        kind: EntryKind::Regular,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Timestamp { secs: 1000 + number as i64, nanos: 0 },
        xattrs: vec![],
        data_offset: Bytes(number * 512 + 512),
        stored_len: Bytes::ZERO,
        content: EntryContent::Plain,
    };
    let (mut target, mut device) = (Vec::new(), (1, 3));
    for word in words {
        match word.split_once('=') {
            None if word == "->" => {}
            None => target = word.as_bytes().to_vec(),
            Some(("mode", value)) => entry.mode = u32::from_str_radix(value, 8).unwrap(),
            Some(("uid", value)) => entry.uid = value.parse().unwrap(),
            Some(("gid", value)) => entry.gid = value.parse().unwrap(),
            Some(("time", value)) => entry.mtime.secs = value.parse().unwrap(),
            Some(("len", value)) => entry.stored_len = Bytes(value.parse().unwrap()),
            Some(("dev", value)) => {
                let (major, minor) = value.split_once(':').unwrap();
                device = (major.parse().unwrap(), minor.parse().unwrap());
            }
            Some((name, value)) => {
                entry.xattrs.push((name.as_bytes().to_vec(), value.as_bytes().to_vec()));
            }
        }
    }
    let (major, minor) = device;
    entry.kind = match kind {
        "d" => EntryKind::Directory,
        "l" => EntryKind::Symlink(target),
        "h" => EntryKind::HardLink(target),
        "c" => EntryKind::Char { major, minor },
        "b" => EntryKind::Block { major, minor },
        "p" => EntryKind::Fifo,
        _ => EntryKind::Regular,
    };
    entry
}

pub(super) fn apply_lines(tree: &mut Tree, lines: &[&str]) -> Result<ApplyReport, ApplyError> {
    let mut layer = LayerApply::new(tree);
    for (number, line) in lines.iter().enumerate() {
        layer.entry(entry(line, number as u64))?;
    }
    layer.finish()
}

fn stack(layers: &[&[&str]]) -> Tree {
    let mut tree = Tree::new();
    for lines in layers {
        apply_lines(&mut tree, lines).unwrap_or_else(|error| panic!("{error}: {lines:?}"));
    }
    tree
}

/// The tree as lines: the path, and the text of `show`.
fn list(tree: &Tree, show: impl Fn(NodeId) -> String) -> Vec<String> {
    let mut lines = Vec::new();
    let mut todo = vec![(String::new(), tree.root())];
    while let Some((path, node)) = todo.pop() {
        if !path.is_empty() {
            lines.push(format!("{path}{}", show(node)));
        }
        if matches!(tree.kind(node), NodeKind::Directory) {
            todo.extend(
                tree.children(node).map(|(name, child)| {
                    (format!("{path}/{}", String::from_utf8_lossy(name)), child)
                }),
            );
        }
    }
    lines.sort();
    lines
}

fn paths(layers: &[&[&str]]) -> String {
    let tree = stack(layers);
    let slash = |node| {
        if matches!(tree.kind(node), NodeKind::Directory) { "/".to_owned() } else { String::new() }
    };
    list(&tree, slash).join(" ")
}

fn at(tree: &Tree, path: &str) -> NodeId {
    path::LowerTree(tree)
        .node_at(&Path::raw(path.as_bytes()))
        .unwrap_or_else(|| panic!("no {path}"))
}

fn error(layers: &[&[&str]], last: &[&str]) -> String {
    apply_lines(&mut stack(layers), last).unwrap_err().to_string()
}

#[test]
fn names_are_cleaned_and_stay_in_the_root() {
    assert_eq!(
        paths(&[&[
            "f ./a",
            "f //b",
            "f ../../c",
            "f d/../e",
            "d ./f//g/./h/",
            "d ./",
            "d /",
            "f .."
        ]]),
        "/a /b /c /e /f/ /f/g/ /f/g/h/"
    );
}

#[test]
fn whiteouts_hide_the_lower_layers_wherever_they_stand() {
    let base: &[&str] = &["d a/", "f a/1", "f a/2", "d a/s/", "f a/s/x", "f b", "d c/", "f c/1"];
    for (upper, expected) in [
        (&["f a/.wh.1", "f .wh.b"][..], "/a/ /a/2 /a/s/ /a/s/x /c/ /c/1"),
        (&["f .wh.a", "f .wh.c"], "/b"),
        (&["f .wh.missing", "f new/.wh.x"], "/a/ /a/1 /a/2 /a/s/ /a/s/x /b /c/ /c/1 /new/"),
        // An opaque directory keeps the files of its own layer, before and after the mark.
        (&["f a/0", "f a/.wh..wh..opq", "f a/2"], "/a/ /a/0 /a/2 /b /c/ /c/1"),
        (&["f a/s/.wh..wh..opq"], "/a/ /a/1 /a/2 /a/s/ /b /c/ /c/1"),
        (&["f a/.wh..wh..opq", "f a/s/y"], "/a/ /a/s/ /a/s/y /b /c/ /c/1"),
        (&["f .wh..wh..opq", "f z"], "/z"),
        // The name of a whiteout can be used again.
        (&["f .wh.b", "f b"], "/a/ /a/1 /a/2 /a/s/ /a/s/x /b /c/ /c/1"),
        (&["f .wh.a", "f a"], "/a /b /c/ /c/1"),
        // containerd fails here: the whiteout affects only the lower layers.
        (&["f b", "f .wh.b", "f .wh.b"], "/a/ /a/1 /a/2 /a/s/ /a/s/x /b /c/ /c/1"),
        (&["f c/2", "f .wh.c"], "/a/ /a/1 /a/2 /a/s/ /a/s/x /b /c/ /c/2"),
        (&["f .wh.c", "f c/2"], "/a/ /a/1 /a/2 /a/s/ /a/s/x /b /c/ /c/2"),
        // As in overlayfs: a directory entry behind a whiteout makes the lower one visible again.
        (&["f .wh.c", "d c"], "/a/ /a/1 /a/2 /a/s/ /a/s/x /b /c/ /c/1"),
        // AUFS's own files, and overlayfs's form of a whiteout.
        (&["f .wh..wh.plnk", "c b dev=0:0", "c c/1 dev=0:0"], "/a/ /a/1 /a/2 /a/s/ /a/s/x /c/"),
    ] {
        assert_eq!(paths(&[base, upper]), expected, "{upper:?}");
    }
}

#[test]
fn a_name_of_another_kind_replaces_and_directories_merge() {
    let base: &[&str] = &["d d/", "f d/in", "f f", "l l -> d"];
    for (upper, expected) in [
        (&["f d"][..], "/d /f /l"),
        (&["d f/", "f f/new"], "/d/ /d/in /f/ /f/new /l"),
        (&["d d/", "f d/new"], "/d/ /d/in /d/new /f /l"),
        (&["f l/x"], "/d/ /d/in /f /l/ /l/x"),
        (&["f f/x"], "/d/ /d/in /f/ /f/x /l"),
        // A lower directory is visible again after this layer's file over it is removed.
        (&["f d", "d d/"], "/d/ /d/in /f /l"),
        (&["d n", "f n/1", "f n", "d n"], "/d/ /d/in /f /l /n/"),
    ] {
        assert_eq!(paths(&[base, upper]), expected, "{upper:?}");
    }
}

#[test]
fn links_of_this_layer_are_followed_within_the_root_and_lower_ones_are_not_seen() {
    assert_eq!(
        paths(&[&["d usr/lib/", "l lib -> usr/lib", "f lib/x"]]),
        "/lib /usr/ /usr/lib/ /usr/lib/x"
    );
    assert_eq!(paths(&[&["l a -> /../../b", "f a/x"]]), "/a /b/ /b/x");
    assert_eq!(
        paths(&[&["d d/e/", "l d/e/up -> ../..", "f d/e/up/x", "l s -> d/e/up", "f s/y"]]),
        "/d/ /d/e/ /d/e/up /s /x /y"
    );
    assert_eq!(
        paths(&[&["d usr/lib/", "l lib -> usr/lib"], &["f lib/x"]]),
        "/lib/ /lib/x /usr/ /usr/lib/"
    );
    assert_eq!(
        paths(&[&["d usr/lib/", "l lib -> usr/lib"], &["l lib -> usr/lib", "f lib/x"]]),
        "/lib /usr/ /usr/lib/ /usr/lib/x"
    );
    // The last name is never followed.
    assert_eq!(paths(&[&["d d/", "l l -> d", "f l"]]), "/d/ /l");
}

#[test]
fn missing_directories_are_copied_up_or_made_plain() {
    let base: &[&str] =
        &["d d mode=2750 uid=7 gid=8 time=50 user.a=1", "d d/e mode=700 time=60", "l l -> d/e"];
    let tree =
        stack(&[base, &["f d/e/new time=99", "f x/y/z time=77", "f l/q", "f d/sub/q time=5"]]);
    let shown = |path: &str| {
        let a = tree.attributes(at(&tree, path));
        (a.mode, a.uid, a.gid, a.mtime.secs, a.xattrs.len())
    };
    assert_eq!(shown("d"), (0o2750, 7, 8, 50, 1));
    assert_eq!(shown("d/e"), (0o700, 0, 0, 60, 0));
    assert_eq!(shown("x"), (0o755, 0, 0, 77, 0));
    assert_eq!(shown("x/y"), (0o755, 0, 0, 77, 0));
    assert_eq!(
        shown("l"),
        (0o700, 0, 0, 60, 0),
        "a lower link: the attributes of what it leads to"
    );
    assert_eq!(
        shown("d/sub"),
        (0o755, 0, 8, 5, 0),
        "a directory with the set-group-id bit passes its group on"
    );
}

#[test]
fn a_repeated_directory_has_the_attributes_of_its_last_header() {
    let base: &[&str] = &["d d mode=700 user.a=1 user.b=2", "f d/x"];
    let names = |tree: &Tree| -> Vec<String> {
        let attributes = tree.attributes(at(tree, "d"));
        attributes.xattrs.keys().map(|name| String::from_utf8_lossy(name).into_owned()).collect()
    };
    // Over a lower layer all attributes are new.
    let tree = stack(&[base, &["d d mode=711 uid=3 user.c=3"]]);
    assert_eq!(names(&tree), ["user.c"]);
    assert_eq!(
        (tree.attributes(at(&tree, "d")).mode, tree.attributes(at(&tree, "d")).uid),
        (0o711, 3)
    );
    // Within a layer they add up, including copied ones.
    assert_eq!(names(&stack(&[base, &["f d/y", "d d user.c=3"]])), ["user.a", "user.b", "user.c"]);
    assert_eq!(names(&stack(&[base, &["d d user.c=3", "d d user.d=4"]])), ["user.c", "user.d"]);
}

#[test]
fn a_hard_link_shares_the_inode_and_its_header_counts() {
    let tree =
        stack(&[&["f a len=10 mode=600", "h b -> a mode=640 uid=5", "l s -> a", "h t -> s uid=4"]]);
    assert_eq!(at(&tree, "a"), at(&tree, "b"));
    assert_eq!(
        (tree.attributes(at(&tree, "a")).mode, tree.attributes(at(&tree, "a")).uid),
        (0o640, 5)
    );
    assert_eq!(at(&tree, "s"), at(&tree, "t"));
    assert_eq!(
        (tree.attributes(at(&tree, "s")).mode, tree.attributes(at(&tree, "s")).uid),
        (0o777, 4)
    );
    assert_eq!(tree.links(at(&tree, "a")), 2);

    // A link to a lower file, even to one with names that this layer removes.
    let base: &[&str] = &["f a len=10", "h a2 -> a", "d d/", "f d/f", "l s -> d"];
    let tree = stack(&[base, &["h n/b -> ./a mode=600", "f .wh.a", "h c -> s/f", "f .wh.d"]]);
    assert_eq!((at(&tree, "a2"), tree.links(at(&tree, "a2"))), (at(&tree, "n/b"), 2));
    assert_eq!(tree.attributes(at(&tree, "a2")).mode, 0o600);
    assert_eq!(tree.links(at(&tree, "c")), 1);
    assert_eq!(paths(&[base, &["h b -> a", "f .wh..wh..opq"]]), "/b");
    // The chown of the link removes capabilities.
    let tree = stack(&[&["f a security.capability=x user.u=1", "h b -> a"]]);
    assert_eq!(tree.attributes(at(&tree, "a")).xattrs.keys().collect::<Vec<_>>(), [b"user.u"]);

    for (upper, reason) in [
        ("h b -> nowhere", "the target \"nowhere\" of the hard link does not exist"),
        ("h x -> d", "the target \"d\" of the hard link is a directory"),
        ("h b -> .", "the target \".\" of the hard link does not exist"),
    ] {
        assert_eq!(error(&[base], &[upper]).split_once("applied: ").unwrap().1, reason);
    }
    assert!(error(&[base], &["f .wh.d", "h b -> d/f"]).ends_with("does not exist"));
    assert_eq!(paths(&[&["f a"], &["f .wh.a", "h b -> a"]]), "");
    assert!(error(&[], &["f a", "h a -> a"]).ends_with("does not exist"));
}

#[test]
fn the_latter_of_two_entries_wins_and_older_links_keep_the_older_file() {
    let tree = stack(&[&["f a len=1", "h b -> a", "f a len=2"]]);
    let size = |path: &str| match tree.kind(at(&tree, path)) {
        NodeKind::Regular { size, .. } => size.get(),
        _ => panic!(),
    };
    assert_eq!((size("a"), size("b")), (2, 1));
}

#[test]
fn data_and_times_arrive_as_the_header_says() {
    let mut tree = Tree::new();
    let mut layer = LayerApply::new(&mut tree);
    let piece = SparsePiece { file_offset: Bytes(4096), tar_offset: Bytes(1024), len: Bytes(7) };
    let content = EntryContent::Sparse { size: Bytes(9000), pieces: vec![piece] };
    layer.entry(TarEntry { content, stored_len: Bytes(7), ..entry("f sparse", 1) }).unwrap();
    layer.entry(entry("f plain len=9", 7)).unwrap();
    layer.entry(entry("f old time=-5", 8)).unwrap();
    layer.entry(entry("f late time=9223372037", 9)).unwrap();
    layer.entry(entry("d . mode=700", 10)).unwrap();
    let report = layer.finish().unwrap();
    assert_eq!((report.entries, report.root_entries, report.created.len()), (4, 1, 4));
    assert_eq!(report.created, ["sparse", "plain", "old", "late"].map(|path| at(&tree, path)));
    let run = DataRun::remote(Bytes(4096), Bytes(1024), Bytes(7));
    assert_eq!(
        *tree.kind(at(&tree, "sparse")),
        NodeKind::Regular { size: Bytes(9000), runs: vec![run] }
    );
    let run = DataRun::remote(Bytes(0), Bytes(4096), Bytes(9));
    assert_eq!(
        *tree.kind(at(&tree, "plain")),
        NodeKind::Regular { size: Bytes(9), runs: vec![run] }
    );
    assert_eq!(tree.attributes(at(&tree, "old")).mtime, Timestamp::default());
    assert_eq!(tree.attributes(at(&tree, "late")).mtime, Timestamp::default());
    assert_eq!(tree.attributes(tree.root()).mode, 0o755);
}

#[test]
fn what_cannot_be_is_refused_and_the_tree_is_unchanged() {
    let long = format!("f {}", "n".repeat(256));
    let deep = format!("f {}x", "d/".repeat(2048));
    let link = format!("l l -> {}", "t".repeat(4096));
    for (lines, reason) in [
        (&["f a", "f a/b"][..], "\"a\" is not a directory in this layer"),
        (&["f .wh."], "its whiteout has no valid name"),
        (&["f d/.wh..."], "its whiteout has no valid name"),
        (&["l a -> b", "l b -> a", "f a/x"], "its path leads through more than 255 symbolic links"),
        (&["f a uid=4294967296"], "the owner 4294967296 does not fit in 32 bits"),
        (&["c a dev=5000:1"], "there is no device 5000:1: the numbers have 12 and 20 bits"),
        (
            &[&long],
            "the name \"nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn\" has 256 bytes; 255 are allowed",
        ),
        (&[&deep], "its path has 4097 bytes; 4095 are allowed"),
        (&[&link], "a symbolic link has 1 to 4095 bytes, not 4096"),
        (&["l l"], "a symbolic link has 1 to 4095 bytes, not 0"),
    ] {
        let message = error(&[], lines);
        let offset = (lines.len() - 1) * 512;
        assert!(
            message.contains(&format!(" at byte {offset} of the tar cannot be applied: ")),
            "{message}"
        );
        assert_eq!(message.split_once("applied: ").unwrap().1, reason);
    }
    let mut tree = stack(&[&["f a"]]);
    assert!(apply_lines(&mut tree, &["f .wh.a", "f b", "f .wh."]).is_err());
    assert_eq!(list(&tree, |_| String::new()), ["/a"]);
}

#[test]
fn the_interop_layers_make_the_tree_that_their_script_describes() {
    use std::io::Read as _;
    let mut tree = Tree::new();
    for layer in ["base.tar.gz", "upper.tar.gz"] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/interop/blobs")
            .join(layer);
        let mut tar = Vec::new();
        flate2::read::MultiGzDecoder::new(std::fs::File::open(path).unwrap())
            .read_to_end(&mut tar)
            .unwrap();
        let mut apply = LayerApply::new(&mut tree);
        let mut parser = formats::tar::Parser::new();
        #[derive(Debug)]
        #[allow(dead_code)]
        enum Error {
            Tar(formats::tar::TarError),
            Apply(ApplyError),
        }
        impl From<formats::tar::TarError> for Error {
            fn from(error: formats::tar::TarError) -> Self {
                Self::Tar(error)
            }
        }
        let mut on = |event: formats::tar::TarEvent<'_>| match event {
            formats::tar::TarEvent::Entry(entry) => apply.entry(entry).map_err(Error::Apply),
            formats::tar::TarEvent::Data(_) => Ok(()),
        };
        tar.chunks(1000).try_for_each(|piece| parser.feed::<Error>(piece, &mut on)).unwrap();
        parser.finish().unwrap();
        apply.finish().unwrap();
    }
    let exists = |path: &str| path::LowerTree(&tree).node_at(&Path::raw(path.as_bytes())).is_some();
    for gone in [
        "wh/gone",
        "wh/sub",
        "wh/opq/o1",
        "tmp",
        "swap/dir2file/inner",
        "many/file-with-some-name-00010",
        "wh/.wh.gone",
    ] {
        assert!(!exists(gone), "{gone}");
    }
    for there in [
        "wh/stays",
        "wh/opq/new",
        "wh/keep/k",
        "swap/file2dir/now",
        "many/file-with-some-name-00999",
        "implicit/a/b/c",
        "dotslash/file",
    ] {
        assert!(exists(there), "{there}");
    }
    let attributes = |path: &str| {
        let found = tree.attributes(at(&tree, path));
        (found.mode, found.uid, found.gid)
    };
    assert_eq!(at(&tree, "links/hard-lower"), at(&tree, "files/t100000"));
    assert_eq!(at(&tree, "links/hard-to-r4097"), at(&tree, "files/r4097"));
    assert_eq!(
        (attributes("etc"), attributes("wh/keep"), attributes("bin/suid")),
        ((0o750, 0, 7), (0o700, 5, 0), (0o4755, 0, 0))
    );
    assert_eq!(*tree.kind(at(&tree, "dev/big")), NodeKind::Char { major: 300, minor: 70000 });
    assert_eq!(*tree.kind(at(&tree, "swap/file2sym")), NodeKind::Symlink(b"sym2file".to_vec()));
    assert_eq!(
        tree.attributes(at(&tree, "etc/pax-mtime")).mtime,
        Timestamp { secs: 1_700_000_000, nanos: 250_000_000 }
    );
    assert_eq!(tree.attributes(at(&tree, "etc/xattr-user")).xattrs.len(), 3);
}
