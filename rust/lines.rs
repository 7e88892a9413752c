//! Lines of JSON with arrays of expert ids, read fast where they are plain.
//!
//! A trace as text is millions of objects such as `{"experts": [[3, 17], [8, 1]], "sequence": 0}`. [`scan`] reads runs
//! of them without making a value of anything else, and ends in front of the first line that it does not take: one that
//! is wrong, or right in a way that few writers use (an escape in a key, a key twice, rows of different lengths, ids
//! beyond 16 bits, NaN). The caller reads that line with a general parser, which also says what is wrong with it; so
//! nothing is decided here but what is beyond doubt.

use std::collections::HashMap;
use std::io::BufRead;

use serde::Deserialize;
use serde::de::IgnoredAny;

/// Stands for an integer that a line does not have.
pub const NO_INTEGER: i64 = i64::MIN;
/// Stands for a text that a line does not have.
pub const NO_TEXT: i64 = -1;

/// Columns of [`Scanned::table`] before those of integers and texts: which array, and its sizes, outermost first.
pub const SIZES: usize = 4;

/// The keys to read; others are skipped.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    /// Arrays of ids and their dimensions, 2 or 3. A line must have exactly one of them.
    pub arrays: Vec<(String, usize)>,
    /// Integers.
    pub integers: Vec<String>,
    /// Texts.
    pub texts: Vec<String>,
}

/// What a run of lines holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scanned {
    /// First byte after the lines taken.
    pub end: usize,
    /// Line ends among them, blank lines included.
    pub ends: usize,
    /// Ids of all lines one after the other.
    pub ids: Vec<u16>,
    /// A row for every line that is not blank: number of the array, its sizes (1 in front of two), integers, texts.
    pub table: Vec<i64>,
    /// Texts that the table numbers.
    pub texts: Vec<String>,
}

/// Reads lines from byte `start` on, up to the first that is not plain. The last one need not have an end.
#[must_use]
pub fn scan(text: &[u8], start: usize, keys: &Keys) -> Scanned {
    let mut lines = Scanned { end: start, ..Scanned::default() };
    let mut numbers = HashMap::new();
    let mut row = vec![0; SIZES + keys.integers.len() + keys.texts.len()];
    while lines.end < text.len() {
        let size = (&text[lines.end..]).skip_until(b'\n').unwrap_or(0);
        let line = &text[lines.end..lines.end + size];
        if !line.trim_ascii().is_empty() {
            let before = (lines.ids.len(), numbers.len() as i64);
            let mut cursor = Cursor { line: if std::str::from_utf8(line).is_ok() { line } else { b"" } };
            if cursor.object(keys, &mut row, &mut lines.ids, &mut numbers).is_none() {
                lines.ids.truncate(before.0);
                numbers.retain(|_, number| *number < before.1);
                break;
            }
            lines.table.extend_from_slice(&row);
        }
        lines.ends += usize::from(line.ends_with(b"\n"));
        lines.end += size;
    }
    let mut names: Vec<_> = numbers.into_iter().collect();
    names.sort_unstable_by_key(|name| name.1);
    lines.texts = names.into_iter().map(|name| name.0).collect();
    lines
}

