//! The pages say what is: names of files, traits, threads, metrics and keys, tables and examples are compared with the
//! code and with the program.
//!
//! A page's sentence is for people; what a program can check stands in backticks, in a table or in an example, and is
//! checked here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use client::Code;
use client::protocol::{DeviceState, Reply, Request};
use serde_json::Value;

use crate::image::turbobd;
use crate::machine::run;

/// The pages whose claims are checked.
const PAGES: [&str; 8] = [
    "README.md",
    "ARCHITECTURE.md",
    "OPERATING.md",
    "PROTOCOL.md",
    "CONTRIBUTING.md",
    "METRICS.md",
    "CONFIG.md",
    "SECURITY.md",
];

/// Folders of the repository whose files are named in backticks.
const FOLDERS: [&str; 8] =
    ["src/", "tests/", "scripts/", "perf/", "kernel-notes/", "findings/", ".ci/", ".github/"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn text(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The pages, and the notes that stand beside the code.
fn pages() -> Vec<String> {
    let mut pages: Vec<String> = PAGES.iter().map(|&page| page.to_owned()).collect();
    let notes = sources(&root(), "md");
    let note = |path: &PathBuf| {
        ["src", "perf", "kernel-notes"].iter().any(|dir| path.starts_with(root().join(dir)))
    };
    pages.extend(notes.iter().filter(|path| note(path)).map(|path| relative(path)));
    pages
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

/// Files below `dir` with this extension, in order; build folders and data are left out.
fn sources(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                found.extend(sources(&path, extension));
            }
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found
}

/// The Rust sources under `src/`, without the tests in them.
fn code() -> Vec<(String, String)> {
    let files = sources(&root().join("src"), "rs");
    let is_test =
        |path: &PathBuf| relative(path).contains("/tests") || relative(path).ends_with("tests.rs");
    files
        .iter()
        .filter(|path| !is_test(path))
        .map(|path| {
            let whole = fs::read_to_string(path).unwrap();
            let own = whole.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            (relative(path), own.to_owned())
        })
        .collect()
}

/// Prose of a page: without its fenced blocks.
fn prose(page: &str) -> String {
    let mut fenced = false;
    let mut lines = Vec::new();
    for line in page.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            lines.push(line);
        }
    }
    lines.join("\n")
}

/// Words between backticks in the prose of a page.
fn quoted(page: &str) -> Vec<String> {
    let prose = prose(page);
    // A code span may not cross a paragraph here: an odd backtick then spoils one paragraph and not the page.
    let paragraphs = prose.split("\n\n").flat_map(|paragraph| {
        let parts = paragraph.split('`').collect::<Vec<_>>();
        assert!(parts.len() % 2 == 1, "an odd number of backticks in: {paragraph}");
        parts.into_iter().skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()
    });
    paragraphs.collect()
}

/// Fenced blocks of a page: the words after the fence, and the text.
fn blocks(page: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut open: Option<(String, Vec<&str>)> = None;
    for line in page.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(kind)) => open = Some((kind.to_owned(), Vec::new())),
            (Some(_), Some(_)) => {
                let (kind, lines) = open.take().unwrap();
                blocks.push((kind, lines.join("\n")));
            }
            (Some((_, lines)), None) => lines.push(line),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a fenced block has no end");
    blocks
}

/// Cells of the rows of the table whose header begins with these cells.
fn table(page: &str, header: &[&str]) -> Vec<Vec<String>> {
    // A bar inside a cell is written as \|.
    let cells = |line: &str| -> Vec<String> {
        let line = line.replace("\\|", "\u{1}");
        let inner = line.trim().trim_start_matches('|').trim_end_matches('|').to_owned();
        inner.split('|').map(|cell| cell.trim().replace('\u{1}', "|")).collect()
    };
    let mut lines = page.lines();
    let found = lines.by_ref().find(|line| {
        line.starts_with('|')
            && cells(line).iter().zip(header).filter(|(a, b)| a == *b).count() == header.len()
    });
    assert!(found.is_some(), "no table with the header {header:?}");
    let rows: Vec<_> = lines.skip(1).take_while(|line| line.starts_with('|')).map(cells).collect();
    assert!(!rows.is_empty(), "the table {header:?} is empty");
    rows
}

