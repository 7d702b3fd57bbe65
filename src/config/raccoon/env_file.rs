//! Lines of an env file, as Raccoon's library, systemd and shells read them where they agree.
//!
//! `NAME=value`, `export NAME=value`; a value bare (up to ` #`), in single quotes (as it stands) or in double quotes
//! (`\"`, `\\`, `\n`, `\$`). Where they do not agree, which is `$NAME` in a value, the line is refused.

/// A variable of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Variable {
    /// Its name, in capitals: Raccoon does not mind.
    pub name: String,
    pub value: String,
    /// From 1.
    pub line: usize,
}

/// A line that cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LineError {
    /// The part before the `=`: the rest may be a secret.
    pub text: String,
    pub line: usize,
    pub message: &'static str,
}

/// The variables of a file. A name that comes twice comes twice.
pub(super) fn parse(text: &str) -> impl Iterator<Item = Result<Variable, LineError>> + '_ {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    text.lines().enumerate().filter_map(|(at, line)| {
        let line = line.trim();
        (!line.is_empty() && !line.starts_with('#')).then(|| parse_line(line, at + 1))
    })
}

fn parse_line(text: &str, line: usize) -> Result<Variable, LineError> {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    let error = |message| LineError { text: name.trim().to_owned(), line, message };
    if !text.contains('=') {
        return Err(error("is not NAME=value"));
    }
    let bare_name = name.trim();
    let bare_name = bare_name.strip_prefix("export ").map_or(bare_name, str::trim);
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if bare_name.is_empty()
        || !bare_name.bytes().all(legal)
        || bare_name.starts_with(|first: char| first.is_ascii_digit())
    {
        return Err(error("is no name of a variable"));
    }
    let value = parse_value(value.trim()).map_err(error)?;
    Ok(Variable { name: bare_name.to_ascii_uppercase(), value, line })
}

fn parse_value(text: &str) -> Result<String, &'static str> {
    const REFERENCE: &str = "refers to another variable with $: write the value itself, a $ in single quotes";
    if let Some(rest) = text.strip_prefix('\'') {
        let (value, after) = rest.split_once('\'').ok_or("has a quote that is not closed")?;
        return rest_is_comment(after).map(|()| value.to_owned());
    }
    if let Some(rest) = text.strip_prefix('"') {
        let mut value = String::new();
        let mut letters = rest.chars();
        while let Some(letter) = letters.next() {
            match letter {
                '"' => return rest_is_comment(letters.as_str()).map(|()| value),
                '$' => return Err(REFERENCE),
                '\\' => match letters.next() {
                    Some('n') => value.push('\n'),
                    Some(escaped @ ('"' | '\\' | '$')) => value.push(escaped),
                    Some(other) => value.extend(['\\', other]),
                    None => break,
                },
                other => value.push(other),
            }
        }
        return Err("has a quote that is not closed");
    }
    let comment = text.find(" #").or_else(|| text.find("\t#")).unwrap_or(text.len());
    let value = if text.starts_with('#') { "" } else { text[..comment].trim_end() };
    if value.contains('$') { Err(REFERENCE) } else { Ok(value.to_owned()) }
}

fn rest_is_comment(rest: &str) -> Result<(), &'static str> {
    let rest = rest.trim();
    if rest.is_empty() || rest.starts_with('#') { Ok(()) } else { Err("has something behind its closing quote") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(line: &str) -> Result<(String, String), &'static str> {
        let mut lines: Vec<_> = parse(line).collect();
        assert_eq!(lines.len(), 1, "{line}");
        lines.remove(0).map(|variable| (variable.name, variable.value)).map_err(|error| error.message)
    }

    #[test]
    fn lines_are_read_as_people_write_them() {
        for (line, name, value) in [
            ("A=1", "A", "1"),
            ("  export A_b = two words  ", "A_B", "two words"),
            ("A=", "A", ""),
            ("A=\"127.0.0.1:9092\" # or kafka:9092", "A", "127.0.0.1:9092"),
            ("A=x#y # z", "A", "x#y"),
            ("A=# nothing", "A", ""),
            (r#"A="a \"b\" \\ \$c \d""#, "A", r#"a "b" \ $c \d"#),
            ("A='$B # \"'", "A", "$B # \""),
            ("A=a=b", "A", "a=b"),
            ("\u{feff}A=1", "A", "1"),
            ("A=1\r\n", "A", "1"),
        ] {
            assert_eq!(one(line), Ok((name.into(), value.into())), "{line}");
        }
        for line in ["A", "1A=2", "A B=2", "=2", "A='x", "A=\"x", "A=\"x\" y", "A=$B", "A=\"${B}\"", "A=\"x\\"] {
            assert!(one(line).is_err(), "{line}");
        }
        let lines: Vec<_> = parse("# c\n\nA=1\n  # d\nB=2\nA=3").map(|line| line.unwrap().line).collect();
        assert_eq!(lines, [3, 5, 6]);
    }

    proptest! {
        #[test]
        fn nothing_panics_and_an_error_shows_no_value(text in "[ -~\n\u{e4}]{0,80}") {
            for error in parse(&text).filter_map(Result::err) {
                prop_assert!(!error.text.contains('='));
            }
        }
    }
}
