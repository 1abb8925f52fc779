//! Any text as a name of an image, a repository and a digest: an accepted name prints to text that parses to
//! the same name.
#![no_main]

use formats::oci::{Digest, ImageName, RepositoryName};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string().parse(), Ok(digest));
    }
    if let Ok(repository) = text.parse::<RepositoryName>() {
        assert_eq!(repository.to_string().parse(), Ok(repository));
    }
    if let Ok(name) = text.parse::<ImageName>() {
        // The default tag is printed.
        let printed = name.to_string();
        let again: ImageName = printed.parse().unwrap();
        assert_eq!(again.to_string(), printed);
        assert_eq!(again.repository(), name.repository());
        if let (ImageName::Registry(name), ImageName::Registry(again)) = (name, again) {
            assert_eq!(again.reference(), name.reference());
        }
    }
});
