use std::collections::BTreeSet;

use super::*;

const PAGE: &str = include_str!("../../../CONFIG.md");

fn parse(text: &str) -> ServiceConfig {
    let (config, warnings) = ServiceConfig::parse(text, "c.json").unwrap();
    assert_eq!(warnings, Vec::<String>::new(), "{text}");
    config
}

/// Rows of the page's tables of this file: | `key` | default | meaning |
fn rows() -> impl Iterator<Item = (&'static str, &'static str)> {
    let page = PAGE.split("## Device config").next().unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| row.split_once('`')).map(|(key, rest)| {
        (key, rest.trim_matches([' ', '|']).rsplit(" | ").next().unwrap().trim())
    })
}

/// A key in its sections.
fn with(key: &str, value: &str) -> String {
    key.rsplit('.').fold(value.to_owned(), |text, part| format!("{{\"{part}\": {text}}}"))
}

/// A value of each key that is not its default, and what must be there beside it for it to count.
fn other_value(key: &str) -> (String, &'static str) {
    let value = match key {
        "cacheConfig.cacheType" | "cacheType" => r#""download""#,
        "credentialConfig.mode" => r#""file""#,
        "p2pConfig.address" => r#""http://peer.example/p2p""#,
        "serviceConfig.address" => r#""http://127.0.0.1:1""#,
        "turbobd.mirrors" => r#"{"r.example": ["https://m.example"]}"#,
        "turbobd.authorities" | "turbobd.metaKeys" => r#"["/a.pem"]"#,
        "turbobd.metaTrust" => r#""signed""#,
        "turbobd.origins" => r#"["r.example/team"]"#,
        "turbobd.trustedHosts" => r#"["r.example"]"#,
        "turbobd.metricsAddress" => r#""::1""#,
        "turbobd.onError" => r#""wait""#,
        "turbobd.memoryBudgetMB" => "2048",
        "turbobd.hedge.enable"
        | "turbobd.traces.enable"
        | "turbobd.traces.published"
        | "gzipCacheConfig.enable" => "false",
        "enableAudit" | "enableThread" => "true",
        "logConfig.logLevel" | "logLevel" | "ioEngine" => "2",
        "cacheConfig.refillSize" | "gzipCacheConfig.refillSize" => "8192",
        _ if key.ends_with(".enable") => "true",
        _ if ["Path", "Dir", "dir", "path", "File", "_path", "Prefix", "Agent", "Version"]
            .iter()
            .any(|end| key.ends_with(end)) =>
        {
            r#""/other""#
        }
        _ => "7",
    };
    let beside = match key {
        "credentialConfig.mode" => r#"{"credentialConfig": {"path": "/p"}}"#,
        "credentialConfig.path" => r#"{"credentialConfig": {"mode": "uds"}}"#,
        "credentialConfig.client_cert_path" => r#"{"credentialConfig": {"client_key_path": "/k"}}"#,
        "credentialConfig.client_key_path" => r#"{"credentialConfig": {"client_cert_path": "/k"}}"#,
        "certConfig.certFile" => r#"{"certConfig": {"keyFile": "/k"}}"#,
        "certConfig.keyFile" => r#"{"certConfig": {"certFile": "/k"}}"#,
        _ => "{}",
    };
    (value.to_owned(), beside)
}

/// Two objects as one.
fn merged(text: &str, beside: &str) -> String {
    fn merge(into: &mut serde_json::Value, other: serde_json::Value) {
        match (into, other) {
            (serde_json::Value::Object(into), serde_json::Value::Object(other)) => {
                for (key, value) in other {
                    merge(into.entry(key).or_insert(serde_json::Value::Null), value);
                }
            }
            (into, other) => *into = other,
        }
    }
    let mut both = serde_json::from_str(text).unwrap();
    merge(&mut both, serde_json::from_str(beside).unwrap());
    both.to_string()
}

