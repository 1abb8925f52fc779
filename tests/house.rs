//! The plan of the house, kept by a scan of manifests and sources: crates depend one way, modules of a crate form no
//! circle, `formats` is pure, `unsafe` code stays in five crates, and a type's name is declared once.
//!
//! The scan reads Rust as text. Comments, strings and tests are removed first; then paths that begin with `crate`,
//! `super` or `std` are followed. That is enough for code formatted by rustfmt, and needs no parser.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Crates, from the lowest to the highest: each depends only on crates before it.
const FLOORS: [&str; 14] = [
    "sys",
    "threads",
    "inflate",
    "source",
    "formats",
    "registry",
    "blobs",
    "disk",
    "convert",
    "frontends",
    "client",
    "host",
    "containerd",
    "turbobd",
];

/// Packages that use the crates, and that no crate depends on.
const TOOLS: [&str; 3] = ["packaging", "fuzz", "sat"];

/// Crates with `unsafe` code; each says why in its documentation.
const UNSAFE: [&str; 5] = ["frontends", "blobs", "source", "inflate", "sys"];

/// Names that several types may have, with the reason.
const SHARED_NAMES: [(&str, &str); 1] = [(
    "Args",
    "the arguments of one command of the command line, named by its module: `attach::Args`",
)];

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Packages of the workspace, and the names of all their dependencies: normal, build and dev.
fn packages() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--offline", "--format-version", "1", "--no-deps"])
        .current_dir(repository())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let name = |value: &Value| {
        let name = value["name"].as_str().unwrap();
        name.strip_prefix("turbobd-").unwrap_or(name).to_owned()
    };
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .map(|package| {
            (name(package), package["dependencies"].as_array().unwrap().iter().map(name).collect())
        })
        .collect()
}

/// A source file of a crate: its module path, and its code without comments, strings and tests.
struct Source {
    file: PathBuf,
    module: Vec<String>,
    code: String,
}

