//! Tests of the parser against GNU tar and Python's tarfile, which share no code with it.

use std::fs;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::units::Bytes;

fn parse_in(pieces: &[&[u8]]) -> Result<(Vec<TarEntry>, Vec<u8>), TarError> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    let mut parser = Parser::with_data();
    for piece in pieces {
        parser.feed::<TarError>(piece, &mut |event| {
            match event {
                TarEvent::Entry(entry) => entries.push(entry),
                TarEvent::Data(bytes) => data.extend_from_slice(bytes),
            }
            Ok(())
        })?;
    }
    assert_eq!(parser.finish()?.get(), pieces.iter().map(|piece| piece.len() as u64).sum::<u64>());
    Ok((entries, data))
}

fn parse(tar: &[u8]) -> Result<Vec<TarEntry>, TarError> {
    parse_in(&[tar]).map(|(entries, _)| entries)
}

fn run(dir: &Path, command: &str) {
    let output = Command::new("sh")
        .args(["-ec", command])
        .current_dir(dir)
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Makes a folder with one file of each kind that a test can make without privileges.
fn sample_folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let script = r#"
        mkdir -p t/d/sub t/empty; chmod 1777 t/empty
        printf x > t/d/one; head -c 512 /dev/urandom > t/d/block; head -c 5000 /dev/urandom > t/d/some; : > t/d/zero
        chmod 4755 t/d/some; ln t/d/some t/d/hard; ln -s ../d/one t/sym; mkfifo t/fifo
        touch -d '2100-01-01 00:00:00.123456789 UTC' t/d/zero
    "#;
    run(dir.path(), script);
    dir
}

fn long_names(dir: &Path) {
    let deep = format!("t/{}", ["0123456789".repeat(6).as_str(); 5].join("/"));
    let script = format!(
        "mkdir -p {deep}; echo leaf > {deep}/leaf; ln -s {deep}/{deep} t/longlink; ln {deep}/leaf {deep}/hard; echo n > t/{}",
        "n".repeat(200)
    );
    run(dir, &script);
}

