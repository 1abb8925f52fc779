//! Which runs are made, in their order, and how much disk they need.
//!
//! A full run goes by what is asked first: the four published images on `cloud` and `lan`, then the other images
//! there, then four images on the slow lines. In a group of one image and one network the rounds are outside and the
//! rows inside: so the runs of a cell are spread over the group's time, and a slow minute meets all rows.

use crate::arguments::Arguments;
use crate::failure::Failure;
use crate::images::Definition;
use crate::network::shape::{SHAPES, Shape};
use crate::systems::System;

/// Rounds of the published images.
const PUBLISHED: u32 = 5;

/// Rounds of the others.
const OTHERS: u32 = 3;

/// Images that are also measured on the slow lines in a full run.
const SLOW: [&str; 4] = ["php-laravel-nginx", "tiny", "many-files", "weights-small"];

/// Images that a full run does not start on the fast lines: the one of `--quick`, and the one for slow lines.
const ASIDE: [&str; 2] = ["small-web", "weights-small"];

/// Image and network of `--quick`.
const QUICK: (&str, &str) = ("small-web", "cloud");

/// Disk that is left free beside what an image needs, in MB.
const SPARE_MB: u64 = 2_000;

/// Runs of one image on one network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Name of the image.
    pub(crate) image: String,
    /// Name of the network.
    pub(crate) network: &'static str,
    /// Rounds.
    pub(crate) rounds: u32,
    /// Containers at once, one number after the other.
    pub(crate) counts: Vec<u32>,
}

/// The batches that the command line asks for.
pub(crate) fn batches(arguments: &Arguments, images: &[Definition]) -> Result<Vec<Batch>, Failure> {
    let networks = networks(&arguments.net)?;
    let batch = |image: &str, network, rounds| Batch {
        image: image.to_owned(),
        network,
        rounds: arguments.rounds.unwrap_or(rounds),
        counts: arguments.count.clone(),
    };
    if arguments.image.is_some() {
        let chosen = if networks.is_empty() { vec!["cloud"] } else { networks };
        return Ok(chosen.into_iter().map(|network| batch("yours", network, OTHERS)).collect());
    }
    let names: Vec<&str> = images.iter().map(|image| image.name.as_str()).collect();
    let known = |name: &&String| !names.contains(&name.as_str()) && name.as_str() != "all";
    if let Some(unknown) = arguments.images.iter().find(known) {
        return Err(unknown_name("image", unknown, &names));
    }
    if arguments.quick {
        let image = arguments.images.first().map_or(QUICK.0, String::as_str);
        let network = networks.first().copied().unwrap_or(QUICK.1);
        return Ok(vec![batch(image, network, 1)]);
    }
    let rounds = |image: &Definition| if image.published { PUBLISHED } else { OTHERS };
    if !arguments.images.is_empty() || !networks.is_empty() {
        let wanted = |image: &&Definition| {
            let all =
                arguments.images.is_empty() || arguments.images.iter().any(|name| name == "all");
            all || arguments.images.contains(&image.name)
        };
        let chosen = if networks.is_empty() { vec!["cloud", "lan"] } else { networks };
        let images = images.iter().filter(wanted);
        let pairs = images.flat_map(|image| chosen.iter().map(move |network| (image, *network)));
        return Ok(pairs
            .map(|(image, network)| batch(&image.name, network, rounds(image)))
            .collect());
    }
    let mut all = Vec::new();
    for published in [true, false] {
        for image in images
            .iter()
            .filter(|image| image.published == published && !ASIDE.contains(&image.name.as_str()))
        {
            for network in ["cloud", "lan"] {
                all.push(batch(&image.name, network, rounds(image)));
            }
        }
    }
    for network in ["far", "edge"] {
        for image in images.iter().filter(|image| SLOW.contains(&image.name.as_str())) {
            all.push(batch(&image.name, network, OTHERS));
        }
    }
    Ok(all)
}

/// Networks by name.
fn networks(names: &[String]) -> Result<Vec<&'static str>, Failure> {
    let known = SHAPES.map(|shape| shape.name);
    let find = |name: &String| {
        Shape::named(name)
            .map(|shape| shape.name)
            .ok_or_else(|| unknown_name("network", name, &known))
    };
    names.iter().map(find).collect()
}

