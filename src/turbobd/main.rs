//! `turbobd`: parse, dispatch, exit code; nothing else.

fn main() -> std::process::ExitCode {
    turbobd::main()
}
