//! Layers as an OCI image layout, and the user's own image as one.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::layer::{Layer, hex};
use super::{Definition, Image, TAG};
use crate::failure::{Attempt as _, Failure};
use crate::measure::answer::Question;
use crate::place::Place;
use crate::program;

/// Port of container 0 of the images of this repository.
pub(crate) const PORT: u16 = 18080;

/// Longest download of the user's image.
const COPY: Duration = Duration::from_secs(1800);

/// Makes the layout of an image, by hard links to its layers.
pub(super) fn from_layers(
    place: &Place,
    definition: &Definition,
    layers: &[Layer],
) -> Result<Image, Failure> {
    let layout = place.folder("layouts")?.join(&definition.name);
    let cannot = || format!("make the layout {}", layout.display());
    if layout.exists() {
        fs::remove_dir_all(&layout).attempt(cannot)?;
    }
    fs::create_dir_all(layout.join("blobs/sha256")).attempt(cannot)?;
    for layer in layers {
        fs::hard_link(layer.blob(), blob(&layout, &layer.digest)).attempt(cannot)?;
    }
    let environment = environment(&definition.environment);
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
    let config = json!({
        "created": "2026-11-01T00:00:00Z", "architecture": architecture, "os": "linux",
        "config": { "Env": environment, "Cmd": definition.command },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let (config, config_size) = put(&layout, &config)?;
    let kind = |name: &str| format!("application/vnd.oci.image.{name}");
    let descriptors: Vec<Value> = layers
        .iter()
        .map(|layer| json!({ "mediaType": kind("layer.v1.tar+gzip"), "digest": layer.digest, "size": layer.size }))
        .collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": kind("manifest.v1+json"),
        "config": { "mediaType": kind("config.v1+json"), "digest": config, "size": config_size },
        "layers": descriptors,
    });
    let (manifest, manifest_size) = put(&layout, &manifest)?;
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{ "mediaType": kind("manifest.v1+json"), "digest": manifest, "size": manifest_size,
            "annotations": { "org.opencontainers.image.ref.name": TAG } }],
    });
    fs::write(layout.join("index.json"), index.to_string()).attempt(cannot)?;
    fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").attempt(cannot)?;
    let post = definition.post.as_ref().map(|name| place.images().join(name));
    let body = post.map(|file| fs::read(&file).attempt(|| format!("read {}", file.display())));
    Ok(Image {
        name: definition.name.clone(),
        like: definition.like.clone(),
        layout,
        compressed: layers.iter().map(|layer| layer.size).sum(),
        unpacked: layers.iter().map(|layer| layer.unpacked).sum(),
        layers: layers.len(),
        command: definition.command.clone(),
        environment,
        directory: String::new(),
        user: String::new(),
        question: Question {
            port: PORT,
            path: definition.path.clone(),
            body: body.transpose()?,
            expect: definition.expect.clone(),
        },
        port_variable: "PORT".into(),
    })
}

/// The environment with a PATH, if it has none.
fn environment(own: &[String]) -> Vec<String> {
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let missing = !own.iter().any(|variable| variable.starts_with("PATH="));
    missing.then(|| path.to_owned()).into_iter().chain(own.iter().cloned()).collect()
}

/// Stores a document as a blob; its digest and size.
fn put(layout: &Path, document: &Value) -> Result<(String, usize), Failure> {
    let text = document.to_string();
    let digest = format!("sha256:{}", hex(&Sha256::digest(&text)));
    fs::write(blob(layout, &digest), &text).attempt(|| "write a document of a layout".into())?;
    Ok((digest, text.len()))
}

fn blob(layout: &Path, digest: &str) -> std::path::PathBuf {
    layout.join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap_or(digest))
}

/// Copies the user's image into a layout; its command is `command`, or the image's own.
pub(crate) fn of_the_user(
    place: &Place,
    reference: &str,
    command: Option<&str>,
    ready: &str,
    expect: &str,
) -> Result<Image, Failure> {
    let (port, path) = address(ready)?;
    let layout = place.folder("layouts")?.join("yours");
    if layout.exists() {
        fs::remove_dir_all(&layout).attempt(|| format!("remove {}", layout.display()))?;
    }
    let skopeo = program::find("skopeo", &[])
        .ok_or_else(|| Failure::missing("skopeo", "apt-get install skopeo"))?;
    // A plain name is one in a registry, as on the command line of turbobd.
    let known =
        ["docker:", "oci:", "oci-archive:", "docker-archive:", "dir:", "containers-storage:"];
    let from = match known.iter().any(|scheme| reference.starts_with(scheme)) {
        true => reference.to_owned(),
        false => format!("docker://{reference}"),
    };
    let mut copy = Command::new(skopeo);
    copy.args(["copy", "--quiet"]);
    if from.starts_with("docker://127.0.0.1") || from.starts_with("docker://localhost") {
        copy.arg("--src-tls-verify=false");
    }
    copy.arg(&from).arg(format!("oci:{}:{TAG}", layout.display()));
    eprintln!("copying {reference}");
    program::run(&copy, COPY)?;
    let index = document(&layout.join("index.json"))?;
    let manifest = document(&named(&layout, &index["manifests"][0])?)?;
    let config = document(&named(&layout, &manifest["config"])?)?;
    let layers = manifest["layers"].as_array().cloned().unwrap_or_default();
    let strings = |value: &Value| -> Vec<String> {
        let all = value.as_array().into_iter().flatten();
        all.filter_map(|text| text.as_str().map(str::to_owned)).collect()
    };
    let own = &config["config"];
    let command = match command {
        Some(command) => words(command)?,
        None => [strings(&own["Entrypoint"]), strings(&own["Cmd"])].concat(),
    };
    if command.is_empty() {
        return Err(Failure::Invalid(format!("{reference} names no command: give one by --cmd")));
    }
    Ok(Image {
        name: "yours".into(),
        like: reference.to_owned(),
        compressed: layers.iter().filter_map(|layer| layer["size"].as_u64()).sum(),
        // Not known without unpacking it.
        unpacked: 0,
        layers: layers.len(),
        layout,
        command,
        environment: environment(&strings(&own["Env"])),
        directory: own["WorkingDir"].as_str().unwrap_or_default().to_owned(),
        user: own["User"].as_str().unwrap_or_default().to_owned(),
        question: Question { port, path, body: None, expect: expect.to_owned() },
        port_variable: String::new(),
    })
}