/// Words between backticks in a cell.
fn names(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn every_file_that_a_page_names_is_there() {
    let mut checked = 0;
    for page in pages() {
        for quote in quoted(&text(&page)) {
            // A command has arguments behind its name; a pattern stands for several files.
            let file = quote.split_whitespace().next().unwrap_or_default();
            let file = file.trim_start_matches("./");
            if FOLDERS.iter().any(|folder| file.starts_with(folder)) && !file.contains(['*', 'N']) {
                checked += 1;
                assert!(root().join(file).exists(), "{page} names {file}, which does not exist");
            }
        }
    }
    assert!(checked > 60, "only {checked} names of files were found");
}

#[test]
fn every_link_of_a_page_leads_somewhere() {
    let slug = |heading: &str| -> String {
        let plain = heading
            .trim_start_matches('#')
            .trim()
            .replace(['`', ',', '.', ':', '?', '(', ')', '/'], "");
        plain.to_lowercase().replace(' ', "-")
    };
    let mut checked = 0;
    for page in pages() {
        let page_text = prose(&text(&page));
        for part in page_text.split("](").skip(1) {
            let target = part.split(')').next().unwrap_or_default();
            if target.starts_with("http") {
                continue;
            }
            checked += 1;
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let dir = root().join(&page).parent().unwrap().to_owned();
            let path = if file.is_empty() { root().join(&page) } else { dir.join(file) };
            assert!(path.exists(), "{page} links to {target}, which does not exist");
            if !anchor.is_empty() {
                let linked = fs::read_to_string(&path).unwrap();
                let found =
                    linked.lines().any(|line| line.starts_with('#') && slug(line) == anchor);
                assert!(found, "{page} links to {target}, where no heading is");
            }
        }
    }
    assert!(checked > 15, "only {checked} links were found");
}

#[test]
fn the_traits_stand_where_the_page_says_and_have_the_implementations_it_names() {
    let page = text("ARCHITECTURE.md");
    let code = code();
    for row in table(&page, &["trait", "question", "where"]) {
        let (name, file) = (names(&row[0])[0], names(&row[2])[0]);
        assert!(text(file).contains(&format!("pub trait {name}")), "{file} has no trait {name}");
        for cell in &row[3..5] {
            for kind in
                names(cell).iter().filter(|kind| !cell.starts_with("over") || **kind == name)
            {
                let there = code.iter().any(|(_, text)| is_implemented(text, name, kind));
                assert!(there, "{kind} does not implement {name}");
            }
        }
    }
    let faulty = table(&page, &["trait", "question", "where"]);
    let sources: Vec<_> = faulty.iter().flat_map(|row| names(&row[5])).collect();
    for name in sources {
        let there = name.contains('/')
            || code.iter().any(|(_, text)| text.contains(&format!("pub struct {name}")));
        assert!(there, "there is no {name}");
    }
}

/// True if `text` has `impl … TRAIT for KIND`.
fn is_implemented(text: &str, name: &str, kind: &str) -> bool {
    text.lines().any(|line| {
        let Some((head, body)) = line.split_once(" for ") else { return false };
        let body = body.trim_end_matches('{').trim();
        let own = body.split('<').next().unwrap_or_default();
        head.starts_with("impl") && head.ends_with(&format!(" {name}")) && own == kind
    })
}

/// Thread names that the code computes: the file, the argument of `name`, and what it can be. `N` is a number.
const COMPUTED: [(&str, &str, &[&str]); 4] = [
    ("src/host/daemon/alarm.rs", "ALARM_THREAD.into()", &["deadlines"]),
    ("src/frontends/ublk/writer.rs", "THREAD_NAME", &["ublk-write-N"]),
    ("src/blobs/tier.rs", "name", &["tier-encoded", "tier-decoded"]),
    ("src/host/endpoint.rs", "name.into()", &["metrics", "snapshots"]),
];

/// Names of the threads that a source starts.
fn threads(file: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for part in text.split("thread::Builder::new()").skip(1) {
        // The chain of calls may be broken over lines.
        let chain: String = part.split_whitespace().collect();
        let Some(rest) = chain.strip_prefix(".name(") else { continue };
        let mut depth = 1;
        let argument: String = rest
            .chars()
            .take_while(|&letter| {
                depth += i32::from(letter == '(') - i32::from(letter == ')');
                depth > 0
            })
            .collect();
        let computed = COMPUTED
            .iter()
            .find(|(known, expression, _)| *known == file && *expression == argument);
        if let Some((_, _, names)) = computed {
            found.extend(names.iter().map(|&name| name.to_owned()));
            continue;
        }
        let literal = argument.split('"').nth(1);
        let literal = literal.unwrap_or_else(|| {
            panic!(
                "{file} starts a thread by the name {argument}: say in COMPUTED what that can be"
            )
        });
        found.push(literal.replace("{number}", "N"));
    }
    // A pool appends a number to the name of each of its threads.
    for call in ["threads.spawn(", "threads.spawn_or_log("] {
        for part in text.split(call).skip(1) {
            let argument = part.split(',').next().unwrap_or_default().trim();
            match COMPUTED.iter().find(|(known, name, _)| *known == file && *name == argument) {
                Some((_, _, names)) => found.extend(names.iter().map(|&name| name.to_owned())),
                None => found.push(format!("{}-N", argument.trim_matches('"'))),
            }
        }
    }
    found
}

#[test]
fn the_table_of_threads_has_exactly_the_threads_that_the_code_starts() {
    let started: BTreeSet<String> =
        code().iter().flat_map(|(file, text)| threads(file, text)).collect();
    assert!(started.len() > 15, "only {started:?} were found");
    let page = text("ARCHITECTURE.md");
    let rows = table(&page, &["thread", "how many"]);
    let listed: BTreeSet<String> =
        rows.iter().flat_map(|row| names(&row[0])).map(str::to_owned).collect();
    assert_eq!(started, listed, "threads that the code starts, and those of ARCHITECTURE.md");
    // The marks of the table: which of them never wait for this process's own devices.
    let marked: BTreeSet<String> = rows
        .iter()
        .filter(|row| row[0].contains('*'))
        .flat_map(|row| names(&row[0]))
        .map(str::to_owned)
        .collect();
    let marking: BTreeSet<String> = code()
        .iter()
        .filter(|(_, text)| {
            text.contains("mark_io_thread()")
                && (text.contains("thread::Builder::new()") || text.contains("threads.spawn"))
        })
        .flat_map(|(file, text)| threads(file, text))
        .collect();
    assert!(
        marking.is_subset(&marked),
        "{marking:?} are marked as I/O threads, and the page marks {marked:?}"
    );
}

/// Dependencies of a manifest on crates of this workspace.
fn imports(manifest: &str, crates: &BTreeSet<String>) -> BTreeSet<String> {
    let section = manifest.split("\n[dependencies]\n").nth(1).unwrap_or_default();
    let section = section.split("\n[").next().unwrap_or_default();
    let keys = section.lines().filter_map(|line| line.split(['.', ' ', '=']).next());
    keys.filter(|key| crates.contains(*key)).map(str::to_owned).collect()
}

#[test]
fn the_crates_are_the_members_of_the_workspace_and_import_what_the_page_says() {
    let mut members: BTreeSet<String> = fs::read_dir(root().join("src"))
        .unwrap()
        .map(Result::unwrap)
        .filter(|entry| entry.path().join("Cargo.toml").exists())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    members.insert("turbobd".into()); // the package at the root, with its sources in src/turbobd
    let rows = table(&text("ARCHITECTURE.md"), &["crate", "has", "never names", "imports"]);
    let listed: Vec<String> = rows.iter().map(|row| names(&row[0])[0].to_owned()).collect();
    assert_eq!(members, listed.iter().cloned().collect(), "crates of ARCHITECTURE.md");
    for (number, row) in rows.iter().enumerate() {
        let name = &listed[number];
        let above: BTreeSet<String> = listed[..number].iter().cloned().collect();
        let mut said: BTreeSet<String> = names(&row[3]).into_iter().map(str::to_owned).collect();
        if row[3].starts_with("all above") {
            said = above.difference(&said).cloned().collect();
        }
        let manifest =
            if name == "turbobd" { "Cargo.toml".into() } else { format!("src/{name}/Cargo.toml") };
        let imported = imports(&text(manifest), &members);
        assert_eq!(imported, said, "what {name} imports, and what ARCHITECTURE.md says");
        assert!(imported.is_subset(&above), "{name} imports a crate below it");
    }
    let readme = text("README.md");
    let line = readme.split("The crates under `src/`").nth(1).expect("README.md lists the crates");
    let sentence = line.split('.').next().unwrap_or_default();
    let named: BTreeSet<String> = names(sentence).into_iter().map(str::to_owned).collect();
    assert_eq!(members, named, "crates of README.md");
}

#[test]
fn every_metric_that_a_page_names_is_counted() {
    let all: BTreeSet<&str> =
        host::metrics::names::all().iter().map(|metric| metric.name).collect();
    let mut checked = 0;
    for page in pages() {
        for quote in quoted(&text(&page)) {
            let names = quote.split(|letter: char| {
                !letter.is_ascii_alphanumeric() && letter != '_' && letter != '*'
            });
            // The targets of the log are crates.
            for name in names.filter(|name| {
                name.starts_with("turbobd_")
                    && !quote.contains("RUST_LOG")
                    && *name != "turbobd_NAME"
            }) {
                checked += 1;
                let there = match name.strip_suffix('*') {
                    Some(start) => all.iter().any(|metric| metric.starts_with(start)),
                    None => all.contains(name) || all.contains(name.trim_end_matches("_bucket")),
                };
                assert!(there, "{page} names the metric {name}, which does not exist");
            }
        }
    }
    assert!(checked > 60, "only {checked} metrics were found");
}

#[test]
fn every_table_of_a_page_has_its_header() {
    for page in pages() {
        let page_text = prose(&text(&page));
        let lines: Vec<&str> = page_text.lines().collect();
        let is_rule = |line: &str| line.starts_with("|---");
        for (number, line) in lines.iter().enumerate() {
            let begins =
                line.starts_with('|') && (number == 0 || !lines[number - 1].starts_with('|'));
            if begins {
                let under = lines.get(number + 1).copied().unwrap_or_default();
                let over = lines.get(number + 2).copied().unwrap_or_default();
                assert!(
                    !is_rule(line) && is_rule(under) && !is_rule(over),
                    "{page}: the table at {line:?}"
                );
            }
        }
    }
}

#[test]
fn every_key_that_a_page_names_is_in_the_page_of_keys() {
    let config = text("CONFIG.md");
    let keys: BTreeSet<&str> = config
        .lines()
        .filter(|line| line.starts_with("| `"))
        .filter_map(|line| names(line).first().copied())
        .collect();
    assert!(keys.contains("turbobd.memoryCacheMB"));
    for page in pages() {
        for quote in quoted(&text(&page)) {
            let is_own = quote.strip_prefix("turbobd.").is_some_and(|rest| {
                !["service", "sock", "lock", "log", "segments"].contains(&rest)
                    && rest.starts_with(|first: char| first.is_ascii_lowercase())
            });
            let key = quote.split([' ', '=']).next().unwrap_or_default();
            if is_own {
                let there = keys.contains(key)
                    || keys.iter().any(|known| known.starts_with(&format!("{key}.")));
                assert!(there, "{page} names the key {key}, which CONFIG.md does not have");
            }
        }
    }
}

/// Variants of the enum that `T` is, as serde lists them for a name that is none.
fn variants<T: serde::de::DeserializeOwned>() -> BTreeSet<String> {
    let error = serde_json::from_str::<T>("\"no such variant\"")
        .err()
        .expect("no such variant")
        .to_string();
    let (_, list) = error.split_once("expected one of ").unwrap_or_else(|| panic!("{error}"));
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Name of the variant of an example.
fn variant(example: &Value) -> String {
    match example {
        Value::String(name) => name.clone(),
        Value::Object(object) => object.keys().next().unwrap().clone(),
        other => panic!("{other} is no message"),
    }
}

#[test]
fn every_message_is_on_the_page_of_the_protocol_with_an_example_that_is_one() {
    let page = text("PROTOCOL.md");
    let (mut requests, mut replies) = (BTreeSet::new(), BTreeSet::new());
    for (kind, example) in blocks(&page) {
        let value: Value =
            serde_json::from_str(&example).unwrap_or_else(|error| panic!("{error} in {example}"));
        // What is written again must be what was read: so an example has every field, and no other.
        let again = match kind.as_str() {
            "json request" | "json request short" => {
                requests.insert(variant(&value));
                let request: Request = serde_json::from_value(value.clone())
                    .unwrap_or_else(|error| panic!("{error} in {example}"));
                serde_json::to_value(request).unwrap()
            }
            "json reply" => {
                replies.insert(variant(&value));
                let reply: Reply = serde_json::from_value(value.clone())
                    .unwrap_or_else(|error| panic!("{error} in {example}"));
                serde_json::to_value(reply).unwrap()
            }
            other => panic!("a block of the kind {other:?}"),
        };
        if !kind.ends_with("short") {
            assert_eq!(again, value, "the example is not what the program writes");
        }
    }
    assert_eq!(requests, variants::<Request>(), "requests");
    assert_eq!(replies, variants::<Reply>(), "replies");
    for name in variants::<Request>().iter().filter(|name| *name != "version") {
        assert!(page.contains(&format!("\n### `{name}`\n")), "no section about {name}");
    }
    let version = format!("version {}", client::protocol::VERSION);
    assert!(page.contains(&version), "the page does not describe {version}");
}

#[test]
fn the_codes_and_states_of_the_protocol_are_those_of_the_types() {
    let page = text("PROTOCOL.md");
    let rows = table(&page, &["code", "may pass", "meaning"]);
    let listed: Vec<&str> = rows.iter().map(|row| names(&row[0])[0]).collect();
    for row in &rows {
        let name = names(&row[0])[0];
        let code: Code = serde_json::from_value(Value::String(name.into())).unwrap();
        // A code that is none is read as internal.
        assert_eq!(serde_json::to_value(code).unwrap(), name, "{name} is no code");
        assert_eq!(row[1] == "yes", code.may_pass(), "{name}");
    }
    let source = text("src/client/error.rs");
    let body = source.split("pub enum Code {").nth(1).unwrap().split("\n}").next().unwrap();
    let written = body
        .lines()
        .map(str::trim)
        .filter(|line| line.ends_with(',') && !line.starts_with(['/', '#']));
    let snake = |name: &str| {
        let mut snake = String::new();
        for letter in name.trim_end_matches(',').chars() {
            if letter.is_ascii_uppercase() && !snake.is_empty() {
                snake.push('_');
            }
            snake.push(letter.to_ascii_lowercase());
        }
        snake
    };
    assert_eq!(
        written.map(snake).collect::<Vec<_>>(),
        listed,
        "codes of the type, and of the page"
    );
    let states: BTreeSet<String> = table(&page, &["`state`", "meaning"])
        .iter()
        .map(|row| names(&row[0])[0].to_owned())
        .collect();
    assert_eq!(states, variants::<DeviceState>());
}

#[test]
fn each_promise_of_security_names_tests_that_exist() {
    let page = text("SECURITY.md");
    let code: Vec<String> = ["src", "tests"]
        .iter()
        .flat_map(|folder| sources(&root().join(folder), "rs"))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let is_test = |name: &str| {
        code.iter().any(|text| {
            text.match_indices(&format!("fn {name}()"))
                .any(|(at, _)| text[..at].trim_end().ends_with("#[test]"))
        })
    };
    let rows = table(&page, &["who", "never", "held by"]);
    assert!(rows.len() >= 15, "{} promises", rows.len());
    for row in rows {
        let tests = names(&row[2]);
        assert!(!tests.is_empty(), "no test holds: {}", row[1]);
        for test in tests {
            assert!(is_test(test), "there is no test {test}, which holds: {}", row[1]);
        }
    }
}

#[test]
fn the_commands_of_the_readme_are_those_of_the_program() {
    let help = run(turbobd().arg("--help"));
    // A command stands at the beginning of its line, with what it does behind it.
    let commands: BTreeSet<&str> = help
        .lines()
        .filter_map(|line| line.strip_prefix("  "))
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, about)| {
            name.chars().all(|letter| letter.is_ascii_lowercase()) && about.starts_with(' ')
        })
        .map(|(name, _)| name)
        .filter(|name| !name.is_empty() && *name != "help")
        .collect();
    assert!(commands.len() > 10, "{help}");
    let rows = table(&text("README.md"), &["command", "does"]);
    let named: BTreeSet<String> = rows
        .iter()
        .flat_map(|row| names(&row[0]).into_iter().map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|command| command.split(' ').next().map(str::to_owned))
        .collect();
    let listed: BTreeSet<&str> = named.iter().map(String::as_str).collect();
    assert_eq!(commands, listed, "commands of the program, and of README.md");
}

