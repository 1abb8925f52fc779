//! containerd's filter language (`pkg/filters`).
//!
//! ```text
//! filter    = selector { "," selector }              all must hold
//! selector  = path [ operator value ]                without operator: the field is there
//! path      = field { "." field }                    name, parent, kind, labels.KEY, labels."KEY"
//! operator  = "==" | "!=" | "~="                     equal, different, matches a regular expression
//! field     = letters, digits, "_" | quoted
//! value     = no comma and no space | quoted         quotes: "…"; for ~= also /…/ and |…|
//! ```
//!
//! Of several filters one must hold. A field that is absent is empty for `!=` and `~=`. containerd examines the answer again, so an answer
//! may hold too much: a regular expression that this crate's library does not know matches everything.

use std::str::Chars;

use regex::{Regex, RegexBuilder};
use thiserror::Error;

use super::error::SnapshotError;
use super::store::record::Record;

/// Memory of a compiled regular expression, in bytes, at most.
const LARGEST_EXPRESSION: usize = 1 << 18;

/// Most filters in a request, and most selectors in a filter.
const MOST: usize = 1024;

/// Reason why a text is no filter.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{what} at character {at}")]
pub struct FilterError {
    /// What was found or missing.
    pub what: &'static str,
    /// Position in the filter, from 0.
    pub at: usize,
}

/// A list of filters: one of them must hold. An empty list holds always.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    any: Vec<Vec<Condition>>,
}

#[derive(Clone, Debug)]
struct Condition {
    field: RecordField,
    test: FilterTest,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum RecordField {
    Name,
    Parent,
    Kind,
    Label(String),
    /// Any other: no record has it.
    Absent,
}

#[derive(Clone, Debug)]
enum FilterTest {
    Present,
    Equal(String),
    Different(String),
    Matches(Regex),
    /// A regular expression that is not understood.
    Anything,
}

impl Filter {
    /// Parses the filters of a request.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Filter`], [`SnapshotError::Invalid`].
    pub fn parse(filters: &[String]) -> Result<Self, SnapshotError> {
        if filters.len() > MOST {
            return Err(SnapshotError::Invalid(format!(
                "The request has more than {MOST} filters"
            )));
        }
        let mut any = Vec::with_capacity(filters.len());
        for filter in filters {
            let conditions = FilterParser::new(filter).parse().map_err(|source| {
                SnapshotError::Filter { filter: filter.chars().take(256).collect(), source }
            })?;
            any.push(conditions);
        }
        Ok(Self { any })
    }

    /// True if the record matches.
    #[must_use]
    pub fn matches(&self, record: &Record) -> bool {
        self.any.is_empty()
            || self
                .any
                .iter()
                .any(|conditions| conditions.iter().all(|condition| condition.holds(record)))
    }
}

impl Condition {
    fn holds(&self, record: &Record) -> bool {
        let value = match &self.field {
            RecordField::Name => Some(record.name.as_str()),
            RecordField::Parent => Some(record.parent.as_deref().unwrap_or_default()),
            RecordField::Kind => Some(record.kind.word()),
            RecordField::Label(key) => record.labels.get(key).map(String::as_str),
            RecordField::Absent => None,
        };
        match &self.test {
            FilterTest::Present => value.is_some(),
            FilterTest::Equal(wanted) => value == Some(wanted),
            FilterTest::Different(other) => value.unwrap_or_default() != other,
            FilterTest::Matches(expression) => expression.is_match(value.unwrap_or_default()),
            FilterTest::Anything => true,
        }
    }
}

/// A piece of a filter, as containerd's scanner cuts it.
#[derive(Debug, PartialEq, Eq)]
enum FilterPiece {
    Field(String),
    Value(String),
    Quoted(char, String),
    Operator(String),
    Separator(char),
    End,
}

/// Reads one filter.
struct FilterParser<'a> {
    rest: Chars<'a>,
    at: usize,
    /// A value is expected, which may have characters that a field may not.
    value: bool,
}

impl<'a> FilterParser<'a> {
    fn new(filter: &'a str) -> Self {
        Self { rest: filter.chars(), at: 0, value: false }
    }

    fn parse(mut self) -> Result<Vec<Condition>, FilterError> {
        let mut conditions = Vec::new();
        if self.peek().is_none() {
            return Ok(conditions);
        }
        loop {
            conditions.push(self.condition()?);
            match self.peek() {
                None => return Ok(conditions),
                Some(',') if conditions.len() < MOST => _ = self.piece()?,
                Some(',') => return Err(self.error("too many selectors")),
                Some(_) => return Err(self.error("unexpected input")),
            }
        }
    }

