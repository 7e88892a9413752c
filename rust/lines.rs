//! Lines of JSON with arrays of expert ids.
//!
//! A trace as text is millions of objects such as `{"experts": [[3, 17], [8, 1]], "sequence": 0}`. [`scan`] reads runs
//! of them into columns, skips all other values, and stops at the first line that breaks a rule, which it reports. That line
//! may still be valid JSON of a rare kind (an escape in a key, NaN in a value that is skipped): the caller parses it with a
//! more general parser.

use std::collections::HashMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

/// Marks an integer that a line does not have.
pub const NO_INTEGER: i64 = i64::MIN;
/// Marks a text or an array that a line does not have, and a size that is not known yet.
pub const NONE: i64 = -1;

/// Number of columns of [`Scanned::table`] before those of integers and texts: the array's number, and its sizes, outermost
/// first.
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

/// The contents of a run of lines.
#[derive(Debug, Clone, Default)]
pub struct Scanned {
    /// First byte after the lines that were read.
    pub end: usize,
    /// Line ends among them, blank lines included.
    pub ends: usize,
    /// Ids of all lines one after the other.
    pub ids: Vec<u16>,
    /// A row for every line that is not blank: number of the array, its sizes (1 in front of two), integers, texts.
    pub table: Vec<i64>,
    /// Texts, by their numbers in the table.
    pub texts: Vec<String>,
    /// The rule that the next line breaks.
    pub refused: Option<String>,
    numbers: HashMap<String, i64>,
}

/// Reads lines from byte `start` on, up to the first one that breaks a rule. The last line need not have an end.
#[must_use]
pub fn scan(text: &[u8], start: usize, keys: &Keys) -> Scanned {
    let mut lines = Scanned { end: start, ..Scanned::default() };
    for line in text[start..].split_inclusive(|&byte| byte == b'\n') {
        if !line.trim_ascii().is_empty() {
            let (ids, table) = (lines.ids.len(), lines.table.len());
            if let Err(rule) = read(line, keys, &mut lines) {
                lines.ids.truncate(ids);
                lines.table.truncate(table);
                lines.refused = Some(rule);
                break;
            }
        }
        lines.ends += usize::from(line.ends_with(b"\n"));
        lines.end += line.len();
    }
    lines
}

/// Reads a line into a row of the table.
fn read(line: &[u8], keys: &Keys, lines: &mut Scanned) -> Result<(), String> {
    let Scanned { ids, table, texts, numbers, .. } = lines;
    let begin = table.len();
    table.extend([NONE; SIZES]);
    table.extend(keys.integers.iter().map(|_| NO_INTEGER));
    table.extend(keys.texts.iter().map(|_| NONE));
    let (sizes, columns) = table[begin..].split_at_mut(SIZES);
    let (of_integers, of_texts) = columns.split_at_mut(keys.integers.len());
    let json = || "must be a JSON object".to_string();
    std::str::from_utf8(line).map_err(|error| error.to_string())?;
    let mut cursor = Cursor { line };
    cursor.expect(b'{').ok_or_else(json)?;
    loop {
        let key: &str = cursor.value().ok_or_else(json)?;
        cursor.expect(b':').ok_or_else(json)?;
        let place = |names: &[String]| names.iter().position(|name| name == key);
        let rule = |rule: &str| format!("{key} must be {rule}");
        let once = |is_new: bool| only(is_new).ok_or_else(|| rule("there once"));
        if let Some(which) = keys.arrays.iter().position(|(name, _)| name == key) {
            once(sizes[0] == NONE)?;
            let depth = keys.arrays[which].1;
            sizes[..SIZES - depth].fill(1);
            sizes[0] = which as i64;
            let deep = || rule(&format!("integers from 0 to 65535, in lists of one length, {depth} deep"));
            cursor.list(&mut sizes[SIZES - depth..], ids).ok_or_else(deep)?;
        } else if let Some(which) = place(&keys.integers) {
            once(of_integers[which] == NO_INTEGER)?;
            of_integers[which] = cursor.value().ok_or_else(|| rule("an integer of 64 bits"))?;
        } else if let Some(which) = place(&keys.texts) {
            once(of_texts[which] == NONE)?;
            let name: String = cursor.value().ok_or_else(|| rule("a text"))?;
            of_texts[which] = *numbers.entry(name).or_insert_with_key(|name| {
                texts.push(name.clone());
                texts.len() as i64 - 1
            });
        } else {
            cursor.value::<IgnoredAny>().ok_or_else(json)?;
        }
        match cursor.mark() {
            Some(b',') => {}
            Some(b'}') => break,
            _ => return Err(json()),
        }
    }
    // An empty list has no lists in it.
    sizes[1..].iter_mut().for_each(|size| *size = (*size).max(0));
    only(cursor.line.trim_ascii().is_empty() && sizes[0] != NONE).ok_or_else(json)
}