#[test]
fn the_bounds_of_the_memory_formula_are_the_constants_of_the_code() {
    let rows = table(&text("OPERATING.md"), &["term", "bound", "set by"]);
    let mut checked = 0;
    for row in &rows {
        let [constant, file] = names(&row[2])[..] else { continue };
        let Some(source) = file.starts_with("src/").then(|| text(file)) else { continue };
        let line = source.lines().find(|line| line.contains(&format!("const {constant}: ")));
        let line = line.unwrap_or_else(|| panic!("{file} has no constant {constant}"));
        let (_, value) = line.split_once(" = ").unwrap();
        let value = value.split(';').next().unwrap();
        let number: u64 = match value.split_once(" << 20") {
            Some((mebibytes, _)) => mebibytes.parse().unwrap(),
            None => {
                value.replace('_', "").parse().unwrap_or_else(|_| panic!("{constant} is {value}"))
            }
        };
        let said = row[1].split(' ').any(|word| word == number.to_string());
        assert!(said, "{constant} of {file} is {number}, and the page says {}", row[1]);
        checked += 1;
    }
    assert!(checked >= 6, "only {checked} bounds name a constant");
}

/// The sample of `command` on the operator's page: the lines behind it.
fn sample(command: &str) -> String {
    let page = text("OPERATING.md");
    let blocks = blocks(&page);
    let prompt = format!("$ turbobd {command}");
    let block = blocks.iter().find(|(_, text)| text.lines().any(|line| line.starts_with(&prompt)));
    let (_, block) = block.unwrap_or_else(|| panic!("OPERATING.md has no sample of {command}"));
    let lines = block.lines().skip_while(|line| !line.starts_with(&prompt)).skip(1);
    lines.take_while(|line| !line.starts_with("$ ")).collect::<Vec<_>>().join("\n")
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn the_samples_of_the_operators_page_have_the_form_of_what_the_program_prints() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    fs::write(&config, "{}").unwrap();
    let program = || {
        let mut program = turbobd();
        program
            .env("TURBOBD_RUN_DIR", dir.path().join("run"))
            .env("TURBOBD_SERVICE_CONFIG", &config);
        program
    };
    let listed = run(program().arg("ls"));
    let head = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    assert_eq!(words(&head(&sample("ls"))), words(&head(&listed)));

    let report = program().args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    let facts: Vec<&str> = report["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["what"].as_str().unwrap())
        .collect();
    let shown = sample("doctor");
    for fact in &facts {
        assert!(shown.contains(fact), "the sample of doctor lacks {fact}");
    }

    let layer = dir.path().join("layer.tar.gz");
    let tar = "mkdir tree && echo hello > tree/file && tar -C tree -cf - . | gzip > layer.tar.gz";
    run(std::process::Command::new("sh").arg("-c").arg(tar).current_dir(dir.path()));
    let image = crate::machine::layout(&dir.path().join("image"), "v1", &[layer]);
    run(program().args(["convert", "-r", &image, "-i", "v1", "--turboOCI", "v1-turbo"]));
    let printed = run(program().args(["inspect", &format!("{image}:v1-turbo")]));
    let heads = |text: &str| -> BTreeMap<usize, Vec<String>> {
        let lines = text.lines().take(3).enumerate();
        lines
            .map(|(number, line)| {
                (number, words(line).iter().map(|&word| word.to_owned()).collect())
            })
            .collect()
    };
    let (shown, printed) = (heads(&sample("inspect")), heads(&printed));
    for line in 0..3 {
        // Of the first two lines the name, of the third all headings.
        let most = if line < 2 { 1 } else { usize::MAX };
        let cut = |words: &[String]| words.iter().take(most).cloned().collect::<Vec<_>>();
        assert_eq!(
            cut(&shown[&line]),
            cut(&printed[&line]),
            "line {line} of the sample of inspect"
        );
    }
}

#[test]
fn the_figures_of_the_readme_are_in_the_file_of_figures() {
    let figures: Value = serde_json::from_str(&text("perf/figures.json")).unwrap();
    let all = figures["figures"].as_array().unwrap();
    let known: BTreeSet<(String, String)> = all
        .iter()
        .map(|figure| {
            let get = |key: &str| {
                figure[key].as_str().unwrap_or_else(|| panic!("no {key} in {figure}")).to_owned()
            };
            for key in ["what", "unit"] {
                assert!(!get(key).is_empty(), "{figure}");
            }
            for seen in figure["seen"].as_array().unwrap() {
                assert!(seen["value"].is_number() && seen["machine"].is_string(), "{figure}");
                let machine = seen["machine"].as_str().unwrap();
                assert!(figures["machines"][machine].is_string(), "{machine} is not described");
            }
            let readme = get("readme");
            let values = figure["seen"]
                .as_array()
                .unwrap()
                .iter()
                .map(|seen| seen["value"].as_f64().unwrap());
            let worst = match figure["better"].as_str() {
                Some("lower") => values.fold(f64::MIN, f64::max),
                Some("higher") => values.fold(f64::MAX, f64::min),
                other => panic!("{figure}: better is lower or higher, not {other:?}"),
            };
            let shown = readme.split(' ').next().unwrap_or_default();
            let shown: f64 = if shown.is_empty() { worst } else { shown.parse().unwrap() };
            assert!(
                (shown - worst).abs() < 1e-9,
                "README.md shows {shown}, and the worst seen is {worst}: {figure}"
            );
            (get("command"), readme)
        })
        .collect();
    let rows = table(&text("README.md"), &["command", "measures", "figure"]);
    for row in rows {
        let pair = (names(&row[0])[0].to_owned(), row[2].clone());
        assert!(known.contains(&pair), "perf/figures.json has no figure {pair:?}");
    }
}