/// Unpacks the layers of a layout below `root`, the lowest first, with their whiteouts.
pub(crate) fn unpack(layout: &Path, root: &Path) -> Result<(), Failure> {
    fs::create_dir_all(root).attempt(|| format!("make {}", root.display()))?;
    let index = document(&layout.join("index.json"))?;
    let manifest = document(&named(layout, &index["manifests"][0])?)?;
    for layer in manifest["layers"].as_array().into_iter().flatten() {
        let blob = named(layout, layer)?;
        let mut tar = Command::new("tar");
        tar.args(["--numeric-owner", "-xzf"]).arg(&blob).arg("-C").arg(root);
        program::run(&tar, COPY)?;
        // A whiteout hides a name of a lower layer; what the same layer adds beside it has another name.
        let mut find = Command::new("find");
        find.arg(root).args(["-name", ".wh.*", "-printf", "%p\\0"]);
        for whiteout in program::run(&find, COPY)?.split('\0').filter(|name| !name.is_empty()) {
            let whiteout = Path::new(whiteout);
            let name = whiteout.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let hidden = whiteout.with_file_name(name.trim_start_matches(".wh."));
            let cannot = || format!("apply {}", whiteout.display());
            fs::remove_file(whiteout).attempt(cannot)?;
            if hidden.is_dir() && !hidden.is_symlink() {
                fs::remove_dir_all(&hidden).attempt(cannot)?;
            } else if hidden.symlink_metadata().is_ok() {
                fs::remove_file(&hidden).attempt(cannot)?;
            }
        }
    }
    Ok(())
}

fn document(file: &Path) -> Result<Value, Failure> {
    let text = fs::read_to_string(file).attempt(|| format!("read {}", file.display()))?;
    serde_json::from_str(&text).attempt(|| format!("understand {}", file.display()))
}

fn named(layout: &Path, descriptor: &Value) -> Result<std::path::PathBuf, Failure> {
    let digest = descriptor["digest"].as_str();
    let digest = digest.ok_or_else(|| Failure::Invalid("the layout names no blob".into()))?;
    Ok(blob(layout, digest))
}

/// Port and path of an address of this host.
fn address(url: &str) -> Result<(u16, String), Failure> {
    let wrong = || {
        Failure::Invalid(format!(
            "--ready {url} must have the form http://127.0.0.1:PORT/PATH: containers use the host's network"
        ))
    };
    let rest = url.strip_prefix("http://").ok_or_else(wrong)?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = host.split_once(':').unwrap_or((host, "80"));
    if !matches!(host, "127.0.0.1" | "localhost") {
        return Err(wrong());
    }
    let port = port.parse().map_err(|_| wrong())?;
    Ok((port, format!("/{path}")))
}

/// Words of a command; single and double quotes hold blanks together.
fn words(command: &str) -> Result<Vec<String>, Failure> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for letter in command.chars() {
        match (quote, letter) {
            (Some(open), _) if open == letter => quote = None,
            (None, '\'' | '"') => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            (None, ' ' | '\t' | '\n') => words.extend(word.take()),
            _ => word.get_or_insert_default().push(letter),
        }
    }
    if quote.is_some() {
        return Err(Failure::Invalid(format!("--cmd {command} has an open quote")));
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_split_at_blanks_outside_quotes() {
        let split = |text| words(text).unwrap();
        assert_eq!(
            split("python3  -c 'a b' \"c 'd'\" e''f ''"),
            ["python3", "-c", "a b", "c 'd'", "ef", ""]
        );
        assert_eq!(split(" "), Vec::<String>::new());
        assert!(words("a 'b").is_err());
    }

    #[test]
    fn only_addresses_of_this_host_are_taken() {
        assert_eq!(address("http://127.0.0.1:8080/a?b").unwrap(), (8080, "/a?b".into()));
        assert_eq!(address("http://localhost").unwrap(), (80, "/".into()));
        for wrong in ["https://127.0.0.1:1/", "http://example.org/", "http://127.0.0.1:x/"] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
    }
}