/// Entries as read by Python's tarfile, one JSON object each.
fn python(path: &Path) -> Vec<Value> {
    const SCRIPT: &str = r#"
import tarfile, sys, json
for m in tarfile.open(sys.argv[1], errors='surrogateescape'):
    print(json.dumps(dict(name=m.name, type=m.type.decode(), mode=m.mode, uid=m.uid, gid=m.gid, size=m.size, data=m.offset_data,
        offset=m.offset, link=m.linkname, major=m.devmajor, minor=m.devminor, mtime=m.pax_headers.get('mtime', str(int(m.mtime))),
        sparse=m.sparse, isfile=m.isreg(), isdir=m.isdir())))
"#;
    let output = Command::new("python3").arg("-c").arg(SCRIPT).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn time_text(time: Timestamp) -> f64 {
    time.secs as f64 + f64::from(time.nanos) / 1e9
}

/// Compares every field with Python's reading of the same file.
fn agrees_with_python(path: &Path) -> Vec<TarEntry> {
    let tar = fs::read(path).unwrap();
    let entries = parse(&tar).unwrap();
    let theirs = python(path);
    assert_eq!(entries.len(), theirs.len());
    for (entry, their) in entries.iter().zip(&theirs) {
        let name = String::from_utf8(entry.name.clone()).unwrap();
        let trimmed = name.trim_end_matches('/');
        assert_eq!(trimmed, their["name"].as_str().unwrap());
        let number = |key: &str| their[key].as_u64().unwrap();
        assert_eq!(
            (u64::from(entry.mode), entry.uid, entry.gid),
            (number("mode") & 0o7777, number("uid"), number("gid")),
            "{name}"
        );
        let their_time: f64 = their["mtime"].as_str().unwrap().parse().unwrap();
        assert!((time_text(entry.mtime) - their_time).abs() < 1e-5, "{name}");
        assert_eq!(entry.header_offset.get(), number("offset"), "{name}");
        match &entry.kind {
            EntryKind::Regular => {
                assert!(their["isfile"].as_bool().unwrap(), "{name}");
                assert_eq!(entry.data_offset.get(), number("data"), "{name}");
                let size = match &entry.content {
                    EntryContent::Plain => entry.stored_len.get(),
                    EntryContent::Sparse { size, pieces } => {
                        let ours: Vec<_> =
                            pieces.iter().map(|p| (p.file_offset.get(), p.len.get())).collect();
                        let pairs: Vec<(u64, u64)> =
                            serde_json::from_value(their["sparse"].clone()).unwrap();
                        let theirs: Vec<_> = pairs.into_iter().filter(|pair| pair.1 > 0).collect();
                        assert_eq!(ours, theirs, "{name}");
                        size.get()
                    }
                };
                assert_eq!(size, number("size"), "{name}");
            }
            EntryKind::HardLink(link) | EntryKind::Symlink(link) => {
                assert_eq!(std::str::from_utf8(link).unwrap(), their["link"].as_str().unwrap());
                assert_eq!(
                    their["type"].as_str().unwrap(),
                    if matches!(entry.kind, EntryKind::Symlink(_)) { "2" } else { "1" }
                );
            }
            EntryKind::Char { major, minor } | EntryKind::Block { major, minor } => {
                assert_eq!(
                    (u64::from(*major), u64::from(*minor)),
                    (number("major"), number("minor"))
                );
            }
            EntryKind::Directory => assert!(their["isdir"].as_bool().unwrap(), "{name}"),
            EntryKind::Fifo => assert_eq!(their["type"], "6"),
        }
    }
    entries
}

#[test]
fn every_format_of_gnu_tar_reads_as_python_reads_it() {
    let dir = sample_folder();
    for format in ["v7", "oldgnu", "gnu", "ustar", "posix"] {
        if format == "gnu" {
            long_names(dir.path()); // v7 has no room for these, ustar has room for some
        }
        let skipped = if format == "v7" { "--exclude=fifo" } else { "--no-wildcards" };
        let skipped_long =
            if format == "ustar" { "--exclude=longlink --exclude=hard --exclude=nnn*" } else { "" };
        let order = "--sort=name";
        run(
            dir.path(),
            &format!(
                "tar --format={format} {order} {skipped} --wildcards {skipped_long} -cf {format}.tar t 2>err || grep -q 'long' err"
            ),
        );
        let entries = agrees_with_python(&dir.path().join(format!("{format}.tar")));
        assert!(entries.len() > 8, "{format}: {} entries", entries.len());
        let zero = entries.iter().find(|entry| entry.name == b"t/d/zero").unwrap();
        assert_eq!(zero.mtime.secs, 4_102_444_800);
        assert_eq!(zero.mtime.nanos, if format == "posix" { 123_456_789 } else { 0 });
    }
}

#[test]
fn data_lies_where_gnu_tar_says_and_is_reported_whole() {
    let dir = sample_folder();
    run(dir.path(), "tar --format=posix --sort=name -cf a.tar t");
    let tar = fs::read(dir.path().join("a.tar")).unwrap();
    let (entries, data) = parse_in(&[&tar]).unwrap();
    let mut expected = Vec::new();
    for entry in entries.iter().filter(|entry| entry.kind == EntryKind::Regular) {
        let path = dir.path().join(std::str::from_utf8(&entry.name).unwrap());
        let file = fs::read(path).unwrap();
        let start = entry.data_offset.get() as usize;
        assert_eq!(file, tar[start..start + entry.stored_len.get() as usize]);
        expected.extend(file);
    }
    assert_eq!(data, expected);
    // `tar -R` counts 512-byte blocks up to the header proper: the last block before the data.
    let listing =
        Command::new("tar").args(["-tRf", "a.tar"]).current_dir(dir.path()).output().unwrap();
    let listing = String::from_utf8(listing.stdout).unwrap();
    for (line, entry) in listing.lines().zip(&entries) {
        let block: u64 =
            line.strip_prefix("block ").unwrap().split(':').next().unwrap().parse().unwrap();
        assert_eq!(block * 512, entry.data_offset.get() - 512, "{line}");
    }
}

#[test]
fn sparse_files_of_every_version_give_the_same_pieces() {
    let dir = tempfile::tempdir().unwrap();
    run(
        dir.path(),
        "truncate -s 20M s; for i in $(seq 0 3 60); do printf 'data at %d' $i | dd of=s bs=4096 seek=$((i*16)) conv=notrunc status=none; done
         truncate -s 1M hole; truncate -s 3000000 tail; printf end | dd of=tail bs=1 seek=2999997 conv=notrunc status=none",
    );
    let mut reference: Option<Vec<Vec<(u64, u64)>>> = None;
    for options in [
        "--format=oldgnu",
        "--format=gnu",
        "--format=posix --sparse-version=0.0",
        "--format=posix --sparse-version=0.1",
        "--format=posix --sparse-version=1.0",
    ] {
        run(dir.path(), &format!("tar {options} --sparse -cf s.tar s hole tail"));
        let tar = fs::read(dir.path().join("s.tar")).unwrap();
        let entries = agrees_with_python(&dir.path().join("s.tar"));
        let mut all = Vec::new();
        for entry in &entries {
            let EntryContent::Sparse { size, pieces } = &entry.content else {
                panic!("{options}: not sparse")
            };
            // The pieces over zeros give the file.
            let mut file = vec![0; size.get() as usize];
            for piece in pieces {
                let (at, from, len) = (
                    piece.file_offset.get() as usize,
                    piece.tar_offset.get() as usize,
                    piece.len.get() as usize,
                );
                file[at..at + len].copy_from_slice(&tar[from..from + len]);
            }
            let name = std::str::from_utf8(&entry.name).unwrap();
            assert_eq!(file, fs::read(dir.path().join(name)).unwrap(), "{options} {name}");
            all.push(
                pieces.iter().map(|piece| (piece.file_offset.get(), piece.len.get())).collect(),
            );
        }
        assert_eq!(&all, reference.get_or_insert(all.clone()), "{options}");
    }
}

/// Runs a Python script that writes a tar through `t`, an open `tarfile`, and reads the result here.
fn python_tar(format: &str, script: &str) -> (tempfile::TempDir, Vec<TarEntry>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.tar");
    let script = format!(
        "import tarfile, io, sys\nt = tarfile.open(sys.argv[1], 'w', format=tarfile.{format})\n\
         def add(name, **k):\n    i = tarfile.TarInfo(name); d = k.pop('data', b'')\n    i.size = len(d)\n    \
         for a, v in k.items(): setattr(i, a, v)\n    t.addfile(i, io.BytesIO(d))\n{script}\nt.close()\n"
    );
    let output = Command::new("python3").arg("-c").arg(script).arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let entries = agrees_with_python(&path);
    (dir, entries)
}

#[test]
fn large_and_negative_numbers_of_gnu_and_pax_are_read() {
    let script = "add('a', uid=3000000000, gid=4294967294, mtime=-5, data=b'1')\nadd('b', uid=2**40, mtime=2**33+1)\nadd('c', type=tarfile.CHRTYPE, devmajor=300, devminor=70000)";
    for format in ["GNU_FORMAT", "PAX_FORMAT"] {
        let (_dir, entries) = python_tar(format, script);
        assert_eq!(
            (entries[0].uid, entries[0].gid, entries[0].mtime.secs),
            (3_000_000_000, 4_294_967_294, -5)
        );
        assert_eq!((entries[1].uid, entries[1].mtime.secs), (1 << 40, (1 << 33) + 1));
        assert_eq!(entries[2].kind, EntryKind::Char { major: 300, minor: 70000 });
    }
}

#[test]
fn attributes_and_global_records_reach_their_entries() {
    let script = "t.pax_headers = {'uid': '77', 'comment': 'x'}\nt.fileobj.write(t.tarinfo.create_pax_global_header({'uid': '77', 'mtime': '12.5'}))\nt.offset = t.fileobj.tell()\nadd('a', pax_headers={'SCHILY.xattr.user.x': 'v', 'SCHILY.xattr.user.empty': '', 'mtime': '-1.25'})\nadd('b', type=tarfile.DIRTYPE)";
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("g.tar");
    let script = format!(
        "import tarfile, io, sys\nt = tarfile.open(sys.argv[1], 'w', format=tarfile.PAX_FORMAT)\n\
         def add(name, **k):\n    i = tarfile.TarInfo(name)\n    for a, v in k.items(): setattr(i, a, v)\n    t.addfile(i)\n{script}\nt.close()\n"
    );
    let output = Command::new("python3").arg("-c").arg(script).arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let entries = parse(&fs::read(&path).unwrap()).unwrap();
    let expected = [(b"user.x".to_vec(), b"v".to_vec()), (b"user.empty".to_vec(), vec![])];
    assert_eq!(entries[0].xattrs, expected);
    assert_eq!(
        (entries[0].uid, entries[0].mtime),
        (77, Timestamp { secs: -2, nanos: 750_000_000 })
    );
    assert_eq!(
        (entries[1].uid, entries[1].mtime),
        (77, Timestamp { secs: 12, nanos: 500_000_000 })
    );
}

#[test]
fn attributes_written_by_gnu_tar_are_read() {
    let dir = sample_folder();
    let script = "setfattr -n user.turbo -v 'with = and \n newline' t/d/one && tar --format=posix --xattrs -cf x.tar t/d/one";
    if !Command::new("sh")
        .args(["-ec", script])
        .current_dir(dir.path())
        .output()
        .unwrap()
        .status
        .success()
    {
        return; // a filesystem without user attributes
    }
    let entries = parse(&fs::read(dir.path().join("x.tar")).unwrap()).unwrap();
    let expected = (b"user.turbo".to_vec(), b"with = and \n newline".to_vec());
    assert!(entries[0].xattrs.contains(&expected), "{:?}", entries[0].xattrs);
}

/// A header block with a correct checksum. Tests of invalid blocks change fields first.
fn block(name: &str, flag: u8, size: u64, change: impl Fn(&mut [u8; BLOCK])) -> Vec<u8> {
    let mut block = archive::header("placeholder", size).unwrap();
    block[..100].fill(0);
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[156] = flag;
    change(&mut block);
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.to_vec()
}

fn plain(name: &str, flag: u8, data: &[u8]) -> Vec<u8> {
    let mut out = block(name, flag, data.len() as u64, |_| {});
    out.extend(data);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (key, value) in records {
        let body = format!(" {key}={value}\n");
        let len = (1..).find(|digits| (body.len() + digits).to_string().len() == *digits).unwrap()
            + body.len();
        payload.extend(format!("{len}{body}").into_bytes());
    }
    plain("PaxHeaders/x", b'x', &payload)
}

const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

#[test]
fn a_v7_name_with_a_slash_is_a_directory_and_other_old_types_have_their_meaning() {
    let tar = [
        plain("d/", 0, b""),
        plain("f", 0, b"x"),
        plain("c", b'7', b"yy"),
        plain("V", b'V', b""),
        plain("dump", b'D', b"Yx\0\0"),
        plain("e", b'0', b""),
    ];
    let entries = parse(&[&tar.concat()[..], &END].concat()).unwrap();
    let kinds: Vec<_> = entries.iter().map(|entry| (entry.name.as_slice(), &entry.kind)).collect();
    use EntryKind::{Directory, Regular};
    assert_eq!(
        kinds,
        [
            (&b"d/"[..], &Directory),
            (b"f", &Regular),
            (b"c", &Regular),
            (b"dump", &Directory),
            (b"e", &Regular)
        ]
    );
}

#[test]
fn a_hard_link_has_data_only_when_no_header_follows() {
    let link = |data: &[u8]| {
        let mut out = block("l", b'1', 600, |block| block[157] = b'f');
        out.extend(data);
        out
    };
    let end = plain("e", b'0', b"z");
    for (tar, offset) in
        [([link(b""), end.clone()].concat(), 512), ([link(&[7; 1024]), end.clone()].concat(), 1536)]
    {
        let entries = parse(&tar).unwrap();
        assert_eq!(entries[0].kind, EntryKind::HardLink(b"f".to_vec()));
        assert_eq!(entries[0].stored_len, Bytes::ZERO);
        assert_eq!(entries[1].header_offset, Bytes(offset));
    }
    assert!(parse(&link(b"")).is_ok());
    assert!(matches!(parse(&link(&[7; 600])), Err(TarError::Truncated { .. })));
}

#[test]
fn a_long_name_and_pax_records_join_in_either_order() {
    let long = || plain("././@LongLink", b'L', b"long\0");
    let link = || plain("././@LongLink", b'K', b"target\0");
    let records = || pax(&[("mtime", "1.5"), ("path", "from-pax"), ("linkpath", "t")]);
    for extras in [[long(), link(), records()], [records(), link(), long()]] {
        let tar = [extras.concat(), block("short", b'2', 0, |_| {})].concat();
        let entries = parse(&tar).unwrap();
        assert_eq!(entries[0].name, b"long", "the long name wins, as for Go");
        assert_eq!(entries[0].kind, EntryKind::Symlink(b"target".to_vec()));
        assert_eq!(entries[0].mtime, Timestamp { secs: 1, nanos: 500_000_000 });
        assert_eq!(entries[0].header_offset, Bytes::ZERO);
    }
}

#[test]
fn what_breaks_a_rule_is_refused_with_name_and_offset() {
    let message = |tar: Vec<u8>| parse(&tar).unwrap_err().to_string();
    let cases = [
        (plain("a", b'M', b""), "Entry \"a\" at byte 0 has the unsupported type 'M'"),
        (plain("a", b'X', b""), "Entry \"a\" at byte 0 has the unsupported type 'X'"),
        (
            [plain("a", b'0', b""), vec![1; 512]].concat(),
            "The block at byte 512 is not a tar header: its checksum is wrong",
        ),
        (
            [plain("a", b'0', b""), vec![0; 512], plain("b", b'0', b"")].concat(),
            "A single zero block at byte 512 is followed by other data",
        ),
        (
            [END.to_vec(), vec![0; 700], vec![1]].concat(),
            "The tar ends before byte 1724, but data that is not zero follows there",
        ),
        (
            pax(&[("path", "b")]),
            "The tar ends after the extended header at byte 0, without the entry it describes",
        ),
        (
            [pax(&[("path", "a\0b")]), plain("a", b'0', b"")].concat(),
            "Entry \"a\" at byte 0 has a bad pax record path: it contains a NUL byte",
        ),
        (
            [plain("L", b'L', b"a\0b\0"), plain("a", b'0', b"")].concat(),
            "Entry \"L\" at byte 0 has a bad long name: it contains a NUL byte",
        ),
        (
            block("a", b'x', METADATA_LIMIT + 1, |_| {}),
            "Entry \"a\" at byte 0 has pax records of 1048577 bytes; at most 1048576 are accepted",
        ),
        (
            block("a", b'0', 0, |b| b[100..108].fill(b'9')),
            "Entry \"a\" at byte 0 has a bad mode: it is not an octal number",
        ),
        (
            block("a", b'0', 0, |b| b[124..136].fill(0xff)),
            "Entry \"a\" at byte 0 has a bad size: -1 is not in 0..=9223372036854775807",
        ),
        (
            plain("a", b'0', b"x")[..600].to_vec(),
            "The tar is cut short at byte 600, within the padding of entry \"a\" at byte 0",
        ),
        (
            plain("a", b'0', &[1; 100])[..600].to_vec(),
            "The tar is cut short at byte 600, within the data of entry \"a\" at byte 0",
        ),
        (
            [
                pax(&[("GNU.sparse.map", "0,5,3,5"), ("GNU.sparse.size", "100")]),
                plain("a", b'0', &[1; 10]),
            ]
            .concat(),
            "Entry \"a\" at byte 0 has a bad sparse map: sparse pieces overlap or are not in order",
        ),
        (
            [
                pax(&[("GNU.sparse.map", "0,5"), ("GNU.sparse.size", "100")]),
                plain("a", b'0', &[1; 10]),
            ]
            .concat(),
            "Entry \"a\" at byte 0 has a bad sparse map: the sparse pieces do not add up to the stored data",
        ),
        (
            [pax(&[("size", "9223372036854775807")]), plain("a", b'0', &[])].concat(),
            "Entry \"a\" at byte 0 has a bad size: the data would end past 63 bits",
        ),
    ];
    for (tar, expected) in cases {
        assert_eq!(message(tar), expected);
    }
    assert_eq!(parse(b""), Ok(vec![]));
    assert_eq!(parse(&[0; 512]), Ok(vec![]));
}

/// A small tar with every kind of extra entry.
fn varied() -> Vec<u8> {
    let mut sparse = [pax(&[
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.realsize", "9000"),
        ("GNU.sparse.name", "sp"),
    ])]
    .concat();
    let mut map = b"2\n0\n3\n4096\n4\n".to_vec();
    map.resize(BLOCK, 0);
    sparse.extend(plain("GNUSparseFile/sp", b'0', &[map, b"abcdefg".to_vec()].concat()));
    let old = |flag: u8| {
        block("old", flag, 5, |block| {
            block[257..265].copy_from_slice(b"ustar  \0");
            block[386..410].copy_from_slice(b"00000000000\x0000000000005\0");
            block[482] = 1;
            block[483..495].copy_from_slice(b"00000010000\0");
        })
    };
    let tar = [
        plain("d/", b'5', b""),
        pax(&[("path", "d/p"), ("SCHILY.xattr.user.a", "1"), ("mtime", "1.5")]),
        plain("x", b'0', &[5; 1000]),
        plain("L", b'L', b"d/long\0"),
        plain("x", b'0', b"y"),
        sparse,
        old(b'S'),
        vec![0; BLOCK],
        plain("", 0, b"hello")[BLOCK..].to_vec(),
        block("l", b'1', 0, |block| block[157] = b'x'),
        END.to_vec(),
    ];
    tar.concat()
}

#[test]
fn every_truncation_is_an_end_or_an_error() {
    let tar = varied();
    let whole = parse(&tar).unwrap();
    assert_eq!(whole.len(), 6);
    for len in 0..tar.len() {
        if let Ok(entries) = parse(&tar[..len]) {
            assert_eq!(len % BLOCK, 0);
            assert_eq!(entries[..], whole[..entries.len()]);
        }
    }
}

#[test]
fn no_flipped_bit_makes_the_parser_panic() {
    let mut tar = varied();
    let whole = parse(&tar).unwrap();
    for bit in 0..tar.len() * 8 {
        tar[bit / 8] ^= 1 << (bit % 8);
        if let Ok(entries) = parse(&tar) {
            // Only pax text, names and data are not covered by a checksum.
            assert!(!entries.is_empty() && entries.len() <= whole.len());
        }
        tar[bit / 8] ^= 1 << (bit % 8);
    }
}

proptest! {
    #[test]
    fn the_size_of_the_pieces_changes_nothing(cuts in prop::collection::vec(0usize..1usize << 16, 0..40)) {
        let tar = varied();
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut % (tar.len() + 1)).chain([0, tar.len()]).collect();
        cuts.sort_unstable();
        let pieces: Vec<_> = cuts.windows(2).map(|pair| &tar[pair[0]..pair[1]]).collect();
        prop_assert_eq!(parse_in(&pieces), parse_in(&[&tar]));
    }

    #[test]
    fn no_bytes_make_the_parser_panic(head in prop::collection::vec(any::<u8>(), 0..2000), records in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&head);
        let _ = parse(&[plain("x", b'x', &records), plain("a", b'0', b"")].concat());
        let field: [u8; 24] = std::array::from_fn(|at| head.get(at).copied().unwrap_or_default());
        let _ = parse(&block("a", b'S', 5, |block| block[386..410].copy_from_slice(&field)));
        let _ = parse(&block("a", b'3', 5, |block| block[100..124].copy_from_slice(&field)));
    }
}

