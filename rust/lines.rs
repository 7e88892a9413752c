//! Lines of JSON with arrays of expert ids, read fast where they are plain.
//!
//! A trace as text is millions of objects such as `{"experts": [[3, 17], [8, 1]], "sequence": 0}`. [`scan`] reads runs
//! of them in one pass without making a value of anything else, and stops in front of the first line that it does not
//! take: one that is wrong, or right in a way that few writers use (an escape in a key, a key twice, rows of different
//! lengths, ids beyond 16 bits, NaN, nesting beyond [`DEPTH`]). The caller reads that line with a general parser, which
//! also says what is wrong with it; so nothing is decided here but what is beyond doubt.

use std::collections::HashMap;

/// Nested lists and objects in what is skipped.
const DEPTH: usize = 64;

/// Stands for an integer that a line does not have; no line can have it, as it has 19 digits.
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
    /// Texts as they stand in the file, with quotes and escapes, that the table numbers.
    pub texts: Vec<Vec<u8>>,
}

/// Reads lines from byte `start` on, up to the first that is not plain. The last one need not have an end.
#[must_use]
pub fn scan(text: &[u8], start: usize, keys: &Keys) -> Scanned {
    let mut found = Scanned { end: start, ..Scanned::default() };
    let mut numbers: HashMap<&[u8], i64> = HashMap::new();
    let mut cursor = Cursor { text, at: start };
    let width = SIZES + keys.integers.len() + keys.texts.len();
    let mut row = vec![0; width];
    let mut spans = vec![(0, 0); keys.texts.len()];
    while cursor.at < text.len() {
        let ids = found.ids.len();
        cursor.blanks();
        let blank = matches!(cursor.peek(), None | Some(b'\n'));
        if !blank && cursor.object(keys, &mut row, &mut spans, &mut found.ids).is_none() {
            found.ids.truncate(ids);
            break;
        }
        cursor.blanks();
        let ended = cursor.peek() == Some(b'\n');
        if !ended && cursor.at < text.len() {
            found.ids.truncate(ids);
            break;
        }
        let line = &text[found.end..cursor.at];
        if !line.is_ascii() && std::str::from_utf8(line).is_err() {
            found.ids.truncate(ids);
            break;
        }
        if !blank {
            for (column, &(from, to)) in spans.iter().enumerate() {
                let column = SIZES + keys.integers.len() + column;
                if row[column] != NO_TEXT {
                    let raw = &text[from..to];
                    row[column] = *numbers.entry(raw).or_insert_with(|| {
                        found.texts.push(raw.to_vec());
                        found.texts.len() as i64 - 1
                    });
                }
            }
            found.table.extend_from_slice(&row);
        }
        cursor.at += usize::from(ended);
        found.ends += usize::from(ended);
        found.end = cursor.at;
    }
    found
}