    fn condition(&mut self) -> Result<Condition, FilterError> {
        let field = self.path()?;
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Condition { field, test: FilterTest::Present });
        }
        let FilterPiece::Operator(operator) = self.piece()? else {
            return Err(self.error("no operator (==, !=, ~=)"));
        };
        let matches = operator == "~=";
        let value = match self.piece()? {
            FilterPiece::Value(text)
            | FilterPiece::Field(text)
            | FilterPiece::Quoted('"', text) => text,
            FilterPiece::Quoted(_, text) if matches => text,
            _ => return Err(self.error("no value")),
        };
        let test = match operator.as_str() {
            "==" => FilterTest::Equal(value),
            "!=" => FilterTest::Different(value),
            "~=" => match RegexBuilder::new(&value).size_limit(LARGEST_EXPRESSION).build() {
                Ok(expression) => FilterTest::Matches(expression),
                Err(error) => {
                    tracing::warn!("A filter's regular expression is not understood: {error}");
                    FilterTest::Anything
                }
            },
            _ => return Err(self.error("unknown operator (known: ==, !=, ~=)")),
        };
        Ok(Condition { field, test })
    }

    fn path(&mut self) -> Result<RecordField, FilterError> {
        let mut parts = vec![self.field()?];
        while self.peek() == Some('.') {
            self.piece()?;
            parts.push(self.field()?);
        }
        let single = parts.len() == 1;
        Ok(match parts[0].as_str() {
            // containerd looks at the first part alone, unless it is `labels`.
            "name" => RecordField::Name,
            "parent" => RecordField::Parent,
            "kind" => RecordField::Kind,
            "labels" if !single => RecordField::Label(parts[1..].join(".")),
            _ => RecordField::Absent,
        })
    }

    fn field(&mut self) -> Result<String, FilterError> {
        match self.piece()? {
            FilterPiece::Field(text) | FilterPiece::Quoted('"', text) => Ok(text),
            _ => Err(self.error("no field")),
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.clone().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.rest.next();
        self.at += usize::from(next.is_some());
        next
    }

    fn error(&self, what: &'static str) -> FilterError {
        FilterError { what, at: self.at }
    }

    fn take_while(&mut self, first: char, belongs: impl Fn(char) -> bool) -> String {
        let mut text = String::from(first);
        while let Some(c) = self.peek().filter(|c| belongs(*c)) {
            text.push(c);
            self.next();
        }
        text
    }

    fn piece(&mut self) -> Result<FilterPiece, FilterError> {
        loop {
            let Some(first) = self.next() else { return Ok(FilterPiece::End) };
            return match first {
                '"' | '/' | '|' => Ok(FilterPiece::Quoted(first, self.quoted(first)?)),
                ',' | '.' => {
                    self.value = false;
                    Ok(FilterPiece::Separator(first))
                }
                '=' | '!' | '~' => {
                    let operator = self.take_while(first, |c| matches!(c, '=' | '!' | '~'));
                    self.value = true;
                    Ok(FilterPiece::Operator(operator))
                }
                '\0' => Err(self.error("a null character")),
                space if space.is_whitespace() => continue,
                _ if self.value => {
                    self.value = false;
                    let belongs = |c: char| c != ',' && !c.is_whitespace() && !c.is_control();
                    Ok(FilterPiece::Value(self.take_while(first, belongs)))
                }
                letter if is_of_field(letter) => {
                    Ok(FilterPiece::Field(self.take_while(letter, is_of_field)))
                }
                _ => Err(self.error("unexpected input")),
            };
        }
    }

    /// The text up to the closing quote, without its escapes. They are Go's: `\x41`, `\u0041`, `\101`, `\n`, the quote.
    fn quoted(&mut self, quote: char) -> Result<String, FilterError> {
        let mut bytes = Vec::new();
        loop {
            match self.next() {
                None | Some('\n') => return Err(self.error("a quote without an end")),
                Some('\\') => self.escape(quote, &mut bytes)?,
                Some(c) if c == quote => break,
                Some(c) => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        // Names and labels are UTF-8: what is none equals no other text either.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn escape(&mut self, quote: char, bytes: &mut Vec<u8>) -> Result<(), FilterError> {
        let wrong = "an unknown escape";
        let c = self.next().ok_or(self.error(wrong))?;
        let mut put = |c: char| bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        match c {
            'a' => put('\x07'),
            'b' => put('\x08'),
            'f' => put('\x0c'),
            'n' => put('\n'),
            'r' => put('\r'),
            't' => put('\t'),
            'v' => put('\x0b'),
            '\\' => put('\\'),
            c if c == quote => put(c),
            'x' => {
                let byte = self.digits(0, 2, 16)?;
                bytes.push(u8::try_from(byte).map_err(|_| self.error(wrong))?);
            }
            'u' | 'U' => {
                let number = self.digits(0, if c == 'u' { 4 } else { 8 }, 16)?;
                put(char::from_u32(number).ok_or(self.error(wrong))?);
            }
            '0'..='7' => {
                let byte = self.digits(u32::from(c) - u32::from('0'), 2, 8)?;
                bytes.push(u8::try_from(byte).map_err(|_| self.error(wrong))?);
            }
            _ => return Err(self.error(wrong)),
        }
        Ok(())
    }

    fn digits(&mut self, start: u32, count: usize, base: u32) -> Result<u32, FilterError> {
        let mut number = start;
        for _ in 0..count {
            let digit = self.next().and_then(|c| c.to_digit(base));
            let digit = digit.ok_or(self.error("a wrong number in an escape"))?;
            number = number
                .checked_mul(base)
                .and_then(|number| number.checked_add(digit))
                .ok_or(self.error("a wrong number in an escape"))?;
        }
        Ok(number)
    }
}

fn is_of_field(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let text = r#"{"id":1,"snapshotter":"s","name":"k8s.io/1/extract-1 sha256:aa","parent":"base","kind":"active",
            "created":1,"updated":1,"labels":{"foo":"bar","containerd.io/snapshot.ref":"sha256:cc","a.b":"c,d"}}"#;
        serde_json::from_str(text).unwrap()
    }

    fn holds(filters: &[&str]) -> bool {
        let filters: Vec<String> = filters.iter().map(|filter| (*filter).to_owned()).collect();
        Filter::parse(&filters).unwrap().matches(&record())
    }

    #[test]
    fn filters_hold_as_containerd_evaluates_them() {
        let cases = [
            ("", true),
            ("name", true),
            ("labels.foo", true),
            ("labels.absent", false),
            ("labels", false),
            ("unknown", false),
            ("kind==active", true),
            ("kind==Active", false),
            ("kind!=committed", true),
            ("parent==base,kind==active", true),
            ("parent==base,kind==view", false),
            (r#"parent=="""#, false),
            (r#"name=="k8s.io/1/extract-1 sha256:aa""#, true),
            ("name~=extract", true),
            (r"name~=/sha256:a+$/", true),
            (r"name~=|^k8s\\.io/[0-9]+/|", true),
            (r"labels.foo ~= ^b.r$", true),
            (r#"labels."containerd.io/snapshot.ref"=="sha256:cc",parent=="base""#, true),
            (r#"labels."containerd.io/snapshot.ref"==sha256:cc"#, true),
            (r#"labels."containerd.io/snapshot.ref"=="sha256:dd",parent=="base""#, false),
            (r#"labels.a.b=="c,d""#, true),
            (r#"labels."a.b"=="c,d""#, true),
            (r#"labels.foo=="\x62\u0061\162""#, true),
            ("labels.absent!=x", true),
            (r#"labels.absent!="""#, false),
            (r"labels.absent~=/^$/", true),
            ("labels.foo~=(", true),
        ];
        for (filter, expected) in cases {
            assert_eq!(holds(&[filter]), expected, "{filter}");
        }
        assert!(holds(&[]));
        assert!(holds(&["kind==view", "kind==active"]));
        assert!(!holds(&["kind==view", "kind==committed"]));
    }

    #[test]
    fn a_text_that_is_no_filter_is_refused_with_its_place() {
        for filter in [
            "name=",
            "name==",
            "==x",
            "name=x",
            "name==a b",
            "name==\"x",
            "name,",
            ",",
            "name==/x/",
            "labels.",
            "name=!=x",
            "a\0",
            r#"name=="\q""#,
            r#"name=="\x4""#,
            r#"name=="\U99999999""#,
            "-",
        ] {
            let error = Filter::parse(&[filter.to_owned()]).unwrap_err();
            assert!(matches!(error, SnapshotError::Filter { .. }), "{filter}: {error:?}");
        }
        assert!(Filter::parse(&vec![String::new(); MOST + 1]).is_err());
    }

    #[test]
    fn an_expression_that_would_take_much_memory_is_not_compiled() {
        assert!(holds(&["name~=/(a{1000}){1000}/"]));
    }
}