/// Sources of a crate, without files that are compiled for tests only.
fn sources(name: &str) -> Vec<Source> {
    let root = repository().join("src").join(name);
    let mut files = Vec::new();
    collect(&root, &mut files);
    files.sort();
    assert!(!files.is_empty(), "no sources in {}", root.display());
    let mut tests = BTreeSet::new();
    let mut sources = Vec::new();
    for file in files {
        let mut module: Vec<String> = file
            .strip_prefix(&root)
            .unwrap()
            .with_extension("")
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        if ["lib", "main", "mod"].contains(&module.last().unwrap().as_str()) {
            module.pop();
        }
        let (code, test_modules) = without_tests(&bare(&fs::read_to_string(&file).unwrap()));
        for child in test_modules {
            tests.insert([&module[..], &[child]].concat());
        }
        sources.push(Source { file, module, code });
    }
    sources.retain(|source| !tests.iter().any(|test| source.module.starts_with(test)));
    sources
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Code with comments and the contents of literals replaced by spaces; lines stay.
fn bare(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut code = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let end = match (at(i), at(i + 1)) {
            ('/', '/') => (i..chars.len()).find(|&j| at(j) == '\n').unwrap_or(chars.len()),
            ('/', '*') => (i + 2..chars.len())
                .find(|&j| at(j) == '*' && at(j + 1) == '/')
                .map_or(chars.len(), |j| j + 2),
            ('r', '"' | '#') if !word(at(i.wrapping_sub(1))) || at(i.wrapping_sub(1)) == 'b' => {
                let hashes = (i + 1..).take_while(|&j| at(j) == '#').count();
                if at(i + 1 + hashes) == '"' {
                    let closes = |j: usize| at(j) == '"' && (1..=hashes).all(|k| at(j + k) == '#');
                    (i + 2 + hashes..chars.len())
                        .find(|&j| closes(j))
                        .map_or(chars.len(), |j| j + 1 + hashes)
                } else {
                    i // a raw identifier
                }
            }
            ('"', _) => {
                let mut j = i + 1;
                while j < chars.len() && at(j) != '"' {
                    j += if at(j) == '\\' { 2 } else { 1 };
                }
                j + 1
            }
            ('\'', '\\') => (i + 3..chars.len()).find(|&j| at(j) == '\'').map_or(i, |j| j + 1),
            ('\'', _) if at(i + 2) == '\'' => i + 3,
            _ => i,
        };
        if end == i {
            code.push(at(i));
            i += 1;
        } else {
            let end = end.min(chars.len());
            code.extend(chars[i..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            i = end;
        }
    }
    code
}

fn word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Code without the items under `#[cfg(test)]`, and the names of test modules that are files of their own.
fn without_tests(code: &str) -> (String, Vec<String>) {
    const MARK: &str = "#[cfg(test)]";
    let (mut kept, mut modules) = (String::new(), Vec::new());
    let mut rest = code;
    while let Some(start) = rest.find(MARK) {
        kept.push_str(&rest[..start]);
        let item = &rest[start + MARK.len()..];
        let mut depth = 0;
        let mut end = item.len();
        for (i, c) in item.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 && matches!(c, '}' | ';') {
                end = i + 1;
                break;
            }
        }
        let name = item[..end].trim().trim_end_matches(';').strip_prefix("mod ");
        modules.extend(name.filter(|name| !name.contains('{')).map(|name| name.trim().to_owned()));
        kept.push_str(&"\n".repeat(item[..end].matches('\n').count()));
        rest = &item[end..];
    }
    kept.push_str(rest);
    (kept, modules)
}

/// Names that follow `start::` in the code, each with its line: `crate::a` gives `a`, `crate::{a, b::c}` gives `a`, `b`.
fn names_after(code: &str, start: &str) -> Vec<(usize, String)> {
    let prefix = format!("{start}::");
    let mut names = Vec::new();
    for (found, _) in code.match_indices(&prefix) {
        let before = code[..found].chars().next_back().unwrap_or(' ');
        if word(before) || before == ':' || before == '$' {
            continue;
        }
        let line = code[..found].matches('\n').count() + 1;
        let rest = &code[found + prefix.len()..];
        for name in first_names(rest) {
            names.push((line, name));
        }
    }
    names
}

/// First identifier of a path, or of each path in braces.
fn first_names(path: &str) -> Vec<String> {
    let identifier = |text: &str| text.trim_start().chars().take_while(|&c| word(c)).collect();
    let Some(group) = path.strip_prefix('{') else {
        return vec![identifier(path)];
    };
    let mut names = vec![identifier(group)];
    let mut depth = 0;
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(identifier(&group[i + 1..])),
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// Modules; for each the modules that it uses, with a place in the source.
type Graph = BTreeMap<String, BTreeMap<String, String>>;

/// Top-level modules of a crate, and for each those that it uses, with a place in the source.
fn modules(name: &str) -> Graph {
    let sources = sources(name);
    let mut graph: Graph = BTreeMap::new();
    for source in &sources {
        if let Some(top) = source.module.first() {
            graph.entry(top.clone()).or_default();
        }
    }
    // `crate::Name` may be re-exported by the root from one of its modules.
    let mut exported = BTreeMap::new();
    let roots = sources.iter().filter(|source| source.module.is_empty());
    for root in roots {
        for top in graph.keys() {
            for (_, item) in names_after(&root.code, top) {
                exported.insert(item, top.clone());
            }
        }
    }
    for source in &sources {
        let Some(top) = source.module.first() else { continue };
        let depth = source.module.len();
        let to_root = vec!["super"; depth].join("::");
        for start in ["crate", &to_root] {
            for (line, used) in names_after(&source.code, start) {
                let used = exported.get(&used).unwrap_or(&used).clone();
                if used != *top && graph.contains_key(&used) {
                    let file = source.file.strip_prefix(repository()).unwrap();
                    let place = format!("{}:{line}", file.display());
                    graph.get_mut(top).unwrap().entry(used).or_insert(place);
                }
            }
        }
    }
    graph
}

/// Uses that close a circle of modules in different folders, as text; none if the folders can be ordered.
///
/// A module lies in the folder of its own name if it has one, else in the crate's. Files of one folder may use each other.
fn circles(graph: &Graph, folder: impl Fn(&str) -> String) -> Vec<String> {
    fn reached<'a>(graph: &'a Graph, from: &'a str) -> BTreeSet<&'a str> {
        let (mut reached, mut open) = (BTreeSet::new(), vec![from]);
        while let Some(module) = open.pop() {
            open.extend(
                graph[module].keys().map(String::as_str).filter(|used| reached.insert(*used)),
            );
        }
        reached
    }
    let reach: BTreeMap<&str, _> =
        graph.keys().map(|name| (name.as_str(), reached(graph, name))).collect();
    let mut found = Vec::new();
    for (module, uses) in graph {
        let circle = |other: &str| {
            reach[module.as_str()].contains(other) && reach[other].contains(module.as_str())
        };
        let folders: BTreeSet<String> =
            graph.keys().filter(|other| circle(other)).map(|other| folder(other)).collect();
        let closing = uses.iter().filter(|(used, _)| folders.len() > 1 && circle(used));
        found.extend(closing.map(|(used, place)| format!("{module} uses {used} at {place}")));
    }
    found
}

#[test]
fn crates_depend_one_way() {
    let packages = packages();
    let floor = |name: &str| FLOORS.iter().position(|floor| *floor == name);
    for (package, dependencies) in &packages {
        let own = floor(package);
        assert!(
            own.is_some() || TOOLS.contains(&package.as_str()),
            "{package} has no place in the order of crates"
        );
        for dependency in dependencies.iter().filter(|name| packages.contains_key(*name)) {
            let below = floor(dependency).unwrap_or_else(|| panic!("{package} uses {dependency}"));
            assert!(own.is_none_or(|own| below < own), "{package} must not use {dependency}");
        }
    }
    for name in FLOORS {
        assert!(packages.contains_key(name), "{name} is no crate of the workspace");
    }
}

#[test]
fn frameworks_are_named_in_one_crate() {
    let packages = packages();
    let users = |dependency: &str| -> Vec<&str> {
        let users = packages.iter().filter(|(_, names)| names.contains(dependency));
        users.map(|(package, _)| package.as_str()).collect()
    };
    assert_eq!(users("clap"), ["packaging", "sat", "turbobd"]);
    assert_eq!(users("libublk"), ["frontends"]);
    assert!(users("tonic").len() <= 1, "tonic is used by {:?}", users("tonic"));
}

#[test]
fn folders_of_a_crate_form_no_circle() {
    let mut found = Vec::new();
    for name in FLOORS {
        let root = repository().join("src").join(name);
        let folder = |module: &str| {
            if root.join(module).is_dir() { module.to_owned() } else { String::new() }
        };
        found.extend(
            circles(&modules(name), folder).into_iter().map(|text| format!("{name}: {text}")),
        );
    }
    assert!(found.is_empty(), "modules on a circle:\n{}", found.join("\n"));
}

#[test]
fn formats_names_no_thread_socket_file_or_clock() {
    let root = fs::read_to_string(repository().join("src/formats/lib.rs")).unwrap();
    assert!(root.contains("\n#![forbid(unsafe_code)]\n"));
    // An address is a value; a socket is not.
    let pure = |path: &str, name: &str| match path {
        "std" => !["thread", "fs", "time"].contains(&name),
        _ => name.starts_with("Ip"),
    };
    for source in sources("formats") {
        for path in ["std", "std::net"] {
            for (line, name) in names_after(&source.code, path) {
                assert!(pure(path, &name), "{}:{line} names {path}::{name}", source.file.display());
            }
        }
    }
}

#[test]
fn unsafe_code_stays_in_its_crates() {
    for name in FLOORS.iter().filter(|name| !UNSAFE.contains(name)) {
        for source in sources(name) {
            let unsafe_line = source
                .code
                .lines()
                .position(|line| line.split(|c| !word(c)).any(|token| token == "unsafe"));
            if let Some(line) = unsafe_line {
                panic!("{}:{} has unsafe code", source.file.display(), line + 1);
            }
        }
    }
}

/// Names of the structs, enums, unions and traits that the code declares, each with its line.
fn declared(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (line, text) in code.lines().enumerate() {
        let mut words = text.split(|c| !word(c)).filter(|token| !token.is_empty());
        let is_declaration =
            words.find(|token| !["pub", "crate", "super", "in", "unsafe", "self"].contains(token));
        if is_declaration.is_some_and(|token| ["struct", "enum", "union", "trait"].contains(&token))
        {
            found.extend(words.next().map(|name| (line + 1, name.to_owned())));
        }
    }
    found
}

#[test]
fn a_type_name_is_declared_once() {
    let mut files = Vec::new();
    collect(&repository().join("src"), &mut files);
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in files {
        let code = bare(&fs::read_to_string(&file).unwrap());
        let file = file.strip_prefix(repository()).unwrap().display().to_string();
        for (line, name) in declared(&code) {
            places.entry(name).or_default().push(format!("{file}:{line}"));
        }
    }
    assert!(places.contains_key("ChunkSource"));
    for (name, reason) in SHARED_NAMES {
        let uses = places.remove(name).unwrap_or_default();
        assert!(uses.len() > 1, "{name} needs no exception: {reason}");
    }
    places.retain(|_, places| places.len() > 1);
    assert!(places.is_empty(), "types with one name; name each after what it holds:\n{places:#?}");
}

#[test]
fn the_scan_sees_circles_and_skips_comments_strings_and_tests() {
    let code = "use crate::{a, b::c};\n// crate::d\nlet s = \"crate::e\"; let c = '\"'; r#\"crate::f\"#;\n\
                fn g<'x>() { super::h() }\n#[cfg(test)]\nmod tests { use crate::i; }\n#[cfg(test)]\nmod j;\ncrate::k();\n";
    let (code, tests) = without_tests(&bare(code));
    let names = names_after(&code, "crate");
    let expected = [(1, "a"), (1, "b"), (9, "k")].map(|(line, name)| (line, name.to_owned()));
    assert_eq!(names, expected);
    assert_eq!(names_after(&code, "super"), [(4, "h".to_owned())]);
    assert_eq!(tests, ["j"]);
    let code = "pub(super) struct A;\n    enum B {\n// struct C;\nlet d = \"struct D\";\npub unsafe trait E {}\nstructure F";
    let expected = [(1, "A"), (2, "B"), (5, "E")].map(|(line, name)| (line, name.to_owned()));
    assert_eq!(declared(&bare(code)), expected);

    let graph = |edges: &[(&str, &str)]| {
        let mut graph: Graph = BTreeMap::new();
        for (from, to) in edges {
            graph.entry((*to).into()).or_default();
            graph.entry((*from).into()).or_default().insert((*to).into(), "x.rs:1".into());
        }
        graph
    };
    let folder = |module: &str| if module < "c" { String::new() } else { module.to_owned() };
    assert!(circles(&graph(&[("a", "c"), ("c", "d"), ("a", "d")]), folder).is_empty());
    assert!(circles(&graph(&[("a", "b"), ("b", "a"), ("c", "a")]), folder).is_empty());
    assert_eq!(circles(&graph(&[("a", "c"), ("c", "d"), ("d", "c"), ("d", "e")]), folder).len(), 2);
}
