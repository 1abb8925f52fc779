//! Any bytes as a tar stream, in pieces of any size: the pieces must not matter.
#![no_main]

use libfuzzer_sys::fuzz_target;
use turbobd::tar::{Event, Parser, TarError};

fn entries(data: &[u8], piece: usize) -> (Vec<String>, Result<(), TarError>) {
    let mut found = Vec::new();
    let mut parser = Parser::new();
    for piece in data.chunks(piece) {
        let fed = parser.feed(piece, &mut |event| {
            if let Event::Entry(entry) = event {
                found.push(format!("{entry:?}"));
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
    let (whole, end) = entries(data, usize::MAX);
    let piece = data.first().map_or(1, |&byte| usize::from(byte) + 1);
    assert_eq!((whole, end), entries(data, piece));
});