#[test]
fn each_key_changes_the_settings_or_is_said_to_have_no_effect() {
    for (key, meaning) in rows() {
        let (value, beside) = other_value(key);
        let text = merged(&with(key, &value), beside);
        let (config, warnings) = ServiceConfig::parse(&text, "c.json").unwrap();
        let warning = format!("Key {key} of c.json is accepted, without effect here");
        if meaning.starts_with("accepted, without effect here") {
            assert_eq!(warnings, [warning]);
            assert_eq!(config, ServiceConfig::default(), "{key} has an effect");
            continue;
        }
        assert!(!warnings.contains(&warning), "{key}");
        // Against the section without the key: its presence alone may change other defaults.
        let section =
            key.rsplit_once('.').map_or("{}".to_owned(), |(section, _)| with(section, "{}"));
        let without = ServiceConfig::parse(&merged(&section, beside), "c.json");
        assert!(
            without.map_or(true, |(without, _)| without != config),
            "{text} changes nothing, and nothing says so"
        );
    }
}

#[test]
fn every_key_of_the_page_is_known_and_every_known_key_is_in_the_page() {
    let notes = Notes::default();
    ServiceConfig::take(Object::parse("{}", "c.json", &notes).unwrap()).unwrap();
    let known: BTreeSet<String> = notes.into_parts().0.into_iter().collect();
    let written: BTreeSet<String> = rows().map(|(key, _)| key.to_owned()).collect();
    let missing: Vec<_> = known.difference(&written).collect();
    let unknown: Vec<_> = written.difference(&known).collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "not in the page: {missing:?}; not in the parser: {unknown:?}"
    );
}