/// Rows that the command line asks for, in the order of the table.
pub(crate) fn rows(
    arguments: &Arguments,
    mut all: Vec<Box<dyn System>>,
) -> Result<Vec<Box<dyn System>>, Failure> {
    let names: Vec<&str> = all.iter().map(|row| row.name()).collect();
    let peers: Vec<&str> = all.iter().map(|row| row.peer()).collect();
    for name in &arguments.formats {
        if !names.contains(&name.as_str()) {
            return Err(unknown_name("row", name, &names));
        }
    }
    for peer in &arguments.peers {
        if !peers.contains(&peer.as_str()) {
            return Err(unknown_name("system", peer, &peers));
        }
    }
    let asked = !arguments.formats.is_empty() || !arguments.peers.is_empty();
    // turbobd's rows and the one that they are compared with.
    let own = ["turbobd", "containerd"];
    let few = arguments.quick || arguments.image.is_some();
    all.retain(|row| {
        let named = arguments.formats.iter().any(|name| name == row.name())
            || arguments.peers.iter().any(|name| name == row.peer());
        let of_the_few = own.contains(&row.peer()) && row.name() != "overlayfs-3";
        // All ratios are to this row.
        named || row.name() == "overlayfs" || (!asked && (!few || of_the_few))
    });
    Ok(all)
}

fn unknown_name(kind: &str, name: &str, known: &[&str]) -> Failure {
    let mut known = known.to_vec();
    known.dedup();
    Failure::Invalid(format!("there is no {kind} {name}; there are: {}", known.join(", ")))
}

/// Fails if the disk has not the room that the image needs.
pub(crate) fn need_disk(image: &str, disk_mb: u64, free_bytes: u64) -> Result<(), Failure> {
    let (need, free) = (disk_mb + SPARE_MB, free_bytes / 1_000_000);
    if free >= need {
        return Ok(());
    }
    let why = format!("it needs {need} MB of disk with what is left free, and {free} MB are free");
    Err(Failure::cannot(format!("measure {image}"), why))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn arguments(line: &str) -> Arguments {
        Arguments::parse_from(std::iter::once("sat").chain(line.split_whitespace()))
    }

    fn image(name: &str, published: bool) -> Definition {
        let text = format!(
            "{{\"like\": \"x\", \"published\": {published}, \"layers\": [\"debian\"], \"command\": [\"c\"],
              \"path\": \"/\", \"expect\": \"y\", \"disk_mb\": 100}}"
        );
        let mut image: Definition = serde_json::from_str(&text).unwrap();
        image.name = name.into();
        image
    }

    fn planned(line: &str) -> Vec<String> {
        let images =
            [image("php-laravel-nginx", true), image("small-web", false), image("tiny", false)];
        let batches = batches(&arguments(line), &images).unwrap();
        batches.iter().map(|b| format!("{} {} {}", b.image, b.network, b.rounds)).collect()
    }

    #[test]
    fn a_full_run_has_the_published_images_first_and_the_slow_lines_last() {
        let expected = [
            "php-laravel-nginx cloud 5",
            "php-laravel-nginx lan 5",
            "tiny cloud 3",
            "tiny lan 3",
            "php-laravel-nginx far 3",
            "tiny far 3",
            "php-laravel-nginx edge 3",
            "tiny edge 3",
        ];
        assert_eq!(planned(""), expected);
        assert_eq!(planned("--quick"), ["small-web cloud 1"]);
        assert_eq!(planned("--images tiny --net edge --rounds 7"), ["tiny edge 7"]);
        assert_eq!(planned("--image a:1 --ready http://127.0.0.1:1/"), ["yours cloud 3"]);
    }

    #[test]
    fn an_unknown_name_is_answered_by_the_known_ones() {
        for line in ["--images no", "--net no"] {
            let failure =
                batches(&arguments(line), &[image("tiny", false)]).unwrap_err().to_string();
            assert!(failure.contains("tiny") || failure.contains("cloud"), "{failure}");
        }
        for line in ["--formats no", "--peers no"] {
            let Err(failure) = rows(&arguments(line), crate::systems::all()) else {
                panic!("{line}")
            };
            let failure = failure.to_string();
            assert!(failure.contains("turbobd"), "{failure}");
        }
    }

    #[test]
    fn every_choice_of_rows_has_the_one_that_ratios_are_to() {
        let names = |line: &str| -> Vec<&'static str> {
            rows(&arguments(line), crate::systems::all())
                .unwrap()
                .iter()
                .map(|row| row.name())
                .collect()
        };
        assert_eq!(names("--formats turbobd-first"), ["overlayfs", "turbobd-first"]);
        assert_eq!(names("--quick").len(), 8);
        assert!(names("").len() > 12);
        assert!(names("--peers nydus").contains(&"nydus-zran"));
    }

    #[test]
    fn a_full_disk_is_said_before_anything_is_built() {
        assert!(need_disk("x", 1000, 3_000_000_000).is_ok());
        let failure = need_disk("x", 1001, 3_000_000_000).unwrap_err().to_string();
        assert!(failure.contains("3001 MB") && failure.contains("3000 MB are free"), "{failure}");
    }
}