/// What is left of a line. What it reads is None where the line is not plain.
struct Cursor<'a> {
    line: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// Reads the whole line into a row of the table.
    fn object(
        &mut self,
        keys: &Keys,
        row: &mut [i64],
        ids: &mut Vec<u16>,
        numbers: &mut HashMap<String, i64>,
    ) -> Option<()> {
        let (integers, texts) = (SIZES, SIZES + keys.integers.len());
        row.fill(NO_TEXT);
        row[integers..texts].fill(NO_INTEGER);
        self.expect(b'{')?;
        loop {
            let key: &str = self.value()?;
            self.expect(b':')?;
            let is_key = |name: &String| name == key;
            if let Some(which) = keys.arrays.iter().position(|(name, _)| name == key) {
                only(row[0] == NO_TEXT)?;
                let depth = keys.arrays[which].1;
                row[..SIZES].copy_from_slice(&[which as i64, i64::from(depth == 2), 0, 0]);
                self.list(&mut row[SIZES - depth..SIZES], ids)?;
            } else if let Some(which) = keys.integers.iter().position(is_key) {
                only(row[integers + which] == NO_INTEGER)?;
                row[integers + which] = self.value()?;
                only(row[integers + which] != NO_INTEGER)?;
            } else if let Some(which) = keys.texts.iter().position(is_key) {
                only(row[texts + which] == NO_TEXT)?;
                let number = numbers.len() as i64;
                row[texts + which] = *numbers.entry(self.value()?).or_insert(number);
            } else {
                self.value::<IgnoredAny>()?;
            }
            match self.mark()? {
                b',' => {}
                b'}' => break,
                _ => return None,
            }
        }
        only(row[0] != NO_TEXT && self.line.trim_ascii().is_empty())
    }

    /// Reads lists in lists; those of a depth have one length, which is 0 in `sizes` until it is seen.
    fn list(&mut self, sizes: &mut [i64], ids: &mut Vec<u16>) -> Option<()> {
        let [size, inner @ ..] = sizes else { return None };
        self.expect(b'[')?;
        let mut count = 0;
        loop {
            if inner.is_empty() {
                ids.push(self.id()?);
            } else {
                self.list(inner, ids)?;
            }
            count += 1;
            match self.mark()? {
                b',' => {}
                b']' => break,
                _ => return None,
            }
        }
        only(*size == 0 || *size == count)?;
        *size = count;
        Some(())
    }

    /// Reads a number below 2^16. What may not follow one (a digit after a zero, a point) is no mark.
    #[inline(always)]
    fn id(&mut self) -> Option<u16> {
        self.blanks();
        let mut value = u32::from(self.digit()?);
        if value > 0 {
            while let Some(digit) = self.digit() {
                value = value * 10 + u32::from(digit);
                only(value < 1 << 16)?;
            }
        }
        Some(value as u16)
    }

    #[inline(always)]
    fn digit(&mut self) -> Option<u8> {
        let (first, rest) = self.line.split_first()?;
        let digit = first.wrapping_sub(b'0');
        only(digit <= 9)?;
        self.line = rest;
        Some(digit)
    }

    #[inline(always)]
    fn blanks(&mut self) {
        while let [b' ' | b'\t' | b'\r', rest @ ..] = self.line {
            self.line = rest;
        }
    }

    /// Reads the next byte that is no blank.
    #[inline(always)]
    fn mark(&mut self) -> Option<u8> {
        self.blanks();
        let (first, rest) = self.line.split_first()?;
        self.line = rest;
        Some(*first)
    }

    fn expect(&mut self, mark: u8) -> Option<()> {
        only(self.mark()? == mark)
    }

    /// Reads a value of any other kind.
    fn value<T: Deserialize<'a>>(&mut self) -> Option<T> {
        let mut values = serde_json::Deserializer::from_slice(self.line).into_iter();
        let value = values.next()?.ok()?;
        self.line = &self.line[values.byte_offset()..];
        Some(value)
    }
}

#[inline(always)]
fn only(is: bool) -> Option<()> {
    is.then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        Keys {
            arrays: vec![("experts".into(), 2), ("tokens".into(), 3)],
            integers: vec!["sequence".into()],
            texts: vec!["group".into()],
        }
    }

    #[test]
    fn reads_both_forms_and_skips_other_keys() {
        let text = "{\"experts\":[[1, 2],[30,65535]],\"sequence\":-7,\"group\":\"a\\u00e9\"}\n \r\n\
                    {\"group\": \"\u{e9}\", \"x\": [1, [{\"a\": [\"]\", -0.5e+3, null]}]], \"tokens\" : [[[0]],[[9]]]}";
        let lines = scan(text.as_bytes(), 0, &keys());
        assert_eq!(lines.ids, [1, 2, 30, 65535, 0, 9]);
        assert_eq!(lines.table, [0, 1, 2, 2, -7, 0, 1, 2, 1, 1, NO_INTEGER, 1]);
        assert_eq!(lines.texts, ["a\u{e9}", "\u{e9}"]);
        assert_eq!((lines.end, lines.ends), (text.len(), 2));
    }

    #[test]
    fn ends_in_front_of_what_is_not_plain() {
        for line in [
            "{\"experts\":[[01]]}",
            "{\"experts\":[[65536]]}",
            "{\"experts\":[[-1]]}",
            "{\"experts\":[[1.0]]}",
            "{\"experts\":[[[1]]]}",
            "{\"experts\":[1]}",
            "{\"experts\":[[1],[1,2]]}",
            "{\"experts\":[[1]],\"experts\":[[1]]}",
            "{\"experts\":[[1]],\"tokens\":[[[1]]]}",
            "{\"experts\":[[]]}",
            "{\"experts\":[]}",
            "{\"experts\":[[1],]}",
            "{\"experts\":[[1]]} x",
            "{\"experts\":[[1]],\"sequence\":true}",
            "{\"experts\":[[1]],\"sequence\":1.5}",
            "{\"experts\":[[1]],\"sequence\":-9223372036854775808}",
            "{\"experts\":[[1]],\"sequence\":1,\"sequence\":1}",
            "{\"experts\":[[1]],\"group\":3}",
            "{\"experts\":[[1]],\"x\":NaN}",
            "{\"experts\":[[1]],\"x\":\"\\q\"}",
            "{\"experts\":[[1]],\"\\u0078\":1}",
            "{\"sequence\":1}",
            "[1]",
            "{\"experts\":[[1",
        ] {
            let text = format!("{{\"experts\":[[7]]}}\n{line}\n");
            let lines = scan(text.as_bytes(), 0, &keys());
            assert_eq!((lines.end, lines.ends, lines.ids), (18, 1, vec![7]), "{line}");
        }
        let latin = b"{\"experts\":[[1]],\"x\":\"\xff\"}\n";
        assert_eq!(scan(latin, 0, &keys()).end, 0);
    }
}
