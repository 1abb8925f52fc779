//! Kubernetes' interface of containerd (CRI), by crictl: pods on the host's network, whose images our snapshotter serves.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::image::{self, Images, OCI_CONFIG, OCI_GZIP, OCI_MANIFEST, end, gzip};
use crate::machine::{self, run};
use crate::snapshotter_containers::{Host, PLUGIN, Published, program, until};
use crate::stack::{Release, Stack};

/// Network of a pod that shares the host's: no plugin of a network is needed.
const HOST_NETWORK: u32 = 2;

/// CRI of a containerd, with crictl of the newest release as its client.
struct Cri {
    host: Host,
    crictl: Release,
}

/// Puts an image into the registry that waits for its end: the container that holds a pod's namespaces.
fn publish_pause(published: &Published) -> String {
    let images = Images::new();
    let layer = gzip(&program());
    let layers = [(OCI_GZIP, layer)];
    let mut config: Value = serde_json::from_str(&image::config_of(&layers)).unwrap();
    config["config"] = json!({"Entrypoint": ["/busybox", "sleep", "1000000"]});
    let manifest = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": images.descriptor(OCI_CONFIG, config.to_string().as_bytes()),
        "layers": [images.descriptor(OCI_GZIP, &layers[0].1)]
    });
    images.set_manifest("pause", &manifest);
    published.push(&images, "pause");
    published.name("pause")
}

impl Cri {
    fn start(release: &Release, crictl: Release, pause: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cni = dir.path().join("cni").display().to_string();
        let head = "disabled_plugins = [\"io.containerd.nri.v1.nri\"]\n";
        let host = Host::with_stack(&json!({}), |plugin| {
            // runc may not lower a process's score of the OOM killer everywhere; the pause container asks for that.
            let (version, settings) = if release.is_newest() {
                let settings = format!(
                    "[plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"{PLUGIN}\"\n  disable_snapshot_annotations = false\n\
                     [plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = \"{pause}\"\n\
                     [plugins.\"io.containerd.cri.v1.runtime\"]\n  restrict_oom_score_adj = true\n\
                     [plugins.\"io.containerd.cri.v1.runtime\".cni]\n  conf_dir = \"{cni}\"\n"
                );
                (3, settings)
            } else {
                let settings = format!(
                    "[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"{pause}\"\n  restrict_oom_score_adj = true\n\
                     [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"{PLUGIN}\"\n  disable_snapshot_annotations = false\n\
                     [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n\
                     [plugins.\"io.containerd.grpc.v1.cri\".cni]\n  conf_dir = \"{cni}\"\n"
                );
                (2, settings)
            };
            Stack::with_config(release, dir, version, head, &format!("{plugin}{settings}"))
        });
        let cri = Self { host, crictl };
        until("CRI answers", || end(cri.crictl().arg("version")).code == Some(0));
        cri
    }

    fn crictl(&self) -> Command {
        let socket = format!("unix://{}", self.host.stack.socket().display());
        let mut crictl = self.crictl.command("crictl");
        crictl.args([
            "--timeout",
            "60s",
            "--runtime-endpoint",
            &socket,
            "--image-endpoint",
            &socket,
        ]);
        crictl
    }

    /// Runs crictl, which must succeed; returns its stdout.
    #[track_caller]
    fn done(&self, args: &[&str]) -> String {
        let ended = end(self.crictl().args(args));
        assert_eq!(ended.code, Some(0), "crictl {args:?}: {}\n{}", ended.stderr, self.host.log());
        ended.stdout.trim_end().to_owned()
    }

    /// Writes a document for crictl; returns its path.
    fn document(&self, name: &str, document: &Value) -> String {
        let path = self.host.stack.path().join(name);
        fs::write(&path, document.to_string()).unwrap();
        path.display().to_string()
    }

