//! Why something could not be done, in the words of the person who reads the table.

/// A step that failed. Where it belongs to a system, its text stands in the cell of that system.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Failure {
    /// A program is not there.
    #[error("{program} is missing: {remedy}")]
    Missing {
        /// Name of the program.
        program: String,
        /// Where it comes from.
        remedy: String,
    },
    /// A system call or a file failed.
    #[error("Cannot {what}: {why}")]
    Cannot {
        /// The attempt, as it follows "cannot".
        what: String,
        /// The error of the system.
        why: String,
    },
    /// A program ended with an error.
    #[error("{command} failed: {output}")]
    Program {
        /// The program and its first arguments.
        command: String,
        /// The end of its output.
        output: String,
    },
    /// Something did not happen in its time.
    #[error("{what} did not happen within {seconds} s{detail}")]
    Late {
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: u64,
        /// What was seen meanwhile; empty, or begins with a colon.
        detail: String,
    },
    /// A run was not what it must be, for example not cold.
    #[error("{0}")]
    Invalid(String),
}

impl Failure {
    /// `what` could not be done, because of `why`.
    pub(crate) fn cannot(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Cannot { what: what.into(), why: why.into() }
    }

    /// `program` is not there, and comes from `remedy`.
    pub(crate) fn missing(program: &str, remedy: &str) -> Self {
        Self::Missing { program: program.to_owned(), remedy: remedy.to_owned() }
    }
}

/// Adds the attempt to an error of the system.
pub(crate) trait Attempt<T> {
    /// The value, or the failure of `what`, as it follows "cannot".
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: ToString> Attempt<T> for Result<T, E> {
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::cannot(what(), error.to_string()))
    }
}