/// A place in the text. What it reads is None where the text is not plain, and it is then anywhere in the line.
struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    #[inline(always)]
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    #[inline(always)]
    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    #[inline(always)]
    fn expect(&mut self, wanted: u8) -> Option<()> {
        (self.next()? == wanted).then_some(())
    }

    #[inline(always)]
    fn blanks(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r')) {
            self.at += 1;
        }
    }

    /// Reads an object into a row of the table; texts stay where they are.
    fn object(
        &mut self,
        keys: &Keys,
        row: &mut [i64],
        spans: &mut [(usize, usize)],
        ids: &mut Vec<u16>,
    ) -> Option<()> {
        let (integers, texts) = (SIZES, SIZES + keys.integers.len());
        row[0] = -1;
        row[integers..texts].fill(NO_INTEGER);
        row[texts..].fill(NO_TEXT);
        self.expect(b'{')?;
        loop {
            self.blanks();
            let (from, to) = self.string()?;
            let key = &self.text[from + 1..to - 1];
            if key.contains(&b'\\') {
                return None;
            }
            self.blanks();
            self.expect(b':')?;
            self.blanks();
            if let Some(which) = keys.arrays.iter().position(|(name, _)| name.as_bytes() == key) {
                if row[0] >= 0 {
                    return None;
                }
                row[0] = which as i64;
                row[1..SIZES].copy_from_slice(&self.array(keys.arrays[which].1, ids)?);
            } else if let Some(which) = keys.integers.iter().position(|name| name.as_bytes() == key) {
                if row[integers + which] != NO_INTEGER {
                    return None;
                }
                row[integers + which] = self.integer()?;
            } else if let Some(which) = keys.texts.iter().position(|name| name.as_bytes() == key) {
                if row[texts + which] != NO_TEXT {
                    return None;
                }
                spans[which] = self.string()?;
                row[texts + which] = 0;
            } else {
                self.value(DEPTH)?;
            }
            self.blanks();
            match self.next()? {
                b',' => {}
                b'}' => break,
                _ => return None,
            }
        }
        (row[0] >= 0).then_some(())
    }

    /// Reads an array of two or three dimensions, whose rows have one length; gives its sizes.
    fn array(&mut self, dimensions: usize, ids: &mut Vec<u16>) -> Option<[i64; 3]> {
        let mut width = 0;
        if dimensions == 2 {
            let rows = self.rows(&mut width, ids)?;
            return Some([1, rows, width]);
        }
        self.expect(b'[')?;
        let (mut planes, mut rows) = (0, 0);
        loop {
            self.blanks();
            let these = self.rows(&mut width, ids)?;
            if planes > 0 && these != rows {
                return None;
            }
            (planes, rows) = (planes + 1, these);
            self.blanks();
            match self.next()? {
                b',' => {}
                b']' => return Some([planes, rows, width]),
                _ => return None,
            }
        }
    }

    fn rows(&mut self, width: &mut i64, ids: &mut Vec<u16>) -> Option<i64> {
        self.expect(b'[')?;
        let mut rows = 0;
        loop {
            self.blanks();
            let found = self.row(ids)?;
            if *width != 0 && found != *width {
                return None;
            }
            *width = found;
            rows += 1;
            self.blanks();
            match self.next()? {
                b',' => {}
                b']' => return Some(rows),
                _ => return None,
            }
        }
    }

    #[inline(always)]
    fn row(&mut self, ids: &mut Vec<u16>) -> Option<i64> {
        self.expect(b'[')?;
        let before = ids.len();
        loop {
            self.blanks();
            ids.push(self.id()?);
            self.blanks();
            match self.next()? {
                b',' => {}
                b']' => return Some((ids.len() - before) as i64),
                _ => return None,
            }
        }
    }

    /// Reads a number below 2^16. What may not follow one (a digit after a zero, a point) is found by the caller.
    #[inline(always)]
    fn id(&mut self) -> Option<u16> {
        let mut value = u32::from(self.digit()?);
        if value > 0 {
            while let Some(digit) = self.digit() {
                value = value * 10 + u32::from(digit);
                if value > u32::from(u16::MAX) {
                    return None;
                }
            }
        }
        Some(value as u16)
    }

    #[inline(always)]
    fn digit(&mut self) -> Option<u8> {
        let digit = self.peek()?.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        self.at += 1;
        Some(digit)
    }

    /// Reads an integer of at most 18 digits; a fraction or an exponent behind it is found by the caller.
    fn integer(&mut self) -> Option<i64> {
        let negative = self.peek() == Some(b'-');
        self.at += usize::from(negative);
        let from = self.at;
        let mut value = i64::from(self.digit()?);
        if value > 0 {
            while let Some(digit) = self.digit() {
                value = value * 10 + i64::from(digit);
                if self.at - from > 18 {
                    return None;
                }
            }
        }
        Some(if negative { -value } else { value })
    }

    /// Skips a text; gives where it is, quotes included. Whether it is UTF-8 is seen at the end of the line.
    #[inline(always)]
    fn string(&mut self) -> Option<(usize, usize)> {
        let from = self.at;
        self.expect(b'"')?;
        loop {
            match self.next()? {
                b'"' => return Some((from, self.at)),
                b'\\' => match self.next()? {
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                    b'u' => {
                        for _ in 0..4 {
                            self.next().filter(u8::is_ascii_hexdigit)?;
                        }
                    }
                    _ => return None,
                },
                0..0x20 => return None,
                _ => {}
            }
        }
    }

    /// Skips a value of any kind.
    fn value(&mut self, depth: usize) -> Option<()> {
        match self.peek()? {
            b'"' => self.string().map(|_| ()),
            b'{' => self.members(b'}', depth.checked_sub(1)?),
            b'[' => self.members(b']', depth.checked_sub(1)?),
            b't' => self.literal(b"true"),
            b'f' => self.literal(b"false"),
            b'n' => self.literal(b"null"),
            _ => self.number(),
        }
    }

    fn members(&mut self, close: u8, depth: usize) -> Option<()> {
        self.at += 1;
        self.blanks();
        if self.peek()? == close {
            self.at += 1;
            return Some(());
        }
        loop {
            self.blanks();
            if close == b'}' {
                self.string()?;
                self.blanks();
                self.expect(b':')?;
                self.blanks();
            }
            self.value(depth)?;
            self.blanks();
            let byte = self.next()?;
            if byte == close {
                return Some(());
            }
            if byte != b',' {
                return None;
            }
        }
    }

    fn literal(&mut self, word: &[u8]) -> Option<()> {
        let found = self.text.get(self.at..self.at + word.len())? == word;
        self.at += word.len();
        found.then_some(())
    }

    /// Skips a number. Very long ones are left to whoever has a limit for them.
    fn number(&mut self) -> Option<()> {
        let from = self.at;
        self.at += usize::from(self.peek() == Some(b'-'));
        if self.digit()? > 0 {
            while self.digit().is_some() {}
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digit()?;
            while self.digit().is_some() {}
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            self.at += usize::from(matches!(self.peek(), Some(b'+' | b'-')));
            self.digit()?;
            while self.digit().is_some() {}
        }
        (self.at - from < 400).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys() -> Keys {
        Keys {
            arrays: vec![("experts".into(), 2), ("tokens".into(), 3)],
            integers: vec!["sequence".into()],
            texts: vec!["group".into()],
        }
    }

    fn taken(text: &str) -> usize {
        scan(text.as_bytes(), 0, &keys()).table.len() / (SIZES + 2)
    }

    #[test]
    fn reads_both_forms() {
        let text = "{\"experts\":[[1, 2],[30,65535]],\"sequence\":-7,\"group\":\"a\\u00e9\"}\n \r\n{\"group\": \"\u{e9}\", \"tokens\" : [[[0]],[[9]]]}";
        let found = scan(text.as_bytes(), 0, &keys());
        assert_eq!(found.ids, [1, 2, 30, 65535, 0, 9]);
        assert_eq!(found.table, [0, 1, 2, 2, -7, 0, 1, 2, 1, 1, NO_INTEGER, 1]);
        assert_eq!(found.texts, [b"\"a\\u00e9\"".to_vec(), "\"\u{e9}\"".as_bytes().to_vec()]);
        assert_eq!((found.end, found.ends), (text.len(), 2));
    }

    #[test]
    fn skips_values_of_every_kind() {
        for value in
            ["1", "-0.5e+3", "null", "true", "false", "\"\\\\\\\"\"", "[]", "{}", "[1, [{\"a\": [\"]\"]}]]"]
        {
            assert_eq!(taken(&format!("{{\"x\": {value}, \"experts\": [[1]]}}")), 1, "{value}");
        }
    }

    #[test]
    fn stops_in_front_of_what_is_not_plain() {
        let deep = format!("{}{}", "[".repeat(DEPTH + 1), "]".repeat(DEPTH + 1));
        let others = [
            "{\"experts\":[[01]]}",
            "{\"experts\":[[65536]]}",
            "{\"experts\":[[-1]]}",
            "{\"experts\":[[1.0]]}",
            "{\"experts\":[[1e2]]}",
            "{\"experts\":[[1],[1,2]]}",
            "{\"experts\":[[1]],\"experts\":[[1]]}",
            "{\"experts\":[[]]}",
            "{\"experts\":[]}",
            "{\"experts\":[[1],]}",
            "{\"experts\":[[1]],}",
            "{\"experts\":[[1]]} x",
            "{\"experts\":[[1]],\"sequence\":true}",
            "{\"experts\":[[1]],\"sequence\":1.5}",
            "{\"experts\":[[1]],\"sequence\":1234567890123456789}",
            "{\"experts\":[[1]],\"group\":3}",
            "{\"experts\":[[1]],\"x\":NaN}",
            "{\"experts\":[[1]],\"x\":\"\\q\"}",
            "{\"experts\":[[1]],\"x\":\"\t\"}",
            "{\"sequence\":1}",
            "{}",
            "[1]",
            "{\"experts\":[[1",
            &format!("{{\"experts\":[[1]],\"x\":{deep}}}"),
        ];
        for line in others {
            let text = format!("{{\"experts\":[[7]]}}\n{line}\n");
            let found = scan(text.as_bytes(), 0, &keys());
            assert_eq!((found.end, found.ends, found.ids), (18, 1, vec![7]), "{line}");
        }
        let latin = b"{\"experts\":[[1]],\"x\":\"\xff\"}\n";
        assert_eq!(scan(latin, 0, &keys()).end, 0);
    }

    proptest! {
        /// Whatever the bytes are, it ends at the end of a line, and what it takes it takes again.
        #[test]
        fn takes_whole_lines_only(
            lines in prop::collection::vec("(\\{\"(experts|tokens|x)\":[\\[\\]0-9,. ]{0,12}\\})?[ {}\"]{0,2}", 0..8),
            cut in 0usize..40,
        ) {
            let mut text = lines.join("\n").into_bytes();
            text.truncate(text.len().saturating_sub(cut));
            let found = scan(&text, 0, &keys());
            prop_assert!(found.end == 0 || found.end == text.len() || text[found.end - 1] == b'\n');
            let again = scan(&text[..found.end], 0, &keys());
            prop_assert_eq!(again, found);
        }
    }
}