/// The rest of a line. Its methods return None if the line continues in another way.
struct Cursor<'a> {
    line: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// Reads nested lists. Lists of one depth have one length, which is [`NONE`] in `sizes` until it is known.
    fn list(&mut self, sizes: &mut [i64], ids: &mut Vec<u16>) -> Option<()> {
        let [size, inner @ ..] = sizes else { return None };
        self.expect(b'[')?;
        self.skip_blanks();
        let mut count = 0;
        let mut goes_on = self.line.first() != Some(&b']');
        if !goes_on {
            self.mark()?;
        }
        while goes_on {
            if inner.is_empty() {
                ids.push(self.id()?);
            } else {
                self.list(inner, ids)?;
            }
            count += 1;
            goes_on = match self.mark()? {
                b',' => true,
                b']' => false,
                _ => return None,
            };
        }
        only(*size == NONE || *size == count)?;
        *size = count;
        Some(())
    }

    /// Reads a number below 2^16. Characters that may not follow a number (a digit after a zero, a point) are rejected as marks.
    #[inline(always)]
    fn id(&mut self) -> Option<u16> {
        self.skip_blanks();
        let mut value = u32::from(self.digit()?);
        if value > 0 {
            while let Some(digit) = self.digit() {
                value = value * 10 + u32::from(digit);
                only(value < 1 << 16)?;
            }
        }
        Some(value as u16)
    }

    /// Reads a digit.
    #[inline(always)]
    fn digit(&mut self) -> Option<u8> {
        let (first, rest) = self.line.split_first()?;
        let digit = first.wrapping_sub(b'0');
        only(digit <= 9)?;
        self.line = rest;
        Some(digit)
    }

    /// Skips blanks.
    #[inline(always)]
    fn skip_blanks(&mut self) {
        while let [b' ' | b'\t' | b'\r', rest @ ..] = self.line {
            self.line = rest;
        }
    }

    /// Reads the next byte that is not blank.
    #[inline(always)]
    fn mark(&mut self) -> Option<u8> {
        self.skip_blanks();
        let (first, rest) = self.line.split_first()?;
        self.line = rest;
        Some(*first)
    }

    /// Reads a mark, which must be this one.
    fn expect(&mut self, mark: u8) -> Option<()> {
        only(self.mark()? == mark)
    }

    /// Reads a JSON value of any type.
    fn value<T: Deserialize<'a>>(&mut self) -> Option<T> {
        let mut values = serde_json::Deserializer::from_slice(self.line).into_iter();
        let value = values.next()?.ok()?;
        self.line = &self.line[values.byte_offset()..];
        Some(value)
    }
}

/// Returns None unless a condition holds.
#[inline(always)]
fn only(condition: bool) -> Option<()> {
    condition.then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both forms are read, and other keys are skipped, without a line being refused. Python parses refused lines itself, so
    /// that no other test would notice.
    #[test]
    fn reads_both_forms_and_skips_other_keys() {
        let arrays = vec![("experts".into(), 2), ("tokens".into(), 3)];
        let keys = Keys { arrays, integers: vec!["sequence".into()], texts: vec!["group".into()] };
        let text = "{\"experts\":[[1, 2],[30,65535]],\"sequence\":-7,\"group\":\"a\\u00e9\"}\n \r\n\
                    {\"group\": \"\u{e9}\", \"x\": [1, [{\"a\": [\"]\", -0.5e+3, null]}]], \"tokens\" : [[[0]],[[9]]]}\n\
                    {\"tokens\":[]}";
        let lines = scan(text.as_bytes(), 0, &keys);
        assert_eq!(lines.ids, [1, 2, 30, 65535, 0, 9]);
        let expected = [0, 1, 2, 2, -7, 0, 1, 2, 1, 1, NO_INTEGER, 1, 1, 0, 0, 0, NO_INTEGER, NONE];
        assert_eq!(lines.table, expected);
        assert_eq!(lines.texts, ["a\u{e9}", "\u{e9}"]);
        assert_eq!((lines.end, lines.ends, lines.refused), (text.len(), 3, None));
    }
}