/// All source files of this project but those of the configuration itself, and its parent for the settings that it
/// uses.
fn sources() -> String {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = own.ancestors().find(|folder| folder.join("CONFIG.md").exists()).unwrap();
    let mut folders = vec![root.join("src")];
    let mut text = String::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("config") {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                text.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    text
}

/// Fields of the structs in a source file, with the name of their struct.
fn fields(source: &str) -> Vec<(String, String)> {
    let mut of = String::new();
    let mut fields = Vec::new();
    for line in source.lines() {
        if let Some(name) = line.strip_prefix("pub struct ") {
            of = name.trim_end_matches(" {").to_owned();
        } else if let Some((name, _)) =
            line.strip_prefix("    pub ").and_then(|line| line.split_once(": "))
            && name.chars().all(|letter| letter == '_' || letter.is_ascii_alphanumeric())
        {
            fields.push((of.clone(), name.to_owned()));
        }
    }
    fields
}

/// A setting that is parsed and never looked at is not told from one that has an effect by anything but this.
#[test]
fn every_setting_is_used_by_what_it_is_for() {
    let sources = sources();
    let is_name = |letter: char| letter == '_' || letter.is_ascii_alphanumeric();
    let mut unused = Vec::new();
    let own = [include_str!("../config.rs"), include_str!("sections.rs"), include_str!("own.rs")];
    for (of, field) in own.into_iter().flat_map(fields) {
        let section = of.trim_end_matches("Config").to_lowercase();
        // Who uses it calls the section by a name of it, or takes it apart.
        let is_section = |text: &str| {
            let before = text.trim_end().rsplit(|letter| !is_name(letter)).next().unwrap();
            ["config", "service", "own", "pair"].contains(&before)
                || before.len() > 2 && (section.contains(before) || before.contains(&section))
        };
        let ends = |text: &str| !text.starts_with(|letter| is_name(letter) || letter == '(');
        let read = sources.match_indices(&format!(".{field}")).any(|(at, found)| {
            is_section(&sources[at.saturating_sub(60)..at]) && ends(&sources[at + found.len()..])
        });
        let taken = sources.match_indices(&format!("{of} {{")).any(|(at, _)| {
            if ["struct ", "impl ", "for "].iter().any(|word| sources[..at].ends_with(word)) {
                return false;
            }
            let inside = sources[at..].split('}').next().unwrap();
            inside.split(|letter| !is_name(letter)).any(|word| word == field)
        });
        if !read && !taken {
            unused.push(format!("{of}.{field}"));
        }
    }
    assert!(unused.is_empty(), "parsed, and used nowhere: {unused:?}");
}

#[test]
fn the_pages_example_is_understood_whole() {
    let example = PAGE.split("```json").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let config = parse(example);
    assert_eq!(config.turbobd.mirrors["docker.io"].len(), 2);
    assert_ne!(config.gzip_cache, ServiceConfig::default().gzip_cache);
}

#[test]
fn an_absent_download_section_is_ours_and_a_present_one_is_overlaybds() {
    let ours = ServiceConfig::default();
    assert_eq!(ours.download, DownloadConfig::AT_ONCE);
    assert_eq!(ours.turbobd.memory_cache, 256 << 20);
    let theirs = parse(r#"{"download": {}}"#);
    let seconds = Duration::from_secs;
    let download = DownloadConfig {
        enable: false,
        delay: seconds(300),
        delay_extra: seconds(30),
        max_bytes_per_second: Some(100 << 20),
        tries: 5,
        block: 262_144,
    };
    assert_eq!(theirs.download, download);
}

#[test]
fn a_section_that_names_only_a_size_gives_a_cache_of_that_size() {
    let ours = ServiceConfig::default().gzip_cache;
    assert!(ours.enable);
    assert_eq!(ours.dir, Path::new("/var/lib/turbobd/cache"));
    let sized = parse(r#"{"gzipCacheConfig": {"cacheSizeGB": 20}}"#).gzip_cache;
    assert_eq!(sized, GzipCacheConfig { size: 20 << 30, ..ours.clone() });
    assert_eq!(parse(r#"{"gzipCacheConfig": {}}"#).gzip_cache, ours);
    assert!(
        !parse(r#"{"gzipCacheConfig": {"enable": false, "cacheSizeGB": 20}}"#).gzip_cache.enable
    );
}

#[test]
fn a_cache_type_that_is_another_here_is_said_to_be() {
    for (text, key) in [
        (r#"{"cacheType": "ocf"}"#, "cacheType"),
        (r#"{"cacheConfig": {"cacheType": "ocf"}}"#, "cacheConfig.cacheType"),
    ] {
        let (config, warnings) = ServiceConfig::parse(text, "c.json").unwrap();
        assert_eq!(config.cache.kind, CacheType::Ocf);
        assert_eq!(warnings, [format!("Value ocf of {key} of c.json means file here")]);
    }
    let text = r#"{"cacheConfig": {"cacheType": "download"}}"#;
    let (_, warnings) = ServiceConfig::parse(text, "c.json").unwrap();
    let [warning] = &warnings[..] else { panic!("{warnings:?}") };
    assert!(warning.starts_with("Value download of cacheConfig.cacheType of c.json keeps no"));
}

#[test]
fn the_log_is_as_large_as_the_page_says_and_a_path_that_cannot_be_written_is_named() {
    let log = |text| parse(text).log;
    assert_eq!(log("{}").rotation, log_file::Rotation { size: 10 << 20, keep: 3 });
    assert_eq!((log("{}").level, log("{}").path), (None, None));
    let text = r#"{"logConfig": {"logSizeMB": 0, "logRotateNum": 0, "logPath": "/l", "logLevel": 0},
        "logLevel": 3, "logPath": "/other"}"#;
    assert_eq!(log(text).rotation, log_file::Rotation { size: 1 << 20, keep: 0 });
    assert_eq!((log(text).level, log(text).key), (Some(LogLevel::Debug), "logConfig.logPath"));
    let file = tempfile::NamedTempFile::new().unwrap();
    let config = parse(r#"{"logPath": "/l"}"#);
    let error = config.open_log(config.log.key, &file.path().join("log")).unwrap_err();
    let named = format!("Key logPath of the defaults names {}/log, which", file.path().display());
    assert!(error.to_string().starts_with(&named), "{error}");
}

use std::time::Duration;

#[test]
fn the_configuration_that_overlaybd_installs_is_understood() {
    let (config, warnings) = ServiceConfig::parse(
        r#"{
            "logConfig": {"logLevel": 1, "logPath": "/var/log/overlaybd.log"},
            "cacheConfig": {"cacheType": "file", "cacheDir": "/opt/overlaybd/registry_cache", "cacheSizeGB": 4},
            "gzipCacheConfig": {"enable": true, "cacheDir": "/opt/overlaybd/gzip_cache", "cacheSizeGB": 8},
            "credentialConfig": {"mode": "file", "path": "/opt/overlaybd/cred.json"},
            "ioEngine": 0,
            "download": {"enable": true, "delay": 600, "delayExtra": 30, "maxMBps": 100},
            "p2pConfig": {"enable": false, "address": "http://localhost:9731/dadip2p"},
            "exporterConfig": {"enable": false, "uriPrefix": "/metrics", "port": 9863, "updateInterval": 60000000},
            "enableAudit": true, "auditPath": "/var/log/overlaybd-audit.log",
            "registryFsVersion": "v2", "enableThread": false,
            "certConfig": {"certFile": "", "keyFile": ""}, "userAgent": "overlaybd/1.0.0"
        }"#,
        "c.json",
    )
    .unwrap();
    let unused = ["exporterConfig.updateInterval", "ioEngine", "enableThread", "registryFsVersion"];
    assert_eq!(
        warnings,
        unused.map(|key| format!("Key {key} of c.json is accepted, without effect here"))
    );
    assert_eq!(config.gzip_cache.size, 8 << 30);
    assert_eq!(config.credential.mode, CredentialMode::File("/opt/overlaybd/cred.json".into()));
    assert_eq!(config.download.delay, Duration::from_secs(600));
    assert_eq!(config.certificate, None);
    assert_eq!(config.user_agent.as_deref(), Some("overlaybd/1.0.0"));
}

#[test]
fn legacy_keys_hold_where_the_new_ones_say_nothing() {
    let config = parse(
        r#"{"registryCacheDir": "/r", "registryCacheSizeGB": 2, "cacheType": "file",
            "credentialFilePath": "/c", "logLevel": 3, "logPath": "/l"}"#,
    );
    assert_eq!(config.cache.kind, CacheType::File);
    assert_eq!((config.cache.dir.as_path(), config.cache.size), (Path::new("/r"), 2 << 30));
    assert_eq!(config.credential.mode, CredentialMode::File("/c".into()));
    assert_eq!((config.log.level, config.log.path), (Some(LogLevel::Errors), Some("/l".into())));
    let config = parse(
        r#"{"registryCacheDir": "/r", "cacheType": "download", "credentialFilePath": "/c",
            "cacheConfig": {"cacheType": "file", "cacheDir": "/n"},
            "credentialConfig": {"mode": "uds", "path": "/run/auth"}}"#,
    );
    assert_eq!((config.cache.kind, config.cache.dir.as_path()), (CacheType::File, Path::new("/n")));
    assert_eq!(config.credential.mode, CredentialMode::Socket("/run/auth".into()));
}

#[test]
fn an_unknown_key_is_a_warning_that_names_it() {
    let text = r#"{"new": 1, "turbobd": {"memoryCacheMb": 1, "hedge": {"x": null}}}"#;
    let (config, warnings) = ServiceConfig::parse(text, "c.json").unwrap();
    let named = ["turbobd.hedge.x", "turbobd.memoryCacheMb", "new"];
    let expected = named.map(|key| format!("Key {key} of c.json is unknown and ignored"));
    assert_eq!(warnings, expected);
    assert_eq!(config, ServiceConfig::default());
}

#[test]
fn what_cannot_be_meant_is_an_error_that_names_the_key_and_what_is_expected() {
    for (text, message) in [
        (
            r#"{"cacheConfig": 4}"#,
            "Key cacheConfig of c.json is invalid: it must be an object, not the number 4",
        ),
        (
            r#"{"cacheConfig": {"cacheSizeGB": "4"}}"#,
            "Key cacheConfig.cacheSizeGB of c.json is invalid: it must be a whole number, not a string",
        ),
        (
            r#"{"gzipCacheConfig": {"refillSize": 5000}}"#,
            "Key gzipCacheConfig.refillSize of c.json is invalid: it is a power of two from 4096 on, not 5000",
        ),
        (
            r#"{"cacheConfig": {"cacheSizeGB": 18446744073709551615}}"#,
            "Key cacheConfig.cacheSizeGB of c.json is invalid: it is at most 17179869183, not 18446744073709551615",
        ),
        (
            r#"{"turbobd": {"mirrors": {"r.example": "https://m"}}}"#,
            "Key turbobd.mirrors of c.json is invalid: it must be an object of arrays of strings, not such an object",
        ),
        (
            r#"{"turbobd": {"mirrors": {"r.example": ["m.example"]}}}"#,
            "Key turbobd.mirrors of c.json is invalid: \"m.example\" is not an http:// or https:// URL",
        ),
        (
            r#"{"turbobd": {"onError": "hang"}}"#,
            "Key turbobd.onError of c.json is invalid: it is eio or wait, not \"hang\"",
        ),
        (r#"{"ioEngine": 3}"#, "Key ioEngine of c.json is invalid: it is at most 2, not 3"),
        (
            r#"{"ioEngine": -1}"#,
            "Key ioEngine of c.json is invalid: it must be a whole number, not the number -1",
        ),
        (
            r#"{"exporterConfig": {"port": 70000}}"#,
            "Key exporterConfig.port of c.json is invalid: it is at most 65535, not 70000",
        ),
        (
            r#"{"certConfig": {"certFile": "/c"}}"#,
            "Key certConfig.keyFile of c.json is invalid: certFile needs its key",
        ),
        (
            r#"{"credentialConfig": {"mode": "https", "path": "http://a/b"}}"#,
            "Key credentialConfig.path of c.json is invalid: it is a URL that begins with https://",
        ),
        (
            r#"{"credentialConfig": {"mode": "http"}}"#,
            "Key credentialConfig.path of c.json is invalid: a credential mode needs it",
        ),
        (
            r#"{"p2pConfig": {"enable": null}}"#,
            "Key p2pConfig.enable of c.json is invalid: it must be true or false, not null",
        ),
        (
            "[]",
            "The service configuration c.json is not a JSON object: it must be an object, not an array",
        ),
    ] {
        let error = ServiceConfig::parse(text, "c.json").unwrap_err();
        assert_eq!(error.to_string(), message);
    }
    assert!(ServiceConfig::parse("{", "c.json").unwrap_err().to_string().contains("line 1"));
}

#[test]
fn a_file_that_was_named_must_exist_and_is_named_in_the_error() {
    let error = ServiceConfig::load(Some(Path::new("/nowhere/c.json"))).unwrap_err();
    assert_eq!(error.to_string(), "Cannot read the service configuration /nowhere/c.json");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), r#"{"turbobd": {"memoryCacheMB": 7}}"#).unwrap();
    let config = ServiceConfig::load(Some(file.path())).unwrap();
    assert_eq!(config.turbobd.memory_cache, 7 << 20);
    assert_eq!(config.file.as_deref(), Some(file.path()));
}

mod properties {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,200}") {
            let _ = super::ServiceConfig::parse(&text, "c.json");
        }

        #[test]
        fn no_value_of_a_known_key_makes_it_panic(key in 0usize..70, value in prop_oneof![
            Just("null".to_owned()), Just("{}".to_owned()), Just("[[]]".to_owned()), Just("-1".to_owned()),
            Just("1e400".to_owned()), Just("\"\"".to_owned()), Just("\"://\"".to_owned()), any::<u64>().prop_map(|n| n.to_string()),
        ]) {
            let notes = super::Notes::default();
            super::ServiceConfig::take(super::Object::parse("{}", "c", &notes).unwrap()).unwrap();
            let known = notes.into_parts().0;
            let mut text = value;
            for part in known[key % known.len()].rsplit('.') {
                text = format!("{{\"{part}\": {text}}}");
            }
            let _ = super::ServiceConfig::parse(&text, "c.json");
        }
    }
}

#[test]
fn a_budget_that_holds_not_even_the_fixed_parts_is_refused_with_the_figures() {
    let budget = |text: &str| {
        let config = ServiceConfig::parse(&format!(r#"{{"turbobd": {text}}}"#), "c.json");
        config.map(|(config, _)| config.turbobd.memory_budget >> 20).map_err(|e| e.to_string())
    };
    assert_eq!(budget("{}"), Ok(1024));
    assert_eq!(budget(r#"{"memoryCacheMB": 4096}"#), Ok(1024 - 256 + 4096));
    let least = r#"{"memoryBudgetMB": 276, "memoryCacheMB": 16, "connections": 1}"#;
    assert_eq!(budget(least), Ok(276));
    let less = budget(&least.replace("276", "275")).unwrap_err();
    assert!(less.contains("at least 276 MB") && less.contains("is 275 MB"), "{less}");
}
