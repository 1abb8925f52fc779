//! Man pages and shell completions, generated from the definition of the command line.
//!
//! `scripts/package` runs this tool: `turbobd-packaging DIR` writes these files into `DIR`, in the layout below
//! `/usr`, so that a package copies them. The output depends on nothing but the command line: no date, no host.
//!
//! ```text
//! share/man/man1/turbobd.1, turbobd-attach.1, turbobd-trace-record.1, …
//! share/bash-completion/completions/turbobd
//! share/zsh/site-functions/_turbobd
//! share/fish/vendor_completions.d/turbobd.fish
//! ```

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::Command;
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

/// End of the page `turbobd(1)`: facts that hold for every command.
const EVERY_COMMAND: &str = r#".SH "EXIT STATUS"
.TP
\fB0\fR
The command is done.
.TP
\fB1\fR
The operation failed. One line on stderr names the command, the failure and its causes.
.TP
\fB2\fR
The arguments are wrong.
.SH FILES
.TP
\fI/etc/turbobd/config.json\fR, \fI/etc/overlaybd/overlaybd.json\fR, \fI/etc/overlaybd/config.json\fR
Configuration of the host; the first existing file counts. CONFIG.md documents the keys.
.TP
\fI/var/lib/turbobd/meta\fR
Meta images that this host built for plain images.
.SH "SEE ALSO"
README.md, CONFIG.md and METRICS.md in
.IR /usr/share/doc/turbobd .
"#;

fn main() -> ExitCode {
    let Some(dir) = std::env::args_os().nth(1) else {
        eprintln!("usage: turbobd-packaging DIR");
        return ExitCode::from(2);
    };
    match generate(Path::new(&dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("turbobd-packaging: {}: {error}", Path::new(&dir).display());
            ExitCode::FAILURE
        }
    }
}

/// Writes all pages and completions below `dir`.
fn generate(dir: &Path) -> io::Result<()> {
    let pages = dir.join("share/man/man1");
    fs::create_dir_all(&pages)?;
    clap_mangen::generate_to(turbobd::command(), &pages)?;
    overview(&pages)?;
    for (shell, folder) in [
        (Shell::Bash, "share/bash-completion/completions"),
        (Shell::Zsh, "share/zsh/site-functions"),
        (Shell::Fish, "share/fish/vendor_completions.d"),
    ] {
        let folder = dir.join(folder);
        fs::create_dir_all(&folder)?;
        let file = generate_to(shell, &mut turbobd::command(), "turbobd", &folder)?;
        // bash looks for a file of the command's own name.
        if shell == Shell::Bash {
            fs::rename(file, folder.join("turbobd"))?;
        }
    }
    Ok(())
}

/// Writes `turbobd.1` again, with [`EVERY_COMMAND`] at its end.
fn overview(pages: &Path) -> io::Result<()> {
    let mut command: Command = turbobd::command().disable_help_subcommand(true); // it has no page
    command.build();
    let mut page = Vec::new();
    Man::new(command).render(&mut page)?;
    page.extend_from_slice(EVERY_COMMAND.as_bytes());
    fs::write(pages.join("turbobd.1"), page)
}
