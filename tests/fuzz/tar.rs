//! Any bytes as a tar stream, in pieces of any size: the sizes must not matter.
#![no_main]

#[path = "checksums.rs"]
mod checksums;

use formats::tar::{Parser, TarError, TarEvent};
use libfuzzer_sys::fuzz_target;

/// The parser's entries, each with its data, and its result.
type Seen = (Vec<(String, Vec<u8>)>, Result<(), TarError>);

fn entries(data: &[u8], piece: usize) -> Seen {
    let mut found: Vec<(String, Vec<u8>)> = Vec::new();
    let mut parser = Parser::with_data();
    for piece in data.chunks(piece) {
        let fed = parser.feed(piece, &mut |event| {
            match event {
                TarEvent::Entry(entry) => found.push((format!("{entry:?}"), Vec::new())),
                TarEvent::Data(bytes) => found.last_mut().unwrap().1.extend_from_slice(bytes),
            }
            Ok(())
        });
        if let Err(error) = fed {
            return (found, Err(error));
        }
    }
    (found, parser.finish().map(|_| ()))
}

fuzz_target!(|data: &[u8]| {
    let Some((&piece, data)) = data.split_first() else { return };
    let mut data = data.to_vec();
    checksums::tar(&mut data);
    assert_eq!(entries(&data, usize::MAX), entries(&data, usize::from(piece) + 1));
});