    /// Runs a pod with one container to its end; returns what the container wrote.
    fn pod(&self, name: &str, image: &str, command: &[&str]) -> String {
        let logs = self.host.stack.path().join("logs");
        let linux = json!({"security_context": {"namespace_options": {"network": HOST_NETWORK}}});
        let pod = json!({
            "metadata": {"name": name, "namespace": "default", "uid": name, "attempt": 1},
            "log_directory": logs, "linux": linux
        });
        let container = json!({
            "metadata": {"name": name}, "image": {"image": image}, "command": command,
            "log_path": format!("{name}.log"), "linux": linux
        });
        let pod = self.document("pod.json", &pod);
        let container = self.document("container.json", &container);
        let sandbox = self.done(&["runp", &pod]);
        let id = self.done(&["create", &sandbox, &container, &pod]);
        self.done(&["start", &id]);
        until("the container ends", || {
            let state: Value = serde_json::from_str(&self.done(&["inspect", &id])).unwrap();
            state["status"]["state"] == "CONTAINER_EXITED"
        });
        let state: Value = serde_json::from_str(&self.done(&["inspect", &id])).unwrap();
        let log = fs::read_to_string(logs.join(format!("{name}.log"))).unwrap_or_default();
        assert_eq!(state["status"]["exitCode"], 0, "{log}\n{state:#}");
        self.done(&["rmp", "--force", &sandbox]);
        // TIME STREAM TAG TEXT
        log.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect::<Vec<_>>().join("\n")
    }

    fn blobs(&self) -> String {
        run(self.host.stack.ctr().args(["-n", "k8s.io", "content", "ls", "-q"]))
    }
}

#[test]
fn a_pod_runs_from_images_that_cri_pulls_lazily() {
    machine::need_root();
    let Some(published) = Published::new() else { return };
    let Some(newest) = Release::newest() else { return };
    let pause = publish_pause(&published);
    for release in Release::all() {
        let cri = Cri::start(&release, newest.clone(), &pause);
        for tag in ["latest", "turbo", "native"] {
            let image = published.name(tag);
            cri.done(&["pull", &image]);
            let name = format!("turbobd-{tag}-{}", std::process::id());
            let text = cri.pod(&name, &image, &["/busybox", "cat", "/etc/text"]);
            assert_eq!(text, "second", "{tag}: {}", cri.host.log());
        }
        let fetched = cri.blobs();
        for layer in published.layers("latest").iter().chain(&published.layers("native")) {
            assert!(!fetched.contains(layer), "{layer} was fetched: {}", cri.host.log());
        }
        // What the kubelet asks for: the folder of the image file system, which must be there. 1.6.20 does not know the
        // plugin's `exports.root`, and names a folder by the plugin's name, which is our root by default.
        let info: Value = serde_json::from_str(&cri.done(&["imagefsinfo"])).unwrap();
        let place = info["status"]["imageFilesystems"][0]["fsId"]["mountpoint"].as_str().unwrap();
        assert!(!release.is_newest() || Path::new(place).is_dir(), "{info:#}");
        assert!(release.is_newest() || place.ends_with("io.containerd.snapshotter.v1.overlaybd"));
        for image in ["latest", "turbo", "native", "pause"] {
            cri.done(&["rmi", &published.name(image)]);
        }
        until("the images' blobs go", || cri.blobs().is_empty());
    }
}

#[test]
fn a_pod_runs_from_an_image_that_rpull_has_pulled_for_cri() {
    machine::need_root();
    let Some(published) = Published::new() else { return };
    let Some(newest) = Release::newest() else { return };
    let pause = publish_pause(&published);
    for release in Release::all() {
        let cri = Cri::start(&release, newest.clone(), &pause);
        let image = published.name("latest");
        let mut rpull = image::turbobd();
        rpull.args(["rpull", "-n", "k8s.io", "--address"]).arg(cri.host.stack.socket()).arg(&image);
        let told = end(&mut rpull);
        assert!(told.stderr.contains("3 lazy"), "{}\n{}", told.stderr, cri.host.log());
        // CRI learns of it by an event.
        until("CRI knows the image", || cri.done(&["images", "-o", "json"]).contains(&image));
        let name = format!("turbobd-rpull-{}", std::process::id());
        assert_eq!(cri.pod(&name, &image, &["/busybox", "cat", "/etc/text"]), "second");
        assert!(!cri.blobs().contains(&published.layers("latest")[2]));
    }
}