/// A layer of the interop vectors, unpacked.
fn interop_layer(name: &str) -> Vec<u8> {
    use std::io::Read as _;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/interop/blobs").join(name);
    let mut tar = Vec::new();
    flate2::read::MultiGzDecoder::new(fs::File::open(path).unwrap()).read_to_end(&mut tar).unwrap();
    tar
}

#[test]
fn the_interop_layers_read_as_python_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    for layer in ["base.tar.gz", "upper.tar.gz"] {
        let path = dir.path().join(layer);
        fs::write(&path, interop_layer(layer)).unwrap();
        assert!(agrees_with_python(&path).len() > 300);
    }
}

/// Shows figures with `cargo test --release --lib tar::tests::many -- --nocapture`. Its bounds are far above
/// the time that any machine needs, and below that of a parser that looks at the same bytes again and again.
#[test]
fn many_entries_and_much_data_take_no_time_to_speak_of() {
    let headers: Vec<u8> = (0..200_000)
        .flat_map(|at| block(&format!("usr/share/doc/file-{at}"), b'0', 0, |_| {}))
        .collect();
    let with_pax: Vec<u8> = (0..50_000)
        .flat_map(|at| {
            [
                pax(&[("mtime", "1700000000.123"), ("path", &format!("usr/{at}"))]),
                plain("x", b'0', b"y"),
            ]
            .concat()
        })
        .collect();
    let data = plain("x", b'0', &vec![1; 1 << 28]);
    for (what, tar, entries) in
        [("headers", headers, 200_000), ("pax", with_pax, 50_000), ("data", data, 1)]
    {
        let start = std::time::Instant::now();
        let (mut parser, mut seen) = (Parser::new(), 0);
        for piece in tar.chunks(1 << 17) {
            parser
                .feed::<TarError>(piece, &mut |_| {
                    seen += 1;
                    Ok(())
                })
                .unwrap();
        }
        parser.finish().unwrap();
        assert_eq!(seen, entries);
        let time = start.elapsed();
        println!(
            "{what}: {time:?}, {:?} an entry, {:.1} GB/s",
            time / entries,
            tar.len() as f64 / time.as_secs_f64() / 1e9
        );
        assert!(time < std::time::Duration::from_secs(10), "{what}: {time:?}");
    }
}
